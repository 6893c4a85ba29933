"""Views of pictures equal those of Pillow and torchvision bit for bit; tests/cuda tests the CUDA kernels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from rada_fast.data.decode import read_image
from rada_fast.data.views import Preprocess, center_view, crop_view, make_views
from rada_fast.errors import BackendUnavailableError
from rada_fast.ops import multi_view_crops, random_views, use_backend, whole_view
from rada_fast.ops._backends import library
from rada_fast.reference import multi_view_crops as reference

from .support import MEAN, STD, assert_rounds_float32, needs_extension, num_threads


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Draw noise with blocks of black and white, where bicubic weights give sums out of range."""
    values = np.random.default_rng(seed).integers(-128, 384, (height, width, 3)).clip(0, 255)
    return torch.from_numpy(values.astype(np.uint8))


def view(pixels: Tensor, size: int, **changed: int) -> Tensor:
    """Return a table of one view, the whole picture resized to size x size, with some fields changed."""
    height, width, _ = pixels.shape
    row = {"picture": 0, "top": 0, "left": 0, "height": height, "width": width}
    row |= {"resized_height": size, "resized_width": size, "window_top": 0, "window_left": 0, "flip": 0, "bicubic": 0}
    return torch.tensor([list((row | changed).values())])


def equal(pictures: list[Tensor], views: Tensor, size: int) -> bool:
    expected = reference.multi_view_crops(pictures, views, size, MEAN, STD)
    return torch.equal(multi_view_crops(pictures, views, size, MEAN, STD, backend="cpu"), expected)


sizes = st.integers(1, 90)


@needs_extension
@given(
    shape=st.tuples(sizes, sizes),
    resized=st.tuples(sizes, sizes),
    seed=st.integers(0, 2**32 - 1),
    flip=st.integers(0, 1),
    bicubic=st.integers(0, 1),
)
def test_every_resize_is_pillows(
    shape: tuple[int, int], resized: tuple[int, int], seed: int, flip: int, bicubic: int
) -> None:
    # Sizes shrink in one direction and grow in the other, which tries windows, boxes and both orders of the passes.
    rng = np.random.default_rng(seed)
    pixels = picture(*shape, seed)
    size = int(rng.integers(1, min(resized) + 1))
    height, width = (int(rng.integers(1, side + 1)) for side in shape)
    views = view(
        pixels,
        size,
        top=int(rng.integers(0, shape[0] - height + 1)),
        left=int(rng.integers(0, shape[1] - width + 1)),
        height=height,
        width=width,
        resized_height=resized[0],
        resized_width=resized[1],
        window_top=int(rng.integers(0, resized[0] - size + 1)),
        window_left=int(rng.integers(0, resized[1] - size + 1)),
        flip=flip,
        bicubic=bicubic,
    )
    assert equal([pixels], views, size)


@needs_extension
@pytest.mark.parametrize("bicubic", [0, 1])
@pytest.mark.parametrize(
    ("shape", "size"),
    # One pixel; a row and a column; more than four inputs between neighbours; four outputs that see 17 pixels, one more
    # than a vector; widths around a vector's; no change.
    [
        ((1, 1), 7),
        ((1, 4000), 8),
        ((4000, 1), 8),
        ((40, 2000), 33),
        ((2000, 40), 33),
        ((9, 130), 30),
        ((65, 63), 64),
        ((64, 64), 64),
    ],
)
def test_extreme_shapes_are_pillows(shape: tuple[int, int], size: int, bicubic: int) -> None:
    pixels = picture(*shape)
    for flip in (0, 1):
        assert equal([pixels], view(pixels, size, bicubic=bicubic, flip=flip), size)
    # The original view keeps its proportions, and only the window of a very long picture is computed.
    assert equal([pixels], whole_view(*shape, size), size)


