"""A group of episodes takes a fixed number of launches on a GPU, asks for no value on the host, and reuses its memory.

The launches are those of the product on CPU tensors, where a simulator executes the Triton kernels. In the place of the
CUDA C++ kernels stand the CPU's operators, one call for each launch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from rada_fast import use_backend
from rada_fast.bench.compiled import recorded
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine import groups
from rada_fast.engine.groups import EpisodeGroup, EpisodeRule
from rada_fast.extension import libraries
from rada_fast.modules import RationalAdapter
from tests.kernels.conftest import Simulated
from tests.kernels.conftest import simulated as simulated  # a fixture

if reason := libraries.load():
    pytest.skip(f"no compiled operators: {reason}", allow_module_level=True)

MOST = 45
HOST_VALUES = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
NO_LAUNCHES = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::detach", "aten::set_", "aten::lift_fresh"}
"""Operators that only allocate or make a view. An operator around Triton launches launches nothing else either."""


class Watch(TorchDispatchMode):
    """Counts launches, refuses what needs a value on the host, and counts the memory that a caching allocator lacks.

    lacking: allocations for which no freed memory of the same size was left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.lacking: list[str] = []
        self._live: list[tuple[StorageWeakRef, int]] = []
        self._free: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in HOST_VALUES, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim":
            return out
        if name not in NO_LAUNCHES and "_triton" not in name:
            self.launches[name] += 1
        given = {id_of(value) for value in tensors_of((args, kwargs))}
        for value in tensors_of(out):
            if id_of(value) not in given and not any(id_of(value) == ref.cdata for ref, _ in self._live):
                self._allocate(value, name)
        return out

    def _allocate(self, value: Tensor, name: str) -> None:
        freed = [entry for entry in self._live if entry[0].expired()]
        self._live = [entry for entry in self._live if not entry[0].expired()]
        self._free.update(size for _, size in freed)
        size = value.untyped_storage().nbytes()
        if self._free[size]:
            self._free[size] -= 1
        elif size:
            self.lacking.append(f"{name}: {size} bytes")
        self._live.append((StorageWeakRef(value.untyped_storage()), size))


def id_of(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, Tensor)]


def problem(
    episodes: int, views: int, classes: int, width: int, dtype: torch.dtype, start: str = "zero", **options: Any
) -> tuple[dict[str, Tensor], EpisodeRule, Tensor, Tensor]:
    """Return the initial parameters, the rule, the views (E, V, D) and the text features (K, D)."""
    torch.manual_seed(classes)
    adapter = RationalAdapter(AdapterConfig.official(width, num_heads=2))
    if start == "pretrained":
        nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.05)
    initial = {name: value.detach() for name, value in adapter.named_parameters()}
    shapes = ((episodes, views, width), (classes, width))
    own, text = (normalize(torch.randn(*shape), dim=-1).to(dtype) for shape in shapes)
    rule = EpisodeRule(adapter.config, EpisodeConfig(**options), dtype, start == "zero", tuple(initial))
    return initial, rule, own, text


SCALE = torch.tensor(30.0)


CASES = [(torch.float32, "zero"), (torch.bfloat16, "pretrained")]


@pytest.mark.parametrize(("dtype", "start"), CASES)
def test_an_episode_has_the_same_bits_in_a_group_and_no_value_is_asked_for(
    dtype: torch.dtype, start: str, simulated: Simulated
) -> None:
    initial, rule, views, text = problem(2, 12, 7, 32, dtype, start, selection=0.2)
    with use_backend("triton"), simulated() as log:
        with Watch() as watch:
            found = EpisodeGroup(initial, rule, 2)(views, text, SCALE)
        first = len(log)
        with Watch() as watch_alone:
            single = EpisodeGroup(initial, rule, 1)(views[1:], text, SCALE)
    assert len(log) == 2 * first
    assert watch.launches == watch_alone.launches
    assert torch.equal(single.adapted[0], found.adapted[1])
    assert torch.equal(single.zero_shot[0], found.zero_shot[1])
    # The kernels agree with the CPU's operators.
    expected = EpisodeGroup(initial, rule, 2)(views, text, SCALE)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize(("dtype", "start"), CASES)
