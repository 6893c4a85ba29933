"""Adapter checkpoints: safetensors of our own, and the published code's files, read without executing anything."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rada_fast.config import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules.rational_adapter import RationalAdapter
from rada_fast.ops.rational_adapter import parameter_shapes

FORMAT = "rada_fast.adapter.v1"


def save_adapter(adapter: RationalAdapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter as safetensors, its configuration in the header; the file appears whole or not at all.

    adapter: any RationalAdapter; path: the file to write, whose folder must exist.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(adapter.config.to_dict())}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_adapter(path: str | os.PathLike[str], config: AdapterConfig | None = None) -> RationalAdapter:
    """Read an adapter from our own safetensors, or from a checkpoint of the published code.

    path: a file, or a published run's output folder (its newest checkpoint is taken). Published files may be whole
        model dictionaries with the adapter under a prefix such as "mha.", or the adapter's dictionary alone. Pickled
        code in them is never executed: anything but tensors and plain containers loads as an inert object.
    config: the arithmetic; None takes the one in the file, or for published files the official preset at the file's
        width (the temperature is not stored there: give a configuration if it was not 1).

    Returns a RationalAdapter in the file's dtype (float16 and bfloat16 become float32).
    Raises UserError where the file is missing, damaged, or holds no adapter that fits.
    """
    path = _newest_checkpoint(Path(path))
    if _is_safetensors(path):
        state, stored = _read_safetensors(path)
    else:
        state, stored = _read_published(path), None
    state, factor = _adapter_entries(path, state)
    embed_dim = state["out_proj.weight"].shape[0]
    if config is None:
        config = stored or _official_config(path, embed_dim, bias="out_proj.bias" in state, factor=factor)
    return _build(path, state, config)


def _newest_checkpoint(path: Path) -> Path:
    """The file itself, or the newest checkpoint of a published run's folder."""
    if path.is_dir():
        for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
            index = folder / "checkpoint"
            if index.is_file():
                named = folder / Path(index.read_text().strip()).name
                if named.is_file():
                    return named
        raise UserError(f"adapter checkpoint folder {path} holds no file named 'checkpoint' that points to one")
    if not path.is_file():
        raise UserError(f"adapter checkpoint {path} does not exist")
    return path


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins like safetensors: the header's length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> tuple[dict[str, Any], AdapterConfig | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter checkpoint {path} is not readable safetensors: {error}") from None
    if "config" not in metadata:
        return state, None
    try:
        return state, AdapterConfig.from_dict(json.loads(metadata["config"]))
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter checkpoint {path} has an unusable configuration: {error}") from None


def _read_published(path: Path) -> dict[str, Any]:
    """A torch file, unpickled with every class but tensors and plain containers replaced by an inert one."""
    try:
        with warnings.catch_warnings():
            # torch warns of pickles it did not write; what matters is whether they load.
            warnings.simplefilter("ignore")
            inert = [(type("Inert", (_Inert,), {}), name) for name in _named_classes(path)]
            with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the unpickler fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"adapter checkpoint {path} is not a file that can be read without executing code: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"adapter checkpoint {path} must hold a dictionary of tensors, got {type(content).__name__}")
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise UserError(f"adapter checkpoint {path} must hold tensors under 'state_dict', got {type(inner).__name__}")
    return inner


def _named_classes(path: Path) -> list[str]:
    """Qualified names in the file's pickle that torch would not load by itself; none for torch's older, non-zip files,
    which the restricted unpickler takes or refuses as they are."""
    if not zipfile.is_zipfile(path):
        return []
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


class _Inert:
    """Stands in for whatever class a checkpoint names: takes any arguments and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _adapter_entries(path: Path, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], float]:
    """The adapter's own tensors under its own names, and the published variant's input scale factor."""
    prefixes = {
        name.removesuffix(marker)
        for name in state
        for marker in ("q_proj3.weight", "fc.weight", "q_proj1.weight", "q_proj2.weight")
        if isinstance(name, str) and name.endswith(marker) and f"{name.removesuffix(marker)}out_proj.weight" in state
    }
    if len(prefixes) != 1:
        found = "none" if not prefixes else ", ".join(repr(prefix) for prefix in sorted(prefixes))
        raise UserError(
            f"adapter checkpoint {path} must hold one rational adapter (q_proj1 ... out_proj), found prefixes: {found}"
        )
    prefix = prefixes.pop()
    entries = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    factor = 1.0
    for leaf in ("weight", "bias"):
        if f"q_proj.{leaf}" in entries:  # the query-key variant's name for q_proj1; it scales its inputs by 4 s
            entries[f"q_proj1.{leaf}"] = entries.pop(f"q_proj.{leaf}")
            factor = 4.0
    if prefix:  # a whole model's dictionary: what else lies under the prefix (an unused "alpha") is not the adapter's
        entries = {name: value for name, value in entries.items() if name.endswith((".weight", ".bias"))}
    entries.pop("alpha", None)
    tensors: dict[str, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"adapter checkpoint {path}: {name} must be a floating-point tensor")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"adapter checkpoint {path}: {name} holds NaN or infinity")
        # Parameter subclasses and half precision end here: plain tensors of float32 or float64.
        plain = value.detach().as_subclass(Tensor)
        tensors[name] = plain.to(torch.promote_types(plain.dtype, torch.float32))
    weight = tensors.get("out_proj.weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise UserError(f"adapter checkpoint {path}: out_proj.weight must be a square matrix")
    return tensors, factor


def _official_config(path: Path, embed_dim: int, *, bias: bool, factor: float) -> AdapterConfig:
    if embed_dim % 8:
        raise UserError(f"adapter checkpoint {path}: width {embed_dim} does not divide into the published 8 heads")
    return AdapterConfig.official(embed_dim, bias=bias, input_scale_factor=factor)


def _build(path: Path, state: dict[str, Tensor], config: AdapterConfig) -> RationalAdapter:
    wanted = parameter_shapes(config)
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    for problem, names in (("lacks", missing), ("has unexpected", extra), ("has wrong shapes:", wrong)):
        if names:
            raise UserError(f"adapter checkpoint {path} {problem} {', '.join(names[:4])}")
    adapter = RationalAdapter(config, device="meta")
    adapter.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return adapter.requires_grad_(True)
