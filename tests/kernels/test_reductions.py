"""Sums and comparisons of what other programs or launches have stored are right for more values than one block holds.

The tests launch kernels by themselves, because whole problems of these sizes would take the simulator minutes.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import arange_by_fours, store_column_sums
from rada_fast.kernels._launch import Kernel
from rada_fast.kernels.class_attention.combined import store_combined
from rada_fast.kernels.class_attention.deltas import strided_sums
from rada_fast.kernels.masked_logits import MaskedLogits, Tile, masked_logits_forward
from rada_fast.kernels.masked_logits.totals import store_head_sums
from rada_fast.kernels.rational_projections_backward import feature_gradients_reduce_kernel

from .conftest import Simulated

WIDTH = 64
TILE = Tile(16, 32, 16, 1, 1)
"""A tile so small that many programs share an image's rows, and two share a row."""


def masked_logits_of(
    device: str, offsets: Tensor, *, penalty: str, episodes: int = 1
) -> tuple[MaskedLogits, Tensor, Tensor]:
    """Return the results for the masks 1 + offsets, with the features. offsets: (B, K, D), the mask's offset A."""
    batch, classes, width = offsets.shape
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(rows, width, generator=generator) for rows in (batch, classes))
    # The output projection passes the attention's result on.
    results = masked_logits_forward(
        image.to(device), text.to(device), torch.tensor(20.0, device=device), offsets.to(device),
        torch.eye(width, device=device), None,
        relu=False, penalty=penalty, episodes=episodes, tile=TILE,
    )  # fmt: skip
    return results, image, text


