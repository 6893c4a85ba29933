"""The compiled CPU backend against float64, by the error that plain PyTorch makes in the same type.

A result passes where its error is at most twice the reference's own error in that type for outputs, three times for
gradients, plus two roundings of the largest value: the reference may happen to be exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast import _env
from rada_fast.config.method import MASK_PENALTIES, AdapterConfig
from rada_fast.errors import UserError
from rada_fast.extension import libraries
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter, use_backend
from tests.support import (
    assert_within_budget,
    problem,
    problem_with_masks_of,
    published_vectors,
    solve,
    solve_weighted,
)

from .support import needs_extension, num_threads

pytestmark = needs_extension

CONFIGS = {
    "official": AdapterConfig.official(64),
    "paper": AdapterConfig.paper(64),
    "row": AdapterConfig.official(64, softmax="row", temperature=0.5),
    "no-relu": AdapterConfig.official(64, mask_activation="none", num_heads=2),
    "no-bias": AdapterConfig.official(64, bias=False, input_scale="none"),
    "paper-matrix": AdapterConfig.paper(64, softmax="matrix", bias=True),
    **{
        "+".join(queries): AdapterConfig.official(64, queries=queries)
        for count in (1, 2)
        for queries in itertools.combinations(("image", "text", "rational"), count)
    },
}
# K = 1 and 2: single tiles; 7, 37, 101: tails of every vector and tile; 397: more than one tile of queries.
SIZES = [(1, 1), (3, 2), (2, 7), (1, 37), (3, 101), (2, 397)]


def assert_as_exact_as_the_reference(
    config: AdapterConfig,
    batch: int,
    classes: int,
    dtype: torch.dtype,
    penalty: str = "l2",
    *,
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None,
    logit_scale: float = 20.0,
) -> None:
    inputs = inputs or problem(config, batch, classes, dtype)
    exact = solve(config, inputs, torch.float64, "reference", penalty, logit_scale=logit_scale)
    plain = solve(config, inputs, dtype, "reference", penalty, logit_scale=logit_scale)
    fast = solve(config, inputs, dtype, "cpu", penalty, logit_scale=logit_scale)
    if dtype != torch.float64:
        assert_within_budget(exact, plain, fast, dtype)
        return
    # In float64 the reference is compared with itself: sums have another order, and gradients nearly cancel.
    assert fast.keys() == plain.keys()
    for name, value in exact.items():
        largest = max(float(tensor.abs().max()) for key, tensor in exact.items() if key[0] == name[0])
        torch.testing.assert_close(
            fast[name], value, rtol=1e-9, atol=1e-13 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_outputs_and_gradients(name: str, dtype: torch.dtype, batch: int, classes: int) -> None:
    assert_as_exact_as_the_reference(CONFIGS[name], batch, classes, dtype)


@pytest.fixture
def _widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bfloat16 be widened, as on a processor without instructions for it."""
    monkeypatch.setenv("RADA_FAST_BFLOAT16", "float32")
    assert libraries.bfloat16_products() == "float32"


# K = 2: a tile of its own; 101: tails; 397: more than one tile of queries and of keys.
@pytest.mark.usefixtures("_widened")
@pytest.mark.parametrize(
    ("name", "batch", "classes"), [*((name, 3, 101) for name in CONFIGS), ("official", 3, 2), ("paper", 2, 397)]
)
def test_bfloat16_without_instructions_for_it(name: str, batch: int, classes: int) -> None:
    assert_as_exact_as_the_reference(CONFIGS[name], batch, classes, torch.bfloat16)


@pytest.mark.usefixtures("_widened")
def test_widened_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # One chunk of images, so that all of them are kept: 16 bits for what a product gave, float32's error in the rest.
    config = CONFIGS["official"]
    image, text, parameters = problem(config, 2, 37, torch.bfloat16)
    logits = rational_adapter(image, text, 20.0, parameters, config, backend="cpu").logits
    wide = {name: tensor.float() for name, tensor in parameters.items()}
    exact = rational_adapter(image.float(), text.float(), 20.0, wide, config, backend="cpu").logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=2**-7, atol=2**-9 * float(exact.abs().max()))
    # The result must differ from that of bfloat16 products.
    if libraries.cpu_paths()["bfloat16"]:
        monkeypatch.setenv("RADA_FAST_BFLOAT16", "native")
        native = rational_adapter(image, text, 20.0, parameters, config, return_mask=True, backend="cpu")
        monkeypatch.setenv("RADA_FAST_BFLOAT16", "float32")
        widened = rational_adapter(image, text, 20.0, parameters, config, return_mask=True, backend="cpu")
        assert not torch.equal(native.mask, widened.mask)


