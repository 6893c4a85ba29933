"""The Triton backend: registered operators around the launchers in kernels/, what they serve, their gradients.

The operators run on CUDA tensors; on CPU tensors only where something executes Triton kernels there: its interpreter,
or a simulator that has taken the place of its launcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from rada_fast import _env
from rada_fast.config.method import ROLES, AdapterConfig, MaskPenalty
from rada_fast.kernels.class_attention import Attended, class_attention_backward, class_attention_forward
from rada_fast.kernels.masked_logits import masked_logits_backward, masked_logits_forward
from rada_fast.kernels.parameter_gradients import parameter_gradients
from rada_fast.kernels.rational_projections import (
    ProjectionBuffers,
    rational_projections_backward,
    rational_projections_forward,
)
from rada_fast.ops._backends.cpu import compute_dtype
from rada_fast.ops._backends.tiles import Sizes, chosen_tile
from rada_fast.ops._backends.transforms import refuse_second_derivative
from rada_fast.reference.rational_adapter import AdapterOutput
from rada_fast.reference.rational_projections import as_scale

_SERVED = (torch.float32, torch.bfloat16, torch.float16)

_INPUTS = "Tensor image, Tensor text, Tensor scale, " + ", ".join(
    f"Tensor? {role}_{part}" for role in ROLES for part in ("weight", "bias")
)
_OPTIONS = (
    "int episodes, int heads, float temperature, bool matrix, float factor, bool relu, str penalty, "
    "ScalarType compute, str precision"
)
_KEPT = (
    "keys", "values", "q_rational", "q_text", "q_image", "o_text", "o_rational", "o_image", "logsums",
    "image_logsums", "factors", "totals", "peaks", "sums",
)  # fmt: skip
_COUNT = 3 + 2 * len(ROLES)
_OPTION_COUNT = len(_OPTIONS.split(","))

_library = torch.library.Library("rada_fast", "FRAGMENT")
_library.define(
    f"rational_adapter_triton({_INPUTS}, {_OPTIONS}, bool return_mask, bool keep) -> "
    f"({', '.join(['Tensor'] * (3 + len(_KEPT)))})"
)
_library.define(
    f"rational_adapter_triton_backward(Tensor? dlogits, Tensor? dpenalty, Tensor? dmask, {_INPUTS}, {_OPTIONS}, "
    f"{', '.join(f'Tensor {name}' for name in _KEPT)}, bool[] needed) -> "
    f"({', '.join(['Tensor'] * (_COUNT - 1))})"
)


def executes_on_cpu() -> bool:
    """Whether kernels launched with CPU tensors run: under Triton's interpreter or a simulator."""
    return (
        bool(triton.knobs.runtime.interpret)
        or triton.runtime.jit.JITFunction.run.__module__ != triton.runtime.jit.__name__
    )


def float32_precision() -> str:
    """tl.dot's input_precision for float32: RADA_FAST_FLOAT32, else after torch.set_float32_matmul_precision."""
    if asked := _env.float32_products():
        return asked
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# torch.compile takes the answers as they are when it traces, see extension.py.
_functions: list[Any] = [executes_on_cpu, float32_precision]
for _function in _functions:
    _function._dynamo_marked_constant = True


def reason_unavailable() -> str | None:
    if _env.has_cuda() or executes_on_cpu():
        return None
    return "no CUDA device is visible"


def reason_not_served(
    config: AdapterConfig,
    image_features: Tensor,
    text_features: Tensor,
    parameters: Mapping[str, Tensor],
    episodes: int | None = None,
) -> str | None:
    """Why the Triton operator cannot serve a call, or None where it can."""
    device = image_features.device.type
    if device != "cuda" and not (device == "cpu" and executes_on_cpu()):
        return f"it serves CUDA tensors, image_features are on {image_features.device}"
    if config.mask_function != "attention":
        return f"it serves mask_function 'attention', not {config.mask_function!r}"
    if config.num_layers > 1 and episodes is not None:
        return f"it serves episodes with num_layers 1, not {config.num_layers}"
    if config.embed_dim % 32 or config.head_dim % 8:
        return (
            "it serves widths that are multiples of 32 with heads that are multiples of 8, "
            f"not {config.embed_dim} with {config.head_dim}"
        )
    weight = parameters["out_proj.weight"]
    dtype = compute_dtype(image_features, weight)
    for name, given in (("products", dtype), ("image_features", image_features.dtype), ("parameters", weight.dtype)):
        if given not in _SERVED:
            return f"it serves float32, bfloat16 and float16, not {name} in {str(given).removeprefix('torch.')}"
    if not torch.is_autocast_enabled(device) and image_features.dtype != dtype:
        return f"it serves image_features in the parameters' type {dtype}, not {image_features.dtype}"
    if any(value.dtype != weight.dtype for value in parameters.values()):
        return "it serves parameters of one type"
    return None


