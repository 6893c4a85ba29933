"""Losses and their one-pass gradients agree with float64 and with PyTorch, also for large and tied logits.

A result passes where its error is at most twice that of plain PyTorch in the same type, plus two roundings of the
result and float64's own rounding: the reference in float64 cancels where the compiled operator does not.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rada_fast.errors import BackendUnavailableError
from rada_fast.ops import prediction_loss, prediction_loss_and_gradient, use_backend
from rada_fast.ops._backends import library
from tests.support import around

from .support import needs_extension, num_threads

BACKENDS = ["reference", "cpu"] if library.load() is None else ["reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["mean", "marginal", "cross_entropy", "smoothed"]


def draw(episodes: int, rows: int, classes: int, scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + classes)
    return (scale * torch.randn(episodes, rows, classes, generator=generator, dtype=torch.float64)).to(dtype)


def options(kind: str, logits: Tensor) -> dict[str, Any]:
    if kind in ("mean", "marginal"):
        return {"kind": kind}
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)
    return {"kind": "cross_entropy", "labels": labels, "label_smoothing": 0.1 if kind == "smoothed" else 0.0}


def solve(logits: Tensor, kind: str, backend: str) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of a weighted sum of them, in float64."""
    leaf = logits.clone().requires_grad_()
    with use_backend(backend):
        losses = prediction_loss(leaf, **options(kind, logits))
    weights = torch.arange(1, losses.numel() + 1, dtype=losses.dtype, device=losses.device)
    (weights * losses).sum().backward()
    assert leaf.grad is not None
    return losses.detach().double(), leaf.grad.double()


def assert_within_budget(found: tuple[Tensor, ...], plain: tuple[Tensor, ...], exact: tuple[Tensor, ...],
                         eps: tuple[float, ...]) -> None:  # fmt: skip
    for value, low, wanted, rounding in zip(found, plain, exact, eps, strict=True):
        band = 2 * rounding * wanted.norm() + 1e-13 * max(1.0, float(wanted.norm()))
        assert (value - wanted).norm() <= 2 * (low - wanted).norm() + band


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 5.0, 1000.0])
# Classes: less than a vector, a tail, the sizes in use. Rows: one, a few, more than one task takes.
@pytest.mark.parametrize(
    ("episodes", "rows", "classes"), [(2, 1, 1), (3, 6, 7), (2, 6, 101), (8, 6, 200), (1, 40, 1000)]
)
def test_losses_and_gradients(
    kind: str, dtype: torch.dtype, scale: float, episodes: int, rows: int, classes: int
) -> None:
    logits = draw(episodes, rows, classes, scale, dtype)
    exact = solve(logits.double(), kind, "reference")
    loss_type = torch.float64 if dtype == torch.float64 else torch.float32
    assert_within_budget(
        solve(logits, kind, "cpu"),
        solve(logits, kind, "reference"),
        exact,
        (torch.finfo(loss_type).eps, torch.finfo(dtype).eps),
    )


def drawn(seed: int, rows: tuple[int, ...], classes: tuple[int, ...]) -> tuple[Tensor, str]:
    """Draw logits of drawn sizes, the latter around the given numbers, and a kind of loss."""
    r = random.Random(seed)
    sizes = r.randint(1, 3), around(r, *rows), around(r, *classes)
    return draw(*sizes, r.choice([0.1, 3.0, 30.0]), r.choice(DTYPES)), r.choice(KINDS)


@needs_extension
@pytest.mark.parametrize("seed", range(32))
def test_drawn_losses(seed: int) -> None:
    logits, kind = drawn(seed, (16, 64), (16, 101, 1024))
    loss_type = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert_within_budget(
        solve(logits, kind, "cpu"),
        solve(logits, kind, "reference"),
        solve(logits.double(), kind, "reference"),
        (torch.finfo(loss_type).eps, torch.finfo(logits.dtype).eps),
    )


