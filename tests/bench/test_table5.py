"""`rada-fast bench table5` has the paper's rows and ours, each with what it counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rada_fast import cli
from rada_fast.bench import table5, table5_memory, table5_report
from rada_fast.bench.costs import least_operations
from rada_fast.bench.encoder import counted_encoder_operations
from rada_fast.bench.stages import counted_operations
from rada_fast.bench.table5 import Frame, call_of, literal_adapter_operations, row_of
from rada_fast.config.bench import BenchTable5Options
from rada_fast.config.method import AdapterConfig
from rada_fast.models.vision_language import load_model

Lines = list[dict[str, Any]]
SMALL = ["--views", "4", "--eft-classes", "3", "--ttt-classes", "4"]


def test_every_method_has_its_rows_in_the_json_and_the_chart(
    bench: Callable[..., Lines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def memory(name: str, frame: int, options: BenchTable5Options) -> dict[str, float]:
        asked.append((name, frame))
        return {"peak_mib": 300.0, "tensors_mib": 100.0 + frame, "extra_mib": 10.0}

    monkeypatch.setattr(table5, "memory_in_own_process", memory)
    assert cli.main(["bench", "table5", *SMALL, "--repeats", "1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Table 5 on a CPU (" in shown
    assert "68.39 x 64 = 4,377 views/s" in shown
    found = json.loads((tmp_path / "bench-table5.json").read_text())
    assert (found["on"], found["timer"], found["device"], found["model"]) == ("a CPU", "the clock", "cpu", "embedded")
    rows = [(row["setting"], row["views"], row["method"]) for row in found["rows"]]
    trained, tested = ["maple", "rada-literal", "rada_fast"], ["maple", "tpt", "rada-literal", "rada_fast"]
    assert rows == [
        *(("eft", 1, name) for name in trained), *(("ttt", views, name) for views in (1, 4) for name in tested)
    ]  # fmt: skip
    assert asked == [*((name, 0) for name in trained), *((name, frame) for frame in (1, 2) for name in tested)]
    for row in found["rows"]:
        assert row["frames_per_second"] == pytest.approx(1e3 / row["median_ms"])
        assert row["operations_per_frame"] == 2 * row["multiply_adds_per_frame"] >= row["operations_of_one_forward"]
        assert row["tensors_mib"] == 100 + frame_number(row)
    paper = {(row["setting"], row["method"]): row for row in found["paper"]["rows"]}
    assert paper["eft", "RAda"]["frames_per_second"] == 50.11
    assert "training iterations" in paper["eft", "RAda"]["counts"]
    with Image.open(tmp_path / "bench-table5.png") as image:
        assert image.size[0] > 1000
    (document,) = bench("table5", *SMALL, "--settings", "eft", "--only", "rada_fast")
    assert [row["method"] for row in document["rows"]] == ["rada_fast"]


def frame_number(row: dict[str, Any]) -> int:
    return 0 if row["setting"] == "eft" else 1 if row["views"] == 1 else 2


def test_operations_are_those_of_the_calls_that_are_timed() -> None:
    vlm = load_model("embedded")
    frames = (Frame("eft", "", 3, 1, 0), Frame("ttt", "", 4, 1, 1), Frame("ttt", "", 4, 3, 2))
    for frame in frames:
        for name in ("maple", "rada-literal", *(["tpt"] if frame.setting == "ttt" else [])):
            whole = counted_operations(call_of(name, frame, vlm))  # type: ignore[arg-type]
            assert row_of(name, frame, vlm).operations == pytest.approx(whole, rel=1e-9), (name, frame)  # type: ignore[arg-type]
    config, image = AdapterConfig.official(vlm.embed_dim), counted_encoder_operations(vlm, 1)
    row = row_of("rada-literal", frames[0], vlm)
    # The published code projects three queries, keys, values and the output: 12 K D^2, and 8 K^2 D in four products.
    assert row.forward == image + literal_adapter_operations(config, 3)
    assert literal_adapter_operations(config, 3) == pytest.approx(12 * 3 * 512**2 + 8 * 3**2 * 512, rel=0.01)
    assert row_of("rada_fast", frames[0], vlm).forward < image + least_operations(1, 3, vlm.embed_dim)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    options = BenchTable5Options(eft_classes=3, settings=("eft",))
    found = table5_memory.memory_in_own_process("rada-literal", 0, options)
    if found["peak_mib"] is None:
        pytest.skip("this system does not let a process reset the peak of its memory")
    assert found["tensors_mib"] is not None
    assert found["extra_mib"] is not None
    assert 0 <= found["extra_mib"] < found["tensors_mib"] < found["peak_mib"]


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table5_memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="measures the memory of tpt has failed"):
        table5_memory.memory_in_own_process("tpt", 0, BenchTable5Options())


def test_a_gpu_tells_its_driver_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table5_report.device_facts(torch.device("cpu")) == {}
    monkeypatch.setattr(table5_report.shutil, "which", lambda program: "echo")
    facts = table5_report.device_facts(torch.device("cuda", 3))
    assert "--id=3" in str(facts["driver_version"])
    assert list(facts) == [*table5_report.SMI, "cuda"]
    monkeypatch.setattr(table5_report.shutil, "which", lambda program: None)
    assert table5_report.device_facts(torch.device("cuda", 3))["driver_version"] is None
    sizes = {"model": "m", "precision": "float32"}
    title = table5_report.title_of(sizes, {"device": "NVIDIA X", "machine": "a host", "threads": 2})
    assert title == "Table 5 on NVIDIA X, m, float32"
