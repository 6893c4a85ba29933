"""The kernels in the layout of the Hub stand alone, load beside the package, and compute what the reference does."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYOUT = runpy.run_path(str(ROOT / ".ci" / "hub" / "layout.py"))
PROGRAM = """
import importlib.util, sys
import torch
from torch.nn.functional import normalize
import rada_fast
from rada_fast.ops import use_backend

# The library kernels imports a variant in the same way, under a name of its own.
spec = importlib.util.spec_from_file_location("some_name", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["some_name"] = kernel
spec.loader.exec_module(kernel)

torch.manual_seed(0)
config = kernel.AdapterConfig.official(64)
adapter = rada_fast.RationalAdapter(rada_fast.AdapterConfig.official(64))
torch.nn.init.normal_(adapter.out_proj.weight, std=0.1)
image, text = normalize(torch.randn(2, 64), dim=-1), normalize(torch.randn(5, 64), dim=-1)
output = kernel.rational_adapter(image, text, 10.0, dict(adapter.named_parameters()), config)
with use_backend("reference"):
    expected = adapter(image, text, 10.0)
wanted = torch.autograd.grad(expected.square().sum(), adapter.parameters())
gradients = torch.autograd.grad(output.logits.square().sum(), adapter.parameters())
torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)
assert not any(name.startswith("rada_fast.kernels") for name in sys.modules), "it needs the package"
"""


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = LAYOUT["write"](tmp_path_factory.mktemp("hub") / "rada-adapter")
    return folder


def test_the_modules_import_themselves_torch_and_triton_alone(variant: Path) -> None:
    modules = variant.parents[1] / "torch-ext" / "rada_adapter"
    for path in modules.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.ops.rada_fast" not in text
        assert '"rada_fast::' not in text
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert others <= {"torch", "triton"}, path


def test_the_layout_has_what_the_builder_and_the_hub_read(variant: Path) -> None:
    folder = variant.parents[1]
    build = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))
    assert (folder / "torch-ext" / build["general"]["name"].replace("-", "_") / "__init__.py").is_file()
    assert {path.name for path in folder.iterdir()} == {"build.toml", "flake.nix", "CARD.md", "torch-ext", "build"}
    assert (variant / "metadata.json").is_file()


def test_the_kernel_computes_what_the_reference_does(variant: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(variant)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
