"""Each Triton launch of a training step is compared by itself with plain PyTorch in float64.

A launch reads the results of the launches before it, so the first one that fails here is the one at fault.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.bench.compiled import RecordedLaunch, compiled_code, recorded, step_launches
from rada_fast.bench.tuning import launches_of
from rada_fast.config.method import ROLES, AdapterConfig
from rada_fast.kernels.class_attention import combined
from rada_fast.kernels.masked_logits import totals
from rada_fast.kernels.view_selection import kept_views
from rada_fast.ops._backends import triton
from rada_fast.reference import class_attention, masked_logits, rational_projections
from tests.support import problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CONFIGS = {"matrix": AdapterConfig.official(64, num_heads=2), "row": AdapterConfig.paper(32, bias=True)}
BATCH, CLASSES, SCALE = 2, 20, 20.0
LAUNCHES = {
    "rational_projections_forward": ("keys", "values", "q_rational", "q_text", "q_image"),
    "class_attention_forward": ("attended",),
    "masked_logits_forward": ("logits", "penalty", "mask"),
    "masked_logits_backward": ("doffset", "dattended"),
    "class_attention_backward": ("dkeys", "dvalues", "dq_rational", "dq_text", "dq_image"),
    "parameter_gradients": tuple(f"d{name}.{part}" for name in ROLES.values() for part in ("weight", "bias")),
    "rational_projections_backward": ("dimage", "dtext"),
}
"""The launches of a step in their order, and the names of their results."""


def merge_heads(heads: Tensor) -> Tensor:
    """Return values of shape (N, H, K, d) in the shape (N, K, D), where D is H times d."""
    return heads.transpose(-3, -2).flatten(-2)


@cache
def results_of_pytorch(name: str, dtype: torch.dtype, stored: torch.dtype) -> dict[str, Tensor]:
    """Return the results of every launch as plain PyTorch computes them in dtype, converted to float64.

    stored: the type in which the inputs are exact.
    """
    config = CONFIGS[name]
    image, text, parameters = problem(config, BATCH, CLASSES, stored)
    leaves = {
        key: value.to(dtype).clone().requires_grad_()
        for key, value in {"image": image, "text": text, **parameters}.items()
    }
    scale = torch.tensor(SCALE, dtype=dtype)
    projections = rational_projections.rational_projections(leaves["image"], leaves["text"], scale, leaves, config)
    projected = {
        "keys": projections.keys,
        "values": projections.values,
        **{f"q_{kind}": query for kind, query in projections.queries.items()},
    }
    attended = class_attention.class_attention(
        projections.queries.values(),
        projections.keys,
        projections.values,
        temperature=config.temperature,
        softmax=config.softmax,
    )
    offset = rational_projections.project(attended, leaves, "out_proj")
    mask = masked_logits.rational_mask(offset, config.mask_activation)
    rational = rational_projections.rational_matrix(leaves["image"], leaves["text"])
    logits, penalty = masked_logits.masked_logits(mask, rational, scale), masked_logits.mask_penalty(mask, "l2")
    for value in (*projected.values(), attended, offset):
        value.retain_grad()
    # The gradient of each logit and of the penalty is 1.
    (logits.sum() + penalty).backward()
    found = {key: merge_heads(value) for key, value in projected.items()}
    found |= {"attended": attended, "logits": logits, "penalty": penalty, "mask": mask}
    found |= {f"d{key}": merge_heads(value.grad) for key, value in projected.items() if value.grad is not None}
    found |= {"doffset": offset.grad, "dattended": attended.grad}
    found |= {f"d{key}": value.grad for key, value in leaves.items()}
    return {key: value.detach().double() for key, value in found.items()}


def start_launches(name: str, dtype: torch.dtype, device: str) -> Iterator[dict[str, Tensor]]:
    """Start the launches of a step one after the other, and yield the results of each under their names in LAUNCHES."""
    config = CONFIGS[name]
    image, text, parameters = problem(config, BATCH, CLASSES, dtype)
    image, text = image.to(device), text.to(device)
    on_device = {key: value.to(device) for key, value in parameters.items()}
    weights, biases = ({role: on_device[f"{key}.{part}"] for role, key in ROLES.items()} for part in ("weight", "bias"))
    input_weights, input_biases = (
        {role: value for role, value in values.items() if role != "output"} for values in (weights, biases)
    )
    scale = torch.tensor(SCALE, device=device)
    scale_factor = config.input_scale_factor if config.input_scale == "logit" else 0.0
    common: dict[str, Any] = {"precision": triton.float32_precision()}
    heads: dict[str, Any] = common | {"num_heads": config.num_heads}
    attention = heads | {"temperature": config.temperature, "matrix": config.softmax == "matrix"}
    last = common | {"relu": config.mask_activation == "relu", "penalty": "l2"}

    projections = triton.rational_projections_forward(
        image, text, scale, input_weights, input_biases, scale_factor=scale_factor, **common
    )
    yield {
        **{name: getattr(projections, name) for name in ("keys", "values", "q_rational", "q_text")},
        "q_image": projections.q_image.unsqueeze(1),
    }
    attended = triton.class_attention_forward(projections, **attention)
    yield {"attended": attended.combined}
    output, bias = weights["output"], biases["output"]
    result = triton.masked_logits_forward(
        image, text, scale, attended.combined, output, bias, return_mask=True, keep=True, **last
    )
    yield {"logits": result.logits, "penalty": result.penalty.reshape(()), "mask": result.mask}
    ones = torch.ones_like(result.logits)
    mask_gradients = triton.masked_logits_backward(
        image,
        text,
        scale,
        attended,
        output,
        result.distances,
        ones,
        ones.new_ones(1),
        None,
        None,
        weighted=True,
        num_heads=config.num_heads,
        **last,
    )
    yield {"doffset": mask_gradients.doffset, "dattended": mask_gradients.dattended}
    gradients = triton.class_attention_backward(
        projections, attended, mask_gradients.dattended, mask_gradients.deltas, **attention
    )
    yield {
        "dkeys": gradients.keys, "dvalues": gradients.values, "dq_rational": gradients.q_rational,
        # The kernel leaves one gradient for each image, and plain PyTorch has their sum.
        "dq_text": gradients.q_text.double().sum(0, keepdim=True), "dq_image": gradients.q_image.unsqueeze(1),
    }  # fmt: skip
    parameter_values = triton.parameter_gradients(
        image,
        text,
        scale,
        attended.combined,
        gradients,
        mask_gradients.doffset,
        weights,
        bias=True,
        scale_factor=scale_factor,
        **common,
    )
    yield {
        f"d{ROLES[role]}.{part}": value
        for part, values in zip(("weight", "bias"), parameter_values, strict=True)
        for role, value in values.items()
    }
    dimage, dtext = triton.rational_projections_backward(
        image, text, scale, weights, gradients, mask_gradients.weighted, scale_factor=scale_factor, **common
    )
    yield {"dimage": dimage, "dtext": dtext}


@cache
def steps(name: str, dtype: torch.dtype, device: str) -> tuple[Iterator[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return the launches that are still to be started, and a list for the results of those that have run."""
    return start_launches(name, dtype, device), []


