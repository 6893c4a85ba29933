"""What a vision-language model must have so that every command can use it, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rada_fast.data.views import Preprocess

Tokenizer = Callable[[list[str]], Tensor]
"""A function from N texts to token ids (N, L) int64, all of one length L, with padding at the end."""


class DualEncoder(Protocol):
    """An nn.Module that encodes images and texts to features of one width D.

    open_clip's models have these attributes; the models of other libraries are wrapped so that they have them too.

    visual: the image encoder, a module of its own. `fft` trains, stores and loads its parameters.
    logit_scale: the logarithm of the multiplier s, a tensor with one element.

    A module may have the attribute logit_bias, a tensor with one element or None, as SigLIP's models have. It is added
    to all logits of a sigmoid loss. A softmax over the classes is the same with and without it.
    """

    visual: nn.Module
    logit_scale: Tensor

    def encode_image(self, image: Tensor, /) -> Tensor:
        """Encode images (N, 3, S, S), prepared as the model's Preprocess says, to features (N, D) of any length."""

    def encode_text(self, text: Tensor, /) -> Tensor:
        """Encode token ids (N, L) of the model's Tokenizer to features (N, D) of any length."""


class ModelParts(NamedTuple):
    """A model as a library or a file provides it.

    module: a DualEncoder with its weights, in float32 on the CPU.
    tokenizer: its tokenizer.
    preprocess: the form in which it expects images.
    identity: a text of everything beside the weights that decides the features, such as the name of the architecture.
    """

    module: nn.Module
    tokenizer: Tokenizer
    preprocess: Preprocess
    identity: str


class Tower(NamedTuple):
    """The residual blocks of one of the two transformers of a model, for methods that put something between them.

    blocks: the blocks in their order. The first argument of each is the tokens (N, L, W), and it returns the tokens, or
        a tuple that begins with them.
    width: the width W of the tokens.
    """

    blocks: tuple[nn.Module, ...]
    width: int


_IMAGE_BLOCKS = ("visual.transformer.resblocks", "visual.trunk.blocks", "visual.encoder.encoder.layers")
_TEXT_BLOCKS = (
    "transformer.resblocks",
    "text.transformer.resblocks",
    "text.encoder.encoder.layers",
    "text.encoder.encoder.layer",
)
"""Where the blocks are in the models of open_clip, in those of timm, and in the wrapped ones of transformers."""


def image_tower(module: nn.Module) -> Tower | None:
    """Return the blocks of the image encoder, or None if it is not a transformer, such as a ResNet."""
    return _tower(module, _IMAGE_BLOCKS)


def text_tower(module: nn.Module) -> Tower | None:
    """Return the blocks of the text encoder, or None if it is not a transformer."""
    return _tower(module, _TEXT_BLOCKS)


def _tower(module: nn.Module, places: tuple[str, ...]) -> Tower | None:
    for place in places:
        found: Any = module
        for name in place.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
            continue
        norms = [part for part in found[0].modules() if isinstance(part, nn.LayerNorm)]
        if norms:  # the blocks of a convolutional encoder have none
            return Tower(tuple(found), int(norms[0].normalized_shape[-1]))
    return None
