"""Name the forms of the adapter that `bench roofline` measures: their inputs, their calls and their least work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rada_fast.bench import costs
from rada_fast.bench.costs import SIZES, Work
from rada_fast.bench.inputs import unit_rows
from rada_fast.bench.roofline_operators import DECAY, KEPT, LR, SCALE, Candidate, Group, product_type
from rada_fast.bench.timing import Call
from rada_fast.config.bench_limits import PREDICTION_CLASSES, BenchRooflineOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import PreparedAdapter, prediction_loss_and_gradient, rational_adapter

PENALTY_WEIGHT = 1.5
KEPT_DECAY = 1 - LR * DECAY
"""The second step of an episode has the first one's inner projections, which only weight decay has changed."""


def adapters(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield the forms of the adapter at each size."""
    for batch, classes in options.sizes:
        for dtype in options.precision:
            forms = AdapterForms(batch, classes, options.embed_dim, dtype, device)
            sizes = {"batch": batch, "classes": classes, "embed_dim": options.embed_dim, "precision": dtype}
            yield Group("adapter", "adapter", sizes, tuple(forms.candidates()))


class AdapterForms:
    """The forms in which the adapter is called, at one size."""

    def __init__(self, batch: int, classes: int, width: int, dtype: str, device: torch.device) -> None:
        self.batch, self.classes, self.width, self.dtype, self.device = batch, classes, width, dtype, device
        self.official, self.paper = AdapterConfig.official(width), AdapterConfig.paper(width)
        self.products = product_type(dtype, device)

    def candidates(self) -> Iterator[Candidate]:
        """Yield all forms."""
        forward, step = self._work(backward=False), self._work(backward=True)
        rows = self.batch * self.classes * self.width
        product = 2 * rows * self.width
        size = SIZES[self.dtype]
        yield Candidate("forward", "the adapter's logits", forward, lambda: self._forward(self.official))
        yield Candidate(
            "forward, paper", "the same with the paper's softmax by rows", forward, lambda: self._forward(self.paper)
        )
        yield Candidate(
            "forward, mask", "the logits and the mask", forward._replace(bytes=forward.bytes + size * rows),
            lambda: self._forward(self.official, return_mask=True),
        )  # fmt: skip
        yield Candidate(
            "forward+backward", "logits, mask penalty and the gradients of all parameters, through autograd", step,
            lambda: self._step(self.official),
        )  # fmt: skip
        yield Candidate(
            "forward+backward, paper", "the same with the paper's softmax by rows", step,
            lambda: self._step(self.paper),
        )  # fmt: skip
        yield Candidate(
            "forward+backward, prepared", "the same as a training calls it, without autograd", step, self._prepared
        )
        # The output projection itself need not be computed, and its gradient is the only one.
        yield Candidate(
            "first step", "forward and backward while the output projection is zero",
            forward._replace(bytes=forward.bytes + size * self.width**2), self._first_step,
        )  # fmt: skip
        # Queries, keys and values of the rational matrix are read instead of three products.
        yield Candidate(
            "second step", "forward and backward with the projections of the first step", Work(
                step.operations - 3 * product, step.bytes + 3 * size * rows, self.products
            ), self._second_step,
        )  # fmt: skip

    def _work(self, *, backward: bool) -> Work:
        formula = costs.step_work if backward else costs.forward_work
        moved = formula(self.official, self.batch, self.classes, dtype=self.dtype).bytes
        operations = costs.least_operations(self.batch, self.classes, self.width)
        if backward:
            operations += costs.least_backward_operations(self.batch, self.classes, self.width)
        return Work(operations, moved, self.products)

    def work_of_episodes(self, episodes: int) -> Work:
        """Return the least work of a step of several episodes, each with parameters of its own."""
        each = costs.step_work(self.official, self.batch // episodes, self.classes, dtype=self.dtype)
        return self._work(backward=True)._replace(bytes=episodes * each.bytes)

    def _inputs(self, config: AdapterConfig) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Draw the features of images and classes, the labels, and the parameters as leaves of autograd."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        adapter = RationalAdapter(config)
        torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.02)
        parameters = {
            name: value.detach().to(self.device, dtype).requires_grad_() for name, value in adapter.named_parameters()
        }
        image, text = (unit_rows(rows, self.width).to(self.device, dtype) for rows in (self.batch, self.classes))
        return image, text, (torch.arange(self.batch) % self.classes).to(self.device), parameters

    def _forward(self, config: AdapterConfig, **options: Any) -> Call:
        image, text, _, parameters = self._inputs(config)
        frozen = {name: value.detach() for name, value in parameters.items()}
        return lambda: rational_adapter(image, text, SCALE, frozen, config, **options)

    def _step(self, config: AdapterConfig) -> Call:
        image, text, labels, parameters = self._inputs(config)
        leaves = list(parameters.values())

        def call() -> Any:
            output = rational_adapter(image, text, SCALE, parameters, config, penalty="l2")
            return torch.autograd.grad(_loss(output, labels), leaves)

        return call

    def _prepared(self) -> Call:
        image, text, labels, parameters = self._inputs(self.official)
        prepared = PreparedAdapter(text, SCALE, parameters, self.official, penalty="l2", wanted=list(parameters))
        weight = torch.full((), PENALTY_WEIGHT, device=self.device, dtype=image.dtype)

        def call() -> Any:
            output, pullback = prepared(image)
            _, dlogits = prediction_loss_and_gradient(output.logits, "cross_entropy", labels=labels)
            return pullback(dlogits, weight)

        return call

    def _first_step(self) -> Call:
        image, text, labels, parameters = self._inputs(self.official)
        parameters = {name: value.detach() for name, value in parameters.items()}
        output_names = [name for name in parameters if name.startswith("out_proj.")]
        leaves = [parameters[name].zero_().requires_grad_() for name in output_names]

        def call() -> Any:
            output = rational_adapter(
                image, text, SCALE, parameters, self.official, penalty="l2", output_is_zero=True, keep_projected=True
            )
            return torch.autograd.grad(_loss(output, labels), leaves)

        return call

    def _second_step(self) -> Call:
        image, text, labels, parameters = self._inputs(self.official)
        leaves = list(parameters.values())
        first = rational_adapter(image, text, SCALE, parameters, self.official, keep_projected=True)
        assert first.projected is not None
        projected = first.projected.scaled(KEPT_DECAY)

        def call() -> Any:
            output = rational_adapter(image, text, SCALE, parameters, self.official, penalty="l2", projected=projected)
            return torch.autograd.grad(_loss(output, labels), leaves)

        return call

    def step_of_episodes(self, episodes: int) -> Call:
        """Return a step of several episodes whose images the batch consists of, each with its own parameters."""
        image, text, labels, parameters = self._inputs(self.official)
        own = {
            name: value.detach().expand(episodes, *value.shape).contiguous().requires_grad_()
            for name, value in parameters.items()
        }
        leaves = list(own.values())

        def call() -> Any:
            output = rational_adapter(image, text, SCALE, own, self.official, penalty="l2", episodes=episodes)
            return torch.autograd.grad(_loss(output, labels), leaves)

        return call


def _loss(output: Any, labels: Tensor) -> Tensor:
    return cross_entropy(output.logits.float(), labels) + PENALTY_WEIGHT * output.penalty.sum()


def episodes(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield the adapter with parameters of its own in each episode."""
    width, classes = options.embed_dim, (options.classes or PREDICTION_CLASSES)[0]
    for count in options.episodes:
        for dtype in options.precision:
            forms = AdapterForms(count * KEPT, classes, width, dtype, device)
            work = forms.work_of_episodes(count)
            inside = "the adapter's forward and backward pass for several episodes with parameters of their own"
            sizes = {
                "batch": forms.batch, "episodes": count, "classes": classes, "embed_dim": width, "precision": dtype
            }  # fmt: skip
            make = partial(forms.step_of_episodes, count)
            yield Group("episodes", "adapter", sizes, (Candidate("forward+backward, episodes", inside, work, make),))
