"""The CUDA kernel of view selection agrees with float64 in the simulator and with the CPU on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.extension import libraries
from rada_fast.ops import select_views, use_backend
from tests.cuda.conftest import Launchers
from tests.ops.test_view_selection import assert_selected, draw, drawn, exact_entropy

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def run(launchers: Launchers, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Any]:
    """Return indices, entropies and the counts of the launch. Results that it does not write stay -1 or NaN."""
    library = launchers("view_selection.cu")
    import ptxsim

    episodes, views, classes = logits.shape
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    indices, entropies = torch.full((episodes, count), -1), torch.full((episodes, views), torch.nan, dtype=exact)
    library.log.clear()
    status = library.call(
        "rada_fast_select_views", logits, TYPES[logits.dtype], episodes, views, classes, count,
        ptxsim.Empty(indices), ptxsim.Empty(entropies), None,
    )  # fmt: skip
    assert status == 0
    assert len(library.log) == bool(len(logits))
    return indices, entropies, next(iter(library.log), None)


def shifted(logits: Tensor, by: int) -> Tensor:
    """Return the same logits, `by` elements into their memory and with nothing after them."""
    memory = torch.empty(logits.numel() + by, dtype=logits.dtype)
    moved = memory[by:].view(logits.shape)
    return moved.copy_(logits)


@pytest.mark.parametrize("dtype", TYPES)
# Less than a 16-byte word; tails; the sizes in use; rows of several passes; views of several tiles and of all places.
@pytest.mark.parametrize(
    ("episodes", "views", "classes", "offset"),
    [(1, 1, 1, 0), (3, 5, 3, 1), (2, 17, 101, 3), (2, 9, 1000, 0), (1, 3, 2100, 1), (1, 1030, 5, 0)],
)
def test_order_is_that_of_float64(
    launchers: Launchers, dtype: torch.dtype, episodes: int, views: int, classes: int, offset: int
) -> None:
    logits = shifted(draw(episodes, views, classes, 20.0, dtype), offset)
    count = views if views < 100 else 1027
    indices, entropies, _ = run(launchers, logits, count)
    relative = 32 * torch.finfo(entropies.dtype).eps
    torch.testing.assert_close(entropies.double(), exact_entropy(logits), rtol=relative, atol=1e-37)
    assert torch.equal(indices, entropies.argsort(dim=-1, stable=True)[:, :count])


@pytest.mark.parametrize(("views", "count"), [(1024, 1024), (1025, 1024)])
def test_views_and_places_that_fill_a_tile(launchers: Launchers, views: int, count: int) -> None:
    indices, entropies, _ = run(launchers, draw(1, views, 3, 20.0, torch.float32), count)
    assert torch.equal(indices, entropies.argsort(dim=-1, stable=True)[:, :count])


@pytest.mark.parametrize("seed", range(8))
def test_drawn_selections(launchers: Launchers, seed: int) -> None:
    # A warp takes 32 views one after the other in a block of 16 warps, and has 32 words of a row.
    logits, count = drawn(seed, 65, 32, 128, 256, 1024)
    indices, entropies, _ = run(launchers, shifted(logits, seed % 5), count)
    assert_selected(logits, count, indices, entropies)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("fill", "offset"), [(0, 0), (0, 1), (-1, 2), (1, 3)])
def test_every_logit_counts(launchers: Launchers, dtype: torch.dtype, fill: int, offset: int) -> None:
    """Rows fill a warp's registers exactly, or nearly, and no logit is so small that its loss would not show."""
    classes = (512 if dtype == torch.float64 else 1024) + fill
    logits = shifted(3 + draw(1, 2, classes, 0.5, dtype), offset)
    _, entropies, _ = run(launchers, logits, 1)
    relative = 32 * torch.finfo(entropies.dtype).eps
    torch.testing.assert_close(entropies.double(), exact_entropy(logits), rtol=relative, atol=0)


