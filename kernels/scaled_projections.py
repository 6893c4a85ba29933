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

BLOCK = 2048


@triton.jit
def _scale_part(source, out, program, elements, scale, BLOCK: tl.constexpr):
    """Store the scaled elements of one block of a tensor."""
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < elements, other=0.0).to(tl.float32) * scale
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < elements)


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
    elements,
    text_elements,
    image_elements,
    num_counters,
    scale,
    BLOCK: tl.constexpr,
):
    """Scale a block of one of the projections. The first program also sets the counters to zero.

    Axis 0 of the grid: blocks of the keys, the values and the rational queries, of elements each, then of the text
    queries, then of the image queries.
    """
    program = tl.program_id(0)
    for first in range(0, tl.where(program == 0, num_counters, 0), 1024):
        counter = first + tl.arange(0, 1024)
        tl.store(counters + counter, tl.zeros((1024,), tl.int32), mask=counter < num_counters)
    blocks = tl.cdiv(elements, BLOCK)
    outputs: tl.constexpr = 2 if q_rational is None else 3
    text_blocks = tl.cdiv(text_elements, BLOCK)
    if program < outputs * blocks:
        output = program // blocks
        source, out = keys, scaled_keys
        if output == 1:
            source, out = values, scaled_values
        if q_rational is not None:
            if output == 2:
                source, out = q_rational, scaled_q_rational
        _scale_part(source, out, program % blocks, elements, scale, BLOCK)
    elif program < outputs * blocks + text_blocks:
        if q_text is not None:
            _scale_part(q_text, scaled_q_text, program - outputs * blocks, text_elements, scale, BLOCK)
    elif q_image is not None:
        _scale_part(
            q_image, scaled_q_image, program - outputs * blocks - text_blocks, image_elements, scale, BLOCK
        )  # fmt: skip


@remembered
def _launch(
    outputs: int, elements: int, text_elements: int, image_elements: int, num_counters: int, scale: float
) -> Launch:
    programs = outputs * cdiv(elements, BLOCK) + cdiv(text_elements, BLOCK) + cdiv(image_elements, BLOCK)
    return scaled_projections_kernel.launch(
        (programs,), elements=elements, text_elements=text_elements, image_elements=image_elements,
        num_counters=num_counters, scale=scale, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip


def _elements(value: Tensor | None) -> int:
    return 0 if value is None else value.numel()


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
    elements = _elements(projections.keys)
    if elements == 0:
        return scaled
    launch = _launch(
        2 + (projections.q_rational is not None), elements, _elements(projections.q_text),
        _elements(projections.q_image), len(counters), scale,
    )  # fmt: skip
    launch(**vars(projections), **{f"scaled_{name}": value for name, value in vars(scaled).items()}, counters=counters)
    return scaled
