"""Take a step of a training again in smaller parts where memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rada_fast.system import memory, notices

if TYPE_CHECKING:
    from rada_fast.engine.steps import TrainingStep


def take_with_room(step: TrainingStep, *batch: Any) -> None:
    """Take a step, and where memory runs out before its update, take it again in parts of half as many images.

    The parts stay as small from there on. Nothing else of the failed attempt remains: gradients begin anew, and the
    sums for the record and the random numbers are put back.

    step: takes the steps; batch: the arguments of its take.
    """
    labels: Sequence[Any] = batch[1]
    started: list[bool] = []
    hook = step.optimizer.register_step_pre_hook(lambda *_: started.append(True))
    sums, drawn = step.sums.clone(), _random_states(step.device)
    try:
        while True:
            part = min(step.micro_batch or len(labels), len(labels))
            try:
                step.take(*batch)
                return
            except Exception as error:
                # Other processes would wait for the parts that they expect of this one.
                final = part <= 1 or bool(started) or step.group.several
                if final or not memory.is_lack_of_memory(error):
                    raise
            step.micro_batch = part // 2
            memory.free_unused()
            step.sums.copy_(sums)
            _set_random_states(step.device, drawn)
            notices.warn(
                f"the memory did not suffice for {part} images of a step at once; from here on it is {part // 2}, "
                "which rounds the sums of gradients in another way"
            )
    finally:
        hook.remove()


def _random_states(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
