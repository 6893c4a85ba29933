"""Backward pass of the attention over classes; the package's docstring explains the symbols.

    dP[i, j] = dO[i] . v[j],   dS^c = P^c * (dP - delta^c) / |Q|
    dq^c = dS^c k / (sqrt(d) tau),   dk = sum_c (dS^c)^T q^c / (sqrt(d) tau),   dv = sum_c (P^c)^T dO / |Q|

delta^c[i] is dO[i] . w^c[i] O^c[i] for the row softmax, and the mean of these over the head for the matrix softmax. O
is the mean of w^c O^c over the |Q| query kinds in use.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rada_fast.kernels._common import LOG2E, cdiv, default_precision
from rada_fast.kernels._launch import Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.class_attention.backward_keys import class_attention_backward_keys_kernel
from rada_fast.kernels.class_attention.backward_queries import class_attention_backward_queries_kernel
from rada_fast.kernels.class_attention.deltas import row_deltas_kernel
from rada_fast.kernels.class_attention.forward import Attended
from rada_fast.kernels.class_attention.tiles import Tile, piece_columns, splits_head, tile_of
from rada_fast.kernels.rational_projections import ProjectionBuffers


class _Launches(NamedTuple):
    """Hold the launches of the query and key gradients, and that of the row softmax's deltas, or None without it."""

    queries: Launch
    keys: Launch
    deltas: Launch | None


@remembered
def _launches(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    kinds: tuple[bool, bool, bool],
    images_per_text: int,
    chunks: int,
    temperature: float,
    matrix: bool,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    tile: Tile | None,
) -> _Launches:
    """Return the launches.

    kinds: whether the text, the rational and the image query are in use. chunks: the parts of a head's deltas.
    """
    head = width // num_heads
    tile = tile or tile_of(dtype, classes, head, backward=True, precision=precision, target=target)
    *in_tiles, has_image = kinds
    vector = triton.next_power_of_2(head)
    common = {
        "batch": batch,
        "classes": classes,
        "images_per_text": images_per_text,
        "scale": LOG2E / (math.sqrt(head) * temperature),
        "share": 1 / sum(kinds),
        "D": width,
        "HEAD": head,
        "CHUNKS": chunks,
        "SPLIT_HEAD": splits_head(dtype, head, tile),
        "BLOCK_D": tile.columns,
        "BLOCK_C": piece_columns(dtype, head),
        "BLOCK_S": max(256, min(512, triton.next_power_of_2(classes))),
        "PRECISION": default_precision(dtype, precision),
        "num_stages": tile.stages,
    }
    # In the second launch a tile has as many keys as one has queries in the first, and reads queries in short strips.
    # Products of float32 on tensor cores have the bits of the forward pass only where the keys are on the left as they
    # are there: with other bits, probabilities of scores of 1e4 would not add up to 1. The first launch therefore turns
    # its tile, and takes half the queries and warps of the second one, since its accumulators have as many rows. The
    # tiles measured on Hopper have other forms, and their products are not made to agree.
    transposed = dtype == torch.float32 and precision != "ieee" and not target.is_hopper
    tiles, groups = cdiv(classes, tile.queries), cdiv(head, tile.columns)
    query_block, key_block, warps = tile.queries, tile.keys, tile.warps
    if transposed:
        query_block, key_block, warps = max(16, tile.keys // 2), tile.queries, max(1, tile.warps // 2)
    query_tiles = cdiv(classes, query_block) if any(in_tiles) else 0
    queries = class_attention_backward_queries_kernel.launch(
        (batch * num_heads * groups * (query_tiles + has_image),),
        tiles=query_tiles,
        HEAD_VECTOR=vector, TRANSPOSED=transposed, BLOCK_Q=query_block, BLOCK_K=key_block,
        # The image query's two accumulators of 64 x 64 spill on Blackwell. A thread has four columns of a row as in the
        # forward pass, so that scores are added up in the same order.
        BLOCK_I=max(1, 128 * warps // vector, min(32, 4096 // vector)),
        num_warps=warps,
        **common,
    )  # fmt: skip
    keys = class_attention_backward_keys_kernel.launch(
        (batch * num_heads * groups * tiles,),
        tiles=tiles,
        BLOCK_Q=tile.keys,
        BLOCK_K=tile.queries,
        num_warps=tile.warps,
        **common,
    )
    if matrix or not any(in_tiles):
        return _Launches(queries, keys, None)
    deltas = row_deltas_kernel.launch(
        (sum(in_tiles) * num_heads * batch,),
        batch=batch,
        classes=classes,
        CHUNKS=chunks,
        BLOCK=max(128, min(1024, triton.next_power_of_2(classes))),
        num_warps=4,
    )
    return _Launches(queries, keys, deltas)


def class_attention_backward(
    projections: ProjectionBuffers,
    attended: Attended,
    dattended: Tensor,
    deltas: Tensor,
    *,
    num_heads: int,
    temperature: float,
    matrix: bool,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> ProjectionBuffers:
    """Compute the gradients of every projection in two launches, for the row softmax in three; q_text's is (B, K, D).

    dattended: dO, (B, K, D); deltas: (2, D/g, B, K) float32, dO . w O^c over chunks of g columns, text query first.
    """
    keys, values = projections.keys, projections.values
    batch, classes, width = keys.shape
    text, rational, image = projections.q_text, projections.q_rational, projections.q_image
    gradients = ProjectionBuffers(
        keys=torch.empty_like(keys),
        values=torch.empty_like(keys),
        q_rational=None if rational is None else torch.empty_like(keys),
        q_text=None if text is None else torch.empty_like(keys),
        q_image=None if image is None else torch.empty_like(image),
    )
    if batch == 0:
        return gradients
    float32 = {"dtype": torch.float32, "device": keys.device}
    image_pairs = torch.empty((batch, num_heads, classes, 4), **float32) if image is not None else None
    dattended_sum = torch.empty((batch, width), **float32) if image is not None else None
    kinds = (text is not None, rational is not None, image is not None)
    launches = _launches(
        batch, classes, width, num_heads, kinds, batch // (text.shape[0] if text is not None else 1),
        deltas.shape[1] // num_heads, temperature, matrix, keys.dtype, precision, target_of(keys.device), tile,
    )  # fmt: skip
    if launches.deltas is not None:
        # `used` selects those of the text and the rational query that are in use; their arrays are contiguous.
        used = slice(0 if text is not None else 1, 2 if rational is not None else 1)
        chunk_deltas, deltas = deltas, torch.empty((2, num_heads, batch, classes), **float32)
        launches.deltas(deltas=chunk_deltas[used], sums=deltas[used])
    tensors = {
        "q_image": image,
        "q_text": text,
        "q_rational": rational,
        "keys": keys,
        "values": values,
        "dattended": dattended,
        "logsums": attended.logsums,
        "totals": attended.totals if matrix else None,
        "deltas": deltas,
        "image_pairs": image_pairs,
        "dattended_sum": dattended_sum,
    }
    launches.queries(
        attended_image=attended.image, image_logsums=attended.image_logsums, dq_image=gradients.q_image,
        dq_text=gradients.q_text, dq_rational=gradients.q_rational, **tensors,
    )  # fmt: skip
    launches.keys(dkeys=gradients.keys, dvalues=gradients.values, **tensors)
    return gradients
