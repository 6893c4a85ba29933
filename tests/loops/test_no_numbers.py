"""Features that are no numbers are named where they enter a run: which image or text, in which arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.config.options import RunOptions
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.models import vision_language
from rada_fast.models.image_features import Features
from rada_fast.models.vision_language import VisionLanguageModel

from .conftest import load_tiny


class Overflowing(nn.Module):
    """Gives no numbers after so many images, as an encoder does whose activations leave float16's range."""

    def __init__(self, encoder: nn.Module, after: int) -> None:
        super().__init__()
        self.encoder, self.left = encoder, after

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images)
        spoilt = torch.arange(len(features)) >= self.left
        self.left = max(0, self.left - len(features))
        return torch.where(spoilt[:, None], torch.inf * features, features)


@pytest.fixture
def overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a precision and a number of images: every run's model overflows after that many."""
    # A model is known by its weights, which are another test's too: features are not to come from its cache.
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path / "cache"))

    def apply(precision: str, after: int, *, texts: bool = False) -> None:
        def load(*given: Any, **more: Any) -> VisionLanguageModel:
            vlm = load_tiny()
            vlm.precision = precision  # type: ignore[assignment]
            if texts:
                vlm.model.letters.weight[ord("d")] = torch.nan
            else:
                vlm.model.visual = Overflowing(vlm.model.visual, after)
            # An encoder that asks for more than this machine's arithmetic: only its name matters here.
            monkeypatch.setattr(VisionLanguageModel, "_arithmetic", lambda self: torch.autograd.set_grad_enabled(True))
            return vlm

        monkeypatch.setattr(vision_language, "load_model", load)

    return apply


def runs(specks: Path, output: Path) -> dict[str, Any]:
    spec, run = f"imagefolder:{specks}", RunOptions(output=str(output))
    common = {"train": spec, "run": run}
    return {
        "ttt": lambda: run_ttt(TTTOptions(data=spec, views=4, episode=EpisodeConfig(steps=1), run=run)),
        "eft": lambda: run_eft(EFTOptions(test=spec, epochs=1, protocol="all", **common)),
        "eft-crops": lambda: run_eft(EFTOptions(test=spec, epochs=1, protocol="all", train_views="crop", **common)),
        "fft": lambda: run_fft(FFTOptions(test=(spec,), epochs=1, finetune_from=1, finetune_epochs=1, **common)),
    }


@pytest.mark.parametrize("command", ["ttt", "eft", "eft-crops", "fft"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_an_image_is_named_with_its_arithmetic(
    specks: Path, tmp_path: Path, overflow: Any, command: str, precision: str
) -> None:
    # ttt encodes four views of an image at once, so that its second image is the first to be spoilt.
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
def test_a_text_is_named_with_its_arithmetic(specks: Path, tmp_path: Path, overflow: Any, command: str) -> None:
    overflow("float16", 0, texts=True)
    with pytest.raises(UserError, match=r"features of text 'a photo of a dog\.' are NaN in float16"):
        runs(specks, tmp_path / "out")[command]()


def test_an_encoder_that_is_trained_is_named_not_the_learning_rate(specks: Path, tmp_path: Path, overflow: Any) -> None:
    """The first stage's images are encoded once, four of them; the second stage's are the next."""
    overflow("float16", 9)
    with pytest.raises(UserError, match=r"features of image '\w+/\d.png' are NaN in float16"):
        runs(specks, tmp_path / "out")["fft"]()


def test_damaged_weights_without_a_scale_are_named() -> None:
    vlm = load_tiny()
    for value in (torch.nan, 1e6):
        vlm.model.logit_scale.data.fill_(value)
        with pytest.raises(UserError, match=r"model tiny has the logit scale (nan|inf): its weights"):
            _ = vlm.logit_scale


def test_all_zero_features_are_no_direction() -> None:
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


def test_an_adapter_that_gives_no_number_leaves_the_zero_shot_answer() -> None:
    """A last step can be one too large although every loss before it was finite."""
    images = Features(torch.eye(3), torch.tensor([0, 1, 2]), ("a", "b", "c"))

    def predict(part: Tensor) -> Tensor:
        return torch.where(torch.arange(3)[:, None] == 1, torch.nan, part.roll(1, 1))

    records = evaluate(predict, images, torch.eye(3), 10.0, title="test", device=torch.device("cpu"))
    assert [record["status"] for record in records] == ["ok", "diverged", "ok"]
    assert records[1]["adapted"] == records[1]["zero_shot"]
    assert all(np.isfinite(record["confidence"]).all() for record in records)
