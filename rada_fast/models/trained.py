"""The reading of the image encoder and the classifier that a run of fft has trained.

--pretrained PATH uses the encoder, and --text-features classifier:PATH uses the classifier in place of T. PATH is the
folder of the run or its rada-ft-model.safetensors. No code in these files is executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rada_fast.config.methods import FFT_METHODS, FFT_STAGES
from rada_fast.errors import UserError

RUN_FILE = "run.json"
"""The file with the command and the options of a run."""
WEIGHTS_FILES = tuple(f"{stage}-model.safetensors" for stage in reversed(FFT_STAGES))
"""The files in which fft stores classifier and encoder. The last stage of a method comes first."""
CLASSIFIER, VISUAL, TEXT = "classifier.weight", "visual.", "text_encoder."
"""The name of the classifier in such a file, and how the names of the tensors of the two encoders begin."""
MAX_RUN_FILE_BYTES = 2**29
"""The largest run.json that is read. It has an entry for every picture."""
MAX_CHAINED_RUNS = 16
"""The largest number of runs that may have started from one another."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished run whose weights another run uses.

    path: the path that the user gave.
    model, pretrained, seed: the options with which the run started.
    fingerprint: the fingerprint of the model with which the run started, or None.
    weights: the file of the last stage of fft, or None.
    trained_encoder: whether this file holds an image encoder. A run with frozen encoders does not write one.
    trained_text: whether it holds a text encoder too.
    num_classes: the number of rows of the classifier in this file, or None.
    """

    path: Path
    model: str
    pretrained: str | None
    seed: int
    fingerprint: str | None
    weights: Path | None
    trained_encoder: bool
    trained_text: bool
    num_classes: int | None

    def put_encoder_into(self, model: nn.Module) -> None:
        """Load the trained image encoder, and a trained text encoder, into a model.

        Raises UserError if they do not fit.
        """
        assert self.weights is not None
        visual, text = _tensors(self.weights, VISUAL), _tensors(self.weights, TEXT)
        for name, tensor in (visual | text).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(f"pretrained {self.weights}: {name} holds NaN or infinity")
        of_text = {name.removeprefix(TEXT): tensor for name, tensor in text.items()}
        try:
            if text and of_text.keys() != (own := text_state(model)).keys():
                name = min(of_text.keys() ^ own.keys())
                raise RuntimeError(f"{TEXT}{name} is {'unexpected' if name in of_text else 'missing'}")
            model.visual.load_state_dict(  # type: ignore[union-attr]
                {name.removeprefix(VISUAL): tensor for name, tensor in visual.items()}
            )
            model.load_state_dict(of_text, strict=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"pretrained {self.weights} does not fit the model {self.model}: {reason}") from None


def open_run(path: Path) -> TrainedRun | None:
    """Open the run that a folder or a file of weights belongs to. Returns None if the file belongs to no run.

    Raises UserError if the run cannot be used.
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
    method = FFT_METHODS.get(options["options"].get("method"))
    first_only = options["options"].get("stages") == "first"
    trains = method is not None and any(stage.trains != "head" for stage in method.stages) and not first_only
    names = frozenset() if weights is None else _names(weights) or frozenset()
    trained = any(name.startswith(VISUAL) for name in names)
    if path.is_dir() and options.get("command") == "fft" and trains and not trained:
        raise UserError(f"pretrained {path} is a run of fft that has not trained its image encoder yet")
    model_options = options["options"]["model"]
    return TrainedRun(
        path,
        model_options["model"],
        model_options["pretrained"],
        options["options"]["run"]["seed"],
        options.get("model"),
        weights,
        trained,
        any(name.startswith(TEXT) for name in names),
        None if weights is None else _rows(weights, CLASSIFIER),
    )


def text_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of everything in a model but its image encoder and the scale and the bias of the logits."""
    # A part that a model has under several names is returned once, because safetensors stores no memory twice.
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    left_out = ("logit_scale", "logit_bias")
    stored = model.state_dict().keys()
    return {
        name: tensor.detach()
        for name, tensor in named.items()
        if name in stored and not name.startswith(VISUAL) and name not in left_out
    }


def read_classifier(path: Path) -> Tensor:
    """Read the classifier (K, D) of a run of fft. Its rows are not normalised.

    path: the folder of the run or its file of weights. Raises UserError if there is no classifier.
    """
    expected = f"text_features classifier:{path} must be a run of fft or its rada-ft-model.safetensors"
    weights = path
    if path.is_dir():
        found = next((path / name for name in WEIGHTS_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{expected}; the folder holds no trained classifier")
        weights = found
    elif not path.is_file():
        raise UserError(f"{expected}; it does not exist")
    classifier = (_tensors(weights, CLASSIFIER) if _names(weights) is not None else {}).get(CLASSIFIER)
    if classifier is None or classifier.ndim != 2 or not classifier.is_floating_point():
        raise UserError(f"{expected}; it holds no matrix {CLASSIFIER}")
    if not bool(torch.isfinite(classifier).all()):
        raise UserError(f"text_features classifier:{path} holds NaN or infinity")
    return classifier.float()


def _names(path: Path) -> frozenset[str] | None:
    """Return the names of the tensors in a safetensors file, or None if it is not such a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError):
        return None


def _rows(path: Path, name: str) -> int | None:
    """Return the first dimension of a tensor in a safetensors file, or None if the file has no such tensor."""
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
    """Read the identity of a run from its run.json. path: what the user gave, for messages; record: the run.json."""
    try:
        with record.open("rb") as file:
            content = json.loads(file.read(MAX_RUN_FILE_BYTES))["identity"]
        model, run = content["options"]["model"], content["options"]["run"]
        sound = isinstance(model["model"], str) and isinstance(model["pretrained"], str | None) and run["seed"] >= 0
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
