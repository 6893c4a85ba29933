"""The number of pictures that are adapted together keeps to the budget, by the formula that the docstring states."""

from __future__ import annotations

import pytest
import torch

from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine import groups
from rada_fast.engine.groups import EpisodeRule, episode_bytes
from rada_fast.engine.memory import EncoderLoad, encoder_bytes, memory_plan
from rada_fast.errors import UserError
from rada_fast.models.vision_language import load_model

VIEWS, CLASSES, WIDTH, SIZE = 64, 200, 512, 224
RULE = EpisodeRule(AdapterConfig.official(WIDTH), EpisodeConfig(), torch.float32, True, ())
CPU = torch.device("cpu")


def test_the_plan_takes_what_the_formula_says() -> None:
    ahead, batch, each_view = 3 * VIEWS, VIEWS, 2**20
    load = EncoderLoad(ahead, batch, 12 * SIZE**2, each_view)
    fixed = 12 * SIZE**2 * (ahead + batch) + each_view * batch
    each = 4 * VIEWS * WIDTH + 8 * CLASSES + episode_bytes(RULE, VIEWS, CLASSES)
    for episodes in (1, 2, 16):
        budget = fixed + episodes * each
        plan = memory_plan(RULE, VIEWS, CLASSES, CPU, load=load, memory=budget)
        assert plan == (episodes, budget)
    # Three fit, but groups have a power of two of episodes.
    assert memory_plan(RULE, VIEWS, CLASSES, CPU, load=load, memory=fixed + 3 * each).episodes == 2
    assert memory_plan(RULE, VIEWS, CLASSES, CPU, load=load, memory=fixed + 3 * each, episodes=1).episodes == 1
    with pytest.raises(UserError, match=rf"memory must be at least {-(-(fixed + each) // 2**20)}MiB for 64 views"):
        memory_plan(RULE, VIEWS, CLASSES, CPU, load=load, memory=fixed + each - 1)


def test_without_a_budget_groups_have_a_useful_size(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = episode_bytes(RULE, VIEWS, CLASSES)
    monkeypatch.setitem(groups.BUDGETS, "cpu", 5 * taken)
    assert memory_plan(RULE, VIEWS, CLASSES, CPU).episodes == 4
    assert memory_plan(RULE, VIEWS, CLASSES, CPU, episodes=3).episodes == 2
    monkeypatch.setitem(groups.BUDGETS, "cpu", 1)
    assert memory_plan(RULE, VIEWS, CLASSES, CPU).episodes == 1
    assert memory_plan(RULE, VIEWS, CLASSES, CPU, memory=2**60).episodes == groups.MOST_EPISODES


def test_an_encoders_tokens_and_width_are_counted() -> None:
    model = load_model("embedded").model
    assert encoder_bytes(model.visual, 12 * 48**2) == 16 * 4 * 37 * 160
    assert encoder_bytes(torch.nn.Linear(3, 4), 12 * 48**2) == 16 * 12 * 48**2