@needs_extension
@pytest.mark.parametrize("kind", ["mean", "marginal", "cross_entropy"])
def test_the_cpus_operator_takes_one_episode_without_its_axis(kind: str) -> None:
    logits, labels = draw(1, 5, 7, 3.0, torch.float32), torch.arange(5) if kind == "cross_entropy" else None
    of_all = labels if labels is None else labels[None]
    expected = torch.ops.rada_fast.prediction_loss(logits, kind, of_all, 0.1, True)
    leaf = logits[0].requires_grad_()
    losses, gradient = torch.ops.rada_fast.prediction_loss(leaf, kind, labels, 0.1, True)
    assert torch.equal(losses, expected[0])
    assert torch.equal(gradient[None], expected[1])
    (2 * losses).sum().backward()
    assert torch.equal(leaf.grad, 2 * gradient)
    with torch.device("meta"):
        shapes = torch.ops.rada_fast.prediction_loss(leaf.to("meta"), kind, None, 0.1, True)
    assert [one.shape for one in shapes] == [losses.shape, gradient.shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_pytorchs(backend: str, smoothing: float) -> None:
    logits = draw(1, 9, 37, 3.0, torch.float64)[0].requires_grad_()
    labels = torch.arange(9) * 4
    expected = cross_entropy(logits, labels, label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(expected, logits)
    with use_backend(backend):
        loss = prediction_loss(logits, "cross_entropy", labels=labels, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)


def halfway(dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Label smoothings that give two equal logits a gradient halfway between two numbers of a type; these gradients.

    A gradient is (1 - smoothing) / 2, rounded to the neighbour whose last bit is 0.
    """
    place = torch.finfo(dtype).eps
    exact = [1 / 2 + odd * place / 4 for odd in (1, 3, 5)]
    return [1 - value for value in exact], [float(torch.tensor(value / 2).to(dtype)) for value in exact]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_even(backend: str, dtype: torch.dtype) -> None:
    logits, labels = torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64)
    with use_backend(backend):
        for smoothing, wanted in zip(*halfway(dtype), strict=True):
            _, gradient = prediction_loss_and_gradient(
                logits, "cross_entropy", labels=labels, label_smoothing=smoothing
            )
            assert gradient.flatten().tolist() == [-wanted, wanted]


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_losses(kind: str) -> None:
    logits = draw(2, 3, 5, 1.0, torch.float64).requires_grad_()
    with use_backend("cpu"):
        assert torch.autograd.gradcheck(lambda x: prediction_loss(x, **options(kind, x)), (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_tied_and_infinite_logits_give_finite_losses(backend: str, kind: str) -> None:
    rows = [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
    logits = torch.tensor([rows, [[0.0, 0.0, 1e4]] * 4], requires_grad=True)
    with use_backend(backend):
        losses = prediction_loss(logits, **options(kind, logits))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())
    if kind == "mean":
        assert float(losses.detach()[0]) == pytest.approx((math.log(2) + 2 * math.log(3)) / 4, rel=1e-6)
        assert bool((gradient.abs() < 1e-7).all())


@needs_extension
@pytest.mark.parametrize("kind", ["mean", "marginal", "cross_entropy"])
def test_a_logit_of_minus_infinity_removes_its_class(kind: str) -> None:
    short = draw(2, 4, 6, 1.0, torch.float64)
    logits = torch.cat([short, torch.full((2, 4, 1), -math.inf, dtype=torch.float64)], dim=-1)
    given = {"labels": torch.zeros(2, 4, dtype=torch.int64)} if kind == "cross_entropy" else {}
    for x, y in zip(
        prediction_loss_and_gradient(short, kind, **given),  # type: ignore[arg-type]
        prediction_loss_and_gradient(logits, kind, **given),  # type: ignore[arg-type]
        strict=True,
    ):
        torch.testing.assert_close(y[..., :6] if y.ndim == 3 else y, x, rtol=1e-14, atol=1e-16)
        assert y.ndim == 1 or bool((y[..., 6] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mean", "marginal"])
def test_a_row_with_nan_changes_only_its_episode(backend: str, kind: Any) -> None:
    logits = draw(3, 4, 37, 1.0, torch.float32)
    with use_backend(backend):
        clean = prediction_loss_and_gradient(logits, kind)
        for bad in (math.nan, math.inf):
            logits[1, 2, 3] = bad
            losses, gradient = prediction_loss_and_gradient(logits, kind)
            assert bool(losses[1].isnan())
            assert bool(gradient[1, 2].isnan().any())
            assert torch.equal(losses[[0, 2]], clean[0][[0, 2]])
            assert torch.equal(gradient[[0, 2]], clean[1][[0, 2]])


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_do_not_depend_on_threads_or_neighbours(kind: str, dtype: torch.dtype) -> None:
    # With 101 classes, the rows start at different places of a vector.
    logits = draw(9, 6, 101, 3.0, dtype)
    given = options(kind, logits)
    with num_threads(1):
        losses, gradient = prediction_loss_and_gradient(logits, **given)
    with num_threads(3):
        again = prediction_loss_and_gradient(logits, **given)
    assert torch.equal(again[0], losses)
    assert torch.equal(again[1], gradient)
    for episode in (0, 4, 8):
        own = {name: value[episode] if name == "labels" else value for name, value in given.items()}
        alone = prediction_loss_and_gradient(logits[episode].clone(), **own)
        assert torch.equal(alone[0], losses[episode])
        assert torch.equal(alone[1], gradient[episode])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_strides_and_types_are_served(backend: str) -> None:
    logits = draw(2, 3, 5, 1.0, torch.bfloat16)
    with use_backend(backend):
        losses, gradient = prediction_loss_and_gradient(logits, "mean")
        assert losses.dtype == torch.float32
        assert gradient.dtype == torch.bfloat16
        alone = prediction_loss(logits[0], "mean")
        assert alone.shape == ()
        assert torch.equal(alone, losses[0])
        strided = logits.transpose(0, 2).contiguous().transpose(0, 2)
        assert torch.equal(prediction_loss(strided, "mean"), losses)
        assert not prediction_loss(logits, "mean").requires_grad


@needs_extension
def test_the_gradient_is_made_only_where_one_follows() -> None:
    logits = draw(2, 3, 5, 1.0, torch.float32).requires_grad_()
    allocated = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "prediction_loss" in str(func):
                allocated.append(result[1].numel())
            return result

    with Watch():
        prediction_loss(logits, "mean")
        with torch.no_grad():
            prediction_loss(logits, "mean")
        prediction_loss(logits.detach(), "mean")
    assert allocated == [30, 0, 0]


@needs_extension
def test_a_second_derivative_is_refused() -> None:
    logits = draw(1, 3, 5, 1.0, torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(prediction_loss(logits, "mean").sum(), logits, create_graph=True)


def test_errors_name_the_argument() -> None:
    logits, labels = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "kind must be one of 'mean', 'marginal', 'cross_entropy', got 'l2'", "l2", {}),
        (ValueError, "labels must be given for kind 'cross_entropy'", "cross_entropy", {}),
        (ValueError, "labels belong to kind 'cross_entropy', kind is 'mean'", "mean", {"labels": labels}),
        (ValueError, "label_smoothing belongs to kind 'cross_entropy'", "mean", {"label_smoothing": 0.1}),
        (ValueError, "label_smoothing must be from 0 to 1, got 2", "cross_entropy",
         {"labels": labels, "label_smoothing": 2}),
        (ValueError, r"labels must be \(2, 4\) as the logits are, got \(2, 3\)", "cross_entropy",
         {"labels": labels[:, :3]}),
        (TypeError, r"labels must be int64, got torch.float32", "cross_entropy", {"labels": labels.float()}),
    ]  # fmt: skip
    for error, message, kind, given in cases:
        with pytest.raises(error, match=message):
            prediction_loss(logits, kind, **given)
    with pytest.raises(ValueError, match=r"logits must be \(E, n, K\) or \(n, K\) .* got \(2, 0, 3\)"):
        prediction_loss(logits[:, :0], "mean")
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(IndexError):
            prediction_loss(logits, "cross_entropy", labels=labels + 3)


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw(2, 3, 5, 1.0, torch.float32)
    with use_backend("reference"):
        expected = prediction_loss(logits, "marginal")
    monkeypatch.setattr(library, "load", lambda: "not built")
    assert torch.equal(prediction_loss(logits, "marginal"), expected)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="not built"):
        prediction_loss(logits, "marginal")


# opcheck itself reads gradients of tensors that are no leaves, of which PyTorch warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_keeps_pytorchs_rules(kind: str) -> None:
    for dtype in DTYPES:
        logits = draw(2, 3, 5, 1.0, dtype).requires_grad_()
        given = options(kind, logits)
        arguments = (given["kind"], given.get("labels"), given.get("label_smoothing", 0.0))
        torch.library.opcheck(torch.ops.rada_fast.prediction_loss.default, (logits, *arguments, True))
        torch.library.opcheck(torch.ops.rada_fast.prediction_loss.default, (logits.detach(), *arguments, False))


@needs_extension
def test_torch_compile_makes_one_graph() -> None:
    logits = draw(2, 3, 5, 1.0, torch.float32).requires_grad_()
    compiled = torch.compile(lambda x: prediction_loss(x, "mean").sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(logits), logits)
    (wanted,) = torch.autograd.grad(prediction_loss(logits, "mean").sum(), logits)
    assert torch.equal(found, wanted)


def test_the_gradient_under_vmap_is_each_problems_own() -> None:
    logits = torch.randn(3, 4, 5)
    losses, gradients = torch.func.vmap(lambda one: prediction_loss_and_gradient(one, "marginal"))(logits)
    for at, one in enumerate(logits):
        loss, gradient = prediction_loss_and_gradient(one, "marginal")
        torch.testing.assert_close(losses[at], loss)
        torch.testing.assert_close(gradients[at], gradient)
