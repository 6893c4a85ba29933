"""What is trained inside frozen encoders: words of the prompt, tokens in front of every block, and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rada_fast.models.prompts import Prompts
from rada_fast.models.vision_language import VisionLanguageModel


class Captions(NamedTuple):
    """The tokens of all prompts of K classes, those of a class side by side.

    tokens: (P, L) for P prompts in all; starts: (K,), the first prompt of each class; counts: (K,), their numbers.
    """

    tokens: Tensor
    starts: Tensor
    counts: Tensor

    def drawn(self, labels: Tensor) -> Tensor:
        """Draw one prompt of the class of each label (B,), with PyTorch's random numbers. Returns (B, L)."""
        counts = self.counts[labels]
        return self.tokens[self.starts[labels] + (torch.rand(len(labels)) * counts).long().clamp(max=counts - 1)]


def captions_of(vlm: VisionLanguageModel, names: Sequence[str], prompts: Prompts) -> Captions:
    """Return the captions of classes on the CPU."""
    texts = [prompts.of(name) for name in names]
    counts = torch.tensor([len(own) for own in texts])
    tokens = vlm.tokenizer([text for own in texts for text in own])
    return Captions(tokens, counts.cumsum(0) - counts, counts)
