"""The CUDA kernel makes the same roundings as NumPy in the simulator, and agrees with torch.optim on a device."""

from __future__ import annotations

import ctypes
import random
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rada_fast.extension import libraries
from rada_fast.ops import EpisodicOptimizer, use_backend
from tests.cuda.conftest import Launchers
from tests.support import around, assert_replays_from_a_graph

RULES = {"adamw": 0, "adam": 1, "sgd": 2}
TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Scalars(ctypes.Structure):
    """OptimizerScalars in csrc/shared/episodic_optimizer.h."""

    _fields_ = [("rule", ctypes.c_int32)] + [
        (name, ctypes.c_float)
        for name in (
            "decay", "weight_decay", "first_weight", "beta2", "second_weight", "root_divisor", "eps", "step_size",
            "momentum",
        )
    ] + [("last", ctypes.c_int32)]  # fmt: skip


class Descriptor(ctypes.Structure):
    """OptimizerTensor in csrc/shared/episodic_optimizer.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("parameter", "source", "first", "second", "gradient", "copy")),
        ("row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
    ]


def scalars(
    rule: str, step: int, *, lr: float, weight_decay: float, beta1: float, momentum: float, last: bool = False
) -> Scalars:
    beta2 = 0.999
    return Scalars(
        RULES[rule],
        1 - lr * weight_decay if rule == "adamw" else 1,
        0 if rule == "adamw" else weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        1e-8,
        -lr if rule == "sgd" else -lr / (1 - beta1**step),
        momentum,
        last,
    )


@cache
def product_scalars() -> Any:
    """The product's own function from the options of a step to its scalars, compiled from csrc/shared."""
    source = """
        #include "shared/episodic_optimizer_arguments.h"
        extern "C" void scalars_of(int rule, long step, double lr, double weight_decay, double beta1, double beta2,
                                   double eps, double momentum, bool last,
                                   rada_fast::OptimizerScalars* out) {
          const auto named = static_cast<rada_fast::OptimizerRule>(rule);
          *out = rada_fast::optimizer_scalars(named, step, lr, weight_decay, beta1, beta2, eps, momentum, last);
        }
    """
    folder = libraries.source_dir()
    assert folder is not None
    with TemporaryDirectory() as built:
        library = Path(built) / "scalars.so"
        command = [libraries.build_parameters().compiler, "-std=c++17", "-shared", "-fPIC", f"-I{folder}", "-xc++", "-"]
        subprocess.run([*command, "-o", str(library)], input=source, text=True, check=True)
        function = ctypes.CDLL(str(library)).scalars_of
    function.argtypes = [ctypes.c_int, ctypes.c_long, *[ctypes.c_double] * 6, ctypes.c_bool, ctypes.c_void_p]
    function.restype = None
    return function


