"""A CUDA graph replays the adapter, the optimiser and whole episodes, in every configuration and on new inputs.

Each test captures a call, gives its inputs other values, and compares a replay with the same call outside of the graph,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig, MaskPenalty, OptimizerName
from rada_fast.extension import libraries
from rada_fast.ops import EpisodicOptimizer, prediction_loss, rational_adapter, select_views, zero_shot_logits
from tests.kernels.test_rational_adapter import CASES
from tests.support import problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.gpu

Call = Callable[[], list[Tensor]]


def assert_replays(call: Call, inputs: Iterable[Tensor]) -> None:
    """Capture a call, change the inputs in place, and check that a replay gives what the call itself gives then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The first call compiles what is missing, which a capture does not allow.
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for factor in (1.0, 0.75):
        with torch.no_grad():
            for value in inputs:
                value.mul_(factor)
        graph.replay()
        replayed = [value.clone() for value in captured]
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        for result, again, wanted in zip(replayed, captured, call(), strict=True):
            assert bool(result.isfinite().all())
            assert torch.equal(result, wanted)
            assert torch.equal(again, wanted)


def leaves_of(inputs: tuple[Tensor, Tensor, dict[str, Tensor]], episodes: int | None) -> dict[str, Tensor]:
    """Return the features, the parameters and the multiplier as leaves on the device. Episodes get parameters each."""
    image, text, parameters = inputs
    if episodes is not None:
        image = image.repeat(episodes, 1)
        parameters = {name: torch.stack([value] * episodes) for name, value in parameters.items()}
    named = {"image": image, "text": text, "logit_scale": torch.tensor(20.0, dtype=image.dtype), **parameters}
    return {name: value.detach().cuda().requires_grad_() for name, value in named.items()}


def step_of(
    leaves: dict[str, Tensor],
    config: AdapterConfig,
    penalty: MaskPenalty | None,
    *,
    wanted: Iterable[str] | None = None,
    episodes: int | None = None,
    return_mask: bool = True,
) -> Call:
    """Return a function that computes the adapter's results and the gradients of the wanted leaves, or of all."""
    chosen = [leaves[name] for name in (leaves if wanted is None else wanted)]
    parameters = {name: value for name, value in leaves.items() if name not in ("image", "text", "logit_scale")}

    def step() -> list[Tensor]:
        output = rational_adapter(
            leaves["image"], leaves["text"], leaves["logit_scale"], parameters, config, penalty=penalty,
            return_mask=return_mask, episodes=episodes, backend="triton",
        )  # fmt: skip
        results = [value for value in output if value is not None]
        loss = sum(value.float().square().sum() for value in results)
        assert isinstance(loss, Tensor)
        return [*(value.detach() for value in results), *torch.autograd.grad(loss, chosen)]

    return step


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_replay_in_every_configuration(name: str) -> None:
    config, batch, classes, dtype, penalty = CASES[name]
    leaves = leaves_of(problem(config, batch, classes, dtype), None)
    assert_replays(step_of(leaves, config, penalty), leaves.values())


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["official", "paper", "image", "rational"])
def test_autocast_replays(name: str, dtype: torch.dtype) -> None:
    config, batch, classes, _, penalty = CASES[name]
    leaves = leaves_of(problem(config, batch, classes, F32), None)
    # A cache of converted weights would outlive the capture.
    with torch.autocast("cuda", dtype, cache_enabled=False):
        assert_replays(step_of(leaves, config, penalty), leaves.values())


@pytest.mark.parametrize("penalty", [None, "l1", "l2", "linf"])
@pytest.mark.parametrize("wanted", [None, ("out_proj.weight", "out_proj.bias")], ids=["all", "output"])
def test_episodes_replay(wanted: tuple[str, ...] | None, penalty: MaskPenalty | None) -> None:
    config = AdapterConfig.official(128)
    leaves = leaves_of(problem(config, 6, 37, F32), 3)
    step = step_of(leaves, config, penalty, wanted=wanted, episodes=3, return_mask=False)
    assert_replays(step, leaves.values())


