"""The report of what the Triton kernels compile to: no register spills on any target."""

from __future__ import annotations

import json

import pytest

from rada_fast import cli
from rada_fast.config import AdapterConfig
from rada_fast.kernel_report import TYPES, compile_launch, step_launches


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(("classes", "dtype"), [(200, "bfloat16"), (1000, "bfloat16"), (1000, "float16")])
def test_nothing_spills(target: int, classes: int, dtype: str) -> None:
    for launch in step_launches(AdapterConfig.official(512), 6, classes, TYPES[dtype]):
        made = compile_launch(*launch, target, "")
        assert made.spills == 0, made
        assert 0 < made.occupancy <= 1, made


def test_the_report_prints_a_line_for_each_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "--json", "--targets", "80", "--classes", "50"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [line["kernel"] for line in lines]
    assert "class_attention_fwd" in names
    assert "parameter_gradients_kernel" in names
    assert {line["target"] for line in lines} == {"sm_80"}
