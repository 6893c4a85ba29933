"""The CUDA kernels of the losses agree with the reference in float64, in the simulator and on a device."""

from __future__ import annotations

import random
from ctypes import c_int64
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.extension import libraries
from rada_fast.ops import prediction_loss, prediction_loss_and_gradient, use_backend
from tests.cuda.conftest import Launchers
from tests.cuda.test_augmix import INVALID_VALUE
from tests.cuda.test_view_selection import TYPES, shifted
from tests.ops.test_prediction_losses import KINDS, assert_within_budget, draw, halfway, options, solve
from tests.support import around

NUMBERS = {"mean": 0, "marginal": 1, "cross_entropy": 2}


def run(
    launchers: Launchers,
    logits: Tensor,
    kind: str,
    *,
    gradient: bool = True,
    labels: Tensor | None = None,
    smoothing: float | None = None,
) -> tuple[Tensor, Tensor | None, Any]:
    """Losses, gradient and the launch's counts; what is not written shows."""
    library = launchers("prediction_losses.cu")
    import ptxsim

    given = options(kind, logits)
    targets = labels if labels is not None else given.get("labels")
    number, dtype = NUMBERS[given["kind"]], TYPES[logits.dtype]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses, dlogits = torch.full((len(logits),), torch.nan, dtype=exact), torch.full_like(logits, torch.nan)
    needed = library.call("rada_fast_prediction_loss_workspace", number, dtype, *logits.shape)
    workspace = torch.full((needed // 4,), -1, dtype=torch.int32)
    library.log.clear()
    status = library.call(
        "rada_fast_prediction_loss", logits, targets, number, dtype, *logits.shape,
        given.get("label_smoothing", 0.0) if smoothing is None else smoothing,
        ptxsim.Empty(losses), ptxsim.Empty(dlogits) if gradient else None,
        ptxsim.Empty(workspace) if needed else None, None,
    )  # fmt: skip
    assert status == 0
    assert len(library.log) == bool(len(logits))
    return losses, dlogits if gradient else None, next(iter(library.log), None)


# Less than a 16-byte word; rows off their boundaries; more rows than a block; a row over a block's warps, in registers
# and read again; n = 1; more rows than a warp has lanes; one row more than a block has warps or than registers hold;
# a single row over several warps.
SIZES = [
    (1, 1, 1, 0), (3, 6, 3, 1), (2, 6, 101, 3), (2, 13, 37, 0), (1, 6, 1000, 0), (1, 3, 2100, 1), (1, 2, 9001, 0),
    (2, 40, 3, 0), (2, 9, 37, 1), (1, 1, 2100, 0),
]  # fmt: skip


def _drawn_case(seed: int) -> tuple[torch.dtype, str, tuple[int, int, int, int]]:
    r = random.Random(seed)
    # A block has eight warps of 32 lanes, each of which has one word of a strip of classes, or eight.
    sizes = r.randint(1, 3), around(r, 8, 16, 32), around(r, 32, 128, 256, 1024, 2048), r.randint(0, 7)
    return r.choice([*TYPES]), r.choice(KINDS), sizes


CASES = (
    [_drawn_case(seed) for seed in range(10)]
    + [(torch.float32, kind, size) for kind in KINDS for size in SIZES]
    + [
        # The other types differ in the words' elements, not in the loops.
        (dtype, kind, size)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for kind in ("mean", "marginal", "smoothed")
        for size in (SIZES[1], SIZES[2], SIZES[5])
    ]
)


@pytest.mark.parametrize(("dtype", "kind", "size"), CASES)
def test_losses_and_gradients(
    launchers: Launchers, dtype: torch.dtype, kind: str, size: tuple[int, int, int, int]
) -> None:
    episodes, rows, classes, offset = size
    logits = shifted(draw(episodes, rows, classes, 5.0, dtype), offset)
    losses, gradient, _ = run(launchers, logits, kind)
    assert gradient is not None
    weights = torch.arange(1, episodes + 1, dtype=torch.float64)[:, None, None]
    assert_within_budget(
        (losses.double(), weights * gradient.double()),
        solve(logits, kind, "reference"),
        solve(logits.double(), kind, "reference"),
        (torch.finfo(losses.dtype).eps, torch.finfo(dtype).eps),
    )
    alone, _, stats = run(launchers, logits, kind, gradient=False)
    assert torch.equal(alone, losses)
    # The rows' losses pass through memory where an episode is several blocks; its counter is a store too.
    assert stats.footprint_st <= losses.nbytes + episodes * (rows * losses.itemsize + 4)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(dtype, "mean") for dtype in TYPES] + [(torch.float32, kind) for kind in KINDS[1:]]
)
@pytest.mark.parametrize(("fill", "offset"), [(0, 1), (-1, 2), (1, 3)])
def test_every_logit_counts(launchers: Launchers, dtype: torch.dtype, kind: str, fill: int, offset: int) -> None:
    """Rows fill a warp's registers exactly, or nearly, and no logit is so small that its loss would not show."""
    classes = (512 if dtype == torch.float64 else 1024) + fill
    logits = shifted(3 + draw(1, 2, classes, 0.5, dtype), offset)
    losses, gradient, _ = run(launchers, logits, kind)
    with use_backend("reference"):
        wanted = prediction_loss_and_gradient(logits.double(), **options(kind, logits))
    assert gradient is not None
    eps, stored = torch.finfo(losses.dtype).eps, torch.finfo(dtype)
    torch.testing.assert_close(losses.double(), wanted[0], rtol=32 * eps, atol=0)
    least = 64 * eps * float(wanted[1].abs().max()) + stored.eps * stored.tiny
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=64 * eps + stored.eps, atol=least)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "classes"), [(6, 7), (13, 37), (3, 2100)])
def test_no_episodes_launch_nothing(launchers: Launchers, kind: str, rows: int, classes: int) -> None:
    # An episode of one block, of several and of rows that take a block each. The tensors' pointers are null.
    logits = torch.empty(0, rows, classes)
    labels = torch.empty(0, rows, dtype=torch.int64) if kind in ("cross_entropy", "smoothed") else None
    for gradient in (True, False):
        losses, _, launch = run(launchers, logits, kind, gradient=gradient, labels=labels)
        assert losses.shape == (0,)
        assert launch is None


