"""Whole episodes by the launchers of the GPU kernels agree with the reference loop, in the simulator.

Triton kernels compute the adapter, and CUDA C++ kernels the selection, the loss and the optimiser, each for all
episodes at once. Every step is compared with the reference at the parameters with which the step starts, because
AdamW's first steps are nearly signs of gradients, and a rounding may decide a sign. The predictions are compared with
those of adapt_episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast import adapt_episodes
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import EpisodicOptimizer, episodic_optimizer, rational_adapter, use_backend
from rada_fast.ops.episodic_optimizer import episodic_optimizer_step
from rada_fast.ops.prediction_losses import prediction_loss_and_gradient
from tests.cuda import test_prediction_losses as losses_in_cuda
from tests.cuda import test_view_selection as selection_in_cuda
from tests.cuda.conftest import Launchers
from tests.cuda.test_episodic_optimizer import TYPES as GRADIENT_TYPES
from tests.cuda.test_episodic_optimizer import Descriptor, Step, launch
from tests.kernels.conftest import Simulated
from tests.support import assert_within_budget

VIEWS, CLASSES, WIDTH, SCALE = 8, 17, 64, 30.0
STEPS = 3
Parameters = dict[str, Tensor]


def drawn(episodes: int, heads: int, start: str) -> tuple[RationalAdapter, Tensor, Tensor]:
    """Return an adapter, the views (E, V, D) and the text features (K, D)."""
    generator = torch.Generator().manual_seed(episodes)
    views, text = (torch.randn(*shape, WIDTH, generator=generator) for shape in ((episodes, VIEWS), (CLASSES,)))
    adapter = RationalAdapter(AdapterConfig.official(WIDTH, num_heads=heads))
    if start == "trained":
        for name in ("out_proj.weight", "out_proj.bias"):
            torch.nn.init.normal_(adapter.get_parameter(name), std=0.05)
    return adapter, normalize(views, dim=-1), normalize(text, dim=-1)


@dataclass
class Entry:
    """One tensor of an optimiser's step, as the operator passes it to the launcher."""

    parameter: Tensor
    first: Tensor
    second: Tensor
    gradient: Tensor | None
    source: Tensor | None
    fresh: bool
    copy: Tensor | None

    def descriptor(self, place: Callable[..., int]) -> Descriptor:
        p, row = place(self.parameter), self.parameter.numel() if self.source is None else self.source.numel()
        return Descriptor(
            p,
            p if self.source is None else place(self.source),
            place(self.first, self.fresh) if self.first.numel() else None,
            place(self.second, self.fresh) if self.second.numel() else None,
            None if self.gradient is None else place(self.gradient),
            None if self.copy is None else place(self.copy),
            row,
            self.parameter.numel() // row,
            0 if self.gradient is None else GRADIENT_TYPES[self.gradient.dtype],
            self.fresh,
        )


def step_by_the_launcher(library: Any, launches: list[Any]) -> Callable[..., None]:
    """Return episodic_optimizer_step with the CUDA launcher in the place of the operator.

    library: the launcher's library; launches: a list for what each launch executed.
    """
    names = ("parameters", "first_moments", "second_moments", "gradients", "sources", "fresh", "copies")

    def step(**given: Any) -> None:
        if given["backend"] == "reference":
            return episodic_optimizer_step(**given)
        entries: list[Any] = [Entry(*values) for values in zip(*(given[name] for name in names), strict=True)]
        assert (given["betas"], given["eps"]) == ((0.9, 0.999), 1e-8)
        options = Step(
            given["name"],
            given["step"],
            given["lr"],
            given["weight_decay"],
            momentum=given["momentum"],
            last=given["last"],
        )
        launches.extend(launch(library, entries, options.product_scalars()))

    return step


