"""The extension is named after what it was built from, loads or says why not, and keeps PyTorch's rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.extension import libraries
from rada_fast.modules import RationalAdapter
from tests.ops.support import needs_extension


def test_the_library_is_named_after_sources_and_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = libraries.library_in(Path("place"))
    monkeypatch.setenv("DEBUG", "1")
    assert libraries.library_in(Path("place")) != before


def test_a_missing_or_broken_library_is_a_reason_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "search", lambda cuda=False: (None, []))
    assert "run `rada-fast build`" in str(libraries._load())
    broken = tmp_path / libraries.LIBRARY
    broken.write_bytes(b"no library")
    monkeypatch.setattr(libraries, "search", lambda cuda=False: (broken, []))
    assert "does not load" in str(libraries._load())


def test_importing_compiles_and_loads_nothing() -> None:
    code = "import sys, rada_fast; print('rada_fast.extension.libraries' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


# opcheck itself reads gradients of tensors that are no leaves, of which PyTorch warns.
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
    options = (config.num_heads, 1.0, True, 1.0, True, "l2", False, False, *6 * [None], 1.0, False, True)
    torch.library.opcheck(
        torch.ops.rada_fast.rational_adapter.default, (image, text, torch.tensor(20.0), *parameters, *options)
    )
