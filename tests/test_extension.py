"""How the extension is named and loaded, and its operators as PyTorch sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast import extension
from rada_fast.config import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import backends

USABLE = backends()["cpu"] == "usable"
needs_extension = pytest.mark.skipif(not USABLE, reason=f"cpu backend: {backends()['cpu']}")


def test_the_library_is_named_after_what_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = extension.library_in(Path("place"))
    monkeypatch.setenv("DEBUG", "1")
    assert extension.library_in(Path("place")) != before


def test_a_missing_or_broken_library_is_a_reason_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "search", lambda cuda=False: (None, []))
    assert "run `rada-fast build`" in str(extension._load())
    broken = tmp_path / extension.LIBRARY
    broken.write_bytes(b"no library")
    monkeypatch.setattr(extension, "search", lambda cuda=False: (broken, []))
    assert "does not load" in str(extension._load())


def test_importing_compiles_and_loads_nothing() -> None:
    code = "import sys, rada_fast; print('rada_fast.extension' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


# opcheck itself looks at the gradients of inputs that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@needs_extension
def test_the_operators_keep_pytorchs_rules() -> None:
    config = AdapterConfig.official(32, num_heads=2)
    adapter = RationalAdapter(config)
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
    image, text = (normalize(torch.randn(rows, 32), dim=-1).requires_grad_() for rows in (2, 5))
    parameters: list[Any] = [
        adapter.get_parameter(f"{name}.{part}")
        for name in ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")
        for part in ("weight", "bias")
    ]
    options = (config.num_heads, 1.0, True, 1.0, True, "l2", False, False, True)
    torch.library.opcheck(
        torch.ops.rada_fast.rational_adapter.default, (image, text, torch.tensor(20.0), *parameters, *options)
    )


@needs_extension
def test_every_copy_of_the_vector_loops_gives_the_same_answers() -> None:
    code = """
import torch, rada_fast
from rada_fast import extension
torch.manual_seed(0)
adapter = rada_fast.RationalAdapter(rada_fast.AdapterConfig.official(64))
torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
image, text = (torch.nn.functional.normalize(torch.randn(rows, 64), dim=-1) for rows in (2, 37))
with torch.no_grad(), rada_fast.use_backend("cpu"):
    ours = adapter(image, text, 20.0)
with torch.no_grad(), rada_fast.use_backend("reference"):
    error = (ours - adapter(image, text, 20.0)).norm() / ours.norm()
print(extension.cpu_paths()["vectors"], float(error))
"""
    names = set()
    for capability in ("default", "avx2", "avx512"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        name, error = done.stdout.split()
        names.add(name)
        assert float(error) < 1e-5, name
    assert "baseline" in names