@dataclass(frozen=True)
class Step:
    """The options of one step of a rule."""

    rule: str
    step: int
    lr: float = 8e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    momentum: float = 0.0
    last: bool = False

    def expected_scalars(self) -> Scalars:
        """As the header says what they are."""
        return scalars(
            self.rule,
            self.step,
            lr=self.lr,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            momentum=self.momentum,
            last=self.last,
        )

    def product_scalars(self) -> Scalars:
        """As the operator makes them."""
        made = Scalars()
        product_scalars()(
            RULES[self.rule], self.step, self.lr, self.weight_decay, self.beta1, 0.999, 1e-8, self.momentum, self.last,
            ctypes.addressof(made),
        )  # fmt: skip
        return made


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """float32 through float64: the product is exact, the sum is rounded twice, which differs once in 2^29."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def expected(s: Scalars, p: Any, m: Any, v: Any, g: Any, fresh: bool) -> tuple[Any, Any, Any]:
    """Compute what the header defines, rounding by rounding."""
    one = np.float32
    if s.weight_decay:
        g = fma(one(s.weight_decay), p, g)
    if s.rule == RULES["sgd"]:
        if m is not None:
            m = g = g if fresh else m * one(s.momentum) + g
        return fma(one(s.step_size), g, p), m, v
    p = p * one(s.decay)
    if m is None:
        return p, None, None
    if fresh:
        m, v = np.zeros_like(g), np.zeros_like(g)
    w = one(s.first_weight)
    m = fma(w, g - m, m) if w < 0.5 else fma(w - one(1), g - m, g)
    v = fma(one(s.second_weight) * g, g, v * one(s.beta2))
    return p + one(s.step_size) * m / (np.sqrt(v) / one(s.root_divisor) + one(s.eps)), m, v


class Case:
    """A Case holds one tensor's arrays and computes what a step leaves in them."""

    def __init__(
        self,
        rows: int,
        row: int,
        gradient: torch.dtype | None,
        *,
        fresh: bool,
        shared: bool,
        moments: int,
        offset: int = 0,
        source_offset: int = 0,
        copied: bool = False,
    ) -> None:
        def array(count: int) -> np.ndarray:
            return torch.randn(count + offset).numpy()[offset:]

        self.rows, self.row, self.fresh, self.moments = rows, row, fresh, moments
        self.parameter, self.first = array(rows * row), array(rows * row)
        self.second = np.square(array(rows * row + offset)[offset:])
        self.source = torch.randn(row + source_offset + offset).numpy()[source_offset + offset :] if shared else None
        self.copy = torch.zeros(rows * row + offset, dtype=torch.bfloat16)[offset:] if copied else None
        self.gradient: Tensor | None = None
        if gradient is not None:
            self.gradient = torch.randn(rows * row + offset)[offset:].to(gradient)
            if offset:
                self.gradient = torch.cat([self.gradient[:offset], self.gradient])[offset:]
            if gradient == torch.float16:
                # Subnormal, largest, zero: the conversions' own cases.
                self.gradient[: min(3, rows * row)] = torch.tensor([3e-7, 65504.0, -0.0])[: rows * row]

    def expected(self, s: Scalars) -> tuple[Any, Any, Any]:
        p = self.parameter if self.source is None else np.tile(self.source, self.rows)
        g = np.zeros_like(p) if self.gradient is None else self.gradient.float().numpy()
        return expected(
            s, p, self.first if self.moments else None, self.second if self.moments > 1 else None, g, self.fresh
        )

    def descriptor(self, place: Any) -> Descriptor:
        p = place(self.parameter)
        return Descriptor(
            p,
            p if self.source is None else place(self.source),
            place(self.first, self.fresh) if self.moments else None,
            place(self.second, self.fresh) if self.moments > 1 else None,
            None if self.gradient is None else place(self.gradient),
            None if self.copy is None else place(self.copy),
            self.row,
            self.rows,
            0 if self.gradient is None else TYPES[self.gradient.dtype],
            self.fresh,
        )


def launch(library: Any, cases: list[Case], s: Scalars) -> list[Any]:
    """Run one step in the simulator; moments that it may not read count as never written. Returns its launches."""
    import ptxsim

    registered = []

    def place(array: Any, unwritten: bool = False) -> int:
        registered.append(ptxsim.Empty(array) if unwritten else array)
        library.register(registered[-1])
        start = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
        return int(start)

    made = (Descriptor * len(cases))(*(case.descriptor(place) for case in cases))
    before = len(library.log)
    types = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    try:
        status = library.call(
            "rada_fast_episodic_optimizer", ctypes.addressof(made), len(cases), ctypes.addressof(s), None,
            argtypes=types, restype=ctypes.c_int,
        )  # fmt: skip
    finally:
        for array in registered:
            library.unregister(array)
    assert status == 0
    return list(library.log[before:])


def check(library: Any, cases: list[Case], step: Step) -> list[Any]:
    wanted = [case.expected(step.expected_scalars()) for case in cases]
    before = [(case.parameter.copy(), case.first.copy(), case.second.copy()) for case in cases]
    launches = launch(library, cases, step.product_scalars())
    if step.last:
        # The moments stay as they are, and so does a parameter of which a copy is written.
        copies = [p for p, _, _ in wanted]
        wanted = [
            (p if case.copy is None else kept, *moments)
            for case, (p, _, _), (kept, *moments) in zip(cases, wanted, before, strict=True)
        ]
    for index, (case, (p, m, v)) in enumerate(zip(cases, wanted, strict=True)):
        np.testing.assert_array_equal(case.parameter, p, err_msg=f"parameter {index}")
        if case.copy is not None:
            rounded = torch.from_numpy(copies[index] if step.last else case.parameter).bfloat16()
            assert torch.equal(case.copy, rounded), f"copy {index}"
        if case.moments:
            np.testing.assert_array_equal(case.first, m, err_msg=f"first moment {index}")
        if case.moments > 1:
            np.testing.assert_array_equal(case.second, v, err_msg=f"second moment {index}")
    return launches


