"""Models of the library transformers, an optional dependency, from a folder on this machine: CLIP, SigLIP and ALIGN.

The folder holds what the library's save_pretrained writes, or a download from a hub: config.json, the weights, the
tokenizer's files, and preprocessor_config.json. Nothing is downloaded, and no code in the folder is executed.
"""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models.descriptions import read_json
from rada_fast.models.protocol import ModelParts, image_tower
from rada_fast.models.weights import one_line, quiet_log

CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "align": "AlignModel"}
"""The classes of transformers for the model_type in config.json. SigLIP 2's models of fixed size are SigLIP's class."""
INSTALL = "pip install 'rada_fast[transformers]'"
ALIGN_TOKENS = 64
"""The number of tokens with which ALIGN was trained. Its text encoder would take more."""
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip


def parts_of_folder(name: str, folder: Path) -> ModelParts:
    """Make the model in a folder.

    name: the model as the option names it; folder: its folder.

    Raises UserError if the library is missing, the folder holds another kind of model, or a file is missing or damaged.
    """
    config = read_json(name, folder / "config.json")
    kind = config.get("model_type")
    if kind not in CLASSES:
        close = difflib.get_close_matches(str(kind), CLASSES, n=1, cutoff=0.3)
        advice = f"; close: {close[0]}" if close else ""
        raise UserError(f"model {name} must be of the model_type {', '.join(CLASSES)}, got {kind!r}{advice}")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"model {name} needs the library transformers ({INSTALL}): {one_line(error)}") from None
    preprocess = read_preprocess(name, folder)
    model = _model(name, folder, getattr(transformers, CLASSES[kind]))
    sizes = model.config.vision_config
    if preprocess.image_size != sizes.image_size and kind != "align":  # a convolutional encoder takes every size
        raise UserError(
            f"model {name}: its images have {preprocess.image_size} pixels a side in preprocessor_config.json, and "
            f"{sizes.image_size} in config.json"
        )
    length = ALIGN_TOKENS if kind == "align" else model.config.text_config.max_position_embeddings
    try:
        with _quiet():
            # Without trust_remote_code, a tokenizer that is code in the folder is refused.
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            found = FolderTokenizer(tokenizer, min(length, model.config.text_config.max_position_embeddings))
            found(["a"])
    except Exception as error:  # damaged files may raise anything
        raise UserError(f"model {name}: its tokenizer cannot be made: {one_line(error)}") from None
    digest = hashlib.sha256()
    for file in ("config.json", *TOKENIZER_FILES):
        if (folder / file).is_file():
            digest.update(f"{file} {hashlib.sha256((folder / file).read_bytes()).hexdigest()}\n".encode())
    return ModelParts(TransformersModel(model), found, preprocess, f"transformers {digest.hexdigest()}")


