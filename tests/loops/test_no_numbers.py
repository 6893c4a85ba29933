"""Features that are NaN are reported with the image or text that they belong to and the type that gave them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.models import vision_language
from rada_fast.models.image_features import Features
from rada_fast.models.vision_language import VisionLanguageModel

from .conftest import load_tiny
from .support import eft_options, fft_options, ttt_options


class Overflowing(nn.Module):
    """Overflowing returns NaN after so many images, like an encoder whose activations leave float16's range."""

    def __init__(self, encoder: nn.Module, after: int) -> None:
        super().__init__()
        self.encoder, self.remaining = encoder, after

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images)
        spoilt = torch.arange(len(features)) >= self.remaining
        self.remaining = max(0, self.remaining - len(features))
        return torch.where(spoilt[:, None], torch.inf * features, features)


@pytest.fixture
def overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets the model of every run overflow after a number of images in a precision."""
    # The cache knows a model by its weights, which another test's model shares: do not read that model's features.
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path / "cache"))

    def apply(precision: str, after: int, *, texts: bool = False) -> None:
        def load(*args: Any, **kwargs: Any) -> VisionLanguageModel:
            vlm = load_tiny()
            vlm.precision = precision  # type: ignore[assignment]
            if texts:
                vlm.model.letters.weight[ord("d")] = torch.nan
            else:
                vlm.model.visual = Overflowing(vlm.model.visual, after)
            # Only the name of the precision matters here, whatever this machine can compute with.
            monkeypatch.setattr(VisionLanguageModel, "_arithmetic", lambda self: torch.autograd.set_grad_enabled(True))
            return vlm

        monkeypatch.setattr(vision_language, "load_model", load)

    return apply


def runs(specks: Path, output: Path) -> dict[str, Any]:
    eft = partial(eft_options, specks, specks, output, epochs=1, protocol="all")
    return {
        "ttt": lambda: run_ttt(ttt_options(specks, output, views=4)),
        "eft": lambda: run_eft(eft()),
        "eft-crops": lambda: run_eft(eft(train_views="crop")),
        "fft": lambda: run_fft(fft_options(specks, specks, output, batch_size=512)),
    }


@pytest.mark.parametrize("command", ["ttt", "eft", "eft-crops", "fft"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_an_image_is_named_with_its_precision(
    specks: Path, tmp_path: Path, overflow: Any, command: str, precision: str
) -> None:
    # ttt encodes four views of an image at once, so that its second image is the first with NaN.
    overflow(precision, 4 if command == "ttt" else 1)
    image = "'cat/1.png'" if command in ("ttt", "eft") else r"'\w+/\d.png'"
    advice = {
        "float16": "give --precision float32 or bfloat16",
        "bfloat16": "give --precision float32",
        "float32": "the weights tiny are damaged, or do not fit",
    }[precision]
    message = rf"^features of image {image} are NaN in {precision}, and \d of \d encoded with it: {advice}$"
    with pytest.raises(UserError, match=message):
        runs(specks, tmp_path / "out")[command]()


@pytest.mark.parametrize("command", ["ttt", "eft", "fft"])
def test_a_text_is_named_with_its_precision(specks: Path, tmp_path: Path, overflow: Any, command: str) -> None:
    overflow("float16", 0, texts=True)
    with pytest.raises(UserError, match=r"features of text 'a photo of a dog\.' are NaN in float16"):
        runs(specks, tmp_path / "out")[command]()


def test_a_trained_encoder_is_named_instead_of_the_learning_rate(specks: Path, tmp_path: Path, overflow: Any) -> None:
    """The first stage encodes its four images once; the second stage encodes the next ones."""
    overflow("float16", 9)
    with pytest.raises(UserError, match=r"features of image '\w+/\d.png' are NaN in float16"):
        runs(specks, tmp_path / "out")["fft"]()


def test_damaged_weights_without_a_scale_are_named() -> None:
    vlm = load_tiny()
    for value in (torch.nan, 1e6):
        vlm.model.logit_scale.data.fill_(value)
        with pytest.raises(UserError, match=r"model tiny has the logit scale (nan|inf): its weights"):
            _ = vlm.logit_scale


def test_features_that_are_all_zero_are_refused() -> None:
    vlm = load_tiny()
    vlm.check_features(torch.eye(3), "image", ["a", "b", "c"])
    spoilt = torch.eye(3)
    spoilt[1] = 0
    with pytest.raises(UserError, match="features of image 'b' are all zero in float32, and 1 of 3"):
        vlm.check_features(spoilt, "image", ["a", "b", "c"])
    with pytest.raises(UserError, match="features of image 'all' are all zero"):
        vlm.check_features(spoilt, "image", ["all"])
    with pytest.raises(UserError, match="features of image '2 of 3' are all zero"):
        vlm.check_features(spoilt, "image", [])


def test_an_adapter_that_gives_nan_leaves_the_zero_shot_answer() -> None:
    """The last step can be too large although every loss before it was finite."""
    images = Features(torch.eye(3), torch.tensor([0, 1, 2]), ("a", "b", "c"))

    def predict(part: Tensor) -> Tensor:
        return torch.where(torch.arange(3)[:, None] == 1, torch.nan, part.roll(1, 1))

    records = evaluate(
        predict, images, torch.eye(3), 10.0, names=("x", "y", "z"), title="test", device=torch.device("cpu")
    )
    assert [record["status"] for record in records] == ["ok", "diverged", "ok"]
    assert records[1]["adapted"] == records[1]["zero_shot"]
    assert all(np.isfinite(record["confidence"]).all() for record in records)
