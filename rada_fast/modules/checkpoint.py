"""Save adapters as safetensors, and load these or the published code's files without executing pickled code.

The sizes of tensors and the configuration that a file states are compared with its contents before they are used. No
more memory is allocated than the file fills.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rada_fast.config.method import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules.rational_adapter import RationalAdapter, unwrapped
from rada_fast.ops.rational_adapter import parameter_shapes
from rada_fast.system import files

FORMAT = "rada_fast.adapter.v1"
RUN_FILES = ("adapter.safetensors", "rada-ft-adapter.safetensors", "rada-adapter.safetensors")
"""The files to which the runs of this package write their adapter; the one that a run writes last comes first."""

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_WIDTH = 2**14
"""The widest embedding that is loaded, several times as wide as that of any vision-language model."""


def save_adapter(adapter: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write an adapter as safetensors with its configuration in the header; the file appears whole or not at all.

    adapter: a RationalAdapter, or one inside DistributedDataParallel, AveragedModel (the average is written) or
        torch.compile's wrapper. A projection whose weight is parametrised (torch.nn.utils.parametrize) is written with
        the weight that it computes with. Tied projections are all written.
    path: the file to write, in a folder that exists.

    Raises UserError where the file cannot be written, or where a projection has more than its weight and bias (LoRA),
    is on the meta device, is sharded, or holds NaN, infinity or a type that load_adapter refuses; TypeError where
    adapter is no RationalAdapter.
    """
    if not Path(path).name or "\0" in str(path):
        raise UserError(f"path must name a file to write the adapter to, got {os.fspath(path)!r}")
    try:
        files.write_tensors(Path(path), *stored_form(adapter))
    except OSError as error:
        raise UserError(f"adapter cannot be written to {path}: {error.strerror}") from None


def stored_form(adapter: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of an adapter's file; see save_adapter for the argument and the errors."""
    adapter = unwrapped(adapter)
    parameters = adapter.stored_parameters()
    for name, value in parameters.items():
        if value.dtype not in _FLOATING:
            raise UserError(
                f"adapter's {name} must be float16, bfloat16, float32 or float64 to be saved, got {value.dtype}"
            )
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"adapter's {name} holds NaN or infinity, which no file of an adapter may hold")
    # Every tensor is copied: safetensors refuses tensors that share their memory, as tied projections do.
    tensors = {name: value.detach().cpu().clone() for name, value in parameters.items()}
    return tensors, {"format": FORMAT, "config": json.dumps(adapter.config.to_dict())}


def load_adapter(path: str | os.PathLike[str], config: AdapterConfig | None = None) -> RationalAdapter:
    """Read an adapter from our own safetensors, or from a checkpoint of the published code.

    path: a file, or a run's output folder. The folder is one of ``rada-fast eft``, of ``rada-fast fft`` (the last
        stage's adapter is loaded) or of the published code (its newest checkpoint is loaded). A published file may hold
        a whole model's dictionary with the adapter under a prefix such as "mha.", or the adapter's dictionary alone.
        Pickled code in it is never executed: an object that is neither a tensor nor a plain container loads as an
        inert object.
    config: the arithmetic. None takes the configuration in the file, or for published files the official preset at the
        file's width. These do not store the temperature: give a configuration if it was not 1.

    Returns a RationalAdapter in the file's dtype (float16 and bfloat16 become float32).
    Raises UserError where the file is missing, damaged, or holds no adapter that fits.
    """
    stored = read_adapter(path)
    return stored.build(stored.config() if config is None else config)


@dataclass(frozen=True)
class StoredAdapter:
    """Hold the contents of an adapter's file.

    path: the file.
    tensors: the parameters.
    stated: the configuration in the file, or None: save_adapter's files have one, published files have none.
    factor: the input scale factor of the published variant that wrote the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    stated: AdapterConfig | None
    factor: float

    def config(self) -> AdapterConfig:
        """Return the configuration in the file, or for a published file the official preset at its width.

        Raises UserError where the width does not fit the preset.
        """
        width, bias = self.tensors["out_proj.weight"].shape[0], "out_proj.bias" in self.tensors
        return self.stated or _official_config(self.path, width, bias=bias, factor=self.factor)

    def build(self, config: AdapterConfig) -> RationalAdapter:
        """Return the adapter with a configuration. Raises UserError where the tensors do not fit it."""
        return _build(self.path, self.tensors, config)


def read_adapter(path: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter's file once. path: see load_adapter.

    Raises UserError where the file is missing, damaged, or holds no adapter.
    """
    path = _adapter_file(Path(path))
    try:
        size = path.stat().st_size
        if _is_safetensors(path, size):
            state, stated = _read_safetensors(path)
        else:
            state, stated = _read_published(path, size), None
    except OSError as error:
        raise UserError(f"adapter checkpoint {path} cannot be read: {error.strerror or error}") from None
    tensors, factor = _adapter_entries(path, state, size)
    return StoredAdapter(path, tensors, stated, factor)