def test_the_forward_pass_alone_replays() -> None:
    config = AdapterConfig.official(128)
    leaves = leaves_of(problem(config, 2, 37, BF16), None)
    parameters = {name: value for name, value in leaves.items() if name not in ("image", "text", "logit_scale")}

    @torch.no_grad()
    def predict() -> list[Tensor]:
        return [rational_adapter(leaves["image"], leaves["text"], 20.0, parameters, config, backend="triton").logits]

    assert_replays(predict, leaves.values())


EPISODES: dict[str, tuple[AdapterConfig, OptimizerName, MaskPenalty | None, str, torch.dtype | None]] = {
    "official": (AdapterConfig.official(128), "adamw", "l2", "mean", None),
    "paper": (AdapterConfig.paper(64), "adam", "linf", "marginal", None),
    "text": (AdapterConfig.official(128, queries=("text",)), "sgd", "l1", "mean", None),
    "image": (AdapterConfig.official(128, queries=("image",), softmax="row"), "adamw", None, "marginal", None),
    "autocast": (AdapterConfig.official(128), "adamw", "l2", "mean", BF16),
    "autocast-float16": (AdapterConfig.paper(64, bias=True), "adamw", "l2", "mean", F16),
}


@pytest.mark.parametrize("zero_start", [True, False], ids=["zero", "pretrained"])
@pytest.mark.parametrize("episodes", [1, 8])
@pytest.mark.parametrize("name", EPISODES)
def test_an_episode_of_three_steps_replays(name: str, episodes: int, zero_start: bool) -> None:
    if reason := libraries.load_cuda():
        pytest.skip(f"no CUDA kernels: {reason}")
    config, optimizer_name, penalty, loss_name, low = EPISODES[name]
    views, count, classes = 16, 6, 37
    image, text, initial = problem(config, episodes * views, classes, F32, scale=0.1)
    image, text = image.cuda(), text.cuda()
    initial = {key: value.cuda() for key, value in initial.items()}
    if zero_start:
        initial |= {key: torch.zeros_like(value) for key, value in initial.items() if key.startswith("out_proj")}
    optimizer = EpisodicOptimizer(initial, episodes, optimizer_name, lr=1e-3, weight_decay=0.01, backend="cuda")

    def adapted(images: Tensor, asked: MaskPenalty | None, wanted: Iterable[str] = ()) -> tuple[Any, dict[str, Tensor]]:
        leaves = {
            key: value.contiguous().detach().requires_grad_(key in wanted)
            for key, value in optimizer.parameters.items()
        }
        with torch.autocast("cuda", low or BF16, enabled=low is not None, cache_enabled=False):
            output = rational_adapter(
                images, text, 20.0, leaves, config, penalty=asked, episodes=episodes, backend="triton"
            )
        return output, leaves

    def episode() -> list[Tensor]:
        optimizer.reset()
        by_episode = image.unflatten(0, (episodes, views))  # (E, V, D)
        with torch.no_grad():
            logits = zero_shot_logits(image, text, 20.0) if zero_start else adapted(image, None)[0].logits
            kept = select_views(logits.float().unflatten(0, (episodes, views)), count)  # (E, n)
            chosen = by_episode.gather(1, kept.unsqueeze(-1).expand(-1, -1, image.shape[1])).flatten(0, 1)
        for step in range(3):
            # While the output projection is zero, no other parameter has a gradient.
            wanted = [key for key in initial if key.startswith("out_proj") or step or not zero_start]
            output, leaves = adapted(chosen, penalty, wanted)
            losses = prediction_loss(output.logits.float().unflatten(0, (episodes, count)), loss_name)
            loss = losses.sum() if penalty is None else (losses + output.penalty.float()).sum()
            gradients = torch.autograd.grad(loss, [leaves[key] for key in wanted])
            optimizer.step(dict(zip(wanted, gradients, strict=True)))
        with torch.no_grad():
            predicted = adapted(by_episode[:, 0], None)[0].logits
        return [kept, predicted, *optimizer.parameters.values()]

    assert_replays(episode, [image, text])
