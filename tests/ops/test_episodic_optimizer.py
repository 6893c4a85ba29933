"""The episodic optimiser equals torch.optim bit for bit, shares untouched parameters and resets every bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rada_fast.config.method import OptimizerName
from rada_fast.errors import BackendUnavailableError
from rada_fast.ops import EpisodicOptimizer, episodic_optimizer_step, use_backend
from rada_fast.ops._backends import library
from tests.support import around

from .support import needs_extension, num_threads

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
EPISODES = 3
LR = 8e-3
# Every rule with and without weight decay and momentum; a small beta1 takes torch.lerp's other side.
RULES: list[tuple[OptimizerName, dict[str, Any]]] = [
    ("adamw", {"weight_decay": 0.01}),
    ("adamw", {"weight_decay": 0.0}),
    ("adam", {"weight_decay": 5e-4}),
    ("adam", {"weight_decay": 0.0, "betas": (0.4, 0.9)}),
    ("sgd", {"weight_decay": 0.0}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"weight_decay": 0.1, "momentum": 0.9}),
    ("sgd", {"weight_decay": 0.0, "momentum": 0.9}),
]
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


@pytest.fixture(autouse=True)
def _memory_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that reading what was never written shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def filled(*args: Any, real: Any = real, **kwargs: Any) -> Tensor:
            made: Tensor = real(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, filled)


def initial_values() -> dict[str, Tensor]:
    """Draw parameters with sizes around one vector and one chunk, and the zeros that output projections start from."""
    shapes = {"one": (1,), "seven": (7,), "odd": (1023,), "chunk": (130, 127)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"zero": torch.zeros(33, 31)}


def draw(initial: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Draw gradients over many orders of magnitude."""
    shapes = {name: (EPISODES, *value.shape) for name, value in initial.items()}
    return {name: (torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


class Theirs:
    """Theirs holds one single-tensor optimiser of torch.optim for each episode."""

    def __init__(
        self, initial: dict[str, Tensor], name: str, options: dict[str, Any], episodes: int = EPISODES
    ) -> None:
        self.parameters = [{key: value.clone() for key, value in initial.items()} for _ in range(episodes)]
        make, options = OPTIMIZERS[name], {"lr": LR, "foreach": False} | options
        self.optimizers = [make(list(p.values()), **options) for p in self.parameters]

    def step(self, gradients: dict[str, Tensor | None]) -> None:
        for episode, (parameters, optimizer) in enumerate(zip(self.parameters, self.optimizers, strict=True)):
            for key, parameter in parameters.items():
                given = gradients.get(key)
                parameter.grad = torch.zeros_like(parameter) if given is None else given[episode].float()
            optimizer.step()

    def stacked(self) -> dict[str, Tensor]:
        return {key: torch.stack([p[key] for p in self.parameters]) for key in self.parameters[0]}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), RULES)
