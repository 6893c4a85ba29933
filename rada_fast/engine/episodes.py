"""Test-time episodes on features (RAda, arXiv:2507.15480, Sec. 4.3): each test image gets its own copy of the adapter.

The result of an episode is the same to the bit, whatever other episodes are computed, how many they are, and in which
order. Where the compiled operators serve the adapter, groups.py computes several episodes in each call. Otherwise each
episode is computed by itself, by the module and PyTorch's optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW, Optimizer

from rada_fast.config.method import EpisodeConfig, MaskPenalty, OptimizerName
from rada_fast.engine.graphs import GRAPHS, GroupInputs, usable
from rada_fast.engine.groups import (
    EpisodeGroup,
    EpisodeRule,
    GroupLogits,
    decay_without_gradient,
    group_sizes,
    most_episodes,
)
from rada_fast.engine.stages import Busy, uncounted
from rada_fast.modules.projections import GIVE_VALUES, is_no_ordinary_tensor
from rada_fast.modules.rational_adapter import RationalAdapter, unwrapped
from rada_fast.ops import (
    AdapterOutput,
    prediction_loss,
    rational_adapter,
    select_views,
    serving_backend,
    under_transform,
    zero_shot_logits,
)
from rada_fast.ops.rational_adapter import (
    Projected,
    check_features,
    check_scale,
    check_text_features,
    parameter_shapes,
)
from rada_fast.system import memory, notices


def prediction_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of softmax(logits) in nats. logits: (..., K). Returns (...)."""
    log_probabilities = logits.log_softmax(dim=-1)  # (..., K)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def episode_loss(logits: Tensor, config: EpisodeConfig) -> Tensor:
    """Compute the loss of the kept views (Eq. 5): the mean of their entropies, or the entropy of their mean prediction.

    logits: (n, K). Returns a 0-dim tensor, in nats.
    """
    return prediction_loss(logits, config.loss)


def make_optimizer(
    parameters: Iterable[Tensor], name: OptimizerName, *, lr: float, weight_decay: float, momentum: float = 0.0
) -> Optimizer:
    """Make an optimiser without state. Every episode begins with a new one.

    parameters: the parameters to train.
    name: the kind of optimiser.
    lr: the learning rate.
    weight_decay: the factor of weight decay.
    momentum: the momentum of SGD; the other kinds do not use it.
    """
    match name:
        case "adamw":
            return AdamW(parameters, lr=lr, weight_decay=weight_decay)
        case "adam":
            return Adam(parameters, lr=lr, weight_decay=weight_decay)
        case "sgd":
            return SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum)


class EpisodeAdapter:
    """The copy of an adapter for one episode: its parameters, its buffers and its arithmetic.

    Parameters, moments and steps are float32 or float64 whatever the type of the adapter, because float16 would
    round away a step of 8e-4 on a weight near 1, and Adam's 1e-8. Frozen parameters do not change.

    adapter: the adapter with which the episode starts.
    dtype: the type of the adapter's arithmetic; see arithmetic_dtype.
    plain: whether the function rational_adapter of the named parameters computes the adapter, so that the module need
        not be called.
    """

    def __init__(self, adapter: RationalAdapter, dtype: torch.dtype, *, plain: bool) -> None:
        self.adapter, self.dtype, self.plain = adapter, dtype, plain
        self.parameters = {
            name: _exact(parameter.detach()).clone().requires_grad_(parameter.requires_grad)
            for name, parameter in adapter.named_parameters()
        }
        # Some layers have buffers, such as those of a power iteration; those of one episode must not reach the next.
        self.buffers = {name: buffer.detach().clone() for name, buffer in adapter.named_buffers()}

    def optimizer(self, config: EpisodeConfig) -> Optimizer:
        """Make an optimiser of the parameters that are trained."""
        trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        return make_optimizer(trained, config.optimizer, lr=config.lr, weight_decay=config.weight_decay)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        penalty: MaskPenalty | None = None,
        **known: Any,
    ) -> AdapterOutput:
        """Compute the logits (B, K), and the mask penalty if one is requested.

        known: what is known of the parameters, output_is_zero, projected and keep_projected; see ops.rational_adapter.
        """
        parameters = {name: parameter.to(self.dtype) for name, parameter in self.parameters.items()}
        if self.plain:
            return rational_adapter(
                image_features, text_features, logit_scale, parameters, self.adapter.config, penalty=penalty, **known
            )
        state = parameters | {
            name: buffer.to(self.dtype) if buffer.is_floating_point() else buffer
            for name, buffer in self.buffers.items()
        }
        result = functional_call(self.adapter, state, (image_features, text_features, logit_scale, penalty))
        logits, value = result if penalty is not None else (result, None)
        return AdapterOutput(logits, value, None)

    def backward(self, loss: Tensor, *, output_is_zero: bool) -> None:
        """Compute the gradients of what is trained.

        output_is_zero: whether the output projection is known to be zero. No gradient passes through it then, so all
            gradients but its own are exactly zero.
        """
        trained = {name: value for name, value in self.parameters.items() if value.requires_grad}
        if not output_is_zero:
            loss.backward()
            return
        output = [value for name, value in trained.items() if name.startswith("out_proj.")]
        if output:
            loss.backward(inputs=output)
        for value in trained.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)


