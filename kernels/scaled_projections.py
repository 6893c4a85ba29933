"""Scale the projections of an earlier call, for parameters that are the earlier ones times a factor.

A projection is linear in its weight and its bias together, so keys, values and queries are scaled as the parameters
are. The first step from an output projection of zeros changes all other parameters by weight decay alone. The second
step then needs none of their products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import cdiv
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels.rational_projections import ProjectionBuffers

LINE = 32
"""The elements of a line. Widths are multiples of it, so whole lines are loaded and stored at once."""
LINES = 64
"""The lines of a block."""


@triton.jit
def _scale_part(source, out, program, lines, scale, LINE: tl.constexpr, LINES: tl.constexpr):
    """Store the scaled elements of one block of lines of a tensor."""
    line = program * LINES + tl.arange(0, LINES)
    offsets = line.to(tl.int64)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    valid = (line < lines)[:, None]
    values = tl.load(source + offsets, mask=valid, other=0.0).to(tl.float32) * scale
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=valid)


@Kernel
def scaled_projections_kernel(
    keys,
    values,
    q_rational,
    q_text,
    q_image,
    scaled_keys,
    scaled_values,
    scaled_q_rational,
    scaled_q_text,
    scaled_q_image,
    counters,
    lines,
    text_lines,
    image_lines,
    num_counters,
    scale,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
):
    """Scale a block of one of the projections. The first program also sets the counters to zero.

    Axis 0 of the grid: blocks of the keys, the values and the rational queries, of `lines` lines each, then of the text
    queries, then of the image queries.
    """
    program = tl.program_id(0)
    for first in range(0, tl.where(program == 0, num_counters, 0), 1024):
        counter = first + tl.arange(0, 1024)
        tl.store(counters + counter, tl.zeros((1024,), tl.int32), mask=counter < num_counters)
    blocks = tl.cdiv(lines, LINES)
    outputs: tl.constexpr = 2 if q_rational is None else 3
    text_blocks = tl.cdiv(text_lines, LINES)
    if program < outputs * blocks:
        output = program // blocks
        source, out = keys, scaled_keys
        if output == 1:
            source, out = values, scaled_values
        if q_rational is not None:
            if output == 2:
                source, out = q_rational, scaled_q_rational
        _scale_part(source, out, program % blocks, lines, scale, LINE, LINES)
    elif program < outputs * blocks + text_blocks:
        if q_text is not None:
            _scale_part(q_text, scaled_q_text, program - outputs * blocks, text_lines, scale, LINE, LINES)
    elif q_image is not None:
        _scale_part(
            q_image, scaled_q_image, program - outputs * blocks - text_blocks, image_lines, scale, LINE, LINES
        )  # fmt: skip


@remembered
def _launch(outputs: int, lines: int, text_lines: int, image_lines: int, num_counters: int, scale: float) -> Launch:
    programs = outputs * cdiv(lines, LINES) + cdiv(text_lines, LINES) + cdiv(image_lines, LINES)
    return scaled_projections_kernel.launch(
        (programs,), lines=lines, text_lines=text_lines, image_lines=image_lines, num_counters=num_counters,
        scale=scale, LINE=LINE, LINES=LINES, num_warps=4, num_stages=1,
    )  # fmt: skip


def _lines(value: Tensor | None) -> int:
    return 0 if value is None else value.numel() // LINE


def scaled_projections(projections: ProjectionBuffers, scale: float, counters: Tensor) -> ProjectionBuffers:
    """Return the projections times a factor, in one launch.

    projections: the results of rational_projections_forward. scale: the factor.
    counters: int32, set to zero for the launches that follow (see _common.is_last_to_finish).
    """

    def empty(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.empty_like(value)

    scaled = ProjectionBuffers(
        keys=empty(projections.keys),
        values=empty(projections.values),
        q_rational=empty(projections.q_rational),
        q_text=empty(projections.q_text),
        q_image=empty(projections.q_image),
    )
    lines = _lines(projections.keys)
    if lines == 0:
        return scaled
    launch = _launch(
        2 + (projections.q_rational is not None), lines, _lines(projections.q_text),
        _lines(projections.q_image), len(counters), scale,
    )  # fmt: skip
    launch(**vars(projections), **{f"scaled_{name}": value for name, value in vars(scaled).items()}, counters=counters)
    return scaled
