"""The compiled attention of image encoders agrees with float64, and depends on nothing but one image's own head."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from rada_fast.ops import encoder_attention, use_backend
from rada_fast.ops.encoder_attention import _is_served, _serves
from rada_fast.reference.encoder_attention import encoder_attention as reference
from tests.support import around

SIZES = [(2, 197, 197, 128, 2), (3, 1, 197, 128, 2), (1, 65, 65, 160, 4), (1, 3, 1, 8, 1), (2, 420, 31, 24, 3)]
"""N, L', L, W and heads: a ViT-B/16's heads, its pooled token, the shipped model's, and sizes that fill no vector. 420
queries are more than one block."""


def draw(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as an encoder makes them, side by side in the rows of one product."""
    images, queries, keys, width, _ = sizes
    joint = torch.randn(images, max(queries, keys), 3 * width).mul(2).to(dtype)
    first, second, third = joint.chunk(3, dim=-1)
    return first[:, :queries], second[:, :keys], third[:, :keys]


def _drawn_sizes(seed: int) -> tuple[int, ...]:
    r = random.Random(seed)
    heads = r.choice([1, 2, 3, 5])
    # Queries are worked on by up to 208, and 16 values fill a vector.
    return r.randint(1, 3), around(r, 16, 208, 416), around(r, 16, 32, 64), heads * 2 * around(r, 8, 16, 32), heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*SIZES, *(_drawn_sizes(seed) for seed in range(16))])
def test_it_agrees_with_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    if not _serves(dtype):
        pytest.skip("the compiled operator does not serve this type here")
    rows, heads = draw(sizes, dtype), sizes[-1]
    assert _is_served(*rows, heads)
    exact = reference(*(part.double() for part in rows), heads)
    error = float((reference(*rows, heads) - exact).abs().max())
    result = encoder_attention(*rows, heads)
    assert (result.dtype, result.shape) == (dtype, rows[0].shape)
    # Scores reach tens, so that the rounding of one changes its probability by some units in the last place.
    band = 8 * float(torch.finfo(dtype).eps) * float(exact.abs().max())
    assert float((result - exact).abs().max()) <= 2 * error + band


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_image_does_not_depend_on_the_others(dtype: torch.dtype, backend: str) -> None:
    for length in (1, 65):
        rows = draw((19, length, 65, 160, 4), dtype)
        with use_backend(backend):
            together = encoder_attention(*rows, 4)
            for number in (1, 2, 8):
                alone = encoder_attention(*(part[5 : 5 + number] for part in rows), 4)
                assert torch.equal(alone, together[5 : 5 + number]), (length, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_stride_are_served(dtype: torch.dtype) -> None:
    if not _serves(dtype):
        pytest.skip("the compiled operator does not serve this type here")
    rows = draw((2, 7, 9, 24, 3), dtype)
    expected = encoder_attention(*(part.contiguous() for part in rows), 3)
    # Columns that are not neighbours, one row for all images, and rows that begin at an odd place.
    strided = [part.transpose(0, 2).contiguous().transpose(0, 2) for part in rows]
    assert torch.equal(encoder_attention(*strided, 3), expected)
    expanded = [part[:1].expand(2, -1, -1) for part in rows]
    assert torch.equal(encoder_attention(*expanded, 3), expected[:1].expand(2, -1, -1))
    odd = [torch.nn.functional.pad(part, (1, 2))[..., 1:-2] for part in rows]
    assert torch.equal(encoder_attention(*odd, 3), expected)
    for which in range(3):
        # One of the three has longer rows and more of them than the others.
        mixed = [torch.nn.functional.pad(part, (2, 2, 0, 3))[:, :-3, 2:-2] if at == which else part.contiguous()
                 for at, part in enumerate(rows)]  # fmt: skip
        assert torch.equal(encoder_attention(*mixed, 3), expected)


def test_an_average_of_equal_values_is_that_value() -> None:
    """Nearly all probabilities are rounded down to 16 bits, by almost half a unit. Their sum must be that of these."""
    if not _serves(torch.bfloat16):
        pytest.skip("the compiled operator does not serve this type here")
    keys = torch.tensor([[0.0, 0.0, 0, 0]] + 64 * [[-1.375, -0.0038, 0, 0]], dtype=torch.bfloat16)[None]
    queries = torch.tensor([[[1.0, 1.0, 0, 0]]], dtype=torch.bfloat16)
    assert bool((encoder_attention(queries, keys, torch.ones_like(keys), 1) == 1).all())


def test_a_number_that_is_not_finite_stays_in_its_image() -> None:
    queries, keys, values = draw((3, 65, 65, 160, 4), torch.float32)
    values[1, 3, 7] = torch.nan
    keys[2, 5, 9] = torch.nan
    result = encoder_attention(queries, keys, values, 4)
    assert bool(result[0].isfinite().all())
    assert bool(result[1, :, 7].isnan().all())
    assert bool(result[2, :, :40].isnan().all())


def test_what_memory_held_does_not_show() -> None:
    """An odd last key is paired with a row of zeros. In its place the call before has left NaN."""
    if not _serves(torch.bfloat16):
        pytest.skip("the compiled operator does not serve this type here")
    queries, keys, values = draw((8, 65, 66, 160, 4), torch.bfloat16)
    encoder_attention(queries, keys, torch.full_like(values, torch.nan), 4)
    assert bool(encoder_attention(queries, keys[:, :65], values[:, :65], 4).isfinite().all())


def test_gradients_come_from_pytorch() -> None:
    rows = [part.clone().requires_grad_() for part in draw((2, 3, 5, 8, 2), torch.float32)]
    encoder_attention(*rows, 2).sum().backward()
    expected = [part.detach().clone().requires_grad_() for part in rows]
    reference(*expected, 2).sum().backward()
    for part, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(part.grad, other.grad)
    assert encoder_attention(*(part[:0] for part in rows), 2).shape == (0, 3, 8)
