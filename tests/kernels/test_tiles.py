"""Tiles are measured on a device, kept on disk and used by later calls, unless a variable turns them off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rada_fast.bench.tuning import launches_of
from rada_fast.cli import main
from rada_fast.config.method import AdapterConfig
from rada_fast.ops._backends import tiles
from rada_fast.ops._backends.tiles import Sizes, cache_file, candidates, table_tile, tune

from .conftest import Simulated

SIZES = Sizes(torch.bfloat16, 200, 1200, 512, 64)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path))
    tiles.forget()


@pytest.mark.parametrize("launch", tiles.TILES)
def test_candidates_are_few_and_begin_with_the_table(launch: str) -> None:
    for sizes in (SIZES, Sizes(torch.float32, 37, 37, 64, 64), Sizes(torch.bfloat16, 1000, 6000, 640, 80)):
        tiles = list(candidates(launch, sizes))
        assert tiles[0] == table_tile(launch, sizes)
        assert 1 < len(tiles) <= 10
        assert len(set(tiles)) == len(tiles)


def test_the_fastest_tile_is_kept_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    # The third tile of class_attention_forward is the fastest. No tile of parameter_gradients beats that of the table.
    times = {"class_attention_forward": iter([2.0, 2.0, 1.0, *[3.0] * 7]), "parameter_gradients": iter([1.0] * 10)}

    def run(launch: str) -> Any:
        return lambda tile: (calls.append((launch, tile)), next(times[launch]))[1]

    report = tune({launch: run(launch) for launch in times}, SIZES, "NVIDIA A100-SXM4-40GB", lambda call: call(), str)
    assert report["class_attention_forward"]["ratio"] == 2.0
    assert len(calls) <= 20
    path = cache_file("NVIDIA A100-SXM4-40GB")
    assert list(json.loads(path.read_text())) == [SIZES.key("class_attention_forward")]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-40GB")
    device, near = torch.device("cuda", 0), Sizes(torch.bfloat16, 250, 1500, 512, 64)
    tried = [tile for name, tile in calls if name == "class_attention_forward"]
    assert tiles.chosen_tile(device, "class_attention_forward", near) == tried[2]
    assert tiles.chosen_tile(device, "parameter_gradients", near) is None
    assert tiles.chosen_tile(device, "class_attention_forward", Sizes(torch.bfloat16, 1000, 6000, 512, 64)) is None
    assert tiles.chosen_tile(torch.device("cpu"), "class_attention_forward", near) is None
    monkeypatch.setenv("RADA_FAST_TILES", "table")
    tiles.forget()
    assert tiles.chosen_tile(device, "class_attention_forward", near) is None


OLD_TILE = {"queries": 64, "keys": 32, "columns": 64, "warps": 4, "stages": 2}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"class_attention_forward x": {}}',
        '{"unknown x": {"rows": 1}}',
        # Earlier versions wrote the name of the forward launch without a suffix.
        json.dumps({SIZES.key("class_attention"): OLD_TILE}),
    ],
)
def test_a_broken_or_old_file_is_ignored(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "device")
    path = cache_file("device")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tiles.chosen_tile(torch.device("cuda", 0), "class_attention_forward", SIZES) is None
    report = tune({"class_attention_forward": lambda tile: 1.0}, SIZES, "device", lambda call: call(), str)
    assert report["class_attention_forward"]["ratio"] == 1.0


def test_a_tile_that_does_not_compile_is_passed_over() -> None:
    import triton

    def run(tile: Any) -> float:
        if tile != table_tile("class_attention_forward", SIZES):
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 1.0

    assert (
        tune({"class_attention_forward": run}, SIZES, "device", lambda call: call(), str)["class_attention_forward"][
            "tried"
        ]
        == 1
    )


def test_every_launch_runs_with_another_tile(simulated: Simulated) -> None:
    config = AdapterConfig.official(128)
    sizes = Sizes(torch.bfloat16, 20, 40, 128, 16)
    with simulated() as log:
        for launch, run in launches_of(config, 2, 20, torch.bfloat16, "cpu").items():
            before = len(log)
            # This tile has one pipeline stage less than that of the table; one more may not fit into shared memory.
            run(list(candidates(launch, sizes))[2])
            assert len(log) > before


def test_tuning_without_a_device_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["kernels", "--tune"]) != 0
    assert "--tune measures on a CUDA device and none is visible" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_a_device_reports_every_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--tune", "--json", "--batch", "2", "--classes", "100"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(tiles.TILES)
