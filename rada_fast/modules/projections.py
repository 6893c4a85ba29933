"""Use an adapter's projections, which are linear layers that other code may wrap, hook or parametrise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as _is_wrapper

from rada_fast.errors import UserError
from rada_fast.ops.rational_adapter import ProjectionCalls


def is_no_ordinary_tensor(value: object) -> bool:
    """Return whether a tensor stands for others (sharded, quantised), or its class has arithmetic of its own."""
    kind = type(value)
    if kind in (Tensor, nn.Parameter) or not issubclass(kind, Tensor):
        return False
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return bool(_is_wrapper(value)) or function not in _ORDINARY_FUNCTIONS


def is_sharded(value: object) -> bool:
    """Return whether a tensor is a shard from fully_shard or from tensor parallelism."""
    return is_no_ordinary_tensor(value) and hasattr(value, "full_tensor")


_ORDINARY_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]
"""The __torch_function__ of ordinary tensors and parameters. A subclass with another one may compute differently."""


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "module")
"""The attributes in which torch.compile, activation checkpoints, data parallelism and averages keep a module."""


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, also after a later ``reset_parameters`` (meta device, FSDP)."""

    def reset_parameters(self) -> None:
        # This draws random numbers all the same, so later layers start with the values that they have after nn.Linear.
        super().reset_parameters()
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module would call hooks as well: its own, or those registered for all modules."""
    # The conditions are written out for speed: every call of an adapter checks every projection.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def reason_to_call(layer: nn.Module) -> str | None:
    """Return why a projection has to be called as a module, or None where its result is just x W^T + b.

    A fused operator takes the weight W and the bias b themselves. It would skip the forward of a subclass (LoRA) and
    hooks, and it cannot read a weight that is no ordinary tensor (sharded, quantised).
    """
    if reason := _own_forward(layer):
        return reason
    if has_hooks(layer):
        return "has hooks"
    if not has_parametrisations(layer):
        for leaf, value in (("weight", layer.weight), ("bias", layer.bias)):
            if is_no_ordinary_tensor(value):
                return f"has a {leaf} of the type {type(value).__name__}"
    return None


def has_parametrisations(layer: nn.Module) -> bool:
    """Return whether reading the layer's weight or bias computes it (parametrize), which may change its state."""
    return "parametrizations" in layer._modules


def has_bias(layer: nn.Module) -> bool:
    """Return whether a linear layer adds a bias. A parametrised bias is not computed to answer this."""
    parametrised = layer._modules.get("parametrizations")
    if parametrised is not None and "bias" in parametrised._modules:
        return True
    return layer.bias is not None


def tensors_or_calls(layers: Mapping[str, nn.Module], *, bias: bool) -> dict[str, Tensor] | ProjectionCalls:
    """Return every projection's weight and bias by name, or ProjectionCalls where a projection is more than these.

    bias: whether the configuration has biases. A layer that differs from it has to be called too.
    """
    for name, layer in layers.items():
        reason = reason_to_call(layer)
        if reason is None and has_bias(layer) != bias:
            reason = f"has {'no' if bias else 'a'} bias, against the configuration's bias={bias}"
        if reason:

            def project(name: str, rows: Tensor) -> Tensor:
                projected: Tensor = layers[name](rows)
                return projected

            return ProjectionCalls(project, f"{name} {reason}")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        # Replicas, tied and parametrised layers have these attributes, but not always named_parameters. Reading may
        # compute them, so each is read once.
        tensors[f"{name}.weight"] = cast(Tensor, layer.weight)
        if (added := layer.bias) is not None:
            tensors[f"{name}.bias"] = cast(Tensor, added)
    return tensors


def _own_forward(layer: nn.Module) -> str | None:
    kind = type(layer)
    if not isinstance(layer, nn.Linear):
        return f"is a {kind.__name__}, not a torch.nn.Linear"
    if kind.forward is not nn.Linear.forward or kind.__call__ is not nn.Module.__call__ or "forward" in layer.__dict__:
        return f"is a {kind.__name__} with a forward of its own"
    return None


def stored_value(name: str, layer: nn.Module, leaf: str) -> Tensor:
    """Return the weight or bias that a projection computes with, for a file; a parametrised one is computed now.

    Raises UserError, naming the projection, where the projection is more than its weight and bias, or has no values in
    this process.
    """
    for inside in WRAPPED[:2]:
        layer = layer._modules.get(inside) or layer
    if reason := _own_forward(layer):
        raise UserError(
            f"adapter's {name} {reason}: merge it into a torch.nn.Linear before saving (peft: merge_and_unload)"
        )
    if leaf not in layer._parameters and not is_parametrized(layer, leaf):
        raise UserError(
            f"adapter's {name} has a {leaf} that is made anew at every call (torch.nn.utils.weight_norm, prune, "
            "spectral_norm): make it permanent before saving (remove_weight_norm, remove_spectral_norm, prune.remove)"
        )
    with _evaluating(layer):
        value = getattr(layer, leaf)
    if not isinstance(value, Tensor):
        raise UserError(f"adapter's {name} has no {leaf}, which its configuration wants")
    if is_no_ordinary_tensor(value):
        raise UserError(
            f"adapter's {name} has a {leaf} of the type {type(value).__name__}: gather it before saving (full_tensor), "
            "or dequantise it"
        )
    if value.is_meta:
        raise UserError(f"adapter's {name} has a {leaf} on the meta device: {GIVE_VALUES}")
    return value


@contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    """Keep parametrisations from changing their state when they are read, as spectral norm would."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


GIVE_VALUES = "give it values first, by to_empty and reset_parameters, or by load_state_dict(..., assign=True)"
