"""The pipeline launches encoder and adapter without a look at any value, and reads the results of a group once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rada_fast import EpisodeConfig, TestTimePredictor
from rada_fast.engine import pipeline
from rada_fast.engine.pipeline import Item, Pipeline, Uploads
from rada_fast.extension import libraries
from tests.loops.conftest import load_tiny


class NoHostValues(TorchDispatchMode):
    """NoHostValues refuses operations for which a host would wait until a device has computed a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (12, 9 + number, 3), dtype=np.uint8)) for number in range(5)]


@pytest.mark.skipif(libraries.load() is not None, reason="no compiled operators")
def test_nothing_is_read_while_a_group_is_launched(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU this goes the way of a GPU's pictures, apart from the streams and the graphs."""
    monkeypatch.setattr(pipeline, "CUT_BY_THREADS", ())
    monkeypatch.setitem(pipeline.GROUPS_BEHIND, "cpu", 1)
    log: list[str] = []

    def watched(name: str) -> None:
        original = getattr(Pipeline, name)

        def launch(self: Pipeline) -> None:
            log.append(name)
            with NoHostValues():
                original(self)

        monkeypatch.setattr(Pipeline, name, launch)

    watched("_encode")
    watched("_adapt")
    upload = Uploads.__call__

    def with_tables(uploads: Uploads, item: Item) -> Item:
        with _disable_current_modes():  # the boxes of the views are on the host, where they are looked at
            return upload(uploads, item)

    monkeypatch.setattr(Uploads, "__call__", with_tables)
    arrived = Pipeline._arrived

    def read(self: Pipeline) -> Iterator[Any]:
        log.append("read")
        return arrived(self)

    monkeypatch.setattr(Pipeline, "_arrived", read)
    predictor = TestTimePredictor(
        load_tiny(), ("cat", "dog", "emu"), views=4, config=EpisodeConfig(steps=2, selection=0.5), episodes=2
    )
    with closing(predictor.predict(pictures)) as results:
        assert [one.status for one in results] == ["ok"] * 5
    group = ["_encode", "_encode", "_adapt"]
    # The first group is read when the second one has been launched, and so on.
    assert log == [*group, *group, "read", "_encode", "_adapt", "read", "read"]


@pytest.mark.gpu
def test_a_gpu_has_the_same_results_however_pictures_come(pictures: list[Image.Image], tmp_path: Path) -> None:
    def results(**options: Any) -> dict[str, tuple[list[float], list[float]]]:
        predictor = TestTimePredictor("embedded", ("cat", "dog", "emu"), device="cuda", views=16, **options)
        found = {}
        for _ in range(2):  # the second time from graphs
            for one in predictor.stream(pictures):
                assert one.logits is not None
                assert one.zero_shot_logits is not None
                found[one.id] = (one.logits.tolist(), one.zero_shot_logits.tolist())
        assert predictor.times.seconds()["encode"] > 0
        return found

    expected = results(workers=2)
    assert results(workers=0, episodes=1) == expected
    assert results(workers=3, episodes=2) == expected
    torch.cuda.synchronize()
