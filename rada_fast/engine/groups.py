"""Adapt the episodes of several images together, each with its own parameters, in calls that take all of them.

Nothing that is computed for an episode depends on how many others are computed with it: the operators that take all
episodes treat each by itself. Results are therefore the same to the bit, however episodes are grouped. Nothing waits
for the device, and on a GPU a group takes the same number of launches however many episodes it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rada_fast.config.method import AdapterConfig, EpisodeConfig, MaskPenalty
from rada_fast.engine.stages import Busy, uncounted
from rada_fast.ops import (
    EpisodicOptimizer,
    KeptViews,
    gather_views,
    keep_views,
    prediction_loss_and_gradient,
    rational_adapter,
    select_views,
)
from rada_fast.ops.rational_adapter import AdapterOutput, Projected, parameter_shapes

BUDGETS = {"cpu": 2**26, "cuda": 2**30}
"""The bytes that the episodes of one group may take by episode_bytes, by the type of the device. A single episode is
computed whatever it takes. More would not be faster: a few episodes fill a GPU, and a CPU's caches hold one or two."""

MOST_EPISODES = 64
"""The most episodes of a group."""


@dataclass(frozen=True)
class EpisodeRule:
    """Say how each episode is computed.

    adapter: the arithmetic of the adapter, which has one layer of attention.
    episode: the configuration of an episode.
    dtype: the type of the adapter's arithmetic; parameters, moments and steps are float32.
    zero_shot: whether the output projection is zero at the start of an episode.
    trained: the names of the parameters that the steps change.
    """

    adapter: AdapterConfig
    episode: EpisodeConfig
    dtype: torch.dtype
    zero_shot: bool
    trained: tuple[str, ...]


class GroupLogits(NamedTuple):
    """Hold the logits (E, K) of a group's original views, after each episode's steps and by CLIP alone."""

    adapted: Tensor
    zero_shot: Tensor


def episode_bytes(rule: EpisodeRule, views: int, classes: int) -> int:
    """Return about how many bytes one episode takes while its group is computed.

    With n kept views out of V, K classes, width D, P elements of parameters and b bytes for a number of the adapter's
    type, this is ``13 n K D b + P (12 + 2 b) + V D b``: seven tensors (n, K, D) that are kept for the backward pass and
    six of it; the parameters and their two moments in float32, a copy of the parameters for the step, and their
    gradients; and the features of the views.
    """
    width, size = rule.adapter.embed_dim, rule.dtype.itemsize
    rows = rule.episode.num_selected(views) * classes
    parameters = sum(prod(shape) for shape in parameter_shapes(rule.adapter).values())
    return 13 * rows * width * size + parameters * (12 + 2 * size) + views * width * size


def decay_without_gradient(rule: EpisodeRule) -> float | None:
    """Return the factor by which a step changes all projections but the output's while their gradients are zero.

    It is None where they do not all change by one factor: under Adam, which adds weight decay to the gradient, and
    where some of them are frozen.
    """
    config = rule.episode
    if config.weight_decay == 0:
        return 1.0
    projections = {name for name in parameter_shapes(rule.adapter) if not name.startswith("out_proj.")}
    if config.optimizer == "adam" or not projections <= set(rule.trained):
        return None
    return 1 - config.lr * config.weight_decay


def group_sizes(count: int, most: int) -> Iterator[int]:
    """Yield the numbers of episodes of the groups that make up `count` episodes, all powers of two up to `most`.

    The rest that does not fill a group is divided into smaller powers of two. So no episode is computed in vain, and
    calls with any numbers of episodes have only a few sizes of groups, for each of which a GPU has a graph of its own.
    """
    while count:
        size = 1 << (min(count, most).bit_length() - 1)
        yield size
        count -= size


