"""On a CUDA device the Triton backend serves episodes, single gradients, streams, patched models and CUDA graphs.

Other files test the same backend in a simulator, which takes CPU tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast.compat import patch, unpatch
from rada_fast.config.method import MASK_PENALTIES, AdapterConfig
from rada_fast.extension import libraries
from rada_fast.modules import RationalAdapter
from rada_fast.ops import EpisodicOptimizer, prediction_loss, rational_adapter, use_backend
from tests.compat.published import PublishedModel
from tests.support import VECTORS, assert_replays_from_a_graph, problem, published_vectors, solve

BF16, F32 = torch.bfloat16, torch.float32
CONFIG = AdapterConfig.official(128)

pytestmark = pytest.mark.gpu


def to_device(inputs: tuple[Tensor, Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    image, text, parameters = inputs
    return image.cuda(), text.cuda(), {key: value.cuda() for key, value in parameters.items()}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("penalty", MASK_PENALTIES)
def test_episodes_are_adapters_of_their_own(penalty: Any, shared: bool) -> None:
    episodes, batch, classes = 3, 2, 37
    drawn = [problem(CONFIG, batch, classes, F32, scale=0.2 + 0.1 * episode) for episode in range(episodes)]
    if shared:
        drawn = [(image, text, drawn[0][2]) for image, text, _ in drawn]
    image, text = torch.cat([one[0] for one in drawn]), drawn[0][1]
    weights = torch.randn(len(image), classes, generator=torch.Generator().manual_seed(0))
    stacked = drawn[0][2] if shared else {key: torch.stack([one[2][key] for one in drawn]) for key in drawn[0][2]}
    leaves = {key: value.detach().cuda().requires_grad_() for key, value in stacked.items()}
    features = [value.detach().cuda().requires_grad_() for value in (image, text)]
    output = rational_adapter(*features, 20.0, leaves, CONFIG, penalty=penalty, episodes=episodes, backend="triton")
    assert output.penalty is not None
    ((output.logits * weights.cuda()).sum() + output.penalty.sum()).backward()

    found, wanted = {"image": features[0].grad, "text": features[1].grad}, {"text": torch.zeros_like(text).double()}
    dimages, per_episode = [], []
    for episode, (own_image, _, parameters) in enumerate(drawn):
        exact = {key: value.detach().double().requires_grad_() for key, value in parameters.items()}
        own_image, own_text = own_image.double().requires_grad_(), text.detach().double().requires_grad_()
        alone = rational_adapter(own_image, own_text, 20.0, exact, CONFIG, penalty=penalty, backend="reference")
        rows = slice(batch * episode, batch * (episode + 1))
        assert alone.penalty is not None
        ((alone.logits * weights[rows].double()).sum() + alone.penalty).backward()
        torch.testing.assert_close(output.logits[rows].cpu().double(), alone.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.penalty[episode].cpu().double(), alone.penalty, rtol=1e-4, atol=1e-6)
        dimages.append(own_image.grad)
        wanted["text"] += own_text.grad
        per_episode.append({key: value.grad for key, value in exact.items()})
    wanted["image"] = torch.cat(dimages)
    for key in drawn[0][2]:
        values = torch.stack([one[key] for one in per_episode])
        wanted[key], found[key] = values.sum(0) if shared else values, leaves[key].grad
    for key, value in wanted.items():
        size = value.norm()
        if key.startswith(("q_proj", "k_proj")):
            # These gradients are differences that nearly cancel, of terms as large as the gradient of the values.
            size = size + wanted["v_proj." + key.rpartition(".")[2]].norm()
        assert (found[key].cpu().double() - value).norm() <= 1e-4 * size, key


@pytest.mark.parametrize(("products", "bits"), [("ieee", 23), ("tf32x3", 21), ("tf32", 10)])
def test_float32_is_as_exact_as_its_products(products: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADA_FAST_FLOAT32", products)
    inputs = problem(CONFIG, 3, 101, F32)
    exact = solve(CONFIG, inputs, torch.float64, "reference")
    fast = solve(CONFIG, to_device(inputs), F32, "triton")
    for name in ("logits", "mask", "dv_proj.weight", "dout_proj.weight", "dtext"):
        # Four products follow one another, and a gradient is a sum over all rows.
        bound = 16 * 2.0**-bits
        assert (fast[name].cpu() - exact[name]).norm() <= bound * exact[name].norm(), name


@pytest.mark.parametrize(
    "wanted", [{"text"}, {"image"}, {"k_proj.weight", "q_proj2.bias"}, {"out_proj.weight", "out_proj.bias"}, set()]
)
def test_only_inputs_that_require_gradients_get_them(wanted: set[str]) -> None:
    inputs = problem(CONFIG, 2, 20, F32)
    everything = solve(CONFIG, inputs, torch.float64, "reference")
    some = solve(CONFIG, to_device(inputs), F32, "triton", wanted=wanted)
    assert {key for key in some if key.startswith("d")} == {f"d{key}" for key in wanted}
    for key, value in some.items():
        assert (value.cpu() - everything[key]).norm() <= 1e-4 * everything[key].norm() + 1e-6, key


@pytest.mark.parametrize("name", VECTORS)
def test_outputs_and_gradients_are_the_published_ones(name: str) -> None:
    arrays, parameters, config = published_vectors(name, F32)
    parameters = {key: value.detach().cuda().requires_grad_() for key, value in parameters.items()}
    image, text = (normalize(arrays[key].float(), dim=-1).cuda() for key in ("image", "text"))
    output = rational_adapter(
        image, text, float(arrays["logit_scale"]), parameters, config, penalty="linf", return_mask=True,
        backend="triton",
    )  # fmt: skip
    assert output.penalty is not None
    assert output.mask is not None
    (cross_entropy(output.logits, arrays["label"].cuda()) + 0.5 * output.penalty).backward()
    # Sums of D and K terms are added up in another order here.
    assert (output.logits.cpu() - arrays["logits"]).abs().max() <= 2e-6 * max(float(arrays["logits"].abs().max()), 10)
    assert (output.mask.cpu() - arrays["mask"]).abs().max() <= 2e-5 * max(1.0, float(arrays["mask"].abs().max()))
    for key, parameter in parameters.items():
        wanted = arrays[f"grad.{key}"].double()
        assert parameter.grad is not None
        assert (parameter.grad.cpu() - wanted).norm() <= 1e-5 * wanted.norm(), key


def test_another_stream_gives_the_same_logits() -> None:
    image, text, parameters = to_device(problem(CONFIG, 6, 101, BF16))
    with torch.no_grad():
        plain = rational_adapter(image, text, 20.0, parameters, CONFIG, backend="triton").logits
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            again = rational_adapter(image, text, 20.0, parameters, CONFIG, backend="triton").logits
        side.synchronize()
    assert torch.equal(plain, again)


def test_a_patched_model_gives_the_logits_that_it_gave_before() -> None:
    torch.manual_seed(0)
    model = PublishedModel(64, 8, 1.0, torch.randn(20, 64), 3.0).cuda()
    model.class_features = model.class_features.cuda()
    image = torch.randn(3, 64, device="cuda")
    torch.nn.init.normal_(model.mha.out_proj.weight, std=0.05)
    with torch.no_grad():
        wanted = model(image)
        patch(model)
        found = model(image)
        unpatch(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_step_of_test_time_training_replays_from_a_graph() -> None:
    """The steps hold the adapter, its penalty, the loss, their gradients and the optimiser of all episodes."""
    if reason := libraries.load_cuda():
        pytest.skip(f"no CUDA kernels: {reason}")
    episodes, batch = 4, 6
    image, text, _ = to_device(problem(CONFIG, episodes * batch, 37, F32))
    start = RationalAdapter(CONFIG).cuda()
    torch.nn.init.normal_(start.get_parameter("out_proj.weight"), std=0.02)
    initial = {name: value.detach() for name, value in start.named_parameters()}
    optimizer = EpisodicOptimizer(initial, episodes, lr=1e-3, weight_decay=0.01, backend="cuda")

    def steps() -> Tensor:
        optimizer.reset()
        for _ in range(2):
            leaves = {
                name: (value if value.ndim > initial[name].ndim else value.expand(episodes, *value.shape))
                .detach().contiguous().requires_grad_()
                for name, value in optimizer.parameters.items()
            }  # fmt: skip
            with use_backend("triton"):
                output = rational_adapter(image, text, 20.0, leaves, CONFIG, penalty="l2", episodes=episodes)
            assert output.penalty is not None
            losses = prediction_loss(output.logits.unflatten(0, (episodes, batch)), "mean")
            gradients = torch.autograd.grad((losses + output.penalty).sum(), list(leaves.values()))
            optimizer.step(dict(zip(leaves, gradients, strict=True)))
        return optimizer.parameters["out_proj.weight"]

    assert_replays_from_a_graph(steps)
