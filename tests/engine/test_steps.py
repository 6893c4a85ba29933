"""Steps have the gradients of the whole batch, however it is divided, and on a GPU they do not wait for the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, normalize
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from rada_fast.config.method import MASK_PENALTIES, AdapterConfig
from rada_fast.engine import steps
from rada_fast.engine.optimizers import set_rate, training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep
from rada_fast.modules import RationalAdapter
from rada_fast.ops import use_backend

CPU = torch.device("cpu")


def features(count: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def trained_adapter() -> RationalAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RationalAdapter(AdapterConfig.official(16))
        torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
    return adapter


def make(micro_batch: int | None = None, penalty: Any = "l2", *, device: Any = CPU) -> TrainingStep:
    adapter = trained_adapter().to(device)
    text = torch.nn.Parameter(features(7, 1).to(device))
    optimizer = training_optimizer([*adapter.parameters(), text], "adamw", lr=1e-3, weight_decay=0.1)
    return TrainingStep(Gradients(adapter, text, 20.0, Objective(penalty, 1.5)), optimizer, micro_batch=micro_batch)


@pytest.mark.parametrize("penalty", MASK_PENALTIES)
@pytest.mark.parametrize("micro_batch", [None, 4, 5, 1])
def test_the_gradients_of_parts_add_up_to_those_of_the_batch(penalty: Any, micro_batch: int | None) -> None:
    images, labels = features(11), torch.arange(11) % 7
    step = make(micro_batch, penalty)
    adapter, text = trained_adapter().double(), features(7, 1).double().requires_grad_()
    logits, value = adapter(images.double(), text, 20.0, penalty=penalty)
    loss = cross_entropy(logits, labels)
    (loss + 1.5 * value).backward()
    step(images, labels, 0.0)
    for parameter, expected in zip(step.gradients.trained, [*adapter.parameters(), text], strict=True):
        assert expected.grad is not None
        # After the first step, AdamW's first moment is a tenth of the gradient.
        found = 10 * step.optimizer.state[parameter]["exp_avg"].double()
        # Both are sums of the same numbers, rounded to float32 in another order.
        limit = 1e-5 * float(expected.grad.abs().max())
        torch.testing.assert_close(found, expected.grad, rtol=0, atol=limit)
    totals = step.read_totals()
    assert totals.images == 11
    assert totals.cross_entropy == pytest.approx(loss.detach().item(), rel=1e-5)
    assert totals.penalty == pytest.approx(value.item(), rel=1e-5)
    assert totals.accuracy == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert step.read_totals().images == 0


def test_the_gradient_of_the_images_reaches_an_encoder() -> None:
    encoder = torch.nn.Linear(3, 16)
    adapter, images, labels = trained_adapter(), torch.randn(6, 3), torch.arange(6)
    named: list[str] = []

    def encode(part: Tensor, ids: Any) -> Tensor:
        named.extend(ids)
        return normalize(encoder(part), dim=-1)

    text = features(7, 1)
    gradients = Gradients(adapter, text, 20.0, Objective("l2", 0.0), of_images=True)
    optimizer = training_optimizer([*adapter.parameters(), *encoder.parameters()], "adamw", lr=0.0, weight_decay=0.0)
    ids = [str(index) for index in range(6)]
    TrainingStep(gradients, optimizer, micro_batch=4, encode=encode)(images, labels, 0.0, ids)
    found = [parameter.grad for parameter in encoder.parameters()]
    logits = trained_adapter()(normalize(encoder(images), dim=-1), text, 20.0)
    expected = torch.autograd.grad(cross_entropy(logits, labels), list(encoder.parameters()))
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
    assert named == ids


class Replayed:
    """Replayed stands for a recording: it makes the call once, as a recording does, and again when it is replayed."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call = call
        call()

    def replay(self) -> Any:
        return self.call()

    def in_order(self) -> Any:
        return nullcontext()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let steps be recorded on this machine. Returns the recordings that were made."""
    made: list[Any] = []

    def record(call: Callable[[], Any], device: torch.device) -> Replayed:
        made.append(Replayed(call, device))
        return made[-1]

    monkeypatch.setattr(steps, "Recording", record)
    monkeypatch.setattr(steps, "usable", lambda device: True)
    return made


def test_recorded_steps_are_the_steps(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one shape are replayed; a last batch with fewer images is computed without the recording."""
    sizes = [3, 3, 3, 2, 3]

    def train() -> TrainingStep:
        step = make()
        for index, size in enumerate(sizes):
            step(features(size, index), torch.arange(size), 1e-3 / (index + 1))
        return step

    found = train()
    assert len(recorded) == 1
    monkeypatch.setattr(steps, "usable", lambda device: False)
    expected = train()
    assert len(recorded) == 1
    # The sums are made step by step in the one, and for all steps at once in the other.
    assert tuple(found.read_totals()) == pytest.approx(tuple(expected.read_totals()), rel=1e-12)
    pairs = zip(found.gradients.trained, expected.gradients.trained, strict=True)
    assert all(torch.equal(value, other) for value, other in pairs)


