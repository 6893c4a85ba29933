"""The whole encoder in one call agrees with float64, depends on nothing but its own image, and refuses wrong weights.

tests/models/test_image_encoder.py compares it with open_clip's module.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rada_fast.ops import use_backend
from rada_fast.ops.small_transformer import (
    MOST_LAYER_BYTES,
    Block,
    Norm,
    SmallTransformer,
    Transformer,
    serves_small_transformer,
)
from tests.support import around

from .support import num_threads

pytestmark = pytest.mark.skipif(not serves_small_transformer(32, 64), reason="the compiled operator is not usable here")


def drawn(
    width: int = 40,
    hidden: int = 330,
    layers: int = 2,
    heads: int = 2,
    *,
    channels: int = 3,
    patch: tuple[int, int] = (4, 4),
    tokens: int = 7,
    features: int = 24,
    **changes: Any,
) -> Transformer:
    """Return random weights, as a rule for images (3, 12, 8) in patches of 4 x 4, which make 7 tokens.

    The hidden layer is wider than the part of it that is computed at a time.
    """

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    def norm() -> Norm:
        # Each normalisation has an eps of its own, which may be so large that it shows.
        return Norm(1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width), float(10 ** (-5 * torch.rand(()))))

    def block() -> Block:
        layers = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
        projection, output, first, second = ((weight(*sizes), torch.randn(sizes[0])) for sizes in layers)
        return Block(norm(), projection, output, norm(), first, second)

    whole = Transformer(
        patch_size=patch,
        patches=weight(width, channels * patch[0] * patch[1]),
        positions=torch.randn(tokens, width),
        norm_pre=norm(),
        blocks=[block() for _ in range(layers)],
        norm_post=norm(),
        heads=heads,
        activation="gelu",
        projection=weight(width, features),
    )
    return whole._replace(**changes)


def in_float64(model: Transformer, images: Tensor) -> Tensor:
    """Compute every token of every block, step by step."""

    def linear(rows: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return functional.linear(rows, weights[0].double(), weights[1].double())

    def normalised(rows: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return rows
        return functional.layer_norm(rows, rows.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)

    patches = functional.unfold(images.double(), model.patch_size, stride=model.patch_size).mT
    rows = functional.pad(patches @ model.patches.double().T, (0, 0, 1, 0)) + model.positions.double()
    rows = normalised(rows, model.norm_pre)
    for block in model.blocks:
        parts = linear(normalised(rows, block.norm_1), block.projection).chunk(3, dim=-1)
        heads = (part.unflatten(-1, (model.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        rows = rows + linear(attended, block.output)
        hidden = getattr(functional, model.activation)(linear(normalised(rows, block.norm_2), block.hidden))
        rows = rows + linear(hidden, block.mlp_output)
    pooled = normalised(rows[:, 0], model.norm_post)
    return pooled if model.projection is None else pooled @ model.projection.double()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"layers": 1},
    "one head": {"heads": 1},
    "many heads": {"width": 48, "heads": 16},
    "more heads than tokens": {"width": 128, "heads": 16, "patch": (12, 8), "tokens": 2},
    "many heads and tokens": {"width": 256, "heads": 32, "patch": (2, 1), "tokens": 49},
    "SiLU": {"activation": "silu"},
    "no first normalisation": {"norm_pre": None},
    "no last normalisation": {"norm_post": None},
    "no projection": {"projection": None},
    "hidden layer of one panel": {"hidden": 24},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_float64(options: dict[str, Any]) -> None:
    model = drawn(**options)
    images = torch.randn(5, 3, 12, 8)
    exact = in_float64(model, images)
    torch.testing.assert_close(SmallTransformer(model)(images).double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(16))
def test_drawn_models(seed: int) -> None:
    """Sizes and parts are drawn. Products are computed by 64 columns, and of the hidden layer 320 at a time."""
    r = random.Random(seed)
    channels, high, wide = r.choice([1, 3, 4]), r.randint(1, 5), r.randint(1, 5)
    grid = r.choice([1, 2, 5]), r.choice([1, 3, 7])
    heads, tokens = r.choice([1, 2, 3, 8, 16]), 1 + grid[0] * grid[1]
    width = heads * around(r, 16 // heads + 1, 64 // heads, 128 // heads)
    model = drawn(
        width, around(r, 64, 320, 640), r.randint(1, 3), heads,
        channels=channels, patch=(high, wide), tokens=tokens, features=around(r, 64),
        activation=r.choice(["gelu", "silu"]),
    )  # fmt: skip
    absent = [name for name in ("norm_pre", "norm_post", "projection") if r.random() < 0.3]
    model = model._replace(**dict.fromkeys(absent))
    # A task takes the images of about 260 rows, and 32 images in the end.
    images = torch.randn(around(r, 32, max(1, 260 // tokens)) + 1, channels, grid[0] * high, grid[1] * wide)
    exact = in_float64(model, images)
    torch.testing.assert_close(SmallTransformer(model)(images).double(), exact, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_of_any_size(activation: Any) -> None:
    """The hidden layer of a single block gets large positive and negative numbers, and tiny ones."""
    model = drawn(layers=1, activation=activation, norm_post=None, projection=None)
    block = model.blocks[0]
    scales = torch.logspace(-6, 2, len(block.hidden[1]))
    model = model._replace(
        blocks=[block._replace(hidden=(block.hidden[0] * scales[:, None], block.hidden[1] * scales))]
    )
    images = torch.randn(64, 3, 12, 8)
    exact = in_float64(model, images)
    error = (SmallTransformer(model)(images).double() - exact).abs().max()
    assert float(error) <= 2e-6 * float(exact.abs().max())


def test_scores_of_any_size() -> None:
    model = drawn()
    first = model.blocks[0]
    large = first._replace(projection=(100 * first.projection[0], first.projection[1]))
    images = torch.randn(5, 3, 12, 8)
    for blocks in ([large, model.blocks[1]], [model.blocks[1], large]):
        changed = model._replace(blocks=blocks)
        features = SmallTransformer(changed)(images)
        assert bool(features.isfinite().all())
        torch.testing.assert_close(features.double(), in_float64(changed, images), rtol=1e-3, atol=1e-3)


def test_an_image_depends_on_nothing_else() -> None:
    """The number of images, their place, their memory and the number of threads change no bit."""
    encode = SmallTransformer(drawn())
    images = torch.randn(300, 3, 12, 8)
    together = encode(images)
    for number in (1, 2, 3, 36, 75, 299):
        for start in (0, 1):
            assert torch.equal(encode(images[start : start + number]), together[start : start + number])
    assert torch.equal(encode(images.contiguous(memory_format=torch.channels_last)), together)
    with num_threads(1):
        assert torch.equal(encode(images), together)
    images[7, 0, 0, 0], images[290] = math.nan, math.inf
    found = encode(images)
    assert bool(found[7].isnan().all())
    others = [i for i in range(300) if i not in (7, 290)]
    assert torch.equal(found[others], together[others])
    assert encode(images[:0]).shape == (0, 24)


def test_later_changes_of_the_weights_change_nothing() -> None:
    model = drawn()
    encode, images = SmallTransformer(model), torch.randn(2, 3, 12, 8)
    before = encode(images)
    for tensor in (model.positions, model.patches, *model.blocks[1].projection, model.blocks[0].norm_1.weight):
        tensor.zero_()
    assert torch.equal(encode(images), before)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "positions": ({"positions": torch.randn(8, 40)}, "must have 7 positions, got 8"),
    "patches": ({"patches": torch.randn(40, 47)}, r"must be the panels of \(48, 40\)"),
    "heads": ({"heads": 3}, "heads must divide the width 40, got 3"),
    "no blocks": ({"blocks": []}, "weights must have a block"),
    "a normalisation": ({"norm_post": Norm(torch.ones(39), torch.ones(39), 0.0)}, "must have 40 values"),
    "an activation": ({"activation": "relu"}, "activation must be gelu or silu, got relu"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_weights_are_refused(changes: dict[str, Any], message: str) -> None:
    encode = SmallTransformer(drawn(**changes))
    with pytest.raises(RuntimeError, match=message):
        encode(torch.randn(1, 3, 12, 8))


def test_wrong_images_are_refused() -> None:
    encode = SmallTransformer(drawn())
    for images in (torch.randn(3, 12, 8), torch.randn(1, 3, 12, 8).double()):
        with pytest.raises(RuntimeError, match="images must be"):
            encode(images)


def test_what_it_serves() -> None:
    assert serves_small_transformer(160, 640)
    assert not serves_small_transformer(768, 3072)
    assert MOST_LAYER_BYTES < 4 * 12 * 768**2
    with use_backend("reference"):
        assert not serves_small_transformer(160, 640)