@pytest.mark.parametrize("classes", [1, 37])
def test_bfloat16_with_heads_of_an_odd_width(classes: int) -> None:
    assert_as_exact_as_the_reference(AdapterConfig.official(60, num_heads=4), 2, classes, torch.bfloat16)
    assert_as_exact_as_the_reference(AdapterConfig.official(35, num_heads=1), 2, classes, torch.bfloat16)


def test_which_products_bfloat16_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RADA_FAST_BFLOAT16", raising=False)
    monkeypatch.setattr(_env, "has_native_products", lambda dtype: False)
    # oneDNN may offer products that it emulates; they are slower than float32's.
    assert libraries.bfloat16_products() == "float32"
    assert "tiles widened" in libraries.describe()["bfloat16 products"]
    monkeypatch.setattr(_env, "has_native_products", lambda dtype: True)
    monkeypatch.setattr(libraries, "cpu_paths", lambda: {"vectors": "AVX512", "float32": "a", "bfloat16": "b"})
    assert libraries.bfloat16_products() == "native"
    assert "processor's own" in libraries.describe()["bfloat16 products"]
    monkeypatch.setattr(libraries, "cpu_paths", lambda: {"vectors": "AVX2", "float32": "a", "bfloat16": ""})
    assert libraries.bfloat16_products() == "float32"
    monkeypatch.setenv("RADA_FAST_BFLOAT16", "native")
    with pytest.raises(UserError, match="RADA_FAST_BFLOAT16=native: this processor"):
        libraries.bfloat16_products()
    monkeypatch.setenv("RADA_FAST_BFLOAT16", "bf16")
    with pytest.raises(UserError, match="RADA_FAST_BFLOAT16 must be native or float32, got 'bf16'"):
        libraries.bfloat16_products()


