"""Run the adapter by the compiled operator for CPU tensors, and say which calls it serves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.extension import libraries
from rada_fast.ops._backends import library
from rada_fast.ops._backends.adapter_operator import (
    SERVED_PENALTIES,
    Requests,
    backward_follows,
    compute_dtype,
    options_of,
    parameters_of,
)
from rada_fast.ops._backends.compiled import CpuKept, CpuOptions
from rada_fast.reference.rational_adapter import AdapterOutput, Projected
from rada_fast.reference.rational_projections import as_scale

_REUSED = ("projections", "attended", "factors", "statistics", "image_state", "text_query")
"""What a later call with the same features can take again, by the names of CpuKept."""
_SERVED = (torch.float32, torch.float64, torch.bfloat16)


def widens(config: AdapterConfig, dtype: torch.dtype) -> bool:
    """Return whether tiles of this type are converted to float32 before they are multiplied.

    bfloat16 is converted where the processor has no bfloat16 products, and where a head has an odd width, because those
    products take numbers in pairs.
    """
    return dtype == torch.bfloat16 and (config.head_dim % 2 == 1 or libraries.bfloat16_products() == "float32")


def reason_not_served(
    config: AdapterConfig,
    image_features: Tensor,
    text_features: Tensor,
    parameters: Mapping[str, Tensor],
    penalty: MaskPenalty | None = None,
    episodes: int | None = None,
) -> str | None:
    """Return why the compiled CPU operator cannot serve a call, or None where it can."""
    if image_features.device.type != "cpu":
        return f"it serves CPU tensors, image_features are on {image_features.device}"
    if config.mask_function != "attention":
        return f"it serves mask_function 'attention', not {config.mask_function!r}"
    if config.num_layers != 1:
        return f"it serves num_layers 1, not {config.num_layers}"
    if penalty not in SERVED_PENALTIES:
        return f"it serves the penalties l2, l1 and linf, not {penalty!r}"
    dtype = compute_dtype(image_features, parameters["out_proj.weight"])
    if dtype not in _SERVED:
        return f"it serves float32, float64 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        # Autocast mixes types on purpose; without it the reference rejects a mixture too.
        if features.dtype not in (dtype, exact, torch.bfloat16) or (
            features.dtype != dtype and not torch.is_autocast_enabled("cpu")
        ):
            return f"it serves {name} in the parameters' type {dtype}, not {features.dtype}"
    if any(value.dtype != parameters["out_proj.weight"].dtype for value in parameters.values()):
        return "it serves parameters of one type"
    return None


def rational_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor],
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
    output_is_zero: bool = False,
    projected: Projected | None = None,
    keep_projected: bool = False,
) -> AdapterOutput:
    """Compute ops.rational_adapter, with its arguments and results, for a call that reason_not_served lets pass."""
    assert library.load() is None
    dtype = compute_dtype(image_features, parameters["out_proj.weight"])
    scale = as_scale(logit_scale, image_features, torch.float64 if dtype == torch.float64 else torch.float32)
    tensors = (image_features, text_features, scale, *parameters_of(parameters, config, dtype))
    taken = () if projected is None else projected.tensors
    own = CpuOptions(
        widened=widens(config, dtype),
        output_is_zero=output_is_zero,
        **{f"given_{name}": value for name, value in zip(_REUSED, taken, strict=False)},
        given_scale=1.0 if projected is None else projected.scale,
    )
    keep = backward_follows(*tensors)
    logits, mask_penalty, mask, *kept, _ = torch.ops.rada_fast.rational_adapter.default(
        *tensors, *options_of(config, penalty), *own, *Requests(return_mask=return_mask, keep=keep)
    )
    found = None
    if keep_projected and keep:
        named = CpuKept(*kept)
        found = Projected(tuple(getattr(named, name).detach() for name in _REUSED))
    return AdapterOutput(logits, mask_penalty if penalty else None, mask.mT if return_mask else None, found)
