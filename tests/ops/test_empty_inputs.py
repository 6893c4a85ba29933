"""Empty inputs of every operator: one answer in all backends, forward and backward.

A result over nothing is empty, of the right shape and type, and its gradients are zeros or empty; the mean over no
images is 0. Where there is no answer (a softmax over no classes, a mean over no predictions, a view without pixels), a
ValueError names the argument. tests/kernels and tests/cuda ask the same of the kernels for CUDA devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine.episodes import adapt_episodes
from rada_fast.modules import RationalAdapter
from rada_fast.ops import (
    AugmixPlan,
    EpisodicOptimizer,
    augmix,
    backends,
    episodic_optimizer_step,
    multi_view_crops,
    prediction_loss,
    prediction_loss_and_gradient,
    random_augmix,
    random_views,
    rational_adapter,
    select_views,
    use_backend,
    whole_view,
    zero_shot_logits,
)
from tests.support import problem

CPU = pytest.param("cpu", marks=pytest.mark.skipif(backends()["cpu"] != "usable", reason=str(backends()["cpu"])))
BACKENDS = ["reference", CPU]
CONFIGS = {
    "official": AdapterConfig.official(32, num_heads=4),
    "row": AdapterConfig.official(32, num_heads=4, softmax="row", bias=False),
    "image": AdapterConfig.official(32, num_heads=4, queries=("image",)),
    "layers": AdapterConfig.official(32, num_heads=4, num_layers=2),
    "mlp": AdapterConfig.official(32, num_heads=4, mask_function="mlp"),
}
SERVED = {
    "reference": ("official", "row", "image", "layers", "mlp"),
    "literal": ("official", "row", "image", "layers", "mlp"),
    "cpu": ("official", "row", "image"),
    "triton": ("official", "row", "image", "layers"),
}
"""The configurations that a backend serves."""
LOSSES: list[dict[str, Any]] = [
    {"kind": "mean"},
    {"kind": "marginal"},
    {"kind": "cross_entropy"},
    {"kind": "cross_entropy", "label_smoothing": 0.1},
]
MEAN = STD = (0.5, 0.4, 0.3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def no_images(
    config: AdapterConfig,
    backend: str,
    dtype: torch.dtype,
    device: str,
    *,
    episodes: int | None,
    own: bool,
    penalty: Any,
) -> None:
    """Check what an adapter makes of a batch without images, and all its gradients."""
    image, text, parameters = problem(config, 2, 5, dtype)
    if own:
        assert episodes is not None
        parameters = {name: value.expand(episodes, *value.shape) for name, value in parameters.items()}
    named = {"image": image[:0], "text": text, "scale": torch.tensor(20.0, dtype=dtype), **parameters}
    leaves = {name: value.to(device).clone().requires_grad_() for name, value in named.items()}
    output = rational_adapter(
        leaves["image"], leaves["text"], leaves["scale"], {name: leaves[name] for name in parameters}, config,
        penalty=penalty, return_mask=True, episodes=episodes, backend=backend,
    )  # fmt: skip
    assert output.mask is not None
    assert (output.logits.shape, output.logits.dtype) == ((0, 5), dtype)
    assert (output.mask.shape, output.mask.dtype) == ((0, 5, config.embed_dim), dtype)
    loss = output.logits.sum() + output.mask.sum()
    if penalty is not None:
        assert output.penalty is not None
        wanted = torch.zeros(() if episodes is None else (episodes,), dtype=dtype, device=device)
        assert torch.equal(output.penalty, wanted)
        loss = loss + output.penalty.sum()
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def every_case_without_images(backend: str, device: str = "cpu") -> None:
    for name in SERVED[backend]:
        config = CONFIGS[name]
        for penalty in ("l2", "l1", "linf", None):
            no_images(config, backend, torch.float32, device, episodes=None, own=False, penalty=penalty)
        if backend == "triton" and name == "layers":
            continue
        for own in (False, True):
            no_images(config, backend, torch.float32, device, episodes=3, own=own, penalty="linf")
    no_images(CONFIGS["official"], backend, torch.bfloat16, device, episodes=None, own=False, penalty="l2")


@pytest.mark.parametrize("backend", ["reference", "literal", CPU])
def test_an_adapter_answers_no_images(backend: str) -> None:
    every_case_without_images(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_of_no_episodes_are_empty(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.empty((0, 3, 4), dtype=dtype, requires_grad=True)
    if options["kind"] == "cross_entropy":
        options = options | {"labels": torch.empty((0, 3), dtype=torch.int64)}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with use_backend(backend):
        losses = prediction_loss(logits, **options)
        losses.sum().backward()
        again, gradient = prediction_loss_and_gradient(logits, **options)
    assert logits.grad is not None
    for found, shape, kind in (
        (losses, (0,), exact), (again, (0,), exact), (gradient, (0, 3, 4), dtype), (logits.grad, (0, 3, 4), dtype)
    ):  # fmt: skip
        assert (found.shape, found.dtype) == (shape, kind)


@pytest.mark.parametrize(
    ("shape", "count", "selected"),
    [((0, 3, 4), 2, (0, 2)), ((0, 3, 4), 0, (0, 0)), ((2, 3, 4), 0, (2, 0)), ((3, 4), 0, (0,))],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_episodes_and_no_selected_views_are_empty(
    backend: str, shape: tuple[int, ...], count: int, selected: tuple[int, ...]
) -> None:
    with use_backend(backend):
        indices, entropies = select_views(torch.zeros(shape), count, return_entropies=True)
    assert (indices.shape, indices.dtype) == (selected, torch.int64)
    torch.testing.assert_close(entropies, torch.full(shape[:-1], 4.0).log())


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"name": "adam"}, {"name": "sgd", "momentum": 0.9}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_steps_over_what_has_no_elements(backend: str, options: dict[str, Any]) -> None:
    one = {"one": torch.ones(2)}
    none = {"flat": torch.empty(0), "wide": torch.empty(3, 0)}
    ends = []
    for initial in ({}, none, one, none | one):
        optimizer = EpisodicOptimizer(initial, 2, lr=0.1, **options, backend=backend)
        for name in (None, "step", "step", None):
            # A gradient of None, then steps, then moments without a gradient.
            optimizer.step({key: torch.ones(2, *value.shape) for key, value in initial.items() if name})
        assert {key: value.shape for key, value in optimizer.parameters.items()} == {
            key: (2, *value.shape) for key, value in initial.items()
        }
        ends.append(optimizer.parameters.get("one"))
    assert ends[2] is not None
    assert ends[3] is not None
    assert torch.equal(ends[2], ends[3])
    assert not torch.equal(ends[2], torch.ones(2, 2))
    episodic_optimizer_step([], [], [], [], [], [], name="adamw", step=1, lr=0.1, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pictures", [[], [torch.zeros((9, 12, 3), dtype=torch.uint8)]], ids=["no picture", "a picture"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_views_are_drawn_and_cut(backend: str, pictures: list[Tensor], dtype: torch.dtype) -> None:
    drawn = random_views(9, 12, 4, 0, generator(), backend=backend)
    assert (drawn.shape, drawn.dtype) == ((0, 11), torch.int64)
    plan = random_augmix(9, 12, 4, 0, generator(), chains=2, depth=3, backend=backend)
    assert [(part.shape, part.dtype) for part in plan] == [
        ((0, 11), torch.int64), ((0, 2, 3), torch.int64), ((0, 2, 3, 6), torch.float64), ((0, 4), torch.float32)
    ]  # fmt: skip
    for cut in (
        multi_view_crops(pictures, drawn, 4, MEAN, STD, dtype=dtype, backend=backend),
        augmix(pictures, plan, 4, MEAN, STD, dtype=dtype, backend=backend),
        augmix(pictures, plan.with_plain(drawn), 4, MEAN, STD, dtype=dtype, backend=backend),
    ):
        assert (cut.shape, cut.dtype) == ((0, 3, 4, 4), dtype)


@pytest.mark.parametrize(("chains", "depth"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_augmix_without_chains_or_steps_gives_the_plain_views(backend: str, chains: int, depth: int) -> None:
    pixels = torch.randint(256, (9, 12, 3), dtype=torch.uint8, generator=generator())
    plan = random_augmix(9, 12, 4, 2, generator())
    weights = torch.full((2, chains + 2), 0.25)
    less = AugmixPlan(plan.views, plan.operations[:, :chains, :depth], plan.matrices[:, :chains, :depth], weights)
    plain = multi_view_crops([pixels], plan.views, 4, MEAN, STD, backend=backend)
    mixed = augmix([pixels], less, 4, MEAN, STD, backend=backend)
    torch.testing.assert_close(mixed, (0.25 + 0.25 * 0.25 * chains) * plain)


def test_zero_shot_logits_of_nothing_are_empty() -> None:
    image, text = torch.ones(2, 8), torch.ones(3, 8)
    assert zero_shot_logits(image[:0], text, 20.0).shape == (0, 3)
    assert zero_shot_logits(image, text[:0], 20.0).shape == (2, 0)


def test_no_episodes_of_test_time_training_are_empty() -> None:
    config = CONFIGS["official"]
    _, text, _ = problem(config, 2, 5, torch.float32)
    assert adapt_episodes(RationalAdapter(config), torch.empty(0, 4, 32), text, 20.0).shape == (0, 5)


ADAPTER = (CONFIGS["official"], dict(RationalAdapter(CONFIGS["official"]).named_parameters()))


def adapted(images: int, classes: int, episodes: int | None = None) -> object:
    config, parameters = ADAPTER
    return rational_adapter(
        torch.ones(images, 32), torch.ones(classes, 32), 20.0, parameters, config, episodes=episodes
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapted(2, 0), r"text_features must hold at least one class \(K >= 1\), got K = 0"),
        (lambda: adapted(0, 0), r"text_features must hold at least one class \(K >= 1\), got K = 0"),
        (lambda: adapted(0, 3, 0), r"episodes must be a positive divisor of B = 0, got 0"),
        (
            lambda: adapt_episodes(
                RationalAdapter(ADAPTER[0]), torch.ones(1, 4, 32), torch.ones(0, 32), 20.0, EpisodeConfig(steps=0)
            ),
            r"text_features must hold at least one class \(K >= 1\), got K = 0",
        ),
        (
            lambda: adapt_episodes(RationalAdapter(ADAPTER[0]), torch.ones(1, 0, 32), torch.ones(3, 32), 20.0),
            r"view_features must be \(E, V, D\) with V >= 1, got \(1, 0, 32\)",
        ),
        (lambda: prediction_loss(torch.ones(2, 0, 4), "mean"), r"logits must be .* with n >= 1 .*got \(2, 0, 4\)"),
        (lambda: prediction_loss(torch.ones(2, 3, 0), "mean"), r"logits must be .* K >= 1, got \(2, 3, 0\)"),
        (lambda: prediction_loss_and_gradient(torch.ones(3, 0), "marginal"), r"logits must be .*got \(3, 0\)"),
        (lambda: select_views(torch.ones(2, 0, 4), 0), r"logits must be .* with V >= 1 .*got \(2, 0, 4\)"),
        (lambda: select_views(torch.ones(2, 3, 0), 0), r"logits must be .* K >= 1, got \(2, 3, 0\)"),
        (lambda: EpisodicOptimizer({}, 0, lr=0.1), "episodes must be at least 1, got 0"),
        (lambda: whole_view(0, 3, 4), "height, width and size must be at least 1, got 0, 3 and 4"),
        (lambda: whole_view(3, 0, 4, resize="squash"), "height, width and size must be at least 1, got 3, 0 and 4"),
        (lambda: whole_view(3, 3, 0), "height, width and size must be at least 1, got 3, 3 and 0"),
        (lambda: whole_view(3, 3, 4, resized=3), "resized must be at least the size 4, got 3"),
        (lambda: random_views(3, 3, 0, 1, generator()), "height, width and size must be at least 1, got 3, 3 and 0"),
        (lambda: random_augmix(3, 3, 4, 0, generator(), chains=0), "chains and depth must be at least 1"),
        (lambda: random_augmix(3, 3, 4, 0, generator(), depth=0), "chains and depth must be at least 1"),
        (
            lambda: multi_view_crops([], whole_view(3, 3, 2), 2, MEAN, STD),
            "pictures must hold those that the 1 views name, got none",
        ),
        (
            lambda: multi_view_crops([torch.empty((0, 3, 3), dtype=torch.uint8)], whole_view(3, 3, 2), 2, MEAN, STD),
            r"pictures\[0\] must be \(height, width, 3\) uint8 with pixels, got \(0, 3, 3\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_answer_is_refused_by_name(backend: str, call: Callable[[], object], message: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=message):
        call()
