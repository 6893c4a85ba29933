"""Name every operator of this package that `bench roofline` measures: its inputs, its call and its least work.

The bytes of a work are those of the inputs and results, each counted once. Operations are those of matrix products; in
operators without products they are additions, multiplications, comparisons and exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rada_fast import _env
from rada_fast.bench import costs
from rada_fast.bench.costs import SIZES, Work
from rada_fast.bench.encoder import transformer_multiply_adds
from rada_fast.bench.inputs import PHOTO_SIZE, unit_rows
from rada_fast.bench.timing import Call
from rada_fast.bench.views import MEAN, STD
from rada_fast.config.bench_limits import PREDICTION_CLASSES, BenchRooflineOptions, RooflineOperator
from rada_fast.config.method import AdapterConfig
from rada_fast.embedded.model import build_model
from rada_fast.errors import BackendUnavailableError
from rada_fast.models.image_encoder import SmallVisionTransformer
from rada_fast.modules import RationalAdapter
from rada_fast.ops import (
    EpisodicOptimizer,
    augmix,
    encoder_attention,
    gather_views,
    keep_views,
    multi_view_crops,
    prediction_loss,
    prediction_loss_and_gradient,
    random_augmix,
    random_views,
    select_views,
    whole_view,
    zero_shot_logits,
)
from rada_fast.ops.prediction_losses import LossKind

SCALE = 100.0
KEPT = 6
"""The confident views of an episode, a tenth of 64."""
PATCH, ENCODER_WIDTH, ENCODER_HEADS = 16, 768, 12
"""The sizes of ViT-B/16, at which the attention of an image encoder is measured."""
LR, DECAY = 8e-4, 0.01

Kind = Literal["adapter", "tensor", "host"]
"""What serves an operator: the adapter's kernels, the kernels of the tensor's device, or the CPU on every device."""


class Candidate(NamedTuple):
    """An operator in one form.

    name: its name in the table; inside: what it computes, in words.
    work: the least work of a call.
    make: draws the inputs and returns the call. It may raise an error that says why the operator cannot serve here.
    """

    name: str
    inside: str
    work: Work
    make: Callable[[], Call]


class Group(NamedTuple):
    """Operators that are measured in turn, at the same sizes.

    operator: what --only names; kind: what serves them; sizes: the sizes, by the names that all lines of figures have.
    label: what the name of the setting says besides its sizes.
    """

    operator: RooflineOperator
    kind: Kind
    sizes: dict[str, Any]
    candidates: tuple[Candidate, ...]
    label: str = ""


def product_type(dtype: str, device: torch.device) -> str:
    """Return the type in which an operator multiplies: float32 where a processor has no products of the type."""
    return dtype if device.type != "cpu" or _env.has_native_products(dtype) else "float32"


def selections(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    width, views = options.embed_dim, options.views
    kept = min(KEPT, views)
    for episodes in options.episodes:
        for classes in options.classes or PREDICTION_CLASSES:
            for dtype in options.precision:
                yield from _selection(episodes, views, kept, classes, width, dtype, device)


def _selection(
    episodes: int, views: int, kept: int, classes: int, width: int, dtype: str, device: torch.device
) -> Iterator[Group]:
    size, kind = SIZES[dtype], getattr(torch, dtype)
    logits_count, products = episodes * views * classes, product_type(dtype, device)

    def logits() -> Tensor:
        torch.manual_seed(0)
        return (10 * torch.randn(episodes, views, classes)).to(device, kind)

    def features() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        rows = (unit_rows(episodes, views, width), unit_rows(classes, width))
        return rows[0].to(device, kind), rows[1].to(device, kind)

    def select() -> Call:
        given = logits()
        return lambda: select_views(given, kept)

    def gather() -> Call:
        own, _ = features()
        indices = torch.arange(kept, device=device).expand(episodes, kept).contiguous()
        return lambda: gather_views(own, indices)

    def keep() -> Call:
        own, text = features()
        return lambda: keep_views(own, text, SCALE, kept)

    def zero_shot() -> Call:
        own, text = features()
        rows = own.flatten(0, 1)
        return lambda: zero_shot_logits(rows, text, SCALE)

    feature_count = (episodes * views + classes) * width
    answers = episodes * (views * 4 + kept * 8)
    sizes = {"episodes": episodes, "views": views, "classes": classes, "embed_dim": width, "precision": dtype}
    entropies = Work(costs.SELECTION_OPERATIONS * logits_count, size * logits_count + answers)
    product = Work(2 * logits_count * width, size * (feature_count + logits_count), products)
    both = Work(
        product.operations + entropies.operations,
        size * (feature_count + episodes * ((kept + 1) * width + classes)),
        products,
    )
    yield Group(
        "selection", "tensor", sizes,
        (
            Candidate("select_views", "logits to the indices of the confident views", entropies, select),
            Candidate(
                "gather_views", "the features of these views",
                Work(0, episodes * (2 * kept * width * size + kept * 8)), gather,
            ),
        ),
    )  # fmt: skip
    yield Group(
        "selection", "adapter", sizes,
        (
            Candidate("zero_shot_logits", "features to CLIP's logits", product, zero_shot),
            Candidate("keep_views", "features to the confident views and the original's logits", both, keep),
        ),
        "with products",
    )  # fmt: skip


def losses(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    for episodes in options.episodes:
        for classes in options.classes or PREDICTION_CLASSES:
            for dtype in options.precision:
                kinds: tuple[LossKind, ...] = ("mean", "marginal", "cross_entropy")
                candidates = [form for kind in kinds for form in _loss_forms(kind, episodes, classes, dtype, device)]
                sizes = {"episodes": episodes, "views": KEPT, "classes": classes, "precision": dtype}
                yield Group("losses", "tensor", sizes, tuple(candidates))


def _loss_forms(
    kind: LossKind, episodes: int, classes: int, dtype: str, device: torch.device
) -> tuple[Candidate, Candidate]:
    count = episodes * KEPT * classes
    work = Work(costs.LOSS_OPERATIONS[kind] * count, 2 * SIZES[dtype] * count)

    def inputs() -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        logits = (3 * torch.randn(episodes, KEPT, classes)).to(device, getattr(torch, dtype))
        labels = torch.randint(classes, (episodes, KEPT)).to(device)
        return logits, {"labels": labels, "label_smoothing": 0.1} if kind == "cross_entropy" else {}

    def direct() -> Call:
        logits, given = inputs()
        return lambda: prediction_loss_and_gradient(logits, kind, **given)

    def through_autograd() -> Call:
        logits, given = inputs()
        logits.requires_grad_()
        return lambda: torch.autograd.grad(prediction_loss(logits, kind, **given).sum(), logits)

    return (
        Candidate(f"{kind} loss", "the loss and its gradient in one call", work, direct),
        Candidate(f"{kind} loss, autograd", "the loss, then its gradient through autograd", work, through_autograd),
    )


def optimizers(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield the steps of the optimiser of several episodes."""
    for episodes in options.episodes:
        sizes = {"episodes": episodes, "embed_dim": options.embed_dim, "precision": "float32"}
        config = AdapterConfig.official(options.embed_dim)
        yield Group("optimizer", "tensor", sizes, _optimizer_forms(config, episodes, device))


