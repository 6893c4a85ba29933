"""The classifier that replaces the text encoder in full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1, App. C)."""

from __future__ import annotations

from torch import Tensor, nn

from rada_fast.config.method import MaskPenalty
from rada_fast.modules.heads import Head


class Classifier(nn.Module):
    """A classifier whose weight starts as the text features, and the head behind it; both are trained.

    The weight takes the place of the text features: with the rational adapter as its head, R[b, k] = f[b] * weight[k]
    with f the image features. It is not normalised again during training.

    text_features: (K, D), unit norm; head: the rational adapter or the head of another method; logit_scale: the
    multiplier s, which stays fixed.
    """

    def __init__(self, text_features: Tensor, head: Head, logit_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(text_features.detach().clone())
        self.head = head
        self.logit_scale = logit_scale

    def forward(self, image_features: Tensor, penalty: MaskPenalty) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the mask penalty (). image_features: (B, D), unit norm."""
        return self.head(image_features, self.weight, self.logit_scale, penalty)