@pytest.mark.parametrize("penalty", [kind for kind in MASK_PENALTIES if kind != "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["official", "paper"])
def test_the_other_penalties(name: str, dtype: torch.dtype, penalty: str) -> None:
    assert_as_exact_as_the_reference(CONFIGS[name], 3, 37, dtype, penalty)


# At -2 relu stops the gradient, at -1 it has its kink, and at 0 l1 has its own. In the other cases many columns or all
# of them, in all classes, have the largest distance. 40 classes and 160 columns are several tiles of both.
@pytest.mark.parametrize(
    ("activation", "penalty", "offsets"),
    [
        ("relu", "l2", [-2.0, -1.0, 0.0, 0.25]),
        ("relu", "l1", [-2.0, -1.0, 0.0, 0.25]),
        ("relu", "linf", [-1.0, 0.0, 0.25]),
        ("relu", "linf", [0.125, -0.5, 0.5]),
        ("none", "l1", [-1.0, 0.0, 0.25]),
        ("none", "linf", [0.25]),
    ],
)
def test_kinks_and_ties_are_those_of_the_reference(
    activation: Literal["relu", "none"], penalty: str, offsets: list[float]
) -> None:
    config = AdapterConfig.official(160, num_heads=2, mask_activation=activation)
    inputs = problem_with_masks_of(offsets, config, 2, 40, torch.float64)
    assert_as_exact_as_the_reference(config, 2, 40, torch.float64, penalty, inputs=inputs)


@pytest.mark.parametrize("result", ["penalty", "mask"])
@pytest.mark.parametrize("offsets", [None, [-2.0, -1.0, 0.0, 0.25]])
def test_gradients_of_a_single_result(offsets: list[float] | None, result: str) -> None:
    config, single = AdapterConfig.official(160, num_heads=2), torch.float32
    arguments = config, 2, 40, single
    inputs = problem(*arguments) if offsets is None else problem_with_masks_of(offsets, *arguments)
    exact, plain, fast = (
        solve_weighted(config, inputs, dtype, backend, in_loss=(result,))
        for dtype, backend in ((torch.float64, "reference"), (single, "reference"), (single, "cpu"))
    )
    assert_within_budget(exact, plain, fast, single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_in_a_mask_is_in_its_logits(dtype: torch.dtype) -> None:
    config = AdapterConfig.official(64, num_heads=2)
    image, text, parameters = problem(config, 2, 5, dtype)
    parameters["out_proj.bias"][3] = torch.nan
    output = rational_adapter(image, text, 20.0, parameters, config, return_mask=True, backend="cpu")
    assert output.mask is not None
    assert bool(output.logits.isnan().all())
    assert output.mask.isnan().sum(-1).tolist() == [[1] * 5] * 2


# Loops take four columns of a head at a time, or two.
@pytest.mark.parametrize(("embed_dim", "num_heads"), [(60, 4), (60, 6), (35, 1)])
def test_heads_that_are_no_whole_fours_of_columns(embed_dim: int, num_heads: int) -> None:
    assert_as_exact_as_the_reference(AdapterConfig.official(embed_dim, num_heads=num_heads), 2, 37, torch.float64)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("penalty", ["l2", "linf"])
def test_more_images_than_are_worked_on_at_once(penalty: str) -> None:
    # Sixteen images of 130 classes are one chunk on one thread.
    config = AdapterConfig.official(16, num_heads=4)
    assert_as_exact_as_the_reference(config, 19, 130, torch.float64, penalty)


# A tile of classes holds several images here, the last of them in part, and bfloat16 an image's odd column as well.
@pytest.mark.parametrize("penalty", ["l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "classes"), [(300, 1), (40, 7), (6, 50)])
def test_tiles_of_several_images(batch: int, classes: int, dtype: torch.dtype, penalty: str) -> None:
    config = AdapterConfig.official(32, num_heads=2)
    assert_as_exact_as_the_reference(config, batch, classes, dtype, penalty)


# Wide heads with a row softmax share one product between the query kinds. 397: several blocks of queries and of keys,
# on three threads that share the head; 1025: too many classes for it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "classes"), [(3, 1), (2, 37), (1, 397), (1, 1025)])
def test_query_kinds_that_are_merged(batch: int, classes: int, dtype: torch.dtype) -> None:
    if classes == 1025 and dtype != torch.float64:
        pytest.skip("one type shows where the limit lies")
    with num_threads(3):
        assert_as_exact_as_the_reference(AdapterConfig.paper(128), batch, classes, dtype)


def test_large_scores_of_merged_query_kinds() -> None:
    config = AdapterConfig.paper(128, bias=True)
    image, text, parameters = problem(config, 1, 290, torch.float64)
    parameters |= {key: 30 * value for key, value in parameters.items() if key[0] in "qk"}
    assert_as_exact_as_the_reference(config, 1, 290, torch.float64, inputs=(image, text, parameters))


def test_threads_that_share_a_head() -> None:
    with num_threads(3):
        # One head has four blocks of queries here.
        for config in (CONFIGS["paper"], AdapterConfig.official(16, num_heads=1)):
            assert_as_exact_as_the_reference(config, 1, 397, torch.float64)


# Scores of some hundred nats: one class has nearly all of a query's weight, and it may lie in any tile.
@pytest.mark.parametrize("name", CONFIGS)
def test_large_scores_in_every_configuration(name: str) -> None:
    config = CONFIGS[name]
    image, text, parameters = problem(config, 1, 290, torch.float64)
    parameters |= {key: 30 * value for key, value in parameters.items() if key[0] in "qk"}
    assert_as_exact_as_the_reference(config, 1, 290, torch.float64, inputs=(image, text, parameters))
    text[-1] *= 100  # the largest scores are those of the last block of queries alone, by more than e^x can express
    found, expected = (rational_adapter(image, text, 1.0, parameters, config, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found.logits, expected.logits)


def test_the_gradient_of_the_logit_scale_is_not_rounded_to_the_features_type() -> None:
    """With an output projection of zeros every mask is 1, and s multiplies the products of the features."""
    config = CONFIGS["official"]
    image, text, parameters = problem(config, 3, 37, torch.bfloat16)
    parameters |= {name: torch.zeros_like(value) for name, value in parameters.items() if name.startswith("out_proj")}
    scale, dlogits = torch.tensor(20.0, requires_grad=True), torch.rand(3, 37).bfloat16()
    rational_adapter(image, text, scale, parameters, config, backend="cpu").logits.backward(dlogits)
    terms = dlogits.double() * (image.double() @ text.double().T)
    assert scale.grad is not None
    assert abs(float(scale.grad - terms.sum())) <= 1e-5 * float(terms.abs().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_memory_held_does_not_show(name: str, dtype: torch.dtype) -> None:
    inputs = problem(CONFIGS[name], 2, 131, dtype)
    usual = solve(CONFIGS[name], inputs, dtype, "cpu")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        filled = solve(CONFIGS[name], inputs, dtype, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, filled[key]) for key, value in usual.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_that_are_zero_whatever_the_input_are_exact_zeros(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    # A probability of one class is 1 whatever its score.
    for key, value in solve(config, problem(config, 3, 1, dtype), dtype, "cpu").items():
        assert not key.startswith(("dq_proj", "dk_proj")) or not value.any(), key
    # A shift of all keys shifts all scores of a query alike.
    if config.softmax == "row" and config.bias:
        assert not solve(config, problem(config, 3, 37, dtype), dtype, "cpu")["dk_proj.bias"].any()


@pytest.mark.parametrize("embed_dim", [512, 640, 1152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_widths_of_real_models(embed_dim: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_the_reference(AdapterConfig.official(embed_dim), 2, 53, dtype)


@pytest.mark.parametrize("name", ["small_d64", "medium_d128", "hot_d64", "clip_d512"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    arrays, parameters, config = published_vectors(name, dtype)
    image, text = (normalize(arrays[key].to(dtype), dim=-1) for key in ("image", "text"))
    output = rational_adapter(
        image, text, float(arrays["logit_scale"]), parameters, config, penalty="linf", backend="cpu"
    )
    assert output.penalty is not None
    (cross_entropy(output.logits, arrays["label"]) + 0.5 * output.penalty).backward()
    exact = dtype == torch.float64
    bound = 1e-9 if exact else 2e-6 * max(float(arrays["logits"].abs().max()), 10)
    assert (output.logits - arrays["logits"]).abs().max() <= bound
    for key, parameter in parameters.items():
        wanted = arrays[f"grad.{key}"].double()
        assert parameter.grad is not None
        assert (parameter.grad - wanted).norm() <= (1e-7 if exact else 1e-5) * wanted.norm(), key


@pytest.mark.parametrize("wanted", [{"image"}, {"text"}, {"out_proj.weight"}, {"k_proj.weight", "q_proj2.bias"}, set()])
def test_only_what_is_asked_for_gets_a_gradient(wanted: set[str]) -> None:
    config = CONFIGS["official"]
    inputs = problem(config, 2, 37, torch.float64)
    everything = solve(config, inputs, torch.float64, "reference")
    some = solve(config, inputs, torch.float64, "cpu", wanted=wanted)
    assert {name for name in some if name.startswith("d")} == {f"d{name}" for name in wanted}
    for name, value in some.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    config = CONFIGS["official"]
    inputs = problem(config, 3, 101, dtype)
    first = solve(config, inputs, dtype, "cpu")
    for _ in range(5):
        again = solve(config, inputs, dtype, "cpu")
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_strided_and_expanded_inputs_are_served() -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, 3, 37, torch.float32)
    plain = rational_adapter(image, text, 20.0, parameters, config, backend="cpu").logits
    strided = {name: tensor.t().contiguous().t() for name, tensor in parameters.items()}
    for images, texts in (
        (image.T.contiguous().T, text),
        (image, text.T.contiguous().T),
        (image[[0]].expand(3, -1), text),
    ):
        got = rational_adapter(images, texts, 20.0, strided, config, backend="cpu").logits
        torch.testing.assert_close(got[0], plain[0], rtol=1e-5, atol=1e-5)


def test_gradients_of_results_may_have_any_strides() -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, 3, 37, torch.float32)
    leaves = [value.requires_grad_() for value in (image, text, *parameters.values())]
    output = rational_adapter(image, text, 20.0, parameters, config, return_mask=True, backend="cpu")
    assert output.mask is not None
    results = (output.logits, output.mask)
    plain = [torch.randn_like(value) for value in results]
    turned = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in plain]
    expanded = [value[:1, :1].expand_as(value) for value in plain]
    for given in (turned, expanded):
        expected = torch.autograd.grad(results, leaves, [value.contiguous() for value in given], retain_graph=True)
        found = torch.autograd.grad(results, leaves, given, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_images_do_not_depend_on_each_other() -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, 4, 37, torch.float32)
    clean = rational_adapter(image, text, 20.0, parameters, config, backend="cpu").logits
    image[2] = torch.nan
    dirty = rational_adapter(image, text, 20.0, parameters, config, backend="cpu").logits
    assert bool(dirty[2].isnan().all())
    assert torch.equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


def test_scores_far_apart_and_many_classes() -> None:
    hot = AdapterConfig.official(64, temperature=1e-3)
    for config, classes in ((hot, 101), (CONFIGS["official"], 5000)):
        image, text, parameters = problem(config, 1, classes, torch.float32)
        parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
        output = rational_adapter(image, text, 100.0, parameters, config, penalty="l2", backend="cpu")
        assert output.penalty is not None
        (output.logits.sum() + output.penalty).backward()
        assert bool(output.logits.isfinite().all())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters.values())


BY_SCORES = ("dimage", "dtext", "dq_proj", "dk_proj")
"""The gradients of these parameters come through the scores, wholly or in part."""


# Scores grow with the square of the logit scale, and their roundings with them. K = 101 has one tile of keys, 397 a
# running maximum over two. D / H is 64, where scores are scaled by a power of two, 8 and 10.
@pytest.mark.parametrize("logit_scale", [1e6, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "widened"])
@pytest.mark.parametrize("softmax", ["matrix", "row"])
@pytest.mark.parametrize(("embed_dim", "num_heads", "classes"), [(64, 1, 101), (64, 8, 397), (60, 6, 397)])
def test_logit_scales_far_beyond_clips(
    embed_dim: int, num_heads: int, classes: int, softmax: Literal["matrix", "row"], dtype: torch.dtype | str,
    logit_scale: float, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dtype == "widened":
        monkeypatch.setenv("RADA_FAST_BFLOAT16", "float32")
    stored = torch.bfloat16 if isinstance(dtype, str) else dtype
    config = AdapterConfig.official(embed_dim, num_heads=num_heads, softmax=softmax)
    inputs = problem(config, 2, classes, stored)
    exact = solve(config, inputs, torch.float64, "reference", logit_scale=logit_scale)
    plain = solve(config, inputs, stored, "reference", logit_scale=logit_scale)
    fast = solve(config, inputs, stored, "cpu", logit_scale=logit_scale)
    assert all(bool(value.isfinite().all()) for value in fast.values())
    if stored == torch.bfloat16:
        # Where two scores are closer than a rounding, another key than the exact one may get all the weight. That
        # changes one row of a row softmax, but all of a matrix softmax.
        near = [(fast[name] - exact[name]).norm() <= 0.2 * exact[name].norm() for name in ("logits", "mask")]
        assert softmax == "matrix" or all(near)
        return
    # Probabilities are 0 or 1, and the scores' gradients 0 times the scale: their roundings say nothing.
    kept = [name for name in exact if not name.startswith(BY_SCORES)]
    compared = ({name: found[name] for name in kept} for found in (exact, plain, fast))
    # The gradient of the output's bias adds up terms far larger than itself, in chains whose length is the processor's.
    assert_within_budget(*compared, stored, roundings=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_distance_of_a_mask_with_nan_is_nan(dtype: torch.dtype) -> None:
    for name in ("official", "no-relu"):
        image, text, parameters = problem(CONFIGS[name], 3, 101, dtype)
        image[1] = torch.nan
        found = [
            rational_adapter(image, text, 20.0, parameters, CONFIGS[name], penalty="linf", backend=backend).penalty
            for backend in ("cpu", "reference")
        ]
        assert all(penalty is not None and bool(penalty.isnan()) for penalty in found)


@pytest.mark.parametrize("name", ["official", "paper"])
def test_gradcheck(name: str) -> None:
    config = AdapterConfig.official(8, num_heads=2) if name == "official" else AdapterConfig.paper(8)
    image, text, parameters = problem(config, 2, 3, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (image, text, *parameters.values())]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, given[2:], strict=True))
        output = rational_adapter(given[0], given[1], 3.0, named, config, penalty="l2", backend="cpu")
        assert output.penalty is not None
        return output.logits, output.penalty

    assert torch.autograd.gradcheck(call, leaves)


# A graph that PyTorch kept on disk names the operator's results by position, and may be of another version.
@torch._inductor.config.patch(fx_graph_cache=False)
@torch._functorch.config.patch(enable_autograd_cache=False)
def test_compile_autocast_checkpoint_and_no_grad() -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, 2, 37, torch.float32)
    adapter = RationalAdapter(config)
    adapter.load_state_dict(parameters)
    with use_backend("cpu"):
        plain, penalty = adapter(image, text, 20.0, penalty="l2")
        (plain.sum() + penalty).backward()
        gradient = adapter.get_parameter("k_proj.weight").grad
        assert gradient is not None
        expected = gradient.clone()

        compiled = torch.compile(adapter, fullgraph=True)
        adapter.zero_grad()
        logits, penalty = compiled(image, text, 20.0, penalty="l2")
        (logits.sum() + penalty).backward()
        assert torch.equal(logits, plain)
        torch.testing.assert_close(adapter.get_parameter("k_proj.weight").grad, expected)

        adapter.zero_grad()
        again = torch.utils.checkpoint.checkpoint(adapter, image, text, 20.0, use_reentrant=False)
        assert torch.equal(again, plain)
        with torch.no_grad():
            assert not adapter(image, text, 20.0).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            low, penalty = adapter(image, text, 20.0, penalty="l2")
        (low.float().sum() + penalty.float()).backward()
        assert adapter.get_parameter("k_proj.weight").grad.dtype == torch.float32
        # bfloat16's 8 bits on logits of order 20.
        torch.testing.assert_close(low.float(), plain, rtol=5e-2, atol=0.5)