@pytest.fixture
def library(launchers: Launchers) -> Any:
    return launchers("episodic_optimizer.cu")


@pytest.mark.parametrize("fresh", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adamw", {"weight_decay": 0.01}),
        ("adam", {"weight_decay": 5e-4}),
        ("adam", {"weight_decay": 0.0, "beta1": 0.4}),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.9}),
        ("sgd", {"weight_decay": 0.1}),
        ("sgd", {}),
    ],
)
def test_every_rule_rounds_as_written(library: Any, rule: str, options: dict[str, float], fresh: bool) -> None:
    step = Step(rule, 1 if fresh else 3, **options)
    moments = 2 if rule != "sgd" else int("momentum" in options)
    # Tails of every width, a block and a bit, copies whose rows are no whole vectors, offsets that break alignment.
    cases = [
        Case(3, 1, torch.float32, fresh=fresh, shared=fresh, moments=moments),
        Case(2, 7, torch.bfloat16, fresh=fresh, shared=fresh, moments=moments),
        Case(1, 1023, torch.float16, fresh=fresh, shared=False, moments=moments),
        Case(2, 4096 + 512, torch.float32, fresh=fresh, shared=fresh, moments=moments),
        Case(2, 260, torch.bfloat16, fresh=fresh, shared=True, moments=moments, offset=1),
        Case(2, 64, None, fresh=fresh, shared=fresh, moments=moments),
        Case(2, 64, torch.float32, fresh=fresh, shared=True, moments=moments, source_offset=1),
    ]
    if fresh and not options.get("weight_decay"):
        cases.append(Case(1, 100, None, fresh=True, shared=True, moments=0))
    assert len(check(library, cases, step)) == 1, "one launch for everything"


@pytest.mark.parametrize("seed", range(16))
def test_drawn_steps_round_as_written(library: Any, seed: int) -> None:
    """The rule and its options are drawn, and each tensor's sizes, type, place in memory and history."""
    r = random.Random(seed)
    rule, number, momentum = r.choice([*RULES]), r.choice([1, 2, 5]), r.choice([0.0, 0.9])
    options: dict[str, Any] = {"weight_decay": r.choice([0.0, 0.01, 0.5]), "beta1": r.choice([0.9, 0.5, 0.0])}
    if rule == "sgd":
        options = {"weight_decay": options["weight_decay"], "momentum": momentum}
    step = Step(rule, number, last=r.random() < 0.3, **options)
    moments = 2 if rule != "sgd" else int(momentum > 0)
    cases = []
    for _ in range(r.randint(1, 5)):
        fresh = number == 1 or r.random() < 0.3
        # A block takes 4096 elements, in vectors of four.
        size, gradient = around(r, 16, 4096), r.choice([*TYPES, None])
        cases.append(
            Case(
                r.randint(1, 3),
                size,
                gradient,
                fresh=fresh,
                shared=fresh and r.random() < 0.5,
                moments=moments,
                offset=r.choice([0, 0, 1, 2, 3]),
                source_offset=r.choice([0, 0, 1]),
                copied=r.random() < 0.5,
            )
        )
    check(library, cases, step)


@pytest.mark.parametrize("name", ["parameter", "source", "first", "second", "gradient", "copy"])
@pytest.mark.parametrize("gradient", TYPES)
def test_each_tensor_may_lie_off_its_boundary(library: Any, name: str, gradient: torch.dtype) -> None:
    """One tensor alone lies off the boundary of a vector, by one element, by half a vector or by nearly all of it."""
    cases = []
    for offset in (1, 2, 3):
        case = Case(2, 64, gradient, fresh=False, shared=name == "source", moments=2, copied=name == "copy")
        whole = getattr(case, name)
        memory = torch.cat([torch.zeros(offset, dtype=torch.as_tensor(whole).dtype), torch.as_tensor(whole)])[offset:]
        setattr(case, name, memory if isinstance(whole, Tensor) else memory.numpy())
        cases.append(case)
    check(library, cases, Step("adamw", 3, weight_decay=0.01))


