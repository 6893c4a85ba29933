"""Compute what the parts of the method cost at the least, in operations and bytes; measurements are compared with it.

A multiply-add counts as two operations. Sizes are the method's own: B images, K classes, width D, E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rada_fast.config.method import AdapterConfig

BACKWARD = 2.5
"""The backward pass of the adapter takes this many times the operations of its forward pass."""
OPTIMIZER_PASSES = 7
"""AdamW moves this many times the parameters' bytes: it reads them, their gradients and two moments of each, and writes
all of these but the gradients."""

ADAMW_OPERATIONS = 14
"""A step of AdamW takes so many operations for a parameter: one for weight decay, three and four for the two moments,
three for the denominator and three for the update."""
SELECTION_OPERATIONS = 6
"""The entropy of a prediction takes so many operations for a logit: the maximum, a difference, an exponential, and the
sums of the exponentials and of their products with the differences."""
LOSS_OPERATIONS = {"mean": 10, "marginal": 10, "cross_entropy": 8}
"""A loss with its gradient takes about so many operations for a logit, by its kind, an exponential counted as one."""
FILTER_TAPS = 2
"""A bilinear filter reads so many pixels for each that it writes, and more in proportion where a box shrinks."""


class Work(NamedTuple):
    """The operations, as a rule those of matrix products, and the bytes that something must at least compute, read and
    write.

    dtype: the type of the products.
    """

    operations: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"


def least_operations(batch: int, classes: int, width: int) -> int:
    """Return F_min = B (8 K D^2 + 6 K^2 D), the operations of the products of one forward pass of the adapter."""
    return batch * (8 * classes * width**2 + 6 * classes**2 * width)


def least_backward_operations(batch: int, classes: int, width: int) -> int:
    """Return B (10 K D^2 + 12 K^2 D), below which no backward pass to the gradients of all parameters comes.

    The output projection takes two products of 2 K D^2. The projections to queries, keys and values take one each,
    because the features need no gradient. Each of the attention's three products takes two, if the probabilities are
    kept, which needs memory for K^2 numbers. The operators compute the scores again instead, so that they execute
    more, and BACKWARD counts more.
    """
    return batch * (10 * classes * width**2 + 12 * classes**2 * width)


def step_elements(config: AdapterConfig, batch: int, classes: int, *, backward: bool) -> int:
    """Return the elements that one pass of the adapter must read or write, if all tensors between stay on the chip.

    These are the parameters and the features, read once, and the logits, written once; with the backward pass also the
    gradients of the parameters, written once.
    """
    width = config.embed_dim
    parameters = adapter_parameters(config)
    return parameters * (2 if backward else 1) + (batch + classes) * width + batch * classes


def literal_bytes(config: AdapterConfig, batch: int, classes: int) -> int:
    """Return about how much memory the literal baseline needs: six float32 tensors of K x K per image and head."""
    return 6 * 4 * batch * config.num_heads * classes**2


def step_work(config: AdapterConfig, batch: int, classes: int, *, dtype: str = "float32") -> Work:
    """Return the work of one forward and backward pass of the adapter with all gradients of its parameters."""
    operations = (1 + BACKWARD) * least_operations(batch, classes, config.embed_dim)
    return Work(operations, SIZES[dtype] * step_elements(config, batch, classes, backward=True), dtype)


def forward_work(config: AdapterConfig, batch: int, classes: int, *, dtype: str = "float32") -> Work:
    """Return the work of one forward pass of the adapter."""
    operations = least_operations(batch, classes, config.embed_dim)
    return Work(operations, SIZES[dtype] * step_elements(config, batch, classes, backward=False), dtype)


def optimizer_work(parameters: int) -> Work:
    """Return the work of one step of AdamW on so many parameters in float32; it has no products."""
    return Work(0.0, OPTIMIZER_PASSES * 4 * parameters)


def adapter_parameters(config: AdapterConfig) -> int:
    """Return the number of the parameters of an adapter with one attention layer."""
    return 6 * (config.embed_dim**2 + (config.embed_dim if config.bias else 0))


def episode_work(config: AdapterConfig, views: int, selected: int, steps: int, classes: int) -> tuple[Work, ...]:
    """Return the work of one episode that starts with output projections of zero, part by part.

    All views are selected from by their zero-shot logits, 2 V K D operations. The first step has one forward pass of
    the selected views, F_min(n), and of its backward pass only the product 2 n K D^2 for the output projection. The
    other steps have 3.5 F_min(n), but the second one scales the first one's projections instead of three products of
    2 n K D^2. After each step the optimiser goes through all parameters. The original view is predicted, F_min(1).
    """
    width = config.embed_dim
    forward, product = least_operations(selected, classes, width), 2 * selected * classes * width**2
    parts = [Work(2 * views * classes * width, 4 * (views + classes) * width)]
    for step in range(steps):
        operations = forward + product if step == 0 else (1 + BACKWARD) * forward - (3 * product if step == 1 else 0)
        parts.append(Work(operations, 4 * step_elements(config, selected, classes, backward=True)))
        parts.append(optimizer_work(adapter_parameters(config)))
    return (*parts, forward_work(config, 1, classes))


def view_operations(boxes: Sequence[tuple[int, int]], size: int) -> float:
    """Return the operations of resizing boxes of a picture to size x size pixels of three channels, and normalising.

    One direction after the other is resized, the cheaper order counts, and a multiply-add counts as two.

    boxes: the height and the width of each box in pixels.
    """
    total = 0.0
    for height, width in boxes:
        down, across = (FILTER_TAPS * max(1.0, side / size) for side in (height, width))
        passes = min(height * across + size * down, width * down + size * across)
        total += 3 * size * (2 * passes + 2 * size)
    return total


SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of a number of each type."""