def test_more_blocks_than_a_grid_holds_are_refused(launchers: Launchers) -> None:
    library = launchers("prediction_losses.cu")
    most = 2**31 - 1
    library.log.clear()
    for number, rows, episodes, wanted in [(0, 6, most, 0), (1, 100, most, 0), (2, 13, most // 2, most // 2 * 56)]:
        # Two blocks of eight rows have a workspace of four bytes for each row and a counter.
        needed = library.call("rada_fast_prediction_loss_workspace", number, 0, episodes, rows, 7, restype=c_int64)
        assert needed == wanted
        # Nothing is read before the check.
        sizes = (episodes + 1, rows, 7)
        needed = library.call("rada_fast_prediction_loss_workspace", number, 0, *sizes, restype=c_int64)
        assert needed == -1
        status = library.call("rada_fast_prediction_loss", None, None, number, 0, *sizes, 0.0, None, None, None, None)
        assert (status, len(library.log)) == (INVALID_VALUE, 0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["mean", "marginal", "smoothed"])
def test_an_episode_does_not_depend_on_its_place(launchers: Launchers, dtype: torch.dtype, kind: str) -> None:
    logits = draw(1, 6, 101, 5.0, dtype).expand(3, -1, -1).contiguous()
    labels = torch.arange(6).expand(3, -1).contiguous() if kind in ("cross_entropy", "smoothed") else None
    losses, gradient, _ = run(launchers, logits, kind, labels=labels)
    moved, moved_gradient, _ = run(launchers, shifted(logits, 1), kind, labels=labels)
    assert gradient is not None
    assert moved_gradient is not None
    for episode in range(3):
        assert losses[episode] == moved[episode] == losses[0]
        assert torch.equal(gradient[episode], gradient[0])
        assert torch.equal(moved_gradient[episode], gradient[0])


@pytest.mark.parametrize("kind", KINDS)
def test_far_out_tied_and_infinite_logits(launchers: Launchers, kind: str) -> None:
    inf = torch.inf
    finite = [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
    # Each of these rows is in an episode with no other one, which would hide a loss that it lacks.
    bad = [[torch.nan, 0.0, 0.0], [inf, 0.0, 0.0], [-inf, -inf, -inf]]
    logits = torch.tensor([finite, *([row, *finite[1:]] for row in bad)])
    losses, gradient, _ = run(launchers, logits, kind)
    assert gradient is not None
    with use_backend("reference"):
        wanted = prediction_loss_and_gradient(logits[:1].double(), **options_of_first(kind, logits))
    torch.testing.assert_close(losses[:1].double(), wanted[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient[:1].double(), wanted[1], rtol=1e-5, atol=1e-7)
    assert bool(losses[1:].isnan().all())
    assert bool(gradient[1:, 0].isnan().any(-1).all())
    if kind in ("mean", "marginal"):
        less = torch.tensor([[[0.5, -inf, 1.0], [2.0, -inf, 0.0]]])
        losses, gradient, _ = run(launchers, less, kind)
        wanted = prediction_loss_and_gradient(less[..., [0, 2]], kind)  # type: ignore[arg-type]
        assert gradient is not None
        torch.testing.assert_close(losses, wanted[0])
        torch.testing.assert_close(gradient[..., [0, 2]], wanted[1])
        assert bool((gradient[..., 1] == 0).all())
        # A warp finds nothing else in the classes that it takes at once.
        many = torch.full((1, 2, 400), -inf)
        many[..., :100] = torch.linspace(-1, 1, 200).view(1, 2, 100)
        losses, gradient, _ = run(launchers, many, kind)
        wanted = prediction_loss_and_gradient(many[..., :100], kind)  # type: ignore[arg-type]
        assert gradient is not None
        torch.testing.assert_close(losses, wanted[0])
        torch.testing.assert_close(gradient[..., :100], wanted[1])
        assert bool((gradient[..., 100:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_even(launchers: Launchers, dtype: torch.dtype) -> None:
    logits, labels = torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64)
    for smoothing, wanted in zip(*halfway(dtype), strict=True):
        _, gradient, _ = run(launchers, logits, "smoothed", labels=labels, smoothing=smoothing)
        assert gradient is not None
        assert gradient.flatten().tolist() == [-wanted, wanted]


def options_of_first(kind: str, logits: Tensor) -> dict[str, Any]:
    given = options(kind, logits)
    return {name: value[:1] if name == "labels" else value for name, value in given.items()}


def test_a_label_that_is_no_class_gives_nan(launchers: Launchers) -> None:
    logits = draw(2, 3, 7, 1.0, torch.float32)
    for wrong in (-100, 7):
        labels = torch.tensor([[0, wrong, 1], [2, 3, 4]])
        losses, gradient, _ = run(launchers, logits, "cross_entropy", labels=labels)
        assert gradient is not None
        assert losses.isnan().tolist() == [True, False]
        assert gradient.isnan().all(-1).tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mean", "marginal", "smoothed"])
@pytest.mark.parametrize(("classes", "offset"), [(200, 0), (1000, 0), (2001, 1)])
def test_every_byte_is_moved_once(
    launchers: Launchers, dtype: torch.dtype, kind: str, classes: int, offset: int
) -> None:
    logits = shifted(draw(2, 6, classes, 5.0, dtype), offset)
    losses, _, stats = run(launchers, logits, kind)
    least = logits.nbytes + (2 * 6 * 8 if "labels" in options(kind, logits) else 0)
    assert stats.footprint_ld <= 1.01 * least
    assert stats.footprint_st <= 1.01 * (logits.nbytes + losses.nbytes)
    # A strip of marginal entropy is one word a lane: off its boundary it has two borders of its own.
    assert stats.efficiency("ld") >= 0.9
    assert stats.efficiency("st") >= (0.85 if kind == "marginal" and offset else 0.9)


@pytest.mark.gpu
@pytest.mark.skipif(libraries.load_cuda() is not None, reason=f"CUDA kernels: {libraries.load_cuda()}")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("episodes", "rows", "classes"), [(1, 6, 7), (3, 6, 101), (64, 6, 1000), (2, 100, 9001)])
def test_a_device_agrees(dtype: torch.dtype, kind: str, episodes: int, rows: int, classes: int) -> None:
    logits = draw(episodes, rows, classes, 5.0, dtype).cuda()
    first, again = (solve(logits, kind, "cuda") for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    loss_type = torch.float64 if dtype == torch.float64 else torch.float32
    assert_within_budget(
        first,
        solve(logits, kind, "reference"),
        solve(logits.double(), kind, "reference"),
        (torch.finfo(loss_type).eps, torch.finfo(dtype).eps),
    )


@pytest.mark.gpu
@pytest.mark.skipif(libraries.load_cuda() is not None, reason=f"CUDA kernels: {libraries.load_cuda()}")
@pytest.mark.parametrize(("kind", "rows"), [("mean", 6), ("mean", 100), ("marginal", 6)])
def test_a_graph_replays_it(kind: Any, rows: int) -> None:
    logits = draw(4, rows, 200, 5.0, torch.float32).cuda()
    prediction_loss_and_gradient(logits, kind)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradient = prediction_loss_and_gradient(logits, kind)
    for scale in (1.0, 3.0):
        logits.copy_(draw(4, rows, 200, scale, torch.float32).flip(1))
        graph.replay()
        wanted = prediction_loss_and_gradient(logits, kind)
        assert torch.equal(losses, wanted[0])
        assert torch.equal(gradient, wanted[1])


@pytest.mark.gpu
@pytest.mark.skipif(libraries.load_cuda() is not None, reason=f"CUDA kernels: {libraries.load_cuda()}")
def test_more_rows_than_a_block_holds_take_the_reference() -> None:
    logits = draw(1, 501, 7, 1.0, torch.float32).cuda()
    with use_backend("reference"):
        wanted = prediction_loss(logits, "marginal")
    torch.testing.assert_close(prediction_loss(logits, "marginal"), wanted)
