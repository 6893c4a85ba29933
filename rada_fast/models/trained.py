"""What a run of fft has trained beside its adapter, read back: the image encoder, and the classifier in T's place.

The encoder is given as --pretrained, the run's folder or its rada-ft-model.safetensors; the classifier as
--text-features classifier:PATH, with the same paths. Nothing in them is executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rada_fast.errors import UserError

RUN_FILE = "run.json"
"""What a run is: its command and its options."""
WEIGHTS_FILES = ("rada-ft-model.safetensors", "rada-model.safetensors")
"""Where fft leaves classifier and encoder, those that were trained last first."""
CLASSIFIER, VISUAL = "classifier.weight", "visual."
MOST_RUN_BYTES = 2**29
"""The largest record of a run that is read; it has an entry for every picture."""
MOST_STARTS = 16
"""Runs that can have started from one another."""


@dataclass(frozen=True)
class TrainedRun:
    """A run whose weights go on being used.

    path: as it was given; model, pretrained, seed: what the run started from; weights: the file of fft's last stage, or
    None; trained_encoder: whether that file holds an image encoder, which a run with frozen encoders does not leave;
    num_classes: the rows of the classifier in that file, or None.
    """

    path: Path
    model: str
    pretrained: str | None
    seed: int
    fingerprint: str | None
    weights: Path | None
    trained_encoder: bool
    num_classes: int | None

    def put_encoder_into(self, model: nn.Module) -> None:
        """Give a model the image encoder that was trained. Raises UserError where it does not fit."""
        assert self.weights is not None
        state = {name.removeprefix(VISUAL): tensor for name, tensor in _tensors(self.weights, VISUAL).items()}
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(f"pretrained {self.weights}: {VISUAL}{name} holds NaN or infinity")
        try:
            model.visual.load_state_dict(state)  # type: ignore[union-attr]
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"pretrained {self.weights} does not fit the model {self.model}: {reason}") from None


def open_run(path: Path) -> TrainedRun | None:
    """The run that a folder or a weights file belongs to; None where the file is no run's.

    Raises UserError where it is a run's but cannot be used.
    """
    weights: Path | None
    if path.is_dir():
        weights = next((path / name for name in WEIGHTS_FILES if (path / name).is_file()), None)
        record = path / RUN_FILE
    else:
        names = _names(path)
        if names is None or CLASSIFIER not in names:
            return None
        weights, record = path, path.parent / RUN_FILE
    options = _options_of(path, record)
    stages = options["options"].get("stages")
    names = frozenset() if weights is None else _names(weights) or frozenset()
    trained = any(name.startswith(VISUAL) for name in names)
    if path.is_dir() and stages == "both" and not trained:
        raise UserError(f"pretrained {path} is a run of fft that has not trained its image encoder yet")
    given = options["options"]["model"]
    return TrainedRun(
        path,
        given["model"],
        given["pretrained"],
        options["options"]["run"]["seed"],
        options.get("model"),
        weights,
        trained,
        None if weights is None else _rows(weights, CLASSIFIER),
    )


def read_classifier(path: Path) -> Tensor:
    """The classifier (K, D) of a run of fft, as it was trained: its rows are not normalised.

    path: the run's folder or its file of weights. Raises UserError where there is none.
    """
    wanted = f"text_features classifier:{path} must be a run of fft or its rada-ft-model.safetensors"
    weights = path
    if path.is_dir():
        found = next((path / name for name in WEIGHTS_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{wanted}; the folder holds no trained classifier")
        weights = found
    elif not path.is_file():
        raise UserError(f"{wanted}; it does not exist")
    classifier = (_tensors(weights, CLASSIFIER) if _names(weights) is not None else {}).get(CLASSIFIER)
    if classifier is None or classifier.ndim != 2 or not classifier.is_floating_point():
        raise UserError(f"{wanted}; it holds no matrix {CLASSIFIER}")
    if not bool(torch.isfinite(classifier).all()):
        raise UserError(f"text_features classifier:{path} holds NaN or infinity")
    return classifier.float()


def _names(path: Path) -> frozenset[str] | None:
    """The tensors of a safetensors file, none of them read; None where it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError):
        return None


def _rows(path: Path, name: str) -> int | None:
    """The first dimension of a tensor in a safetensors file, which is not read; None where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return next(iter(file.get_slice(name).get_shape()), None)
    except (SafetensorError, OSError):
        return None


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"pretrained {path} cannot be read: {error}") from None


def _options_of(path: Path, record: Path) -> dict[str, Any]:
    """What a run's folder says of it."""
    try:
        with record.open("rb") as file:
            content = json.loads(file.read(MOST_RUN_BYTES))["identity"]
        given, run = content["options"]["model"], content["options"]["run"]
        sound = isinstance(given["model"], str) and isinstance(given["pretrained"], str | None) and run["seed"] >= 0
        if not sound:
            raise ValueError("its options are of other kinds")
    except FileNotFoundError:
        raise UserError(
            f"pretrained {path} must be a run of rada-fast, a weights file or a tag; it has no {RUN_FILE} beside it, "
            "which says what model the run started from"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"pretrained {path}: {record} is damaged: {error or type(error).__name__}") from None
    return dict(content)
