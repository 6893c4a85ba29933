"""Define what the adapter's operators in C++ and in Triton share: arguments, results and the autograd formula.

Each backend has two registered operators, `<name>` and `<name>_backward`. Their arguments and results are made of the
groups below and of the groups of one backend alone; `arguments_of` and `backward_arguments_of` give the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rada_fast.config.method import ROLES, AdapterConfig, MaskPenalty
from rada_fast.ops._backends.registration import Layout, define, register_fake, register_gradient, runs_at_once
from rada_fast.ops._backends.transforms import refuse_second_derivative

SERVED_PENALTIES: tuple[MaskPenalty | None, ...] = (None, "l2", "l1", "linf")
"""The mask penalties that both operators compute. Each backend's reason_not_served refuses any other."""


class Features(NamedTuple):
    """Group image_features (B, D) and text_features (K, D), or their gradients, or flags of the gradients wanted."""

    image_features: Tensor
    text_features: Tensor


class Scale(NamedTuple):
    """Hold the multiplier s, logit_scale (), or its gradient, or a flag that it is wanted."""

    logit_scale: Tensor


class Parameters(NamedTuple):
    """Group the projections' weights (D, D) and biases (D,) by role (see ROLES); one that is not in use is None.

    With episodes both may have a leading axis of E. The group may also hold their gradients, or flags of the gradients
    wanted.
    """

    image_weight: Tensor | None
    image_bias: Tensor | None
    text_weight: Tensor | None
    text_bias: Tensor | None
    rational_weight: Tensor | None
    rational_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None

    def by_role(self, part: Literal["weight", "bias"]) -> dict[str, Tensor]:
        """Return the weights, or the biases, that are not None."""
        return {role: value for role, value in zip(ROLES, _PARTS[part](self), strict=True) if value is not None}


_PARTS = {part: attrgetter(*(f"{role}_{part}" for role in ROLES)) for part in ("weight", "bias")}


class Options(NamedTuple):
    """Group the adapter's arithmetic. input_scale_factor is 0 for unscaled inputs, penalty "none" for no penalty."""

    num_heads: int
    temperature: float
    matrix_softmax: bool
    input_scale_factor: float
    relu: bool
    penalty: str


class Requests(NamedTuple):
    """Say what a call asks for: return_mask asks for the mask, keep for the tensors that a backward pass needs."""

    return_mask: bool
    keep: bool


class Results(NamedTuple):
    """Group the logits (B, K), the penalty () or (E,), and the mask (B, K, D), which is (B, D, K) from C++."""

    logits: Tensor
    penalty: Tensor | None
    mask: Tensor | None


class Sums(NamedTuple):
    """Hold the logits divided by s, (B, K), which are the logits' derivatives with respect to s."""

    sums: Tensor | None


class ResultGradients(NamedTuple):
    """Group the gradients of the results; None stands for a gradient of zeros."""

    dlogits: Tensor | None
    dpenalty: Tensor | None
    dmask: Tensor | None


class Needed(NamedTuple):
    """Say which gradients are wanted, in the order of GRADIENTS."""

    needed: list[bool]


GRADIENTS = Layout(Features, Parameters, prefix="d")
"""The results of the backward operators. The gradient of s is not among them, because Sums gives it."""


def options_of(config: AdapterConfig, penalty: MaskPenalty | None) -> Options:
    """Return a configuration's arithmetic in the form that the operators take."""
    return Options(
        num_heads=config.num_heads,
        temperature=config.temperature,
        matrix_softmax=config.softmax == "matrix",
        input_scale_factor=config.input_scale_factor if config.input_scale == "logit" else 0.0,
        relu=config.mask_activation == "relu",
        penalty=penalty or "none",
    )