def _filled(value: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors: a fresh empty one stands for what is absent."""
    return like.new_empty((0,)) if value is None else value


def _given(value: Tensor) -> Tensor | None:
    return None if value.ndim == 1 and value.numel() == 0 else value


def _by_role(parameters: tuple[Tensor | None, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, biases = {}, {}
    for role, weight, bias in zip(ROLES, parameters[::2], parameters[1::2], strict=True):
        if weight is not None:
            weights[role] = weight.contiguous()
        if bias is not None:
            biases[role] = bias.contiguous()
    return weights, biases


def _tile_of(
    image: Tensor, text: Tensor, episodes: int, heads: int, compute: torch.dtype, precision: str
) -> Callable[[str], Any | None]:
    """Of a launch's name, the tile measured on this device, or None."""
    (batch, width), classes = image.shape, text.shape[0]
    sizes = Sizes(compute, classes, batch // episodes * classes, width, width // heads, precision)
    return lambda launch: chosen_tile(image.device, launch, sizes)


def _forward(image: Tensor, text: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters = rest[: 2 * len(ROLES)]
    episodes, heads, temperature, matrix, factor, relu, penalty, compute, precision, return_mask, keep = rest[
        2 * len(ROLES) :
    ]
    weights, biases = _by_role(parameters)
    output, bias = weights.pop("output"), biases.pop("output", None)
    image, text = image.contiguous(), text.contiguous()
    common = {"episodes": episodes, "dtype": compute, "precision": precision}
    tile = _tile_of(image, text, episodes, heads, compute, precision)
    with torch.cuda.device_of(image):
        made = rational_projections_forward(
            image,
            text,
            scale,
            weights,
            biases,
            scale_factor=factor,
            tile=tile("rational_projections_forward"),
            **common,
        )
        seen = class_attention_forward(
            made, num_heads=heads, temperature=temperature, matrix=matrix, precision=precision,
            tile=tile("class_attention_forward"),
        )  # fmt: skip
        result = masked_logits_forward(
            image, text, scale, seen, output, bias, num_heads=heads, relu=relu, penalty=penalty,
            return_mask=return_mask, tile=tile("masked_logits_forward"), **common,
        )  # fmt: skip
    kept: tuple[Tensor | None, ...] = (
        made.keys, made.values, made.q_rational, made.q_text, made.q_image, seen.text, seen.rational, seen.image,
        seen.logsums, seen.image_logsums, seen.factors, seen.totals, result.peaks, result.sums,
    )  # fmt: skip
    if not keep:
        kept = (None,) * len(kept)
    return tuple(_filled(value, image) for value in (result.logits, result.penalty, result.mask, *kept))


def _forward_fake(image: Tensor, text: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters = rest[: 2 * len(ROLES)]
    episodes, heads, _, matrix, _, _, penalty, compute, _, return_mask, keep = rest[2 * len(ROLES) :]
    (batch, width), classes = image.shape, text.shape[0]
    image_on, text_on, rational_on = (parameters[2 * at] is not None for at in range(3))
    key = parameters[6]
    assert key is not None
    shared = 1 if key.ndim == 2 else episodes
    wide, exact = (batch, classes, width), torch.float32
    shapes: list[tuple[Any, torch.dtype] | None] = [
        ((batch, classes), image.dtype),
        ((episodes,), image.dtype) if penalty != "none" else None,
        (wide, image.dtype) if return_mask else None,
    ]
    kept: list[tuple[Any, torch.dtype] | None] = [
        (wide, compute),
        (wide, compute),
        (wide, compute) if rational_on else None,
        ((shared, classes, width), compute) if text_on else None,
        ((batch, width), exact) if image_on else None,
        (wide, compute) if text_on else None,
        (wide, compute) if rational_on else None,
        ((batch, width), exact) if image_on else None,
        ((2, heads, batch, classes), exact),
        ((batch, heads), exact),
        ((2, heads, batch, classes), exact) if matrix else None,
        ((2, heads, batch), exact) if matrix else None,
        ((batch,), torch.int64) if penalty == "linf" else None,
        ((batch, classes), exact),
    ]
    shapes += kept if keep else [None] * len(kept)
    return tuple(
        image.new_empty((0,)) if shape is None else image.new_empty(shape[0], dtype=shape[1]) for shape in shapes
    )


def _backward_op(
    dlogits: Tensor | None, dpenalty: Tensor | None, dmask: Tensor | None,
    image: Tensor, text: Tensor, scale: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters, rest = rest[: 2 * len(ROLES)], rest[2 * len(ROLES) :]
    episodes, heads, temperature, matrix, factor, relu, penalty, compute, precision = rest[:_OPTION_COUNT]
    *kept, needed = rest[_OPTION_COUNT:]
    keys, values, q_rational, q_text, q_image, o_text, o_rational, o_image, logsums, image_logsums = kept[:10]
    factors, totals, peaks, _ = kept[10:]
    weights, biases = _by_role(parameters)
    output, bias = weights["output"], biases.get("output")
    projections = ProjectionBuffers(keys, values, _given(q_rational), _given(q_text), _given(q_image))
    attended = Attended(
        _given(o_text), _given(o_rational), _given(o_image), logsums, image_logsums, _given(factors), _given(totals)
    )
    wanted = {role: weights[role] for at, role in enumerate(ROLES) if needed[2 + 2 * at] or needed[3 + 2 * at]}
    features = needed[0] or needed[1]
    # Test-time training's first step, from a zero output projection, asks for that projection's gradient alone.
    inner = features or any(role != "output" for role in wanted)
    contiguous = [None if value is None else value.contiguous() for value in (dlogits, dpenalty, dmask)]
    image, text = image.contiguous(), text.contiguous()
    gradients: dict[str, Tensor] = {}
    dimage = dtext = None
    tile = _tile_of(image, text, episodes, heads, compute, precision)
    with torch.cuda.device_of(image):
        made = masked_logits_backward(
            image, text, scale, attended, output, bias, *contiguous, _given(peaks), num_heads=heads, relu=relu,
            penalty=penalty, weighted=features, inner=inner, episodes=episodes, dtype=compute, precision=precision,
            tile=tile("masked_logits_backward"),
        )  # fmt: skip
        inward = None
        if inner:
            assert made.dattended is not None
            assert made.deltas is not None
            inward = class_attention_backward(
                projections, attended, made.dattended, made.deltas, num_heads=heads, temperature=temperature,
                matrix=matrix, precision=precision, tile=tile("class_attention_backward"),
            )  # fmt: skip
        dweights, dbiases = parameter_gradients(
            image, text, scale, attended, inward, made.doffset, wanted, num_heads=heads, bias=bool(biases),
            scale_factor=factor, precision=precision, tile=tile("parameter_gradients"),
        )  # fmt: skip
        if features:
            assert made.weighted is not None
            assert inward is not None
            dimage, dtext = rational_projections_backward(
                image, text, scale, weights, inward, made.weighted, scale_factor=factor, episodes=episodes,
                precision=precision,
            )  # fmt: skip
    for at, role in enumerate(ROLES):
        if needed[2 + 2 * at]:
            gradients[f"{role}_weight"] = dweights[role]
        if needed[3 + 2 * at]:
            gradients[f"{role}_bias"] = dbiases[role]
    names = [f"{role}_{part}" for role in ROLES for part in ("weight", "bias")]
    found = [dimage if needed[0] else None, dtext if needed[1] else None, *(gradients.get(name) for name in names)]
    return tuple(_filled(value, image) for value in found)


def _backward_fake(
    dlogits: Tensor | None, dpenalty: Tensor | None, dmask: Tensor | None, image: Tensor, text: Tensor,
    scale: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs, needed = (image, text, *rest[: 2 * len(ROLES)]), rest[-1]
    return tuple(
        torch.empty_like(given, memory_format=torch.contiguous_format) if asked else image.new_empty((0,))
        for given, asked in zip(inputs, needed, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, *kept = output
    ctx.options = inputs[_COUNT : _COUNT + _OPTION_COUNT]
    ctx.kept = inputs[-1]
    ctx.save_for_backward(*inputs[:_COUNT], *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dlogits: Tensor | None, dpenalty: Tensor | None, dmask: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    asked = ctx.needs_input_grad
    nothing: tuple[Any, ...] = (None,) * len(asked)
    if dlogits is None and dpenalty is None and dmask is None:
        return nothing
    saved = ctx.saved_tensors
    inputs, kept = saved[:_COUNT], saved[_COUNT:]
    needed = [asked[0], asked[1], *asked[3:_COUNT]]
    gradients: list[Tensor | None] = [None] * len(needed)
    if not ctx.kept:
        raise RuntimeError("the forward was told that no gradient follows (keep=False)")
    if any(needed):
        refuse_second_derivative("rational_adapter")
        result = torch.ops.rada_fast.rational_adapter_triton_backward(
            dlogits, dpenalty, dmask, *inputs, *ctx.options, *kept, needed
        )
        gradients = [value if wanted else None for value, wanted in zip(result, needed, strict=True)]
    dscale = None
    if asked[2] and dlogits is not None:
        # Only the factor in front of the sum carries a gradient; the projections' inputs see s detached.
        dscale = (dlogits.float() * kept[-1]).sum().to(inputs[2].dtype)
    return (gradients[0], gradients[1], dscale, *gradients[2:], *nothing[_COUNT:])


for _key in ("CPU", "CUDA"):
    _library.impl("rational_adapter_triton", _forward, _key)
    _library.impl("rational_adapter_triton_backward", _backward_op, _key)
torch.library.register_fake("rada_fast::rational_adapter_triton", _forward_fake)
torch.library.register_fake("rada_fast::rational_adapter_triton_backward", _backward_fake)
torch.library.register_autograd("rada_fast::rational_adapter_triton", _backward, setup_context=_save)


def rational_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor],
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
    episodes: int | None = None,
) -> AdapterOutput:
    """Arguments and results as ops.rational_adapter; reason_not_served must be None."""
    if config.num_layers > 1:
        from rada_fast.ops._backends.triton_layers import layered_adapter

        return layered_adapter(
            image_features, text_features, logit_scale, parameters, config, float32_precision(), penalty=penalty,
            return_mask=return_mask,
        )  # fmt: skip
    scale = as_scale(logit_scale, image_features, torch.float32)
    tensors: list[Tensor | None] = []
    for role, name in ROLES.items():
        used = role in ("key", "value", "output") or role in config.queries
        for part in ("weight", "bias"):
            tensors.append(parameters[f"{name}.{part}"] if used and (part == "weight" or config.bias) else None)
    inputs = (image_features, text_features, scale, *(value for value in tensors if value is not None))
    keep = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    # Kernels convert as they load: under autocast no copy of the weights is made.
    logits, mask_penalty, mask, *_ = torch.ops.rada_fast.rational_adapter_triton(
        image_features,
        text_features,
        scale,
        *tensors,
        episodes or 1,
        config.num_heads,
        config.temperature,
        config.softmax == "matrix",
        config.input_scale_factor if config.input_scale == "logit" else 0.0,
        config.mask_activation == "relu",
        penalty or "none",
        compute_dtype(image_features, parameters["out_proj.weight"]),
        float32_precision(),
        return_mask,
        keep,
    )
    one = mask_penalty.reshape(()) if penalty and episodes is None else mask_penalty
    return AdapterOutput(logits, one if penalty else None, mask if return_mask else None)
