"""Kernels that add up or compare the results of other launches are right for more values than one block holds.

The tests launch these kernels by themselves, because whole problems of these sizes would take the simulator minutes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rada_fast.kernels.class_attention.deltas import row_deltas_kernel
from rada_fast.kernels.class_attention.forward import softmax_factors_kernel
from rada_fast.kernels.masked_logits.forward import masked_logits_reduce_kernel
from rada_fast.kernels.rational_projections import image_gradient_reduce_kernel

WIDTH, CHUNKS, PEAKS = 64, 2, 8
"""The width of a row of the mask, and into how many parts its logit and its largest distance are split."""


def launch_reduction(
    device: str, penalty: int, *, images: int = 2, episodes: int = 1, classes: int = 3, parts: int = 1,
    distances: Tensor | None = None, columns: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Launch the kernel on drawn parts, and return both parts and results. What it does not write stays NaN or -1."""
    batch = images * episodes
    generator = torch.Generator().manual_seed(0)
    given = {
        "logit_parts": torch.randn(CHUNKS, batch, classes, generator=generator),
        "penalty_parts": torch.rand(episodes, parts, generator=generator),
        "peak_values": torch.zeros(PEAKS, batch, classes) if distances is None else distances,
        "peak_columns": torch.zeros(PEAKS, batch, classes, dtype=torch.int32) if columns is None else columns,
        "logits": torch.full((batch, classes), torch.nan),
        "sums": torch.full((batch, classes), torch.nan),
        "penalty": torch.full((episodes,), torch.nan),
        "peaks": torch.full((batch,), -1),
    }
    given = {name: value.to(device) for name, value in given.items()}
    masked_logits_reduce_kernel[(batch + episodes,)](
        logit_scale=torch.tensor(20.0, device=device), **given,
        batch=batch, images=images, classes=classes, total_rows=batch * classes, parts=parts, elements=8.0,
        D=WIDTH, BLOCKS=CHUNKS, PEAKS=PEAKS, PENALTY=penalty, BLOCK=512, PIECE=2, num_warps=4,
    )  # fmt: skip
    return {name: value.cpu() for name, value in given.items()}


def test_logits_of_more_classes_than_one_block(device: str) -> None:
    results = launch_reduction(device, 1, classes=1200)
    wanted = results["logit_parts"].sum(0)
    torch.testing.assert_close(results["sums"], wanted)
    torch.testing.assert_close(results["logits"], 20 * wanted)


@pytest.mark.parametrize("penalty", [1, 2])
def test_a_penalty_of_more_parts_than_one_block(device: str, penalty: int) -> None:
    results = launch_reduction(device, penalty, episodes=3, parts=1100)
    torch.testing.assert_close(results["penalty"], results["penalty_parts"].sum(1) / 8)


@pytest.mark.parametrize("classes", [3, 1100])
def test_the_first_of_equal_distances_counts(device: str, classes: int) -> None:
    """The first class counts and of its columns the first, as in torch.max, whichever parts hold the equal ones."""
    images, episodes = 2, 2
    batch = images * episodes
    columns = (8 * torch.arange(PEAKS, dtype=torch.int32)[:, None, None]).expand(PEAKS, batch, classes).contiguous()
    distances = torch.full((PEAKS, batch, classes), 0.5)
    distances[:, 1:, 0] = 0.25  # not the first class
    distances[:3, 2:] = 0.25  # nor the first columns
    distances[:, 3] = 0.0  # everything is equal, and zero
    last = classes - 1
    distances[:, 1, :last] = 0.25  # only in the last class
    results = launch_reduction(
        device, 3, images=images, episodes=episodes, classes=classes, distances=distances, columns=columns
    )  # fmt: skip
    assert results["peaks"].tolist() == [0, last * WIDTH, WIDTH + 24, 0]
    assert results["penalty"].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("classes", [1, 130, 2100])
def test_factors_of_more_classes_than_one_block(device: str, classes: int) -> None:
    # In the first head all classes count. The log-sums of the second reach thousands, and the last is the largest.
    logsums = torch.stack([3 * torch.randn(classes), torch.linspace(-3000.0, 3000.0, classes)])
    maxima = logsums.floor()
    factors, totals, total_maxima = (
        torch.full(shape, torch.nan, device=device) for shape in ((2, classes), (2,), (2,))
    )
    softmax_factors_kernel[(2,)](
        maxima=maxima.to(device), logsums=(logsums - maxima).to(device), factors=factors, total_maxima=total_maxima,
        totals=totals, classes=classes,
        BLOCK=1024 if classes > 512 else 128, num_warps=4,
    )  # fmt: skip
    exact = logsums.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    # A log-sum of thousands is as exact as a small one, because its largest score is stored by itself.
    torch.testing.assert_close(factors.cpu().double(), classes * exact.softmax(1), rtol=1e-5, atol=1e-30)
    wanted = (exact.logsumexp(1) - torch.log(torch.tensor(float(classes)))) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(total_maxima.cpu().double() + totals.cpu().double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [130, 1100])
def test_deltas_of_more_classes_than_one_block(device: str, classes: int) -> None:
    kinds_and_heads, chunks, batch = 2, 3, 2
    deltas = torch.randn(kinds_and_heads * chunks, batch, classes)
    sums = torch.full((kinds_and_heads, batch, classes), torch.nan, device=device)
    row_deltas_kernel[(kinds_and_heads * batch,)](
        deltas=deltas.to(device), sums=sums, batch=batch, classes=classes, CHUNKS=chunks,
        BLOCK=1024 if classes > 512 else 128, num_warps=4,
    )  # fmt: skip
    torch.testing.assert_close(sums.cpu(), deltas.view(kinds_and_heads, chunks, batch, classes).sum(1))


def test_an_images_gradient_is_that_of_all_parts(device: str) -> None:
    episodes, images, parts = 2, 3, 5
    batch = episodes * images
    image_parts = torch.randn(parts, batch, WIDTH)
    weight, dq_image = torch.randn(episodes, WIDTH, WIDTH), torch.randn(batch, WIDTH)
    dimage = torch.full((batch, WIDTH), torch.nan, device=device)
    image_gradient_reduce_kernel[(1, WIDTH // 32, episodes)](
        logit_scale=torch.tensor(9.0, device=device), image_weight=weight.to(device), dq_image=dq_image.to(device),
        image_parts=image_parts.to(device), dimage=dimage,
        batch=batch, images=images, parts=parts, weight_stride=WIDTH * WIDTH,
        D=WIDTH, FACTOR=1.0, BLOCK_M=16, BLOCK_N=32, BLOCK_C=16, num_warps=4, num_stages=2,
    )  # fmt: skip
    through_query = (dq_image.view(episodes, images, WIDTH) @ weight).flatten(0, 1)
    torch.testing.assert_close(dimage.cpu(), 3 * through_query + image_parts.sum(0), rtol=1e-5, atol=1e-4)
