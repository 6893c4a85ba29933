"""The first step's launch gives the output projection its gradients, and exact zeros to all other parameters."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.output_projection_gradients import output_projection_gradients
from rada_fast.kernels.parameter_gradients import ROLE_ORDER

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 20.0


class Case(NamedTuple):
    """Hold the sizes and types of one launch.

    images: those of one episode. dtype, features: the types of the products, and of f, T and the gradients of logits
    and masks. kinds: the query kinds in use. given: the results that have gradients.
    """

    episodes: int
    images: int
    classes: int
    width: int
    heads: int
    dtype: torch.dtype
    features: torch.dtype
    kinds: tuple[str, ...] = ("text", "rational", "image")
    matrix: bool = True
    bias: bool = True
    given: tuple[str, ...] = ("dlogits", "dmask")
    roles: tuple[str, ...] = ROLE_ORDER


CASES = {
    "one row": Case(1, 1, 1, 32, 1, F32, F32),
    "tiles of up to three images": Case(2, 3, 15, 32, 4, F32, F32, given=("dlogits",)),
    "tiles of two images": Case(1, 3, 17, 64, 1, F32, F32, kinds=("image",), matrix=False),
    "tiles of many images": Case(2, 5, 33, 96, 2, BF16, BF16, bias=False),
    "tiles of two images in bfloat16": Case(3, 2, 65, 32, 4, BF16, BF16, kinds=("rational", "image")),
    "a gradient of the mask alone": Case(2, 2, 9, 32, 2, F16, F16, given=("dmask",)),
    "features in float32": Case(2, 2, 40, 64, 2, BF16, F32, kinds=("text",)),
    "the output projection alone": Case(1, 2, 21, 128, 8, F32, F32, kinds=("text", "image"), roles=("output",)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_an_output_projection_of_zeros(device: str, name: str) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batch, head = case.episodes * case.images, case.width // case.heads
    rows = (batch, case.classes, case.width)

    def draw(*shape: int, dtype: torch.dtype = case.features) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    image, text = draw(batch, case.width), draw(case.classes, case.width)
    results: dict[str, Tensor | None] = {"dlogits": draw(batch, case.classes), "dmask": draw(*rows)}
    results = {key: value if key in case.given else None for key, value in results.items()}
    outputs = {kind: draw(*rows, dtype=case.dtype) for kind in ("text", "rational")} | {
        "image": draw(batch, case.width, dtype=F32)
    }
    factors = torch.rand(2, case.heads, batch, case.classes, generator=generator) + 0.5

    # The exact gradients: each episode's own sum over its rows.
    r = image.double()[:, None] * text.double()
    da = torch.zeros(rows, dtype=torch.float64)
    if (dlogits := results["dlogits"]) is not None:
        da += SCALE * dlogits.double()[..., None] * r
    if (dmask := results["dmask"]) is not None:
        da += dmask.double()
    o = torch.zeros(rows, dtype=torch.float64)
    for at, kind in enumerate(("text", "rational")):
        if kind in case.kinds:
            w = factors[at].double().permute(1, 2, 0).repeat_interleave(head, -1) if case.matrix else 1.0
            o += w * outputs[kind].double()
    if "image" in case.kinds:
        o += outputs["image"].double()[:, None]
    da, o = (value.reshape(case.episodes, -1, case.width) for value in (da, o / len(case.kinds)))

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    used = {kind: moved(value if kind in case.kinds else None) for kind, value in outputs.items()}
    unread = torch.empty(0, device=device)
    attended = Attended(
        used["text"], used["rational"], used["image"], logsums=unread, image_logsums=unread,
        factors=moved(factors if case.matrix else None), totals=unread,
    )  # fmt: skip
    shape = (case.episodes, case.width, case.width)
    weights, biases = output_projection_gradients(
        image.to(device), text.to(device), torch.tensor(SCALE, device=device), attended, moved(results["dlogits"]),
        moved(results["dmask"]), {role: torch.zeros(shape, dtype=case.features, device=device) for role in case.roles},
        num_heads=case.heads, bias=case.bias, dtype=case.dtype,
    )  # fmt: skip

    assert set(weights) == set(case.roles)
    assert set(biases) == (set(case.roles) if case.bias else set())
    # Two operands of a product are rounded, and the result.
    eps = 4 * torch.finfo(case.dtype).eps
    for found, exact in [(weights["output"], da.mT @ o)] + ([(biases["output"], da.sum(1))] if case.bias else []):
        assert (found.cpu().double() - exact).norm() <= eps * exact.norm()
    for role in case.roles:
        if role != "output":
            assert not weights[role].any()
            assert weights[role].shape == shape
            assert not case.bias or not biases[role].any()
    # An optimiser may change one gradient in place, as clipping does, so none lies in another's memory.
    spans = sorted(
        (value.data_ptr(), value.data_ptr() + value.nbytes) for value in (*weights.values(), *biases.values())
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