@needs_extension
def test_pictures_of_differing_sizes_and_strides() -> None:
    pictures = [picture(31, 47, 1), picture(20, 60, 2), picture(5, 9, 3), picture(90, 80, 4)]
    # The pictures have channels first, every other pixel of a row, rows in reverse order, or are contiguous.
    pictures[0] = pictures[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    pictures[1] = pictures[1][:, ::2]
    pictures[2] = pictures[2].permute(1, 0, 2).contiguous().permute(1, 0, 2)
    tables = []
    for index, pixels in enumerate(pictures):
        drawn = random_views(*pixels.shape[:2], 24, 6, torch.Generator().manual_seed(index), backend="cpu")
        drawn[:, 0] = index
        tables.append(drawn)
    views = torch.cat(tables)[torch.randperm(24)]
    assert equal(pictures, views, 24)
    assert equal(pictures, views.T.contiguous().T, 24)


@needs_extension
@given(
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    seed=st.integers(0, 2**63 - 1),
    scale=st.sampled_from([(0.08, 1.0), (0.5, 1.0), (1.0, 1.0), (0.9, 4.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 0.3)]),
)
def test_draws_are_torchvisions(
    shape: tuple[int, int], seed: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    # Where no box of the picture has the scale and the ratio, the crop is the centre.
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    drawn = random_views(*shape, 32, 40, ours, scale=scale, ratio=ratio, backend="cpu")
    assert torch.equal(drawn, reference.random_views(*shape, 32, 40, theirs, scale, ratio))
    assert torch.equal(ours.get_state(), theirs.get_state())


@needs_extension
@pytest.mark.parametrize(
    # Every box that is drawn is too large; the one in the middle has 2.5 pixels, of which Python makes 2.
    ("shape", "ratio", "sides"),
    [((4000, 5), (2.0, 2.0), [2, 5]), ((5, 4000), (0.5, 0.5), [5, 2])],
)
def test_a_box_in_the_middle_is_rounded_to_even(
    shape: tuple[int, int], ratio: tuple[float, float], sides: list[int]
) -> None:
    drawn = random_views(*shape, 8, 1, torch.Generator().manual_seed(0), scale=(1.0, 1.0), ratio=ratio, backend="cpu")
    assert drawn[0, 3:5].tolist() == sides
    expected = reference.random_views(*shape, 8, 1, torch.Generator().manual_seed(0), (1.0, 1.0), ratio)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_a_picture_has_torchvisions_views_for_its_seed(backend: str) -> None:
    image = Image.fromarray(picture(75, 100).numpy())
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(48),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    for seed in range(4):
        torch.manual_seed(seed)
        expected = torch.stack([transform(image) for _ in range(12)])
        with use_backend(backend):
            views = random_views(75, 100, 48, 12, torch.Generator().manual_seed(seed))
            output = multi_view_crops([picture(75, 100)], views, 48, MEAN, STD)
        assert torch.equal(output, expected)
        assert torch.equal(make_views(image, Preprocess(48, MEAN, STD), 13, "crop", seed)[1:], expected)


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    for backend in ("reference", "cpu" if library.load() is None else "reference"):
        random_views(30, 40, 8, 5, torch.Generator().manual_seed(1), backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


@needs_extension
def test_low_precision_is_the_float32_result_rounded() -> None:
    pixels = picture(37, 50)
    views = random_views(37, 50, 33, 5, torch.Generator().manual_seed(0))
    assert_rounds_float32(lambda dtype: multi_view_crops([pixels], views, 33, MEAN, STD, dtype=dtype, backend="cpu"))


@needs_extension
@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.1, -3.0, 1e30), (1e-30, 7.3, 1e-3))])
def test_any_normalisation_is_torchs(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).reshape(16, 16, 3)
    views = view(pixels, 16)
    output = multi_view_crops([pixels], views, 16, mean, std, backend="cpu")
    assert torch.equal(output, reference.multi_view_crops([pixels], views, 16, mean, std))


