"""The reference gives the published outputs, agrees with the written-out equations, and behaves as the method must."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast.config.method import MASK_PENALTIES, AdapterConfig
from rada_fast.ops import rational_adapter
from rada_fast.reference.masked_logits import mask_penalty
from tests.support import VECTORS, problem, published_vectors

BACKENDS = ("reference", "literal")


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_outputs_and_gradients(name: str, backend: str, dtype: torch.dtype) -> None:
    arrays, parameters, config = published_vectors(name, dtype)
    image, text = (normalize(arrays[key].to(dtype), dim=-1) for key in ("image", "text"))
    output = rational_adapter(
        image, text, float(arrays["logit_scale"]), parameters, config, penalty="linf", return_mask=True, backend=backend
    )
    assert output.penalty is not None
    assert output.mask is not None
    entropy = cross_entropy(output.logits, arrays["label"])
    (entropy + 0.5 * output.penalty).backward()

    # float64 repeats the published arithmetic; the stored mask and gradients are float32, half an ulp of 6e-8 relative.
    # float32: logits are sums of D products with |logit| up to about 100: 1e-6 relative is 8 ulps of the largest.
    exact = dtype == torch.float64
    scale = float(arrays["logits"].abs().max())
    assert (output.logits - arrays["logits"]).abs().max() <= (1e-9 if exact else 2e-6 * max(scale, 10))
    torch.testing.assert_close(output.mask.double(), arrays["mask"].double(), rtol=1e-6, atol=6e-8 if exact else 2e-5)
    assert abs(entropy.item() - float(arrays["cross_entropy"])) <= (1e-9 if exact else 1e-4)
    assert abs(output.penalty.item() - float(arrays["linf"])) <= (1e-9 if exact else 1e-5)
    for key, parameter in parameters.items():
        expected = arrays[f"grad.{key}"].double()
        assert parameter.grad is not None
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error <= (1e-7 if exact else 1e-5), key


def transcription(image: Tensor, text: Tensor, s: float, p: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """Compute the mask as the equations are written, for one image, one head and one class at a time."""
    B, K, D, d = len(image), len(text), config.embed_dim, config.head_dim
    scaled = config.input_scale == "logit"
    root, full = (math.sqrt(s), s) if scaled else (1.0, 1.0)
    weight = lambda name: p[f"{name}.weight"]  # noqa: E731 (the equations read better)
    bias = lambda name: p.get(f"{name}.bias", torch.zeros(D, dtype=image.dtype))  # noqa: E731
    mask = torch.ones(B, K, D, dtype=image.dtype)
    for b in range(B):
        rational = torch.stack([image[b] * text[k] for k in range(K)])
        if config.mask_function == "mlp":
            hidden = (full * rational @ weight("fc").T + bias("fc")).clamp(min=0)
            mask[b] += hidden @ weight("out_proj").T + bias("out_proj")
            continue
        total = torch.zeros(K, D, dtype=image.dtype)
        for layer in range(config.num_layers):
            prefix = "" if layer == 0 else f"layers.{layer - 1}."
            keys = full * rational @ weight(prefix + "k_proj").T + bias(prefix + "k_proj")
            values = full * rational @ weight(prefix + "v_proj").T + bias(prefix + "v_proj")
            if layer:
                queries = [total @ weight(prefix + "q_proj").T + bias(prefix + "q_proj")]
            else:
                inputs = {"image": root * image[b].repeat(K, 1), "text": root * text, "rational": full * rational}
                names = {"image": "q_proj1", "text": "q_proj2", "rational": "q_proj3"}
                queries = [inputs[kind] @ weight(names[kind]).T + bias(names[kind]) for kind in config.queries]
            attended = torch.zeros(K, D, dtype=image.dtype)
            for h, query in itertools.product(range(config.num_heads), queries):
                part = slice(h * d, (h + 1) * d)
                scores = query[:, part] @ keys[:, part].T / (math.sqrt(d) * config.temperature)
                weights = (scores - scores.max()).exp()
                if config.softmax == "matrix":
                    weights = K * weights / weights.sum()
                else:
                    weights = weights / weights.sum(dim=1, keepdim=True)
                attended[:, part] += weights @ values[:, part] / len(queries)
            total = total + attended @ weight(prefix + "out_proj").T + bias(prefix + "out_proj")
        mask[b] += total
    return mask.clamp(min=0) if config.mask_activation == "relu" else mask


CONFIGS = [
    AdapterConfig.official(16),
    AdapterConfig.official(16, temperature=0.5, queries=("rational",)),
    AdapterConfig.official(16, queries=("image", "text"), bias=False),
    AdapterConfig.official(16, queries=("image",), num_heads=4),
    AdapterConfig.official(16, softmax="row", num_layers=3),
    AdapterConfig.official(16, mask_function="mlp"),
    AdapterConfig.official(16, input_scale="none", num_layers=2),
    AdapterConfig.paper(16),
    AdapterConfig.paper(16, mask_activation="relu", bias=True, num_layers=2),
    AdapterConfig.paper(16, softmax="matrix", queries=("text",), temperature=2.0),
    AdapterConfig.paper(16, mask_function="mlp"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_configuration_equals_the_equations(config: AdapterConfig, backend: str) -> None:
    # K = 7 is no multiple of a vector; s = 9 keeps the scores moderate, so that float64 agrees to the last digits.
    image, text, parameters = problem(config, batch=3, classes=7)
    output = rational_adapter(image, text, 9.0, parameters, config, return_mask=True, penalty="l1", backend=backend)
    mask = transcription(image, text, 9.0, parameters, config)
    torch.testing.assert_close(output.mask, mask, rtol=1e-11, atol=1e-11)
    logits = 9.0 * (mask * image[:, None] * text).sum(-1)
    torch.testing.assert_close(output.logits, logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("penalty", MASK_PENALTIES)
def test_reference_and_literal_have_equal_gradients(config: AdapterConfig, penalty: str) -> None:
    image, text, parameters = problem(config, batch=2, classes=5)
    gradients = []
    for backend in BACKENDS:
        leaves = [tensor.clone().requires_grad_() for tensor in (image, text, *parameters.values())]
        named = dict(zip(parameters, leaves[2:], strict=True))
        output = rational_adapter(leaves[0], leaves[1], 9.0, named, config, penalty=penalty, backend=backend)
        assert output.penalty is not None
        gradients.append(torch.autograd.grad(output.logits.square().sum() + output.penalty, leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_penalties_equal_their_formulas() -> None:
    config = AdapterConfig.official(16)
    image, text, parameters = problem(config, batch=3, classes=5)
    values = {
        kind: rational_adapter(image, text, 9.0, parameters, config, penalty=kind, return_mask=True)
        for kind in MASK_PENALTIES
    }
    distance = (values["l2"].mask - 1).flatten(1)
    torch.testing.assert_close(values["l2"].penalty, (distance**2).mean())
    torch.testing.assert_close(values["l1"].penalty, distance.abs().mean())
    torch.testing.assert_close(values["linf"].penalty, distance.abs().amax(dim=1).mean())


def test_linf_gradient_goes_to_one_element_at_a_tie() -> None:
    config = AdapterConfig.official(16)
    image, text, parameters = problem(config, batch=2, classes=4)
    # The attended rows vanish, so every element of an image's mask is 1 + bias: all of them tie.
    parameters = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    parameters["out_proj.bias"] = torch.full((16,), 0.5, dtype=torch.float64, requires_grad=True)
    output = rational_adapter(image, text, 9.0, parameters, config, penalty="linf")
    assert output.penalty is not None
    (gradient,) = torch.autograd.grad(output.penalty, parameters["out_proj.bias"])
    assert gradient.count_nonzero() == 1
    assert float(gradient.sum()) == 1.0


@given(
    preset=st.sampled_from(["official", "paper"]),
    batch=st.integers(1, 4),
    classes=st.sampled_from([1, 2, 7, 37, 101]),
    seed=st.integers(0, 99),
    backend=st.sampled_from(BACKENDS),
)
def test_zero_output_projection_is_zero_shot_exactly(
    preset: str, batch: int, classes: int, seed: int, backend: str
) -> None:
    config = AdapterConfig.official(16) if preset == "official" else AdapterConfig.paper(16)
    image, text, parameters = problem(config, batch, classes, seed=seed)
    for name in ("out_proj.weight", "out_proj.bias"):
        if name in parameters:
            parameters[name].zero_()
    output = rational_adapter(image, text, 100.0, parameters, config, return_mask=True, backend=backend)
    assert torch.equal(output.logits, 100.0 * (image[:, None] * text).sum(-1))
    assert output.mask is not None
    assert bool((output.mask == 1).all())


@given(
    config=st.sampled_from(CONFIGS),
    classes=st.sampled_from([2, 7, 33]),
    seed=st.integers(0, 99),
)
def test_permuting_classes_permutes_logits(config: AdapterConfig, classes: int, seed: int) -> None:
    image, text, parameters = problem(config, 2, classes, seed=seed)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    plain = rational_adapter(image, text, 9.0, parameters, config, penalty="l2")
    mixed = rational_adapter(image, text[order], 9.0, parameters, config, penalty="l2")
    torch.testing.assert_close(mixed.logits, plain.logits[:, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixed.penalty, plain.penalty, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_do_not_depend_on_each_other(backend: str) -> None:
    config = AdapterConfig.official(16)
    image, text, parameters = problem(config, 4, 9)
    poisoned = image.clone()
    poisoned[2] = torch.nan
    clean = rational_adapter(image, text, 9.0, parameters, config, backend=backend).logits
    dirty = rational_adapter(poisoned, text, 9.0, parameters, config, backend=backend).logits
    assert bool(dirty[2].isnan().all())
    torch.testing.assert_close(dirty[[0, 1, 3]], clean[[0, 1, 3]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_classes_tie_exactly(backend: str) -> None:
    # ImageNet names two classes "missile": equal rows of T must give equal logits, not nearly equal ones.
    config = AdapterConfig.official(16)
    image, text, parameters = problem(config, 2, 9)
    text[5] = text[3]
    logits = rational_adapter(image, text, 9.0, parameters, config, backend=backend).logits
    torch.testing.assert_close(logits[:, 5], logits[:, 3], rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_served(backend: str) -> None:
    config = AdapterConfig.official(16)
    image, text, parameters = problem(config, 3, 5)
    plain = rational_adapter(image, text, 9.0, parameters, config, backend=backend).logits
    strided = rational_adapter(image.T.contiguous().T, text.T.contiguous().T, 9.0, parameters, config, backend=backend)
    torch.testing.assert_close(strided.logits, plain, rtol=1e-12, atol=1e-12)


def test_scores_far_apart_do_not_overflow() -> None:
    config = AdapterConfig.official(16, temperature=1e-3)
    image, text, parameters = problem(config, 2, 33)
    parameters = {name: tensor.float() for name, tensor in parameters.items()}
    output = rational_adapter(image.float(), text.float(), 100.0, parameters, config)
    assert bool(output.logits.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpu_gives_the_same(config: AdapterConfig, backend: str) -> None:
    image, text, parameters = problem(config, batch=3, classes=7)
    cpu_output = rational_adapter(image, text, 9.0, parameters, config, penalty="linf", backend=backend)
    device_output = rational_adapter(
        image.cuda(), text.cuda(), 9.0, {k: v.cuda() for k, v in parameters.items()}, config, penalty="linf",
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(device_output.logits.cpu(), cpu_output.logits, rtol=1e-10, atol=1e-10)
    assert device_output.penalty is not None
    torch.testing.assert_close(device_output.penalty.cpu(), cpu_output.penalty, rtol=1e-10, atol=1e-10)


def test_a_penalty_without_an_equation_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'l2', 'l1', 'linf', got 'huber'"):
        mask_penalty(torch.zeros(1, 2, 8), "huber")  # type: ignore[arg-type]
