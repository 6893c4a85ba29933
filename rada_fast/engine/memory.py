"""How many images are adapted together, and how much memory that takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rada_fast.engine.groups import MOST_EPISODES, EpisodeRule, episode_bytes, most_episodes
from rada_fast.errors import UserError

ENCODER_TENSORS = 16
"""About as many tensors (N, tokens, width) an image encoder holds at once: its hidden layer of four widths and the
result of its activation, the projections of an attention, the residual stream, and copies of some."""


class MemoryPlan(NamedTuple):
    """Say how many images are adapted together, and about how many bytes the whole pipeline then takes.

    The weights of the model and the pixels of decoded pictures are not among them.
    """

    episodes: int
    bytes: int


class EncoderLoad(NamedTuple):
    """Say what the encoding of views holds in memory.

    views_ahead: the views of the pictures that are read ahead, on the device.
    batch: the views that are encoded at once.
    view_bytes: the bytes of one view.
    encoder_bytes: the bytes that the encoder holds for one view.
    """

    views_ahead: int
    batch: int
    view_bytes: int
    encoder_bytes: int


def encoder_bytes(visual: nn.Module, view_bytes: int) -> int:
    """Return about how many bytes an image encoder holds for one view while it computes.

    These are ENCODER_TENSORS float32 numbers for each token and each of its widths. An encoder without a table of
    positions counts as one whose tokens have as many numbers as a view.

    visual: the image encoder of a model of open_clip.
    view_bytes: the bytes of one view, float32.
    """
    positions = getattr(visual, "positional_embedding", None)
    numbers = 4 * positions.numel() if isinstance(positions, Tensor) else view_bytes
    return ENCODER_TENSORS * numbers


def memory_plan(
    rule: EpisodeRule,
    views: int,
    classes: int,
    device: torch.device,
    *,
    load: EncoderLoad | None = None,
    episodes: int | None = None,
    memory: int | None = None,
) -> MemoryPlan:
    """Choose the number E of images that are adapted together: the largest power of two that a budget allows.

    With V views, K classes, width D, A views that are read ahead, batches of R views, S x S pixels of a view and e
    bytes that the encoder holds for a view, the pipeline takes

        12 S^2 (A + R) + e R + E (4 V D + 8 K + episode_bytes(V, K, D))

    bytes, where engine/groups.py states the bytes of an episode. No result depends on E.

    rule: how the episodes are computed.
    views, classes: V and K.
    device: the device of the features.
    load: what the encoding of views holds, or None if there are only features.
    episodes: the most episodes, or None for MOST_EPISODES.
    memory: the budget in bytes, or None for what groups of a useful size take.

    Raises UserError if the budget is too small for a single episode.
    """
    fixed = 0
    if load is not None:
        fixed = load.view_bytes * (load.views_ahead + load.batch) + load.encoder_bytes * load.batch
    each = 4 * views * rule.adapter.embed_dim + 8 * classes + episode_bytes(rule, views, classes)
    if memory is None:
        most = most_episodes(rule, views, classes, device)
    elif (most := (memory - fixed) // each) < 1:
        needed = -(-(fixed + each) // 2**20)
        raise UserError(
            f"memory must be at least {needed}MiB for {views} views and {classes} classes, got {memory // 2**20}MiB"
        )
    most = min(most, MOST_EPISODES, episodes or MOST_EPISODES)
    chosen = 1 << (most.bit_length() - 1)
    return MemoryPlan(chosen, fixed + chosen * each)
