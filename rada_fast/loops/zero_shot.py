"""The check before a run: zero-shot answers that are no better than guesses stop it, because its data are at fault."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rada_fast.data.sources import Source
from rada_fast.errors import UserError
from rada_fast.loops.setup import Setup
from rada_fast.models.image_features import Features, features_of
from rada_fast.ops import zero_shot_logits
from rada_fast.reports.chance import MIN_IMAGES, fault_of_answers
from rada_fast.system import notices

SAMPLE = 512
"""How many pictures are encoded for the check: as many views as those of eight pictures that ttt adapts to."""


def check_sample(source: Source, option: str, setup: Setup) -> None:
    """Check the zero-shot answers to a sample of images, spread over the classes; see check_answers.

    source: the images or their features. Images of unknown classes are not checked.
    option: the option that names them, with its value, for messages.
    setup: the set-up of the run.
    """
    labels = [label for label in source.known_labels().values() if label is not None]
    if len(labels) < MIN_IMAGES or len(labels) < len(source.ids):
        return
    # Rows of features cost nothing to check, and their first ones may all be of one class.
    limit = SAMPLE if source.holds_images else None
    title, workers = "encode a sample for the zero-shot check", setup.options.run.workers
    images = features_of(source, setup.model, title=title, workers=workers, limit=limit)
    check_answers(images, setup.text, setup.names, option, setup)


@torch.no_grad()
def check_answers(images: Features, text: Tensor, names: Sequence[str], option: str, setup: Setup) -> None:
    """Check that the zero-shot answers to images are better than guesses among their classes.

    images: the encoded images.
    text: the text features T (K, D).
    names: the names of the K classes.
    option: the option that names the images, with its value, for messages.
    setup: the set-up of the run.

    Raises UserError with the likely cause if they are not and the option allow_chance is not set. With it, this warns.
    """
    parts = images.features.split(max(1, 2**24 // len(text)))
    answers = [zero_shot_logits(part.to(text.device), text, 1.0).argmax(dim=1).cpu() for part in parts]
    if not answers or (fault := fault_of_answers(images.labels, torch.cat(answers), names)) is None:
        return
    if not setup.options.run.allow_chance:
        raise UserError(f"{option}: {fault} Give --allow-chance to go on all the same")
    notices.warn(f"{option}: {fault}")
