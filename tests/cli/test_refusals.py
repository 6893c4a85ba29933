"""Every command refuses bad input with status 2 and one line that names the option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rada_fast import cli
from rada_fast.config.arguments import name_option, options_of
from rada_fast.errors import UserError
from rada_fast.extension import libraries

TTT = "ttt --data imagefolder:{0}/pictures"
EFT = "eft --train imagefolder:{0}/pictures --test imagefolder:{0}/pictures"
FFT = "fft --train imagefolder:{0}/pictures --test imagefolder:{0}/pictures"
LONG, MANY_DIGITS = "x" * 5000, "9" * 5000

# Each row is a command line and what its message must contain. {0} is the folder of the fixture inputs. A command line that
# is a tuple is not split at its spaces.
REFUSED: list[tuple[str | tuple[str, ...], str]] = [
    # commands
    ("tt --data x", "'tt'"),
    ("TTT --data x", "'TTT'"),
    ("--data x", "'--data'"),
    (("",), "''"),
    # unknown options, with the nearest known one
    (f"{TTT} --stepz 3", "--stepz is no option of 'rada-fast ttt'; did you mean --steps?"),
    (f"{TTT} --step 3", "did you mean --steps?"),
    (f"{TTT} --out o", "did you mean --output?"),
    (f"{TTT} --Views 3", "did you mean --views?"),
    (f"{TTT} -v 3", "-v is no option"),
    (f"{TTT} --", "-- is no option"),
    (f"{TTT} --epochs 3", "--epochs is no option"),
    (f"{TTT} --no-steps", "--no-steps is no option"),
    (f"{TTT} --=3", "-- is no option of 'rada-fast ttt'; 'rada-fast ttt --help' lists them"),
    (f"{TTT} --no-json=1", "--no-json takes no value, got '1'; --json is its opposite"),
    (f"{TTT} extra", "'extra' belongs to no option"),
    (f"{TTT} --overwrite yes", "'yes' belongs to no option"),
    (f"{EFT} --step 3", "--step is no option"),
    (f"{FFT} --selection 0.1", "--selection is no option"),
    ("demo --image 3", "did you mean --images?"),
    ("demo 3", "'3' belongs to no option"),
    ("doctor --jsn", "did you mean --json?"),
    ("doctor all", "'all' belongs to no option"),
    ("kernels --class 3", "did you mean --classes?"),
    ("build --job 3", "did you mean --jobs?"),
    ("build now", "'now' belongs to no option"),
    ("kernels --target 90", "did you mean --targets?"),
    # required options and values that are missing
    ("ttt", "--data must be given"),
    ("eft", "--train and --test must be given"),
    ("fft --train imagefolder:x", "--test must be given"),
    ("ttt --data", "--data needs a value"),
    ("ttt --data --views 3", "--data needs a value"),
    (f"{TTT} --steps", "--steps needs a value: a whole number"),
    (f"{TTT} --queries", "--queries needs at least one value: one of image, text, rational"),
    (f"{TTT} --queries --json", "--queries needs at least one value"),
    ("fft --train imagefolder:x --test", "--test needs at least one value"),
    ("kernels --targets", "--targets needs at least one value"),
    ("demo --output", "--output needs a value"),
    ("build --jobs", "--jobs needs a value: a whole number or None"),
    (f"{TTT} --options", "--options needs a file"),
    # values of another kind
    (f"{TTT} --steps many", "--steps must be a whole number, got 'many'"),
    (f"{TTT} --steps 3.0", "--steps must be a whole number"),
    (f"{TTT} --steps None", "--steps must be a whole number"),
    (f"{TTT} --views 0x10", "--views"),
    (f"{TTT} --views=", "--views must be a whole number, got ''"),
    (f"{TTT} --lr fast", "--lr must be a number, got 'fast'"),
    (f"{TTT} --lr 1,5", "--lr"),
    (f"{TTT} --limit all", "--limit must be a whole number or None"),
    (f"{TTT} --json=1", "--json takes no value"),
    (f"{TTT} --overwrite=true", "--overwrite takes no value"),
    (f"{TTT} --view-kind fog", "--view-kind must be one of crop, augmix, got 'fog'"),
    (f"{TTT} --preset published", "--preset must be one of official, paper"),
    (f"{TTT} --queries image sound", "--queries must be one of image, text, rational, got 'sound'"),
    (f"{TTT} --queries image image", "--queries must not repeat"),
    (f"{TTT} --precision half", "--precision must be one of"),
    (f"{TTT} --loss median", "--loss must be one of"),
    (f"{TTT} --optimizer lion", "--optimizer must be one of"),
    (f"{EFT} --protocol few", "--protocol must be one of"),
    (f"{EFT} --schedule linear", "--schedule must be one of"),
    (f"{EFT} --shots all", "--shots must be a whole number or None"),
    (f"{FFT} --stages three", "--stages must be one of both, first"),
    ("kernels --targets 80 90 80", "--targets must not repeat a compute capability, got (80, 90, 80)"),
    ("kernels --classes 2147483647", "--classes must be a whole number of at most"),
    ("kernels --batch 2147483647", "--batch must be a whole number of at most"),
    ("kernels --targets 70", "--targets must be one of 80, 86, 89, 90, 100, 120, got '70'"),
    ("kernels --dtype float64", "--dtype must be one of"),
    ("kernels --classes few", "--classes must be a whole number"),
    ("build --timeout soon", "--timeout must be a number"),
    ("demo --seed now", "--seed must be a whole number"),
    # out of range
    (f"{TTT} --steps -1", "--steps must be a whole number of at least 0, got -1"),
    (f"{TTT} --views 0", "--views must be a whole number of at least 1"),
    (f"{TTT} --views 2147483648", "--views must be a whole number of at most"),
    (f"{TTT} --episodes 0", "--episodes"),
    (f"{TTT} --selection 0", "--selection must be above 0 and at most 1"),
    (f"{TTT} --selection 1.5", "--selection"),
    (f"{TTT} --workers -1", "--workers"),
    (f"{TTT} --workers 100000", "--workers must be a whole number of at most 1024"),
    (f"{TTT} --limit 0", "--limit"),
    (f"{TTT} --seed -1", "--seed"),
    (f"{TTT} --seed 99999999999999999999", "--seed must be a whole number of at most 9223372036854775807"),
    (f"{TTT} --order-seed 99999999999999999999", "--order-seed"),
    (f"{TTT} --order-seed -3", "--order-seed"),
    (f"{TTT} --allow-unreadable -1", "--allow-unreadable"),
    (f"{TTT} --temperature 0", "--temperature must be above 0"),
    (f"{TTT} --temperature -1e-3", "--temperature must be above 0, got -0.001"),
    (f"{TTT} --num-heads 0", "--num-heads"),
    (f"{TTT} --num-heads 7", "--num-heads must divide embed_dim 512, got 7"),
    (f"{TTT} --num-layers 0", "--num-layers"),
    (f"{TTT} --num-layers 10000000", "--num-layers must be a whole number of at most"),
    (f"{TTT} --num-layers 2 --mask-function mlp", "--num-layers must be 1 with mask_function 'mlp'"),
    (f"{EFT} --epochs 0", "--epochs"),
    (f"{EFT} --batch-size 0", "--batch-size"),
    (f"{EFT} --evaluate-every -1", "--evaluate-every"),
    (f"{EFT} --shots 0", "--shots"),
    (f"{EFT} --new-test imagefolder:x", "--new-test needs protocol 'all'"),
    (f"{FFT} --finetune-from 20", "--finetune-from must be at most epochs 10, got 20"),
    (f"{FFT} --micro-batch 0", "--micro-batch"),
    (f"{FFT} --warmup-steps -1", "--warmup-steps"),
    ("demo --images 0", "--images"),
    ("demo --images 2147483647", "--images must be a whole number of at most"),
    # files and names that are of another kind than the option wants
    (f"{TTT} --text-features features:", "--text-features must be class-means, features:FILE.npz"),
    (f"{TTT} --model /etc", "--model '/etc' is neither one of open_clip's nor 'embedded'\n"),
    ("ttt --data features:{0}/empty", "--data features:{0}/empty: feature file {0}/empty is a folder"),
    ("ttt --data features:{0}/scale.npz", "logit_scale must be one number above 0 that float32 holds, got -5"),
    ("ttt --data features:{0}/good.npz --text-features features:{0}/wide.npz", "--data features:{0}/good.npz has features of width 16"),
    ("eft --train features:{0}/good.npz --test features:{0}/wide.npz --text-features class-means --protocol all", "--test features:{0}/wide.npz has features of width 32"),
    ("fft --train features:{0}/good.npz --test features:{0}/good.npz features:{0}/wide.npz --text-features class-means --stages first", "--test features:{0}/wide.npz has features of width 32"),
    ("demo --epochs -2", "--epochs"),
    ("demo --seed 9223372036854775807", "--seed must be a whole number of at most"),
    ("build --jobs 0", "--jobs"),
    ("build --timeout 0", "--timeout"),
    ("kernels --classes 0", "--classes must be a whole number of at least 1, got 0"),
    ("kernels --batch 0", "--batch"),
    ("kernels --batch -1", "--batch"),
    ("kernels --embed-dim 0", "--embed-dim"),
    ("kernels --embed-dim 500", "--embed-dim must be a multiple of 8 with preset 'official', got 500"),
    ("kernels --embed-dim 1000000", "--embed-dim"),
    ("fft --train x --test y --epochs 3", "--finetune-from must be at most epochs 3, got 5; unless given it is 5"),
    # numbers that are infinite, not a number, or very long
    (f"{TTT} --lr inf", "--lr must be at most"),
    (f"{TTT} --lr -inf", "--lr must be above 0, got -inf"),
    (f"{TTT} --lr nan", "--lr must be above 0, got nan"),
    (f"{TTT} --lr 1e400", "--lr"),
    (f"{TTT} --temperature inf", "--temperature must be at most"),
    (f"{TTT} --temperature nan", "--temperature"),
    (f"{TTT} --selection nan", "--selection"),
    (f"{TTT} --penalty-weight inf", "--penalty-weight"),
    (f"{TTT} --weight-decay nan", "--weight-decay"),
    (f"{EFT} --lr inf", "--lr"),
    (f"{EFT} --penalty-weight nan", "--penalty-weight"),
    (f"{FFT} --finetune-lr inf", "--finetune-lr"),
    (f"{FFT} --weight-decay inf", "--weight-decay"),
    ("build --timeout inf", "--timeout"),
    ("build --timeout nan", "--timeout"),
    (f"{TTT} --seed {MANY_DIGITS}", "--seed must be a whole number"),
    (f"{TTT} --views {MANY_DIGITS}", "--views must be a whole number"),
    (f"{TTT} --views {'9' * 4000}", "--views must be a whole number of at most"),
    (f"{TTT} --lr {MANY_DIGITS}", "--lr must be at most"),
    (f"kernels --classes {MANY_DIGITS}", "--classes"),
    (f"demo --images {MANY_DIGITS}", "--images"),
    # values that are empty, hold NUL characters, are not UTF-8, or go over many lines
    (("ttt", "--data", ""), "--data must neither be empty"),
    (("ttt", "--data", " "), "--data"),
    ("ttt --data=", "--data"),
    (("ttt", "--data", "imagefolder:a\0b"), "--data"),
    (("ttt", "--data", "imagefolder:\udcff"), "--data"),
    (("ttt", "--data", "imagefolder:a\nb"), "data folder a\\nb does not exist"),
    (("ttt", "--data", "imagefolder:\x1b[31m"), "data folder \\x1b[31m does not exist"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--output", ""), "--output"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--output", "a\0"), "--output"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--templates", ""), "--templates"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--templates", "\udcff"), "--templates"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--templates", "a \udcff {{}}"), "--templates"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--adapter", ""), "--adapter"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--model", ""), "--model"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--model", "\udcff"), "--model"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--pretrained", ""), "--pretrained"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--classes", ""), "--classes"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--text-features", ""), "--text-features"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--device", ""), "--device"),
    (("ttt", "--data", "imagefolder:{0}/pictures", "--\udcff", "3"), "\\udcff"),
    (("fft", "--train", "imagefolder:x", "--test", ""), "--test"),
    (("demo", "--output", ""), "--output"),
    (("ttt", "--options="), "--options"),
    (("ttt", "--options", ""), "--options"),
    (("ttt", "--options", "a\0b"), "--options"),
    # home folders of unknown users, paths that are too long
    ("ttt --data imagefolder:~nouser/x", "--data begins with a home folder"),
    ("ttt --data ~nouser/x", "--data"),
    (f"{TTT} --output ~nouser/x", "--output begins with a home folder"),
    (f"{TTT} --adapter ~nouser/x", "--adapter"),
    (f"{TTT} --pretrained ~nouser/x --model ViT-B-16", "--pretrained"),
    (f"{TTT} --classes ~nouser/x", "--classes"),
    (f"{TTT} --templates ~nouser/x", "--templates"),
    (f"{TTT} --text-features features:~nouser/x", "--text-features"),
    ("fft --train imagefolder:x --test imagefolder:~nouser/x", "--test"),
    ("demo --output ~nouser/x", "--output"),
    ("ttt --options ~nouser/x", "--options"),
    (f"ttt --data imagefolder:{LONG}", "--data"),
    (f"{TTT} --output {LONG}", "--output"),
    (f"{TTT} --adapter {LONG}", "--adapter"),
    (f"{TTT} --classes {LONG}", "--classes"),
    (f"{TTT} --templates {LONG}", "--templates"),
    (f"{TTT} --model {LONG}", "--model"),
    (f"{TTT} --model ViT-B-16 --pretrained {LONG}", "--pretrained"),
    (f"ttt --options {LONG}", "--options"),
    # data
    ("ttt --data pictures:{0}/pictures", "data must be KIND:PATH"),
    ("ttt --data {0}/pictures", "data must be KIND:PATH"),
    ("ttt --data imagefolder:", "data must be KIND:PATH"),
    ("ttt --data imagefolder:{0}/nowhere", "data folder {0}/nowhere does not exist"),
    ("ttt --data imagefolder:{0}/file", "data folder {0}/file is a file"),
    ("ttt --data imagefolder:{0}/empty", "data folder {0}/empty must have one sub-folder for each class"),
    ("ttt --data imagefolder:{0}/loop", "--data"),
    ("ttt --data imagefolder:/dev/null", "--data /dev/null must be a file or a folder, got a device"),
    ("ttt --data images:{0}/empty", "--data"),
    ("ttt --data images:{0}/flat", "--classes"),
    ("ttt --data features:{0}/nowhere.npz", "--data"),
    ("ttt --data features:{0}/pictures", "--data"),
    ("ttt --data features:/dev/zero", "--data /dev/zero must be a file or a folder, got a device"),
    ("ttt --data features:{0}/pipe", "--data {0}/pipe must be a file or a folder, got a pipe"),
    *((f"ttt --data features:{{0}}/{name}.npz", "--data") for name in (
        "torn", "nan", "zero", "whole", "flat", "short", "negative", "huge", "real", "unlabelled", "none", "names",
        "objects", "bytes", "true", "unsigned", "complex", "deep",
    )),
    ("ttt --data imagefolder:{0}/latin", "--classes must be texts in UTF-8, got '\\udcff ring'"),
    (f"{TTT} --classes {{0}}/half.json", "--classes must be texts in UTF-8"),
    ("ttt --data features:{0}/good.npz", "--data features:{0}/good.npz has features of width 16"),
    ("eft --train images:{0}/flat --test images:{0}/flat", "--train"),
    ("eft --train imagefolder:{0}/pictures --test images:{0}/flat", "--test"),
    ("eft --train imagefolder:{0}/nowhere --test imagefolder:{0}/pictures", "--train"),
    ("eft --train imagefolder:{0}/pictures --test imagefolder:{0}/nowhere", "--test"),
    ("eft --train imagefolder:{0}/pictures --test imagefolder:{0}/other", "--test"),
    (f"{EFT} --protocol all --new-test imagefolder:{{0}}/nowhere", "--new-test"),
    ("eft --train features:{0}/good.npz --test features:{0}/good.npz --train-views crop --text-features class-means",
     "--train-views"),
    ("eft --train features:{0}/huge.npz --test features:{0}/good.npz --text-features class-means", "--train"),
    ("fft --train images:{0}/flat --test images:{0}/flat", "--train"),
    ("fft --train imagefolder:{0}/pictures --test images:{0}/flat", "--test"),
    ("fft --train imagefolder:{0}/pictures --test imagefolder:{0}/pictures imagefolder:{0}/nowhere", "--test"),
    ("fft --train imagefolder:{0}/pictures --test imagefolder:{0}/other", "--test"),
    ("fft --train features:{0}/good.npz --test features:{0}/good.npz", "--stages"),
    # classes, templates, text features
    (f"{TTT} --classes {{0}}/three.txt", "--classes"),
    (f"{TTT} --classes {{0}}/none.txt", "--classes"),
    (f"{TTT} --classes {{0}}/nowhere.txt", "--classes"),
    (f"{TTT} --classes {{0}}/empty", "--classes"),
    (f"{TTT} --classes {{0}}/numbers.json", "--classes"),
    (f"{TTT} --classes {{0}}/torn.json", "--classes"),
    (f"{TTT} --classes {{0}}/deep.json", "--classes"),
    (f"{TTT} --classes {{0}}/long.json", "--classes"),
    (f"{TTT} --classes {{0}}/latin.txt", "--classes"),
    (f"{TTT} --classes /dev/zero", "--classes /dev/zero must be a file"),
    (f"{TTT} --classes {{0}}/pipe", "--classes {0}/pipe must be a file"),
    (f"{TTT} --templates fotos", "--templates must be a template"),
    (f"{TTT} --templates {{0}}/none.txt", "--templates"),
    (f"{TTT} --templates {{0}}/empty", "--templates"),
    (f"{TTT} --templates {{0}}/latin.txt", "--templates"),
    (f"{TTT} --text-features class-means", "--text-features class-means needs training images"),
    (f"{TTT} --text-features means", "--text-features"),
    (f"{TTT} --text-features features:{{0}}/nowhere.npz", "--text-features"),
    (f"{TTT} --text-features features:{{0}}/nan.npz", "--text-features"),
    (f"{TTT} --text-features features:{{0}}/good.npz", "--text-features"),
    (f"{TTT} --text-features imagefolder:{{0}}/pictures", "--text-features"),
    # adapters, models, devices
    (f"{TTT} --adapter {{0}}/nowhere", "--adapter"),
    (f"{TTT} --adapter {{0}}/empty", "--adapter"),
    (f"{TTT} --adapter {{0}}/file", "--adapter"),
    (f"{TTT} --adapter {{0}}/other.safetensors", "--adapter"),
    (f"{TTT} --adapter {{0}}/torn.safetensors", "--adapter"),
    (f"{TTT} --adapter {{0}}/narrow.safetensors", "--adapter"),
    (f"{TTT} --adapter {{0}}/latin.txt", "--adapter"),
    (f"{TTT} --adapter /dev/zero", "--adapter /dev/zero must be a file"),
    (f"{TTT} --model ViT-B-17", "--model 'ViT-B-17' is neither one of open_clip's"),
    (f"{TTT} --model ViT-B-16", "--pretrained"),
    (f"{TTT} --model ViT-B-16 --pretrained opnai", "--pretrained"),
    (f"{TTT} --model ViT-B-16 --pretrained /dev/zero", "--pretrained /dev/zero must be a file"),
    (f"{TTT} --pretrained openai", "--pretrained"),
    *((f"{TTT} --device {name}", "--device") for name in (
        "gpu", "mps", "meta", "xla", "cuda:99", "cuda:-1", "cuda:x", "cpu:7", "cuda:99999999999999999999",
    )),
    # outputs
    (f"{TTT} --output {{0}}/file", "--output {0}/file must be a folder"),
    (f"{TTT} --output {{0}}/file/below", "--output"),
    (f"{TTT} --output {{0}}/loop/below", "--output"),
    (f"{TTT} --output /dev/null", "--output /dev/null must be a"),
    (f"{TTT} --output /proc/nothing/here", "--output"),
    ("demo --output {0}/file", "--output"),
    ("demo --output /proc/nothing/here", "--output"),
    # options files
    *((f"ttt --options {{0}}/{name}", "--options") for name in (
        "nowhere.toml", "empty", "torn.toml", "unknown.toml", "type.toml", "real.toml", "true.toml", "number.toml",
        "text.toml", "date.toml", "list.toml", "empty_list.toml", "table.toml", "double.toml", "double.json",
        "null.json", "array.json", "long.json", "long.toml", "deep_options.json", "deep_options.toml", "nul.json",
        "empty_value.json", "latin.toml", "pipe", "pictures/x/y", "loop",
    )),
    ("ttt --options /dev/zero", "--options file /dev/zero must be a file"),
    ("ttt --options {0}/unknown.toml", "--stepz is no option of 'rada-fast ttt'; did you mean --steps?"),
    ("ttt --options {0}/type.toml", "--steps must be a whole number, got 'three'"),
    ("ttt --options {0}/own.toml", "own.toml: --options is no option of 'rada-fast ttt'"),
    ("ttt --data x --options {0}/nan.json", "--lr must be above 0, got nan"),
    ("ttt --data x --options {0}/inf.json", "--lr must be at most"),
    ("ttt --data x --options {0}/range.toml", "--steps must be a whole number of at least 0"),
]  # fmt: skip


def test_the_table_of_refusals_is_complete() -> None:
    assert len(REFUSED) >= 250


@pytest.mark.parametrize("row", range(len(REFUSED)))
def test_bad_input_is_refused_in_one_line_that_names_the_option(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command, expected = REFUSED[row]
    arguments = [part.format(inputs) for part in (command.split() if isinstance(command, str) else command)]
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2, arguments
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rada-fast: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    assert expected.format(inputs) in captured.err
    assert list(tmp_path.iterdir()) == []


VARIABLES: list[tuple[str, str, str]] = [
    ("RADA_FAST_BACKEND", "fast", "doctor"),
    ("RADA_FAST_BACKEND", "CPU", "ttt --data imagefolder:{0}/pictures"),
    ("RADA_FAST_BACKEND", "fast", "demo"),
    ("RADA_FAST_FLOAT32", "tf16", "doctor"),
    ("RADA_FAST_FLOAT32", "float64", "eft --train imagefolder:{0}/pictures --test imagefolder:{0}/pictures"),
    ("RADA_FAST_TILES", "measured", "kernels"),
    ("RADA_FAST_TARGET", "sm_80", "kernels"),
    ("RADA_FAST_GRAPHS", "always", "doctor"),
    ("RADA_FAST_KEEP_MEMORY", "always", "doctor"),
    ("USE_CUDA", "maybe", "build"),
]


@pytest.mark.parametrize(("name", "value", "command"), VARIABLES)
def test_a_variable_with_a_meaningless_value_is_refused_in_one_line(
    inputs: Path,
    tmp_path: Path,
    name: str,
    value: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    assert cli.main(command.format(inputs).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"rada-fast: {name} must be ")
    assert captured.err.count("\n") == 1
    assert value in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_be_used_is_refused_before_anything_is_read(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RADA_FAST_BACKEND", "cuda")
    assert cli.main(TTT.format(inputs).split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("rada-fast: RADA_FAST_BACKEND=cuda: backend 'cuda' cannot be used: ")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_extension_is_reported_and_recorded(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libraries, "_outcome", ["x.so is damaged; run `rada-fast build`"])
    monkeypatch.setattr(libraries, "_cuda_outcome", ["no"])
    monkeypatch.setattr(libraries, "search", lambda cuda=False: (None, ["x.so is damaged"]))
    command = f"ttt --data features:{inputs}/good.npz --text-features features:{inputs}/text.npz --output o"
    assert cli.main(command.split()) == 0
    message = "x.so is damaged; run `rada-fast build`; until then this runs on plain PyTorch, more slowly"
    assert f"rada-fast: warning: {message}\n" in capsys.readouterr().err
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert message in summary["warnings"]
    assert summary["backend"] == "reference"


WRONG_VALUES: dict[type, tuple[str, ...]] = {
    int: ("", "x", "1.5", "0x10", "-99", "99999999999999999999", MANY_DIGITS, "inf", "nan"),
    float: ("", "x", "1,5", "-99", "inf", "-inf", "nan", "1e400", MANY_DIGITS),
    str: ("", " ", "a\0b"),
    bool: ("", "yes", "1"),
}


@pytest.mark.parametrize(
    ("command", "part"),
    [(name, part) for name, command in cli.COMMANDS.items() for part in (command.parts or ("",))],
)
def test_every_option_of_every_command_refuses_values_of_another_kind(command: str, part: str) -> None:
    words = [part] if part else []
    config_type, _ = cli._options_of_part(command, words)
    options = options_of(config_type)
    listed = getattr(config_type, "WITHOUT_FLAG", None)
    needed = [f"{option.flag}=imagefolder:x" for name, option in options.items() if option.required or name == listed]
    cli.parse(command, [*words, *needed])
    for option in options.values():
        others = [other for other in needed if not other.startswith(f"{option.flag}=")]
        for value in ("x",) if option.choices else WRONG_VALUES[option.kind]:
            with pytest.raises(UserError) as caught:
                cli.parse(command, [*words, *others, f"{option.flag}={value}"])
            assert option.flag in str(caught.value), (option.flag, value, str(caught.value))
        if option.kind is not bool:
            with pytest.raises(UserError, match=f"{option.flag} needs"):
                cli.parse(command, [*words, *others, option.flag])


def test_an_option_is_named_only_if_its_whole_path_is_mentioned(tmp_path: Path) -> None:
    config = cli.parse("ttt", ["--data", f"features:{tmp_path}/f.npz", "--output", "o"])
    assert name_option("no class has two names", config) == "no class has two names"
    assert name_option("o cannot be written", config) == "--output: o cannot be written"
    assert name_option(f"feature file {tmp_path}/f.npz is damaged", config).startswith("--data: feature file")