def file_of(mode: str, **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG", **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 60).numpy()).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@needs_extension
@pytest.mark.parametrize("kind", ["L", "RGBA", "CMYK", "P", "1", "exif"])
def test_every_kind_of_file_gives_the_same_views(kind: str, tmp_path: Any) -> None:
    path = tmp_path / "picture"
    path.write_bytes(rotated() if kind == "exif" else file_of(kind))
    image = read_image(path)
    preprocess = Preprocess(24, MEAN, STD)
    output = make_views(image, preprocess, 6, "crop", 3)
    cropped, center = crop_view(image, preprocess, 5, (0.3, 1.0)), center_view(image, preprocess)
    with use_backend("reference"):
        assert torch.equal(output, make_views(image, preprocess, 6, "crop", 3))
        assert torch.equal(cropped, crop_view(image, preprocess, 5, (0.3, 1.0)))
        assert torch.equal(center, center_view(image, preprocess))


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
def test_views_do_not_depend_on_threads(threads: int) -> None:
    pixels = picture(60, 50)
    views = random_views(60, 50, 20, 17, torch.Generator().manual_seed(0))
    with num_threads(threads):
        assert equal([pixels], views, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": 1}, r"views must name pictures in 0\.\.0, got 1\.\.1"),
        ({"top": -1}, r"views\[0\] has a box"),
        ({"height": 0}, r"views\[0\] has a box"),
        ({"left": 1}, r"views\[0\] has a box .* of \(0, 1, 20, 30\) in a picture of \(20, 30\)"),
        ({"width": 31}, r"views\[0\] has a box"),
        ({"window_top": 1}, r"views\[0\] has a window of 8 at \(1, 0\) in a resized box of \(8, 8\)"),
        ({"resized_width": 7}, r"views\[0\] has a window"),
    ],
)
def test_views_that_leave_their_picture_are_refused(change: dict[str, int], message: str) -> None:
    pixels = picture(20, 30)
    views = view(pixels, 8, **change)
    with pytest.raises(ValueError, match=message):
        multi_view_crops([pixels], views, 8, MEAN, STD)
    if library.load() is None:
        # The operator itself checks its arguments too.
        with pytest.raises(ValueError, match=r"views\[0\]"):
            torch.ops.rada_fast.multi_view_crops([pixels], views, 8, MEAN, STD, torch.float32, True)


def test_arguments_of_a_wrong_kind_are_refused() -> None:
    pixels = picture(20, 30)
    views = view(pixels, 8)
    for wrong, message in (
        (
            pixels.float(),
            r"pictures\[0\] must be \(height, width, 3\) uint8 with pixels, got \(20, 30, 3\) torch.float32",
        ),
        (pixels[..., :1], r"pictures\[0\] must be .* got \(20, 30, 1\)"),
        (pixels[:0], r"pictures\[0\] must be .* got \(0, 30, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_view_crops([wrong], views, 8, MEAN, STD)
    with pytest.raises(ValueError, match=r"views must be \(N, 11\) int64, got \(1, 10\) torch.int64"):
        multi_view_crops([pixels], views[:, :10], 8, MEAN, STD)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        multi_view_crops([pixels], views, 0, MEAN, STD)
    with pytest.raises(ValueError, match="mean and std must have 3 values, got 2 and 3"):
        multi_view_crops([pixels], views, 8, MEAN[:2], STD)
    with pytest.raises(ValueError, match="std must not be zero"):
        multi_view_crops([pixels], views, 8, MEAN, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        multi_view_crops([pixels], views, 8, MEAN, STD, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 0, 5 and 8"):
        random_views(0, 5, 8, 1, torch.Generator())


def test_a_backend_without_views_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(9, 9)
    with pytest.raises(BackendUnavailableError):
        multi_view_crops([pixels], view(pixels, 8), 8, MEAN, STD, backend="triton")
    # Loops name a backend for the adapter, which must not hinder their views.
    image = Image.fromarray(pixels.numpy())
    expected = make_views(image, Preprocess(8, MEAN, STD), 3, "crop", 0)
    with use_backend("triton"):
        assert torch.equal(make_views(image, Preprocess(8, MEAN, STD), 3, "crop", 0), expected)


def test_without_the_extension_everything_is_made_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(picture(30, 20).numpy())
    expected = make_views(image, Preprocess(16, MEAN, STD), 4, "crop", 0)
    monkeypatch.setattr(library, "load", lambda: "not built")
    assert torch.equal(make_views(image, Preprocess(16, MEAN, STD), 4, "crop", 0), expected)
    pixels = picture(30, 20)
    views = random_views(30, 20, 16, 3, torch.Generator().manual_seed(0))
    assert torch.equal(multi_view_crops([pixels], views, 16, MEAN, STD), expected[1:])
    with pytest.raises(BackendUnavailableError, match="not built"):
        multi_view_crops([pixels], views, 16, MEAN, STD, backend="cpu")


@needs_extension
def test_the_operator_is_registered_as_torch_wants() -> None:
    pixels = picture(20, 30)
    arguments = ([pixels], view(pixels, 8), 8, MEAN, STD, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.rada_fast.multi_view_crops.default, arguments)
