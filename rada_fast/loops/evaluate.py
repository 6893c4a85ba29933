"""Test on features: one record an image, with the answers before and after adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rada_fast.loops.features import Features, Unreadable
from rada_fast.ops import zero_shot_logits
from rada_fast.reports.summary import image_record
from rada_fast.runs.progress import progress

CHUNK_ELEMENTS = 2**24
"""Most elements of one (B, K, D) tensor while testing: 64 MiB in float32."""


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    images: Features,
    text_features: Tensor,
    logit_scale: float,
    *,
    title: str,
    device: torch.device,
    labels: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Records of all images, the unreadable ones last.

    predict: adapted logits (B, K) of features (B, D); text_features: (K, D), for the zero-shot answer.
    labels: the classes that the images' labels 0, 1, ... stand for, where they are only some of the K; only these may
        be predicted then.
    """
    text_features = text_features.to(device)
    chunk = max(1, CHUNK_ELEMENTS // text_features.numel())
    classes = list(range(len(text_features))) if labels is None else list(labels)
    absent = torch.ones(len(text_features), dtype=torch.bool)
    absent[classes] = False
    records = []
    with progress(title, len(images.ids)) as advance:
        for first in range(0, len(images.ids), chunk):
            part = images.features[first : first + chunk].to(device)
            adapted = predict(part).cpu()
            diverged = ~adapted.isfinite().all(dim=-1)
            adapted = adapted.masked_fill(absent, -torch.inf)
            zero_shot = zero_shot_logits(part, text_features, logit_scale).cpu().masked_fill(absent, -torch.inf)
            for offset, (before, after) in enumerate(zip(zero_shot, adapted, strict=True)):
                label = classes[int(images.labels[first + offset])]
                status = "ok"
                if bool(diverged[offset]):
                    # An adapter that gives no number leaves the answer it started from, and says so.
                    status, after = "diverged", before
                records.append(image_record(images.ids[first + offset], label, status, before, after))
            advance(len(part))
    return records + [record | {"label": classes[record["label"]]} for record in unreadable_records(images.unreadable)]


def unreadable_records(images: Iterable[Unreadable]) -> list[dict[str, Any]]:
    """One record for each image that could not be read."""
    return [{"id": id, "label": label, "status": "unreadable", "error": reason} for id, label, reason in images]
