"""Operators are made of named groups of tensors and options, which agree with the compiled library's schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import ROLES
from rada_fast.ops._backends import adapter_operator, compiled
from rada_fast.ops._backends.registration import Layout, define, register_gradient
from tests.ops.support import needs_extension


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


class Settings(NamedTuple):
    factor: float
    names: str
    kinds: list[bool]
    dtype: torch.dtype


class Product(NamedTuple):
    product: Tensor


class Factors(NamedTuple):
    left_copy: Tensor
    right_copy: Tensor | None


def test_a_schema_is_made_of_the_annotations() -> None:
    assert Layout(Pair, Settings).schema() == (
        "Tensor left, Tensor? right, float factor, str names, bool[] kinds, ScalarType dtype"
    )
    assert Layout(Pair, results=(Pair,), prefix="d").schema() == "Tensor dleft, Tensor dright"


def test_an_empty_result_is_a_tensor_that_is_absent() -> None:
    left, empty = torch.ones(0, 2), torch.empty(0)
    assert Layout(Pair).split([left, empty]) == [Pair(left, empty)]
    assert Layout(Pair, results=(Pair,)).split([left, empty]) == [Pair(left, None)]


class Scaling(NamedTuple):
    factor: float


def multiply(pair: Pair, scaling: Scaling) -> tuple[Product, Factors]:
    right = torch.ones_like(pair.left) if pair.right is None else pair.right
    kept = Factors(pair.left.clone(), None if pair.right is None else pair.right.clone())
    return Product(scaling.factor * pair.left * right), kept


def multiply_gradients(given: Any, arguments: list[Any], kept: tuple[Tensor, ...], wanted: list[Any]) -> list[Pair]:
    (dproduct,), (pair, scaling), (left, right), (asked,) = given, arguments, kept, wanted
    assert asked == Pair(True, pair.right is not None)
    dleft = scaling.factor * dproduct if pair.right is None else scaling.factor * dproduct * right
    return [Pair(dleft, None if pair.right is None else scaling.factor * dproduct * left)]


# opcheck itself reads gradients of tensors that are no leaves, of which PyTorch warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_an_operator_made_of_groups_keeps_pytorchs_rules() -> None:
    arguments_layout = Layout(Pair, Scaling)
    define(
        "multiply_of_a_test", arguments_layout, Layout(Product, Factors, results=(Product, Factors)), multiply, multiply
    )
    register_gradient("multiply_of_a_test", arguments_layout, Layout(Pair), 1, multiply_gradients)
    operator = torch.ops.rada_fast.multiply_of_a_test.default
    left, right = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for second in (right, None):
        torch.library.opcheck(operator, (left, second, 2.0))
    assert torch.autograd.gradcheck(lambda *pair: operator(*pair, 2.0)[0], (left, right))
    assert not operator(left, right, 2.0)[1].requires_grad
    with torch.no_grad():
        assert not operator(left, right, 2.0)[0].requires_grad


@needs_extension
def test_the_groups_of_the_adapter_are_the_schemas_of_the_library() -> None:
    forward = adapter_operator.arguments_of(compiled.CpuOptions)
    backward = adapter_operator.backward_arguments_of(compiled.CpuOptions, [compiled.CpuKept])
    for name, layout in (("rational_adapter", forward), ("rational_adapter_backward", backward)):
        schema = str(getattr(torch.ops.rada_fast, name).default._schema)
        assert schema.startswith(f"rada_fast::{name}({layout.schema()}) -> "), name


def test_parameters_come_in_the_order_of_the_roles() -> None:
    fields = [f"{role}_{part}" for role in ROLES for part in ("weight", "bias")]
    assert list(adapter_operator.Parameters._fields) == fields
