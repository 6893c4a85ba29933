"""Run the adapter by operators around the Triton launches in kernels/, with gradients, and say which calls they serve.

The operators run on CUDA tensors. They run on CPU tensors only where something executes Triton kernels there: Triton's
interpreter, or a simulator that has replaced Triton's launcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rada_fast import _env
from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.kernels._common import MAX_EPISODES, cdiv
from rada_fast.kernels._launch import is_replaced
from rada_fast.kernels._shared_memory import withhold
from rada_fast.kernels.class_attention import Attended, class_attention_backward, class_attention_forward
from rada_fast.kernels.masked_logits import counters_needed, masked_logits_backward, masked_logits_forward
from rada_fast.kernels.output_projection_gradients import output_projection_gradients
from rada_fast.kernels.parameter_gradients import parameter_gradients
from rada_fast.kernels.rational_projections import ProjectionBuffers, rational_projections_forward
from rada_fast.kernels.rational_projections_backward import rational_projections_backward
from rada_fast.kernels.scaled_projections import scaled_projections
from rada_fast.ops._backends import adapter_operator
from rada_fast.ops._backends.adapter_operator import (
    GRADIENTS,
    SERVED_PENALTIES,
    Features,
    Needed,
    Options,
    Parameters,
    Requests,
    ResultGradients,
    Results,
    Scale,
    Sums,
    backward_follows,
    compute_dtype,
    empty_gradients,
    options_of,
    parameters_of,
)
from rada_fast.ops._backends.tiles import chosen_tiles
from rada_fast.reference.rational_adapter import AdapterOutput, Projected
from rada_fast.reference.rational_projections import as_scale

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """Hold the options of the Triton operator alone.

    episodes: E; compute: the type of the products; precision: how float32 is multiplied (see float32_precision);
    output_is_zero: whether the output projection is known to be zero; given_keys and so on: the projections of an
    earlier call, which take the place of the products, or None; given_scale: by which factor they are multiplied.
    """

    episodes: int
    compute: torch.dtype
    precision: str
    output_is_zero: bool
    given_keys: Tensor | None = None
    given_values: Tensor | None = None
    given_q_rational: Tensor | None = None
    given_q_text: Tensor | None = None
    given_q_image: Tensor | None = None
    given_scale: float = 1.0


_PROJECTIONS = tuple(field.name for field in fields(ProjectionBuffers))


class Mask(NamedTuple):
    """Hold the mask less 1, (B, K, D), see MaskedLogits, and where the "linf" penalty's maximum of each image is, (B,).

    distances is None where every mask is 1.
    """

    distances: Tensor | None
    peaks: Tensor | None


_NOTHING_KEPT: tuple[Any, ...] = (
    ProjectionBuffers(None, None, None, None, None),
    Attended(*[None] * 8),
    Mask(None, None),
    Sums(None),
)


def executes_on_cpu() -> bool:
    """Return whether kernels launched with CPU tensors run: under Triton's interpreter or a simulator."""
    return bool(triton.knobs.runtime.interpret) or is_replaced()


def float32_precision() -> str:
    """Return the input_precision of tl.dot for float32: RADA_FAST_FLOAT32's, else the one that PyTorch is set to.

    PyTorch is set by torch.set_float32_matmul_precision, by allow_tf32 or, from 2.9 on, by fp32_precision. Reading
    fp32_precision is right whichever of them was used; torch.get_float32_matmul_precision raises once fp32_precision
    was set.
    """
    if asked := _env.float32_products():
        return asked
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:  # PyTorch 2.8
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "tf32x3"


# torch.compile takes the results at the time of tracing as constants, see extension/libraries.py.
_functions: list[Any] = [executes_on_cpu, float32_precision]
for _function in _functions:
    _function._dynamo_marked_constant = True


def reason_unavailable() -> str | None:
    """Return why no Triton kernel can run in this process, or None where one can."""
    if _env.has_cuda() or executes_on_cpu():
        return None
    return "no CUDA device is visible"


