"""What the adapter's operators in C++ and in Triton have in common: arguments, results and the gradient's formula.

Each of them is two registered operators, `<name>` and `<name>_backward`. Their arguments come in the order of the
groups below, then what only one backend takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rada_fast.config.method import ROLES, AdapterConfig, MaskPenalty
from rada_fast.ops._backends.registration import Layout, define, register_fake, register_gradient
from rada_fast.ops._backends.transforms import refuse_second_derivative

SERVED_PENALTIES: tuple[MaskPenalty | None, ...] = (None, "l2", "l1", "linf")
"""The mask penalties that both operators compute; any other is refused by each backend's reason_not_served."""


class Features(NamedTuple):
    """image_features: (B, D); text_features: (K, D). Or their gradients, or whether these are wanted."""

    image_features: Tensor
    text_features: Tensor


class Scale(NamedTuple):
    """logit_scale: the multiplier s, ()."""

    logit_scale: Tensor


class Parameters(NamedTuple):
    """Weights (D, D) and biases (D,) by the projection's role (see ROLES), None for what a configuration does not have.

    With episodes a leading axis of E may stand before both. Or their gradients, or whether these are wanted.
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
        """The weights, or the biases, that are there."""
        return {role: value for role, value in zip(ROLES, _PARTS[part](self), strict=True) if value is not None}


_PARTS = {part: attrgetter(*(f"{role}_{part}" for role in ROLES)) for part in ("weight", "bias")}


class Options(NamedTuple):
    """input_scale_factor: 0 where the projections' inputs are not scaled. penalty: "none" for none."""

    num_heads: int
    temperature: float
    matrix_softmax: bool
    input_scale_factor: float
    relu: bool
    penalty: str


class Requests(NamedTuple):
    """return_mask: whether the mask is wanted; keep: whether a backward pass may follow, which needs what is kept."""

    return_mask: bool
    keep: bool


class Results(NamedTuple):
    """logits: (B, K); penalty: () or (E,); mask: (B, K, D), or (B, D, K) of the operator in C++."""

    logits: Tensor
    penalty: Tensor | None
    mask: Tensor | None


class Sums(NamedTuple):
    """sums: the logits divided by s, (B, K), which is their gradient with respect to s."""

    sums: Tensor | None


class ResultGradients(NamedTuple):
    """Gradients of the results, None where one is zero."""

    dlogits: Tensor | None
    dpenalty: Tensor | None
    dmask: Tensor | None


class Needed(NamedTuple):
    """needed: which gradients are wanted, in the order of GRADIENTS."""

    needed: list[bool]


GRADIENTS = Layout(Features, Parameters, prefix="d")
"""What the backward operators return. The gradient of s is not among it: the sums give it."""


def options_of(config: AdapterConfig, penalty: MaskPenalty | None) -> Options:
    """A configuration's arithmetic, as the operators take it."""
    return Options(
        num_heads=config.num_heads,
        temperature=config.temperature,
        matrix_softmax=config.softmax == "matrix",
        input_scale_factor=config.input_scale_factor if config.input_scale == "logit" else 0.0,
        relu=config.mask_activation == "relu",
        penalty=penalty or "none",
    )


def parameters_of(
    named: Mapping[str, Tensor], config: AdapterConfig, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """The values of Parameters, from tensors under the published names; with a dtype they are converted to it."""
    tensors: list[Tensor | None] = []
    for role, name in ROLES.items():
        used = role in ("key", "value", "output") or role in config.queries
        for part in ("weight", "bias"):
            value = named[f"{name}.{part}"] if used and (part == "weight" or config.bias) else None
            tensors.append(value if value is None or dtype is None else value.to(dtype))
    return tensors


def backward_follows(*inputs: Tensor | None) -> bool:
    """Whether a gradient with respect to one of the inputs may be asked for."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)


def empty_gradients(
    features: Features, parameters: Parameters, needed: list[bool], absent: Tensor | None = None
) -> tuple[Features, Parameters]:
    """The shapes of a backward operator's results; absent: what it returns for a gradient that is not wanted."""
    found = [
        absent if value is None or not wanted else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, wanted in zip((*features, *parameters), needed, strict=True)
    ]
    dfeatures, dparameters = GRADIENTS.split(found)
    return dfeatures, dparameters


def arguments_of(options: type[Any]) -> Layout:
    """The forward operator's arguments. options: the group of what one backend alone takes."""
    return Layout(Features, Scale, Parameters, Options, options, Requests)


def backward_arguments_of(options: type[Any], kept: Sequence[type[Any]]) -> Layout:
    """The backward operator's arguments. kept: the groups that it gets back from the forward operator."""
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
    """Register an adapter's operator, its backward operator and the formula that leads from one to the other.

    options: the group of what this backend alone takes; kept: the groups that the backward operator gets back.
    forward: of (features, scale, parameters, Options, own options, requests), (results, *kept, sums).
    backward: of (result gradients, features, scale, parameters, Options, own options, *kept, needed), the gradients of
        the features and of the parameters. Both functions are None where a library has defined the operators.
    fake, fake_backward: the shapes of the same results.
    """
    tensors = Layout(Features, Scale, Parameters)
    taken, taken_back = arguments_of(options), backward_arguments_of(options, kept)
    returned = Layout(Results, *kept, Sums, results=(Results, *kept, Sums))
    returned_back = Layout(Features, Parameters, results=(Features, Parameters), prefix="d")
    if forward is None or backward is None:
        register_fake(name, taken, fake)
        register_fake(f"{name}_backward", taken_back, fake_backward)
    else:
        define(name, taken, returned, forward, fake)
        define(f"{name}_backward", taken_back, returned_back, backward, fake_backward)
    operator = getattr(torch.ops.rada_fast, f"{name}_backward").default

    def gradients(
        given: Sequence[Tensor | None], arguments: list[Any], saved: tuple[Tensor, ...], wanted: list[Any]
    ) -> tuple[Features, Scale, Parameters]:
        dresults = ResultGradients(*given)
        features, scale, parameters, shared, own, requests = arguments
        wanted_features, wanted_scale, wanted_parameters = wanted
        if not requests.keep:
            raise RuntimeError("the forward was told that no gradient follows (keep=False)")
        *kept_tensors, sums = saved
        found: Sequence[Tensor | None] = [None] * len(GRADIENTS.names)
        needed = [*wanted_features, *wanted_parameters]
        if any(needed):
            refuse_second_derivative("rational_adapter")
            found = operator(*dresults, *features, *scale, *parameters, *shared, *own, *kept_tensors, needed)
        dscale = None
        if wanted_scale.logit_scale and dresults.dlogits is not None:
            # Only the factor in front of the sum carries a gradient; the projections' inputs see s detached.
            dscale = (dresults.dlogits.to(sums.dtype) * sums).sum().to(scale.logit_scale.dtype)
        dfeatures, dparameters = GRADIENTS.split(found)
        return dfeatures, Scale(dscale), dparameters  # type: ignore[arg-type]

    register_gradient(name, taken, tensors, len(Results._fields), gradients)