def results_of_launch(name: str, dtype: torch.dtype, device: str, launch: str) -> dict[str, Tensor]:
    """Return the results of one launch in float64 on the CPU, and start no launch after it."""
    remaining, results = steps(name, dtype, device)
    while len(results) <= list(LAUNCHES).index(launch):
        found = next(remaining, None)
        assert found is not None, f"a launch before {launch} failed"
        results.append({key: value.cpu().double() for key, value in found.items()})
    return results[list(LAUNCHES).index(launch)]


TYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}
# A device runs every combination. The simulator needs seconds for each, so it runs only two of them here and the others
# in test_rational_adapter.py.
RUNS = [pytest.param("simulator", *run, id="-".join(run)) for run in (("matrix", "bfloat16"), ("row", "float32"))]
RUNS += [
    pytest.param("cuda", name, dtype, id=f"cuda-{name}-{dtype}", marks=pytest.mark.gpu)
    for name in CONFIGS
    for dtype in TYPES
]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(("device", "name", "dtype"), RUNS, indirect=["device"])
def test_each_launch_is_as_exact_as_plain_pytorch(device: str, name: str, dtype: str, launch: str) -> None:
    stored = TYPES[dtype]
    fast = results_of_launch(name, stored, device, launch)
    exact, plain = results_of_pytorch(name, torch.float64, stored), results_of_pytorch(name, stored, stored)
    assert set(fast) == set(LAUNCHES[launch])
    for key, value in fast.items():
        assert value.shape == exact[key].shape, key
        error, allowed = (value - exact[key]).norm(), (plain[key] - exact[key]).norm()
        size = exact[key].norm()
        if key.startswith(("dq_", "dk")):
            # These gradients are differences that nearly cancel, of terms as large as the gradient of the values.
            size = size + exact["dv_proj." + key.rpartition(".")[2] if "_proj" in key else "dvalues"].norm()
        band = 2 * torch.finfo(stored).eps * size
        assert error <= 3 * allowed + band, f"{key}: {error:.2e}, plain PyTorch's {allowed:.2e}, band {band:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_named_and_called_by_one_rule(name: str) -> None:
    for kernel, positional, _, _ in step_launches(CONFIGS[name], BATCH, CLASSES, F32):
        assert kernel.__name__.endswith("_kernel")
        assert positional == (), f"{kernel.__name__} is not launched by keyword"
        constants = [parameter.is_constexpr for parameter in kernel.params]
        assert constants == sorted(constants), f"{kernel.__name__} has a compile-time constant too early"


