"""`rada-fast bench rivals` measures every method on the same pictures, and says what each of them answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rada_fast import cli
from rada_fast.bench import rivals as bench_rivals
from rada_fast.bench.baselines.prompts import PromptEpisodes
from rada_fast.bench.encoder import counted_encoder_operations, plain_features
from rada_fast.bench.rivals import TINY_SIZES, Problem, extrapolated, prompt_operations
from rada_fast.bench.rivals_report import Score, accuracies
from rada_fast.bench.stages import counted_operations
from rada_fast.bench.timing import Times
from rada_fast.config.bench import RIVALS
from rada_fast.config.method import EpisodeConfig
from rada_fast.embedded import world
from rada_fast.models.vision_language import load_model

Lines = list[dict[str, Any]]


@pytest.fixture
def rivals(capsys: pytest.CaptureFixture[str]) -> Callable[..., Lines]:
    """Return a function that runs `rada-fast bench rivals ... --json` on few views, and returns the lines it prints."""

    def run(*arguments: str) -> Lines:
        small = ["--views", "4", "--together", "2"]
        assert cli.main(["bench", "rivals", *small, *arguments, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_an_interrupted_comparison_goes_on(
    rivals: Callable[..., Lines], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--pictures", "5", "--only", "zero-shot", "zero", "--views", "4", "--together", "2"]
    group_figures, sizes = bench_rivals.group_figures, []

    def interrupted(chosen: Any, views: Any, *others: Any, **options: Any) -> Any:
        sizes.append(len(views))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return group_figures(chosen, views, *others, **options)

    monkeypatch.setattr(bench_rivals, "group_figures", interrupted)
    command = ["bench", "rivals", *given, "--output", str(tmp_path)]
    assert cli.main(command) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["bench-rivals.partial.jsonl"]
    assert cli.main(command) == 0
    assert sizes == [2, 2, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["bench-rivals.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "bench-rivals.jsonl").read_text().splitlines()]
    capsys.readouterr()
    for own, whole in zip(lines, rivals(*given[:-4]), strict=True):
        same = ("name", "pictures", "rounds", "adapted_right", "zero_shot_right", "changed_answers")
        assert {name: own[name] for name in same} == {name: whole[name] for name in same}
        assert own["extra_mib"] is not None or whole["extra_mib"] is None


def test_every_method_is_measured_on_the_embedded_world(rivals: Callable[..., Lines]) -> None:
    lines = {line["name"]: line for line in rivals("--pictures", "3")}
    assert tuple(lines) == RIVALS
    for line in lines.values():
        assert line["pictures"] == 3
        assert line["rounds"] == 2
        assert line["best"] <= line["median"]
        assert line["pictures_per_second"] == pytest.approx(1e3 / line["median"])
        assert line["operations_per_picture"] == 2 * line["multiply_adds_per_picture"]
        assert line["zero_shot_right"] == lines["zero-shot"]["adapted_right"]
        assert line["adapted_right"] - line["zero_shot_right"] == line["gained"] - line["lost"]
        assert line["adapted_interval"][0] <= line["adapted_top1"] <= line["adapted_interval"][1]
        assert (line["model"], line["views"], line["classes"]) == ("embedded", 4, len(world.class_names()))
    # Encoding alone changes no answer, and RAda is the same method however it is written.
    assert all(lines[name]["changed_answers"] == 0 for name in ("zero-shot", "encode", "encode-fast"))
    assert {lines[name]["same_answers_as_rada_fast"] for name in ("rada_fast", "rada-literal", "rada-careful")} == {3}
    assert lines["encode"]["encodings"] == 1
    work = {name: line["operations_per_picture"] for name, line in lines.items()}
    order = ["zero-shot", "encode-fast", "rada_fast", "rada-careful", "tpt", "maple"]
    assert sorted(order, key=work.__getitem__) == order
    assert work["encode"] < min(work[name] for name in ("zero", "mta", "vte", "rada-careful"))
    # Four views are encoded in each of three steps, and the original at the end; each adapts in about 0.3 GFLOP.
    image = counted_encoder_operations(load_model("embedded"), 1)
    assert 13 * image < work["rada-literal"] < 13 * image + 13 * 0.3e9


def test_given_pictures_are_read_and_only_some_methods_measured(
    rivals: Callable[..., Lines], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, name in enumerate(("blue_plain_ring", "red_striped_star")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        pixels = world.class_image(label, 0, None)
        Image.fromarray(pixels).save(tmp_path / "pictures" / name / "0.png")
    given = ["--data", f"imagefolder:{tmp_path / 'pictures'}", "--pictures", "2", "--only", "zero", "vte"]
    lines = rivals(*given, "--output", str(tmp_path / "out"))
    assert [line["name"] for line in lines] == ["zero", "vte"]
    assert {(line["classes"], line["encodings"], line["same_answers_as_rada_fast"]) for line in lines} == {
        (2, None, None)
    }
    assert {len(line["adapted_interval"]) for line in lines} == {2}
    written = (tmp_path / "out" / "bench-rivals.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines
    assert cli.main(["bench", "rivals", *given, "--views", "2"]) == 0
    shown = capsys.readouterr().out
    assert "zero: ZERO: the votes of the confident views" in shown
    assert f"imagefolder:{tmp_path / 'pictures'}, 2 pictures, V 2, K 2" in shown
    assert "exact interval" in shown
    missing = ["bench", "rivals", "--data", "features:none.npz"]
    assert cli.main(missing) == 2
    assert cli.main(["bench", "rivals", "--templates", "simple"]) == 2
    assert "templates must be a single one, got simple" in capsys.readouterr().err


def test_operations_of_prompt_learning_are_those_of_a_whole_call() -> None:
    vlm = load_model("embedded")
    names = tuple(f"red star {number}" for number in range(5))
    text = torch.zeros(5, vlm.embed_dim)
    problem = Problem(vlm, names, "a photo of a {}.", text, text, 7, EpisodeConfig(), 0)
    views = torch.randn(7, 3, vlm.preprocess.image_size, vlm.preprocess.image_size)

    def encode(views: Tensor) -> Tensor:
        return plain_features(vlm, views)

    for tuning in ("context", "coupled-prompts"):
        episodes = PromptEpisodes(vlm, names, problem.template, tuning)
        whole = counted_operations(lambda: episodes(views, encode))  # noqa: B023
        assert prompt_operations(problem, tuning) == pytest.approx(whole, rel=1e-12)


def test_counts_are_extrapolated_in_views_and_classes() -> None:
    def value(views: int, classes: int) -> float:
        return 5 + 3 * views + 2 * classes + 7 * views * classes

    counts = {(views, classes): value(views, classes) for views in TINY_SIZES for classes in TINY_SIZES}
    assert extrapolated(counts, 64, 200) == value(64, 200)


def test_accuracies_compare_the_answers_with_those_before() -> None:
    score = Score(Times((1.0,)), None, answers=[0, 1, 2, 0, 4], zero_shot=[0, 1, 0, 3, 0])
    found = accuracies(score, [0, 1, 2, 3, 1])
    assert (found["zero_shot_right"], found["adapted_right"], found["gained"], found["lost"]) == (3, 3, 1, 1)
    assert found["adapted_top1"] == 60
    assert found["p"] == 1
