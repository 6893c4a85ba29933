"""AugMix of views equals Pillow's operations and PyTorch's mix and random draws, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

from rada_fast.data.views import Preprocess, make_views
from rada_fast.errors import BackendUnavailableError
from rada_fast.ops import AugmixPlan, augmix, multi_view_crops, random_augmix, use_backend, whole_view
from rada_fast.ops._backends import library
from rada_fast.reference import augmix as reference

from .support import MEAN, STD, assert_rounds_float32, needs_extension, num_threads


def picture(height: int, width: int, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(low, high, (height, width, 3)).astype(np.uint8))


def one_chain(pixels: Tensor, size: int, *steps: tuple[int, list[float]]) -> AugmixPlan:
    """Return a plan with one chain, which is not mixed with the plain view of the picture."""
    matrices = [values + [0.0] * (6 - len(values)) for _, values in steps]
    return AugmixPlan(
        whole_view(*pixels.shape[:2], size, resize="squash", interpolation="bilinear"),
        torch.tensor([[[operation for operation, _ in steps]]]),
        torch.tensor([[matrices]], dtype=torch.float64),
        torch.tensor([[1.0, 0.0, 1.0]]),
    )


def assert_equal(pixels: Tensor, plan: AugmixPlan, size: int) -> None:
    output = augmix([pixels], plan, size, MEAN, STD, backend="cpu")
    assert torch.equal(output, reference.augmix([pixels], *plan, size, MEAN, STD))


@needs_extension
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.sampled_from([1, 2, 7, 32, 45]),
    seed=st.integers(0, 2**63 - 1),
    severity=st.sampled_from([1.0, 10.0]),
)
def test_a_picture_has_pillows_views_for_its_seed(
    shape: tuple[int, int], size: int, seed: int, severity: float
) -> None:
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    severe = severity if severity == 1.0 else 3.0  # posterize keeps no bit from severity 7.5 on, which Pillow refuses
    plan = random_augmix(*shape, size, 4, ours, severity=severe, backend="cpu")
    expected = random_augmix(*shape, size, 4, theirs, severity=severe, backend="reference")
    for name, found, wanted in zip(plan._fields, plan, expected, strict=True):
        assert torch.equal(found, wanted), name
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert_equal(picture(*shape), plan, size)


@needs_extension
@pytest.mark.parametrize(("low", "high"), [(0, 256), (90, 130), (200, 201), (0, 2)])
@pytest.mark.parametrize("first", [1, 2, 3, 4])
@pytest.mark.parametrize("second", [1, 2, 3, 4])
def test_operations_on_values(first: int, second: int, low: int, high: int) -> None:
    # Pictures of few values or one value, and several tables that are combined before any pixel is read.
    values = {1: [0.0], 2: [0.0], 3: [3.0], 4: [100.0]}
    for size in (5, 40):
        pixels = picture(40, 40, low=low, high=high)
        assert_equal(pixels, one_chain(pixels, size, (first, values[first]), (second, values[second])), size)


@needs_extension
@pytest.mark.parametrize("size", [1, 2, 33])
@pytest.mark.parametrize(
    "matrix",
    [
        [1.0, 0.03, 0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, -0.03, 1.0, 0.0],
        [1.0, 0.0, 7.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, -7.0, 0.0, 1.0, 40.0],
        [1.0, 0.0, 0.5, 0.0, 1.0, -0.25],
        [1.0, 0.0, -0.25, 0.0, 1.0, 0.5],  # the last row comes from the lower edge itself
        [-1.0, 0.0, 20.0, 0.0, 1.0, 0.0],
        [0.3, 1.7, -3.0, -2.0, 0.1, 30.0],
        [0.0, 0.0, 1e9, 0.0, 0.0, 0.0],
    ],
)
def test_affine_transforms(matrix: list[float], size: int) -> None:
    pixels = picture(40, 30)
    assert_equal(pixels, one_chain(pixels, size, (5, matrix)), size)
    # Tables come before and after the transform, and two transforms follow one another.
    # Noise of the whole range stays as it is when its contrast is stretched, but not when it is solarised.
    assert_equal(pixels, one_chain(pixels, size, (1, [0.0]), (4, [100.0]), (5, matrix), (2, [0.0])), size)
    assert_equal(pixels, one_chain(pixels, size, (5, matrix), (5, matrix), (4, [9.0])), size)


@needs_extension
@pytest.mark.parametrize("degrees", [1.0, -1.0, 2.0, 3.0, -30.0, 90.0, 180.0, 359.5])
@pytest.mark.parametrize("size", [8, 33, 224])
def test_rotations_use_pillows_matrix(degrees: float, size: int) -> None:
    matrix = reference._rotation(degrees, size)
    pixels = picture(size, size)
    rotated = Image.fromarray(pixels.numpy()).rotate(degrees, resample=Image.Resampling.BILINEAR)
    if degrees not in (90.0, 180.0):
        assert np.array_equal(np.asarray(reference.apply(Image.fromarray(pixels.numpy()), 5, matrix)), rotated)
    assert_equal(pixels, one_chain(pixels, size, (5, matrix)), size)


def published_views(image: Image.Image, size: int, count: int, seed: int) -> Tensor:
    """AugMix as test-time prompt tuning writes it, with Pillow's and torchvision's own functions for everything."""

    def level(most: float) -> float:
        return float(torch.empty(()).uniform_(0.1, 1)) * most / 10

    def signed(value: float) -> float:
        return -value if torch.rand(()) > 0.5 else value

    def affine(view: Image.Image, *matrix: float) -> Image.Image:
        return view.transform(view.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)

    operations: list[Callable[[Image.Image], Image.Image]] = [
        ImageOps.autocontrast,
        ImageOps.equalize,
        lambda view: ImageOps.posterize(view, 4 - int(level(4))),
        lambda view: view.rotate(signed(int(level(30))), resample=Image.Resampling.BILINEAR),
        lambda view: ImageOps.solarize(view, 256 - int(level(256))),
        lambda view: affine(view, 1, signed(level(0.3)), 0, 0, 1, 0),
        lambda view: affine(view, 1, 0, 0, signed(level(0.3)), 1, 0),
        lambda view: affine(view, 1, 0, signed(int(level(size / 3))), 0, 1, 0),
        lambda view: affine(view, 1, 0, 0, 0, 1, signed(int(level(size / 3)))),
    ]
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    crop = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
    views = []
    torch.manual_seed(seed)
    for _ in range(count):
        view = crop(image)
        # Normalised exponentials are Dirichlet(1, 1, 1), and a uniform number is Beta(1, 1).
        weights = torch.empty(3).exponential_()
        weights = weights / weights.sum()
        share = float(torch.rand(()))
        mix = torch.zeros(())
        for weight in weights:
            augmented = view
            for _ in range(int(torch.randint(1, 4, ()))):
                augmented = operations[int(torch.randint(9, ()))](augmented)
            mix = mix + weight * normalise(augmented)
        views.append(share * normalise(view) + (1 - share) * mix)
    return torch.stack(views)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_views_of_a_picture_file_are_those_of_the_published_procedure(backend: str) -> None:
    preprocess = Preprocess(32, MEAN, STD)
    for height, width in ((75, 100), (1, 1), (1, 400), (33, 31)):
        image = Image.fromarray(picture(height, width).numpy())
        for seed in (5, 6):
            with use_backend(backend):
                output = make_views(image, preprocess, 9, "augmix", seed)
            assert torch.equal(output[1:], published_views(image, 32, 8, seed))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_augmix_weighs_its_chains_as_published(backend: str) -> None:
    pixels = picture(37, 50)
    plan = random_augmix(37, 50, 32, 60, torch.Generator().manual_seed(0), severity=3.0, backend=backend)
    # Dirichlet's weights sum to 1, and so do Beta's two shares.
    torch.testing.assert_close(plan.weights[:, :3].sum(1), torch.ones(60))
    torch.testing.assert_close(plan.weights[:, 3:].sum(1), torch.ones(60))
    # Where the operations change nothing, the mix is the plain view, except for four products and three sums of values
    # below 4: a few units of 4 * 2**-24.
    unchanged = plan._replace(operations=torch.zeros_like(plan.operations))
    output = augmix([pixels], unchanged, 32, MEAN, STD, backend=backend)
    expected = multi_view_crops([pixels], plan.views, 32, MEAN, STD, backend=backend)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    # A chain has one to three operations, the first ones of its row; a rotation by no degree is none.
    assert set((plan.operations != 0).sum(-1).unique().tolist()) - {0} == {1, 2, 3}


@needs_extension
def test_a_view_without_a_share_for_the_chains_is_the_plain_view() -> None:
    pixels = picture(30, 40)
    plan = random_augmix(30, 40, 16, 2, torch.Generator().manual_seed(0)).with_plain(whole_view(30, 40, 16))
    output = augmix([pixels], plan, 16, MEAN, STD, backend="cpu")
    assert torch.equal(output[:1], multi_view_crops([pixels], plan.views[:1], 16, MEAN, STD))


@needs_extension
def test_low_precision_is_the_float32_result_rounded() -> None:
    pixels = picture(30, 40)
    plan = random_augmix(30, 40, 17, 5, torch.Generator().manual_seed(0))
    assert_rounds_float32(lambda dtype: augmix([pixels], plan, 17, MEAN, STD, dtype=dtype, backend="cpu"))


@needs_extension
def test_views_do_not_depend_on_neighbours_order_or_threads() -> None:
    pixels = picture(30, 40)
    plan = random_augmix(30, 40, 24, 7, torch.Generator().manual_seed(0))
    expected = augmix([pixels], plan, 24, MEAN, STD, backend="cpu")
    order = torch.randperm(7)
    shuffled = AugmixPlan(*(tensor[order] for tensor in plan))
    with num_threads(3):
        assert torch.equal(augmix([pixels], shuffled, 24, MEAN, STD, backend="cpu"), expected[order])


@needs_extension
def test_plans_of_any_strides_are_served() -> None:
    pixels = picture(30, 40)
    plan = random_augmix(30, 40, 24, 7, torch.Generator().manual_seed(0))
    expected = augmix([pixels], plan, 24, MEAN, STD, backend="cpu")
    strided = AugmixPlan(*(tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in plan))
    assert torch.equal(augmix([pixels], strided, 24, MEAN, STD, backend="cpu"), expected)


def test_impossible_plans_are_refused() -> None:
    pixels = picture(9, 9)
    plan = random_augmix(9, 9, 8, 2, torch.Generator().manual_seed(0))
    changes: list[tuple[AugmixPlan, str]] = [
        (plan._replace(operations=plan.operations + 4), r"operations must be 0\.\.5"),
        (plan._replace(operations=plan.operations[:1]), r"operations must be \(2, 3, 3\)"),
        (plan._replace(matrices=plan.matrices.float()), r"matrices must be \(2, 3, 3, 6\) torch.float64"),
        (plan._replace(weights=plan.weights[:, :4]), r"weights must be \(2, 5\)"),
        (plan._replace(operations=torch.full((2, 3, 3), 3), matrices=plan.matrices * 0), "posterize keeps 1 to 8 bits"),
    ]
    for changed, message in changes:
        with pytest.raises(ValueError, match=message):
            augmix([pixels], changed, 8, MEAN, STD)
        if library.load() is None:
            # The operator itself checks its arguments too.
            with pytest.raises(ValueError, match=r"must be|keeps"):
                torch.ops.rada_fast.augmix([pixels], *changed, 8, MEAN, STD, torch.float32, True)
    for change in ({"chains": 0}, {"depth": 0}, {"severity": 0.05}, {"severity": 11.0}):
        with pytest.raises(ValueError, match="chains and depth must be at least 1 and severity"):
            random_augmix(9, 9, 8, 2, torch.Generator(), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 0, 9 and 8"):
        random_augmix(0, 9, 8, 1, torch.Generator())


def test_without_the_extension_everything_is_made_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(30, 20)
    image = Image.fromarray(pixels.numpy())
    expected = make_views(image, Preprocess(16, MEAN, STD), 4, "augmix", 0)
    monkeypatch.setattr(library, "load", lambda: "not built")
    assert torch.equal(make_views(image, Preprocess(16, MEAN, STD), 4, "augmix", 0), expected)
    plan = random_augmix(30, 20, 16, 3, torch.Generator().manual_seed(0))
    assert torch.equal(augmix([pixels], plan, 16, MEAN, STD), expected[1:])
    with pytest.raises(BackendUnavailableError, match="not built"):
        augmix([pixels], plan, 16, MEAN, STD, backend="cpu")


@needs_extension
def test_the_operator_is_registered_as_torch_wants() -> None:
    plan = random_augmix(9, 9, 8, 2, torch.Generator().manual_seed(0))
    arguments = ([picture(9, 9)], *plan, 8, MEAN, STD, torch.float32, True)
    torch.library.opcheck(torch.ops.rada_fast.augmix.default, arguments)
