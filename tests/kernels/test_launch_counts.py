"""A training step takes few launches: at most seven for a forward and a backward pass, and four for a first step."""

from __future__ import annotations

import pytest
import torch

from rada_fast.bench.compiled import recorded
from rada_fast.config.method import AdapterConfig
from rada_fast.ops import rational_adapter
from tests.support import problem

QUERIES = [("image", "text", "rational"), ("image",), ("text",), ("rational",), ("text", "image")]
FORWARD = ["rational_projections_forward", "class_attention_forward", "masked_logits_forward"]


def launches_of_a_step(config: AdapterConfig, *, output_is_zero: bool) -> list[str]:
    """Return the names of the kernels that a step launches. They are not executed."""
    image, text, parameters = problem(config, 6, 20, torch.bfloat16)
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with recorded() as launches:
        output = rational_adapter(
            image.detach(), text.detach(), 20.0, leaves, config, penalty="l2", episodes=2, backend="triton",
            output_is_zero=output_is_zero,
        )  # fmt: skip
        assert output.penalty is not None
        (output.logits.sum() + output.penalty.sum()).backward()
    assert all(value.grad is not None for value in leaves.values())
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("queries", QUERIES, ids="-".join)
@pytest.mark.parametrize("softmax", ["matrix", "row"])
def test_a_step_takes_at_most_seven_launches(softmax: str, queries: tuple[str, ...]) -> None:
    config = AdapterConfig.official(64, num_heads=2, softmax=softmax, queries=queries)  # type: ignore[arg-type]
    names = launches_of_a_step(config, output_is_zero=False)
    assert names[:3] == FORWARD
    assert len(names) <= 7
    assert launches_of_a_step(config, output_is_zero=True) == [*FORWARD, "output_projection_gradients"]
