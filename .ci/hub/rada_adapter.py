"""The rational adapter of RAda (arXiv:2507.15480) as one differentiable operator of fused Triton kernels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.ops._backends import triton
from rada_fast.reference.rational_adapter import AdapterOutput

__all__ = ["AdapterConfig", "AdapterOutput", "rational_adapter"]


def rational_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor],
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
) -> AdapterOutput:
    """Compute the logits (B, K), and if they are asked for the mask penalty () and the mask (B, K, D).

    image_features: (B, D), unit norm. text_features: (K, D), unit norm. logit_scale: the multiplier s.
    parameters: the projections by their published names, such as "q_proj1.weight" and "out_proj.bias".
    config: the arithmetic; AdapterConfig.official(D) is that of the published code.
    penalty: "l2", "l1", "linf" or None.

    Raises RuntimeError saying what the kernels do not serve.
    """
    reason = triton.reason_unavailable() or triton.reason_not_served(
        config, image_features, text_features, parameters, penalty
    )
    if reason is not None:
        raise RuntimeError(f"the Triton kernels of the rational adapter cannot serve this call: {reason}")
    return triton.rational_adapter(
        image_features, text_features, logit_scale, parameters, config, penalty=penalty, return_mask=return_mask
    )
