"""The classifier that replaces the text encoder in full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1, App. C)."""

from __future__ import annotations

from torch import Tensor, nn

from rada_fast.config.method import MaskPenalty
from rada_fast.modules.rational_adapter import RationalAdapter


class RationalClassifier(nn.Module):
    """A classifier whose weight starts as the text features, followed by a rational adapter; both are trained.

    The weight replaces the text features in the rational matrix, R[b, k] = f[b] * weight[k] with f the image features.
    It is not normalised again during training.

    text_features: (K, D), unit norm; adapter: the adapter to train; logit_scale: the multiplier s, which stays fixed.
    """

    def __init__(self, text_features: Tensor, adapter: RationalAdapter, logit_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(text_features.detach().clone())
        self.adapter = adapter
        self.logit_scale = logit_scale

    def forward(self, image_features: Tensor, penalty: MaskPenalty) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the mask penalty (). image_features: (B, D), unit norm."""
        return self.adapter(image_features, self.weight, self.logit_scale, penalty=penalty)