@pytest.mark.parametrize("fresh", [True, False], ids=["first", "later"])
def test_the_last_step_leaves_the_moments_and_writes_copies(library: Any, fresh: bool) -> None:
    # A vector and a tail, several copies of one row, and a copy in bfloat16 that is off the boundary of a vector.
    cases = [
        Case(1, 1023, torch.float32, fresh=fresh, shared=False, moments=2, copied=True),
        Case(3, 64, torch.bfloat16, fresh=fresh, shared=fresh, moments=2, copied=True),
        Case(2, 260, torch.bfloat16, fresh=fresh, shared=True, moments=2, offset=1, copied=True),
        Case(2, 64, None, fresh=fresh, shared=fresh, moments=2),
    ]
    if fresh:
        cases.append(Case(1, 100, None, fresh=True, shared=True, moments=0, copied=True))
    assert len(check(library, cases, Step("adamw", 1 if fresh else 3, weight_decay=0.01, last=True))) == 1


@pytest.mark.parametrize(("tensors", "launches"), [(50, 1), (2 * 50 + 1, 3)])
def test_as_many_tensors_as_one_launch_takes_and_more(library: Any, tensors: int, launches: int) -> None:
    cases = [Case(1, 3, torch.float32, fresh=False, shared=False, moments=2) for _ in range(tensors)]
    assert len(check(library, cases, Step("adamw", 2, weight_decay=0.01))) == launches


def test_launches_without_an_element_do_not_end_the_step(library: Any) -> None:
    """The tensors of a whole launch may be empty."""
    empty, last = (Case(1, size, torch.float32, fresh=False, shared=False, moments=2) for size in (0, 3))
    assert len(check(library, [empty] * 50 + [last], Step("adamw", 2, weight_decay=0.01))) == 1


@pytest.mark.parametrize("step", [1, 2, 10, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "adamw", "weight_decay": 0.01},
        {"rule": "adamw", "weight_decay": 0.7, "lr": 0.3},  # 1 - lr wd in float32 would be another number
        {"rule": "adam", "beta1": 0.4},
        {"rule": "sgd", "momentum": 0.9},
    ],
)
def test_scalars_are_those_of_the_equations(library: Any, options: dict[str, Any], step: int) -> None:
    given = Step(step=step, **options)
    made, wanted = given.product_scalars(), given.expected_scalars()
    assert {name: getattr(made, name) for name, _ in Scalars._fields_} == {
        name: getattr(wanted, name) for name, _ in Scalars._fields_
    }


def test_nothing_to_step_launches_nothing(library: Any) -> None:
    s = scalars("adamw", 1, lr=8e-3, weight_decay=0.1, beta1=0.9, momentum=0.0)
    types = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    # No tensors; tensors without elements, whose pointers are null.
    for empty in ([], [Descriptor(row=0, rows=1), Descriptor(row=0, rows=3)]):
        tensors, before = (Descriptor * len(empty))(*empty), len(library.log)
        arguments = (ctypes.addressof(tensors), len(empty), ctypes.addressof(s), None)
        status = library.call("rada_fast_episodic_optimizer", *arguments, argtypes=types, restype=ctypes.c_int)
        assert (status, len(library.log)) == (0, before)


