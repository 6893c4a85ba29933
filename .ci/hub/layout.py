"""Write the Triton kernels in the layout of Hugging Face's kernel-builder, from the sources of the package.

    python .ci/hub/layout.py build/hf-kernels        # what `make hf-kernels` runs

The folder gets build.toml, flake.nix, CARD.md and torch-ext/rada_adapter/: every module that the Triton backend
imports, with relative imports, as the Hub loads several versions of a kernel side by side. The operators are registered
in the namespace that kernel-builder's own module _ops gives. For loading without kernel-builder, build/torch-cuda/ has
the same modules with such a module _ops and the metadata. A kernel without compiled code needs no more than that.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "rada_adapter"
OPS = '''"""The namespace of this build's operators."""

import torch

_NAME = "{name}"
ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_NAME}}::{{op_name}}"
'''
NAMESPACE = {
    'torch.library.Library("rada_fast", "FRAGMENT")': (
        'torch.library.Library(_ops.add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")'
    ),
    'f"rada_fast::{name}"': "_ops.add_op_namespace_prefix(name)",
    "torch.ops.rada_fast": "_ops.ops",
}
"""The places in the sources that name the namespace of the operators, and what stands there in a kernel of the Hub."""


def source_of(module: str) -> Path | None:
    """Return the file of a module of the package, or None for something else."""
    head, *parts = module.split(".")
    if head != "rada_fast":
        return None
    top = ROOT / "kernels" if parts[:1] == ["kernels"] else ROOT / "rada_fast"
    place = top.joinpath(*parts[1:] if parts[:1] == ["kernels"] else parts)
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def place_of(file: Path) -> Path:
    """Return where a file of the package lies in the kernel."""
    return file.relative_to(ROOT if file.is_relative_to(ROOT / "kernels") else ROOT / "rada_fast")


def imported(file: Path) -> set[Path]:
    """Return the files of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [source_of(f"{node.module}.{alias.name}") or source_of(node.module) for alias in node.names]
            found |= {name for name in names if name is not None}
    return found - {ROOT / "rada_fast" / "__init__.py"}


def needed(start: Path) -> set[Path]:
    """Return the files of the package that a file needs."""
    found, left = set(), imported(start)
    while left:
        file = left.pop()
        found.add(file)
        left |= imported(file) - found
    return found | {ROOT / "kernels" / "__init__.py"}


def rewritten(text: str, place: Path) -> str:
    """Return a source with relative imports and the kernel's own namespace of operators."""
    dots = "." * len(place.parts)
    text = re.sub(r"^(\s*)from rada_fast\.([\w.]+) import", rf"\1from {dots}\2 import", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from rada_fast import", rf"\1from {dots} import", text, flags=re.MULTILINE)
    replaced = text
    for ours, theirs in NAMESPACE.items():
        replaced = replaced.replace(ours, theirs)
    if replaced != text:
        future = "from __future__ import annotations\n"
        replaced = replaced.replace(future, f"{future}\nfrom {dots} import _ops\n", 1)
    return replaced


def write_modules(folder: Path) -> None:
    """Write the modules of the kernel to a folder."""
    public = HERE / f"{PACKAGE}.py"
    texts = {Path("__init__.py"): public} | {place_of(file): file for file in needed(public)}
    for place, file in sorted(texts.items()):
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewritten(file.read_text(encoding="utf-8"), place), encoding="utf-8")
    for inner in {parent for place in texts for parent in place.parents} - {Path()}:
        if not (folder / inner / "__init__.py").is_file():
            (folder / inner / "__init__.py").write_text("", encoding="utf-8")


def write_variant(folder: Path, modules: Path) -> None:
    """Write what kernel-builder would make of the modules for devices with CUDA."""
    shutil.copytree(modules, folder)
    build = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))
    sources = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    name = f"_{PACKAGE}_cuda_{hashlib.sha256(sources).hexdigest()[:7]}"
    (folder / "_ops.py").write_text(OPS.format(name=name), encoding="utf-8")
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*.py"))
    }
    metadata = {
        "name": build["general"]["name"],
        "id": name,
        "version": build["general"]["version"],
        "license": build["general"]["license"],
        "python-depends": [],
        "backend": {"type": "cuda", "archs": build["torch-noarch"]["cuda_capabilities"]},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def write(target: Path) -> Path:
    """Write the whole layout to a folder, which is emptied before. Returns the folder of the loadable variant."""
    shutil.rmtree(target, ignore_errors=True)
    modules = target / "torch-ext" / PACKAGE
    write_modules(modules)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, target / name)
    variant = target / "build" / "torch-cuda"
    write_variant(variant, modules)
    return variant


if __name__ == "__main__":
    print(f"written: {write(Path(sys.argv[1]))}")