def test_a_group_reuses_its_memory(dtype: torch.dtype, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is executed here, because what is allocated does not depend on values."""

    def launch_nothing(*given: Any, **named: Any) -> None:
        pass

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launch_nothing)
    initial, rule, views, text = problem(2, 12, 7, 32, dtype, start, selection=0.2)
    group = EpisodeGroup(initial, rule, 2)
    with use_backend("triton"), Watch() as watch:
        for _ in range(2):
            group(views, text, SCALE)
        assert watch.lacking
        watch.lacking.clear()
        group(views, text, SCALE)
    assert not watch.lacking


@pytest.mark.parametrize(
    ("start", "options", "expected"),
    [
        # Selection, first step, two more steps, prediction.
        ("zero", {}, 2 + 6 + 2 * 9 + 3),
        ("zero", {"optimizer": "sgd", "loss": "marginal", "penalty_weight": 0.0}, 2 + 6 + 2 * 9 + 3),
        # Here all views enter the adapter before the selection, and the first step is like the others.
        ("pretrained", {"penalty": "linf"}, 7 + 3 * 9 + 3),
    ],
    ids=["paper", "sgd", "pretrained"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_takes_as_many_launches_whatever_its_size(
    start: str, options: dict[str, Any], expected: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches are only recorded here, so that large groups cost nothing."""
    monkeypatch.setitem(groups.BUDGETS, "cpu", groups.BUDGETS["cuda"])
    for episodes, classes in ((1, 20), (8, 20), (32, 50)):
        initial, rule, views, text = problem(episodes, 64, classes, 64, dtype, start, **options)
        group = EpisodeGroup(initial, rule, episodes)
        with use_backend("triton"), recorded():
            group(views, text, SCALE)
        with use_backend("triton"), recorded() as launches, Watch() as watch:
            group(views, text, SCALE)
        # In bfloat16, one launch rounds the initial parameters.
        assert len(launches) + sum(watch.launches.values()) == expected + (dtype == torch.bfloat16) <= MOST


@pytest.mark.parametrize(
    ("start", "options", "frozen", "reuses"),
    [
        ("zero", {}, None, True),
        ("zero", {"optimizer": "sgd"}, None, True),
        ("zero", {"optimizer": "adam", "weight_decay": 0.0}, "k_proj.bias", True),
        # Adam adds weight decay to a gradient, and what is frozen does not decay.
        ("zero", {"optimizer": "adam"}, None, False),
        ("zero", {}, "k_proj.bias", False),
        ("pretrained", {}, None, False),
    ],
)
def test_the_second_step_scales_the_projections_of_the_first(
    start: str, options: dict[str, Any], frozen: str | None, reuses: bool
) -> None:
    initial, rule, views, text = problem(2, 12, 7, 32, torch.float32, start, **options)
    rule = replace(rule, trained=tuple(name for name in rule.trained if name != frozen))
    with use_backend("triton"), recorded() as launches:
        EpisodeGroup(initial, rule, 2)(views, text, SCALE)
    names = [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]
    projections = [
        name.split("_")[0] for name in names if ("projections" in name and "forward" in name) or "scaled" in name
    ]
    steps = ["rational", "scaled" if reuses else "rational", "rational"]
    assert projections == ["rational"] * (start == "pretrained") + steps + ["rational"]


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.5}])
def test_scaled_projections_change_nothing_but_roundings(
    options: dict[str, Any], simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial, rule, views, text = problem(1, 5, 7, 32, torch.float32, steps=2, **options)
    with use_backend("triton"), simulated():
        scaled = EpisodeGroup(initial, rule, 1)(views, text, SCALE).adapted
        monkeypatch.setattr(groups, "decay_without_gradient", lambda _: None)
        projected = EpisodeGroup(initial, rule, 1)(views, text, SCALE).adapted
    torch.testing.assert_close(scaled, projected, rtol=0, atol=1e-4)
