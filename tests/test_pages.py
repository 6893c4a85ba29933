"""The Python code of the README and of docs/python.md runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rada_fast.compat import SimpleMultiheadAttention
from rada_fast.embedded import world

ROOT = Path(__file__).parents[1]
WIDTH = 512


def features(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world.write_imagefolder(tmp_path / "pictures", 1, seed=1, shift=None)
    paths = sorted((tmp_path / "pictures").rglob("*.png"))[:2]
    for name, path in zip(("a.jpg", "b.jpg"), paths, strict=True):
        path.rename(tmp_path / name)
    # The names that a page takes for granted.
    names: dict[str, Any] = {
        "image_features": features(4),
        "other_image_features": features(2),
        "text_features": features(3),
        "view_features": features(2, 8),
        "labels": torch.tensor([0, 1, 2, 0]),
        "logit_scale": 100.0,
        "class_names": ["red star", "blue ring", "green heart"],
        "paths": [tmp_path / "a.jpg", tmp_path / "b.jpg"],
        "model": nn.ModuleDict({"mha": SimpleMultiheadAttention(WIDTH, num_heads=8, t=1.0)}),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        # Its weights are a download, so the model that is shipped takes its place.
        code = block.replace('"ViT-B-16-quickgelu"', '"embedded"').replace(', pretrained="openai"', "")
        exec(compile(code, page, "exec"), names)