def _adapter_file(path: Path) -> Path:
    """Return the path itself where it is a file, or the file that a run's folder contains or points to."""
    if "\0" in str(path):
        raise UserError(f"adapter checkpoint must be a path, got one with a NUL character: {str(path)!r}")
    try:
        path = path.expanduser()
        if path.is_dir():
            return _file_of_run(path)
        if path.is_file():
            return path
        missing = not path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"adapter checkpoint {path} cannot be read: {reason}") from None
    raise UserError(f"adapter checkpoint {path} {'does not exist' if missing else 'is not a regular file'}")


def _file_of_run(folder: Path) -> Path:
    for name in RUN_FILES:
        if (folder / name).is_file():
            return folder / name
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        index = place / "checkpoint"
        if index.is_file():
            with index.open("rb") as file:
                named = Path(file.read(4096).decode("utf-8", "replace").replace("\0", "").strip()).name
            if named and (place / named).is_file():
                return place / named
    raise UserError(
        f"adapter checkpoint folder {folder} holds no file named 'checkpoint' that points to one, and none of "
        f"{', '.join(RUN_FILES)}"
    )


def _is_safetensors(path: Path, size: int) -> bool:
    """Return whether the file begins like safetensors: the header's length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < size


def _read_safetensors(path: Path) -> tuple[dict[str, Any], AdapterConfig | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # not only safetensors' own: this PyTorch may lack a type, or a size may overflow
        raise UserError(f"adapter checkpoint {path} is not readable safetensors: {_one_line(error)}") from None
    form = metadata.get("format", "")
    if form.startswith("rada_fast.") and form != FORMAT:
        raise UserError(f"adapter checkpoint {path} has the format {_shown(form)!r}, this version reads {FORMAT!r}")
    if "config" not in metadata:
        return state, None
    try:
        values = json.loads(metadata["config"])
        if not isinstance(values, dict):
            raise UserError(f"it must be an object, got {type(values).__name__}")
        layers = values.get("num_layers", 1)
        stored_layers = len({name.split(".")[1] for name in state if re.fullmatch(r"layers\.\d+\..+", name)}) + 1
        # This is compared before a configuration is created, because a configuration lists all its parameters.
        if isinstance(layers, int) and layers > stored_layers:
            raise UserError(f"num_layers must be what the file holds, {stored_layers}, got {_shown(layers)}")
        for name, value in values.items():
            if isinstance(value, int | float) and not abs(value) < 2**63:
                raise UserError(f"{name} must be an ordinary number, got {value}")
        return state, AdapterConfig.from_dict(values)
    except RecursionError:
        reason = "it is nested too deeply"
    except (ValueError, TypeError, OverflowError) as error:
        reason = "it is not JSON with ordinary numbers"
        if isinstance(error, UserError):
            reason = _one_line(error)
    raise UserError(f"adapter checkpoint {path} has an unusable configuration: {reason}")


def _read_published(path: Path, size: int) -> dict[Any, Any]:
    """Read a torch file; classes other than tensors and plain containers are replaced by one that does nothing."""
    try:
        with warnings.catch_warnings():
            # torch warns about pickles that it did not write; here it only matters whether they load.
            warnings.simplefilter("ignore")
            inert = [(type("Inert", (_Inert,), {}), name) for name in _named_classes(path, size)]
            with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can make the unpickler fail in any way
        # PyTorch's message advises loading without the safeguard, so only the class name in it is quoted.
        named = re.search(r"GLOBAL ([A-Za-z_][\w.]*\.\w+)", str(error))
        reason = "it is damaged, or holds more than tensors and plain containers"
        if named:
            reason = f"it refers to {named[1][:100]}"
        raise UserError(
            f"adapter checkpoint {path} is not a file that can be read without executing code: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"adapter checkpoint {path} must hold a dictionary of tensors, got {_kind(content)}")
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise UserError(f"adapter checkpoint {path} must hold tensors under 'state_dict', got {_kind(inner)}")
    return inner


def _named_classes(path: Path, size: int) -> list[str]:
    """Return the names of classes in the file's pickle that torch would refuse to load.

    The list is empty for torch's older files, which are not zip archives: the restricted unpickler loads or refuses
    them unchanged.
    """
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        # torch compresses nothing and lets no two records overlap, so an archive that unpacks to more is not torch's.
        if sum(record.file_size for record in archive.infolist()) > size:
            raise UserError(f"adapter checkpoint {path} would unpack to more than the file's {size} bytes")
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


class _Inert:
    """Stand in for any class that a checkpoint names: this class takes any arguments and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _one_line(error: Exception) -> str:
    return _shown(" ".join(str(error).split()) or type(error).__name__)


def _shown(value: object) -> str:
    """Return a value from the file as text for a message: printable, and cut off where it is long."""
    try:
        text = str(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:201])
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind(value: object) -> str:
    return "an object of a class" if isinstance(value, _Inert) else type(value).__name__


