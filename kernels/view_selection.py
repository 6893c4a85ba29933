"""Keep the views of each episode whose zero-shot predictions have the least entropy (RAda, Sec. 4.3; Eq. 1).

    logits[e, v] = s f[e, v] T^T,   p = softmax(logits),   H[e, v] = -sum_k p_k ln p_k

A first launch computes the logits of all views of all episodes by tiles, and keeps three numbers of each view and tile,
from which the entropies follow: the largest logit m, the sum of exp(logit - m) over the other logits, and the sum of
exp(logit - m) (logit - m). Of the logits themselves it stores those of the original views. A second launch finds the
views with the least entropies and copies their features. The tiles do not depend on the number of episodes, and there
is no atomic operation, so an episode's results are the same to the bit however many episodes there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import block_of, cdiv, episode_grid, product
from rada_fast.kernels._launch import Kernel, Launch, remembered

BLOCK_V, BLOCK_K = 16, 32
"""The views and the classes of a tile. The tile is small, so that 64 views of one episode fill a GPU."""


@Kernel
def view_statistics_kernel(
    views,
    text,
    logit_scale,
    statistics,
    logits,
    num_views,
    classes,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the logits of a tile, and store three numbers of each view and the logits of the original view.

    Axis 0 of the grid: tiles of views, and in each the tiles of classes. Axis 1: episodes.
    statistics: (3, E, tiles of classes, V) float32. logits: (E, K).
    """
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(classes, BLOCK_K)
    v = program // tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_K)
    k = program % tiles * BLOCK_K + column
    v_valid, k_valid = v < num_views, k < classes
    accumulator = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        rows = views + (episode * num_views + v)[:, None] * D + columns[None, :]
        f = tl.load(rows, mask=v_valid[:, None], other=0.0)
        t = tl.load(text + k[None, :] * D + columns[:, None], mask=k_valid[None, :], other=0.0)
        accumulator = product(f, t, accumulator, PRECISION)
    values = accumulator * tl.load(logit_scale).to(tl.float32)
    out = tl.broadcast_to((logits + episode * classes + k)[None, :], (BLOCK_V, BLOCK_K))
    tl.store(out, values.to(logits.dtype.element_ty), mask=(v == 0)[:, None] & k_valid[None, :])
    values = tl.where(k_valid[None, :], values, float("-inf"))
    largest, place = tl.max(values, 1, return_indices=True, return_indices_tie_break_left=True)
    is_other = (column[None, :] != place[:, None]) & k_valid[None, :]
    distance = tl.where(is_other, values - largest[:, None], 0.0)
    weight = tl.where(is_other, tl.exp(distance), 0.0)
    own = statistics + (episode * tiles + program % tiles) * num_views + v
    stride = tl.num_programs(1).to(tl.int64) * tiles * num_views
    tl.store(own, largest, mask=v_valid)
    tl.store(own + stride, tl.sum(weight, 1), mask=v_valid)
    tl.store(own + 2 * stride, tl.sum(weight * distance, 1), mask=v_valid)


@triton.jit
def _log_one_plus(x):
    """Return ln(1 + x) for x of at least 0. A view that is almost certain has a small x, which 1 + x would round."""
    small = x * (1.0 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x * (1 / 7 - x / 8)))))))
    return tl.where(x < 0.0625, small, tl.log(1.0 + x))


@triton.jit
def _entropies(statistics, v, valid, tiles, num_views, stride):
    """Return the entropies of some views from the numbers of all tiles of classes. The result may be NaN."""
    largest = tl.load(statistics + v, mask=valid, other=0.0)
    others = tl.load(statistics + stride + v, mask=valid, other=0.0)
    spread = tl.load(statistics + 2 * stride + v, mask=valid, other=0.0)
    for tile in range(1, tiles):
        own = statistics + tile * num_views + v
        tile_largest = tl.load(own, mask=valid, other=0.0)
        tile_others = tl.load(own + stride, mask=valid, other=0.0)
        tile_spread = tl.load(own + 2 * stride, mask=valid, other=0.0)
        new_largest = tl.maximum(largest, tile_largest)
        rescale, tile_rescale = tl.exp(largest - new_largest), tl.exp(tile_largest - new_largest)
        spread = rescale * (spread + (1.0 + others) * (largest - new_largest)) + tile_rescale * (
            tile_spread + (1.0 + tile_others) * (tile_largest - new_largest)
        )
        # Of the two largest logits, the smaller one is now among the others.
        others = tl.where(
            largest >= tile_largest,
            others + (1.0 + tile_others) * tile_rescale,
            tile_others + (1.0 + others) * rescale,
        )
        largest = new_largest
    entropy = _log_one_plus(others) - spread / (1.0 + others)
    return tl.where(largest - largest == 0.0, entropy, float("nan"))


