"""Let several processes take the steps of one training: each has a part of every batch, and gradients are summed.

A batch has the same images whatever the number of processes. Each process takes consecutive ones, nothing is padded,
and a process may have none. Its loss counts by its share of the images, so that the sum of the gradients over the
processes is the gradient of the whole batch, and every process takes the same step with it.

The gradients of the adapter and the classifier are summed in one flat all-reduce behind the backward pass, once in a
step. That is what DistributedDataParallel does with parameters that fit into one of its buckets. It could not do it
here, because the steps compute these gradients without autograd, whose hooks it needs. Encoders have such hooks, and
are trained with PyTorch's own means; see sharded_encoders.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rada_fast.system import ranks
from rada_fast.system.ranks import Ranks


def group_for(batch_size: int) -> Ranks:
    """Return the processes that share batches of a size.

    These are all of this run. If a batch has fewer images than there are processes, each takes the whole batch by
    itself: the steps are the same then, and an exchange in each of them would take longer than it saves.
    """
    group = ranks.current()
    return group if batch_size >= group.count else Ranks()


def part_of(count: int, group: Ranks) -> slice:
    """Return the part of the items 0 to count - 1 that this process takes. The parts follow one another."""
    return slice(count * group.rank // group.count, count * (group.rank + 1) // group.count)


def counts_of(count: int, group: Ranks) -> tuple[int, ...]:
    """Return how many of count items each process takes; see part_of."""
    edges = [count * rank // group.count for rank in range(group.count + 1)]
    return tuple(end - start for start, end in pairwise(edges))


@dataclass(frozen=True)
class Division:
    """How the processes of a group share the images of one step.

    group: the processes; counts: how many images each of them has.
    """

    group: Ranks
    counts: Sequence[int]

    @property
    def whole(self) -> int:
        """The number of images in the step."""
        return sum(self.counts)

    @property
    def most(self) -> int:
        """The largest number of images that a process has."""
        return max(self.counts)

    @property
    def own(self) -> slice:
        """The place of this process's images among those of the step."""
        start = sum(self.counts[: self.group.rank])
        return slice(start, start + self.counts[self.group.rank])

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows (B, ...) of all images of the step, of which each process has those of its own images."""
        if not self.group.several:
            return rows
        found = rows.new_zeros((self.whole, *rows.shape[1:]))
        found[self.own] = rows
        self.group.all_reduce([found])  # exact, because all rows but one are zero
        return found


class GradientSum:
    """Sum the gradients of parameters over the processes of a group, in one exchange.

    Every process ends with the same numbers in ``.grad``. A parameter that has a gradient in some processes only gets
    zeros in the others first; one that has none anywhere stays without.
    """

    def __init__(self, group: Ranks, parameters: Sequence[Tensor]) -> None:
        self._group, self._parameters = group, parameters
        self._summed: list[Tensor] | None = None

    def __call__(self) -> None:
        """Replace the gradients by their sums."""
        if not self._group.several or not self._parameters:
            return
        if self._summed is None:
            # Which parameters have gradients stays the same from step to step.
            has = torch.tensor([float(value.grad is not None) for value in self._parameters])
            self._group.all_reduce([has])
            self._summed = [value for value, some in zip(self._parameters, has.tolist(), strict=True) if some]
        gradients = []
        for value in self._summed:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            gradients.append(value.grad)
        self._group.all_reduce(gradients)


class SharedEncoders(Protocol):
    """Encoders in several processes that sum the gradients of their own weights in their backward pass.

    All processes must encode equally often. An encoder takes part with an empty batch too.
    """

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The weights whose gradients the encoders sum."""

    def last_part(self, last: bool) -> AbstractContextManager[object]:
        """Return a context for a forward and a backward pass. The gradients are summed in the last part of a step."""


def is_part(tensor: Any) -> bool:
    """Return whether this process stores a part of a tensor only (a DTensor of FSDP2)."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def whole_tensor(tensor: Any) -> Tensor:
    """Return a whole tensor. All processes must call this together for a tensor of which each stores a part."""
    found: Tensor = tensor.full_tensor() if is_part(tensor) else tensor
    return found


def own_part(tensor: Any) -> Tensor:
    """Return what this process stores of a tensor, which is the tensor itself unless it stores a part only."""
    found: Tensor = tensor.to_local() if is_part(tensor) else tensor
    return found


def part_like(whole: Tensor, parameter: Any) -> Tensor:
    """Return the part of a whole tensor that this process stores, if it stores a part of the parameter only."""
    if not is_part(parameter) or is_part(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Without a source, every process cuts its part out of its own copy, and nothing is sent.
    found: Tensor = distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    return found


@torch.no_grad()
def take_weights_of_first(module: nn.Module) -> None:
    """Take the trained weights of the first process of the run, except those that processes store in parts.

    All take the same steps, but the processors of two machines may round in different ways.
    """
    group = ranks.current()
    for parameter in module.parameters() if group.several else ():
        if parameter.requires_grad and not is_part(parameter):
            parameter.copy_(group.broadcast_tensor(parameter.detach()))


def whole_weights(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the whole tensors of a module by name. All processes must call this together if some store parts.

    keep: whether this process needs the tensors. Otherwise it returns none of those that it stores in parts.
    """
    weights = {}
    for name, tensor in module.state_dict().items():
        whole = whole_tensor(tensor)
        if keep or whole is tensor:
            weights[name] = whole if whole is tensor else whole.cpu()
    return weights


def load_whole_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load what whole_weights has returned, each process its own parts."""
    own = module.state_dict()
    module.load_state_dict({name: part_like(tensor, own[name]) for name, tensor in weights.items()})