def _adapter_entries(path: Path, state: Mapping[Any, Any], size: int) -> tuple[dict[str, Tensor], float]:
    """Return the adapter's tensors by their names without a prefix, and the published variant's input scale factor."""
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    prefixes = {
        name.removesuffix(marker)
        for name in named
        for marker in ("q_proj3.weight", "fc.weight", "q_proj1.weight", "q_proj2.weight")
        if name.endswith(marker) and f"{name.removesuffix(marker)}out_proj.weight" in named
    }
    if len(prefixes) != 1:
        found = "none" if not prefixes else _shown(", ".join(repr(prefix) for prefix in sorted(prefixes)))
        raise UserError(
            f"adapter checkpoint {path} must hold one rational adapter (q_proj1 ... out_proj), found prefixes: {found}"
        )
    prefix = prefixes.pop()
    if not prefix and len(named) < len(state):
        odd = next(name for name in state if not isinstance(name, str))
        raise UserError(f"adapter checkpoint {path} must name its tensors by texts, got {type(odd).__name__} {odd!r}")
    entries = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    factor = 1.0
    for leaf in ("weight", "bias"):
        if f"q_proj.{leaf}" in entries:  # This is q_proj1 in the query-key variant, which scales its inputs by 4 s.
            if f"q_proj1.{leaf}" in entries:
                raise UserError(
                    f"adapter checkpoint {path} must hold one of q_proj.{leaf} and q_proj1.{leaf}, holds both"
                )
            entries[f"q_proj1.{leaf}"] = entries.pop(f"q_proj.{leaf}")
            factor = 4.0
    if prefix:  # In a whole model's dictionary the prefix may have further entries, such as an unused "alpha".
        entries = {name: value for name, value in entries.items() if name.endswith((".weight", ".bias"))}
    entries.pop("alpha", None)
    tensors = {name: _plain(path, name, value, size) for name, value in entries.items()}
    exact = torch.float64 if any(value.dtype == torch.float64 for value in tensors.values()) else torch.float32
    weight = tensors.get("out_proj.weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise UserError(f"adapter checkpoint {path}: out_proj.weight must be a square matrix")
    if not 0 < len(weight) <= _MAX_WIDTH:
        raise UserError(f"adapter checkpoint {path}: its width must be from 1 to {_MAX_WIDTH}, got {len(weight)}")
    return {name: value.to(exact) for name, value in tensors.items()}, factor


def _plain(path: Path, name: str, value: object, size: int) -> Tensor:
    """Return a tensor of the file as a plain Tensor. Raises UserError unless it is dense, finite and has values."""
    problem = None
    if not isinstance(value, Tensor):
        problem = f"must be a floating-point tensor, got {_kind(value)}"
    elif value.is_nested or value.layout != torch.strided:
        problem = f"must be a dense tensor, got {'a nested one' if value.is_nested else value.layout}"
    elif value.is_meta:
        problem = "must have values, got a tensor of the meta device"
    elif value.is_quantized or value.dtype not in _FLOATING:
        problem = f"must be a floating-point tensor of float16, bfloat16, float32 or float64, got {value.dtype}"
    elif math.prod(value.shape) > _MAX_WIDTH**2:
        problem = f"must have at most {_MAX_WIDTH} x {_MAX_WIDTH} elements, got the shape {tuple(value.shape)}"
    elif math.prod(value.shape) * value.element_size() > size:
        # This is a view with strides of zero, or one past the end of its storage: its elements are not in the file.
        problem = f"must be held by the file's {size} bytes, got the shape {tuple(value.shape)}"
    elif not bool(torch.isfinite(value).all()):
        problem = "holds NaN or infinity"
    if problem is not None:
        raise UserError(f"adapter checkpoint {path}: {_shown(name)} {problem}")
    assert isinstance(value, Tensor)
    return value.detach().as_subclass(Tensor)


def _official_config(path: Path, embed_dim: int, *, bias: bool, factor: float) -> AdapterConfig:
    if embed_dim % 8:
        raise UserError(f"adapter checkpoint {path}: width {embed_dim} does not divide into the published 8 heads")
    return AdapterConfig.official(embed_dim, bias=bias, input_scale_factor=factor)


def _build(path: Path, state: dict[str, Tensor], config: AdapterConfig) -> RationalAdapter:
    width, stored_width = config.embed_dim, state["out_proj.weight"].shape[0]
    if width != stored_width:
        raise UserError(f"adapter checkpoint {path} has width {stored_width}, its configuration {_shown(width)}")
    if config.num_layers > len(state):
        raise UserError(
            f"adapter checkpoint {path} lacks layers: it holds {len(state)} tensors for {config.num_layers}"
        )
    wanted = parameter_shapes(config)
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    for problem, names in (("lacks", missing), ("has unexpected", extra), ("has wrong shapes:", wrong)):
        if names:
            raise UserError(f"adapter checkpoint {path} {problem} {_shown(', '.join(names[:4]))}")
    adapter = RationalAdapter(config, device="meta")
    adapter.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return adapter.requires_grad_(True)
