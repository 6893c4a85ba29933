"""Call the compiled CPU operator and its backward pass directly, for steps that are repeated with the same tensors.

A call through autograd takes 0.18 ms of Python more than these calls do, where the whole step may take 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.ops._backends import library
from rada_fast.ops._backends.adapter_operator import GRADIENTS, Requests, compute_dtype, options_of, parameters_of
from rada_fast.ops._backends.compiled import CpuOptions
from rada_fast.ops._backends.cpu import widens
from rada_fast.reference.rational_adapter import AdapterOutput
from rada_fast.reference.rational_projections import as_scale

Pullback = Callable[[Tensor | None, Tensor | None], list[Tensor]]
"""A function from the gradients of logits and penalty, None for zeros, to the gradients of the wanted tensors."""


def prepare(
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor],
    config: AdapterConfig,
    penalty: MaskPenalty | None,
    wanted: Sequence[str],
) -> Callable[[Tensor], tuple[AdapterOutput, Pullback]]:
    """Return the function behind ops.PreparedAdapter, with its arguments, for a call that reason_not_served lets pass.

    wanted: the names of the gradients as GRADIENTS has them.
    """
    assert library.load() is None
    dtype = compute_dtype(text_features, parameters["out_proj.weight"])
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale = as_scale(logit_scale, text_features, exact).detach()
    # A multiplier of another type is converted in every call, because its value may change.
    converted = logit_scale if isinstance(logit_scale, Tensor) and logit_scale.dtype != exact else None
    tensors = [scale, *parameters_of(parameters, config)]
    fixed = (text_features.detach(), *(None if value is None else value.detach() for value in tensors))
    options = (*options_of(config, penalty), *CpuOptions(widened=widens(config, dtype)))
    requests = Requests(return_mask=False, keep=True)
    places = [GRADIENTS.names.index(name) for name in wanted]
    needed = [name in wanted for name in GRADIENTS.names]
    forward = torch.ops.rada_fast.rational_adapter.default
    backward = torch.ops.rada_fast.rational_adapter_backward.default

    arguments, with_requests = (*fixed, *options), (*fixed, *options, *requests)

    def call(image_features: Tensor) -> tuple[AdapterOutput, Pullback]:
        with torch._C._AutoDispatchBelowAutograd():
            if converted is not None:
                scale.copy_(converted.reshape(()))
            logits, value, _, *kept, _ = forward(image_features, *with_requests)

        def pullback(dlogits: Tensor | None, dpenalty: Tensor | None) -> list[Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = backward(dlogits, dpenalty, None, image_features, *arguments, *kept, needed)
            return [gradients[place] for place in places]

        return AdapterOutput(logits, value if penalty else None, None), pullback

    return call
