"""A kernel is launched again with what Triton compiled for an earlier launch, and is compiled for nothing but need.

A stub takes the place of the CUDA driver: kernels are compiled, and nothing executes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.host_time import StubDriver, StubLauncher, stub_driver
from rada_fast.bench.compiled import recorded, step_launches
from rada_fast.config.method import AdapterConfig
from rada_fast.kernels._launch import Kernel, Launch
from rada_fast.ops import rational_adapter
from tests.support import problem

CONFIG = AdapterConfig.official(64)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Return a list to which the stub appends the grid and the arguments of every launch that reaches the driver."""
    calls: list[tuple[Any, ...]] = []

    def call(self: StubLauncher, x: int, y: int, z: int, *arguments: Any) -> None:
        # Triton passes the stream, the function, its metadata and the hooks before the kernel's own arguments.
        own = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments[6:]]
        calls.append(((x, y, z), *own))

    monkeypatch.setattr(StubLauncher, "__call__", call)
    with stub_driver():
        yield calls


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of every kernel is appended that Triton compiles."""
    names: list[str] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_post_compile_hook",
        lambda *arguments, **named: (names.append(named["fn"].name), hook and hook(*arguments, **named))[1],
    )
    return names


@Kernel
def add_up_kernel(deltas, sums, batch, classes, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, batch * classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(CHUNKS):
            total += tl.load(deltas + chunk * classes + i, mask=i < classes, other=0.0)
        tl.store(sums + i, total, mask=i < classes)


@Kernel
def fill_kernel(zeros, ones, classes, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if zeros is not None:
        tl.store(zeros + i, tl.zeros((BLOCK,), tl.float32), mask=i < classes)
    if ones is not None:
        tl.store(ones + i, tl.full((BLOCK,), 1.0, tl.float32), mask=i < classes)


def launch(classes: int, chunks: int = 2) -> Launch:
    """Make a launch of a small kernel."""
    return add_up_kernel.launch((1,), batch=1, classes=classes, CHUNKS=chunks, BLOCK=128, num_warps=4)


def tensors(classes: int, offset: int = 0, dtype: torch.dtype = torch.float32, chunks: int = 2) -> dict[str, Tensor]:
    """Return the tensors of this launch. The results lie `offset` elements after an aligned place."""
    return {"deltas": torch.zeros(chunks * classes, dtype=dtype), "sums": torch.zeros(classes + offset)[offset:]}


def test_a_second_call_gives_the_driver_what_triton_would_give(launched: list[tuple[Any, ...]]) -> None:
    add_up, given = launch(20), tensors(20)
    add_up(**given)
    add_up(**given)
    add_up_kernel[(1,)](**given, batch=1, classes=20, CHUNKS=2, BLOCK=128, num_warps=4)
    assert launched[1] == launched[0] == launched[2]
    assert launched[1][0] == (1, 1, 1)


def test_nothing_is_compiled_for_another_count(launched: list[tuple[Any, ...]], compiled: list[str]) -> None:
    launch(20)(**tensors(20))
    compiled.clear()
    for classes in (1, 16, 19, 32, 1600):
        launch(classes)(**tensors(classes))
    assert compiled == []
    assert [arguments[4] for arguments in launched[1:]] == [1, 16, 19, 32, 1600]


def test_a_number_beyond_32_bits_has_code_of_its_own(launched: list[tuple[Any, ...]], compiled: list[str]) -> None:
    add_up_kernel.jit.device_caches.clear()
    few, many = launch(20), launch(2**31)
    for _ in range(2):
        few(**tensors(20))
        many(**tensors(20))
    assert len(compiled) == 2
    assert [arguments[4] for arguments in launched] == 2 * [20, 2**31]


def test_another_type_constant_or_alignment_is_compiled_and_told_apart(
    launched: list[tuple[Any, ...]], compiled: list[str]
) -> None:
    add_up_kernel.jit.device_caches.clear()
    by_two, by_four = launch(20), launch(20, chunks=4)
    for _ in range(2):
        by_two(**tensors(20))
        by_two(**tensors(20, dtype=torch.bfloat16))
        by_four(**tensors(20, chunks=4))
        # Code for aligned pointers would read and write this pointer's elements in groups of four.
        apart = tensors(20, offset=1)
        assert apart["sums"].data_ptr() % 16 != 0
        by_two(**apart)
    assert len(compiled) == 4
    assert len(launched) == 8


def test_another_absent_tensor_is_compiled_and_told_apart(launched: list[tuple[Any, ...]], compiled: list[str]) -> None:
    """One launch gets logits' gradients alone, or masks' alone: tensors of one type, in the place of each other."""
    fill = fill_kernel.launch((1,), classes=20, BLOCK=32, num_warps=4)
    for _ in range(2):
        fill(zeros=torch.empty(20), ones=None)
        fill(zeros=None, ones=torch.empty(20))
        fill(zeros=torch.empty(20), ones=torch.empty(20))
    assert len(compiled) == 3
    assert [[given is None for given in arguments[1:3]] for arguments in launched] == 2 * [
        [False, True], [True, False], [False, False],
    ]  # fmt: skip


def test_each_device_has_code_of_its_own(
    launched: list[tuple[Any, ...]], compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A function that one device has loaded is none of another's.
    add_up_kernel.jit.device_caches.clear()
    add_up = launch(20)
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(StubDriver, "get_current_device", lambda self, device=device: device)
        add_up(**tensors(20))
    assert len(compiled) == 2
    assert len(launched) == 4


def test_a_launcher_that_replaces_tritons_sees_every_call(launched: list[tuple[Any, ...]]) -> None:
    add_up = launch(20)
    add_up(**tensors(20))
    with recorded() as launches:
        add_up(**tensors(20))
    assert len(launches) == len(launched) == 1


@pytest.mark.parametrize("config", [CONFIG, AdapterConfig.paper(32, bias=True)], ids=["official", "paper"])
def test_every_count_is_one_for_which_nothing_is_compiled(config: AdapterConfig) -> None:
    for kernel, _, arguments, _ in step_launches(config, 2, 20, torch.bfloat16):
        for parameter in kernel.params:
            # A stride is 0 or the size of a weight, whatever the number of images and classes.
            if isinstance(arguments[parameter.name], int) and not parameter.name.endswith("_stride"):
                assert parameter.is_constexpr or parameter.do_not_specialize, f"{kernel.__name__}: {parameter.name}"


def test_a_last_batch_with_fewer_images_compiles_nothing(launched: list[tuple[Any, ...]], compiled: list[str]) -> None:
    def step(batch: int, classes: int) -> None:
        image, text, parameters = problem(CONFIG, batch, classes, torch.bfloat16)
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        output = rational_adapter(
            image.detach().requires_grad_(), text, 20.0, leaves, CONFIG, penalty="l2", backend="triton"
        )
        assert output.penalty is not None
        (output.logits.sum() + output.penalty).backward()

    step(6, 50)
    count = len(launched)
    compiled.clear()
    for batch, classes in ((5, 50), (1, 50), (6, 48), (2, 49)):
        step(batch, classes)
    assert compiled == []
    assert len(launched) == 5 * count
