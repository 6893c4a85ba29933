"""Configurations check their fields, and a dictionary of one makes the same one again."""

from __future__ import annotations

from typing import Any

import pytest

from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.config.tools import KernelsOptions


def test_presets_have_the_published_arithmetic() -> None:
    official, paper = AdapterConfig.official(512), AdapterConfig.paper(512)
    assert (official.num_heads, official.softmax, official.input_scale, official.mask_activation, official.bias) == (
        8, "matrix", "logit", "relu", True,
    )  # fmt: skip
    assert (paper.num_heads, paper.softmax, paper.input_scale, paper.mask_activation, paper.temperature) == (
        1, "row", "none", "none", 1.0,
    )  # fmt: skip
    assert official.preset == "official"
    assert AdapterConfig.official(512, temperature=0.5).preset == "official"
    assert paper.preset == "paper"
    assert AdapterConfig.official(512, num_layers=2).preset == "custom"


def test_round_trip_and_query_order() -> None:
    config = AdapterConfig.official(64, queries=("rational", "image"))
    assert config.queries == ("image", "rational")
    assert AdapterConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown fields widht"):
        AdapterConfig.from_dict({"embed_dim": 64, "widht": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be a whole number of at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide embed_dim 64, got 3"),
        ({"softmax": "column"}, "softmax must be one of 'matrix', 'row', got 'column'"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"queries": ()}, "queries must be a non-empty tuple"),
        ({"queries": "image"}, "queries must be a non-empty tuple"),
        ({"queries": ("image", "image")}, "queries must not repeat"),
        ({"queries": ("sound",)}, "queries must be one of"),
        ({"mask_function": "mlp", "num_layers": 2}, "num_layers must be 1 with mask_function 'mlp'"),
    ],
)
def test_adapter_fields_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**({"embed_dim": 64} | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpisodeConfig(selection=0), "selection must be above 0 and at most 1, got 0"),
        (lambda: EpisodeConfig(steps=-1), "steps must be a whole number of at least 0, got -1"),
        (lambda: EpisodeConfig(loss="median"), "loss must be one of 'mean', 'marginal'"),  # type: ignore[arg-type]
        (lambda: TTTOptions(data="x", views=0), "views must be a whole number of at least 1"),
        (lambda: EFTOptions(train="x", test="x", lr=-1), "lr must be above 0, got -1"),
        (lambda: EFTOptions(train="x", test="x", new_test="y"), "new_test needs protocol 'all'"),
        (lambda: EFTOptions(train="x", test="x", penalty="l3"), "penalty must be one of 'l2', 'l1', 'linf', got 'l3'"),  # type: ignore[arg-type]
        (lambda: FFTOptions(train="x", test=("x",), stages="rad"), "stages must be one of 'both', 'first', got 'rad'"),  # type: ignore[arg-type]
        (lambda: KernelsOptions(targets=(70,)), "targets must be one of .*, got 70"),  # type: ignore[arg-type]
        (lambda: FFTOptions(train="x", test=()), "test must name at least one source"),
        (lambda: FFTOptions(train="x", test=("y",), finetune_from=11), "finetune_from must be at most epochs 10"),
    ],
)
def test_loop_fields_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_episode_keeps_a_share_of_the_views() -> None:
    assert EpisodeConfig().num_selected(64) == 6
    assert EpisodeConfig().num_selected(1) == 1
    assert EpisodeConfig(selection=1.0).num_selected(7) == 7
