"""The adapter works with torch.func's transforms, forward-mode derivatives and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import normalize

import rada_fast
from rada_fast import BackendUnavailableError
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import prediction_loss, prediction_loss_and_gradient, select_views

from .support import needs_extension

# PyTorch's own forward-mode formulas use torch.jit.script, which it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def adapter_of() -> RationalAdapter:
    torch.manual_seed(0)
    adapter = RationalAdapter(AdapterConfig.official(16))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
    return adapter.double()


def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    return normalize(image, dim=-1), normalize(torch.randn(5, 16, generator=generator, dtype=torch.float64), dim=-1)


def forward_mode(f: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(at, along))).tangent
    assert tangent is not None
    return tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, at, along: jvp(f, (at,), (along,))[1],
    "forward-mode": forward_mode,
    "jacfwd": lambda f, at, along: (jacfwd(f)(at) * along).sum(),
    "jacrev": lambda f, at, along: (jacrev(f)(at) * along).sum(),
    "grad": lambda f, at, along: (grad(f)(at) * along).sum(),
    "vjp": lambda f, at, along: (vjp(f, at)[1](torch.ones((), dtype=at.dtype))[0] * along).sum(),
    "vmap": lambda f, at, along: (vmap(grad(f))(torch.stack([at, at]))[1] * along).sum(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("argument", ["image", "text", "scale", "weight"])
def test_every_transform_gives_the_backward_passs_derivative(transform: str, argument: str) -> None:
    adapter = adapter_of()
    image, text = features()
    starts = {"image": image, "text": text, "scale": torch.tensor(30.0).double(), "weight": adapter.k_proj.weight}
    at = starts[argument].detach().clone()  # type: ignore[operator,union-attr]

    def f(value: Tensor) -> Tensor:
        given = (
            value if argument == "image" else image, value if argument == "text" else text,
            value if argument == "scale" else 30.0,
        )  # fmt: skip
        logits, penalty = functional_call(
            adapter, {"k_proj.weight": value} if argument == "weight" else {}, given, {"penalty": "l2"}
        )
        result: Tensor = prediction_loss(logits, "marginal") + 10 * penalty
        return result

    along = torch.randn(at.shape, dtype=torch.float64)
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf)
    expected = (gradient * along).sum()
    assert float(expected) != 0
    torch.testing.assert_close(TRANSFORMS[transform](f, at, along), expected, rtol=1e-8, atol=1e-10)


@needs_extension
def test_a_backend_asked_for_by_name_refuses_transforms() -> None:
    adapter = adapter_of()
    image, text = features()
    message = "backend 'cpu' cannot serve this call: .* 'reference' does"
    calls: list[Callable[[Tensor], Any]] = [
        lambda x: adapter(x, text, 30.0).sum(),
        lambda x: prediction_loss(x, "mean"),
        lambda x: select_views(x, 1).sum().double(),
    ]
    with rada_fast.use_backend("cpu"):
        for f in calls:
            with pytest.raises(BackendUnavailableError, match=message):
                jvp(f, (image,), (image,))
        # Outside of transforms it works as usual.
        assert torch.autograd.grad(calls[0](leaf := image.clone().requires_grad_()), leaf)[0].any()


@needs_extension
def test_second_derivatives_are_the_references_and_refused_elsewhere() -> None:
    adapter = adapter_of()
    image, text = features()

    def second() -> Tensor:
        weight = adapter.get_parameter("k_proj.weight")
        (first,) = torch.autograd.grad(adapter(image, text, 30.0).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    with pytest.raises(
        RuntimeError,
        match=r"rational_adapter has no second derivative .* compute it inside rada_fast.use_backend\('reference'\)",
    ):
        second()
    with rada_fast.use_backend("reference"):
        assert bool(second().any())
    assert bool(hessian(lambda x: adapter(x, text, 30.0).square().sum())(image).any())


def test_vmap_over_images_is_a_batch() -> None:
    adapter = adapter_of()
    image, text = features()
    one_by_one = vmap(lambda one: adapter(one[None], text, 30.0, penalty="linf")[0][0])(image)
    torch.testing.assert_close(one_by_one, adapter(image, text, 30.0), rtol=1e-9, atol=1e-9)
    logits = torch.randn(3, 4, 5)
    assert torch.equal(vmap(lambda one: select_views(one, 2))(logits), select_views(logits, 2))


def test_compiled_functions_take_the_backend_that_serves_them() -> None:
    adapter = adapter_of()
    image, text = features()
    torch._dynamo.reset()
    function = torch.compile(lambda x: jvp(lambda y: adapter(y, text, 30.0), (x,), (x,))[1], backend="eager")
    torch.testing.assert_close(
        function(image), jvp(lambda y: adapter(y, text, 30.0), (image,), (image,))[1], rtol=1e-9, atol=1e-9
    )
    plain = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    logits = plain(image, text, 30.0)
    torch.testing.assert_close(logits, adapter(image, text, 30.0), rtol=1e-9, atol=1e-9)
    logits.sum().backward()
    assert adapter.k_proj.weight.grad is not None
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_losses_and_their_gradient_in_inference_mode(backend: str) -> None:
    logits = torch.randn(3, 4, 5)
    with rada_fast.use_backend(backend):
        expected = prediction_loss_and_gradient(logits, "mean")
        with torch.inference_mode():
            actual = prediction_loss_and_gradient(logits.clone(), "mean")
            assert torch.equal(prediction_loss(logits.clone(), "mean"), actual[0])
    for left, right in zip(expected, actual, strict=True):
        assert torch.equal(left, right)