def _optimizer_forms(config: AdapterConfig, episodes: int, device: torch.device) -> tuple[Candidate, ...]:
    count = costs.adapter_parameters(config)
    output = count // 6

    def inputs(*, torch_roots: bool = False) -> tuple[EpisodicOptimizer, dict[str, Tensor]]:
        torch.manual_seed(0)
        shapes = {name: value.shape for name, value in RationalAdapter(config, device="meta").named_parameters()}
        initial = {name: 0.02 * torch.randn(shape, device=device) for name, shape in shapes.items()}
        gradients = {name: 0.01 * torch.randn(episodes, *shape, device=device) for name, shape in shapes.items()}
        return EpisodicOptimizer(initial, episodes, lr=LR, weight_decay=DECAY, torch_roots=torch_roots), gradients

    def later(*, torch_roots: bool = False) -> Call:
        optimizer, gradients = inputs(torch_roots=torch_roots)
        return lambda: optimizer.step(gradients)

    def first(*, output_only: bool = False) -> Call:
        optimizer, gradients = inputs()
        given = {name: value for name, value in gradients.items() if not output_only or name.startswith("out_proj.")}

        def call() -> None:
            optimizer.reset()
            optimizer.step(given)

        return call

    every = costs.optimizer_work(episodes * count)
    every = every._replace(operations=costs.ADAMW_OPERATIONS * episodes * count)
    # The initial values are read once for all episodes, and the moments are written only.
    fresh = every._replace(bytes=4 * (count + 4 * episodes * count))
    # A parameter without a gradient only decays, in one copy for all episodes.
    started = Work(
        costs.ADAMW_OPERATIONS * episodes * output + count - output,
        4 * (output + 4 * episodes * output + 2 * (count - output)),
    )
    roots, alone = partial(later, torch_roots=True), partial(first, output_only=True)
    only = "the same where only the output projection has a gradient"
    return (
        Candidate("AdamW, later step", "a step of all parameters", every, later),
        Candidate("AdamW, PyTorch's roots", "the same with PyTorch's square roots", every, roots),
        Candidate("AdamW, first step", "a step from the initial parameters", fresh, first),
        Candidate("AdamW, first of an episode", only, started, alone),
    )


