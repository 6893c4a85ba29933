"""The command bench scaling measures how cost grows, leaves out what would take too much, and fits exponents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rada_fast import cli
from rada_fast.bench import scaling
from rada_fast.bench.scaling import Known, Limits, expected_at, fitted, refusal
from rada_fast.bench.stages import Figure, Setting, Stage, line_of
from rada_fast.config.bench_limits import BenchScalingOptions

from .conftest import Lines

SMALL = (
    "--classes", "3", "4", "6", "--batch", "1", "2", "--episodes", "1", "2", "--common-classes", "3",
    "--embed-dim", "16", "--views", "10", "--steps", "1", "--device", "cpu",
)  # fmt: skip


def test_lines_of_figures(bench: Callable[..., Lines], tmp_path: Path) -> None:
    lines = bench("scaling", *SMALL, "--providers", "reference", "literal", "--output", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-scaling.jsonl", "bench-scaling.png"]
    assert [json.loads(line) for line in (tmp_path / "bench-scaling.jsonl").read_text().splitlines()] == lines
    with Image.open(tmp_path / "bench-scaling.png") as image:
        assert image.size[0] > 1000
    stages = [line for line in lines if line["kind"] == "stage"]
    names = {
        axis: {line["name"] for line in stages if line["setting"].startswith(f"over {axis}, ")}
        for axis in ("classes", "batch", "episodes")
    }
    adapter = {f"{provider} {one}" for provider in ("reference", "literal") for one in ("forward", "step")}
    assert names == {"classes": adapter | {"reference episode"}, "batch": adapter, "episodes": {"reference episode"}}
    grown = [line for line in stages if line["setting"].startswith("over batch")]
    assert {(line["batch"], line["classes"]) for line in grown} == {(1, 3), (2, 3)}
    episodes = [line for line in stages if line["setting"].startswith("over episodes")]
    assert {(line["episodes"], line["views"], line["steps"]) for line in episodes} == {(1, 10, 1), (2, 10, 1)}
    assert episodes[1]["operations_per_picture"] == episodes[0]["operations_per_picture"] > 0
    # Two sizes are too few for an exponent.
    exponents = [line for line in lines if line["kind"] == "exponent"]
    assert {line["name"].rpartition(" ")[2] for line in exponents} == {"classes"}
    assert "for K from 3 to 6" in exponents[0]["inside"]


def test_exponents_are_those_of_the_upper_range() -> None:
    sizes = [1, 10, 100, 200, 400, 1000]
    power, count = fitted(sizes, [5, 5, *(0.5 * size**1.5 for size in sizes[2:])]) or (0.0, 0)
    assert (power, count) == (pytest.approx(1.5), 4)
    # The last three are taken where fewer are in the upper range, and values of zero say nothing.
    power, count = fitted([1, 10, 100, 1000], [0.0, 1.0, 100.0, 10000.0]) or (0.0, 0)
    assert (power, count) == (pytest.approx(2.0), 3)
    assert fitted([1, 2, 3], [0.0, 1.0, 2.0]) is None


def line(axis: str, size: int, name: str, ms: float, mib: float) -> Figure:
    sizes = {"batch": 1, "classes": 3, "precision": "float32", axis: size}
    setting = Setting(name=f"over {axis}, any", sizes=sizes, stages=())
    return line_of(setting, kind="stage", name=name, best=ms, extra_mib=mib)


def test_exponents_of_lines() -> None:
    lines = [line("classes", size, "reference step", 2.0 * size, 3.0 * size**2) for size in (40, 10, 20)]
    found = {figure["name"]: figure["best"] for figure in scaling.exponent_figures(lines)}
    assert found == {
        "reference step, time over classes": pytest.approx(1.0),
        "reference step, memory over classes": pytest.approx(2.0),
    }


def test_what_would_take_too_much_is_left_out(bench: Callable[..., Lines], monkeypatch: pytest.MonkeyPatch) -> None:
    assert expected_at(30, Known(10, 5.0, 7.0), 2.0) == Known(30, 45.0, 63.0)
    assert refusal(expected_at(30, None, 2.0), Limits(1.0, 1.0)) is None
    assert "2 GiB, and 1 GiB are allowed" in (refusal(Known(1, 0.0, 2048.0), Limits(1024.0, 1.0)) or "")
    assert "about 3 s, and 2 s are allowed" in (refusal(Known(1, 3000.0, 1.0), Limits(1024.0, 2.0)) or "")
    monkeypatch.setattr(scaling, "refusal", lambda expected, limits: "too much" if expected.size > 4 else None)
    lines = bench("scaling", *SMALL, "--providers", "reference", "--passes", "forward", "--axes", "classes")
    assert [(found["kind"], found["classes"]) for found in lines if found["kind"] in ("stage", "refusal")] == [
        ("stage", 3), ("stage", 4), ("refusal", 6)
    ]  # fmt: skip


def test_what_has_no_stage_is_left_out(bench: Callable[..., Lines], capsys: pytest.CaptureFixture[str]) -> None:
    lines = bench("scaling", *SMALL, "--providers", "reference", "--passes", "episode", "--axes", "batch", "episodes")
    assert {line["setting"].partition(",")[0] for line in lines if line["kind"] == "stage"} == {"over episodes"}
    assert cli.main(["bench", "scaling", *SMALL, "--passes", "episode", "--axes", "batch"]) == 2
    message = "--axes batch leave nothing to measure with passes episode and providers rada_fast reference literal: "
    assert message in capsys.readouterr().err


def test_a_stage_that_runs_out_of_memory_is_left_out() -> None:
    def exhausted() -> Any:
        raise MemoryError

    def broken() -> Any:
        raise RuntimeError("shapes do not fit")

    good, large, wrong = (
        Stage(name=name, inside="", call=call, pictures=1)
        for name, call in (("good", lambda: None), ("large", exhausted), ("wrong", broken))
    )
    setting = scaling.with_room(Setting(name="any", sizes={}, stages=(good, large)))
    assert [stage.name for stage in setting.stages] == ["good"]
    assert setting.refusals == {"large": "memory is exhausted"}
    with pytest.raises(RuntimeError, match="shapes"):
        scaling.with_room(Setting(name="any", sizes={}, stages=(wrong,)))


@pytest.mark.usefixtures("bench")
def test_a_slow_call_is_made_once_for_a_single_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from rada_fast.bench import timing

    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.0)
    calls = []
    for repeats in (1, 2):
        calls.clear()
        found = timing.interleaved({"one": lambda: calls.append(1)}, "cpu", seconds=0.0, repeats=repeats, burst=1)
        assert len(found.times["one"].rounds) == repeats
        assert len(calls) == {1: 1, 2: 3}[repeats]


def test_the_limit_of_memory_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(scaling, "measured", lambda *given: seen.append(given[3]) or [])
    monkeypatch.setattr(scaling, "available_memory", lambda device: 2**30)
    for memory in ("2GiB", None):
        options = BenchScalingOptions(classes=(3,), axes=("classes",), memory=memory)
        list(scaling.figures(options, torch.device("cpu"), scaling.PartialFigures(None, {})))
    assert [limits.mib for limits in seen] == [2048.0, 768.0]
