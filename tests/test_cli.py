"""The command line helps, refuses bad input in one line, reads options files, runs commands and returns a status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rada_fast import cli
from rada_fast.config.arguments import options_of
from rada_fast.config.method import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter, save_adapter
from tests.pictures import write_class_folders


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Make a folder of files and folders to give to the commands, good ones and bad ones."""
    write_class_folders(tmp_path / "pictures", ("red plain square", "blue plain ring"), each=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "0.png").write_bytes(b"torn")
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "none.txt").write_text("\n")
    features = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    np.savez(tmp_path / "good.npz", features=features, labels=np.array([0, 1, 0, 1]))
    np.savez(tmp_path / "text.npz", features=features[:2], labels=np.array([0, 1]))
    np.savez(tmp_path / "wide.npz", features=np.ones((2, 32), np.float32), labels=np.array([0, 1]))
    np.savez(
        tmp_path / "nan.npz", features=features * np.array([[1], [1], [np.nan], [1]]), labels=np.array([0, 1, 0, 1])
    )
    save_adapter(RationalAdapter(AdapterConfig.official(16)), tmp_path / "narrow.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "options.toml").write_text('steps = 1\nviews = 2\nresume = "x"\n')
    (tmp_path / "torn.toml").write_text("steps = \n")
    (tmp_path / "a file").write_text("")
    return tmp_path


REFUSED: dict[str, tuple[str, str]] = {
    "command": ("tt --data x", "unknown command 'tt'; did you mean ttt? the commands are demo, ttt, eft, fft, eval, inspect, predict, features, report, status, build, kernels, bench, doctor"),
    "no runs": ("report", "--runs must be given, the folders of finished runs"),
    "no run": ("report {0}/pictures", "--runs {0}/pictures is not the folder of a run"),
    "kind": ("ttt --data pictures:{0}/pictures", "data must be KIND:PATH with KIND one of imagefolder:DIR"),
    "folder": ("ttt --data imagefolder:{0}/nowhere", "data folder {0}/nowhere does not exist"),
    "empty folder": ("ttt --data imagefolder:{0}/empty", "must have one sub-folder for each class, it has none"),
    "classes": ("ttt --data imagefolder:{0}/pictures --classes {0}/three.txt", "must hold 2 names, one for each class folder, got 3"),
    "no classes": ("ttt --data imagefolder:{0}/pictures --classes {0}/none.txt", "holds no class name (K = 0)"),
    "classes file": ("ttt --data imagefolder:{0}/pictures --classes {0}/nil.txt", "nil.txt cannot be read: No such file"),
    "weights": ("ttt --data imagefolder:{0}/pictures --model ViT-B-16", "model ViT-B-16 needs --pretrained: a tag (openai"),
    "model": ("ttt --data imagefolder:{0}/pictures --model ViT-B-17", "model 'ViT-B-17' is neither one of open_clip's"),
    "nan": ("ttt --data features:{0}/nan.npz --text-features features:{0}/text.npz", "NaN or infinity in 1 of 4 rows, the first is row 2"),
    "width": ("ttt --data features:{0}/good.npz --text-features features:{0}/wide.npz", "has features of width 16, the text features have 32"),
    "model's width": ("ttt --data features:{0}/good.npz", "has features of width 16, the text features have 512"),
    "adapter's width": ("ttt --data imagefolder:{0}/pictures --adapter {0}/narrow.safetensors", "has width 16, the features have 512"),
    "adapter": ("ttt --data imagefolder:{0}/pictures --adapter {0}/other.safetensors", "must hold one rational adapter"),
    "template": ("ttt --data imagefolder:{0}/pictures --templates fotos", "templates must be a template with {{}}, a file"),
    "range": ("ttt --data imagefolder:{0}/pictures --selection 2", "selection must be above 0 and at most 1, got 2.0"),
    "heads": ("ttt --data imagefolder:{0}/pictures --num-heads 7", "--num-heads must divide embed_dim 512, got 7"),
    "device": ("ttt --data imagefolder:{0}/pictures --device gpu", "device must be auto, cpu or cuda[:N], got 'gpu'"),
    "output": ("ttt --data imagefolder:{0}/pictures --output", "output"),
    "options file": ("ttt --options {0}/torn.toml", "torn.toml is neither TOML nor JSON"),
    "no options file": ("ttt --options {0}/nil.toml", "options file {0}/nil.toml cannot be read"),
    "means": ("ttt --data features:{0}/good.npz --text-features class-means", "class-means needs training images"),
    "classes of two sets": ("eft --train imagefolder:{0}/pictures --test imagefolder:{0}", "must have the classes of train"),
    "stages": ("fft --train features:{0}/good.npz --test features:{0}/good.npz", "stages both trains the image encoder"),
    "part": ("bench tt", "bench must be followed by one of ttt, eft, fft, encoder, views, adapter, roofline, scaling, rivals, table5, got 'tt'; did you mean ttt?"),
    "no part": ("bench", "bench must be followed by one of ttt, eft, fft, encoder, views, adapter"),
    "part's option": ("bench views --device cpu", "--device is no option of 'rada-fast bench views'"),
    "repeats": ("bench encoder --repeats 0", "--repeats must be a whole number of at least 1, got 0"),
    "numbers": ("bench encoder --batch 2 2", "--batch must not repeat a number, got 2 2"),
    "grid": ("bench adapter --batch 2", "--batch and classes must be given together"),
    "measured backend": ("bench adapter --batch 1 --classes 5 --embed-dim 16 --backend triton", "--backend 'triton' cannot be measured"),
    "measured data": ("bench views --data features:{0}/good.npz", "data must be image files, imagefolder:DIR or images:DIR"),
    "unreadable": ("bench views --data images:{0}/torn", "--data must be pictures that can be read: "),
    "picture": ("bench views --output {0}/three.txt/x.png", "--output {0}/three.txt must be a folder"),
    "resumed": ("fft --train x --test y --finetune-from 20", "--finetune-from must be at most epochs 10, got 20"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gives_one_line_and_status_2(inputs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, message = REFUSED[name]
    arguments = command.format(inputs).split()
    if arguments[-1] == "--output":
        arguments.append(str(inputs / "a file"))
    elif arguments[0] in ("ttt", "eft", "fft"):
        arguments += ["--output", str(inputs / "out")]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("rada-fast: ")
    assert message.format(inputs) in error
    assert "Traceback" not in captured.err
    assert not (inputs / "out").exists()


def test_help_does_not_import_torch_and_shows_every_option() -> None:
    program = "import sys; from rada_fast.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "Begin with 'rada-fast demo'" in done.stdout
    program = """
import sys
from rada_fast.cli import COMMANDS, main
for name, command in COMMANDS.items():
    assert main([name, "--help"]) == 0
    assert all(main([name, part, "--help"]) == 0 for part in command.parts)
assert "torch" not in sys.modules
"""
    wide = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=wide)
    assert "One that takes longer, on a disk that hangs or in a decoder that never ends, is" in done.stdout
    for name, command in cli.COMMANDS.items():
        assert f"usage: rada-fast {name}" in done.stdout
        assert name not in ("ttt", "eft", "fft") or f"Example: rada-fast {name}" in done.stdout
        for part, options in (command.parts or {"": command.options}).items():
            assert f"usage: rada-fast {name} {part}".rstrip() in done.stdout
            assert all(option.flag in done.stdout for option in options_of(options).values())


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "rada_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rada-fast ")


def test_options_files_come_first_and_the_command_line_wins(inputs: Path) -> None:
    (inputs / "o.toml").write_text(
        'data = "imagefolder:a"\nsteps = 7\nlr = 0.1\noverwrite = true\nqueries = ["image", "text"]\nview_kind = "augmix"\n'
    )
    config = cli.parse("ttt", ["--options", str(inputs / "o.toml"), "--steps", "2"])
    assert (config.data, config.episode.steps, config.episode.lr) == ("imagefolder:a", 2, 0.1)
    assert config.run.overwrite
    assert config.adapter.queries == ("image", "text")
    (inputs / "o.json").write_text(json.dumps({"train": "x", "test": ["y", "z"], "overwrite": False}))
    config = cli.parse("fft", [f"--options={inputs / 'o.json'}"])
    assert config.test == ("y", "z")
    (inputs / "o.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a table of options, got list"):
        cli.parse("fft", ["--options", str(inputs / "o.json")])
    (inputs / "o.json").write_text('{"run": {"seed": 1}}')
    with pytest.raises(UserError, match="must be flat: run is a table"):
        cli.parse("fft", ["--options", str(inputs / "o.json")])
    with pytest.raises(UserError, match="--options needs a file"):
        cli.parse("fft", ["--options"])


def run_ttt(inputs: Path, *more: str) -> int:
    data = ["--data", f"imagefolder:{inputs / 'pictures'}", "--views", "2", "--steps", "1"]
    return cli.main(["ttt", *data, "--output", str(inputs / "out"), *more])


def test_a_run_prints_a_table_or_json(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ttt(inputs) == 0
    shown = capsys.readouterr().out
    assert "adapted top1" in shown
    assert "results in" in shown
    assert run_ttt(inputs, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


def test_unreadable_images_end_with_status_3_unless_allowed(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inputs / "pictures" / "red plain square" / "0.png").write_bytes(b"torn")
    assert run_ttt(inputs) == 3
    assert "1 images could not be read" in capsys.readouterr().err
    assert run_ttt(inputs, "--allow-unreadable", "1") == 0


def test_another_runs_folder_is_refused_in_one_line(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ttt(inputs) == 0
    assert run_ttt(inputs, "--seed", "5") == 2
    assert "holds another run's results (differing: --seed 0 there, 5 here)" in capsys.readouterr().err
    assert run_ttt(inputs, "--seed", "5", "--overwrite") == 0


@pytest.mark.parametrize(
    ("place", "error", "status", "message"),
    [
        (
            "engine.episodes.Adaptation.__call__",
            KeyboardInterrupt(),
            130,
            "interrupted; to go on: rada-fast ttt",
        ),
        (
            "runs.folder.RunFolder.append",
            OSError(28, "No space left on device"),
            1,
            "No space left on device; to go on: rada-fast ttt",
        ),
    ],
    ids=["interruption", "full disk"],
)
def test_an_interruption_and_a_full_disk_give_one_line_and_a_status(
    place: str,
    error: BaseException,
    status: int,
    message: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(f"rada_fast.{place}", fail)
    assert run_ttt(inputs) == status
    assert message in capsys.readouterr().err


def test_an_unusable_backend_is_refused(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RADA_FAST_BACKEND", "cuda")
    assert run_ttt(inputs) == 2
    assert "backend 'cuda' cannot be used: " in capsys.readouterr().err


def test_doctor_reports_and_fails_with_the_self_test(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "self-test" in shown
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["reference"] == "usable"
    # Rounding alone changes 17 logits of float32 by 1e-6 or less.
    assert all(float(error) < 1e-5 for error in report["self_test"].values())

    import rada_fast.doctor

    monkeypatch.setattr(rada_fast.doctor, "self_test", lambda: {"reference": "nan"})
    assert cli.main(["doctor"]) == 1


@pytest.mark.parametrize("name", ["report.json", "demo.png", "holiday.jpg"])
def test_the_demo_replaces_nothing_that_no_demo_made(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert f"an earlier demo's folder, but it holds {name}; give another --output" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_the_smallest_demo_writes_its_report_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rada_fast.demo

    monkeypatch.setattr(rada_fast.demo, "SHOTS", 1)
    monkeypatch.setattr(rada_fast.demo, "TEST_IMAGES_PER_CLASS", 1)
    assert cli.main(["demo", "--output", str(tmp_path / "demo"), "--images", "2", "--epochs", "1"]) == 0
    assert "zero-shot" in capsys.readouterr().out
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["ttt"]["images"] == 2
    assert report["eft"]["base"]["images"] == 20
    assert set(report["gains"]) == {"ttt", "base", "new"}
    low, high = report["gains"]["ttt"]["interval"]
    assert low <= report["ttt"]["adapted_top1"] - report["ttt"]["zero_shot_top1"] <= high
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert picture.size[0] > 1000
