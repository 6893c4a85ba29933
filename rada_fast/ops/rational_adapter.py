"""Compute the rational adapter in one call (RAda, arXiv:2507.15480, Eq. 2, 4, 6, 7, 16)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast.config.method import MASK_PENALTIES, ROLES, AdapterConfig, MaskPenalty
from rada_fast.ops._backends.choice import resolve_backend
from rada_fast.ops._backends.transforms import TRANSFORM_REASON, under_transform
from rada_fast.reference.rational_adapter import AdapterOutput as AdapterOutput
from rada_fast.reference.rational_adapter import Projected as Projected


def parameter_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that the configuration needs, by its published name."""
    if config.mask_function == "mlp":
        projections = ["fc", "out_proj"]
    else:
        projections = [ROLES[role] for role in (*config.queries, "key", "value", "output")]
        for layer in range(config.num_layers - 1):
            projections += [f"layers.{layer}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in projections:
        shapes[f"{name}.weight"] = (config.embed_dim, config.embed_dim)
        if config.bias:
            shapes[f"{name}.bias"] = (config.embed_dim,)
    return shapes


class ProjectionCalls(NamedTuple):
    """Hold projections that plain PyTorch has to call, because one of them is more than a weight and a bias.

    call: takes a projection's name and rows (..., D), and returns the projected rows.
    reason: which projection has to be called, and why.
    """

    call: Callable[[str, Tensor], Tensor]
    reason: str


def check_features(name: str, tensor: Tensor, rows: str, embed_dim: int) -> None:
    """Raise TypeError or ValueError unless a tensor of features is (rows, D) and floating point."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != rows.count(",") + 2:
        raise ValueError(f"{name} must be ({rows}, D), got {tuple(tensor.shape)}")
    if tensor.shape[-1] != embed_dim:
        raise ValueError(f"{name} must have the adapter's width D = {embed_dim}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_text_features(text_features: Tensor, embed_dim: int) -> None:
    """Raise TypeError or ValueError unless the text features are those of at least one class, (K, D)."""
    check_features("text_features", text_features, "K", embed_dim)
    if len(text_features) == 0:
        raise ValueError("text_features must hold at least one class (K >= 1), got K = 0")


NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
"""The types that a multiplier may have, as a tuple: PyTorch 2.8 cannot compile code with a union of these types."""


def check_scale(logit_scale: object) -> None:
    """Raise TypeError or ValueError unless the multiplier is one real number."""
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be a single multiplier, got shape {tuple(logit_scale.shape)}")
        if logit_scale.is_complex():
            raise TypeError(f"logit_scale must be a real multiplier, got {logit_scale.dtype}")
    elif not isinstance(logit_scale, NUMBERS) and not hasattr(logit_scale, "__float__"):
        raise TypeError(f"logit_scale must be a number or a tensor of one, got {type(logit_scale).__name__}")


def check_inputs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor] | ProjectionCalls,
    config: AdapterConfig,
    penalty: str | None,
    episodes: int | None = None,
) -> None:
    """Raise ValueError or TypeError naming the first argument that does not fit."""
    check_features("image_features", image_features, "B", config.embed_dim)
    check_text_features(text_features, config.embed_dim)
    if image_features.dtype != text_features.dtype and not torch.is_autocast_enabled(image_features.device.type):
        raise TypeError(
            f"text_features must have image_features' dtype {image_features.dtype}, got {text_features.dtype}"
        )
    if image_features.device != text_features.device:
        raise ValueError(f"text_features must be on {image_features.device}, got {text_features.device}")
    check_scale(logit_scale)
    if isinstance(logit_scale, Tensor) and logit_scale.device != image_features.device:
        # A copy to the device in every call would wait for it, and cannot be captured in a CUDA graph.
        raise ValueError(
            f"logit_scale must be a number or on {image_features.device} as image_features are, "
            f"got {logit_scale.device}: move it there once, outside"
        )
    if penalty is not None and penalty not in MASK_PENALTIES:
        raise ValueError(f"penalty must be None or one of {', '.join(map(repr, MASK_PENALTIES))}, got {penalty!r}")
    if episodes is not None and (episodes < 1 or len(image_features) % episodes):
        raise ValueError(f"episodes must be a positive divisor of B = {len(image_features)}, got {episodes}")
    if isinstance(parameters, ProjectionCalls):
        if episodes is not None:
            raise ValueError(f"episodes need parameters that are tensors, but {parameters.reason}")
        return
    lead: tuple[int, ...] = ()
    dtype, device = image_features.dtype, image_features.device
    for at, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name not in parameters:
            raise ValueError(f"parameters must hold {name!r} for this configuration")
        value = parameters[name]
        given = tuple(value.shape)
        if at == 0 and episodes is not None and len(given) > len(shape):
            # Either every parameter has a leading axis of episodes, or no parameter has one.
            lead = (episodes,)
        if given != lead + shape:
            raise ValueError(f"parameter {name!r} must be {lead + shape}, got {given}")
        if value.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(
                f"parameter {name!r} must have image_features' dtype {dtype}, got {value.dtype}: convert one "
                "of them, or use torch.autocast"
            )
        if value.device != device:
            raise ValueError(f"parameter {name!r} must be on {device} as image_features are, got {value.device}")


def serving_backend(
    image_features: Tensor,
    text_features: Tensor,
    parameters: Mapping[str, Tensor] | ProjectionCalls,
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    episodes: int | None = None,
    backend: str | None = None,
) -> str:
    """Return the name of the backend that computes a call of rational_adapter with these arguments.

    Of the tensors it looks at the device and the types alone, not at shapes or values.
    Raises BackendUnavailableError where a named backend cannot serve.
    """
    transformed = under_transform()

    def refusal(name: str) -> str | None:
        if isinstance(parameters, ProjectionCalls):
            return f"{parameters.reason}; 'reference' serves it"
        if transformed:
            return TRANSFORM_REASON
        match name:
            case "cpu":
                from rada_fast.ops._backends.cpu import reason_not_served
            case "triton":
                from rada_fast.ops._backends.triton import reason_not_served
            case _:
                raise AssertionError(f"backend {name!r} does not say which calls it serves")
        return reason_not_served(config, image_features, text_features, parameters, penalty, episodes)

    return resolve_backend(backend, refusal)


def rational_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor] | ProjectionCalls,
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
    episodes: int | None = None,
    output_is_zero: bool = False,
    projected: Projected | None = None,
    keep_projected: bool = False,
    backend: str | None = None,
) -> AdapterOutput:
    """Compute class logits under the adapter's learned mask, with the mask penalty and the mask if asked for.

        R[b, k] = f[b] * T[k]                                                           (Eq. 2)
        A = attention over classes with keys and values from R, queries from f, T, R    (Eq. 6, 16)
        M = relu(1 + A) or 1 + A
        logits[b, k] = s sum_c M[b, k, c] R[b, k, c]                                    (Eq. 4)

    where f are the image features, T the text features and c counts the D features.

    image_features: (B, D), float32|float64|bfloat16|float16, unit norm, any stride.
    text_features: (K, D), same dtype and device, unit norm, K >= 1.
    logit_scale: the multiplier s itself, a number or a one-element tensor on the same device. The projections' inputs
        are scaled by its detached value.
    parameters: tensors by their published names, on the same device; see parameter_shapes. Or ProjectionCalls, for
        projections that plain PyTorch calls.
    config: the adapter's arithmetic.
    penalty: "l2", "l1", "linf" (Eq. 7) or None.
    return_mask: also return M, (B, K, D).
    episodes: E, a divisor of B, or None. With E, one call computes the results of E calls, one for each episode: image
        b belongs to episode b // (B/E), and the penalty is (E,). Either all episodes share the parameters of one
        adapter, or every parameter has a leading axis of E, for an adapter in each episode.
    output_is_zero: promises that the weight and the bias of the output projection are zero, as they are when training
        starts. The results are the same; the compiled backends take less time.
    keep_projected: also return the projected queries, keys and values where the backend can take them again, as all but
        "literal" can with one layer of attention when a gradient may be asked for; otherwise they are None.
    projected: what an earlier call with the same features has returned, or that ``.scaled(c)``. It promises that all
        weights and biases but the output's are c times those of that call, and saves their products. Gradients are
        those of the present parameters. Results may differ by roundings from those without it.
    backend: the name of a backend, or None for the one in force (see use_backend).

    Returns AdapterOutput(logits (B, K), penalty (), (E,) or None, mask (B, K, D) or None, projected or None), in
    image_features' dtype.
    Raises ValueError or TypeError naming the argument, BackendUnavailableError where a named backend cannot serve.
    The compiled backends have first derivatives in reverse mode. Under torch.func's transforms and in forward mode
    "auto" takes the reference; a second derivative (create_graph=True) raises an error that says how to get it.
    Equivalent to ``logit_scale * (mask * image_features[:, None] * text_features).sum(-1)``.
    """
    check_inputs(image_features, text_features, logit_scale, parameters, config, penalty, episodes)
    name = serving_backend(
        image_features, text_features, parameters, config, penalty=penalty, episodes=episodes, backend=backend
    )
    run: Callable[..., AdapterOutput]
    projections: Any = parameters.call if isinstance(parameters, ProjectionCalls) else parameters
    arguments = (image_features, text_features, logit_scale, projections, config)
    options: dict[str, Any] = {"penalty": penalty, "return_mask": return_mask}
    reuse: dict[str, Any] = {"projected": projected, "keep_projected": keep_projected}
    match name:
        case "reference":
            from rada_fast.reference.rational_adapter import rational_adapter as run

            options |= reuse
        case "literal":
            from rada_fast.reference.literal import literal_adapter as run
        case "cpu":
            from rada_fast.ops._backends.cpu import rational_adapter as run

            options |= reuse | {"output_is_zero": output_is_zero}
        case "triton":
            from rada_fast.ops._backends.triton import rational_adapter as fused

            return fused(*arguments, **options | reuse, episodes=episodes, output_is_zero=output_is_zero)
        case _:
            raise AssertionError(f"backend {name!r} resolved but not wired")
    if episodes is None:
        return run(*arguments, **options)
    return _by_episode(run, *arguments, episodes, **options)


def _by_episode(
    run: Callable[..., AdapterOutput],
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor],
    config: AdapterConfig,
    episodes: int,
    **options: Any,
) -> AdapterOutput:
    """Make one call for each episode, for backends that take the parameters of one adapter only."""
    shapes = parameter_shapes(config)
    projected = options.pop("projected", None)
    taken = [{}] * episodes if projected is None else [{"projected": part} for part in projected.split(episodes)]
    own = {
        name: parameters[name].unbind() if parameters[name].ndim > len(shape) else (parameters[name],) * episodes
        for name, shape in shapes.items()
    }
    parts = [
        run(image, text_features, logit_scale, values, config, **given, **options)
        for image, values, given in zip(
            image_features.unflatten(0, (episodes, -1)).unbind(),
            ({name: own[name][episode] for name in shapes} for episode in range(episodes)),
            taken,
            strict=True,
        )
    ]
    logits, penalties, masks, found = zip(*parts, strict=True)
    return AdapterOutput(
        torch.cat(logits),
        torch.stack(penalties) if penalties[0] is not None else None,
        torch.cat(masks) if masks[0] is not None else None,
        Projected(tuple(tensor for part in found for tensor in part.tensors)) if found[0] is not None else None,
    )


def zero_shot_logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return CLIP's own logits s f T^T (Eq. 1), (B, K), which an adapter gives while its output projection is zero."""
    return logit_scale * (image_features @ text_features.mT)
