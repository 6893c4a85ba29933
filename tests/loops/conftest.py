"""Provide a model of a few hundred weights and pictures of a few pixels for tests that run a loop many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rada_fast.data.views import Preprocess
from rada_fast.models import vision_language
from rada_fast.models.vision_language import VisionLanguageModel

SIZE, WIDTH = 8, 16


class TinyCLIP(nn.Module):
    """TinyCLIP has a linear image encoder with dropout, and a text encoder that sums letters."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, WIDTH), nn.Dropout(0.2))
        self.letters = nn.Embedding(128, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.letters(tokens).sum(dim=1)
        return features


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(letter) % 128 for letter in text[:40].ljust(40)] for text in texts])


def load_tiny(*args: Any, **kwargs: Any) -> VisionLanguageModel:
    """Return the tiny model, whatever the arguments of load_model ask for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyCLIP()
    preprocess = Preprocess(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    device = torch.device("cpu")
    return VisionLanguageModel("tiny", None, model, tokenize, preprocess, device=device, precision="float32")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run load the tiny model, whatever its options ask for."""
    monkeypatch.setattr(vision_language, "load_model", load_tiny)


@pytest.fixture
def specks(tmp_path: Path) -> Path:
    """Write two pictures of noise into each of two class folders."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "specks" / name
        folder.mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "specks"
