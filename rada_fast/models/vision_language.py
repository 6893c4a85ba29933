"""Vision-language models: any of open_clip's, or the embedded one, frozen, behind one small interface."""

from __future__ import annotations

import difflib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

EMBEDDED = "embedded"
RANDOM = "random"
_QUICK_GELU_HINTS = ("openai", "metaclip", "dfn")
"""Parts of a weights file's path that say it was trained with QuickGELU, as every such tag of open_clip was."""


class VisionLanguageModel:
    """A frozen image and text encoder pair.

    name, pretrained: what was loaded; model: the open_clip module; tokenizer: texts to token ids; preprocess: how the
    image encoder wants its images; embed_dim: D; device, precision: where and how the encoders compute;
    fingerprint: hash of name and weights as loaded.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Preprocess,
        *,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.fingerprint = _fingerprint(name, model)
        model.requires_grad_(False).eval().to(device)
        self.model = cast(Any, model)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.device = device
        self.precision: Precision = precision
        with torch.no_grad():
            # Asked of the model itself: no table of widths can fall behind open_clip.
            probe = self.model.encode_text(tokenizer(["a"]).to(device))
        self.embed_dim = int(probe.shape[-1])

    @property
    def logit_scale(self) -> float:
        """The multiplier s = exp(model.logit_scale)."""
        return float(self.model.logit_scale.detach().exp())

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self.precision == "float32":
            yield
            return
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
            yield

    def image_features_with_grad(self, images: Tensor) -> Tensor:
        """Unit-norm features (N, D) float32 of images (N, 3, S, S), with gradients to an encoder that asks for them."""
        with self._arithmetic():
            features = self.model.encode_image(images.to(self.device))
        return normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit-norm features (N, D) float32 of normalised images (N, 3, S, S) float32."""
        return self.image_features_with_grad(images)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm features (N, D) float32."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        with self._arithmetic():
            features = self.model.encode_text(tokens)
        return normalize(features.float(), dim=-1)


def _fingerprint(name: str, model: nn.Module) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_model(
    name: str,
    pretrained: str | None = None,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    seed: int = 0,
) -> VisionLanguageModel:
    """Load a frozen model.

    name: "embedded", or a model of open_clip; pretrained: a hub tag, a local weights file (never executed: safetensors,
    or a torch file of plain tensors), or "random"; seed: of random weights.

    Raises UserError where the name is unknown, weights are not named, cannot be had, or do not fit the model.
    """
    device = torch.device(device)
    if name == EMBEDDED:
        if pretrained is not None:
            raise UserError(f"pretrained must be left out for the embedded model, got {pretrained!r}")
        return _load_embedded(device, precision)

    import open_clip

    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
        raise UserError(f"model {name!r} is not one of open_clip's; close: {', '.join(close) or 'none'}, or embedded")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise UserError(
            f"model {name} needs --pretrained: a tag ({', '.join(tags[:6]) or 'it has none'}), a weights file, "
            f'or "{RANDOM}" to try the machinery without weights'
        )
    if pretrained != RANDOM and pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise UserError(
            f"pretrained {pretrained!r} is neither a file nor a tag of {name} ({', '.join(tags) or 'it has none'})"
        )
    model = _create(name, pretrained, seed)
    config = model.visual.preprocess_cfg
    size = config["size"]
    preprocess = Preprocess(
        size if isinstance(size, int) else int(size[0]),
        tuple(config["mean"]),
        tuple(config["std"]),
        "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )
    return VisionLanguageModel(
        name, pretrained, model, open_clip.get_tokenizer(name), preprocess, device=device, precision=precision
    )


def _create(name: str, pretrained: str, seed: int) -> Any:
    """open_clip's model with weights; its own complaints become one line each."""
    import open_clip

    if pretrained == RANDOM:
        with _quiet_log(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return open_clip.create_model(name, pretrained_text=False)
    path = Path(pretrained).expanduser()
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(name)
    if not is_tag:
        _warn_of_quick_gelu(name, path)
    try:
        with _quiet_log():
            return open_clip.create_model(name, pretrained=pretrained if is_tag else str(path), weights_only=True)
    except Exception as error:  # a damaged or hostile file, or a hub out of reach, can fail in any way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if is_tag:
            raise UserError(
                f"pretrained {pretrained!r} of {name} could not be downloaded; fetch it where there is a network and "
                f"give the file instead ({reason})"
            ) from None
        raise UserError(f"pretrained file {path} does not load into {name} without executing code: {reason}") from None


def _warn_of_quick_gelu(name: str, path: Path) -> None:
    """Warn where a file's name says it was trained with the other activation than the model has.

    For tags open_clip compares the activations itself and warns.
    """
    import open_clip

    config = open_clip.get_model_config(name) or {}
    has = bool(config.get("quick_gelu", False))
    wants = any(hint in str(path).lower() for hint in _QUICK_GELU_HINTS)
    twin = name.removesuffix("-quickgelu") if has else f"{name}-quickgelu"
    if wants and not has and twin in open_clip.list_models():
        warnings.warn(
            f"QuickGELU mismatch: {path.name} looks like weights trained with QuickGELU, the model {name} has GELU, "
            f"which quietly costs accuracy; use {twin}",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep open_clip's log lines off the terminal: what matters in them becomes an error or a warning of ours."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


def _load_embedded(device: torch.device, precision: Precision) -> VisionLanguageModel:
    from rada_fast.embedded import model as embedded
    from rada_fast.embedded.world import IMAGE_SIZE

    model, tokenizer = embedded.load()
    preprocess = Preprocess(IMAGE_SIZE, embedded.MEAN, embedded.STD)
    return VisionLanguageModel(EMBEDDED, None, model, tokenizer, preprocess, device=device, precision=precision)
