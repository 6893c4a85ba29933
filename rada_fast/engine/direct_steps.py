"""Take the steps of an adapter's training on a CPU by four compiled operators, with as little Python as possible.

A step at B 1 and K 50 takes less than 2 ms. Everything beside the operators runs from cold caches then, because a step
moves more bytes than they hold, and takes three times as long as in a loop of its own. So whatever can be settled once
is settled here before the first step, and the sums for the record of an epoch are made for many steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rada_fast.engine.optimizers import OnePassOptimizer
from rada_fast.ops import PreparedAdapter
from rada_fast.ops.prediction_losses import unchecked_cross_entropy

STEPS_HELD, LOGITS_HELD = 256, 2**18
"""The results of so many steps, or so many logits, wait until they are summed up."""


class DirectStep:
    """Take steps on whole batches of features, without autograd and without ``.grad``.

    A step has the bits of the same calls through autograd and ``optimizer.step()``.

    adapter: computes logits, penalty and gradients.
    optimizer: the optimiser, whose parameters are those that are trained.
    trained: the tensors that are trained, in the order of the adapter's gradients.
    dpenalty: the weight of the penalty in the loss, (), or None for 0.
    """

    def __init__(
        self, adapter: PreparedAdapter, optimizer: OnePassOptimizer, trained: Sequence[Tensor], dpenalty: Tensor | None
    ) -> None:
        self._adapter, self._optimizer, self._dpenalty = adapter, optimizer, dpenalty
        places = {id(parameter): place for place, parameter in enumerate(trained)}
        order = [places[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
        self._order = None if order == list(range(len(order))) else order
        # Cross-entropy (1,), penalty (), logits (B, K) and labels (B,) of the last steps.
        self._held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._room = LOGITS_HELD

    def __call__(self, features: Tensor, labels: Tensor, totals: Tensor) -> None:
        """Take a step, and add to the sums (3,) what waits, if that is much; see add_to.

        features: (B, D); labels: (B,).
        """
        output, pullback = self._adapter(features)
        logits, penalty = output.logits, output.penalty
        entropy, dlogits = unchecked_cross_entropy(logits, labels)
        gradients = pullback(dlogits, self._dpenalty)
        if self._order is not None:
            gradients = [gradients[place] for place in self._order]
        self._optimizer.update(gradients)
        assert penalty is not None
        self._held.append((entropy, penalty, logits, labels))
        self._room -= logits.numel()
        if self._room < 0 or len(self._held) == STEPS_HELD:
            self.add_to(totals)

    def add_to(self, totals: Tensor) -> None:
        """Add what waits to the sums (3,) of cross-entropies, penalties and right answers over images, float64."""
        if (waiting := self.waiting()) is not None:
            self._held, self._room = [], LOGITS_HELD
            totals += summed_up(waiting)

    def waiting(self) -> dict[str, Tensor] | None:
        """Return what waits to be summed up, the results of all steps in tensors, or None if nothing waits."""
        if not self._held:
            return None
        entropies, penalties, logits, labels = zip(*self._held, strict=True)
        return {
            "entropies": torch.cat(entropies), "penalties": torch.stack(penalties), "logits": torch.cat(logits),
            "labels": torch.cat(labels), "counts": torch.tensor([len(own) for own in labels]),
        }  # fmt: skip

    def wait_for(self, waiting: Mapping[str, Tensor]) -> None:
        """Let what waiting() has returned wait again, as it did."""
        counts = waiting["counts"].tolist()
        parts = (waiting["entropies"].split(1), waiting["penalties"].unbind(), waiting["logits"].split(counts))
        self._held = list(zip(*parts, waiting["labels"].split(counts), strict=True))
        self._room = LOGITS_HELD - waiting["logits"].numel()


def summed_up(waiting: Mapping[str, Tensor]) -> Tensor:
    """Return the sums (3,) of what DirectStep.waiting has returned; see DirectStep.add_to."""
    counts = waiting["counts"].double()
    correct = (waiting["logits"].argmax(dim=-1) == waiting["labels"]).sum()
    return torch.stack([
        (waiting["entropies"] * counts).sum(), (waiting["penalties"] * counts).sum(), correct
    ])  # fmt: skip


def direct_step(
    call: Callable[..., object], optimizer: Optimizer, trained: Sequence[Tensor], dpenalty: Tensor | None
) -> DirectStep | None:
    """Return what takes the steps directly, or None where the compiled operators for a CPU do not serve them.

    call: what computes the adapter; the other arguments are those of DirectStep.
    """
    if not isinstance(call, PreparedAdapter) or call.backend != "cpu" or not isinstance(optimizer, OnePassOptimizer):
        return None
    groups = optimizer.param_groups
    if len(groups) != 1 or {id(own) for own in groups[0]["params"]} != {id(own) for own in trained}:
        return None
    return DirectStep(call, optimizer, trained, dpenalty)