def test_three_steps_are_torch_optims_bit_for_bit(
    name: OptimizerName, options: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    initial = initial_values()
    theirs = Theirs(initial, name, options)
    with use_backend(backend):
        ours = EpisodicOptimizer(initial, EPISODES, name, lr=LR, torch_roots=True, **options)
        for _ in range(3):
            gradients = draw(initial, dtype)
            ours.step(gradients)
            theirs.step(gradients)
            assert_equal(ours.parameters, theirs.stacked())


@needs_extension
@pytest.mark.parametrize(("name", "options"), RULES[:4])
def test_the_processors_roots_change_only_the_last_place(name: OptimizerName, options: dict[str, Any]) -> None:
    initial = initial_values()
    exact, ours = (
        EpisodicOptimizer(initial, EPISODES, name, lr=LR, torch_roots=torch_roots, backend="cpu", **options)
        for torch_roots in (True, False)
    )
    for step in range(3):
        gradients = draw(initial)
        before = {key: value.clone() for key, value in exact.parameters.items()}
        # Both sides start each step from equal parameters.
        for key, slot in ours._slots.items():
            if step:
                assert slot.own is not None
                slot.own.copy_(before[key])
        exact.step(gradients)
        ours.step(gradients)
        for key, wanted in exact.parameters.items():
            # A root off by 2^-23 of itself and the roundings of both sides' quotient, sum and quotient after it, 2^-23
            # each: 4 of the update. Then the last sum, rounded to the parameter's own place.
            update = (wanted - before[key]).abs()
            place = torch.from_numpy(np.spacing(torch.maximum(wanted.abs(), before[key].abs()).numpy()))
            assert bool(((ours.parameters[key] - wanted).abs() <= 4 * 2**-23 * update + place).all()), key
            for moment in ("first", "second"):
                assert torch.equal(getattr(ours._slots[key], moment), getattr(exact._slots[key], moment))


# A gradient in bfloat16 passes through memory that stands in for one of None as well.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), RULES)
def test_a_gradient_of_none_is_exactly_zero(
    name: OptimizerName, options: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    initial = initial_values()
    theirs = Theirs(initial, name, options)
    with use_backend(backend):
        ours = EpisodicOptimizer(initial, EPISODES, name, lr=LR, torch_roots=True, **options)
        # A gradient is None at first, becomes None later, or is missing from the dictionary.
        absent: list[tuple[str, ...]] = [("one", "odd", "chunk"), ("one", "odd"), ("chunk", "one"), ()]
        for step, names in enumerate(absent):
            gradients = draw(initial, dtype) | dict.fromkeys(names)
            if step == 1:
                del gradients["one"]
            ours.step(gradients)
            theirs.step(gradients)
            assert_equal(ours.parameters, theirs.stacked())


@needs_extension
@pytest.mark.parametrize("seed", range(24))
def test_drawn_steps_are_torch_optims_bit_for_bit(seed: int) -> None:
    """The rule and its options are drawn, and in each step which tensors have a gradient, and its type."""
    r = random.Random(seed)
    name: OptimizerName = r.choice(["adamw", "adam", "sgd"])
    options: dict[str, Any] = {"lr": r.choice([8e-3, 0.3]), "weight_decay": r.choice([0.0, 0.01, 0.3])}
    if name == "sgd":
        options["momentum"] = r.choice([0.0, 0.9])
    else:
        options |= {"betas": r.choice([(0.9, 0.999), (0.5, 0.9), (0.0, 0.5)]), "eps": r.choice([1e-8, 1e-3])}
    # A chunk has 16384 elements.
    initial = {str(i): torch.randn(around(r, 16, 16384, 2 * 16384)) for i in range(r.randint(1, 4))}
    episodes = r.randint(1, 4)
    theirs = Theirs(initial, name, options, episodes)
    ours = EpisodicOptimizer(initial, episodes, name, torch_roots=True, backend="cpu", **options)
    for _ in range(r.randint(1, 4)):
        gradients = {
            key: torch.randn(episodes, *value.shape).to(r.choice([torch.float32, torch.bfloat16, torch.float16]))
            for key, value in initial.items()
            if r.random() < 0.7
        }
        ours.step(dict(gradients))
        theirs.step(dict(gradients))
        assert_equal(ours.parameters, theirs.stacked())


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradients_are_kept_once(backend: str) -> None:
    initial = initial_values()
    before = {key: value.clone() for key, value in initial.items()}
    optimizer = EpisodicOptimizer(initial, EPISODES, lr=LR, weight_decay=0.1, backend=backend)
    assert all(value.stride(0) == 0 for value in optimizer.parameters.values())
    assert optimizer.parameters["chunk"].data_ptr() == initial["chunk"].data_ptr()
    optimizer.step({"zero": draw(initial)["zero"]})
    shared = {key for key, value in optimizer.parameters.items() if value.stride(0) == 0}
    assert shared == set(initial) - {"zero"}
    assert torch.equal(optimizer.parameters["chunk"][1], initial["chunk"] * (1 - LR * 0.1))
    assert optimizer.parameters["zero"].is_contiguous()
    for key, value in before.items():
        assert torch.equal(initial[key], value), "what episodes start from is never written"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), RULES)
