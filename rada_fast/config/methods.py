"""Define the methods of fine-tuning: RAda and those that the paper compares with it, one row of a table for each.

The paper is RAda, arXiv:2507.15480. What a method computes stands in the docstring of the module that its row names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HeadName = Literal["rational", "zero-shot", "clip-adapter", "attend-text", "attend-image", "attend-both"]
"""What computes logits from the features of images and classes; see modules/heads.py."""
TuningName = Literal["context", "prompts", "coupled-prompts", "adapters"]
"""What is trained inside the encoders; see models/encoder_tuning.py."""
EFTMethodName = Literal[
    "rada", "clip-adapter", "coop", "prompt", "maple", "adapter", "rada+prompt", "rada+adapter", "attend-text",
    "attend-image", "attend-both",
]  # fmt: skip
FFTMethodName = Literal["rada", "lp", "ft", "l2-sp", "lp-ft", "flyp", "clip-adapter"]
Trains = Literal["head", "encoder", "both-encoders"]


@dataclass(frozen=True)
class EFTMethod:
    """A method of efficient fine-tuning.

    head: what computes the logits; all of its parameters are trained.
    tuning: what is trained inside the encoders, whose own weights stay frozen, or None.
    """

    head: HeadName
    tuning: TuningName | None = None


EFT_METHODS: dict[EFTMethodName, EFTMethod] = {
    "rada": EFTMethod("rational"),
    "clip-adapter": EFTMethod("clip-adapter"),
    "coop": EFTMethod("zero-shot", "context"),
    "prompt": EFTMethod("zero-shot", "prompts"),
    "maple": EFTMethod("zero-shot", "coupled-prompts"),
    "adapter": EFTMethod("zero-shot", "adapters"),
    "rada+prompt": EFTMethod("rational", "prompts"),
    "rada+adapter": EFTMethod("rational", "adapters"),
    "attend-text": EFTMethod("attend-text"),
    "attend-image": EFTMethod("attend-image"),
    "attend-both": EFTMethod("attend-both"),
}
"""The methods of `eft`: those of Tables 2 and 8, and the variants with attention in one modality of Table 4."""


@dataclass(frozen=True)
class FFTStage:
    """A stage of a method of full fine-tuning.

    name: the name of the stage in results and file names.
    trains: "head": the classifier and, if the method has one, the adapter before or behind it; "encoder": the image
        encoder too; "both-encoders": both encoders and no classifier, with CLIP's contrastive loss.
    pull: whether the weights are pulled towards those at the start of the stage (L2-SP).
    """

    name: str
    trains: Trains
    pull: bool = False


@dataclass(frozen=True)
class FFTMethod:
    """A method of full fine-tuning: what computes the logits from features and classifier, and one or two stages."""

    head: HeadName
    stages: tuple[FFTStage, ...]


FFT_METHODS: dict[FFTMethodName, FFTMethod] = {
    "rada": FFTMethod("rational", (FFTStage("rada", "head"), FFTStage("rada-ft", "encoder"))),
    "lp": FFTMethod("zero-shot", (FFTStage("lp", "head"),)),
    "ft": FFTMethod("zero-shot", (FFTStage("ft", "encoder"),)),
    "l2-sp": FFTMethod("zero-shot", (FFTStage("l2-sp", "encoder", pull=True),)),
    "lp-ft": FFTMethod("zero-shot", (FFTStage("lp", "head"), FFTStage("lp-ft", "encoder"))),
    "flyp": FFTMethod("zero-shot", (FFTStage("flyp", "both-encoders"),)),
    "clip-adapter": FFTMethod(
        "clip-adapter", (FFTStage("clip-adapter", "head"), FFTStage("clip-adapter-ft", "encoder"))
    ),
}
"""The methods of `fft`: those of Tables 1 and 6."""

FFT_STAGES: tuple[str, ...] = tuple(
    dict.fromkeys(stage.name for method in FFT_METHODS.values() for stage in method.stages)
)
"""The names of all stages, each once."""