def reason_not_served(
    config: AdapterConfig,
    image_features: Tensor,
    text_features: Tensor,
    parameters: Mapping[str, Tensor],
    penalty: MaskPenalty | None = None,
    episodes: int | None = None,
) -> str | None:
    """Return why the Triton operator cannot serve a call, or None where it can."""
    device = image_features.device.type
    if device != "cuda" and not (device == "cpu" and executes_on_cpu()):
        return f"it serves CUDA tensors, image_features are on {image_features.device}"
    if config.mask_function != "attention":
        return f"it serves mask_function 'attention', not {config.mask_function!r}"
    if config.num_layers > 1 and episodes is not None:
        return f"it serves episodes with num_layers 1, not {config.num_layers}"
    if episodes is not None and episodes > MAX_EPISODES:
        return f"it serves at most {MAX_EPISODES} episodes, not {episodes}"
    if config.embed_dim % 32 or config.head_dim % 8:
        return (
            "it serves widths that are multiples of 32 with heads that are multiples of 8, "
            f"not {config.embed_dim} with {config.head_dim}"
        )
    if penalty not in SERVED_PENALTIES:
        return f"it serves the penalties l2, l1 and linf, not {penalty!r}"
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


def _is_shared(value: Tensor, axes: int) -> bool:
    """Return whether all episodes have one value: it has no axis of episodes, or one along which nothing changes."""
    return value.ndim == axes or value.stride(0) == 0


def _shares_projections(parameters: Parameters) -> bool:
    """Return whether all episodes have the same projections but for the output's, as before their first gradients."""
    weights, biases = parameters.by_role("weight"), parameters.by_role("bias")
    return all(_is_shared(value, 2) for role, value in weights.items() if role != "output") and all(
        _is_shared(value, 1) for role, value in biases.items() if role != "output"
    )