def reference_step(
    parameters: Parameters, images: Tensor, text: Tensor, dlogits: Tensor, config: AdapterConfig, episode: EpisodeConfig
) -> dict[str, Tensor]:
    """Return, in float64, what plain PyTorch computes forward and backward from the kept views (E, n, D)."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    output = rational_adapter(
        images.flatten(0, 1), text, SCALE, leaves, config, penalty=episode.penalty, episodes=len(images),
        backend="reference",
    )  # fmt: skip
    assert output.penalty is not None
    logits = output.logits.unflatten(0, dlogits.shape[:2])
    weights = torch.full_like(output.penalty, episode.penalty_weight)
    torch.autograd.backward([logits, output.penalty], [dlogits, weights])
    found = {"logits": logits, "penalty": output.penalty}
    found |= {f"d{name}": value.grad for name, value in leaves.items() if value.grad is not None}
    return {name: value.detach().double() for name, value in found.items()}


def assert_each_within_budget(exact: Parameters, plain: Parameters, fast: Parameters) -> None:
    """Compare every episode by itself, so that none is hidden by the others. All tensors have an axis E first."""
    for index in range(len(exact["logits"])):
        own = ({name: value[index].double() for name, value in values.items()} for values in (exact, plain, fast))
        assert_within_budget(*own, torch.float32)


@pytest.mark.parametrize(
    ("episodes", "heads", "start", "loss", "selection"),
    [(1, 8, "trained", "marginal", 0.4), (8, 2, "zero", "mean", 0.25)],
    ids=["one", "eight"],
)
def test_episodes_are_those_of_the_reference_loop(
    episodes: int,
    heads: int,
    start: str,
    loss: Any,
    selection: float,
    simulated: Simulated,
    launchers: Launchers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter, views, text = drawn(episodes, heads, start)
    config, episode = adapter.config, EpisodeConfig(steps=STEPS, loss=loss, selection=selection, lr=2e-3)
    count, zero = episode.num_selected(VIEWS), adapter.is_zero_shot()
    initial = {name: value.detach() for name, value in adapter.named_parameters()}
    options: dict[str, Any] = {"lr": episode.lr, "weight_decay": episode.weight_decay}
    optimizer = EpisodicOptimizer(initial, episodes, episode.optimizer, **options)
    # It takes the same gradients in plain PyTorch.
    twin = EpisodicOptimizer(initial, episodes, episode.optimizer, backend="reference", **options)
    launches: list[Any] = []
    step_of_both = step_by_the_launcher(launchers("episodic_optimizer.cu"), launches)
    monkeypatch.setattr(episodic_optimizer, "episodic_optimizer_step", step_of_both)

    def adapt(images: Tensor, parameters: Parameters, penalty: Any = None, *, output_is_zero: bool = False) -> Any:
        with simulated() as log:
            output = rational_adapter(
                images.flatten(0, 1), text, SCALE, parameters, config, penalty=penalty, episodes=episodes,
                output_is_zero=output_is_zero, backend="triton",
            )  # fmt: skip
        assert len(log) == 3
        return output

    def current() -> Parameters:
        return {name: value.detach().contiguous() for name, value in optimizer.parameters.items()}

    with torch.no_grad():
        # An adapter whose masks are all 1 predicts as CLIP does.
        logits = SCALE * views @ text.T if zero else adapt(views, current()).logits.unflatten(0, (episodes, VIEWS))
    indices, _, _ = selection_in_cuda.run(launchers, logits.contiguous(), count)
    kept = torch.stack([own[chosen] for own, chosen in zip(views, indices, strict=True)])  # (E, n, D)

    for step in range(STEPS):
        parameters = current()
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        first = zero and step == 0
        output = adapt(kept, leaves, episode.penalty, output_is_zero=first)
        logits = output.logits.unflatten(0, (episodes, count))
        losses, dlogits, _ = losses_in_cuda.run(launchers, logits.detach(), episode.loss)
        assert dlogits is not None
        with simulated() as log:
            torch.autograd.backward(
                [logits, output.penalty], [dlogits, torch.full_like(output.penalty, episode.penalty_weight)]
            )
        assert len(log) <= (1 if first else 4)
        gradients = {name: value.grad for name, value in leaves.items() if value.grad is not None}
        with use_backend("reference"):
            exact_loss, exact_dlogits = prediction_loss_and_gradient(logits.detach().double(), episode.loss)
        torch.testing.assert_close(losses.double(), exact_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(dlogits.double(), exact_dlogits, rtol=1e-5, atol=1e-7)
        fast = {"logits": logits.detach(), "penalty": output.penalty.detach()}
        fast |= {f"d{name}": value for name, value in gradients.items()}
        plain = reference_step(parameters, kept, text, dlogits, config, episode)
        doubled = {name: value.double() for name, value in parameters.items()}
        exact = reference_step(doubled, kept.double(), text.double(), dlogits.double(), config, episode)
        assert fast.keys() == exact.keys()
        for name in exact.keys() if first else ():
            # Through an output projection of zeros no gradient reaches the other parameters.
            assert not fast[name].any() or exact[name].any(), name
        assert_each_within_budget(exact, plain, fast)

        optimizer.step(gradients)
        twin.step(gradients)
        for name, value in optimizer.parameters.items():
            # Two roundings of the value, and three of an update, which is at most twice the learning rate.
            torch.testing.assert_close(value, twin.parameters[name], rtol=2**-22, atol=3 * 2 * episode.lr * 2**-23)
    assert len(launches) == STEPS, "one launch steps everything"

    with torch.no_grad():
        predicted = adapt(views[:, :1], current()).logits
    with use_backend("reference"):
        plain = {"logits": adapt_episodes(adapter, views, text, SCALE, episode)}
        exact = {"logits": adapt_episodes(adapter.double(), views.double(), text.double(), SCALE, episode)}
    before = SCALE * views[:, 0].double() @ text.double().T
    assert (exact["logits"] - before).norm() > 1e-2 * before.norm(), "the episodes have changed the predictions"
    assert_each_within_budget(exact, plain, {"logits": predicted})
