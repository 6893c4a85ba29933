"""The views of lowest entropy are selected in the order that float64 gives, with and without the extension."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from rada_fast.errors import BackendUnavailableError
from rada_fast.ops import keep_views, select_views, use_backend
from rada_fast.ops._backends import library
from rada_fast.reference.view_selection import prediction_entropy
from tests.support import around

from .support import needs_extension, num_threads

BACKENDS = ["reference", "cpu"] if library.load() is None else ["reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def exact_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy in float64 without cancellation: the sums leave out one largest logit."""
    x = logits.double().sort(dim=-1, descending=True).values
    distance = x[..., :1] - x[..., 1:]
    weight = (-distance).exp()
    others = weight.sum(-1)
    return others.log1p() + (weight * distance.masked_fill(weight == 0, 0)).sum(-1) / (1 + others)


def draw(episodes: int, views: int, classes: int, scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * views + classes)
    return (scale * torch.randn(episodes, views, classes, generator=generator, dtype=torch.float64)).to(dtype)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
# 1 and 7: less than a vector; 101: a tail; 200, 1000: the sizes in use; 64 and 130 views: more than a task's rows.
@pytest.mark.parametrize(("views", "classes"), [(1, 1), (5, 7), (64, 101), (64, 200), (130, 1000)])
def test_order_is_that_of_float64(dtype: torch.dtype, scale: float, views: int, classes: int) -> None:
    logits = draw(3, views, classes, scale, dtype)
    indices, entropies = select_views(logits, views, return_entropies=True)
    exact = exact_entropy(logits)
    assert entropies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The sum of K terms and a logarithm make a few roundings, relative to the entropy even where it is tiny.
    relative = 32 * torch.finfo(entropies.dtype).eps
    torch.testing.assert_close(entropies.double(), exact, rtol=relative, atol=1e-37)
    ordered = exact.gather(1, indices)
    assert bool((ordered[:, 1:] >= ordered[:, :-1] * (1 - 2 * relative) - 1e-36).all())
    assert torch.equal(indices, entropies.argsort(dim=-1, stable=True))
    few = select_views(logits, views // 3)
    assert torch.equal(few, indices[:, : views // 3])


def drawn(seed: int, most_views: int, *classes: int) -> tuple[Tensor, int]:
    """Draw logits of drawn sizes, of which some are tied, infinite or NaN, and a number of views to select."""
    r, dtype = random.Random(seed), random.Random(-seed).choice(DTYPES)
    views = min(most_views, around(r, 16, 32, 64, most_views))
    logits = draw(r.randint(1, 3), views, around(r, *classes), r.choice([0.1, 3.0, 30.0]), dtype)
    for value in (r.choice([-math.inf, math.nan, math.inf, 0.0]) for _ in range(r.randint(0, 3))):
        episode, view = r.randrange(len(logits)), r.randrange(views)
        logits[episode, view, r.randrange(logits.shape[2])] = value
        logits[episode, r.randrange(views)] = logits[episode, view]
    return logits, r.choice([1, views // 2, views - 1, views])


def assert_selected(logits: Tensor, count: int, indices: Tensor, entropies: Tensor) -> None:
    """Compare with float64. A row that has NaN, or no finite largest logit, has an entropy of NaN and comes last."""
    exact = exact_entropy(logits).masked_fill(~logits.amax(-1).isfinite(), torch.nan)
    relative = 32 * torch.finfo(entropies.dtype).eps
    torch.testing.assert_close(entropies.double(), exact, rtol=relative, atol=1e-37, equal_nan=True)
    order = entropies.nan_to_num(nan=math.inf).argsort(dim=-1, stable=True)
    assert torch.equal(indices, order[:, :count])


@needs_extension
@pytest.mark.parametrize("seed", range(24))
def test_drawn_selections(seed: int) -> None:
    logits, count = drawn(seed, 1025, 16, 101, 1000)
    assert_selected(logits, count, *select_views(logits, count, return_entropies=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_are_ordered_by_index(backend: str) -> None:
    logits = draw(2, 9, 101, 5.0, torch.float32)
    # With 101 floats, which are no whole number of vectors, the rows start at odd places in memory.
    logits[:, [1, 4, 6]] = logits[:, :1]
    with use_backend(backend):
        indices, entropies = select_views(logits, 9, return_entropies=True)
    for row in range(2):
        assert (entropies[row, [0, 1, 4, 6]] == entropies[row, 0]).all()
        places = [int((indices[row] == view).nonzero()) for view in (0, 1, 4, 6)]
        assert places == list(range(places[0], places[0] + 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_out_tied_infinite_and_missing_logits(backend: str) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        [nan, 0.0, 0.0],
        [1e4, 1e4, -1e4],
        [-inf, 0.0, 0.0],
        [1e4, -1e4, 0.0],
        [-inf, -inf, -inf],
        [0.0, 0.0, 0.0],
        [inf, 0.0, 0.0],
        [-inf, 3.0, -inf],
    ]
    with use_backend(backend):
        indices, entropies = select_views(torch.tensor(rows), len(rows), return_entropies=True)
    half = math.log(2)
    expected = torch.tensor([nan, half, half, 0.0, nan, math.log(3), nan, 0.0])
    torch.testing.assert_close(entropies, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert indices.tolist() == [3, 7, 1, 2, 5, 0, 4, 6]


@needs_extension
def test_confident_views_keep_their_order() -> None:
    """Entropies of 1e-8, which float32's log-softmax rounds to a few values, stay apart."""
    gaps = torch.linspace(25.0, 17.0, 40)
    logits = torch.stack([gaps, torch.zeros(40)], dim=-1)
    assert select_views(logits, 40).tolist() == list(range(40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides_are_served(backend: str) -> None:
    logits = draw(2, 6, 5, 1.0, torch.float32)
    with use_backend(backend):
        expected = select_views(logits, 3)
        assert torch.equal(select_views(logits[1], 3), expected[1])
        assert torch.equal(select_views(logits.transpose(0, 2).contiguous().transpose(0, 2), 3), expected)
        assert not select_views(logits.requires_grad_(), 3, return_entropies=True)[1].requires_grad


@needs_extension
def test_the_selection_does_not_depend_on_threads() -> None:
    logits = draw(7, 64, 200, 10.0, torch.float32)
    results = []
    for count in (1, 2, 5):
        with num_threads(count):
            results.append(select_views(logits, 64, return_entropies=True))
    for indices, entropies in results[1:]:
        assert torch.equal(indices, results[0][0])
        assert torch.equal(entropies, results[0][1])


def test_errors_name_the_argument() -> None:
    logits = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="count must be from 0 to V = 4, got 5"):
        select_views(logits, 5)
    with pytest.raises(ValueError, match=r"logits must be \(E, V, K\) or \(V, K\) .* got \(3,\)"):
        select_views(logits[0, 0], 1)
    with pytest.raises(ValueError, match=r"K >= 1, got \(2, 4, 0\)"):
        select_views(logits[..., :0], 1)
    with pytest.raises(TypeError, match=r"logits must be float32, .* got torch.int64"):
        select_views(logits.long(), 1)
    with use_backend("cuda"):
        # The adapter's backend, for a device that these tensors are not on.
        assert select_views(logits, 1).tolist() == [[0], [0]]


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "not built")
    logits = draw(2, 6, 5, 1.0, torch.float32)
    expected = prediction_entropy(logits).argsort(dim=-1, stable=True)[:, :2]
    assert torch.equal(select_views(logits, 2), expected)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="not built"):
        select_views(logits, 2)


@needs_extension
def test_the_operator_keeps_pytorchs_rules() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.rada_fast.select_views.default, (draw(2, 6, 5, 1.0, dtype), 3))
    with pytest.raises(RuntimeError, match="count must be from 0"):
        torch.ops.rada_fast.select_views(torch.zeros(1, 2, 3), 3)


@needs_extension
def test_torch_compile_makes_one_graph() -> None:
    logits = draw(2, 6, 5, 1.0, torch.float32)
    compiled = torch.compile(lambda x: select_views(x, 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), select_views(logits, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kept_views_are_the_selected_ones_whatever_episodes_there_are(dtype: torch.dtype) -> None:
    views, text = (torch.randn(*shape).to(dtype) for shape in ((3, 10, 16), (7, 16)))
    kept = keep_views(views, text, 3.0, 4)
    logits = torch.stack([3.0 * (own @ text.T) for own in views])
    for own, index, features in zip(views, select_views(logits, 4), kept.kept, strict=True):
        assert torch.equal(features, own[index])
    assert torch.equal(kept.originals, views[:, 0])
    assert torch.equal(kept.logits, logits[:, 0])
    for index in range(3):
        alone = keep_views(views[index : index + 1], text, torch.tensor(3.0), 4)
        assert all(torch.equal(one[0], all_[index]) for one, all_ in zip(alone, kept, strict=True))
    assert [tuple(value.shape) for value in keep_views(views[:0], text, 3.0, 4)] == [(0, 4, 16), (0, 16), (0, 7)]


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((2, 0, 8), 0, r"view_features must be \(E, V, D\) with V >= 1, got \(2, 0, 8\)"),
        ((3, 8), 1, r"view_features must be \(E, V, D\) with V >= 1, got \(3, 8\)"),
        ((2, 3, 8), 4, "count must be from 0 to V = 3, got 4"),
    ],
)
def test_views_that_cannot_be_kept_are_refused(shape: tuple[int, ...], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_views(torch.zeros(shape), torch.zeros(5, 8), 1.0, count)