def test_no_episodes_and_none_selected_are_served(launchers: Launchers) -> None:
    indices, entropies, launch = run(launchers, torch.empty(0, 5, 7), 2)
    assert (indices.shape, entropies.shape, launch) == ((0, 2), (0, 5), None)
    logits = draw(2, 5, 7, 20.0, torch.float32)
    indices, entropies, _ = run(launchers, logits, 0)
    assert indices.shape == (2, 0)
    assert torch.equal(entropies, run(launchers, logits, 5)[1])


@pytest.mark.parametrize("dtype", TYPES)
def test_equal_rows_have_equal_bits_wherever_they_lie(launchers: Launchers, dtype: torch.dtype) -> None:
    logits = draw(2, 9, 101, 5.0, dtype)
    logits[:] = logits[:1, :1]
    for offset in (0, 1):
        indices, entropies, _ = run(launchers, shifted(logits, offset), 4)
        assert bool((entropies == entropies[0, 0]).all())
        assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_far_out_tied_infinite_and_missing_logits(launchers: Launchers) -> None:
    inf, nan = torch.inf, torch.nan
    rows = [
        [nan, 0.0, 0.0], [1e4, 1e4, -1e4], [-inf, 0.0, 0.0], [1e4, -1e4, 0.0],
        [-inf, -inf, -inf], [0.0, 0.0, 0.0], [inf, 0.0, 0.0], [-inf, 3.0, -inf],
    ]  # fmt: skip
    indices, entropies, _ = run(launchers, torch.tensor([rows]), 8)
    half = torch.tensor(2.0).log()
    expected = torch.tensor([[nan, half, half, 0.0, nan, torch.tensor(3.0).log(), nan, 0.0]])
    torch.testing.assert_close(entropies, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert indices.tolist() == [[3, 7, 1, 2, 5, 0, 4, 6]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("classes", "offset"), [(200, 0), (1000, 0), (1001, 1)])
def test_every_byte_is_read_once(launchers: Launchers, dtype: torch.dtype, classes: int, offset: int) -> None:
    logits = shifted(draw(2, 64, classes, 20.0, dtype), offset)
    indices, entropies, stats = run(launchers, logits, 6)
    least = logits.nbytes
    assert stats.footprint_ld <= 1.001 * least
    assert stats.global_ld["bytes"] <= 1.05 * least
    assert stats.footprint_st == indices.nbytes + entropies.nbytes
    assert stats.efficiency("ld") >= 0.9
    assert stats.efficiency("st") >= 0.9
    assert stats.atomics == 0


@pytest.mark.gpu
@pytest.mark.skipif(libraries.load_cuda() is not None, reason=f"CUDA kernels: {libraries.load_cuda()}")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("classes", [7, 101, 200, 1000, 5000])
def test_a_device_agrees_with_the_cpu(dtype: torch.dtype, classes: int) -> None:
    logits = draw(8, 64, classes, 20.0, dtype)
    with use_backend("cuda"):
        indices, entropies = select_views(logits.cuda(), 6, return_entropies=True)
        again = select_views(logits.cuda(), 6, return_entropies=True)
    assert torch.equal(indices, again[0])
    assert torch.equal(entropies, again[1])
    torch.testing.assert_close(entropies.cpu().double(), exact_entropy(logits), rtol=1e-5, atol=1e-37)
    assert torch.equal(indices, entropies.argsort(dim=-1, stable=True)[:, :6])


@pytest.mark.gpu
@pytest.mark.skipif(libraries.load_cuda() is not None, reason=f"CUDA kernels: {libraries.load_cuda()}")
def test_a_graph_replays_it() -> None:
    logits = draw(4, 64, 200, 20.0, torch.float32).cuda()
    select_views(logits, 6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = select_views(logits, 6)
    logits.copy_(draw(4, 64, 200, 3.0, torch.float32).flip(1))
    graph.replay()
    assert torch.equal(indices, select_views(logits, 6))
