"""Train encoders in several processes: each has all weights (DistributedDataParallel), or a part of them (FSDP2).

Both sum the gradients of the encoders' weights while the backward pass still computes earlier ones. With FSDP2
(fully_shard) every process stores one part of the weights, of their gradients and of the optimiser's moments. It gets
the other parts of a block when the block is computed, and forgets them again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rada_fast.config.commands import Shard
from rada_fast.engine.sharing import is_part, whole_tensor
from rada_fast.models.protocol import image_tower, text_tower
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.system.ranks import Ranks

SHARDED_FROM = 250_000_000
"""With "auto", encoders with so many trained numbers are sharded. Weights, gradients and moments of that many take 4 GB
in every process. That is between a ViT-B (86 million in the image encoder) and a ViT-L (304 million)."""


@dataclass(frozen=True)
class EncodersOfGroup:
    """Encoders that several processes train; see SharedEncoders in sharing.py.

    parameters: the weights whose gradients are summed by the encoders.
    sharded: whether each process stores a part of these weights only.
    image_features: a function from images (n, 3, S, S) to features (n, D), for n = 0 too.
    text_features: the same for token ids (n, L).
    last_part: see SharedEncoders.
    """

    parameters: Sequence[Tensor]
    sharded: bool
    image_features: Callable[[Tensor], Tensor]
    text_features: Callable[[Tensor], Tensor]
    last_part: Callable[[bool], AbstractContextManager[object]]


def is_sharded(vlm: VisionLanguageModel, shard: Shard) -> bool:
    """Return whether the encoders of a model that can be trained are to be sharded, as the option says."""
    if shard == "auto":
        return sum(value.numel() for value in vlm.model.parameters() if value.requires_grad) >= SHARDED_FROM
    return shard == "full"


@contextmanager
def encoders_of_group(
    vlm: VisionLanguageModel, group: Ranks, shard: Shard, *, of_text: bool
) -> Iterator[EncodersOfGroup | None]:
    """Let several processes train the weights of a model that require gradients, while the context lasts.

    Inside the context vlm.model may be another module, whose weights are parts. At the end, every process has the model
    itself again, with the trained weights.

    vlm: the model, in the state of training.
    group: the processes. One alone needs nothing, and gets None.
    shard: what the option says.
    of_text: whether the text encoder is trained too.
    """
    if not group.several:
        yield None
    elif is_sharded(vlm, shard):
        yield from _sharded(vlm, group, of_text)
    else:
        yield _replicated(vlm, group)


def _replicated(vlm: VisionLanguageModel, group: Ranks) -> EncodersOfGroup:
    """Give every process all weights of the image encoder.

    Those of a text encoder, which goes back once in a step, are summed with the other gradients.
    """
    from torch.nn.parallel import DistributedDataParallel

    module = _ImageFeatures(vlm)
    # DistributedDataParallel would wait for the gradients of weights that no feature depends on.
    unused = _unused(vlm)
    for parameter in unused:
        parameter.requires_grad_(False)
    replicas = DistributedDataParallel(module, gradient_as_bucket_view=True)
    for parameter in unused:
        parameter.requires_grad_(True)
    known = {id(value) for value in unused}
    return EncodersOfGroup(
        [value for value in vlm.model.visual.parameters() if value.requires_grad and id(value) not in known],
        False,
        _of_any_number(replicas, vlm, group.count),
        _of_any_number(vlm.text_features_with_grad, vlm, 1),
        lambda last: nullcontext() if last else replicas.no_sync(),
    )


class _ImageFeatures(nn.Module):
    """The image encoder as DistributedDataParallel needs it: its parameters, and a forward pass to the features."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.visual = vlm.model.visual
        self._encode = vlm.image_features_with_grad

    def forward(self, images: Tensor) -> Tensor:
        return self._encode(images)


def _blank(vlm: VisionLanguageModel) -> Tensor:
    size = vlm.preprocess.image_size
    return torch.full((1, 3, size, size), 0.5)


def _unused(vlm: VisionLanguageModel) -> list[Tensor]:
    """Return the weights of the image encoder that can be trained, but on which the features do not depend."""
    parameters = [value for value in vlm.model.visual.parameters() if value.requires_grad]
    with torch.enable_grad(), torch.random.fork_rng(devices=[vlm.device] if vlm.device.type == "cuda" else []):
        features = vlm.image_features_with_grad(_blank(vlm))
    found = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return [value for value, gradient in zip(parameters, found, strict=True) if gradient is None]


def _sharded(vlm: VisionLanguageModel, group: Ranks, of_text: bool) -> Iterator[EncodersOfGroup]:
    """Give every process a part of the weights of each block, and of what lies around the blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(vlm.device.type, (group.count,))
    whole, model = vlm.model, copy.deepcopy(vlm.model)
    towers = [image_tower(model), text_tower(model) if of_text else None]
    units: list[nn.Module] = [block for tower in towers if tower is not None for block in tower.blocks]
    units.append(model.visual)
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not model.visual)
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)  # its memory is not needed until the end
    roots = [unit for unit in units if isinstance(unit, FSDPModule)]

    @contextmanager
    def last_part(last: bool) -> Iterator[None]:
        for unit in roots:
            unit.set_requires_gradient_sync(last, recurse=False)
        yield

    vlm.model = model
    parameters = [value for value in model.parameters() if value.requires_grad and is_part(value)]
    yield EncodersOfGroup(
        parameters,
        True,
        _of_any_number(vlm.image_features_with_grad, vlm, group.count),
        _of_any_number(vlm.text_features_with_grad, vlm, group.count),
        last_part,
    )
    vlm.model = whole
    for parameter, part in zip(whole.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.data = whole_tensor(part.detach())
    for buffer, other in zip(whole.buffers(), model.buffers(), strict=True):
        buffer.copy_(other)


def _of_any_number(
    encode: Callable[[Tensor], Tensor], vlm: VisionLanguageModel, factor: int
) -> Callable[[Tensor], Tensor]:
    """Return a function that encodes images or texts, even if there are none.

    factor: the factor of the gradients. Where PyTorch makes their mean over the processes, it is their number, so that
        the mean becomes the sum.
    """

    def encoded(inputs: Tensor) -> Tensor:
        features = encode(inputs if len(inputs) else _stand_in(inputs, vlm))[: len(inputs)]
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient * factor)
        return features

    return encoded


def _stand_in(inputs: Tensor, vlm: VisionLanguageModel) -> Tensor:
    """Return an input for a process that has none. Its features are dropped, and its gradient is zero."""
    return vlm.tokens(["a"]) if inputs.ndim == 2 else _blank(vlm)


class ScalerOfParts(torch.amp.GradScaler):
    """The scaler of the loss where an optimiser has both whole tensors and parts, which no operator takes together.

    All processes skip a step if the gradients of one of them have overflowed.
    """

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        found: dict[torch.device, Tensor] = {}
        for parts in (False, True):
            alike = SimpleNamespace(param_groups=[{"params": [one for one in parameters if is_part(one) == parts]}])
            found |= super()._unscale_grads_(cast(Any, alike), inv_scale, found_inf, allow_fp16)
        return found
