"""Optimise the parameters of many episodes' adapters by AdamW, Adam or SGD, with one launch for a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from rada_fast.config.method import OptimizerName
from rada_fast.ops._backends.choice import resolve_device_backend
from rada_fast.ops._backends.transforms import under_transform

_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


def episodic_optimizer_step(
    parameters: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    sources: Sequence[Tensor | None],
    fresh: Sequence[bool],
    *,
    name: OptimizerName,
    step: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
    torch_roots: bool = False,
    copies: Sequence[Tensor | None] | None = None,
    last: bool = False,
    backend: str | None = None,
) -> None:
    """Take one optimiser step on a list of tensors, in place and in one pass; EpisodicOptimizer keeps the lists.

    For a parameter p with gradient g, moments m and v, step t and weight decay wd:

        adamw: p *= 1 - lr wd        adam, sgd: g += wd p
        m = lerp(m, g, 1 - beta1);  v = beta2 v + (1 - beta2) g g
        p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        sgd: m = momentum m + g;  p -= lr m

    parameters: any shapes, float32, contiguous; written.
    first_moments, second_moments: the parameter's shape, float32, contiguous; written. A tensor is empty (no elements)
        where the rule keeps no such moment (SGD's buffer is a first moment), or where the moment is zero and stays
        zero: the gradient is None, and no weight decay is added to it.
    gradients: the parameter's shape, float32|bfloat16|float16, contiguous; None is a gradient of exact zeros.
    sources: None, or a tensor that is read in place of the parameter: float32, contiguous. The parameter then holds a
        whole number of copies of it, one after the other.
    fresh: whether the moments are zero. They are then written but not read, and may be uninitialised.
    step: t, counted from 1. The host passes this number, so a captured CUDA graph repeats the step at which it was
        captured: capture the steps of an episode in their order.
    torch_roots: take Adam's square roots from PyTorch, which on a CPU may call a library that rounds the last bit
        differently. Every bit then equals torch.optim's, at about twice the time.

    copies: None, or for each parameter None or a tensor of its shape, bfloat16 and contiguous, into which the new
        values are written too.
    last: whether neither the moments nor a parameter that has a copy are read again. They may then be left as they are,
        which saves writing them.

    Returns nothing. Raises ValueError or TypeError naming the argument, BackendUnavailableError where a named backend
    cannot serve. Every operation rounds as in torch.optim's single-tensor form (foreach=False) on a CPU, also for CUDA
    tensors; square roots are correctly rounded.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"name must be one of {', '.join(map(repr, get_args(OptimizerName)))}, got {name!r}")
    if not len(parameters) == len(first_moments) == len(second_moments) == len(gradients) == len(sources) == len(fresh):
        raise ValueError("moments, gradients, sources and fresh must have an entry for each parameter")
    if copies is None:
        copies = [None] * len(parameters)
    if len(copies) != len(parameters):
        raise ValueError("copies must have an entry for each parameter")
    for index, copy in enumerate(copies):
        if copy is not None and copy.dtype != torch.bfloat16:
            raise TypeError(f"copies[{index}] must be contiguous bfloat16, got {copy.dtype}")
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if not parameters:
        return
    given = {"parameters": parameters, "first_moments": first_moments, "second_moments": second_moments}
    for label, tensors in (given | {"sources": sources}).items():
        _check_float32(label, tensors)
    device = parameters[0].device
    match resolve_device_backend(device, backend):
        case "reference":
            from rada_fast.reference.episodic_optimizer import episodic_optimizer_step as reference

            rule = partial(
                reference, rule=name, step=step, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps,
                momentum=momentum,
            )  # fmt: skip
            lists = (parameters, first_moments, second_moments, gradients, sources, fresh, copies)
            for values in zip(*lists, strict=True):
                _reference_step(_Entry(*values), rule)
        case _:
            for index, gradient in enumerate(gradients):
                if gradient is not None and gradient.dtype not in _GRADIENTS:
                    raise TypeError(f"gradients[{index}] must be float32, bfloat16 or float16, got {gradient.dtype}")
            nothing = parameters[0].new_empty(0, dtype=torch.bfloat16)
            torch.ops.rada_fast.episodic_optimizer_step(
                parameters, first_moments, second_moments, gradients, sources, fresh,
                name, step, lr, weight_decay, *betas, eps, momentum, torch_roots,
                [nothing if copy is None else copy for copy in copies], last,
            )  # fmt: skip


