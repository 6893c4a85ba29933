"""The adapter as the published code evaluates it: every query is repeated to (B, K, D) and has a K x K softmax.

It gives the results of the reference and is the baseline of every benchmark, so it spares no work on purpose.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softmax as torch_softmax

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.reference.masked_logits import mask_penalty, masked_logits, rational_mask
from rada_fast.reference.rational_adapter import AdapterOutput
from rada_fast.reference.rational_projections import (
    Parameters,
    as_scale,
    input_scales,
    project,
    rational_matrix,
    split_heads,
)


def _attend(queries: list[Tensor], keys: Tensor, values: Tensor, config: AdapterConfig) -> Tensor:
    """Compute one attention layer on full queries. queries, keys, values: (B, K, D). Returns (B, K, D)."""
    num_classes = keys.shape[1]
    keys, values = (split_heads(rows, config.num_heads) for rows in (keys, values))  # (B, H, K, d)
    maps = []
    for query in queries:
        scores = split_heads(query, config.num_heads) @ keys.transpose(-2, -1) / config.head_dim**0.5  # (B, H, K, K)
        if config.softmax == "matrix":
            flat = torch_softmax(scores.flatten(2) / config.temperature, dim=-1)
            maps.append(flat.unflatten(2, (num_classes, num_classes)) * num_classes)  # (B, H, K, K)
        else:
            maps.append(torch_softmax(scores / config.temperature, dim=-1))  # (B, H, K, K)
    attended = (sum(maps[1:], maps[0]) / len(maps)) @ values  # (B, H, K, d)
    return attended.transpose(1, 2).flatten(2)  # (B, K, D)


def literal_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Parameters,
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
) -> AdapterOutput:
    """Adapt the logits with tensors of (B, H, K, K) in memory.

    The arguments and results are those of reference.rational_adapter.rational_adapter.
    """
    batch, num_classes = len(image_features), len(text_features)
    scale = as_scale(logit_scale, image_features)
    query_scale, rational_scale = input_scales(scale, config)
    rational = rational_matrix(image_features, text_features)  # (B, K, D)
    scaled = rational_scale * rational  # (B, K, D)
    if config.mask_function == "mlp":
        offset = project(project(scaled, parameters, "fc").relu(), parameters, "out_proj")  # (B, K, D)
    else:
        rows = {
            "image": ("q_proj1", query_scale * image_features[:, None].repeat(1, num_classes, 1)),  # (B, K, D)
            "text": ("q_proj2", query_scale * text_features[None].repeat(batch, 1, 1)),  # (B, K, D)
            "rational": ("q_proj3", scaled),  # (B, K, D)
        }
        queries = [project(rows[kind][1], parameters, rows[kind][0]) for kind in config.queries]  # (B, K, D)
        keys, values = (project(scaled, parameters, name) for name in ("k_proj", "v_proj"))  # (B, K, D)
        offset = project(_attend(queries, keys, values, config), parameters, "out_proj")  # (B, K, D)
        for layer in range(config.num_layers - 1):
            prefix = f"layers.{layer}."
            query, keys, values = (
                project(source, parameters, f"{prefix}{name}")
                for source, name in ((offset, "q_proj"), (scaled, "k_proj"), (scaled, "v_proj"))
            )
            attended = _attend([query], keys, values, config)  # (B, K, D)
            offset = offset + project(attended, parameters, f"{prefix}out_proj")  # (B, K, D)
    mask = rational_mask(offset, config.mask_activation)  # (B, K, D)
    return AdapterOutput(
        masked_logits(mask, rational, scale),
        mask_penalty(mask, penalty) if penalty else None,
        mask if return_mask else None,
    )