def _model(name: str, folder: Path, kind: Any) -> Any:
    """Read a model of the library in float32, from safetensors if there are some."""
    safe = any((folder / file).is_file() for file in SAFETENSORS)
    if not safe and not any((folder / file).is_file() for file in TORCH_FILES):
        raise UserError(f"model {name}: the folder has no weights, such as {SAFETENSORS[0]} or {TORCH_FILES[0]}")
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            # The implementation of the attention is named here, because config.json could name one from a network.
            model, found = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=safe, weights_only=True, output_loading_info=True,
                dtype=torch.float32, attn_implementation="sdpa" if getattr(kind, "_supports_sdpa", False) else "eager",
            )  # fmt: skip
    except Exception as error:  # damaged files may raise anything
        reason = one_line(error)
        if "weights_only" in reason or "Weights only" in reason:
            reason = "its weights do not load without executing code: they are damaged, or more than plain tensors"
        raise UserError(f"model {name} cannot be read: {reason}") from None
    if missing := sorted(found["missing_keys"]):
        # The library would leave these at random.
        raise UserError(f"model {name}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's progress bars, warnings and log lines. What matters in them becomes an error here."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_log(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_preprocess(name: str, folder: Path) -> Preprocess:
    """Read in which form a model in a folder expects images.

    Raises UserError if the description is missing, or asks for what a Preprocess cannot say.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file() or not (folder / "processor_config.json").is_file():
        found = read_json(name, file)
    else:  # newer versions of the library write one file for the tokenizer and the images
        file = folder / "processor_config.json"
        found = read_json(name, file).get("image_processor") or {}
    try:
        return _preprocess_of(found)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(
            f"model {name}: {file} is not the description of a preprocessing that is known: {reason}"
        ) from None


def _preprocess_of(found: dict[str, Any]) -> Preprocess:
    """Translate the library's description: resize, crop the centre, x factor, minus 1 if offset, normalise."""
    if not found.get("do_resize", True) or not found.get("do_rescale", True):
        raise ValueError("it does not resize or rescale images")
    resize: Literal["shortest", "squash"] = "shortest"
    size = found["size"]
    if isinstance(size, dict) and "shortest_edge" not in size:
        resize, size = "squash", _side(size)
    elif isinstance(size, dict):
        size = size["shortest_edge"]
    cut = _side(found["crop_size"]) if found.get("do_center_crop", resize == "shortest") else int(size)
    if resize == "shortest" and not found.get("do_center_crop", True):
        raise ValueError("it resizes the shorter side and does not cut out the centre")
    if not 0 < cut <= int(size):
        raise ValueError(f"the centre of {cut} pixels is not inside {size}")
    filters: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
    if found.get("resample", 3) not in filters:
        raise ValueError(f"resample must be 2 (bilinear) or 3 (bicubic), got {found['resample']!r}")
    factor, offset = 255 * found.get("rescale_factor", 1 / 255), float(bool(found.get("rescale_offset", False)))
    normalises = found.get("do_normalize", True)
    mean = [float(value) for value in found["image_mean"]] if normalises else [0.0] * 3
    std = [float(value) for value in found["image_std"]] if normalises else [1.0] * 3
    if found.get("include_top", False):  # EfficientNet for classification divides twice
        std = [value * float(second) for value, second in zip(std, found["image_std"], strict=True)]
    # ((x factor - offset) - mean) / std for x in 0..1 is (x - (mean + offset) / factor) / (std / factor).
    means = tuple(round((value + offset) / factor, 9) for value in mean)
    stds = tuple(round(value / factor, 9) for value in std)
    if len(means) != 3 or len(stds) != 3 or not all(value > 0 for value in stds):
        raise ValueError("image_mean and image_std must have three values each")
    triple = tuple[float, float, float]
    return Preprocess(
        cut, cast(triple, means), cast(triple, stds), filters[found.get("resample", 3)], resize,
        resized=None if cut == int(size) else int(size),
    )  # fmt: skip


def _side(size: Any) -> int:
    """Return the side of a square, which the library writes as a number or as height and width."""
    if isinstance(size, dict):
        if size["height"] != size["width"]:
            raise ValueError(f"images must be square, got {size['height']} x {size['width']}")
        size = size["height"]
    return int(size)


class ImageTower(nn.Module):
    """The image encoder of a model of transformers, with the projection after it.

    encoder: the library's module; projection: the linear layer to the common width, or an Identity.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, S, S) to features (N, D)."""
        features: Tensor = self.projection(self.encoder(pixel_values=images).pooler_output)
        return features


class CheckpointedImageTower(ImageTower):
    """An image encoder whose blocks can be computed anew in the backward pass, which saves memory."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Begin or end the recomputation of the blocks."""
        module: Any
        for module in self.encoder.modules():
            if hasattr(module, "gradient_checkpointing"):
                # The library's own switch belongs to whole models, and this is a part of one.
                module.gradient_checkpointing = enable
                module._gradient_checkpointing_func = _recomputed


def _recomputed(function: Any, *arguments: Any, **options: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, **options)


class TextTower(nn.Module):
    """The text encoder of a model of transformers, with the projection after it.

    encoder: the library's module; projection: the linear layer to the common width, or an Identity.
    padding: the id of tokens that the encoder must not look at, or None if it looks at all of them.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module, padding: int | None) -> None:
        super().__init__()
        self.encoder, self.projection, self.padding = encoder, projection, padding

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode token ids (N, L) to features (N, D)."""
        if self.padding is None:
            pooled = self.encoder(input_ids=tokens).pooler_output
        else:  # ALIGN takes the first token without BERT's pooling layer
            pooled = self.encoder(input_ids=tokens, attention_mask=(tokens != self.padding).long()).last_hidden_state[
                :, 0
            ]
        features: Tensor = self.projection(pooled)
        return features


class TransformersModel(nn.Module):
    """A model of transformers as a DualEncoder.

    model: a CLIPModel, SiglipModel or AlignModel.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        kind = model.config.model_type
        identity = nn.Identity()
        # ALIGN has no projection of images, and SigLIP none at all.
        image = ImageTower(model.vision_model, getattr(model, "visual_projection", identity))
        if image_tower(nn.ModuleDict({"visual": image})) is not None:
            image = CheckpointedImageTower(image.encoder, image.projection)
        self.visual = image
        padding = model.config.text_config.pad_token_id if kind == "align" else None
        self.text = TextTower(model.text_model, getattr(model, "text_projection", identity), padding)
        # ALIGN divides by a temperature.
        scale = -model.temperature.detach().log() if kind == "align" else model.logit_scale.detach()
        self.logit_scale = nn.Parameter(scale.clone())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images (N, 3, S, S) to features (N, D)."""
        features: Tensor = self.visual(image)
        return features

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode token ids (N, L) to features (N, D)."""
        features: Tensor = self.text(text)
        return features


class FolderTokenizer:
    """The tokenizer in a folder, called as open_clip's are.

    tokenizer: the library's tokenizer; length: the number L of tokens of a text.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, texts: list[str]) -> Tensor:
        """Return the token ids (N, L) int64; a longer text loses its end."""
        rows = self._tokenizer(texts, padding="max_length", truncation=True, max_length=self._length)["input_ids"]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self._length)
