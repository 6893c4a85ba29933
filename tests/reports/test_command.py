"""The command report reads what runs wrote, and its tables agree with counting."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rada_fast import cli
from rada_fast.config.commands import EFTOptions, TTTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.config.tools import ReportOptions
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.ttt import run_ttt
from rada_fast.reports.command import run_report
from rada_fast.reports.results import read_results
from rada_fast.reports.tables import measures_of, repetitions, set_rows
from tests.loops.support import features_file, lines, text_file

HEADS = AdapterOptions(num_heads=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run eft with two seeds on two sets of features, and ttt with two learning rates."""
    root = tmp_path_factory.mktemp("runs")
    text = ClassOptions(text_features=text_file(root / "text.npz", seed=1))
    for name, noise in (("a", 1.0), ("b", 2.0)):
        train = features_file(root / f"{name}.npz", noise=noise)
        for seed in (1, 2):
            eft = EFTOptions(train, train, epochs=2, batch_size=4, shots=4, text=text, adapter=HEADS)
            run = RunOptions(output=str(root / "eft" / f"{name}{seed}"), seed=seed)
            run_eft(dataclasses.replace(eft, run=run))
    for lr in (1e-3, 5e-2):
        ttt = TTTOptions(f"features:{root / 'a.npz'}", text=text, adapter=HEADS, episode=EpisodeConfig(steps=1, lr=lr))
        run_ttt(dataclasses.replace(ttt, run=RunOptions(output=str(root / f"ttt-{lr}"))))
    return root


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_of_seeds_and_sets(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(runs / "eft"), "--output", str(tmp_path / "report"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "report" / "report.json").read_text())
    summaries = [json.loads((runs / "eft" / f"a{seed}" / "summary.json").read_text()) for seed in (1, 2)]

    (base,) = [row for row in found["sets"] if row["part"] == "base" and "a.npz" in row["data"]]
    expected = [summary["base"]["adapted_top1"] for summary in summaries]
    assert base["seeds"] == "1 2"
    assert base["zero_shot_interval"] == "Wilson"  # no seed changes it
    assert base["zero_shot_top1_low"] < base["zero_shot_top1"] < base["zero_shot_top1_high"]
    assert base["adapted_top1"] == pytest.approx(sum(expected) / 2, abs=1e-3)
    assert base["adapted_top1_std"] == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5, abs=1e-3)
    assert base["adapted_ece"] >= 0
    records = [record for record in lines(runs / "eft" / "a1") if record["split"] == "base"]
    gained = sum(r["label"] == r["adapted"][0] != r["zero_shot"][0] for r in records)
    (run,) = [row for row in found["runs"] if row["folder"].endswith("a1") and row["part"] == "base"]
    assert run["wrong_to_right"] == gained
    assert run["adapted_low"] <= run["adapted_top1"] <= run["adapted_high"]

    *sets, average = found["base_to_new"]
    assert [row["data"].rpartition("/")[2] for row in sets] == ["a.npz", "b.npz"]
    harmonic = [summary["adapted_harmonic_mean"] for summary in summaries]
    assert sets[0]["adapted_harmonic_mean"] == pytest.approx(sum(harmonic) / 2, abs=1e-2)
    means = [row["adapted_harmonic_mean"] for row in sets]
    assert average["adapted_mean_of_harmonic_means"] == pytest.approx(sum(means) / 2)
    base_mean, new_mean = average["adapted_base"], average["adapted_new"]
    assert average["adapted_harmonic_mean_of_means"] == pytest.approx(
        2 * base_mean * new_mean / (base_mean + new_mean), abs=1e-3
    )

    own = [row for row in found["classes"] if row["part"] == "base" and "a.npz" in row["data"]]
    assert [(row["label"], row["name"], row["images"]) for row in own] == [(k, f"class {k}", 12) for k in range(3)]
    assert sum(row["adapted_top1"] for row in own) / 3 == pytest.approx(base["adapted_mean_class"])
    assert len(table(tmp_path / "report", "classes")) == len(found["classes"]) == 10
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert f"{base['adapted_top1']:.2f} ± {base['adapted_top1_std']:.2f} [" in markdown
    assert "15 bins" in markdown
    assert "Wilson" in markdown


def test_interval_over_seeds_that_differ(runs: Path) -> None:
    one = read_results([str(runs / "ttt-0.05")])[0]
    other = dataclasses.replace(one, seed=1, answers=tuple(a._replace(after=(a.label,)) for a in one.answers))
    (row,) = set_rows([one, other])
    low, high = row["adapted_top1_low"], row["adapted_top1_high"]
    assert (row["zero_shot_interval"], row["adapted_interval"]) == ("Wilson", "t over 2 seeds")
    # Of two seeds, t is 12.706 and the standard error half the difference.
    reach = 12.7062 * abs(measures_of(one)["adapted_top1"] - measures_of(other)["adapted_top1"]) / 2
    assert (high - low) / 2 == pytest.approx(reach, rel=1e-4)
    assert reach > 0


