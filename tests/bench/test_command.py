"""The command bench measures small settings, and prints a table or JSON lines and draws a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from rada_fast import cli
from rada_fast.bench import adapter, report
from rada_fast.bench.stages import MEASURED, SIZES, Figure, Setting, line_of
from rada_fast.config.measuring import MeasuringOptions
from rada_fast.ops import backends

from .conftest import Lines

FACTS = {
    "machine", "device", "threads", "instruction_set", "keeps_freed_memory", "float32_products", "versions"
}  # fmt: skip


def names(lines: Lines, kind: str) -> list[str]:
    """Return the names of the lines of a kind, each once."""
    return list(dict.fromkeys(line["name"] for line in lines if line["kind"] == kind))


def check(lines: Lines, part: str) -> None:
    """Check the form of all lines of a run."""
    for line in lines:
        assert set(line) == {"bench", "setting", *SIZES, *MEASURED, *FACTS}
        assert line["bench"] == part
        assert line["best"] > 0
        assert line["inside"]
        if line["kind"] != "limit":
            assert line["best"] <= line["median"] or line["kind"] == "ratio"
            assert line["rounds"] == 2
        if line["kind"] == "stage":
            assert line["pictures_per_second"] > 0
            assert line["name"] == "plain PyTorch" or line["gap"] == pytest.approx(line["best"] / line["floor_ms"])


def test_views(bench: Callable[..., Lines]) -> None:
    lines = bench("views", "--pictures", "2", "--views", "2", "3", "--image-size", "16")
    check(lines, "views")
    assert names(lines, "stage") == ["decode", "views", "decode and views"]
    assert {(line["view_kind"], line["views"]) for line in lines} == {
        ("crop", 2), ("crop", 3), ("augmix", 2), ("augmix", 3)
    }  # fmt: skip


def test_views_of_own_pictures(bench: Callable[..., Lines], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "photos" / "one.png")
    data = f"images:{tmp_path / 'photos'}"
    lines = bench(
        "views", "--data", data, "--pictures", "3", "--views", "1", "--image-size", "8", "--view-kind", "crop"
    )
    assert {line["pictures"] for line in lines} == {3}
    assert lines[0]["bytes_per_picture"] == 20 * 30 * 3


def test_the_encoder(bench: Callable[..., Lines]) -> None:
    lines = bench("encoder", "--batch", "1", "2")
    check(lines, "encoder")
    assert names(lines, "stage") == ["encode", "open_clip"]
    assert names(lines, "ratio") == ["speed-up"]
    first = lines[0]
    assert (first["model"], first["precision"], first["batch"]) == ("embedded", "float32", 1)
    assert first["operations_per_picture"] < first["counted_operations_per_picture"]
    assert lines[1]["operations_per_picture"] == lines[1]["counted_operations_per_picture"]


def test_the_adapter(bench: Callable[..., Lines]) -> None:
    lines = bench("adapter", "--batch", "2", "--classes", "5", "--embed-dim", "16", "--backend", "literal", "reference")
    check(lines, "adapter")
    assert names(lines, "stage") == ["literal", "reference"]
    assert names(lines, "ratio") == ["reference speed-up"]
    assert len({line["setting"] for line in lines}) == 2


def test_ttt(bench: Callable[..., Lines]) -> None:
    lines = bench("ttt", "--pictures", "2", "--views", "4", "--classes", "5", "7", "--steps", "2", "--baseline")
    check(lines, "ttt")
    assert names(lines, "stage") == [
        "decode", "views", "encode", "adapt", "without decoding and views", "end to end", "plain PyTorch"
    ]  # fmt: skip
    assert names(lines, "ratio") == ["overhead ratio", "speed-up"]
    stages = ("decode", "views", "encode", "select", "adapt", "predict", "record", "between")
    assert names(lines, "part") == [f"end to end: {stage}" for stage in stages]
    assert sum(line["share"] for line in lines if line["kind"] == "part") == pytest.approx(2, rel=0.2)
    assert {line["classes"] for line in lines} == {5, 7}
    stages = {line["name"]: line for line in lines if line["classes"] == 5 and line["kind"] == "stage"}
    assert stages["end to end"]["share"] == 1
    assert stages["end to end"]["counted_operations_per_picture"] == pytest.approx(
        stages["encode"]["counted_operations_per_picture"] + stages["adapt"]["counted_operations_per_picture"]
    )
    parts = [line for line in lines if line["kind"] == "part" and line["classes"] == 5]
    for name in ("operations_per_picture", "floor_ms"):
        assert sum(line[name] or 0 for line in parts) == pytest.approx(stages["end to end"][name])
    both = stages["encode"]["floor_ms"] + stages["adapt"]["floor_ms"]
    assert stages["without decoding and views"]["floor_ms"] == pytest.approx(both)
    assert stages["end to end"]["operations_per_picture"] == pytest.approx(
        stages["encode"]["operations_per_picture"] + stages["adapt"]["operations_per_picture"]
    )


def test_eft(bench: Callable[..., Lines]) -> None:
    lines = bench("eft", "--batch", "2", "--classes", "5", "--iterations", "3")
    check(lines, "eft")
    steps = ["epoch on cached features", "step on cached features", "published step"]
    operators = ["forward", "loss", "backward", "update", "loop"] if backends()["cpu"] == "usable" else []
    assert names(lines, "stage") == ["encode", *steps, "iteration"]
    assert names(lines, "ratio") == ["overhead ratio", "speed-up"]
    assert names(lines, "part") == [f"epoch on cached features: {name}" for name in operators]
    epoch = next(line for line in lines if line["name"] == steps[0])
    parts = [line for line in lines if line["kind"] == "part"]
    assert not parts or sum(line["median"] for line in parts) == pytest.approx(epoch["median"], rel=0.3)
    assert 0.3 < epoch["counted_operations_per_picture"] / epoch["operations_per_picture"] < 3
    lines = bench("eft", "--embed-dim", "16", "--classes", "5")
    check(lines, "eft")
    assert names(lines, "stage") == steps
    assert {(line["model"], line["embed_dim"], line["batch"]) for line in lines} == {(None, 16, 1)}


def test_fft(bench: Callable[..., Lines]) -> None:
    lines = bench("fft", "--batch", "3", "--classes", "5")
    check(lines, "fft")
    assert names(lines, "stage") == ["encode", "step on features", "step"]
    assert names(lines, "ratio") == ["overhead ratio"]
    assert len({line["setting"] for line in lines}) == 2
    counted = [line["counted_operations_per_picture"] for line in lines if line["kind"] == "stage"]
    formula = [line["operations_per_picture"] for line in lines if line["kind"] == "stage"]
    assert all(0.3 < own / other < 3 for own, other in zip(counted, formula, strict=True))
    lines = bench("fft", "--embed-dim", "16", "--batch", "2", "3", "--classes", "5", "--memory", "16MiB")
    assert names(lines, "stage") == ["step on features"]
    assert len({line["setting"] for line in lines}) == 2


def test_a_table_is_printed_and_a_picture_drawn(
    bench: Callable[..., Lines], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "encoder", "--batch", "1", "--repeats", "2", "--output"]
    for output in (tmp_path / "new" / "stages.png", tmp_path / "folder"):
        # The second time the file or the folder is there.
        for _ in range(2):
            assert cli.main([*arguments, str(output)]) == 0
            shown = capsys.readouterr().out
    assert "encoder: embedded, float32, B 1" in shown
    assert "GFLOP" in shown
    assert "encode: views in memory to features of unit length" in shown
    assert "GB/s" in shown
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["bench-encoder.jsonl", "bench-encoder.png"]
    for picture in (tmp_path / "new" / "stages.png", tmp_path / "folder" / "bench-encoder.png"):
        with Image.open(picture) as image:
            assert image.size[0] > 1000
    written = (tmp_path / "folder" / "bench-encoder.jsonl").read_text().splitlines()
    check([json.loads(line) for line in written], "encoder")


def test_the_default_providers_compile_nothing() -> None:
    problem = adapter.Problem(1, 2, "official", "float32", False, width=16)
    names = adapter.chosen_providers(problem, ())
    assert names[:2] == ["literal", "reference"]
    assert "compile" not in names
    assert adapter.chosen_providers(problem, ("compile",)) == ["compile"]


def test_each_setting_is_shown_as_soon_as_it_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []

    def settings() -> Iterator[list[Figure]]:
        for name in ("first", "second"):
            setting = Setting(name=name, sizes={}, stages=())
            yield [line_of(setting, kind="stage", name=f"stage of the {name}", inside="nothing", best=1.0, median=1.0)]
            shown.append(capsys.readouterr().out)

    facts = {"machine": "any", "device": "cpu", "threads": 1, "instruction_set": "none", "float32_products": "any"}
    assert report.show("adapter", settings(), facts | {"versions": {}}, MeasuringOptions()) == 0
    assert "stage of the first" in shown[0]
    assert "stage of the second" in shown[1]


def test_without_a_part_the_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: rada-fast bench {ttt,eft,fft,encoder,views,adapter,roofline,scaling,rivals,table5}" in shown
    assert shown.count("    rada-fast bench ") == 10
