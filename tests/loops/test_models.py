"""Every kind of model runs through the three commands, from its name or its files to a summary."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rada_fast import cli
from tests.pictures import write_class_folders
from tests.tiny_models import known_to_open_clip, write_archive, write_openclip_folder, write_transformers_folder

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the library transformers is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write pictures of two classes, and models."""
    root = tmp_path_factory.mktemp("models")
    write_class_folders(root / "pictures", ("red plain square", "blue plain ring"), each=2)
    with known_to_open_clip(root):
        write_archive(root / "clip.pt")
        write_openclip_folder(root / "siglip2", "Small-Sigmoid")
        yield root


def run(folder: Path, output: Path, model: str) -> dict[str, dict[str, object]]:
    """Run the three commands with a model. Returns their summaries."""
    pictures, shared = f"imagefolder:{folder}/pictures", f"{model} --allow-chance"
    commands = {
        "eft": f"--train {pictures} --test {pictures} --protocol all --epochs 1 {shared}",
        "fft": f"--train {pictures} --test {pictures} --epochs 1 --finetune-from 1 --finetune-epochs 1 {shared}",
        "ttt": f"--data {pictures} --views 2 --steps 1 {shared}",
    }
    for command, options in commands.items():
        assert cli.main([command, *options.split(), "--output", str(output / command)]) == 0
    return {command: json.loads((output / command / "summary.json").read_text()) for command in commands}


@pytest.mark.parametrize(
    ("model", "bias", "served"),
    [
        ("--model Small-ViT --pretrained random", None, True),
        ("--model Small-RN --pretrained random", None, False),
        ("--model Small-Sigmoid --pretrained random", -10.0, False),
        ("--model Small-ViT --pretrained {folder}/clip.pt", None, True),
        ("--model openai:{folder}/clip.pt", None, True),
        ("--model openclip:{folder}/siglip2", -10.0, False),
        pytest.param("--model transformers:{folder}/hf-clip", None, False, marks=needs_transformers),
        pytest.param("--model transformers:{folder}/hf-siglip", 0.0, False, marks=needs_transformers),
        pytest.param("--model transformers:{folder}/hf-align", None, False, marks=needs_transformers),
    ],
)
def test_a_model_runs_through_the_three_commands(
    folder: Path, tmp_path: Path, model: str, bias: float | None, served: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model.format(folder=folder)
    if "hf-" in model:
        write_transformers_folder(folder / model.rpartition("/")[2], model.rpartition("-")[2])
        capfd.readouterr()
    for command, summary in run(folder, tmp_path, model).items():
        facts = summary["model"]
        assert isinstance(facts, dict), command
        assert facts["name"] == model.split()[1]
        assert facts.get("logit_bias") == bias
    errors = capfd.readouterr().err
    assert errors.count("its own module encodes the images") == (0 if served else 3)
    assert "Loading weights" not in errors
    assert "huggingface/tokenizers" not in errors
    # The encoder that fft has trained replaces the one of the same model.
    again = f"--data imagefolder:{folder}/pictures --views 1 --steps 0 {model} --allow-chance".split()
    if "--pretrained" in again:
        del again[(place := again.index("--pretrained")) : place + 2]
    assert cli.main(["ttt", *again, "--pretrained", f"{tmp_path}/fft", "--output", f"{tmp_path}/again"]) == 0
