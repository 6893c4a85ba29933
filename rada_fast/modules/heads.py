"""The heads of the methods that RAda is compared with: like the rational adapter, each turns features into logits.

A head is called with unit-norm image features (B, D), text features or the rows of a classifier (K, D) and the
multiplier s, and returns logits (B, K), or with a kind of mask penalty logits and penalty. Every head starts with the
zero-shot logits s f Tᵀ or close to them.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from rada_fast.config.method import MaskPenalty
from rada_fast.config.methods import HeadName
from rada_fast.modules.projections import ZeroLinear
from rada_fast.modules.rational_adapter import RationalAdapter
from rada_fast.reference.masked_logits import mask_penalty


class ZeroShotHead(nn.Module):
    """The zero-shot head of CLIP, logits = s f Tᵀ, which has no parameters.

    Linear probing, FT, L2-SP, LP-FT and FLYP use it with a trained classifier or encoder, and CoOp and prompt and
    adapter tuning with features that change during the training.
    """

    config: None = None
    """The rational adapter's attribute of this name, which no other head has."""

    @overload
    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor: ...
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, penalty: MaskPenalty
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        penalty: MaskPenalty | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (B, K), or with a penalty kind the logits and the penalty. The arguments are the module's.

        Without a mask the penalty is zero.
        """
        image, text, value = self.adapt(image_features, text_features, logit_scale, penalty)
        logits = logit_scale * image @ text.T
        return logits if penalty is None else (logits, value)

    def adapt(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, penalty: MaskPenalty | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the adapted features of images (B, D) and classes (K, D), and the mask penalty ()."""
        return image, text, image.new_zeros(())


class ClipAdapterHead(ZeroShotHead):
    """CLIP-Adapter (Gao et al., IJCV 2024): a bottleneck changes the image feature, and a share of it is mixed in.

        f'     = normalize(ratio * relu(W2 relu(W1 f)) + (1 - ratio) * f)
        logits = s f' Tᵀ

    W1 is (D / 4, D), W2 is (D, D / 4), and there are no biases. The published code applies this to features before
    they are brought to unit norm. The result is the same, because both layers scale with their input. The text's
    adapter of the paper is left out, as it is in the published code for image classification.

    embed_dim: D; ratio: the share of the adapted feature (published: 0.2).
    """

    def __init__(self, embed_dim: int, ratio: float = 0.2) -> None:
        super().__init__()
        self.ratio = ratio
        self.down = nn.Linear(embed_dim, max(1, embed_dim // 4), bias=False)
        self.up = nn.Linear(max(1, embed_dim // 4), embed_dim, bias=False)

    def adapt(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, penalty: MaskPenalty | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the adapted image features, the text features as they are, and no penalty."""
        mixed = self.ratio * relu(self.up(relu(self.down(image)))) + (1 - self.ratio) * image
        return normalize(mixed, dim=-1), text, image.new_zeros(())


class FeatureAttention(nn.Module):
    """Attention among the features of one modality that learns a mask over them (RAda, Table 4, rows (a) and (b)).

        M   = 1 + Wo attention(q = Wq x, k = Wk x, v = Wv x)
        x'  = M * x

    The rows of the text features attend to one another, as the classes of the rational matrix do. An image has a
    single feature, which attends to itself, so that its mask is 1 + Wo Wv f. Wo starts at zero.

    embed_dim: D; num_heads: the heads of the attention; alone: whether each row attends to itself alone.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, alone: bool) -> None:
        super().__init__()
        self.num_heads, self.alone = num_heads, alone
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        if not alone:
            self.q_proj, self.k_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.out_proj = ZeroLinear(embed_dim, embed_dim)

    def forward(self, rows: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Return the mask (N, D) of rows (N, D), whose projections see them times the square root of s."""
        scaled = rows * (logit_scale.sqrt() if isinstance(logit_scale, Tensor) else math.sqrt(logit_scale))
        values = self.v_proj(scaled)
        if not self.alone:
            queries, keys, by_head = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
                for part in (self.q_proj(scaled), self.k_proj(scaled), values)
            )
            attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, by_head)  # (H, N, d)
            values = attended.transpose(0, 1).flatten(1)
        mask: Tensor = 1 + self.out_proj(values)
        return mask


class AttentionHead(ZeroShotHead):
    """Masks of the image features, of the text features, or of both, learned in isolation (RAda, Table 4).

    With masks M of FeatureAttention, logits = s (M_f * f) (M_T * T)ᵀ. The penalty is that of RAda (Eq. 7), on the
    masks in place of the mask over the rational matrix; for both masks it is their sum.

    embed_dim: D; num_heads: the heads of the attention among classes; modalities: "image", "text" or both.
    """

    def __init__(self, embed_dim: int, num_heads: int, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.image = FeatureAttention(embed_dim, num_heads, alone=True) if "image" in modalities else None
        self.text = FeatureAttention(embed_dim, num_heads, alone=False) if "text" in modalities else None

    def adapt(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, penalty: MaskPenalty | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masked features and the penalty of the masks."""
        value = image.new_zeros(())
        if self.image is not None:
            mask = self.image(image, logit_scale)
            image, value = mask * image, value if penalty is None else value + mask_penalty(mask, penalty)
        if self.text is not None:
            mask = self.text(text, logit_scale)
            # The mask of the classes is one mask, whatever the number of images.
            text, value = mask * text, value if penalty is None else value + mask_penalty(mask[None], penalty)
        return image, text, value


Head = RationalAdapter | ZeroShotHead


def new_head(name: HeadName, adapter: RationalAdapter, *, seed: int, ratio: float = 0.2) -> Head:
    """Make the head of a method. Its random weights depend on the seed alone, and all random states stay as they are.

    name: the name of the head.
    adapter: the rational adapter that "rational" returns; the other heads take its width and its number of heads.
    seed: the seed of the other heads' weights.
    ratio: see ClipAdapterHead.
    """
    if name == "rational":
        return adapter
    width, heads = adapter.config.embed_dim, adapter.config.num_heads
    modalities = {"attend-text": ("text",), "attend-image": ("image",), "attend-both": ("image", "text")}
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
        torch.default_generator.manual_seed(seed)
        if name == "clip-adapter":
            return ClipAdapterHead(width, ratio)
        return ZeroShotHead() if name == "zero-shot" else AttentionHead(width, heads, modalities[name])