def _readable(parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return contiguous weights and biases by role. What all episodes share is read in one place, and not copied."""

    def values(tensors: dict[str, Tensor], axes: int) -> dict[str, Tensor]:
        return {
            role: (value if value.ndim == axes or not shared[role == "output"] else value[0]).contiguous()
            for role, value in tensors.items()
        }

    weights, biases = parameters.by_role("weight"), parameters.by_role("bias")
    output_is_shared = _is_shared(weights["output"], 2) and ("output" not in biases or _is_shared(biases["output"], 1))
    shared = (_shares_projections(parameters), output_is_shared)
    return values(weights, 2), values(biases, 1)


def _tiles(features: Features, parameters: Parameters, options: Options, launch: Launch) -> dict[str, Any]:
    """Return the tiles measured on this device by the launches' names; a launch without one may be missing."""
    image, text = features
    (batch, width), classes = image.shape, text.shape[0]
    return chosen_tiles(
        image.device, launch.compute, classes, batch // launch.episodes * classes, width, width // options.num_heads,
        launch.precision, text.dtype, parameters.key_weight.dtype,
    )  # fmt: skip


def _problem(features: Features, scale: Scale) -> dict[str, Tensor]:
    """Return the arguments that most launches take: the features and the multiplier."""
    image, text = features.image_features.contiguous(), features.text_features.contiguous()
    return {"image": image, "text": text, "logit_scale": scale.logit_scale}


def _attention(options: Options, launch: Launch) -> dict[str, Any]:
    """Return the arguments that say how the launches of class attention compute it."""
    return {
        "num_heads": options.num_heads,
        "temperature": options.temperature,
        "matrix": options.matrix_softmax,
        "precision": launch.precision,
    }


def _forward(
    features: Features, scale: Scale, parameters: Parameters, options: Options, launch: Launch, requests: Requests
) -> tuple[Any, ...]:
    weights, biases = _readable(parameters)
    output = weights.pop("output"), biases.pop("output", None)
    output_weight, output_bias = (None, None) if launch.output_is_zero else output
    problem = _problem(features, scale)
    common = {"episodes": launch.episodes, "dtype": launch.compute, "precision": launch.precision}
    tiles = _tiles(features, parameters, options, launch)
    batch, classes = problem["image"].shape[0], problem["text"].shape[0]
    # The first launch sets to zero the counters of finished programs of the other two. Those of the heads fill whole
    # groups of 16 bytes, because pointers that are not so aligned take longer to launch with.
    heads = 4 * cdiv(batch * options.num_heads, 4)
    masked_counters = counters_needed(batch, classes, launch.episodes)
    counters = torch.empty((heads + masked_counters,), dtype=torch.int32, device=features.image_features.device)
    with torch.cuda.device_of(features.image_features):
        if launch.given_keys is not None:
            given = ProjectionBuffers(*(getattr(launch, f"given_{name}") for name in _PROJECTIONS))
            projections = scaled_projections(given, launch.given_scale, counters)
        else:
            projections = rational_projections_forward(
                **problem, weights=weights, biases=biases, scale_factor=options.input_scale_factor,
                tile=tiles.get("rational_projections_forward"), counters=counters, **common,
            )  # fmt: skip
        attended = class_attention_forward(
            projections=projections, counters=counters[:heads], tile=tiles.get("class_attention_forward"),
            images=len(features.image_features) // launch.episodes, **_attention(options, launch),
        )  # fmt: skip
        masked = masked_logits_forward(
            **problem, attended=attended.combined, weight=output_weight, bias=output_bias, relu=options.relu,
            penalty=options.penalty, return_mask=requests.return_mask, keep=requests.keep, counters=counters[heads:],
            tile=tiles.get("masked_logits_forward"), **common,
        )  # fmt: skip
    results = Results(masked.logits, masked.penalty, masked.mask)
    if not requests.keep:
        return results, *_NOTHING_KEPT
    return results, projections, attended, Mask(masked.distances, masked.peaks), Sums(masked.sums)


def _forward_fake(
    features: Features, scale: Scale, parameters: Parameters, options: Options, launch: Launch, requests: Requests
) -> tuple[Any, ...]:
    (batch, width), classes, episodes = features.image_features.shape, len(features.text_features), launch.episodes
    stored, compute, exact = features.image_features.dtype, launch.compute, torch.float32
    weights, matrix, heads = parameters.by_role("weight"), options.matrix_softmax, options.num_heads
    shared = 1 if _shares_projections(parameters) else episodes

    def empty(*shape: int, dtype: torch.dtype, given: bool = True) -> Any:
        return features.image_features.new_empty(shape, dtype=dtype) if given else None

    results = Results(
        logits=empty(batch, classes, dtype=stored),
        penalty=empty(episodes, dtype=stored, given=options.penalty != "none"),
        mask=empty(batch, classes, width, dtype=stored, given=requests.return_mask),
    )
    if not requests.keep:
        return results, *_NOTHING_KEPT
    projections = ProjectionBuffers(
        keys=empty(batch, classes, width, dtype=compute),
        values=empty(batch, classes, width, dtype=compute),
        q_rational=empty(batch, classes, width, dtype=compute, given="rational" in weights),
        q_text=empty(shared, classes, width, dtype=compute, given="text" in weights),
        q_image=empty(batch, width, dtype=exact, given="image" in weights),
    )
    attended = Attended(
        text=empty(batch, classes, width, dtype=compute, given="text" in weights),
        rational=empty(batch, classes, width, dtype=compute, given="rational" in weights),
        image=empty(batch, width, dtype=exact, given="image" in weights),
        combined=empty(batch, classes, width, dtype=compute),
        logsums=empty(2, 2, heads, batch, classes, dtype=exact),
        image_logsums=empty(2, batch, heads, dtype=exact),
        factors=empty(2, heads, batch, classes, dtype=exact, given=matrix),
        totals=empty(2, 2, heads, batch, dtype=exact, given=matrix),
    )
    mask = Mask(
        distances=empty(batch, classes, width, dtype=compute, given=not launch.output_is_zero),
        peaks=empty(batch, dtype=torch.int64, given=options.penalty == "linf"),
    )
    return results, projections, attended, mask, Sums(empty(batch, classes, dtype=exact))


def _by_argument(dweights: dict[str, Tensor], dbiases: dict[str, Tensor], wanted: Parameters) -> Parameters:
    """Return the gradients of the parameters that are wanted, and None for the others, from gradients by role."""
    named = {f"{role}_weight": dweights[role] if asked else None for role, asked in wanted.by_role("weight").items()}
    named |= {f"{role}_bias": dbiases[role] if asked else None for role, asked in wanted.by_role("bias").items()}
    return Parameters(**named)  # type: ignore[arg-type]


def _backward_of_zero_output(
    gradients: ResultGradients,
    features: Features,
    scale: Scale,
    parameters: Parameters,
    launch: Launch,
    attended: Tensor,
    wanted: Parameters,
) -> tuple[Features, Parameters]:
    """Compute the backward pass of test-time training's first step: only the output projection has a gradient."""
    weights_wanted, biases_wanted = wanted.by_role("weight"), wanted.by_role("bias")
    roles = {
        role: value
        for role, value in parameters.by_role("weight").items()
        if role == "output" or weights_wanted[role] or biases_wanted[role]
    }
    dlogits, _, dmask = (None if value is None else value.contiguous() for value in gradients)
    with torch.cuda.device_of(features.image_features):
        dweights, dbiases = output_projection_gradients(
            **_problem(features, scale), attended=attended, dlogits=dlogits, dmask=dmask, wanted=roles,
            bias=parameters.output_bias is not None, dtype=launch.compute, precision=launch.precision,
        )  # fmt: skip
    return Features(None, None), _by_argument(dweights, dbiases, wanted)  # type: ignore[arg-type]


def _backward(
    gradients: ResultGradients,
    features: Features,
    scale: Scale,
    parameters: Parameters,
    options: Options,
    launch: Launch,
    projections: ProjectionBuffers,
    attended: Attended,
    mask: Mask,
    needed: Needed,
) -> tuple[Features, Parameters]:
    if launch.output_is_zero and not any(GRADIENTS.split(needed.needed)[0]):
        return _backward_of_zero_output(
            gradients, features, scale, parameters, launch, attended.combined, GRADIENTS.split(needed.needed)[1]
        )
    weights, biases = _readable(parameters)
    has_bias = "output" in biases
    features_wanted, parameters_wanted = GRADIENTS.split(needed.needed)
    weights_wanted, biases_wanted = parameters_wanted.by_role("weight"), parameters_wanted.by_role("bias")
    # Gradients have the shapes of the parameters as they were given.
    roles = {
        role: value
        for role, value in parameters.by_role("weight").items()
        if weights_wanted[role] or biases_wanted[role]
    }
    to_features = any(features_wanted)
    inner = to_features or any(role != "output" for role in roles)
    dlogits, dpenalty, dmask = (None if value is None else value.contiguous() for value in gradients)
    problem = _problem(features, scale)
    dimage = dtext = dprojections = None
    tiles = _tiles(features, parameters, options, launch)
    with torch.cuda.device_of(features.image_features):
        outer = masked_logits_backward(
            **problem, attended=attended, weight=weights["output"], distances=mask.distances, dlogits=dlogits,
            dpenalty=dpenalty, dmask=dmask, peaks=mask.peaks, num_heads=options.num_heads, relu=options.relu,
            penalty=options.penalty, weighted=to_features, inner=inner, episodes=launch.episodes, dtype=launch.compute,
            precision=launch.precision, tile=tiles.get("masked_logits_backward"),
        )  # fmt: skip
        if inner:
            assert outer.dattended is not None
            assert outer.deltas is not None
            dprojections = class_attention_backward(
                projections=projections, attended=attended, dattended=outer.dattended, deltas=outer.deltas,
                tile=tiles.get("class_attention_backward"), **_attention(options, launch),
            )  # fmt: skip
        dweights, dbiases = parameter_gradients(
            **problem, attended=attended.combined if "output" in roles else None, gradients=dprojections,
            doffset=outer.doffset, wanted=roles, bias=has_bias, scale_factor=options.input_scale_factor,
            precision=launch.precision, tile=tiles.get("parameter_gradients"),
        )  # fmt: skip
        if to_features:
            assert outer.weighted is not None
            assert dprojections is not None
            dimage, dtext = rational_projections_backward(
                **problem, weights=weights, gradients=dprojections, weighted=outer.weighted,
                scale_factor=options.input_scale_factor, episodes=launch.episodes, precision=launch.precision,
            )  # fmt: skip
    dfeatures: tuple[Any, Any] = (
        dimage if features_wanted.image_features else None,
        dtext if features_wanted.text_features else None,
    )
    return Features(*dfeatures), _by_argument(dweights, dbiases, parameters_wanted)


def _backward_fake(gradients: ResultGradients, *arguments: Any) -> tuple[Features, Parameters]:
    features, _, parameters, *_, needed = arguments
    return empty_gradients(features, parameters, needed.needed)


def with_smaller_tiles(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that starts again with smaller tiles where a launch needs more shared memory than there is.

    The tables should not let that happen; they were made with one version of Triton. A CUDA graph that is being
    captured keeps what it has captured, so the error is raised then.
    """

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        while True:
            try:
                return run(*arguments)
            except triton.runtime.errors.OutOfResources as error:
                device = next(group for group in arguments if isinstance(group, Features)).image_features.device
                missing = error.required - error.limit if error.name == "shared memory" else 0
                if _env.is_capturing() or not withhold(device, missing):
                    raise

    return call


adapter_operator.register(
    "rational_adapter_triton",
    Launch,
    [ProjectionBuffers, Attended, Mask],
    forward=with_smaller_tiles(_forward),
    fake=_forward_fake,
    backward=with_smaller_tiles(_backward),
    fake_backward=_backward_fake,
)


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
    output_is_zero: bool = False,
    projected: Projected | None = None,
    keep_projected: bool = False,
) -> AdapterOutput:
    """Compute ops.rational_adapter, with its arguments and results, for a call that reason_not_served lets pass."""
    if config.num_layers > 1:
        from rada_fast.ops._backends.triton_layers import layered_adapter

        return layered_adapter(
            image_features, text_features, logit_scale, parameters, config, float32_precision(), penalty=penalty,
            return_mask=return_mask,
        )  # fmt: skip
    scale = as_scale(logit_scale, image_features, torch.float32)
    # The kernels convert the weights as they load them, so autocast makes no copy of the weights.
    tensors = (image_features, text_features, scale, *parameters_of(parameters, config))
    compute = compute_dtype(image_features, parameters["out_proj.weight"])
    taken = projected.tensors if projected is not None else ()
    keep = backward_follows(*tensors)
    logits, mask_penalty, mask, *kept = torch.ops.rada_fast.rational_adapter_triton.default(
        *tensors,
        *options_of(config, penalty),
        *Launch(
            episodes=episodes or 1,
            compute=compute,
            precision=float32_precision(),
            output_is_zero=output_is_zero,
            **{f"given_{name}": value for name, value in zip(_PROJECTIONS, taken, strict=False)},
            given_scale=1.0 if projected is None else projected.scale,
        ),
        *Requests(return_mask=return_mask, keep=keep),
    )
    one = mask_penalty.reshape(()) if penalty and episodes is None else mask_penalty
    found = None
    if keep_projected and keep:
        # An operator returns an empty tensor in the place of an absent one.
        found = Projected(tuple(value.detach() if value.ndim > 1 else None for value in kept[: len(_PROJECTIONS)]))
    return AdapterOutput(logits, one if penalty else None, mask if return_mask else None, found)
