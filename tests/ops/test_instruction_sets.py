"""Every copy of the vector loops that this processor can run gives the same answers as the one it chooses.

PyTorch obeys ATEN_CPU_CAPABILITY without asking the processor, so only older instruction sets than its own choice are
tried, each in a process of its own, because the choice is made once. With `python -m` this module prints its answers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast import _env
from rada_fast.config.method import AdapterConfig
from rada_fast.extension import libraries
from rada_fast.models.vision_language import load_model
from rada_fast.modules import RationalAdapter
from rada_fast.ops import (
    EpisodicOptimizer,
    augmix,
    multi_view_crops,
    prediction_loss,
    random_augmix,
    random_views,
    use_backend,
    whole_view,
)

from .support import needs_extension

COPIES = {"default": "baseline", "avx2": "AVX2", "avx512": "AVX512"}
"""This table gives the copy of the loops that each value of ATEN_CPU_CAPABILITY selects."""


def older() -> list[str]:
    """Return the older instruction sets that this processor has besides the one that PyTorch chooses."""
    names = list(COPIES)
    current = _env.cpu_capability().lower()
    return names[: names.index(current)] if current in names else names[:1]


def answers() -> dict[str, Any]:
    """Return the loops' results: errors where they may round differently, hashes where they may not."""
    torch.manual_seed(0)
    # Products are split by columns and by depth; this is more than one block of both.
    width = 160
    adapter = RationalAdapter(AdapterConfig.official(width))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
    image, text = (normalize(torch.randn(rows, width), dim=-1) for rows in (2, 37))

    def solve(backend: str, stored: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        of = copy.deepcopy(adapter).to(stored).to(dtype)
        with use_backend(backend):
            logits = of(image.to(stored).to(dtype), text.to(stored).to(dtype), 20.0).double()
        gradient = torch.autograd.grad(logits.square().sum(), of.get_parameter("v_proj.weight"))[0]
        return logits.detach(), gradient.double()

    def error(dtype: torch.dtype) -> float:
        pairs = zip(solve("cpu", dtype, dtype), solve("reference", dtype, torch.float64), strict=True)
        return max(float((ours - exact).norm() / exact.norm()) for ours, exact in pairs)

    return {
        "vectors": libraries.cpu_paths()["vectors"],
        "float32": error(torch.float32),
        "bfloat16": error(torch.bfloat16),
        "encoder": encoder_error(),
        "loss": prediction_loss(20 * image[None] @ text.mT, "marginal").item(),
        "optimizer": optimizer_follows_pytorch(),
        "views": views_hash(),
    }


def encoder_error() -> float:
    """Return the error of the shipped model's features, by whatever encodes images here."""
    model, images = load_model("embedded"), torch.randn(5, 3, 48, 48)
    features = model.image_features(images).double()
    return float(
        (features - normalize(copy.deepcopy(model.model).double().encode_image(images.double()), dim=-1)).norm()
    )


def optimizer_follows_pytorch() -> bool:
    """Return whether the optimiser equals PyTorch's own loops of the same instruction set, bit for bit."""
    parameter = torch.randn(1023)
    ours = EpisodicOptimizer({"w": parameter}, 1, lr=8e-3, weight_decay=0.1, torch_roots=True, backend="cpu")
    plain = parameter.clone()
    theirs = torch.optim.AdamW([plain], lr=8e-3, weight_decay=0.1, foreach=False)
    for _ in range(3):
        plain.grad = torch.randn(1023)
        ours.step({"w": plain.grad[None]})
        theirs.step()
    return torch.equal(ours.parameters["w"][0], plain)


def views_hash() -> list[str]:
    """Return the hash of crops and AugMix views of pictures that are wide, tall, small and large.

    Among their pixels are blocks of black and white, where bicubic weights give sums out of range.
    """
    size, mean, std = 33, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    found = []
    for height, width in ((37, 50), (300, 200), (30, 400), (400, 20)):
        pixels = torch.randint(-128, 384, (height, width, 3)).clamp(0, 255).to(torch.uint8)
        views = random_views(height, width, size, 6, torch.Generator().manual_seed(1), backend="cpu")
        whole = whole_view(height, width, size)
        bicubic = torch.cat([whole[:, :-1], torch.ones_like(whole[:, -1:])], dim=1)
        views = torch.cat([views, whole, bicubic])
        found.append(multi_view_crops([pixels], views, size, mean, std, backend="cpu"))
        mixed = random_augmix(height, width, size, 6, torch.Generator().manual_seed(1), backend="cpu")
        found.append(augmix([pixels], mixed, size, mean, std, backend="cpu"))
    return [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in found]


@pytest.fixture(scope="module")
def own() -> dict[str, Any]:
    return answers()


def check(found: dict[str, Any], own: dict[str, Any]) -> None:
    assert found["float32"] < 1e-5
    assert found["bfloat16"] < 2e-2
    assert found["encoder"] < 1e-5
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert found["optimizer"]
    assert found["views"] == own["views"], "pixels are the same to the bit"


@needs_extension
def test_the_copy_that_the_processor_chooses_is_right(own: dict[str, Any]) -> None:
    assert own["vectors"] == COPIES.get(_env.cpu_capability().lower(), "baseline")
    check(own, own)


@needs_extension
@pytest.mark.parametrize("capability", older())
def test_every_older_copy_gives_the_same_answers(capability: str, own: dict[str, Any]) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_instruction_sets"],
        cwd=Path(__file__).resolve().parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["vectors"] == COPIES[capability]
    check(found, own)


@needs_extension
def test_the_copies_share_no_name_that_a_linker_could_merge() -> None:
    objects = sorted((libraries.build_folder() / "objects").glob("*_loops_*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no objects of a build here, or no nm to read them")
    # Of several weak symbols with one name the linker keeps any, for instance the one compiled for AVX-512.
    done = subprocess.run(["nm", "-A", "-C", *objects], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if re.search(r":[0-9a-f]{16} [WVu] ", line)] == []


def test_instruction_sets_that_the_processor_may_lack_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for current, expected in {
        "DEFAULT": [],
        "AVX2": ["default"],
        "AVX512": ["default", "avx2"],
        "SVE256": ["default"],
    }.items():
        monkeypatch.setattr(_env, "cpu_capability", lambda current=current: current)
        assert older() == expected


if __name__ == "__main__":
    print(json.dumps(answers()))
