"""Define the configurations of the adapter and of a test-time episode. Every default says where it comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rada_fast.config.checks import (
    check_choices,
    check_integer,
    check_positive,
)
from rada_fast.errors import UserError

Softmax = Literal["matrix", "row"]
InputScale = Literal["logit", "none"]
MaskActivation = Literal["relu", "none"]
MaskFunction = Literal["attention", "mlp"]
QueryKind = Literal["image", "text", "rational"]
MaskPenalty = Literal["l2", "l1", "linf"]
TTTLoss = Literal["mean", "marginal"]
OptimizerName = Literal["adamw", "adam", "sgd"]
QUERY_KINDS: tuple[QueryKind, ...] = get_args(QueryKind)
MASK_PENALTIES: tuple[MaskPenalty, ...] = get_args(MaskPenalty)
ROLES: dict[str, str] = {
    "image": "q_proj1",
    "text": "q_proj2",
    "rational": "q_proj3",
    "key": "k_proj",
    "value": "v_proj",
    "output": "out_proj",
}
"""Each projection of an attention layer has a role, which is the kind of query, or key, value or output. This table
gives its name in the published code. Operators take the projections' parameters in this order."""


@dataclass(frozen=True)
class AdapterConfig:
    """An AdapterConfig defines the rational adapter's arithmetic (RAda, arXiv:2507.15480, Eq. 6 and 16).

    It covers the paper and the variants of the published code.

    embed_dim: width D of the vision-language model's joint embedding.
    num_heads: heads H of the attention over classes; must divide embed_dim.
    softmax: "row" normalises each query's scores over the classes (Eq. 6); "matrix" normalises a head's whole K x K
        score matrix at once and multiplies by K (published code).
    temperature: divides the scores, besides the square root of the head width.
    input_scale: "logit" feeds sqrt(s) f, sqrt(s) T and s R to the projections (published code); "none" feeds f, T, R.
    input_scale_factor: multiplies s inside input_scale="logit" only; 4 in one published variant, else 1.
    mask_activation: "relu" clips the mask 1 + A at zero (published code); "none" leaves it (paper).
    bias: whether the projections have biases.
    queries: the query kinds in use, any non-empty subset of image, text and rational (Table 4).
    num_layers: attention layers L (Eq. 16, Table 10).
    mask_function: "attention", or "mlp": a two-layer MLP on the scaled rational matrix (Table 4).

    Raises ValueError naming the field when a value is out of range.
    """

    embed_dim: int
    num_heads: int = 8
    softmax: Softmax = "matrix"
    temperature: float = 1.0
    input_scale: InputScale = "logit"
    mask_activation: MaskActivation = "relu"
    bias: bool = True
    queries: tuple[QueryKind, ...] = QUERY_KINDS
    num_layers: int = 1
    mask_function: MaskFunction = "attention"
    input_scale_factor: float = 1.0

    def __post_init__(self) -> None:
        check_integer("embed_dim", self.embed_dim, 1)
        check_integer("num_heads", self.num_heads, 1)
        check_integer("num_layers", self.num_layers, 1)
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        check_positive("temperature", self.temperature)
        check_positive("input_scale_factor", self.input_scale_factor)
        if not isinstance(self.bias, bool):
            raise UserError(f"bias must be true or false, got {self.bias!r}")
        if not isinstance(self.queries, tuple) or not self.queries:
            raise UserError(f"queries must be a non-empty tuple of {', '.join(QUERY_KINDS)}, got {self.queries!r}")
        check_choices(self)
        if len(set(self.queries)) != len(self.queries):
            raise UserError(f"queries must not repeat a kind, got {self.queries!r}")
        # The order is fixed, so that equal sets of queries are equal configurations.
        object.__setattr__(self, "queries", tuple(kind for kind in QUERY_KINDS if kind in self.queries))
        if self.mask_function == "mlp" and self.num_layers != 1:
            raise UserError(f"num_layers must be 1 with mask_function 'mlp', got {self.num_layers}")

    @property
    def head_dim(self) -> int:
        """Return the width d = D / H of one head."""
        return self.embed_dim // self.num_heads

    @property
    def preset(self) -> str:
        """Return "official" or "paper" where only embed_dim and temperature differ from that preset, else "custom"."""
        if self.embed_dim % 8 == 0 and self == AdapterConfig.official(self.embed_dim, temperature=self.temperature):
            return "official"
        if self == AdapterConfig.paper(self.embed_dim, temperature=self.temperature):
            return "paper"
        return "custom"

    @classmethod
    def official(cls, embed_dim: int, temperature: float = 1.0, **changes: Any) -> AdapterConfig:
        """Return the published code's arithmetic: 8 heads, matrix softmax, inputs scaled by s, relu, biases."""
        return cls(embed_dim=embed_dim, temperature=temperature, **changes)

    @classmethod
    def paper(cls, embed_dim: int, temperature: float = 1.0, **changes: Any) -> AdapterConfig:
        """Return the paper's arithmetic (Eq. 6): one head, row softmax, no input scale, no relu, no biases."""
        values: dict[str, Any] = {
            "num_heads": 1, "softmax": "row", "input_scale": "none", "mask_activation": "none", "bias": False,
        }  # fmt: skip
        return cls(embed_dim=embed_dim, temperature=temperature, **(values | changes))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**dataclasses.asdict(self), "queries": list(self.queries)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """Make a configuration of what to_dict returned. Raises ValueError naming an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"adapter configuration has unknown fields {', '.join(unknown)}")
        if isinstance(values.get("queries"), list):
            values = {**values, "queries": tuple(values["queries"])}
        return cls(**values)


@dataclass(frozen=True)
class EpisodeConfig:
    """An episode adapts to one image's views, predicts, and forgets (RAda, arXiv:2507.15480, Sec. 4.3)."""

    steps: int = 3
    """Optimiser steps for each image (paper: 3)."""
    lr: float = 8e-4
    """Learning rate (paper: 8e-4)."""
    selection: float = 0.1
    """Share of the views to keep: the int(selection * V) of lowest prediction entropy, at least one (paper: 0.1)."""
    loss: TTTLoss = "mean"
    """Mean of the kept views' entropies (Eq. 5), or "marginal": the entropy of their mean prediction (TPT)."""
    penalty: MaskPenalty = "l2"
    """Mask penalty (Eq. 7): l2, l1 or linf."""
    penalty_weight: float = 1.0
    """Weight of the mask penalty; the paper writes none in this setting, so 1."""
    optimizer: OptimizerName = "adamw"
    """adamw (paper), adam or sgd."""
    weight_decay: float = 0.01
    """Weight decay; torch's default for AdamW, which the paper does not change."""

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError naming the field when a value is out of range."""
        check_integer("steps", self.steps, 0)
        check_positive("lr", self.lr)
        if not (isinstance(self.selection, int | float) and 0 < self.selection <= 1):
            raise UserError(f"selection must be above 0 and at most 1, got {self.selection!r}")
        check_choices(self)
        check_positive("penalty_weight", self.penalty_weight, zero_ok=True)
        check_positive("weight_decay", self.weight_decay, zero_ok=True)

    def num_selected(self, num_views: int) -> int:
        """Return how many of num_views views an episode keeps."""
        return max(1, int(self.selection * num_views))
