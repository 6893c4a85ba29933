"""OpenAI's weights of CLIP: TorchScript archives, read without executing the program in them, and what they are.

An archive is a zip file. data.pkl describes a tree of modules by pickle's opcodes, the records beside it are the
numbers, and code/ is the program, which is never looked at. The reader below rebuilds tensors and nothing else: a class
of the program becomes an object without methods, and any other name that data.pkl asks for ends the reading.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_DESCRIPTION_BYTES = 2**26
"""The largest data.pkl that is read. OpenAI's largest has less than one MiB."""
MAX_DEPTH = 64
"""The deepest tree of modules that is read. CLIP's has six levels."""
NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives hold beside the weights, and that no other archive of a CLIP is known to hold."""

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """An object of the archive: a module or anything else whose class is part of the program. It has no methods."""

    fields: object = None

    def __setstate__(self, fields: object) -> None:
        self.fields = fields


def is_archive(path: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return any(name.endswith("/constants.pkl") for name in names) and any(name.endswith("/data.pkl") for name in names)


def read_archive(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript archive by the names that state_dict would give them.

    Raises ValueError if the file is damaged, or asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors_of(_Reader(archive).load())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    except Exception as error:  # a damaged pickle may raise anything, such as a KeyError or a MemoryError
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None


class _Reader(pickle.Unpickler):
    """Reads the description of an archive. It finds no function or class but those that rebuild tensors."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        description = next((name for name in archive.namelist() if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
        if description is None:
            raise ValueError("it has no data.pkl")
        if archive.getinfo(description).file_size > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"its data.pkl has more than {MAX_DESCRIPTION_BYTES} bytes")
        self._folder = description.removesuffix(".pkl")
        self._storages: dict[str, torch.UntypedStorage] = {}
        super().__init__(io.BytesIO(archive.read(self._stored(description))))

    def _stored(self, name: str) -> zipfile.ZipInfo:
        """Return a record that is not compressed. A small file could otherwise fill up the memory."""
        record = self._archive.getinfo(name)
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {name} is compressed, which PyTorch's numbers are not")
        return record

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name of the description stands for. Raises ValueError for a name that is not known."""
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *others: tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, *others: value,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_floatlist", "build_boollist"):
            return list
        raise ValueError(f"it asks for {module}.{name}, which is no part of tensors")

    def persistent_load(self, identity: Any) -> tuple[torch.UntypedStorage, torch.dtype]:
        """Return the numbers that a tensor refers to, and their type."""
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage")
        if key not in self._storages:
            content = bytearray(self._archive.read(self._stored(f"{self._folder}/{key}")))
            self._storages[key] = (
                torch.frombuffer(content, dtype=torch.uint8).untyped_storage() if content else (torch.UntypedStorage(0))
            )
        storage = self._storages[key]
        if storage.nbytes() < count * dtype.itemsize:
            raise ValueError(f"its record {key} is cut off")
        return storage, dtype


def _rebuilt(
    stored: tuple[torch.UntypedStorage, torch.dtype], offset: int, size: tuple[int, ...], stride: tuple[int, ...],
    *others: object,
) -> Tensor:  # fmt: skip
    """Return a tensor on the CPU. PyTorch raises RuntimeError if it would leave its storage."""
    storage, dtype = stored
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _tensors_of(root: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def collect(value: object, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"its modules are nested more than {MAX_DEPTH} levels deep")
        fields = value.fields if isinstance(value, _Module) else None
        for name, field in fields.items() if isinstance(fields, dict) else ():
            if isinstance(field, Tensor):
                found[f"{prefix}{name}"] = field
            elif isinstance(field, _Module):
                collect(field, f"{prefix}{name}.", depth + 1)

    collect(root, "", 0)
    return found


def architecture_of(state: dict[str, Tensor]) -> dict[str, Any] | None:
    """Return the architecture of a CLIP with OpenAI's names of tensors, as open_clip's configurations describe it.

    The shapes of the tensors tell everything but the number of heads, which are 64 wide in all of these models.

    state: the tensors by their names. Returns None if they are not those of such a model.
    """
    try:
        vision = _vision_of(state)
        width = state["ln_final.weight"].shape[0]
        text = {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": width,
            "heads": width // 64,
            "layers": _count(state, "transformer.resblocks."),
        }
        return {"embed_dim": state["text_projection"].shape[1], "vision_cfg": vision, "text_cfg": text}
    except (KeyError, IndexError):
        return None


def _vision_of(state: dict[str, Tensor]) -> dict[str, Any]:
    if "visual.proj" in state:
        patch = state["visual.conv1.weight"].shape[-1]
        return {
            "image_size": patch * _side(state["visual.positional_embedding"]),
            "layers": _count(state, "visual.transformer.resblocks."),
            "width": state["visual.conv1.weight"].shape[0],
            "patch_size": patch,
        }
    return {
        "image_size": 32 * _side(state["visual.attnpool.positional_embedding"]),
        "layers": [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
        "patch_size": None,
    }


def _side(positions: Tensor) -> int:
    """Return the side of a square of patches that has one position each, after that of the class token."""
    return round((positions.shape[0] - 1) ** 0.5)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Return the number of blocks whose names begin with a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
