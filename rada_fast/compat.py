"""Drop-in for the published code: its attention class under its own signature, and in-place patching of live models."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rada_fast.config import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.ops import rational_adapter
from rada_fast.reference.class_attention import attention_probabilities
from rada_fast.reference.rational_projections import split_heads

_PROJECTIONS = ("q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")


class SimpleMultiheadAttention(nn.Module):
    """The published code's attention module: same constructor, forward signature, parameter names and start.

    embed_dim: D; num_heads: H; t: temperature; dropout: applied to the attention maps while training;
    batch_first: accepted and ignored, as there; bias: biases in the projections.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        t: float,
        dropout: float = 0.0,
        batch_first: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.temprature = t  # the published spelling
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first
        for name in ("q_proj1", *_PROJECTIONS):
            self.add_module(name, nn.Linear(embed_dim, embed_dim, bias=bias))
        for parameter in self.get_submodule("out_proj").parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        query1: Tensor,
        query2: Tensor,
        query3: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mask offset A (B, K, D) and the first query's attention map (B, H, K, K), for any inputs (B, K, D).

        Nothing is assumed about the inputs here; forward_features is the fast way where they come from features.
        """
        sources = {"q_proj1": query1, "q_proj2": query2, "q_proj3": query3, "k_proj": key, "v_proj": value}
        query1, query2, query3, keys, values = (
            split_heads(self.get_submodule(name)(rows), self.num_heads) for name, rows in sources.items()
        )  # (B, H, K, d)
        num_classes = keys.shape[-2]
        maps = []
        for query in (query1, query2, query3):
            scores = query @ keys.mT / self.head_dim**0.5  # (B, H, K, K)
            if attn_mask is not None:
                scores = scores + attn_mask
            maps.append(self.dropout(attention_probabilities(scores / self.temprature, "matrix", num_classes)))
        attended = ((maps[0] + maps[1] + maps[2]) / 3) @ values  # (B, H, K, d)
        output: Tensor = self.get_submodule("out_proj")(attended.transpose(-3, -2).flatten(-2))  # (B, K, D)
        return output, maps[0]

    def forward_features(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and mask (B, K, D), straight from unit-norm features, through the backend in force.

        image_features: (B, D); text_features: (K, D); logit_scale: the multiplier s.
        """
        config = _config(self, input_scale="logit", mask_activation="relu")
        output = rational_adapter(
            image_features, text_features, logit_scale, _parameters(self), config, return_mask=True
        )
        assert output.mask is not None
        return output.logits, output.mask


def patch(model: nn.Module) -> list[str]:
    """Serve the rational adapters inside a live published model through rada_fast's backends.

    Every module with the published projections gets a new forward; parameter objects, buffers, hooks and the
    optimiser's hold on the parameters stay. The published model hands its adapter repeated rows; the patched forward
    takes them back to one row per image and per class, which it verifies on its first call: where they are anything
    else, or with an attention mask or active dropout, the module's own forward runs (with a warning the first time).
    The second value a patched adapter returns, an attention map no published model uses, is None.

    model: any module that holds a published adapter, at any depth. Returns the patched modules' names; patching twice
    is patching once. Raises UserError where there is no adapter in it.
    """
    found = list(_adapters(model))
    if not found:
        raise UserError(
            f"model must hold a published rational adapter (q_proj1 ... out_proj), {type(model).__name__} has none"
        )
    for _, module in found:
        if not isinstance(module.__dict__.get("forward"), _PatchedForward):
            module.__dict__["_rada_fast_forward"] = module.__dict__.get("forward")
            module.forward = _PatchedForward(module)
    return [name for name, _ in found]


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched adapter inside a model its own forward back. Returns the names of those it had patched."""
    names = []
    for name, module in _adapters(model):
        if isinstance(module.__dict__.get("forward"), _PatchedForward):
            del module.__dict__["forward"]
            own = module.__dict__.pop("_rada_fast_forward")
            if own is not None:
                module.forward = own
            names.append(name)
    return names


def _adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        projections = [getattr(module, part, None) for part in _PROJECTIONS]
        projections.append(getattr(module, "q_proj1", getattr(module, "q_proj", None)))
        if all(isinstance(projection, nn.Linear) for projection in projections) and hasattr(module, "temprature"):
            yield name, module


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """The projections' own parameter objects under the standard names."""
    parameters: dict[str, Tensor] = {}
    first = "q_proj1" if hasattr(module, "q_proj1") else "q_proj"
    for name in ("q_proj1", *_PROJECTIONS):
        linear = module.get_submodule(first if name == "q_proj1" else name)
        parameters |= {f"{name}.{leaf}": tensor for leaf, tensor in linear.named_parameters()}
    return parameters


def _config(module: Any, **changes: Any) -> AdapterConfig:
    return AdapterConfig(
        embed_dim=module.out_proj.in_features,
        num_heads=module.num_heads,
        temperature=float(module.temprature),
        bias=module.out_proj.bias is not None,
        **changes,
    )


class _PatchedForward:
    """The patched module's forward: the published arguments in, the mask offset out."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.verified = False
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        module = self.module
        own = module.__dict__["_rada_fast_forward"] or types.MethodType(type(module).forward, module)
        names = ["query1", "query2", "query3", "key", "value", "attn_mask"]
        if hasattr(module, "q_proj") and not hasattr(module, "q_proj1"):
            names.remove("query3")  # the query-key variant asks with its key
        given = dict(zip(names, args, strict=False)) | kwargs
        reason = self._reason_against(given)
        if reason is not None:
            if not self.warned:
                warnings.warn(f"rada_fast leaves this adapter to its own forward: {reason}", stacklevel=2)
                self.warned = True
            result: tuple[Tensor, Tensor | None] = own(*args, **kwargs)
            return result
        # The inputs are already scaled: sqrt(s) f and sqrt(s) T, whose product is s R.
        config = _config(module, input_scale="none", mask_activation="none")
        image, text = given["query1"][:, 0], given["query2"][0]
        output = rational_adapter(image, text, 1.0, _parameters(module), config, return_mask=True)
        assert output.mask is not None
        return output.mask - 1, None

    def _reason_against(self, given: dict[str, Any]) -> str | None:
        if given.get("attn_mask") is not None:
            return "attn_mask is given"
        dropout = getattr(self.module, "dropout", None)
        if self.module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            return "dropout is active"
        if given["query1"].shape[0] == 0:
            return "the batch is empty"
        if not self.verified:
            with torch.no_grad():
                image, text = given["query1"][:, :1], given["query2"][:1]
                rational = image * text
                rows = [given[name] for name in ("query3", "key", "value") if name in given]
                # s R computed as (sqrt(s) f) (sqrt(s) T) or as s (f T): three roundings apart, plus the square root's.
                tolerance = 8 * torch.finfo(rational.dtype).eps
                floor = tolerance * float(rational.abs().max())
                if not bool((given["query1"] == image).all()) or not bool((given["query2"] == text).all()):
                    return "its queries are not one row per image and one row per class"
                if not all(torch.allclose(part, rational, rtol=tolerance, atol=floor) for part in rows):
                    return "its keys are not the product of its image and text queries"
            self.verified = True
        return None