def test_logits_and_a_penalty_of_more_parts_than_one_block(device: str) -> None:
    images, episodes, classes = 2, 2, 2100
    offsets = torch.randn(images * episodes, classes, WIDTH)
    for penalty, distances in (("l1", offsets.abs()), ("l2", offsets.square())):
        results, image, text = masked_logits_of(device, offsets, penalty=penalty, episodes=episodes)
        wanted = ((1 + offsets) * image[:, None] * text).sum(-1)
        torch.testing.assert_close(results.sums.cpu(), wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(results.logits.cpu(), 20 * results.sums.cpu())
        assert results.penalty is not None
        torch.testing.assert_close(results.penalty.cpu(), distances.unflatten(0, (episodes, -1)).mean((1, 2, 3)))


def test_the_last_program_to_finish_adds_up_what_all_others_have_stored(simulated: Simulated) -> None:
    """The programs run one after the other here, so that only the last one can read the results of all."""
    offsets = torch.randn(1, 40, 2 * WIDTH)
    with simulated(max_lanes=32):
        results, image, text = masked_logits_of("cpu", offsets, penalty="l1")
    wanted = ((1 + offsets) * image[:, None] * text).sum(-1)
    torch.testing.assert_close(results.sums, wanted, rtol=1e-5, atol=1e-4)
    assert results.penalty is not None
    torch.testing.assert_close(results.penalty, offsets.abs().mean()[None])


@pytest.mark.parametrize("classes", [3, 2 * TILE.rows, 1100])
def test_the_first_of_equal_distances_counts(device: str, classes: int) -> None:
    """The first class counts and of its columns the first, as in torch.max, whichever parts hold the equal ones.

    A tile has rows of several images, or an image fills whole tiles, or the last one in part.
    """
    images, episodes = 3, 2
    offsets = torch.full((images * episodes, classes, WIDTH), -0.5)
    offsets[1, 0] = 0.25  # not the first class
    offsets[2, 0] = 0.25  # nor in it the first columns
    offsets[2, 1, :24] = 0.25
    last = classes - 1
    offsets[3, :last] = 0.25  # only in the last class
    offsets[4] = 0.0  # everything is equal, and zero
    offsets[5, :, :56] = 0.25  # only in the last columns
    results, _, _ = masked_logits_of(device, offsets, penalty="linf", episodes=episodes)
    assert results.peaks is not None
    assert results.peaks.tolist() == [0, WIDTH, WIDTH + 24, last * WIDTH, 0, 56]
    assert results.penalty is not None
    torch.testing.assert_close(results.penalty.cpu(), torch.tensor([0.5, 1 / 3]))


def test_the_first_of_equal_distances_counts_in_rows_of_more_parts_than_are_read_at_once(device: str) -> None:
    offsets = torch.full((3, 2, 160), -0.5)
    offsets[1, 0, :40] = 0.25  # not in the first columns
    offsets[2] = 0.25
    offsets[2, 0, 159] = 0.5  # only in the last column
    results, _, _ = masked_logits_of(device, offsets, penalty="linf")
    assert results.peaks is not None
    assert results.peaks.tolist() == [0, 40, 159]


@Kernel
def combined_kernel(
    text, rational, image, combined, logsums, factors, totals, batch, classes, share,
    D: tl.constexpr, HEAD: tl.constexpr, HEAD_VECTOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    store_combined(
        (text, rational, image), combined, logsums, factors, totals, tl.program_id(1).to(tl.int64), tl.program_id(0),
        batch, classes, share, D, HEAD, HEAD_VECTOR, BLOCK_S, BLOCK_R,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [1, 130, 2100])
def test_the_matrix_softmax_of_more_classes_than_one_block(device: str, classes: int) -> None:
    # For the text query all classes count. The log-sums of the rational query reach thousands, and the last is the
    # largest.
    heads, head, batch = 2, 12, 2
    small, large = torch.randn(2, heads, batch, classes), torch.linspace(-3000.0, 3000.0, 4 * classes)
    logsums = torch.stack([3 * small[0], large.view(heads, batch, classes)])
    maxima = logsums.floor()
    rows = torch.randn(2, batch, classes, heads * head)
    image = torch.randn(batch, heads * head)
    factors, combined = torch.full_like(logsums, torch.nan, device=device), torch.full_like(rows[0], torch.nan)
    combined = combined.to(device)
    totals = torch.full((2, 2, heads, batch), torch.nan, device=device)
    combined_kernel[(heads, batch)](
        text=rows[0].to(device), rational=rows[1].to(device), image=image.to(device), combined=combined,
        logsums=torch.stack([maxima, logsums - maxima]).to(device), factors=factors, totals=totals, batch=batch,
        classes=classes, share=0.25, D=heads * head, HEAD=head, HEAD_VECTOR=16,
        BLOCK_S=1024 if classes > 512 else 128, BLOCK_R=64, num_warps=4,
    )  # fmt: skip
    exact = logsums.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    # A log-sum of thousands is as exact as a small one, because its largest score is stored by itself.
    weights = classes * exact.softmax(3)
    torch.testing.assert_close(factors.cpu().double(), weights, rtol=1e-5, atol=1e-30)
    wanted = (exact.logsumexp(3) - torch.log(torch.tensor(float(classes)))) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(totals.cpu().double().sum(0), wanted, rtol=0, atol=1e-5)
    weighted = weights.permute(0, 2, 3, 1).repeat_interleave(head, -1) * rows
    torch.testing.assert_close(combined.cpu().double(), (weighted.sum(0) + image[:, None]) / 4, rtol=1e-5, atol=1e-5)


@Kernel
def head_sums_kernel(
    parts, sums, total_rows,
    KIND: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    store_head_sums(parts, sums, row, row < total_rows, total_rows, KIND, D, HEAD, CHUNK, BLOCK_M)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_heads_deltas_are_the_sums_of_its_chunks(device: str, kind: int) -> None:
    heads, chunks, rows = 3, 5, 100
    parts = torch.randn(2, heads, chunks, rows)
    sums = torch.full((2, heads, rows), torch.nan, device=device)
    head_sums_kernel[(2,)](
        parts=parts.to(device), sums=sums, total_rows=rows, KIND=kind, D=heads * chunks * 16, HEAD=chunks * 16,
        CHUNK=16, BLOCK_M=64, num_warps=4,
    )  # fmt: skip
    torch.testing.assert_close(sums[kind].cpu(), parts[kind].sum(1))
    assert bool(sums[1 - kind].isnan().all())


@Kernel
def strided_sums_kernel(
    rows, sums, classes, D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = arange_by_fours(WIDTH)
    total = strided_sums(rows, c, c < HEAD, classes, D, BLOCK, WIDTH)
    store_column_sums(sums + c, tl.sum(total, 0), c < HEAD, BLOCK, WIDTH)


@pytest.mark.parametrize("classes", [1, 8, 25, 32, 70])
def test_the_sums_over_a_heads_rows_take_every_row_once(device: str, classes: int) -> None:
    """Up to three and more than eight blocks of rows, of which four are loaded together, with a last one that is not
    full. The rows are powers of two, so that no row can be lost in rounding."""
    head, width = 24, 64
    rows = torch.zeros(classes, width)
    rows[torch.arange(classes), torch.arange(classes) % head] = 2.0 ** (torch.arange(classes) // head)
    sums = torch.full((width,), torch.nan, device=device)
    strided_sums_kernel[(1,)](
        rows=rows.to(device), sums=sums, classes=classes, D=width, HEAD=head, BLOCK=8, WIDTH=32, num_warps=4
    )
    assert torch.equal(sums[:head].cpu(), rows[:, :head].sum(0))
    assert bool(sums[head:].isnan().all())


def test_the_features_gradients_are_those_of_all_parts(device: str) -> None:
    # Five tiles of classes are divided among three episodes. There are not as many episodes as blocks of columns.
    episodes, images, classes, parts, groups = 3, 4, 70, 5, 6
    batch = episodes * images
    image_parts, text_parts = torch.randn(parts, batch, WIDTH), torch.randn(groups, classes, WIDTH)
    weight, dq_image = torch.randn(episodes, WIDTH, WIDTH), torch.randn(batch, WIDTH)
    dimage, dtext = (torch.full((rows, WIDTH), torch.nan, device=device) for rows in (batch, classes))
    feature_gradients_reduce_kernel[(1 + 2, WIDTH // 16, episodes)](
        logit_scale=torch.tensor(9.0, device=device), image_weight=weight.to(device), dq_image=dq_image.to(device),
        image_parts=image_parts.to(device), text_parts=text_parts.to(device), dimage=dimage, dtext=dtext,
        batch=batch, images=images, classes=classes, parts=parts, groups=groups, weight_stride=WIDTH * WIDTH,
        D=WIDTH, FACTOR=1.0, BLOCK_M=16, BLOCK_N=16, BLOCK_C=16, num_warps=4, num_stages=2,
    )  # fmt: skip
    through_query = (dq_image.view(episodes, images, WIDTH) @ weight).flatten(0, 1)
    torch.testing.assert_close(dimage.cpu(), 3 * through_query + image_parts.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dtext.cpu(), text_parts.sum(0))