def _exact(value: Tensor) -> Tensor:
    """Convert a floating-point tensor to float32, except one of float64."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def arithmetic_dtype(adapter: nn.Module, features: Tensor) -> torch.dtype:
    """Choose the type in which an episode is computed: float64, bfloat16 or float32.

    It is float64 if the features or a parameter are, bfloat16 if all of them are, and otherwise float32. In float16 the
    gradient of the penalty, about 1 / (n K D) for each element, would be rounded to zero.
    """
    types = {features.dtype} | {parameter.dtype for parameter in adapter.parameters()}
    dtype = torch.bfloat16 if types == {torch.bfloat16} else torch.float32
    return torch.float64 if torch.float64 in types else dtype


def adapt_episode(
    adapter: RationalAdapter,
    views: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    rule: EpisodeRule,
    *,
    plain: bool,
    busy: Busy = uncounted,
) -> GroupLogits:
    """Adapt a copy of the adapter to the views of one image, and predict the original view: logits (1, K).

    adapter: the adapter with which the episode starts.
    views: the features (V, D) of the views, the original first.
    text_features: T (K, D).
    logit_scale: the multiplier s.
    rule: how the episode is computed.
    plain: see EpisodeAdapter.
    busy: counts the time of the stages select, adapt and predict.
    """
    config = rule.episode
    adapted = EpisodeAdapter(adapter, views.dtype, plain=plain)
    optimizer = adapted.optimizer(config) if config.steps else None

    with busy("select"), torch.no_grad():
        # If every mask is 1, the views can be selected without the adapter.
        if rule.zero_shot:
            logits = zero_shot_logits(views, text_features, logit_scale)  # (V, K)
            original = logits[:1]
        else:
            logits = adapted(views, text_features, logit_scale).logits
            original = zero_shot_logits(views[:1], text_features, logit_scale)
        kept = views[select_views(logits, config.num_selected(len(views)))]  # (n, D)

    projected: Projected | None = None
    with busy("adapt"):
        for step in range(config.steps):
            assert optimizer is not None
            optimizer.zero_grad()
            # A second layer has a gradient even where the output projections of both are zero.
            zero = plain and rule.zero_shot and step == 0 and rule.adapter.num_layers == 1
            decay = decay_without_gradient(rule) if zero and config.steps > 1 else None
            output = adapted(
                kept, text_features, logit_scale, config.penalty if config.penalty_weight else None,
                output_is_zero=zero, projected=projected, keep_projected=decay is not None,
            )  # fmt: skip
            # The next step's projections are those of this step, scaled.
            projected = None if output.projected is None or decay is None else output.projected.scaled(decay)
            loss = episode_loss(output.logits, config)
            if output.penalty is not None:
                loss = loss + config.penalty_weight * output.penalty
            adapted.backward(loss, output_is_zero=zero)
            optimizer.step()

    with busy("predict"), torch.no_grad():
        return GroupLogits(adapted(views[:1], text_features, logit_scale).logits, original)


def adapt_episodes(
    adapter: nn.Module,
    view_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    config: EpisodeConfig | None = None,
    *,
    on_episode: Callable[[int], None] | None = None,
) -> Tensor:
    """Adapt E episodes, each with its own copy of the adapter, and predict each original view.

    An episode selects the int(selection * V) views whose predictions have the lowest entropy. It then takes the steps
    of the optimiser on the entropy of their predictions (Eq. 5) plus the weighted mask penalty (Eq. 7), and predicts
    view 0 with the adapted copy. The adapter itself never changes, and no state passes from one episode to the next.
    This works in the same way under ``torch.no_grad`` and ``torch.inference_mode``.

    adapter: the adapter with which every episode starts: a RationalAdapter, or one in a wrapper
        (DistributedDataParallel, AveragedModel, torch.compile). Parameters whose requires_grad is False do not change.
        A float16 adapter is computed in float32 and a bfloat16 adapter in bfloat16; for both, parameters, moments and
        steps are float32.
    view_features: the features (E, V, D) of the views at unit norm, the original view first.
    text_features: T (K, D) at unit norm.
    logit_scale: the multiplier s.
    config: the configuration of an episode; None stands for that of the paper.
    on_episode: a function that is called with the number of finished episodes, to show the progress.

    Returns logits (E, K), in view_features' dtype. Raises ValueError or TypeError naming the argument.
    """
    if under_transform():
        raise RuntimeError(
            "adapt_episodes takes optimiser steps, which transforms of torch.func (vmap, grad, ...) and forward mode "
            "do not go through: call it outside"
        )
    for name, value in (("view_features", view_features), ("text_features", text_features)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if config is not None and not isinstance(config, EpisodeConfig):
        raise TypeError(f"config must be an EpisodeConfig, got {type(config).__name__}")
    if view_features.ndim != 3 or view_features.shape[1] == 0:
        raise ValueError(f"view_features must be (E, V, D) with V >= 1, got {tuple(view_features.shape)}")
    if not view_features.is_floating_point():
        raise TypeError(f"view_features must be floating point, got {view_features.dtype}")
    config = config or EpisodeConfig()
    adapter = unwrapped(adapter)
    check_features("view_features", view_features, "E, V", adapter.config.embed_dim)
    check_text_features(text_features, adapter.config.embed_dim)
    check_scale(logit_scale)
    if view_features.is_meta:
        raise ValueError("view_features must have values, got a tensor of the meta device")
    check_trainable(adapter, config)
    adaptation = Adaptation(adapter, text_features, logit_scale, config, arithmetic_dtype(adapter, view_features))
    return adaptation(view_features, on_episode=on_episode).adapted


class Adaptation:
    """Adapt episodes that all start with the same adapter, and have the same classes and configuration.

    The adapter's values are looked at when the object is made, which waits for a device. No call waits for one.

    adapter: the adapter with which every episode starts.
    text_features: T (K, D).
    logit_scale: the multiplier s.
    config: the configuration of an episode.
    dtype: the type of the arithmetic; see arithmetic_dtype.
    most: the most episodes of a group, or None for as many as most_episodes says.
    busy: counts the time of the stages select, adapt and predict, except in a recorded graph.
    """

    def __init__(
        self,
        adapter: RationalAdapter,
        text_features: Tensor,
        logit_scale: Tensor | float,
        config: EpisodeConfig,
        dtype: torch.dtype,
        *,
        most: int | None = None,
        busy: Busy = uncounted,
    ) -> None:
        self._adapter, self._most, self._busy = adapter, most, busy
        self._plain = adapter.is_plain()
        self.rule = EpisodeRule(
            adapter.config, config, dtype, adapter.is_zero_shot(),
            tuple(name for name, parameter in adapter.named_parameters() if parameter.requires_grad),
        )  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            device = text_features.device
            # The adapter refuses a multiplier on another device.
            scale = logit_scale.to(device) if isinstance(logit_scale, Tensor) else logit_scale
            self._scale = _outside_inference(scale) if isinstance(scale, Tensor) else scale
            self._text = _in_usual_memory(_outside_inference(text_features).to(dtype))
            self._group_scale = self._scale
            if device.type == "cuda" and not isinstance(scale, Tensor):
                # With or without a graph, the multiplier of a group is a number on the device: both then round alike.
                self._group_scale = torch.full((), float(scale), device=device)
            self._initial = {}
            if self._plain:
                self._initial = {name: _exact(_outside_inference(value)) for name, value in adapter.named_parameters()}
        self._group: EpisodeGroup | None = None

    def __call__(self, view_features: Tensor, *, on_episode: Callable[[int], None] | None = None) -> GroupLogits:
        """Return the logits (E, K) of the original views, in view_features' dtype.

        view_features: the features (E, V, D) of the views, the original first.
        on_episode: see adapt_episodes.
        """
        results: list[GroupLogits] = []
        # Tensors of inference mode cannot take part in autograd, so episodes run outside of this mode, on copies.
        with torch.inference_mode(False), torch.enable_grad():
            views = _outside_inference(view_features).to(self.rule.dtype)
            if self._plain and len(views) and _serves_groups(self.rule, views, self._text):
                finished = self._in_groups(views)
            else:
                finished = (
                    adapt_episode(
                        self._adapter, episode, self._text, self._scale, self.rule, plain=self._plain, busy=self._busy
                    )
                    for episode in views
                )  # fmt: skip
            done = 0
            for logits in finished:
                results.append(logits)
                for _ in range(len(logits.adapted)):
                    done += 1
                    if on_episode is not None:
                        on_episode(done)
            if not results:
                return GroupLogits(*view_features.new_empty((2, 0, len(self._text))))
            return GroupLogits(*(torch.cat(parts).to(view_features.dtype) for parts in zip(*results, strict=True)))

    def _in_groups(self, views: Tensor) -> Iterator[GroupLogits]:
        """Adapt the episodes in groups, and yield the logits (E, K) of each group.

        Where the memory does not suffice for a group, groups are half as large from there on.
        """
        most = self._most or most_episodes(self.rule, views.shape[1], len(self._text), views.device)
        views = _in_usual_memory(views)
        start = 0
        while start < len(views):
            size = next(group_sizes(len(views) - start, most))
            try:
                logits = self._adapt_group(views[start : start + size])
            except Exception as error:
                if size == 1 or not memory.is_lack_of_memory(error):
                    raise
                most = self._most = size // 2
            else:
                start += size
                yield logits
                continue
            # Here the error is gone, and with it what its trace kept.
            self._group = None
            GRAPHS.clear()
            memory.free_unused()
            notices.warn(
                f"the memory did not suffice to adapt to {size} images at once; from here on it is {most}, which "
                "changes no result"
            )

    def _adapt_group(self, part: Tensor) -> GroupLogits:
        """Adapt one group of episodes. Nothing of it is left behind where this fails."""
        text, scale = self._text, self._group_scale
        if usable(part.device) and isinstance(scale, Tensor):
            logits = GRAPHS.adapt(GroupInputs(part, text, scale, self._initial), self.rule)
            if logits is not None:
                return logits
        if self._group is None or self._group.episodes != len(part):
            # A group keeps its memory, so only the last one is kept.
            self._group = EpisodeGroup(self._initial, self.rule, len(part), self._busy)
        return self._group(part, text, scale)


def _serves_groups(rule: EpisodeRule, views: Tensor, text_features: Tensor) -> bool:
    """Return whether a compiled operator computes episodes with this rule, in float32 or a type below it."""
    if rule.adapter.mask_function != "attention" or rule.adapter.num_layers > 1 or rule.dtype == torch.float64:
        return False
    stand_ins = dict.fromkeys(parameter_shapes(rule.adapter), views)
    penalty = rule.episode.penalty
    name = serving_backend(views, text_features, stand_ins, rule.adapter, penalty=penalty, episodes=1)
    return name in ("cpu", "triton")


def _in_usual_memory(value: Tensor) -> Tensor:
    """Return a tensor that is contiguous and begins where vectors may be loaded, as a graph's own copy does.

    Libraries choose how to compute a product by strides and addresses too, and this decides about the last bits.
    """
    return value.contiguous() if value.data_ptr() % 16 == 0 else value.clone(memory_format=torch.contiguous_format)


def _outside_inference(value: Tensor) -> Tensor:
    """Return the values of a tensor as one without a history that autograd accepts."""
    return value.clone() if value.is_inference() else value.detach()


def check_trainable(adapter: RationalAdapter, config: EpisodeConfig) -> None:
    """Raise ValueError if episodes cannot take a step with this adapter."""
    parameters = dict(adapter.named_parameters())
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(f"adapter's {name} is on the meta device: {GIVE_VALUES}")
        if is_no_ordinary_tensor(parameter):
            raise ValueError(
                f"adapter's {name} must be an ordinary tensor, got {type(parameter).__name__}: gather it first"
            )
    if config.steps and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(
            f"adapter must have a parameter to train, all {len(parameters)} are frozen (requires_grad False): "
            "call adapter.requires_grad_(), or give EpisodeConfig(steps=0)"
        )