def most_episodes(rule: EpisodeRule, views: int, classes: int, device: torch.device) -> int:
    """Return how many episodes a group may have at the most; see BUDGETS and MOST_EPISODES."""
    return max(1, min(MOST_EPISODES, BUDGETS[device.type] // episode_bytes(rule, views, classes)))


class EpisodeGroup:
    """Adapt E copies of an adapter, each to the views of its own image. A group may be called many times.

    initial: the parameters with which each episode starts, by their published names, float32. They are read in every
        call and never written, so a change of their values counts from the next call on.
    rule: how the episodes are computed.
    episodes: E.
    busy: counts the time of the stages select, adapt and predict.
    """

    def __init__(self, initial: Mapping[str, Tensor], rule: EpisodeRule, episodes: int, busy: Busy = uncounted) -> None:
        self.rule, self.episodes, self._busy = rule, episodes, busy
        config = rule.episode
        self._optimizer = EpisodicOptimizer(
            {name: nn.Parameter(value, requires_grad=name in rule.trained) for name, value in initial.items()},
            episodes, config.optimizer, lr=config.lr, weight_decay=config.weight_decay, dtype=rule.dtype,
        )  # fmt: skip
        self._dpenalty: Tensor | None = None
        self._projected: Projected | None = None

    def __call__(self, views: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> GroupLogits:
        """Return the logits (E, K) of the original views, without a wait for the device.

        views: the features (E, V, D) of the views in the rule's dtype, the original view first.
        text_features: T (K, D), in the same type.
        logit_scale: the multiplier s.
        """
        # Nothing of the last call's episodes is read after this.
        self._optimizer.reset()
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.to(torch.float32)
        steps = self.rule.episode.steps
        self._projected = None
        with self._busy("select"), torch.no_grad():
            kept, originals, zero_shot = self._kept_views(views, text_features, logit_scale)
            images = kept.flatten(0, 1)  # (E n, D)
        with self._busy("adapt"):
            for step in range(steps):
                wanted: Sequence[str] = self.rule.trained
                zero = self.rule.zero_shot and step == 0
                if zero:
                    # No gradient passes through an output projection of zeros, so all others are exactly zero.
                    wanted = [name for name in wanted if name.startswith("out_proj.")]
                gradients = self._gradients(images, text_features, logit_scale, wanted, output_is_zero=zero)
                self._optimizer.step(gradients, last=step == steps - 1)
        with self._busy("predict"), torch.no_grad():
            adapted = self._adapter(originals, text_features, logit_scale, self._optimizer.values).logits
        return GroupLogits(adapted, zero_shot)

    def _kept_views(self, views: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> KeptViews:
        """Keep the views whose predictions by the initial adapter have the least entropy."""
        count = self.rule.episode.num_selected(views.shape[1])
        if self.rule.zero_shot:
            # Every mask is 1, so the predictions are those of CLIP.
            return keep_views(views, text_features, logit_scale, count)
        initial = {name: value[0] for name, value in self._optimizer.values.items()}
        # All views enter the adapter, and several episodes at once only where there is memory for so many.
        taken = 5 * views[0].numel() * len(text_features) * views.element_size()
        logits = [
            rational_adapter(
                part.flatten(0, 1), text_features, logit_scale, initial, self.rule.adapter, episodes=len(part)
            ).logits.unflatten(0, (len(part), -1))
            for part in views.split(max(1, BUDGETS[views.device.type] // taken))
        ]
        indices = select_views(torch.cat(logits) if len(logits) > 1 else logits[0], count)  # (E, n)
        originals = keep_views(views, text_features, logit_scale, 0)
        return originals._replace(kept=gather_views(views, indices))

    def _gradients(
        self,
        images: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        wanted: Sequence[str],
        *,
        output_is_zero: bool,
    ) -> dict[str, Tensor]:
        """Return the gradients (E, ...) of the wanted parameters, each of its own episode's loss and penalty."""
        if not wanted:
            return {}
        config = self.rule.episode
        parameters = {name: value.detach() for name, value in self._optimizer.values.items()}
        leaves = [parameters[name].requires_grad_() for name in wanted]
        penalty = config.penalty if config.penalty_weight else None
        decay = decay_without_gradient(self.rule) if output_is_zero and self.rule.episode.steps > 1 else None
        output = self._adapter(
            images, text_features, logit_scale, parameters, penalty, output_is_zero=output_is_zero,
            projected=self._projected, keep_projected=decay is not None,
        )  # fmt: skip
        # The next step's projections are those of this step, scaled.
        self._projected = None if output.projected is None or decay is None else output.projected.scaled(decay)
        logits = output.logits.unflatten(0, (self.episodes, -1))  # (E, n, K)
        _, dlogits = prediction_loss_and_gradient(logits, config.loss)
        results, dresults = [logits], [dlogits]
        if output.penalty is not None:
            if self._dpenalty is None:
                self._dpenalty = torch.full_like(output.penalty, config.penalty_weight, requires_grad=False)
            results.append(output.penalty)
            dresults.append(self._dpenalty)
        gradients = torch.autograd.grad(results, leaves, dresults)
        return dict(zip(wanted, gradients, strict=True))

    def _adapter(
        self,
        images: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        parameters: Mapping[str, Tensor],
        penalty: MaskPenalty | None = None,
        *,
        output_is_zero: bool = False,
        projected: Projected | None = None,
        keep_projected: bool = False,
    ) -> AdapterOutput:
        return rational_adapter(
            images, text_features, logit_scale, parameters, self.rule.adapter, penalty=penalty, episodes=self.episodes,
            output_is_zero=output_is_zero, projected=projected, keep_projected=keep_projected,
        )  # fmt: skip
