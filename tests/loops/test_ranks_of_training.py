"""Trainings of several processes: the results of a single one, one state for all, and one line when one is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rada_fast.loops import evaluate
from rada_fast.loops.training import Training
from rada_fast.system import ranks
from tests.loops.support import lines
from tests.processes import command, run_ranks, start_ranks

NAMES = ("red circle", "blue square", "green star")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eleven pictures of noise in three classes, of which one cannot be read."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(11):
        path = root / NAMES[index % 3] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (root / NAMES[1] / "4.png").write_bytes(b"no picture")
    return root


def arguments(name: str, pictures: Path, output: Path) -> list[str]:
    """Return the command line of a small training."""
    source = f"imagefolder:{pictures}"
    common = ["--train", source, "--test", source, "--output", str(output), "--batch-size", "4", "--epochs", "2"]
    common += ["--allow-unreadable", "9", "--save-every", "1steps"]
    if name == "eft":
        return ["eft", *common, "--protocol", "all", "--evaluate-every", "1", "--train-views", "crop"]
    stages = ["--finetune-from", "1", "--finetune-epochs", "2", "--finetune-lr", "1e-4", "--lr", "1e-3"]
    return ["fft", *common, *stages, "--shard", "full" if name == "fft, sharded" else "none"]


def run(name: str, pictures: Path, output: Path) -> int:
    """Run a training in this process with one thread, as each rank does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return command(arguments(name, pictures, output))
    finally:
        torch.set_num_threads(threads)


def run_both(pictures: Path, folder: Path) -> int:
    """Run two trainings one after the other as one of several processes."""
    evaluate.CHUNK_ELEMENTS = 2 * 3 * 64  # some images at a time, so that each process computes some
    return max(command(arguments(name, pictures, folder / name)) for name in ("eft", "fft"))


def killed_at(save: int, rank: int, pictures: Path, output: Path) -> int:
    """Run a training as one of several processes, of which one is killed instead of saving a state."""
    save_state, saves = Training.save_state, itertools.count(1)

    def save_or_die(training: Training, *given: Any) -> None:
        if next(saves) == save and ranks.current().rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        save_state(training, *given)

    Training.save_state = save_or_die  # type: ignore[method-assign]
    return command(arguments("fft, sharded", pictures, output))


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def assert_close(found: Any, expected: Any) -> None:
    """Check that two values of records agree, numbers to six digits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name not in (
                "seconds",
                "images_per_second",
                "time",
                "output",
                "peak_memory",
                "resumed",
                "files",
                "run",
                "config",
            ):
                assert_close(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected)


def assert_same_results(found: Path, expected: Path) -> None:
    """Check that two folders hold the same results, weights within a fraction of a step."""
    assert_close(summary_of(found), summary_of(expected))
    for name in ("epochs.jsonl", "images.jsonl"):
        assert_close(lines(found, name), lines(expected, name))
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.glob("*.safetensors"):
        weights = load_file(found / path.name)
        for key, value in load_file(path).items():
            if not key.endswith("in_proj_bias"):  # the biases of keys have no gradient but rounding errors
                difference = (weights[key] - value).double()
                assert float(difference.abs().max()) < 1e-4, (path.name, key)
                assert float(difference.square().mean().sqrt()) < 2e-6, (path.name, key)


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the trainings in a single process, and return the folder of their folders."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("eft", "fft"):
        assert run(name, pictures, folder / name) == 0
    return folder


def test_two_ranks_train_what_one_process_trains(pictures: Path, alone: Path, tmp_path: Path) -> None:
    started = run_ranks(2, tmp_path / "log", run_both, pictures, tmp_path)
    for name in ("eft", "fft"):
        assert_same_results(tmp_path / name, alone / name)
    assert "rada-fast eft" in started[0].output.read_text()
    assert started[1].output.read_text() == started[1].errors.read_text() == ""


def test_a_rank_is_killed_and_any_number_goes_on(pictures: Path, alone: Path, tmp_path: Path) -> None:
    """Three ranks, two, and one train with a sharded encoder. The first two groups lose a rank inside an epoch."""
    output = tmp_path / "run"
    for count, save, epochs in ((3, 10, 2), (2, 4, 3)):
        log = tmp_path / str(count)
        started = start_ranks(count, log, killed_at, save, count - 1, pictures, output)
        *others, killed = started
        assert killed.wait() == -signal.SIGKILL
        for rank in others:  # as torchrun does
            rank.process.terminate()
        assert {rank.wait() for rank in others} <= {1, 143}
        said = "".join(rank.errors.read_text() for rank in started)
        assert said.count(f"rada-fast: rank {count - 1} of {count} was killed or has crashed; to go on: ") == 1, said
        assert said.count("rada-fast: ") == 1, said
        assert len(lines(output, "epochs.jsonl")) == epochs
    assert run("fft, sharded", pictures, output) == 0
    assert_same_results(output, alone / "fft")
    assert summary_of(output)["resumed"] == 3