def prepared_optimizer_step(
    parameters: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    *,
    name: OptimizerName,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
) -> Callable[[Sequence[Tensor], int, float], None]:
    """Return a function that takes steps on CPU tensors of one training, whose checks and lists are made once.

    The function takes the gradients, contiguous and in the order of the parameters, the step t, and the learning rate.
    It calls the compiled operator directly.

    Equivalent to episodic_optimizer_step with these arguments, no sources, and moments that are not fresh.
    """
    for label, tensors in (("parameters", parameters), ("moments", [*first_moments, *second_moments])):
        _check_float32(label, tensors)
    nothing = parameters[0].new_empty(0, dtype=torch.bfloat16)
    lists = (list(parameters), list(first_moments), list(second_moments))
    sources, fresh, copies = ([value] * len(parameters) for value in (None, False, nothing))
    operator = torch.ops.rada_fast.episodic_optimizer_step.default

    def step(gradients: Sequence[Tensor], number: int, lr: float) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            operator(
                *lists, gradients, sources, fresh, name, number, lr, weight_decay, *betas, eps, momentum, False, copies,
                False,
            )  # fmt: skip

    return step


def _check_float32(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise TypeError unless all tensors are float32: eps is 0 in float16, and small steps are lost in bfloat16 too."""
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(
                f"{name}[{index}] must be contiguous float32, got {tensor.dtype}: keep a float32 copy of what is "
                "trained"
            )


class _Entry(NamedTuple):
    """Hold one parameter's entries in the lists that episodic_optimizer_step takes, in their order."""

    parameter: Tensor
    first_moment: Tensor
    second_moment: Tensor
    gradient: Tensor | None
    source: Tensor | None
    fresh: bool
    copy: Tensor | None


def _reference_step(entry: _Entry, rule: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Update one parameter and its moments in place with the reference's rule."""
    parameter, moments = entry.parameter, (entry.first_moment, entry.second_moment)
    shape, source = parameter.shape, entry.source
    if source is not None:
        # The parameter's elements are whole copies of the source, one after the other, whatever the two shapes are.
        copies = parameter.numel() // max(source.numel(), 1)
        source = source.reshape(1, -1).expand(copies, -1).reshape(shape)
    results = rule(
        parameter if source is None else source,
        None if entry.gradient is None else entry.gradient.reshape(shape),
        *(None if entry.fresh or not moment.numel() else moment for moment in moments),
    )
    for target, value in zip((parameter, *moments), results, strict=True):
        if value is not None and target.numel():
            target.copy_(value)
    if entry.copy is not None:
        entry.copy.copy_(parameter)


@dataclass
class _Slot:
    """Hold one parameter of all episodes.

    initial: the initial values, stored once and never written.
    shared: one copy for all episodes, which only weight decay has changed.
    own: the episodes' own copies, (E, ...).
    current: "initial", "shared" or "own", whichever of the three holds the values now.
    first, second: the moments, (E, ...); fresh: whether they are zero, whatever their memory holds.
    frozen: whether the parameter never changes.
    copies: for each of "initial", "shared" and "own" a copy in bfloat16, if there is one.
    """

    initial: Tensor
    current: str
    fresh: bool
    shared: Tensor | None = None
    own: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    frozen: bool = False
    copies: dict[str, Tensor] = field(default_factory=dict)


class EpisodicOptimizer:
    """AdamW, Adam or SGD for E episodes that all start from the same parameters, each with its own moments.

    A parameter is stored once for all episodes until a gradient reaches it. The first step reads this one copy and
    writes every episode's own, so starting an episode copies nothing and ``reset`` is free. A parameter whose gradient
    is None (exactly zero) stays shared, and weight decay changes one copy of it. Until a parameter has a gradient, its
    moments are zero and take no memory.

    ::

        optimizer = EpisodicOptimizer(dict(adapter.named_parameters()), episodes=8, lr=8e-4)
        for images in loader:
            optimizer.reset()
            for _ in range(3):
                gradients = loss_gradients(optimizer.parameters, images)
                optimizer.step(gradients)
            predict(optimizer.parameters, images)

    initial: name to tensor of any shape, float32, all on one device. It is read at the first step of every episode and
        never written, so a change to it takes effect after the next reset. A tensor that is not contiguous is copied,
        and float16 or bfloat16 is copied to float32, the type of all parameters, moments and steps. A
        torch.nn.Parameter whose requires_grad is False stays as it is.
    episodes: E, at least 1.
    name: "adamw", "adam" or "sgd"; weight decay is decoupled in adamw, added to the gradient in the others.
    lr, weight_decay, betas, eps, momentum: as in torch.optim. lr may be changed between steps.
    torch_roots: see episodic_optimizer_step.
    dtype: the type of the copies that ``values`` gives, float32 or bfloat16. The parameters, moments and steps are
        float32 all the same, and a step writes the copies beside the parameters.
    backend: None for the one in force (see use_backend), or a backend's name.

    Raises ValueError or TypeError naming the argument.
    Equivalent, for each episode, to ``torch.optim.AdamW([p.clone() for p in initial.values()], ..., foreach=False)``
    with zeros in the place of gradients that are None; on a CPU the moments and all of SGD bit for bit, Adam's and
    AdamW's parameters with ``torch_roots`` or where PyTorch's square roots are correctly rounded.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        episodes: int,
        name: OptimizerName = "adamw",
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
        torch_roots: bool = False,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"dtype must be float32 or bfloat16, got {dtype}")
        if name not in get_args(OptimizerName):
            raise ValueError(f"name must be one of {', '.join(map(repr, get_args(OptimizerName)))}, got {name!r}")
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        for label, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps), ("momentum", momentum)):
            if not value >= 0:
                raise ValueError(f"{label} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if momentum and name != "sgd":
            raise ValueError(f"momentum is SGD's, got {momentum} with {name!r}")
        self._slots: dict[str, _Slot] = {}
        for key, tensor in initial.items():
            if tensor.dtype not in _GRADIENTS:
                raise TypeError(
                    f"initial[{key!r}] must be float32, got {tensor.dtype} (bfloat16 and float16 are copied)"
                )
            with torch.inference_mode(False):
                # Tensors from inference mode take no part in autograd, for which the parameters are meant.
                start = tensor.clone() if tensor.is_inference() else tensor.detach()
                slot = _Slot(start.float().contiguous(), "initial", True)
            slot.frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
            self._slots[key] = slot
        if len({slot.initial.device for slot in self._slots.values()}) > 1:
            raise ValueError("initial must be on one device")
        self.episodes, self.name = episodes, name
        self.lr, self.weight_decay, self.betas, self.eps, self.momentum = lr, weight_decay, betas, eps, momentum
        self.torch_roots, self.dtype, self.backend = torch_roots, dtype, backend
        self.steps = 0
        """Steps taken since the reset."""
        self._ended = False
        if dtype != torch.float32:
            for slot in self._slots.values():
                slot.copies["initial"] = slot.initial.to(dtype)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Return each parameter by name, (E, ...), for reading.

        A tensor is the episodes' own storage, or before they have one a single copy expanded with stride 0 along E.
        The next step may write into these tensors: read this property again after it.
        """
        if self._ended and self.dtype != torch.float32:
            raise RuntimeError("the last step has written values alone: read those, or call reset")
        return {key: self._all_episodes(slot, getattr(slot, slot.current)) for key, slot in self._slots.items()}

    @property
    def values(self) -> dict[str, Tensor]:
        """Return each parameter by name, (E, ...), in the optimiser's dtype, with the cautions of ``parameters``."""
        if self.dtype == torch.float32:
            return self.parameters
        return {key: self._all_episodes(slot, slot.copies[slot.current]) for key, slot in self._slots.items()}

    def _all_episodes(self, slot: _Slot, value: Tensor) -> Tensor:
        return value if slot.current == "own" else value.expand(self.episodes, *value.shape)

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self) -> None:
        """Return every episode to the initial parameters and zero moments. It keeps the memory.

        It launches nothing for float32. For bfloat16 it converts the initial parameters, which takes one launch.
        """
        self.steps, self._ended = 0, False
        for slot in self._slots.values():
            slot.current, slot.fresh = "initial", True
        if self.dtype != torch.float32 and self._slots:
            slots = self._slots.values()
            torch._foreach_copy_([slot.copies["initial"] for slot in slots], [slot.initial for slot in slots])

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor | None], *, last: bool = False) -> None:
        """Take one step. A gradient that is None or missing is exactly zero for every episode.

        gradients: name to (E, ...), float32|bfloat16|float16, any stride.
        last: promises that no other step follows before the next reset, so that no moments need to be written. With
            copies in bfloat16, only ``values`` can be read then.
        Raises ValueError or TypeError naming a gradient that belongs to no parameter or does not fit it; no parameter
        has changed then.
        """
        if under_transform():
            raise RuntimeError(
                "EpisodicOptimizer.step writes into its parameters, which transforms of torch.func (vmap, grad, ...) "
                "and forward mode do not go through: call it outside"
            )
        if self._ended:
            raise RuntimeError("the last step has been taken: call reset before another one")
        if unknown := set(gradients) - set(self._slots):
            raise ValueError(f"gradients hold {sorted(unknown)[0]!r}, which is no parameter")
        for key, gradient in gradients.items():
            if gradient is None:
                continue
            if self._slots[key].frozen:
                raise ValueError(f"gradients[{key!r}] must be None: the parameter is frozen (requires_grad False)")
            initial = self._slots[key].initial
            expected = (self.episodes, *initial.shape)
            if tuple(gradient.shape) != expected:
                raise ValueError(f"gradients[{key!r}] must be {expected}, got {tuple(gradient.shape)}")
            if gradient.dtype not in _GRADIENTS:
                raise TypeError(f"gradients[{key!r}] must be float32, bfloat16 or float16, got {gradient.dtype}")
            if gradient.layout != torch.strided:
                raise TypeError(f"gradients[{key!r}] must be dense, got {gradient.layout}")
            if gradient.device != initial.device:
                raise ValueError(f"gradients[{key!r}] must be on {initial.device}, got {gradient.device}")
        self.steps, self._ended = self.steps + 1, last
        entries: list[_Entry] = []
        for key, slot in self._slots.items():
            if slot.frozen:
                continue
            gradient = gradients.get(key)
            entry = self._entry(slot, None if gradient is None else gradient.detach().contiguous())
            if entry is not None:
                entries.append(entry)
        if not entries:
            return
        episodic_optimizer_step(
            parameters=[entry.parameter for entry in entries],
            first_moments=[entry.first_moment for entry in entries],
            second_moments=[entry.second_moment for entry in entries],
            gradients=[entry.gradient for entry in entries],
            sources=[entry.source for entry in entries],
            fresh=[entry.fresh for entry in entries],
            copies=[entry.copy for entry in entries], last=last,
            name=self.name, step=self.steps, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas,
            eps=self.eps, momentum=self.momentum, torch_roots=self.torch_roots, backend=self.backend,
        )  # fmt: skip

    def _entry(self, slot: _Slot, gradient: Tensor | None) -> _Entry | None:
        """Return the tensors that a step reads and writes for one parameter, or None where it changes nothing.

        It allocates storage that is missing, and sets slot.current to the storage that the step writes.
        """
        nothing = slot.initial.new_empty(0)
        decoupled = self.name == "adamw"
        moments = 2 if self.name != "sgd" else int(self.momentum != 0)
        source = {"initial": slot.initial, "shared": slot.shared, "own": None}[slot.current]
        # Zero moments stay zero under a zero gradient, and all episodes still have the same values.
        stays_zero = decoupled or self.weight_decay == 0 or not moments
        if gradient is None and slot.current != "own" and stays_zero:
            if self.lr * self.weight_decay == 0:
                return None
            if slot.shared is None:
                slot.shared = torch.empty_like(slot.initial)
            slot.current = "shared"
            if source is slot.shared:
                source = None
            return _Entry(slot.shared, nothing, nothing, None, source, True, self._copy(slot, slot.shared))
        if slot.own is None:
            slot.own = slot.initial.new_empty((self.episodes, *slot.initial.shape))
            slot.first = torch.empty_like(slot.own) if moments else nothing
            slot.second = torch.empty_like(slot.own) if moments > 1 else nothing
        assert slot.first is not None
        assert slot.second is not None
        fresh, slot.fresh, slot.current = slot.fresh, False, "own"
        return _Entry(slot.own, slot.first, slot.second, gradient, source, fresh, self._copy(slot, slot.own))

    def _copy(self, slot: _Slot, value: Tensor) -> Tensor | None:
        """Return the memory of the copy of what a step writes, or None where no copy is wanted."""
        if self.dtype == torch.float32:
            return None
        if slot.current not in slot.copies:
            slot.copies[slot.current] = torch.empty_like(value, dtype=self.dtype)
        return slot.copies[slot.current]
