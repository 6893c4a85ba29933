"""The Triton backend works under compilation, autocast and CUDA graphs, and with strided and very large inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter, use_backend
from tests.ops.test_empty_inputs import every_case_without_images
from tests.support import problem

CONFIG = AdapterConfig.official(128)


def module_and_inputs(device: str, batch: int = 2, classes: int = 20) -> tuple[RationalAdapter, Tensor, Tensor]:
    image, text, parameters = problem(CONFIG, batch, classes, torch.float32)
    adapter = RationalAdapter(CONFIG)
    adapter.load_state_dict(parameters)
    return adapter.to(device), image.to(device), text.to(device)


def step(adapter: RationalAdapter, image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    adapter.zero_grad()
    logits, penalty = adapter(image, text, 20.0, penalty="l2")
    (logits.float().sum() + penalty.float()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def test_the_compiled_adapter_gives_the_same_results(device: str) -> None:
    adapter, image, text = module_and_inputs(device)
    with use_backend("triton"):
        plain, gradients = step(adapter, image, text)
        # The compiler leaves the kernels as they are. On a device it makes code of its own around them.
        compiled = torch.compile(adapter, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        adapter.zero_grad()
        logits, penalty = compiled(image, text, 20.0, penalty="l2")
        (logits.sum() + penalty).backward()
    assert torch.equal(logits, plain)
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_autocast_keeps_the_parameters_type(device: str) -> None:
    adapter, image, text = module_and_inputs(device)
    with use_backend("triton"):
        plain, _ = step(adapter, image, text)
        with torch.autocast(device, torch.bfloat16):
            low, gradients = step(adapter, image, text)
    assert all(value.dtype == torch.float32 for value in gradients.values())
    # bfloat16 keeps 8 bits, and the logits are about 20.
    torch.testing.assert_close(low.float(), plain, rtol=5e-2, atol=0.5)


def test_strided_and_expanded_inputs_give_the_same_logits(device: str) -> None:
    adapter, image, text = module_and_inputs(device, 3, 37)
    parameters = {name: value.detach() for name, value in adapter.named_parameters()}
    plain = rational_adapter(image, text, 20.0, parameters, CONFIG, backend="triton").logits
    strided = {name: value.t().contiguous().t() for name, value in parameters.items()}
    padded = torch.zeros(37, 131, device=device)
    padded[:, 3:] = text
    for images, texts in ((image.T.contiguous().T, padded[:, 3:]), (image[[0]].expand(3, -1), text)):
        found = rational_adapter(images, texts, 20.0, strided, CONFIG, backend="triton").logits
        assert torch.equal(found[0], plain[0])


def test_no_images_are_served_in_any_configuration(device: str) -> None:
    every_case_without_images("triton", device)


def test_images_do_not_change_each_others_logits(device: str) -> None:
    adapter, image, text = module_and_inputs(device, 4, 37)
    with use_backend("triton"), torch.no_grad():
        clean = adapter(image, text, 20.0)
        image[2] = torch.nan
        dirty = adapter(image, text, 20.0)
    assert bool(dirty[2].isnan().all())
    assert torch.equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


def test_permuted_classes_permute_the_logits(device: str) -> None:
    adapter, image, text = module_and_inputs(device, 2, 37)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend("triton"), torch.no_grad():
        plain, permuted = adapter(image, text, 20.0), adapter(image, text[order], 20.0)
    torch.testing.assert_close(permuted, plain[:, order], rtol=1e-5, atol=1e-4)


def test_a_zero_output_projection_gives_the_zero_shot_logits(device: str) -> None:
    _, image, text = module_and_inputs(device)
    adapter = RationalAdapter(CONFIG).to(device)
    with use_backend("triton"), torch.no_grad():
        torch.testing.assert_close(adapter(image, text, 20.0), 20.0 * image @ text.T, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_step_is_replayed_on_new_inputs() -> None:
    adapter, image, text = module_and_inputs("cuda", 6, 101)
    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(adapter, image, text)
        torch.cuda.current_stream().wait_stream(side)
        adapter.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, penalty = adapter(image, text, 20.0, penalty="l2")
            (logits.sum() + penalty).backward()
        image.copy_(image.flip(0))
        graph.replay()
        replayed = logits.clone(), {name: p.grad.clone() for name, p in adapter.named_parameters()}
        plain, gradients = step(adapter, image, text)
    assert torch.equal(replayed[0], plain)
    assert all(torch.equal(value, gradients[name]) for name, value in replayed[1].items())


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    adapter, image, text = module_and_inputs("cuda")
    with use_backend("triton"):
        step(adapter, image, text)
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits, penalty = adapter(image, text, 20.0, penalty="l2")
            (logits.sum() + penalty).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_on_a_device_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    adapter, image, text = module_and_inputs("cuda", 6, 301)
    adapter, image, text = adapter.to(dtype), image.to(dtype), text.to(dtype)
    with use_backend("triton"):
        first, gradients = step(adapter, image, text)
        for _ in range(5):
            again, others = step(adapter, image, text)
            assert torch.equal(first, again)
            assert all(torch.equal(value, others[name]) for name, value in gradients.items())


@pytest.mark.gpu
def test_memory_grows_with_the_classes_and_not_with_their_square() -> None:
    peaks = []
    for classes in (1000, 2000):
        adapter, image, text = module_and_inputs("cuda", 2, classes)
        with use_backend("triton"):
            step(adapter, image, text)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(adapter, image, text)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    # Twice the classes would take four times the memory if it grew with their square. Two MiB do not depend on them.
    assert peaks[1] <= 2.2 * peaks[0] + 2**21


@pytest.mark.gpu
def test_offsets_beyond_32_bits_address_the_right_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 36 * 2**30:
        pytest.skip("needs 36 GiB of device memory")
    adapter, _, text = module_and_inputs("cuda", 1, 1000)
    # The elements of a mask are more than 2^31.
    image = torch.nn.functional.normalize(torch.randn(17000, 128, device="cuda"), dim=-1)
    adapter, image, text = adapter.bfloat16(), image.bfloat16(), text.bfloat16()
    with use_backend("triton"), torch.no_grad():
        logits = adapter(image, text, 20.0)
        assert torch.equal(logits[-2:], adapter(image[-2:], text, 20.0))
