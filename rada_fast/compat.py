"""Help users of the published code: this offers its attention class, and patches live published models in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from rada_fast import _env
from rada_fast.config.method import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules.projections import ZeroLinear, tensors_or_calls
from rada_fast.modules.published import ARGUMENTS, PROJECTIONS, adapter_config, projections_of, reason_against
from rada_fast.ops import rational_adapter, under_transform
from rada_fast.reference.class_attention import attention_probabilities
from rada_fast.reference.rational_projections import split_heads


class SimpleMultiheadAttention(nn.Module):
    """The published code's attention module: its constructor, forward signature, parameter names and initial values.

    embed_dim: the width D.
    num_heads: the number of heads H.
    t: the temperature.
    dropout: the probability of dropping an element of the attention maps while training.
    batch_first: accepted and ignored, as in the published code.
    bias: whether the projections have biases.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        t: float,
        dropout: float = 0.0,
        batch_first: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.temprature = t  # the published spelling
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first
        for name in PROJECTIONS:
            kind = ZeroLinear if name == "out_proj" else nn.Linear
            self.add_module(name, kind(embed_dim, embed_dim, bias=bias))

    def forward(
        self,
        query1: Tensor,
        query2: Tensor,
        query3: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mask offset A (B, K, D) and the first query's attention map (B, H, K, K).

        The inputs may be any tensors (B, K, D). Where they come from features, forward_features is faster.
        """
        sources = {"q_proj1": query1, "q_proj2": query2, "q_proj3": query3, "k_proj": key, "v_proj": value}
        query1, query2, query3, keys, values = (
            split_heads(self.get_submodule(name)(rows), self.num_heads) for name, rows in sources.items()
        )  # (B, H, K, d)
        num_classes = keys.shape[-2]
        maps = []
        for query in (query1, query2, query3):
            scores = query @ keys.mT / self.head_dim**0.5  # (B, H, K, K)
            if attn_mask is not None:
                scores = scores + attn_mask
            maps.append(self.dropout(attention_probabilities(scores / self.temprature, "matrix", num_classes)))
        attended = ((maps[0] + maps[1] + maps[2]) / 3) @ values  # (B, H, K, d)
        output: Tensor = self.get_submodule("out_proj")(attended.transpose(-3, -2).flatten(-2))  # (B, K, D)
        return output, maps[0]

    def forward_features(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the mask (B, K, D) from unit-norm features, through the backend in force.

        image_features: (B, D); text_features: (K, D); logit_scale: the multiplier s. Raises ValueError while dropout is
        active, because only forward applies it.
        """
        if self.training and self.dropout.p > 0:
            raise ValueError(f"dropout {self.dropout.p} is applied by forward alone: call eval() first, or forward")
        layers = dict(_layers(self))
        width, bias = self.embed_dim, getattr(layers["out_proj"], "bias", None) is not None
        config = AdapterConfig(width, self.num_heads, temperature=float(self.temprature), bias=bias)
        projections = tensors_or_calls(layers, bias=bias)
        output = rational_adapter(image_features, text_features, logit_scale, projections, config, return_mask=True)
        assert output.mask is not None
        return output.logits, output.mask


def patch(model: nn.Module) -> list[str]:
    """Serve the rational adapters inside a live published model through rada_fast's backends.

    Every module with the published projections gets a class with a new forward. Its parameters, buffers and hooks stay
    the same objects, so an optimiser keeps working; copies, pickles and replicas are patched too. The published model
    repeats its features for every image and class; the patched forward takes one row for each image and each class. On
    every call it verifies that this computes what the module's own forward would. Where it does not, or where that
    cannot be decided, the module's own forward runs, with a warning the first time. These cases are:

    - a projection that is more than its weight and bias (LoRA, hooks, sharded weights);
    - a module whose parameters, children or forward are not the published ones. Its own forward is tried on random
      weights, once for every shape and again whenever an attribute of it or of its class has changed;
    - an attention mask, active dropout, an empty batch;
    - inputs that are not one row for each image, one row for each class and their product, for instance text features
      that depend on the image;
    - inputs whose gradients do not flow to these two features alone;
    - without a warning, a call that is recorded (torch.compile, torch.jit.trace, CUDA graphs) or transformed by
      torch.func, since its values cannot be compared.

    Gradients reach the features from which the inputs are computed, but not the products in between. If you need the
    gradients of these products (autograd.grad, retain_grad), unpatch the model.

    The second value that a patched adapter returns is None: it is an attention map that no published model uses.

    model: any module that holds a published adapter, at any depth. Returns the names of the patched modules. A module
    that is patched already stays patched. Raises UserError where the model holds no adapter.
    """
    found = list(_adapters(model))
    if not found:
        raise UserError(
            f"model must hold a published rational adapter (q_proj1 ... out_proj), {type(model).__name__} has none"
        )
    names = []
    for name, module in found:
        if "forward" in module.__dict__:
            # An instance's own forward takes precedence over its class's, so the patched forward would never run.
            warnings.warn(
                f"rada_fast leaves the adapter {name!r} to its own forward: it was replaced on the instance",
                stacklevel=2,
            )
            continue
        if isinstance(module, _Patched):
            module.__dict__.pop(_OFF, None)
        else:
            module.__class__ = _patched_class(cast(Any, type(module)))
            # This caches what is known about the module. Data parallelism makes new replicas at every call, which share
            # it.
            module.__dict__[_STATE] = {}
        names.append(name)
    return names


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched adapter inside a model its own forward back. Returns the names of these adapters."""
    names = []
    for name, module in _adapters(model):
        if not isinstance(module, _Patched) or _OFF in module.__dict__:
            continue
        kind = type(module)
        if kind.__bases__[0] is _Patched:
            module.__class__ = kind.__bases__[1]
            del module.__dict__[_STATE]
        else:  # Another library has derived a class of its own from the patched one.
            module.__dict__[_OFF] = True
        names.append(name)
    return names


def _adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)  # Compiled code has no forward to replace.
        if not scripted and hasattr(module, "temprature") and len(_layers(module)) == len(PROJECTIONS):
            yield name, module


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in projections_of(module).items() if layer is not None}


_STATE, _OFF = "_rada_fast_state", "_rada_fast_off"


@cache
def _patched_class(kind: type) -> Any:
    """Return a subclass with the patched forward and the name of the class."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Patched, kind), names)


def _new_patched(kind: type) -> Any:
    """Return an empty patched module, for unpickling and copying."""
    return object.__new__(_patched_class(kind))


def _own_forward(kind: type) -> Any:
    """Return the forward that a patched class replaces, as a function of the module and its arguments."""
    above = kind.__mro__[kind.__mro__.index(_Patched) + 1]
    return above.forward  # type: ignore[attr-defined]


def _is_recorded() -> bool:
    """Return whether calls are recorded (torch.jit.trace, make_fx, CUDA graphs), to be replayed with other values."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or _env.is_capturing()
    )


class _Patched:
    """The base of patched modules, whose forward takes the published arguments and returns the mask offset."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        if kind.__bases__[0] is not _Patched:
            return super().__reduce_ex__(protocol)
        # The class is created at run time, so its base class is stored instead. The module's cached state contains
        # functions, which cannot be pickled; the copy builds it again.
        return _new_patched, (kind.__bases__[1],), {**self.__dict__, _STATE: {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = cast(nn.Module, self)
        own = super().forward  # type: ignore[misc]
        # While a call is traced or transformed, its inputs have no values that could be compared.
        if torch.compiler.is_compiling() or under_transform() or _is_recorded() or _OFF in module.__dict__:
            return own(*args, **kwargs)
        names = [name for name in ARGUMENTS if name != "query3" or "q_proj1" in module._modules]
        given = dict(zip(names, args, strict=False)) | kwargs
        state = module.__dict__[_STATE]
        reason: str | None = "it is called with other arguments than the published module"
        if len(args) <= len(names):
            reason = reason_against(module, _own_forward(type(self)), given, state)
        if reason is not None:
            if "warned" not in state:
                state["warned"] = True
                warnings.warn(f"rada_fast leaves this adapter to its own forward: {reason}", stacklevel=2)
            return own(*args, **kwargs)
        # The inputs are already scaled: sqrt(s) f and sqrt(s) T, whose product is s R.
        config = adapter_config(module, input_scale="none", mask_activation="none")
        image, text = given["query1"][:, 0], given["query2"][0]
        projections = tensors_or_calls(_layers(module), bias=config.bias)
        output = rational_adapter(image, text, 1.0, projections, config, return_mask=True)
        assert output.mask is not None
        offset = output.mask - 1
        device = offset.device.type
        if torch.is_autocast_enabled(device):
            offset = offset.to(torch.get_autocast_dtype(device))  # the type of the output projection's own product
        return offset, None
