"""Optimisers for training: one pass over all parameters on a CPU, and no host value in a step on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from rada_fast.config.method import OptimizerName
from rada_fast.engine.sharing import is_part, part_like, whole_tensor
from rada_fast.ops import backends, episodic_optimizer_step
from rada_fast.ops.episodic_optimizer import prepared_optimizer_step


class OnePassOptimizer(Optimizer):
    """AdamW, Adam or SGD that updates all parameters in one call of the compiled operator.

    PyTorch's fused optimisers start their threads anew for each parameter. Here, they are started once in a step, which
    matters most where other programs use the cores too.

    params: float32 parameters on one CPU, contiguous.
    name: the kind of optimiser; weight decay is decoupled in adamw and added to the gradient in the others.
    lr, weight_decay, betas, eps, momentum: as in torch.optim; only SGD uses the momentum, and the others the betas.

    Equivalent to ``torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, foreach=False)`` and the like.
    """

    _prepared: _Prepared | None = None

    def __init__(
        self,
        params: Iterable[Tensor],
        name: OptimizerName,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(params, {"name": name, **options})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in ``.grad``; a parameter without a gradient stays as it is."""
        loss, self._prepared = None, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters may have taken different numbers of steps, if some had no gradient at first.
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(int(self.state[parameter].get("step", 0)) + 1, []).append(parameter)
            for step, parameters in by_step.items():
                self._take(group, step, parameters)
        return loss

    def update(self, gradients: Sequence[Tensor]) -> None:
        """Take one step with gradients that are given, without a look at ``.grad`` and without PyTorch's hooks.

        There must be a single group of parameters, of whose options only the learning rate may change between steps.

        gradients: one for each parameter, contiguous.
        """
        if self._prepared is None:
            parameters = self.param_groups[0]["params"]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.step()
            for parameter in parameters:
                parameter.grad = None
            self._prepared = self._prepare()
            return
        take, states, group = self._prepared
        number = states[0]["step"] + 1
        take(gradients, number, group["lr"])
        for state in states:
            state["step"] = number

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._prepared = None
        super().load_state_dict(state_dict)

    def _prepare(self) -> _Prepared | None:
        """Return what the coming steps of update have in common, or None if not all parameters are at the same step."""
        group = self.param_groups[0]
        parameters = group["params"]
        states = [self.state[parameter] for parameter in parameters]
        if any(state["step"] != states[0]["step"] for state in states):
            return None
        first, second = self._moments(group, parameters)
        fixed = {key: group[key] for key in ("name", "weight_decay", "betas", "eps", "momentum")}
        return _Prepared(prepared_optimizer_step(parameters, first, second, **fixed), states, group)

    def _moments(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the first and the second moments of parameters, zeros at first and empty where the rule has none."""
        names = {"sgd": ("momentum_buffer",) if group["momentum"] else ()}.get(group["name"], ("exp_avg", "exp_avg_sq"))
        nothing = parameters[0].new_empty(0)
        moments = []
        for parameter in parameters:
            state = self.state[parameter]
            if len(state) == 0:
                state.update({key: torch.zeros_like(parameter) for key in names})
            moments.append([*(state[key] for key in names), nothing, nothing])
        return [own[0] for own in moments], [own[1] for own in moments]

    def _take(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        first, second = self._moments(group, parameters)
        for parameter in parameters:
            self.state[parameter]["step"] = step
        episodic_optimizer_step(
            parameters,
            first,
            second,
            [parameter.grad.contiguous() for parameter in parameters if parameter.grad is not None],
            [None] * len(parameters),
            [step == 1] * len(parameters),
            name=group["name"], step=step, lr=group["lr"], weight_decay=group["weight_decay"], betas=group["betas"],
            eps=group["eps"], momentum=group["momentum"],
        )  # fmt: skip


class _Prepared(NamedTuple):
    """What steps have in common that are taken with the same parameters.

    take: takes a step; see prepared_optimizer_step.
    states: the state of each parameter, which counts its steps.
    group: the group of the parameters, which has the learning rate.
    """

    take: Callable[[Sequence[Tensor], int, float], None]
    states: list[dict[str, Any]]
    group: dict[str, Any]


def training_optimizer(
    parameters: Iterable[Tensor], name: OptimizerName, *, lr: float, weight_decay: float, momentum: float = 0.0
) -> Optimizer:
    """Make the fastest optimiser of a kind for the parameters of a training.

    It is OnePassOptimizer for float32 on a CPU with the compiled operators, and otherwise one of PyTorch's. On
    a GPU the learning rate is a tensor, so that a captured CUDA graph reads the present one; see set_rate. Parameters
    of which a process stores parts are in groups of their own, because no operator takes them together with others.

    parameters: the parameters to train, at least one, on one device.
    name: the kind of optimiser.
    lr: the learning rate at the start.
    weight_decay: the factor of weight decay, decoupled in adamw and added to the gradient in the others.
    momentum: the momentum of SGD; the other kinds do not use it.
    """
    parameters = list(parameters)
    device = parameters[0].device
    momentum = momentum if name == "sgd" else 0.0
    if any(map(is_part, parameters)):
        groups = [{"params": list(alike)} for _, alike in groupby(parameters, key=is_part)]
        if name == "sgd":
            return SGD(groups, lr=lr, weight_decay=weight_decay, momentum=momentum, foreach=True)
        return (AdamW if name == "adamw" else Adam)(groups, lr=lr, weight_decay=weight_decay, foreach=True)
    plain = all(value.dtype == torch.float32 and value.is_contiguous() for value in parameters)
    if device.type == "cpu" and plain and backends()["cpu"] == "usable":
        return OnePassOptimizer(parameters, name, lr=lr, weight_decay=weight_decay, momentum=momentum)
    on_device = device.type == "cuda"
    optimizer: Optimizer
    if name == "sgd":
        optimizer = SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, fused=on_device)
    else:
        kind = AdamW if name == "adamw" else Adam
        optimizer = kind(parameters, lr=lr, weight_decay=weight_decay, fused=True, capturable=on_device)
        # PyTorch would warn that the first step, which comes before the capture, is not captured.
        optimizer._warned_capturable_if_run_uncaptured = True
    if on_device:
        for group in optimizer.param_groups:
            # PyTorch would check a tensor's value, for which it would have to wait for the device.
            group["lr"] = torch.full((), lr, device=device)
    return optimizer


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of an optimiser. A rate that is a tensor is written in place, without any wait."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate
            continue
        device = group["params"][0].device
        if group["lr"].device != device:
            # The state of an earlier run was loaded to the CPU.
            group["lr"] = group["lr"].to(device)
        group["lr"].fill_(rate)


def stored_state(optimizer: Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """Return the state of an optimiser for a file: whole tensors, in the order of the parameters.

    All processes must call this together if each of them stores parts. keep: whether this process needs the state.
    """
    state = optimizer.state_dict()
    stored: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        whole = {name: whole_tensor(value) for name, value in values.items()}
        stored[number] = {
            name: value.cpu() if is_part(values[name]) else value
            for name, value in whole.items()
            if keep or not is_part(values[name])
        }
    first, *others = state["param_groups"]
    numbers = [number for group in (first, *others) for number in group["params"]]
    return {"state": stored, "param_groups": [{**first, "params": numbers}]}


def load_stored_state(optimizer: Optimizer, stored: dict[str, Any]) -> None:
    """Go on from what stored_state has returned for the same parameters, perhaps of another kind of optimiser.

    The kinds that training_optimizer makes hold the same moments. They differ in how they count steps, and in options
    of the groups, which stay those of this optimiser.
    """
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[int, dict[str, Any]] = {}
    for number, values in stored["state"].items():
        found[number] = {}
        for name, value in values.items():
            if name == "step":
                step = float(value)
                found[number][name] = int(step) if isinstance(optimizer, OnePassOptimizer) else torch.tensor(step)
            elif isinstance(value, Tensor):
                found[number][name] = part_like(value, parameters[number])
            else:
                found[number][name] = value
    optimizer.load_state_dict({"state": found, "param_groups": own["param_groups"]})
