"""Real CLIP features give the published zero-shot accuracies, and efficient fine-tuning learns base and new classes.

The features lie beside the checkout; without them these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rada_fast.config.commands import EFTOptions, TTTOptions
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.loops.eft import run_eft
from rada_fast.loops.ttt import run_ttt

from ..support import SHARED

SCENES, IMAGENET = SHARED / "data" / "whurs19", SHARED / "data" / "imagenet_text" / "ViT-B-32.npz"
needs_scenes = pytest.mark.skipif(not SCENES.is_dir(), reason=f"needs {SCENES}")


def spec(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"features:{path}"


def scenes(folder: Path, model: str) -> dict[str, str]:
    """Write the pictures of WHU-RS19, a random half of every class to train from, and their classes, as sources."""
    stored = np.load(SCENES / f"{model}.npz")
    features, labels = stored["features"], stored["labels"]
    training = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng(0)
    for label in range(19):
        order = generator.permutation(np.flatnonzero(labels == label))
        training[order[: len(order) // 2]] = True
    parts = {"all": labels >= 0, "train": training, "test": ~training}
    found = {
        name: spec(folder / f"{name}.npz", features=features[chosen], labels=labels[chosen], logit_scale=100.0)
        for name, chosen in parts.items()
    }
    return found | {"text": spec(folder / "text.npz", features=stored["text_features"], labels=np.arange(19))}


@needs_scenes
@pytest.mark.parametrize(("model", "accuracy"), [("ViT-B-32", 81.29), ("RN50", 71.54)])
def test_zero_shot_accuracies_are_the_published_ones(tmp_path: Path, model: str, accuracy: float) -> None:
    data = scenes(tmp_path, model)
    summary = run_eft(EFTOptions(
        data["all"], data["all"], protocol="all", shots=1, epochs=1, batch_size=19,
        text=ClassOptions(text_features=data["text"]), run=RunOptions(output=str(tmp_path / "run")),
    ))  # fmt: skip
    assert round(summary["test"]["zero_shot_top1"], 2) == accuracy


@needs_scenes
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_base_classes_are_learned_and_new_ones_kept(tmp_path: Path, preset: Any) -> None:
    data = scenes(tmp_path, "ViT-B-32")
    summary = run_eft(EFTOptions(
        data["train"], data["test"], text=ClassOptions(text_features=data["text"]),
        adapter=AdapterOptions(preset=preset), run=RunOptions(output=str(tmp_path / "run")),
    ))  # fmt: skip
    print({name: summary[name] for name in ("base", "new", "zero_shot_harmonic_mean", "adapted_harmonic_mean")})
    # These are the accuracies of the published split, so that the bars below are those of the same pictures.
    assert [round(summary[part]["zero_shot_top1"], 1) for part in ("base", "new")] == [82.8, 95.0]
    assert summary["base"]["adapted_top1"] >= (97 if preset == "official" else 95)
    assert summary["new"]["adapted_top1"] >= 93
    assert summary["adapted_harmonic_mean"] >= (95 if preset == "official" else 94)


@needs_scenes
@pytest.mark.parametrize("method", ["clip-adapter", "attend-both"])
def test_other_methods_learn_base_classes(tmp_path: Path, method: Any) -> None:
    data = scenes(tmp_path, "ViT-B-32")
    summary = run_eft(EFTOptions(
        data["train"], data["test"], method=method, epochs=20, batch_size=8,
        text=ClassOptions(text_features=data["text"]), run=RunOptions(output=str(tmp_path / "run")),
    ))  # fmt: skip
    print({name: summary[name] for name in ("base", "new", "zero_shot_harmonic_mean", "adapted_harmonic_mean")})
    assert summary["base"]["adapted_top1"] > summary["base"]["zero_shot_top1"] + 3


@needs_scenes
@pytest.mark.skipif(not IMAGENET.is_file(), reason=f"needs {IMAGENET}")
def test_a_thousand_classes_run_from_end_to_end(tmp_path: Path) -> None:
    pictures, classes = np.load(SCENES / "ViT-B-32.npz"), np.load(IMAGENET)
    names, features = classes["class_names"], pictures["features"][:6]
    labels = (features.astype(np.float32) @ classes["features"].astype(np.float32).T).argmax(axis=1)
    # The largest label says how many classes there are.
    labels[-1] = 999
    text = ClassOptions(text_features=spec(tmp_path / "t.npz", features=classes["features"], labels=np.arange(1000)))
    data = spec(tmp_path / "f.npz", features=features, labels=labels, class_names=names, logit_scale=100.0)
    run = run_eft(EFTOptions(
        data, data, protocol="all", epochs=2, batch_size=2, text=text, run=RunOptions(output=str(tmp_path / "eft")),
    ))  # fmt: skip
    assert run["test"]["classes"] == 1000
    assert run["test"]["status"] == {"ok": 6, "diverged": 0, "unreadable": 0}
    views = np.stack([features, *(np.roll(features, shift, axis=0) for shift in range(1, 4))], axis=1)
    data = spec(tmp_path / "v.npz", features=views[:2], labels=np.array([0, 999]), class_names=names, logit_scale=100.0)
    adapted = run_ttt(TTTOptions(
        data, text=text, adapter=AdapterOptions(adapter=str(tmp_path / "eft")),
        run=RunOptions(output=str(tmp_path / "ttt")),
    ))  # fmt: skip
    assert (adapted["classes"], adapted["status"]["ok"]) == (1000, 2)