def test_a_recording_that_fails_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Callable[[], Any], device: torch.device) -> None:
        call()
        raise RuntimeError("no capture")

    monkeypatch.setattr(steps, "Recording", fail)
    monkeypatch.setattr(steps, "usable", lambda device: True)
    found = make()
    found(features(3, 0), torch.arange(3), 1e-3)
    with pytest.warns(RuntimeWarning, match=r"could not be recorded in a CUDA graph.*no capture"):
        found(features(3, 1), torch.arange(3), 1e-3)
    for index in (2, 3):
        found(features(3, index), torch.arange(3), 1e-3)
    monkeypatch.setattr(steps, "usable", lambda device: False)
    expected = make()
    for index in range(4):
        expected(features(3, index), torch.arange(3), 1e-3)
    pairs = zip(found.gradients.trained, expected.gradients.trained, strict=True)
    assert all(torch.equal(value, other) for value, other in pairs)


class NoHostValues(TorchDispatchMode):
    """NoHostValues refuses every operation that gives the host a value of a device, or moves data between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item"), name
        fused = name.startswith("_fused_")
        # PyTorch's fused optimisers have no form without values. On a GPU they read the rate there.
        assert not fused or func._overloadname == "tensor_lr"
        result = None if fused else func(*args, **(kwargs or {}))
        tensors = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        # A number may come from the host with a launch.
        sizes = [value for value in tensors if value.ndim or fused]
        results = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
        assert len({value.device.type for value in (*sizes, *results)}) < 2, f"{name} moves data between devices"
        return result


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("penalty", MASK_PENALTIES)
def test_a_step_reads_nothing_back_from_its_device(recorded: list[Any], penalty: Any, micro_batch: int | None) -> None:
    """Tensors on the device "meta" have no values that could be copied to the host or decide about anything."""
    with use_backend("reference"):
        adapter = RationalAdapter(AdapterConfig.official(16), device="meta")
        text = torch.nn.Parameter(torch.empty(7, 16, device="meta"))
        optimizer = SGD([*adapter.parameters(), text], lr=1e-3, momentum=0.9)
        step = TrainingStep(Gradients(adapter, text, 20.0, Objective(penalty, 1.5)), optimizer, micro_batch=micro_batch)
        inputs, labels = torch.empty(3, 16, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
        for rate in (1e-3, 5e-4, 2e-4):
            with NoHostValues():
                step(inputs, labels, rate)
    assert len(recorded) == 1


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_optimiser_on_a_gpu_needs_no_host_value(name: Any) -> None:
    """Tensors of FakeTensorMode are on "cuda" without a GPU, and have no values."""
    with FakeTensorMode():
        values = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((16, 16), (16,))]
        optimizer = training_optimizer(values, name, lr=1e-3, weight_decay=0.1, momentum=0.9)
        rate = optimizer.param_groups[0]["lr"]
        assert rate.device.type == "cuda"
        for index in range(3):
            for value in values:
                value.grad = torch.empty_like(value)
            with NoHostValues():
                set_rate(optimizer, 1e-3 / (index + 1))
                optimizer.step()
        # A graph reads the rate where it was when it was recorded.
        assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_steps_from_a_graph_have_the_bits_of_single_launches(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[Tensor]:
        adapter = trained_adapter().cuda()
        optimizer = training_optimizer(adapter.parameters(), name, lr=1e-3, weight_decay=0.1, momentum=0.9)
        step = TrainingStep(Gradients(adapter, features(7, 1).cuda(), 20.0, Objective("l2", 1.5)), optimizer)
        for index in range(5):
            step(features(1, index).cuda(), torch.tensor([index]).cuda(), 1e-3 / (index + 1))
        return [parameter.detach().cpu() for parameter in adapter.parameters()]

    found = train()
    monkeypatch.setattr(steps, "usable", lambda device: False)
    assert all(torch.equal(value, other) for value, other in zip(found, train(), strict=True))