def views(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield drawing and cutting the views of a picture."""
    (width, height), size, count = PHOTO_SIZE, options.image_size, options.views

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def pixels() -> Tensor:
        return torch.randint(256, (height, width, 3), generator=generator(), dtype=torch.uint8).to(device)

    plan = random_views(height, width, size, count, generator(), backend="reference")
    drawn, backend = generator(), "cpu" if options.backend == "compiled" else "reference"
    mixed = random_augmix(height, width, size, count, generator(), backend="reference")
    pixel_bytes = height * width * 3
    sizes = {"views": count, "image_size": size}

    def crops(dtype: str) -> Candidate:
        written = SIZES[dtype] * count * 3 * size**2
        name = f"crops, {dtype}"

        def make() -> Call:
            own = [pixels()]
            return lambda: multi_view_crops(own, plan, size, MEAN, STD, dtype=getattr(torch, dtype))

        work = Work(costs.view_operations(_boxes(plan), size), pixel_bytes + plan.nbytes + written)
        return Candidate(name, "a decoded picture to normalised random crops", work, make)

    def mixing() -> Call:
        own = [pixels()]
        return lambda: augmix(own, mixed, size, MEAN, STD)

    outputs = 4 * count * 3 * size**2
    tables = sum(tensor.nbytes for tensor in mixed)
    # Each value is a sum over the view and its chains. What the operations of the chains compute is not counted.
    least = costs.view_operations(_boxes(mixed.views), size) + 2 * mixed.weights.shape[1] * count * 3 * size**2
    cut = (
        *(crops(dtype) for dtype in options.precision),
        Candidate("AugMix", "a decoded picture to AugMix's views", Work(least, pixel_bytes + tables + outputs), mixing),
    )
    yield Group("views", "tensor", sizes, cut)
    yield Group(
        "views", "host", sizes,
        (
            Candidate(
                "random_views", "drawing the boxes of random crops", Work(0, plan.nbytes),
                lambda: partial(random_views, height, width, size, count, drawn, backend=backend),
            ),
            Candidate(
                "random_augmix", "drawing boxes and AugMix's operations", Work(0, tables),
                lambda: partial(random_augmix, height, width, size, count, drawn, backend=backend),
            ),
            Candidate(
                "whole_view", "the box of the original", Work(0, plan[:1].nbytes),
                lambda: partial(whole_view, height, width, size),
            ),
        ),
        "drawing",
    )  # fmt: skip


def _boxes(views: Tensor) -> list[tuple[int, int]]:
    """Return the height and the width of each box of a table of views."""
    boxes: Sequence[Sequence[int]] = views[:, 3:5].tolist()
    return [(height, width) for height, width in boxes]


def attentions(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield the attention of a layer of ViT-B/16: of all tokens, and of the pooled one alone."""
    tokens, views = (options.image_size // PATCH) ** 2 + 1, options.views
    for dtype in options.precision:

        def form(name: str, inside: str, queries: int, dtype: str = dtype) -> Candidate:
            def make() -> Call:
                torch.manual_seed(0)
                shapes = [(views, length, ENCODER_WIDTH) for length in (queries, tokens, tokens)]
                given = [torch.randn(shape).to(device, getattr(torch, dtype)) for shape in shapes]
                if options.backend == "compiled":
                    # The public function leaves what the operator refuses to PyTorch's own attention.
                    torch.ops.rada_fast.encoder_attention(*given, ENCODER_HEADS)

                def call() -> Tensor:
                    with torch.no_grad():
                        return encoder_attention(given[0], given[1], given[2], ENCODER_HEADS)

                return call

            elements = views * (2 * queries + 2 * tokens) * ENCODER_WIDTH
            operations = 4 * views * queries * tokens * ENCODER_WIDTH
            return Candidate(name, inside, Work(operations, SIZES[dtype] * elements, product_type(dtype, device)), make)

        forms = (
            form("encoder_attention", "the attention of one layer of ViT-B/16", tokens),
            form("encoder_attention, pooled", "the same for the pooled token alone", 1),
        )
        sizes = {"views": views, "image_size": options.image_size, "precision": dtype}
        yield Group("encoder-attention", "tensor", sizes, forms)


def small_transformers(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield the encoder of the embedded model, whose layers fit into a core's cache."""
    torch.manual_seed(0)
    visual = build_model().eval().requires_grad_(requires_grad=False).visual
    height, width = visual.image_size
    weights = sum(parameter.nbytes for parameter in visual.parameters())
    views = options.views
    work = Work(
        2.0 * views * transformer_multiply_adds(visual, pooled_only=True), weights + 4 * views * 3 * height * width
    )

    def make() -> Call:
        if options.backend == "reference":
            raise BackendUnavailableError("open_clip's own module is measured by `rada-fast bench encoder`")
        encode, images = SmallVisionTransformer(visual), torch.randn(views, 3, height, width)
        return lambda: encode(images)

    factor = visual.transformer.resblocks[0].mlp.c_fc.weight.detach().T

    def arrange() -> Call:
        if options.backend == "reference":
            raise BackendUnavailableError("plain PyTorch needs no such arrangement")
        return lambda: torch.ops.rada_fast.panels_of(factor)

    forms = (
        Candidate("small_transformer", "the embedded model's images to features", work, make),
        Candidate("panels_of", "arranging a layer's weight for it", Work(0, 2 * factor.nbytes), arrange),
    )
    sizes = {"views": views, "image_size": height, "precision": "float32"}
    yield Group("small-transformer", "host", sizes, forms)