def test_comparison_of_two_runs(runs: Path, tmp_path: Path) -> None:
    first, second = (str(runs / f"ttt-{lr}") for lr in (1e-3, 5e-2))
    assert run_report(ReportOptions(compare=(first, second), output=str(tmp_path))) == 0
    (row,) = table(tmp_path, "comparison")
    answers = [{r["id"]: r["adapted"][0] == r["label"] for r in lines(Path(folder))} for folder in (first, second)]
    only_first = sum(answers[0][id] and not answers[1][id] for id in answers[0])
    only_second = sum(answers[1][id] and not answers[0][id] for id in answers[0])
    assert (int(row["only_first_right"]), int(row["only_second_right"])) == (only_first, only_second)
    assert row["test"] == "exact binomial"
    rows = table(tmp_path, "sets")
    assert [row["method"] for row in rows] == ["ttt, lr 0.001", "ttt, lr 0.05"]
    assert {row["adapted_interval"] for row in rows} == {"Wilson"}


def test_runs_of_one_seed_are_no_repetitions(runs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for path in (runs / "eft" / "a1").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    groups = repetitions(read_results([str(tmp_path), str(runs / "eft" / "a2")]))
    assert sorted(len(group) for group in groups) == [1, 1, 2, 2]


def test_folders_that_are_no_runs_are_named(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"runs .*other is not the folder of a run .*it holds notes.txt"):
        read_results([str(runs / "eft"), str(tmp_path / "other")])
    with pytest.raises(UserError, match=r"runs .*gone does not exist"):
        read_results([str(tmp_path / "gone")])
    with pytest.raises(UserError, match=r"must be the folder of a run, it is a file"):
        read_results([str(runs / "text.npz")])
    with pytest.raises(UserError, match=r"compare must name two runs, .*eft contains several"):
        run_report(ReportOptions(compare=(str(runs / "eft"), str(runs / "eft"))))
    with pytest.raises(UserError, match=r"same images: .*120 images are in one of the two runs alone"):
        run_report(ReportOptions(compare=(str(runs / "ttt-0.05"), str(_shifted(runs, tmp_path)))))
    with pytest.raises(UserError, match=r"output .* is the folder of a run"):
        run_report(ReportOptions(runs=(str(runs),), output=str(runs / "eft" / "a1")))


def test_runs_whose_lines_are_not_those_of_their_summaries_are_left_out(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunOptions(output=str(tmp_path / "ttt"))
    text = ClassOptions(text_features=text_file(tmp_path / "text.npz", seed=1))
    ttt = TTTOptions(f"features:{runs / 'a.npz'}", text=text, adapter=HEADS, episode=EpisodeConfig(steps=1), run=run)
    run_ttt(ttt)
    run_ttt(dataclasses.replace(ttt, run=dataclasses.replace(run, limit=10)))
    found = read_results([str(tmp_path), str(runs / "eft" / "a1")])
    assert {one.folder.name for one in found} == {"a1"}
    assert "ttt is left out: its images.jsonl has 60 images of" in capsys.readouterr().err
    run_ttt(ttt)
    (one,) = read_results([str(tmp_path)])
    assert len(one.answers) == 60


def test_runs_that_measure_nothing_or_were_changed_are_named(runs: Path, tmp_path: Path) -> None:
    for name in ("whole", "changed"):
        shutil.copytree(runs / "eft" / "a1", tmp_path / name)
    identity = json.loads((tmp_path / "changed" / "run.json").read_text())
    identity["identity"]["command"] = "predict"
    (tmp_path / "changed" / "run.json").write_text(json.dumps(identity))
    assert {one.folder.name for one in read_results([str(tmp_path)])} == {"whole"}
    with pytest.raises(UserError, match=r"must be of ttt, eft, fft, eval; .*changed measured no accuracy"):
        read_results([str(tmp_path / "changed")])
    for name, line in (("images.jsonl", lines(tmp_path / "whole")[-1] | {"confidence": "high"}), ("summary.json", {})):
        with (tmp_path / "whole" / name).open("a" if name == "images.jsonl" else "w") as file:
            file.write(json.dumps(line))
        with pytest.raises(UserError, match=r"runs .*whole: its files are damaged, or were changed"):
            read_results([str(tmp_path / "whole")])


def _shifted(runs: Path, tmp_path: Path) -> Path:
    """Copy a run, with other ids of its images."""
    folder = tmp_path / "shifted"
    folder.mkdir()
    for path in (runs / "ttt-0.05").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    renamed = [json.dumps(record | {"id": f"x{record['id']}"}) for record in lines(folder)]
    (folder / "images.jsonl").write_text("\n".join(renamed) + "\n")
    return folder


def test_unfinished_runs_are_left_out_by_name(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("whole", "begun"):
        (tmp_path / name).mkdir()
        for path in (runs / "eft" / "a1").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "begun" / "summary.json").unlink()
    assert {one.folder.name for one in read_results([str(tmp_path)])} == {"whole"}
    assert "1 of 2 runs are not finished and left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"none of these is: .*begun"):
        read_results([str(tmp_path / "begun")])