@Kernel
def kept_views_kernel(
    views,
    statistics,
    entropies,
    kept,
    originals,
    num_views,
    classes,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy the features of the view that takes one place in the order of the entropies, or those of the original view.

    Equal entropies are in the order of the views, and NaN comes last.

    Axis 0 of the grid: the places, and then the original view. Axis 1: episodes.
    entropies: (E, n + 1, V) float32, written by each program for itself. kept: (E, n, D). originals: (E, D).
    """
    place, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.num_programs(0) - 1
    tiles = tl.cdiv(classes, BLOCK_K)
    stride = tl.num_programs(1).to(tl.int64) * tiles * num_views
    statistics += episode * tiles * num_views
    entropies += (episode * (count + 1) + place) * num_views
    block = tl.arange(0, BLOCK_V)
    index = 0
    out = originals + episode * D
    if place < count:
        out = kept + (episode * count + place) * D
        for first in range(0, num_views, BLOCK_V):
            v = first + block
            valid = v < num_views
            tl.store(entropies + v, _entropies(statistics, v, valid, tiles, num_views, stride), mask=valid)
        # The threads of this program read what others of it have stored.
        tl.debug_barrier()
        for first in range(0, num_views, BLOCK_V):
            v = first + block
            entropy = tl.load(entropies + v, mask=v < num_views, other=0.0)[:, None]
            rank = tl.zeros((BLOCK_V,), tl.int32)
            for start in range(0, num_views, BLOCK_V):
                u = start + block
                other = tl.load(entropies + u, mask=u < num_views, other=0.0)[None, :]
                earlier = u[None, :] < v[:, None]
                both_nan = (other != other) & (entropy != entropy)
                before = (other < entropy) | ((entropy != entropy) & (other == other))
                before = before | (((other == entropy) | both_nan) & earlier)
                rank += tl.sum((before & (u < num_views)[None, :]).to(tl.int32), 1)
            index += tl.sum(tl.where((rank == place) & (v < num_views), v, 0))
    source = views + (episode * num_views + index) * D
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        tl.store(out + columns, tl.load(source + columns))


class KeptViews(NamedTuple):
    """Hold the features (E, n, D) of kept views, and the original views' features (E, D) and logits (E, K) by CLIP."""

    kept: Tensor
    originals: Tensor
    logits: Tensor


@remembered
def _statistics_launch(
    episodes: int, num_views: int, classes: int, width: int, dtype: torch.dtype, precision: str
) -> Launch:
    return view_statistics_kernel.launch(
        episode_grid(cdiv(num_views, BLOCK_V) * cdiv(classes, BLOCK_K), episodes=episodes),
        num_views=num_views, classes=classes, D=width, BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K,
        BLOCK_C=block_of(width, 32 if dtype == torch.float32 else 64),
        PRECISION=precision if dtype == torch.float32 else "ieee",
        num_warps=4, num_stages=3,
    )  # fmt: skip


@remembered
def _kept_launch(episodes: int, num_views: int, count: int, classes: int, width: int) -> Launch:
    return kept_views_kernel.launch(
        episode_grid(count + 1, episodes=episodes),
        num_views=num_views, classes=classes, D=width, BLOCK_V=64, BLOCK_K=BLOCK_K, BLOCK_C=block_of(width, 512),
        # One warp needs no shared memory to compare the views.
        num_warps=1, num_stages=1,
    )  # fmt: skip


def kept_views(views: Tensor, text: Tensor, logit_scale: Tensor, count: int, *, precision: str = "ieee") -> KeptViews:
    """Keep the `count` views of each episode whose zero-shot predictions have the least entropy, in two launches.

    views: (E, V, D), the original view first. text: (K, D), of the same type. Both are contiguous.
    logit_scale: s, () on the device.
    count: from 0 to V.
    """
    (episodes, num_views, width), classes = views.shape, text.shape[0]
    float32 = {"dtype": torch.float32, "device": views.device}
    statistics = torch.empty((3, episodes, cdiv(classes, BLOCK_K), num_views), **float32)
    entropies = torch.empty((episodes, count + 1, num_views), **float32)
    results = KeptViews(
        views.new_empty((episodes, count, width)),
        views.new_empty((episodes, width)),
        views.new_empty((episodes, classes)),
    )
    _statistics_launch(episodes, num_views, classes, width, views.dtype, precision)(
        views=views, text=text, logit_scale=logit_scale, statistics=statistics, logits=results.logits
    )
    _kept_launch(episodes, num_views, count, classes, width)(
        views=views, statistics=statistics, entropies=entropies, kept=results.kept, originals=results.originals
    )
    return results