def test_a_reset_restores_every_bit(name: OptimizerName, options: dict[str, Any], backend: str) -> None:
    initial = initial_values()
    optimizer = EpisodicOptimizer(initial, EPISODES, name, lr=LR, backend=backend, **options)
    steps = [draw(initial), draw(initial) | {"seven": None}, draw(initial)]

    def episode() -> dict[str, Tensor]:
        optimizer.reset()
        for gradients in steps:
            optimizer.step(gradients)
        return {key: value.clone() for key, value in optimizer.parameters.items()}

    first = episode()
    places = {key: value.data_ptr() for key, value in optimizer.parameters.items()}
    optimizer.step(draw(initial))
    assert_equal(episode(), first)
    assert places == {key: value.data_ptr() for key, value in optimizer.parameters.items()}, "the memory is kept"
    optimizer.reset()
    assert_equal(optimizer.parameters, {key: value.expand(EPISODES, *value.shape) for key, value in initial.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_episode_does_not_depend_on_its_neighbours(backend: str) -> None:
    initial = initial_values()
    steps = [draw(initial) for _ in range(3)]
    together = EpisodicOptimizer(initial, EPISODES, lr=LR, weight_decay=0.01, backend=backend)
    alone = EpisodicOptimizer(initial, 1, lr=LR, weight_decay=0.01, backend=backend)
    for gradients in steps:
        together.step(gradients)
        alone.step({key: value[1:2] for key, value in gradients.items() if value is not None})
    assert_equal({key: value[1:2] for key, value in together.parameters.items()}, alone.parameters)


@needs_extension
def test_threads_do_not_change_a_bit() -> None:
    initial = initial_values()
    steps, results = [draw(initial) for _ in range(2)], []
    for count in (1, 2, 4):
        with num_threads(count):
            optimizer = EpisodicOptimizer(initial, EPISODES, lr=LR, weight_decay=0.1, backend="cpu")
            for gradients in steps:
                optimizer.step(gradients)
            results.append(optimizer.parameters)
    for other in results[1:]:
        assert_equal(other, results[0])


@needs_extension
@pytest.mark.parametrize("offset", [1, 3])
def test_views_of_any_alignment_are_served(offset: int) -> None:
    def view(count: int, fill: float | None = None) -> Tensor:
        base = torch.randn(count + offset) if fill is None else torch.full((count + offset,), fill)
        return base[offset:]

    made = []
    torch.manual_seed(1)
    arguments = [view(1023), view(1023), view(1023).square(), view(1023)]
    for backend in ("reference", "cpu"):
        parameter, first, second, gradient = (torch.cat([torch.zeros(offset), x])[offset:] for x in arguments)
        episodic_optimizer_step(
            [parameter], [first], [second], [gradient], [None], [False],
            name="adamw", step=2, lr=LR, weight_decay=0.1, torch_roots=True, backend=backend,
        )  # fmt: skip
        made.append((parameter, first, second))
    for reference, compiled in zip(*made, strict=True):
        assert torch.equal(reference, compiled)


@needs_extension
# opcheck itself reads gradients of tensors that are no leaves, of which PyTorch warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_operator_keeps_pytorchs_rules() -> None:
    own, one = torch.randn(2, 5), torch.randn(7)
    arguments = (
        [own, one],
        [torch.randn(2, 5), torch.zeros(0)],
        [torch.rand(2, 5), torch.zeros(0)],
        [torch.randn(2, 5), None],
        [torch.randn(5), None],
        [False, True],
    )
    copies = [torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.bfloat16)]
    torch.library.opcheck(
        torch.ops.rada_fast.episodic_optimizer_step.default,
        (*arguments, "adamw", 2, LR, 0.1, 0.9, 0.999, 1e-8, 0.0, False, copies, False),
    )


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: [torch.zeros(4, dtype=torch.float64)]}, r"parameters\[0\] must be contiguous float32"),
        ({0: [torch.zeros(4, 2)[:, 0]]}, r"parameters\[0\] must be contiguous float32"),
        ({1: [torch.zeros(5)]}, r"first_moments\[0\] must be like the parameter"),
        ({2: [torch.zeros(0)]}, r"second_moments\[0\] must be like the parameter"),
        ({1: [torch.zeros(0)], 2: [torch.zeros(0)]}, r"first_moments\[0\] may be empty only where"),
        ({3: [torch.zeros(3)]}, r"gradients\[0\] must be like the parameter"),
        ({3: [torch.zeros(4, dtype=torch.int32)]}, r"gradients\[0\] must be float32, bfloat16 or float16"),
        ({4: [torch.zeros(3)]}, r"sources\[0\] must be contiguous float32 of one copy"),
        ({5: []}, "must have an entry for each parameter"),
        ({6: "lamb"}, "rule must be 'adamw', 'adam' or 'sgd', got 'lamb'"),
        ({6: "sgd"}, r"first_moments\[0\] must be empty: the rule keeps none"),
        ({15: [torch.zeros(4)]}, r"copies\[0\] must be like the parameter: contiguous bfloat16"),
        ({15: [torch.zeros(3, dtype=torch.bfloat16)]}, r"copies\[0\] must be like the parameter"),
        ({7: 0}, "step must be at least 1, got 0"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(change: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [[torch.zeros(4)] for _ in range(4)]
    arguments += [[None], [False], "adamw", 1, LR, 0.0, 0.9, 0.999, 1e-8, 0.0, False, [torch.zeros(0)], False]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rada_fast.episodic_optimizer_step(*arguments)


def test_errors_name_the_argument() -> None:
    initial = {"w": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="name must be one of 'adamw', 'adam', 'sgd', got 'lamb'"):
        EpisodicOptimizer(initial, 2, "lamb", lr=LR)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        EpisodicOptimizer(initial, 0, lr=LR)
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        EpisodicOptimizer(initial, 2, lr=-1)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got \(0.9, 1.0\)"):
        EpisodicOptimizer(initial, 2, lr=LR, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"momentum is SGD's, got 0\.9 with 'adamw'"):
        EpisodicOptimizer(initial, 2, lr=LR, momentum=0.9)
    with pytest.raises(TypeError, match=r"initial\['w'\] must be float32, got torch.float64"):
        EpisodicOptimizer({"w": torch.zeros(2, dtype=torch.float64)}, 2, lr=LR)
    optimizer = EpisodicOptimizer(initial, 2, lr=LR)
    with pytest.raises(ValueError, match=r"gradients\['w'\] must be \(2, 2, 3\), got \(2, 3\)"):
        optimizer.step({"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="gradients hold 'v', which is no parameter"):
        optimizer.step({"v": torch.zeros(2, 3)})
    assert optimizer.steps == 0


def test_a_named_backend_serves_or_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(backend: str | None) -> EpisodicOptimizer:
        optimizer = EpisodicOptimizer({"w": torch.ones(2)}, 2, lr=LR, backend=backend)
        optimizer.step({"w": torch.ones(2, 2)})
        return optimizer

    with pytest.raises(BackendUnavailableError, match="'cuda' cannot serve this call: its tensors are on cpu"):
        step("cuda")
    with pytest.raises(BackendUnavailableError, match="'triton' cannot serve this call: it has no kernel for this op"):
        step("triton")
    monkeypatch.setattr(library, "load", lambda: "it is not built")
    assert torch.equal(step(None).parameters["w"], step("reference").parameters["w"])
    with pytest.raises(BackendUnavailableError, match="backend 'cpu' cannot be used: it is not built"):
        step("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_low_precision_parameters_are_kept_in_float32(name: OptimizerName, dtype: torch.dtype, backend: str) -> None:
    """Adam's eps of 1e-8 is zero in float16, where a zero gradient would give NaN."""
    low = {key: value.to(dtype) for key, value in initial_values().items()}
    exact = {key: value.float() for key, value in low.items()}
    optimizers = [EpisodicOptimizer(start, EPISODES, name, lr=LR, backend=backend) for start in (low, exact)]
    for _ in range(2):
        gradients = draw(exact, dtype)
        gradients["zero"] = torch.zeros(EPISODES, 33, 31, dtype=dtype)
        for optimizer in optimizers:
            optimizer.step(gradients)
    for key, value in optimizers[0].parameters.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, optimizers[1].parameters[key])
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_on_low_precision_tensors_is_refused(backend: str) -> None:
    lists = [[torch.zeros(4, dtype=torch.float16)] for _ in range(3)]
    with pytest.raises(
        TypeError, match=r"parameters\[0\] must be contiguous float32, got torch.float16: keep a float32"
    ):
        episodic_optimizer_step(*lists, [None], [None], [True], name="adamw", step=1, lr=LR, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_in_bfloat16_are_the_rounded_parameters(backend: str) -> None:
    initial = {"w": torch.randn(33, 7), "late": torch.randn(5), "frozen": torch.nn.Parameter(torch.randn(3), False)}
    initial["w"][0, 0], initial["w"][0, 1] = torch.nan, torch.inf
    options: dict[str, Any] = {"lr": LR, "weight_decay": 0.1, "backend": backend}
    optimizer = EpisodicOptimizer(initial, EPISODES, dtype=torch.bfloat16, **options)
    twin = EpisodicOptimizer(initial, EPISODES, **options)
    for _ in range(2):
        optimizer.reset()
        taken = []
        for step in range(3):
            for name, value in optimizer.values.items():
                expected = optimizer.parameters[name].bfloat16()
                torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
            gradients = {name: torch.randn(EPISODES, *initial[name].shape) for name in ("w", "late")}
            if step == 0:
                del gradients["late"]
            taken.append(gradients)
            optimizer.step(gradients, last=step == 2)
        with pytest.raises(RuntimeError, match="the last step has written values alone"):
            _ = optimizer.parameters
        twin.reset()
        for gradients in taken:
            twin.step(gradients)
        for name, value in optimizer.values.items():
            expected = twin.parameters[name].bfloat16()
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
        initial["w"].mul_(1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("torch_roots", [False, True])
def test_the_last_step_leaves_the_same_parameters(backend: str, torch_roots: bool) -> None:
    initial = {"w": torch.randn(33, 7), "b": torch.randn(5)}
    steps = [{name: torch.randn(EPISODES, *value.shape) for name, value in initial.items()} for _ in range(2)]
    whole, ended = (
        EpisodicOptimizer(initial, EPISODES, lr=LR, weight_decay=0.1, torch_roots=torch_roots, backend=backend)
        for _ in range(2)
    )
    for _ in range(2):
        whole.reset()
        ended.reset()
        for at, gradients in enumerate(steps):
            whole.step(gradients)
            ended.step(gradients, last=at == 1)
        for name, value in whole.parameters.items():
            assert torch.equal(ended.parameters[name], value)
        with pytest.raises(RuntimeError, match="the last step has been taken: call reset before another one"):
            ended.step(steps[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_stay_and_take_no_gradient(backend: str) -> None:
    frozen = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
    start = {"frozen": frozen, "free": torch.nn.Parameter(torch.randn(5))}
    optimizer = EpisodicOptimizer(start, EPISODES, lr=LR, weight_decay=0.5, backend=backend)
    optimizer.step({"free": torch.ones(EPISODES, 5)})
    assert torch.equal(optimizer.parameters["frozen"], frozen.expand(EPISODES, 4, 3))
    assert not torch.equal(optimizer.parameters["free"][0], start["free"])
    with pytest.raises(ValueError, match=r"gradients\['frozen'\] must be None: the parameter is frozen"):
        optimizer.step({"frozen": torch.ones(EPISODES, 4, 3)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_after_inference_mode_work_with_autograd(backend: str) -> None:
    with torch.inference_mode():
        optimizer = EpisodicOptimizer({"w": torch.ones(4)}, EPISODES, lr=LR, backend=backend)
        optimizer.step({"w": torch.ones(EPISODES, 4)})
    optimizer.step({"w": torch.ones(EPISODES, 4)})
    factor = torch.ones(4, requires_grad=True)
    (optimizer.parameters["w"] * factor).sum().backward()
    assert factor.grad is not None
