"""Every command of docs/tables.md runs: this page is read here, and each command is started on a few small pictures."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from rada_fast.cli import main
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS
from rada_fast.embedded import world
from tests.tiny_models import write_transformers_folder

PAGE = (Path(__file__).parents[1] / "docs" / "tables.md").read_text()
COMMANDS = re.findall(r"^(?:    |\|.*`)(rada-fast [^`\n]+?)(?:`|$)", PAGE, flags=re.MULTILINE)
MODEL = re.compile(r"(?<=--model transformers:)models/(align)\S*")
"""A model that is a folder of the library transformers, and its kind."""
DATA = re.compile(r"(coop|imagenet|imagenet-[a-z0-9]+|objectnet):data/[\w/-]+")
SMALLER = {
    "eft": "--shots 1 --epochs 1 --batch-size 2 --allow-chance",
    "fft": "--epochs 1 --finetune-from 1 --finetune-epochs 1 --batch-size 4 --templates photo --allow-chance",
    "ttt": "--views 2 --steps 1 --limit 2 --allow-chance",
    "bench": "--classes 3 --repeats 1",
    "bench roofline": "--only losses --classes 3 --episodes 1 --precision float32 --repeats 1",
    "bench scaling": "--classes 3 4 5 --axes classes --passes forward --embed-dim 16 --repeats 1",
    "bench table5": "--eft-classes 3 --settings eft --only rada_fast --repeats 1",
    "inspect": "--images 4 --allow-chance",
    "report": "",
}
"""What makes a command of each kind, or a part of one, small. The last value of an option counts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two pictures of each of four classes, and with the options files of the page."""
    everything, root = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("tables")
    world.write_imagefolder(everything, 1, seed=1, shift=None)
    for folder in sorted(everything.iterdir())[:4]:
        shutil.copytree(folder, root / "pictures" / folder.name)
    for name, content in re.findall(r"```toml\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL):
        assert tomllib.loads(content)["model"].startswith("ViT-B-16")
        kept = [line for line in content.splitlines() if not line.startswith(("model =", "pretrained ="))]
        (root / name).write_text(on_pictures("\n".join(kept), root))
    return root


def on_pictures(text: str, root: Path) -> str:
    return DATA.sub(f"imagefolder:{root / 'pictures'}", text)


def small(command: str, root: Path) -> list[str]:
    """Return the arguments of a command for the pictures of a folder.

    The embedded model takes the place of open_clip's, and a tiny one with random weights that of one of transformers.
    """
    text = MODEL.sub(rf"{root}/models/\1", on_pictures(command, root))
    text = re.sub(r"--(model|pretrained) (?!transformers:)\S+ ?", "", text)
    text = re.sub(r"(--options |--adapter |--output |report )(\S+)", rf"\1{root}/\2", text)
    arguments = shlex.split(text)[1:]
    return arguments + (SMALLER.get(" ".join(arguments[:2])) or SMALLER[arguments[0]]).split()


# The commands stay in the order of the page, because some start from what others have written.
@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda n: COMMANDS[n].rpartition("results/")[2][:40])
def test_every_command_runs(place: Path, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    if model := MODEL.search(COMMANDS[number]):
        pytest.importorskip("transformers")
        write_transformers_folder(place / "models" / model[1], model[1])
    status = main(small(COMMANDS[number], place))
    assert status == 0, capfd.readouterr().err


def test_the_page_has_every_method_and_every_table() -> None:
    text = " ".join(COMMANDS)
    named = set(re.findall(r"--method (\S+)", text))
    # RAda is what the commands do without the option.
    assert named == {*EFT_METHODS, *FFT_METHODS} - {"rada"}
    assert re.findall(r"^## Table (\d+)", PAGE, flags=re.MULTILINE) == [str(number) for number in range(1, 11)]
    outputs = re.findall(r"--output (\S+)", text)
    repeated = {output for output in outputs if outputs.count(output) > 1}
    # A command with --ensemble goes on with the run of an earlier one.
    assert repeated == {"results/table1/ft"}
