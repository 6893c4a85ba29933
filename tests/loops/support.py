"""Write the features that loops read, build the options of small runs, and read the lines that a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.config.options import RunOptions


def lines(folder: Path, name: str = "images.jsonl") -> list[dict[str, Any]]:
    """Return the records in a file of lines that a run wrote into its folder."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def features_file(
    path: Path, classes: int = 5, each: int = 12, *, views: int | None = None, noise: float = 1.0, label_shift: int = 0
) -> str:
    """Write features around a mean of each class, and return them as --data names them.

    label_shift: by how many classes the labels are wrong.
    """
    generator = np.random.default_rng(0)
    means = generator.normal(size=(classes, 16))
    labels = np.tile(np.arange(classes), each)
    shape = (len(labels), 16) if views is None else (len(labels), views, 16)
    around = means[labels] if views is None else means[labels][:, None]
    features = around + noise * generator.normal(size=shape)
    np.savez(path, features=features.astype(np.float32), labels=(labels + label_shift) % classes)
    return f"features:{path}"


def text_file(path: Path, classes: int = 5, seed: int = 0) -> str:
    """Write a text feature of each class. With the seed 0 it is the mean of the class in features_file."""
    means = np.random.default_rng(seed).normal(size=(classes, 16)).astype(np.float32)
    np.savez(path, features=means, labels=np.arange(classes))
    return f"features:{path}"


def ttt_options(data: Path, output: Path, *, run: dict[str, Any] | None = None, **changes: Any) -> TTTOptions:
    """Return options of ttt on a folder of pictures: one step on two views of each, unless changes say otherwise."""
    values: dict[str, Any] = {"data": f"imagefolder:{data}", "views": 2, "episode": EpisodeConfig(steps=1)}
    return TTTOptions(run=RunOptions(output=str(output), **(run or {})), **(values | changes))


def eft_options(
    train: Path, test: Path, output: Path, /, *, run: dict[str, Any] | None = None, **changes: Any
) -> EFTOptions:
    """Return options of eft on folders of pictures: two epochs of single images, unless changes say otherwise."""
    values: dict[str, Any] = {"train": f"imagefolder:{train}", "test": f"imagefolder:{test}", "epochs": 2}
    return EFTOptions(run=RunOptions(output=str(output), **(run or {})), **(values | {"batch_size": 1} | changes))


def fft_options(
    train: Path, test: Path, output: Path, /, *, run: dict[str, Any] | None = None, **changes: Any
) -> FFTOptions:
    """Return options of fft on folders of pictures: each stage has one epoch, unless changes say otherwise."""
    values: dict[str, Any] = {"train": f"imagefolder:{train}", "test": (f"imagefolder:{test}",)}
    values |= {"epochs": 1, "finetune_from": 1, "finetune_epochs": 1, "batch_size": 2}
    return FFTOptions(run=RunOptions(output=str(output), **(run or {})), **(values | changes))


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the fields that differ from run to run."""
    varying = {"time", "seconds", "images_per_second", "resumed", "peak_memory", "output", "config", "run", "warnings"}
    return {name: value for name, value in record.items() if name not in varying}


def results(folder: Path) -> dict[str, Any]:
    """Return everything that a run wrote: lines and the summary without times, and the bits of the weights."""
    contents: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".jsonl":
            records = [numbers(record) for record in lines(folder, path.name)]
            contents[path.name] = sorted(records, key=str) if path.name == "images.jsonl" else records
        elif path.suffix == ".safetensors":
            # The bytes of the file differ, because safetensors writes the entries of the header in any order.
            contents[path.name] = {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        elif path.name == "summary.json":
            contents[path.name] = numbers(json.loads(path.read_text()))
        else:
            contents[path.name] = None
    return contents
