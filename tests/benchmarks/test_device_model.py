"""The model of the device knows what a step launches, and its times are close to those measured on an H100."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import device_model
from benchmarks.device_model import DEVICES, H100, Schedule, error_of, measured_us, schedule
from benchmarks.launched_programs import STEPS, Programs, programs_of
from rada_fast.bench.compiled import RecordedLaunch, compiled_code, recorded, step_launches
from rada_fast.bench.costs import least_operations
from rada_fast.config.method import AdapterConfig
from rada_fast.ops import rational_adapter
from tests.support import problem

CONFIG, BATCH, CLASSES = AdapterConfig.official(512), 6, 200
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MEDIAN, WORST = 1.15, 1.35
"""The factors between estimated and measured times of a step's launches that docs/measurements.md states."""


def rows_of(dtype: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return what the command prints for a step."""
    assert device_model.main(["--sizes", f"{BATCH}x{CLASSES}", "--dtype", dtype, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@cache
def programs_by_launch(dtype: str) -> dict[str, tuple[RecordedLaunch, Programs]]:
    """Return each launch of a step under its name, and what its programs do."""
    launches = step_launches(CONFIG, BATCH, CLASSES, TYPES[dtype], feature_gradients=False, target=90)
    return {
        launch.kernel.__name__.removesuffix("_kernel"): (
            launch,
            programs_of(launch, compiled_code(launch, 90).asm["ttgir"]),
        )
        for launch in launches
    }


@pytest.mark.parametrize("dtype", TYPES)
def test_the_model_has_every_launch_of_a_step_with_its_programs_and_a_time_near_the_measured_one(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(dtype, capsys)
    launches = [launch for launch, _ in programs_by_launch(dtype).values()][:-1]
    assert [row["launch"] for row in rows] == [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]
    assert [row["programs"] for row in rows] == [math.prod(launch.grid) for launch in launches]
    for row in rows:
        assert row["waves"] == math.ceil(row["programs"] / (H100.processors * row["resident"]))
        assert 0 <= row["idle"] < 1
        assert row["us"] >= row["floor_us"] >= H100.launch
    if dtype == "float32":
        # It has not been measured with the products of today.
        assert not any(row["measured_us"] for row in rows)
        return
    # Launches that have changed since the measurement are left out.
    pairs = [(row["us"], row["measured_us"]) for row in rows if row["measured_us"]]
    assert len(pairs) >= 2
    median, worst = error_of(pairs)
    assert median <= MEDIAN, pairs
    assert worst <= WORST, pairs


def test_the_launches_are_those_of_the_operators_on_any_target() -> None:
    image, text, parameters = problem(CONFIG, BATCH, CLASSES, torch.bfloat16)
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with recorded() as launches:
        output = rational_adapter(image.detach(), text.detach(), 20.0, leaves, CONFIG, penalty="l2", backend="triton")
        assert output.penalty is not None
        (output.logits.sum() + output.penalty.sum()).backward()
    expected = step_launches(CONFIG, BATCH, CLASSES, torch.bfloat16, feature_gradients=False)[:-1]
    assert [(launch.kernel.__name__, launch.grid) for launch in launches] == [
        (launch.kernel.__name__, launch.grid) for launch in expected
    ]


@pytest.mark.parametrize(("dtype", "products"), [("bfloat16", 1), ("float32", 6)])
def test_operations_of_the_forward_pass_are_those_of_its_tiles(dtype: str, products: int) -> None:
    found = programs_by_launch(dtype)
    forward = [programs for launch, (_, programs) in found.items() if launch.endswith("forward")]
    operations = sum(programs.counts["half_operations"].sum() for programs in forward)
    # Tiles are larger than what they hold, and the text query is computed once for all images.
    assert 1.0 <= operations / products / least_operations(BATCH, CLASSES, 512) <= 1.4


def test_programs_of_one_launch_have_their_own_numbers_of_steps() -> None:
    launch, programs = programs_by_launch("bfloat16")["rational_projections_forward"]
    depth, columns, rows = (launch.kwargs[name] for name in ("BLOCK_C", "BLOCK_N", "BLOCK_M"))
    steps = programs.counts["pipelined_steps"]
    assert set(steps) == {512 / depth}
    row_programs = -(-BATCH * CLASSES // rows) * 3 * (512 // columns)
    operations = programs.counts["half_operations"]
    assert set(operations[:row_programs]) == {2.0 * rows * columns * 512}
    # The last programs compute the image query, whose tiles have fewer rows. The first one also sets counters to zero.
    assert set(operations[-(512 // columns) :]) == {2.0 * launch.kwargs["BLOCK_I"] * columns * 512}
    assert programs.steps[0] == programs.steps[1] + 1


def test_only_the_last_program_of_a_group_has_a_tail() -> None:
    found = programs_by_launch("bfloat16")
    assert sum(found["masked_logits_forward"][1].tail[name] for name in (*STEPS, "atomics")) > 0
    assert not any(found["rational_projections_forward"][1].tail.values())


def test_programs_wait_until_a_place_is_free() -> None:
    ones = np.ones(5)
    assert schedule(ones, 0 * ones, 2, 2) == Schedule(2, 0, 0.25)
    assert schedule(ones[:2], ones[:2], 1, 4) == Schedule(1, 1, 0.5)
    assert schedule(np.array([5.0, 1, 1, 1]), np.zeros(4), 1, 2) == Schedule(5, 0, 1 - (5 + 3) / 2 / 5)


def test_an_a100_is_slower_in_everything() -> None:
    a100 = DEVICES[80]
    assert a100.processors == 108
    assert all(a100.peak[name] * 108 < rate * 132 for name, rate in H100.peak.items())
    assert a100.arithmetic < H100.arithmetic
    assert a100.half.pipelined > H100.half.pipelined
    assert a100.memory_bytes < H100.memory_bytes


def test_sizes_that_were_not_measured_have_no_measured_times() -> None:
    assert measured_us(6, 200, "bfloat16")["parameter_gradients"] > 0
    assert measured_us(6, 201, "bfloat16") == measured_us(6, 200, "float32") == {}


def test_measured_tiles_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "measured.jsonl"
    tile = {"rows": 64, "columns": 128, "depth": 64, "image_rows": 16, "warps": 4, "stages": 3}
    row = {"dtype": "bfloat16", "shape": [6, 200], "launch": "rational_projections_forward", "tile": tile, "us": 10.2}
    lines = (row, row | {"us": None}, row | {"dtype": "tf32x3"})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert device_model.main(["--compare", str(path)]) == 0
    assert capsys.readouterr().out.startswith("1 launches: the estimate is off by a factor of 1.")