def test_a_step_touches_nothing_twice(library: Any) -> None:
    def run(fresh: bool) -> tuple[Any, int]:
        cases = [
            Case(8, row, torch.float32, fresh=fresh, shared=fresh, moments=2) for row in (64 * 64, 64, 64 * 64, 64)
        ]
        elements = sum(case.rows * case.row for case in cases)
        (stats,) = check(library, cases, Step("adamw", 1 if fresh else 2, lr=8e-4, weight_decay=0.01))
        # p, m, v out and g in; in also p, m, v, or at first one copy of p.
        return stats, 4 * (elements * 4 + (elements // 8 if fresh else elements * 3))

    for fresh in (True, False):
        stats, least = run(fresh)
        assert stats.footprint_ld + stats.footprint_st <= 1.1 * least
        assert stats.efficiency("ld") >= 0.9
        assert stats.efficiency("st") >= 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_device_agrees_with_torch_optim(name: str) -> None:
    if libraries.load_cuda() is not None:
        pytest.skip(f"no CUDA kernels: {libraries.load_cuda()}")
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    initial = {"w": torch.randn(64, 65, device="cuda"), "b": torch.randn(7, device="cuda")}
    steps = [{key: torch.randn(3, *value.shape, device="cuda") for key, value in initial.items()} for _ in range(3)]
    theirs = {key: value.expand(3, *value.shape).clone() for key, value in initial.items()}
    reference = kinds[name](list(theirs.values()), lr=8e-4, weight_decay=0.01, foreach=False)
    with use_backend("cuda"):
        ours = EpisodicOptimizer(initial, 3, name, lr=8e-4, weight_decay=0.01)  # type: ignore[arg-type]
        for gradients in steps:
            ours.step(gradients)
            for key, value in theirs.items():
                value.grad = gradients[key]
            reference.step()
    for key, value in theirs.items():
        # PyTorch's CUDA form divides by multiplying with a reciprocal and orders the last product otherwise: 3 ulp of
        # an update of at most 2 lr. In each of the three steps both forms round the parameter twice, after the decay
        # and after the update.
        torch.testing.assert_close(ours.parameters[key], value, rtol=3 * 2**-22, atol=3 * 2 * 8e-4 * 2**-23)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", TYPES)
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adamw", {"weight_decay": 0.01}),
        ("adamw", {"weight_decay": 0.01, "torch_roots": True}),
        ("adam", {"weight_decay": 5e-4, "betas": (0.4, 0.99)}),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.9}),
        ("sgd", {}),
    ],
)
def test_a_device_rounds_as_the_cpu(rule: Any, options: dict[str, Any], gradient: torch.dtype) -> None:
    if libraries.load_cuda() is not None:
        pytest.skip(f"no CUDA kernels: {libraries.load_cuda()}")
    # A matrix with tails, a row, and one that no gradient reaches at first: it stays shared.
    initial = {"w": torch.randn(33, 65), "b": torch.randn(7), "late": torch.randn(100)}
    steps = [{key: torch.randn(3, *value.shape).to(gradient) for key, value in initial.items()} for _ in range(3)]
    del steps[0]["late"]
    found = {}
    for device in ("cpu", "cuda"):
        start = {key: value.to(device) for key, value in initial.items()}
        optimizer = EpisodicOptimizer(start, 3, rule, lr=8e-3, backend=device, **options)
        for _ in range(2):
            optimizer.reset()
            for gradients in steps:
                optimizer.step({key: value.to(device) for key, value in gradients.items()})
        found[device] = {key: value.cpu() for key, value in optimizer.parameters.items()}
    for key, value in found["cpu"].items():
        if options.get("torch_roots"):
            # PyTorch's roots on a CPU may differ from the processor's in the last place: an ulp of an update.
            torch.testing.assert_close(found["cuda"][key], value, rtol=2**-22, atol=8e-3 * 2**-20)
        else:
            assert torch.equal(found["cuda"][key], value), key


@pytest.mark.gpu
def test_an_episode_replays_from_a_graph() -> None:
    if libraries.load_cuda() is not None:
        pytest.skip(f"no CUDA kernels: {libraries.load_cuda()}")
    initial = {"w": torch.randn(64, 65, device="cuda")}
    gradients = [torch.randn(2, 64, 65, device="cuda") for _ in range(3)]
    optimizer = EpisodicOptimizer(initial, 2, lr=8e-4, weight_decay=0.01, backend="cuda")

    def episode() -> Tensor:
        optimizer.reset()
        for gradient in gradients:
            optimizer.step({"w": gradient})
        return optimizer.parameters["w"]

    assert_replays_from_a_graph(episode)
