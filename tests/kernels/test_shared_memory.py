"""Every tile fits the shared memory of the target it is chosen for, by a formula that Triton's own count confirms."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from rada_fast import _env
from rada_fast.bench.compiled import compile_launch, step_launches
from rada_fast.config.method import AdapterConfig
from rada_fast.kernels import _shared_memory, projection_tiles
from rada_fast.kernels._shared_memory import BLOCK_KIB, Target, assumed_target, smaller_tiles, target_of
from rada_fast.kernels.projection_tiles import Tile
from rada_fast.ops._backends.adapter_operator import Features
from rada_fast.ops._backends.tiles import TILES, Sizes, candidates, shared_bytes, table_tile
from rada_fast.ops._backends.triton import with_smaller_tiles

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = (80, 86, 89, 90, 100, 120)
TYPES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16)]
TYPES += [(BF16, F32, F32), (BF16, BF16, F32), (BF16, F32, BF16), (F16, F32, F32)]
"""The type of the products, and those of the features and of the weights in memory."""
HEADS = (16, 24, 32, 40, 64, 80, 96, 128, 256)
EXTENTS = ((1, 1), (1, 50), (1, 500), (3, 127), (6, 100), (6, 200), (6, 1000), (30, 20), (64, 100))
"""Images and classes of an episode."""


def all_sizes() -> Iterator[Sizes]:
    """Yield the sizes and types of adapters with every head size, from the narrowest to the widest."""
    for width in (32, 64, 96, 128, 512, 640, 768, 1024):
        for head in (head for head in (*HEADS, width) if width % head == 0):
            for images, classes in EXTENTS:
                for dtype, features, weights in TYPES:
                    for precision in ("ieee", "tf32", "tf32x3") if dtype == F32 else ("ieee",):
                        yield Sizes(dtype, classes, images * classes, width, head, precision, features, weights)


@pytest.mark.parametrize("capability", TARGETS)
def test_every_tile_fits_its_target(capability: int) -> None:
    target = Target.of_capability(capability)
    for sizes in all_sizes():
        for launch in TILES:
            tile = table_tile(launch, sizes, target)
            assert shared_bytes(launch, tile, sizes, target) <= target.block_bytes, (launch, tile, sizes)
        tile = projection_tiles.backward_tile_of(
            sizes.dtype, sizes.width, sizes.precision, weights=sizes.weights, target=target
        )
        needed = projection_tiles.backward_shared_bytes(tile, sizes.dtype, sizes.weights, target)
        assert needed <= target.block_bytes, (tile, sizes)


@pytest.mark.parametrize("launch", TILES)
def test_tiles_to_be_measured_fit_too(launch: str) -> None:
    target = Target.of_capability(86)
    for dtype, features, weights in TYPES:
        sizes = Sizes(dtype, 100, 6400, 512, 64, "ieee", features, weights)
        for tile in candidates(launch, sizes, target):
            assert shared_bytes(launch, tile, sizes, target) <= target.block_bytes, tile


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch", TILES)
def test_data_centre_devices_keep_the_largest_tiles_without_autocast(capability: int, launch: str) -> None:
    for images, classes in ((1, 50), (1, 500), (6, 200), (6, 1000), (64, 100)):
        for dtype in (BF16, F32):
            sizes = Sizes(dtype, classes, images * classes, 512, 64)
            unlimited = table_tile(launch, sizes, Target(capability, 2**30))
            assert table_tile(launch, sizes, Target.of_capability(capability)) == unlimited


LAUNCH_OF = {
    "rational_projections_forward_kernel": "rational_projections_forward",
    "class_attention_forward_kernel": "class_attention_forward",
    "masked_logits_forward_kernel": "masked_logits_forward",
    "masked_logits_backward_attended_kernel": "masked_logits_backward",
    "parameter_gradients_kernel": "parameter_gradients",
}
"""The kernels whose shared memory decides about the tile of their launch."""


# With three stages of float32, these launches would need 196,608 and 182,272 bytes.
@pytest.mark.parametrize("capability", [80, 86])
@pytest.mark.parametrize(
    ("images", "classes", "kernels"),
    [
        (64, 100, ("rational_projections_forward_kernel", "masked_logits_forward_kernel")),
        (6, 100, ("rational_projections_forward_kernel", "masked_logits_forward_kernel")),
        (6, 200, ("rational_projections_forward_kernel",)),
        (6, 20, ("masked_logits_backward_attended_kernel",)),
    ],
)
def test_launches_under_autocast_need_what_the_formula_says(
    capability: int, images: int, classes: int, kernels: tuple[str, ...]
) -> None:
    config, target = AdapterConfig.official(512), Target.of_capability(capability)
    sizes = Sizes(BF16, classes, images * classes, 512, 64, "ieee", F32, F32)
    launches = step_launches(config, images, classes, BF16, features=F32, weights=F32, target=capability)
    for launch in (launch for launch in launches if launch.kernel.__name__ in kernels):
        found = compile_launch(launch, capability, "autocast")
        assert found.fault() is None
        name = LAUNCH_OF[found.kernel]
        bound = shared_bytes(name, table_tile(name, sizes, target), sizes, target)
        assert found.shared_bytes <= bound <= found.shared_bytes + 16384, found


@pytest.mark.parametrize("stages", [1, 3])
def test_smaller_tiles_have_fewer_stages_before_smaller_extents(stages: int) -> None:
    tiles = list(smaller_tiles(Tile(64, 128, 32, 16, 8, stages), ("depth", "rows")))
    assert [tile.stages for tile in tiles] == ([3, 2, 2, 2, 2] if stages == 3 else [1, 1, 1, 1])
    assert [(tile.depth, tile.rows) for tile in tiles][-4:] == [(32, 64), (16, 64), (16, 32), (16, 16)]
    assert {(tile.columns, tile.warps) for tile in tiles} == {(128, 8)}


def test_the_target_is_the_device_asked_once_or_the_one_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(_env, "cuda_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(_env, "cuda_block_memory", lambda index: asked.append(index) or 101376)
    monkeypatch.setattr(_env, "current_cuda_device", lambda: 1)
    _shared_memory._cuda_target.cache_clear()
    for name in ("cuda:0", "cuda:1", "cuda", "cuda:0"):
        assert target_of(torch.device(name)) == Target(86, 101376)
    assert asked == [0, 1]
    monkeypatch.setenv("RADA_FAST_TARGET", "sm80")
    _shared_memory._cuda_target.cache_clear()
    assert target_of(torch.device("cuda", 0)) == Target(80, 101376)
    _shared_memory._cuda_target.cache_clear()
    monkeypatch.delenv("RADA_FAST_TARGET")

    assert target_of(torch.device("cpu")) == Target.of_capability(80)
    with assumed_target(Target.of_capability(90)):
        assert target_of(torch.device("cpu")) == Target(90, 232448)
    assert target_of(torch.device("cpu")) == Target.of_capability(80)


def test_a_launch_that_does_not_fit_is_started_again_with_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_env, "cuda_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(_env, "cuda_block_memory", lambda index: 166912)
    monkeypatch.setattr(_shared_memory, "_withheld", {})
    _shared_memory._cuda_target.cache_clear()
    device = torch.device("cuda", 0)
    on_device: Any = SimpleNamespace(device=device)
    given: list[int] = []

    def run(number: int, features: Features) -> int:
        given.append(target_of(device).block_bytes)
        # Triton needs 8 KiB more than the formula says, for a tile that fills the memory.
        if given[-1] > 166912 - 8192:
            raise OutOfResources(166912 + 8192, 166912, "shared memory")
        return number

    call = with_smaller_tiles(run)
    try:
        assert call(7, Features(on_device, on_device)) == 7
        assert call(8, Features(on_device, on_device)) == 8
        assert given == [166912, 166912 - 8192, 166912 - 8192]

        def fail(features: Features, required: int, name: str) -> None:
            raise OutOfResources(required, 166912, name)

        for required, name in ((300_000, "shared memory"), (166_913, "threads")):
            with pytest.raises(OutOfResources):
                with_smaller_tiles(fail)(Features(on_device, on_device), required, name)
        monkeypatch.setattr(_env, "is_capturing", lambda: True)
        with pytest.raises(OutOfResources):
            with_smaller_tiles(fail)(Features(on_device, on_device), 170_000, "shared memory")
        assert target_of(device).block_bytes == 166912 - 8192
    finally:
        _shared_memory._cuda_target.cache_clear()


def test_the_limits_are_those_of_the_programming_guide() -> None:
    limits = {capability: 1024 * BLOCK_KIB[capability] for capability in TARGETS}
    assert limits == {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@pytest.mark.gpu
def test_a_device_has_the_shared_memory_of_its_compute_capability() -> None:
    major, minor = _env.cuda_device_capability()
    limit = _env.cuda_block_memory(_env.current_cuda_device())
    expected: Any = BLOCK_KIB.get(10 * major + minor)
    assert expected is None or limit == 1024 * expected