def compute_dtype(image_features: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's where that is on, else the parameters' own."""
    device = image_features.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def parameters_of(
    named: Mapping[str, Tensor], config: AdapterConfig, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Return the values of Parameters from tensors by their published names, converted to the dtype if one is given."""
    tensors: list[Tensor | None] = []
    for role, name in ROLES.items():
        used = role in ("key", "value", "output") or role in config.queries
        for part in ("weight", "bias"):
            value = named[f"{name}.{part}"] if used and (part == "weight" or config.bias) else None
            tensors.append(value if value is None or dtype is None else value.to(dtype))
    return tensors


def backward_follows(*inputs: Tensor | None) -> bool:
    """Return whether a gradient with respect to one of the inputs may be asked for."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)


def empty_gradients(
    features: Features, parameters: Parameters, needed: list[bool], absent: Tensor | None = None
) -> tuple[Features, Parameters]:
    """Return empty tensors with the shapes of a backward operator's results, and `absent` for gradients not wanted."""
    gradients = [
        absent if value is None or not wanted else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, wanted in zip((*features, *parameters), needed, strict=True)
    ]
    dfeatures, dparameters = GRADIENTS.split(gradients)
    return dfeatures, dparameters


def arguments_of(options: type[Any]) -> Layout:
    """Return the layout of a forward operator's arguments. options: the group of options that one backend alone has."""
    return Layout(Features, Scale, Parameters, Options, options, Requests)


def backward_arguments_of(options: type[Any], kept: Sequence[type[Any]]) -> Layout:
    """Return the layout of a backward operator's arguments. kept: the groups that the forward operator kept for it."""
    return Layout(ResultGradients, Features, Scale, Parameters, Options, options, *kept, Needed, results=kept)


def register(
    name: str,
    options: type[Any],
    kept: Sequence[type[Any]],
    *,
    fake: Callable[..., Sequence[Any]],
    fake_backward: Callable[..., tuple[Features, Parameters]],
    forward: Callable[..., Sequence[Any]] | None = None,
    backward: Callable[..., tuple[Features, Parameters]] | None = None,
) -> None:
    """Register an adapter's operator, its backward operator and the autograd formula.

    options: the group of options that this backend alone has.
    kept: the groups that the forward operator keeps for the backward operator.
    forward: takes (features, scale, parameters, Options, own options, requests) and returns (results, *kept, sums).
    backward: takes (result gradients, features, scale, parameters, Options, own options, *kept, needed) and returns the
        gradients of the features and of the parameters. Both are None where a library has defined the operators.
    fake, fake_backward: take the same arguments and return empty results of the right shapes.
    """
    tensors = Layout(Features, Scale, Parameters)
    forward_arguments, backward_arguments = arguments_of(options), backward_arguments_of(options, kept)
    forward_results = Layout(Results, *kept, Sums, results=(Results, *kept, Sums))
    backward_results = Layout(Features, Parameters, results=(Features, Parameters), prefix="d")
    function = None
    if forward is None or backward is None:
        register_fake(name, forward_arguments, fake)
        register_fake(f"{name}_backward", backward_arguments, fake_backward)
    else:
        function = define(name, forward_arguments, forward_results, forward, fake)
        define(f"{name}_backward", backward_arguments, backward_results, backward, fake_backward)
    operator = getattr(torch.ops.rada_fast, f"{name}_backward").default
    kept_layout = Layout(*kept, results=kept)

    def formula(
        given: Sequence[Tensor | None], arguments: list[Any], saved: tuple[Tensor, ...], wanted: list[Any]
    ) -> tuple[Features, Scale, Parameters]:
        dresults = ResultGradients(*given)
        features, scale, parameters, shared, own, requests = arguments
        wanted_features, wanted_scale, wanted_parameters = wanted
        if not requests.keep:
            raise RuntimeError("the forward was told that no gradient follows (keep=False)")
        *kept_tensors, sums = saved
        needed = [*wanted_features, *wanted_parameters]
        dfeatures, dparameters = GRADIENTS.split([None] * len(GRADIENTS.names))
        if any(needed):
            refuse_second_derivative("rational_adapter")
            if backward is not None and runs_at_once((*given, *features)):
                groups = kept_layout.split(kept_tensors)
                dfeatures, dparameters = backward(
                    dresults, features, scale, parameters, shared, own, *groups, Needed(needed)
                )
            else:
                dfeatures, dparameters = GRADIENTS.split(
                    operator(*dresults, *features, *scale, *parameters, *shared, *own, *kept_tensors, needed)
                )
        dscale = None
        if wanted_scale.logit_scale and dresults.dlogits is not None:
            # Only the factor in front of the sum carries a gradient; the projections' inputs use the detached s.
            dscale = (dresults.dlogits.to(sums.dtype) * sums).sum().to(scale.logit_scale.dtype)
        return dfeatures, Scale(dscale), dparameters  # type: ignore[arg-type]

    register_gradient(name, forward_arguments, tensors, len(Results._fields), formula, function)