def test_no_launch_of_the_backend_is_left_out_here() -> None:
    launches = launches_of(CONFIGS["row"], 0, 1, F32, "cpu")
    assert [name for name in LAUNCHES if name != "rational_projections_backward"] == list(launches)


def test_the_launches_give_the_result_of_the_whole_backend_bit_for_bit(device: str) -> None:
    config = CONFIGS["matrix"]
    image, text, parameters = problem(config, BATCH, CLASSES, BF16)
    on_device = {key: value.to(device) for key, value in parameters.items()}
    output = triton.rational_adapter(
        image.to(device), text.to(device), SCALE, on_device, config, penalty="l2", return_mask=True
    )
    found = results_of_launch("matrix", BF16, device, "masked_logits_forward")
    assert output.mask is not None
    assert torch.equal(output.logits.cpu().double(), found["logits"])
    assert torch.equal(output.mask.cpu().double(), found["mask"])


def test_the_last_program_sees_what_the_others_have_stored() -> None:
    # The simulator, where every store is visible at once, cannot show that one of these instructions is missing.
    counting = []
    for launch in step_launches(CONFIGS["matrix"], BATCH, CLASSES, F32):
        lines = compiled_code(launch, 80).asm["ptx"].splitlines()
        atomics = [at for at, line in enumerate(lines) if re.search(r"\batom\.", line)]
        for at in atomics:
            counting.append(launch.kernel.__name__)
            assert ".gpu." in lines[at]
            assert ".acq_rel." in lines[at]
            barriers = [before for before in range(at) if "bar.sync" in lines[before]]
            stores = [before for before in range(at) if "st.global" in lines[before]]
            assert stores[-1] < barriers[-1], "a thread may count before another one has stored"
    assert set(counting) == {"class_attention_forward_kernel", "masked_logits_forward_kernel"}


def pointers_of(lines: list[str]) -> dict[str, set[str]]:
    """Return for each register of PTX the numbers of the parameters that it is computed from."""
    found: dict[str, set[str]] = {}
    # A register that is changed in a loop may be used before the line that changes it.
    for line in 2 * lines:
        if parameter := re.search(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            found[parameter[1]] = {parameter[2]}
        elif (registers := re.findall(r"%rd\d+", line)) and not re.search(r"\b(?:ld|st|atom|cp)\.", line):
            target, *sources = registers
            found.setdefault(target, set()).update(*(found.get(source, ()) for source in sources))
    return found


def read_back(launch: RecordedLaunch) -> set[str]:
    """Return the parameters in which a program reads what its own threads have stored.

    An assertion fails unless all its threads meet between the store and the load.
    """
    lines = compiled_code(launch, 80).asm["ptx"].splitlines()
    pointers, found = pointers_of(lines), set()
    stored: dict[str, int] = {}
    barrier = -1
    for at, line in enumerate(lines):
        if re.search(r"\bbar\.(?:warp\.)?sync", line):
            barrier = at
        elif access := re.search(r"\b(ld|st)\.(?:global|volatile)\S*.*?\[\s*(%rd\d+)", line):
            for parameter in pointers.get(access[2], ()):
                if access[1] == "st":
                    stored[parameter] = at
                elif parameter in stored:
                    assert stored[parameter] < barrier, f"a thread may read before another one has stored: {line}"
                    found.add(parameter)
    return found


def test_threads_meet_before_they_read_what_others_of_their_program_have_stored() -> None:
    """The simulator runs the warps of a program side by side, so that there each one has stored when another reads."""
    config = AdapterConfig.official(64, num_heads=2, queries=("image",))
    found = {launch.kernel.__name__: read_back(launch) for launch in step_launches(config, BATCH, CLASSES, F32)}
    # The image query's pairs, and the sums of dO.
    assert len(found["class_attention_backward_kernel"]) == 2
    with recorded() as launches:
        kept_views(torch.zeros(1, 20, 32), torch.zeros(3, 32), torch.ones(()), 2)
    # The entropies of the views.
    assert [len(read_back(launch)) for launch in launches] == [0, 1]


@pytest.mark.parametrize("module", [combined, totals], ids=["combined", "totals"])
def test_the_last_program_reads_past_its_own_cache(module: ModuleType) -> None:
    # A multiprocessor's own cache may hold what was there before other programs stored their results.
    tree = ast.parse(inspect.getsource(module))
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"]
    assert loads
    for load in loads:
        if ast.unparse(load.args[0]) != "logit_scale":
            assert "cache_modifier='.cg'" in ast.unparse(load), f"line {load.lineno}: {ast.unparse(load)}"
