"""The command bench roofline measures every operator, says which it cannot, and goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from rada_fast import cli, ops
from rada_fast.bench import roofline, roofline_adapter, roofline_operators
from rada_fast.bench.costs import view_operations
from rada_fast.bench.timing import Interleaved, interleaved
from rada_fast.config.bench_limits import ROOFLINE_OPERATORS, BenchRooflineOptions
from rada_fast.ops import backends, use_backend

from .conftest import Lines

SMALL = (
    "--batch", "2", "--classes", "5", "--embed-dim", "16", "--views", "3", "--image-size", "16", "--episodes", "2",
    "--precision", "float32",
)  # fmt: skip
FACTS = {"cpu_paths", "device_architecture"}
"""Operators that compute nothing, but tell what the processor or the device has."""
NOT_COMPUTING = {
    "BACKENDS", "CROP_SCALE", "VIEW_COLUMNS", "AdapterOutput", "AugmixPlan", "KeptViews", "backends", "resolve_backend",
    "serving_backend", "under_transform", "use_backend",
    # EpisodicOptimizer consists of it.
    "episodic_optimizer_step",
}  # fmt: skip

needs_extension = pytest.mark.skipif(backends()["cpu"] != "usable", reason="needs the compiled extension")


def options(**given: Any) -> BenchRooflineOptions:
    sizes: dict[str, Any] = {
        "batch": (2,), "classes": (5,), "embed_dim": 16, "views": 3, "image_size": 16, "episodes": (2,),
        "precision": ("float32",), "device": "cpu",
    }  # fmt: skip
    return BenchRooflineOptions(**sizes | given)


class OperatorNames(TorchDispatchMode):
    """Remember which operators of the package run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rada_fast":
            self.names.add(func._opname)
        return func(*args, **kwargs or {})


@needs_extension
def test_every_operator_is_measured() -> None:
    with OperatorNames() as found, use_backend("cpu"):
        for group in roofline.groups(options(), torch.device("cpu")):
            for candidate in group.candidates:
                candidate.make()()
    source = (Path(__file__).parents[2] / "csrc" / "ops.cpp").read_text()
    compiled = {part.partition("(")[0] for part in source.split('library.def("')[1:]}
    assert len(compiled) > 10
    assert found.names == compiled - FACTS
    used = {*vars(roofline_operators), *vars(roofline_adapter)}
    assert set(ops.__all__) - NOT_COMPUTING <= used


@needs_extension
def test_lines_of_figures(bench: Callable[..., Lines]) -> None:
    lines = bench("roofline", *SMALL)
    stages = [line for line in lines if line["kind"] == "stage"]
    assert {line["setting"].partition(", ")[0] for line in stages} == set(ROOFLINE_OPERATORS)
    assert not [line for line in lines if line["kind"] == "refusal"]
    for line in stages:
        assert line["bytes_per_picture"] > 0
        assert line["share_of_floor"] == pytest.approx(line["floor_ms"] / line["best"])
        operations = line["operations_per_picture"]
        assert line["intensity"] == (operations and pytest.approx(operations / line["bytes_per_picture"]))
    step = next(line for line in stages if line["name"] == "forward+backward")
    # B (18 K D^2 + 18 K^2 D) operations; twice the parameters, the features and the logits in bytes.
    assert step["operations_per_picture"] == 2 * (18 * 5 * 256 + 18 * 25 * 16)
    assert step["bytes_per_picture"] == 4 * (2 * 6 * (256 + 16) + 7 * 16 + 10)
    limits = {line["name"] for line in lines if line["kind"] == "limit"}
    assert {"bandwidth of memory", "bandwidth of caches", "float32 products by PyTorch"} <= limits


def test_what_cannot_run_is_said(bench: Callable[..., Lines], tmp_path: Path) -> None:
    chosen = ("--backend", "reference", "--only", "small-transformer", "--output", str(tmp_path))
    lines = bench("roofline", *SMALL, *chosen)
    assert (tmp_path / "bench-roofline.png").is_file()
    assert [(line["kind"], line["name"]) for line in lines] == [
        ("refusal", "small_transformer"), ("refusal", "panels_of")
    ]  # fmt: skip
    assert all("reference" in line["inside"] for line in lines)
    group = next(iter(roofline.groups(options(only=("adapter",)), torch.device("cpu"))))
    with use_backend("triton"):
        setting = roofline.setting_of(group, "triton")
    assert not setting.stages
    assert set(setting.refusals) == {candidate.name for candidate in group.candidates}
    assert all("triton" in reason for reason in setting.refusals.values())


@needs_extension
def test_an_interrupted_run_goes_on(
    bench: Callable[..., Lines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "roofline", *SMALL, "--only", "selection", "losses", "--repeats", "2", "--output"]
    measured, asked = roofline.measured, []

    def interrupted(group: Any, *others: Any) -> Any:
        asked.append(group.operator)
        if group.operator == "losses" and len(asked) == 3:
            raise KeyboardInterrupt
        return measured(group, *others)

    monkeypatch.setattr(roofline, "measured", interrupted)
    assert cli.main([*command, str(tmp_path)]) == 130
    partial = tmp_path / "bench-roofline.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 3
    # A killed process leaves half a line.
    partial.write_text(partial.read_text() + '{"setting": ')
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path)]) == 0
    assert asked == ["selection", "selection", "losses", "losses"]
    shown = capsys.readouterr()
    assert "2 settings of an interrupted run" in shown.err
    assert "FLOP/byte" in shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-roofline.jsonl", "bench-roofline.png"]
    lines = [json.loads(line) for line in (tmp_path / "bench-roofline.jsonl").read_text().splitlines()]
    assert {"select_views", "mean loss"} <= {line["name"] for line in lines}
    with Image.open(tmp_path / "bench-roofline.png") as image:
        assert image.size[0] > 1000
    # Another request begins anew.
    partial.write_text('{"options": {}}\n{"setting": "losses", "figures": []}\n')
    assert cli.main([*command, str(tmp_path), "--seed", "1"]) == 0
    assert len(asked) == 7


def test_data_in_caches_have_their_bandwidth(bench: Callable[..., Lines], monkeypatch: pytest.MonkeyPatch) -> None:
    from rada_fast.bench import timing

    monkeypatch.setattr(timing, "PASS_BYTES", (64, 256, 2**20))
    found = interleaved({"nothing": lambda: None}, "cpu", seconds=0.0, repeats=1, caches=True)
    # Larger buffers than the main memory's probe of 4096 bytes are left out. Changing and copying move a byte twice.
    assert set(found.passes) == {64, 128, 256, 512, 4096, 8192}
    given = Interleaved({}, {}, {}, 10.0, {}, {128: 30.0, 512: 20.0})
    # More than the largest buffer is as fast as that.
    assert [given.bandwidth_of(moved) for moved in (0, 128, 129, 512, 513)] == [30.0, 30.0, 20.0, 20.0, 20.0]


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_operations_of_views() -> None:
    # Both directions keep their sizes: two taps for each of 3 x 4 x 4 values, and one multiply-add to normalise each.
    assert view_operations([(4, 4)], 4) == 3 * (2 * 2 * 4 * 4 * 2 + 2 * 4 * 4)
    # Halving the height doubles the taps of that direction alone; the wide direction goes second, on fewer rows.
    assert view_operations([(8, 4)], 4) == 3 * (2 * 4 * 4 * 4 + 2 * 2 * 4 * 4 + 2 * 4 * 4)
