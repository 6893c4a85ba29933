"""Files with false contents are refused in one line, quickly, and without allocating more than they hold."""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from rada_fast import UserError, load_adapter, save_adapter
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter

CONFIG = AdapterConfig.official(16)
ADVICE = ("weights_only", "safe_globals", "set_int_max_str_digits", "allow_pickle", "torch.load")


def tensors() -> dict[str, Any]:
    return {name: torch.randn_like(value) for name, value in RationalAdapter(CONFIG).state_dict().items()}


def header(config: str) -> bytes:
    return save(tensors(), {"format": "rada_fast.adapter.v1", "config": config})


def with_config(**changes: Any) -> bytes:
    return header(json.dumps(CONFIG.to_dict() | changes))


HEADERS: dict[str, tuple[bytes, str]] = {
    "ten million layers": (with_config(num_layers=10_000_000), "num_layers must be what the file holds, 1, got 100000"),
    "layers of 5000 digits": (header('{"embed_dim": 16, "num_layers": 1' + "0" * 5000 + "}"), "ordinary numbers"),
    "layers of 300 digits": (with_config(num_layers=10**300), "num_layers must be what the file holds"),
    "negative layers": (with_config(num_layers=-1), "num_layers must be a whole number"),
    "layers as text": (with_config(num_layers="10000000"), "num_layers must be a whole number"),
    "a later form": (save(tensors(), {"format": "rada_fast.adapter.v2"}), "has the format 'rada_fast.adapter.v2'"),
    "a huge width": (with_config(embed_dim=10**9), "has width 16, its configuration 1000000000"),
    "width of 300 digits": (with_config(embed_dim=10**300), "embed_dim must be an ordinary number"),
    "no width": (with_config(embed_dim=0), "embed_dim must be a whole number"),
    "huge heads": (with_config(num_heads=10**9), "num_heads must divide embed_dim 16"),
    "no heads": (with_config(num_heads=0), "num_heads must be a whole number"),
    "temperature of 400 digits": (with_config(temperature=10**400), "temperature must be an ordinary number"),
    "infinite temperature": (with_config(temperature=float("inf")), "temperature must be an ordinary number"),
    "temperature 1e999": (header('{"embed_dim": 16, "temperature": 1e999}'), "temperature must be an ordinary number"),
    "temperature NaN": (with_config(temperature=float("nan")), "temperature must be an ordinary number"),
    "factor of nothing": (with_config(input_scale_factor=None), "input_scale_factor must be above 0"),
    "bias as text": (with_config(bias="no"), "bias must be true or false, got 'no'"),
    "queries of lists": (with_config(queries=[["text"]]), "queries must be one of"),
    "queries of one text": (with_config(queries="text"), "queries must be a non-empty tuple"),
    "softmax as an object": (with_config(softmax={}), "softmax must be one of"),
    "an unknown field": (with_config(**{"a\0b": 1}), "unknown fields"),
    "no field": (header("{}"), "unusable configuration"),
    "a list": (header("[1, 2]"), "must be an object, got list"),
    "a number": (header("3"), "must be an object, got int"),
    "no JSON": (header("{"), "unusable configuration"),
    "deep JSON": (header("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "deep objects": (header('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "an mlp of many layers": (with_config(mask_function="mlp", num_layers=3), "num_layers must be what the file holds"),
    "a configuration without biases": (with_config(bias=False), "has unexpected k_proj.bias"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_do_not_fit_the_file_are_refused(tmp_path: Path, name: str) -> None:
    content, message = HEADERS[name]
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", message)


def refused(path: Path, message: str) -> None:
    """Check that loading raises one short line with the message, quickly, and allocates at most a few files' sizes."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(UserError, match=message) as caught:
            load_adapter(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 700 + len(str(path))
    assert not any(advice in line for advice in ADVICE), line
    assert peak < 100 * 2**20
    # This does not measure speed: doing what the file asks for would take minutes.
    assert time.monotonic() - start < 60


def raw_safetensors(entries: dict[str, Any], data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4, 4), offsets: tuple[int, int] = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


RAW: dict[str, tuple[bytes, str]] = {
    "a shape past the data": (raw_safetensors({"k_proj.weight": entry(shape=(10**6, 10**6))}), "not readable"),
    "offsets past the data": (raw_safetensors({"k_proj.weight": entry(offsets=(0, 10**12))}), "not readable"),
    "a shape past 64 bits": (raw_safetensors({"k_proj.weight": entry(shape=(2**40, 2**40))}), "not readable"),
    "a shape of 5000 digits": (
        raw_safetensors({"a": 0}).replace(b'"a": 0', b'"a": {"dtype":"F32","shape":[1' + b"0" * 5000 + b"]}"),
        "not readable|without executing",
    ),
    "an unknown type": (raw_safetensors({"k_proj.weight": entry(dtype="F13")}), "not readable"),
    "no tensors": (raw_safetensors({}, b""), "must hold one rational adapter"),
    "metadata of numbers": (raw_safetensors({"__metadata__": {"config": 3}}, b""), "not readable"),
    "deep metadata": (
        struct.pack("<Q", 200_012) + b'{"__metadata__":'[:12] + b"[" * 100_000 + b"]" * 100_000,
        "not readable|without executing",
    ),
    "a header past the file": (struct.pack("<Q", 2**62) + b"{}", "without executing"),
    "NUL in names": (
        raw_safetensors({"a\0b.q_proj1.weight": entry(), "a\0b.out_proj.weight": entry(), "q_proj1.weight": entry()}),
        "not readable|must hold",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_safetensors_with_false_contents_are_refused(tmp_path: Path, name: str) -> None:
    content, message = RAW[name]
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", message)


def changed(**changes: Any) -> dict[Any, Any]:
    return tensors() | {name.replace("__", "."): value for name, value in changes.items()}


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


DICTIONARIES: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: changed(k_proj__weight=torch.eye(16).to_sparse()), "k_proj.weight must be a dense tensor"),
    "sparse CSR": (lambda: changed(k_proj__weight=torch.eye(16).to_sparse_csr()), "k_proj.weight must be a dense"),
    "two image queries": (
        lambda: changed(q_proj__weight=torch.eye(16)),
        "must hold one of q_proj.weight and q_proj1.weight, holds both",
    ),
    "meta": (lambda: changed(k_proj__weight=torch.empty(16, 16, device="meta")), "k_proj.weight must have values"),
    "quantised": (
        lambda: changed(k_proj__weight=torch.quantize_per_tensor(torch.eye(16), 0.1, 0, torch.qint8)),
        "k_proj.weight must be a floating-point tensor",
    ),
    "nested tensor": (lambda: changed(k_proj__bias=nested()), "k_proj.bias must be|without executing code"),
    "nested dictionary": (
        lambda: changed(k_proj__bias={"deep": {"er": torch.ones(16)}}),
        "k_proj.bias must be a floating-point tensor",
    ),
    "list": (lambda: changed(k_proj__bias=[1.0] * 16), "k_proj.bias must be a floating-point tensor, got list"),
    "none": (lambda: changed(k_proj__bias=None), "k_proj.bias must be a floating-point tensor, got NoneType"),
    "complex": (lambda: changed(k_proj__bias=torch.ones(16, dtype=torch.cfloat)), "got torch.complex64"),
    "float8": (
        lambda: changed(k_proj__bias=torch.ones(16).to(torch.float8_e4m3fn)),
        "got torch.float8_e4m3fn|without executing",
    ),
    "boolean": (lambda: changed(k_proj__bias=torch.ones(16, dtype=torch.bool)), "got torch.bool"),
    "scalar output": (lambda: changed(out_proj__weight=torch.tensor(1.0)), "out_proj.weight must be a square matrix"),
    "no width": (lambda: changed(out_proj__weight=torch.ones(0, 0)), "width must be from 1"),
    "infinite": (lambda: changed(k_proj__bias=torch.full((16,), torch.inf)), "k_proj.bias holds NaN or infinity"),
    "integer keys": (lambda: dict(enumerate(tensors().values())), "must hold one rational adapter"),
    "an integer key": (lambda: tensors() | {0: torch.ones(1)}, "must name its tensors by texts, got int 0"),
    "tuple keys": (lambda: tensors() | {("k", 1): torch.ones(1)}, "must name its tensors by texts, got tuple"),
    "names with NUL": (lambda: tensors() | {"k\0.bias": torch.ones(1)}, r"has unexpected k\\x00.bias"),
    "a long name": (lambda: tensors() | {"x" * 100_000: torch.ones(1)}, "has unexpected x"),
    "a hundred prefixes": (
        lambda: {f"{n}\n.{key}": value for n in range(100) for key, value in tensors().items()},
        "found prefixes",
    ),
    "strides of zero": (
        lambda: {name: torch.zeros(1).expand(60_000, 60_000) for name in tensors()},
        "must have at most|must be held",
    ),
    "strides of zero, smaller": (
        lambda: {name: torch.zeros(1).expand(8_000, 8_000) for name in tensors()},
        "must be held by the file's",
    ),
    "an empty dictionary": (dict, "must hold one rational adapter"),
    "a tensor": (lambda: torch.ones(3), "must hold a dictionary of tensors, got Tensor"),
    "a state_dict that is a list": (lambda: {"state_dict": [1]}, "must hold tensors under 'state_dict', got list"),
    "ordered and deep": (lambda: OrderedDict(a=OrderedDict(b=OrderedDict(tensors()))), "must hold one rational"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_torch_files_with_other_values_are_refused(tmp_path: Path, name: str, old: bool) -> None:
    make, message = DICTIONARIES[name]
    try:
        torch.save(make(), tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    except RuntimeError:
        pytest.skip("torch does not write this into its older form")
    refused(tmp_path / "a.pt", message)


class Rebuilt:
    """Unpickling Rebuilt calls one of the functions that torch's restricted unpickler allows."""

    def __init__(self, *call: Any) -> None:
        self.call = (call[0], call[1:])

    def __reduce__(self) -> Any:
        return self.call


def rewritten(path: Path, name: str, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Return a copy of a torch file with one record changed."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for filename, content in records.items():
            archive.writestr(filename, change(content) if filename.endswith(name) else content)


def test_a_zip_that_expands_enormously_is_refused(tmp_path: Path) -> None:
    torch.save({name: torch.zeros(1000, 1000) for name in tensors()}, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", "nothing", bytes, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 2**20
    refused(tmp_path / "a.pt", "would unpack to more than the file's")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(tensors() | {"k_proj.weight": torch.ones(3, 5)}, tmp_path / "a.pt")
    # (3, 5) in the pickle becomes (200, 250), while the storage has 15 elements.
    rewritten(tmp_path / "a.pt", "data.pkl", lambda content: content.replace(b"K\x03K\x05", b"K\xc8K\xfa"))
    refused(tmp_path / "a.pt", "k_proj.weight must be held by the file's|without executing code")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": Rebuilt(print, "executed")},
        Rebuilt(eval, "1 + 1"),
        {"k_proj.weight": Rebuilt(exec, "raise SystemExit")},
        Rebuilt(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4, 5, 6),
    ],
    ids=["print", "eval", "exec", "arguments"],
)
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_refused_pickles_give_no_advice_to_load_them(tmp_path: Path, content: Any, form: str, capsys: Any) -> None:
    if form == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "zip")
    refused(tmp_path / "a.pt", "without executing code|must hold|floating-point")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_and_torn_ends_give_an_adapter_or_one_line(tmp_path: Path, seed: int) -> None:
    """Wherever a file is damaged, loading returns an adapter or raises one line."""
    generator = torch.Generator().manual_seed(seed)
    lines: list[str] = []
    save_adapter(RationalAdapter(CONFIG), tmp_path / "good.safetensors")
    torch.save(tensors(), tmp_path / "good.pt")
    torch.save(tensors(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("good.safetensors", "good.pt", "old.pt"):
        content_before = (tmp_path / name).read_bytes()
        for _ in range(12):
            content = bytearray(content_before)
            for place in torch.randint(len(content), (3,), generator=generator).tolist():
                # Damage matters most in headers and indices.
                content[place % 1500] = int(torch.randint(256, (), generator=generator))
            end = int(torch.randint(len(content), (), generator=generator)) if seed % 2 else None
            (tmp_path / "damaged").write_bytes(content[:end])
            try:
                load_adapter(tmp_path / "damaged")
            except UserError as error:
                lines.append(str(error))
    assert all(line.isprintable() for line in lines)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").write_bytes(b"\xff\x00model\n")
    for path, message in (
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / "run", "holds no file named 'checkpoint'"),
        (tmp_path / "a\0b", "NUL character"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long|does not exist"),
        (Path("~nouser_of_this_name/a"), "cannot be read"),
        (tmp_path / "none", "does not exist"),
    ):
        refused(path, message)


@pytest.mark.parametrize("names", [["adapter"], ["rada-adapter"], ["rada-adapter", "rada-ft-adapter"]])
def test_run_folders_of_our_own_give_their_last_adapter(tmp_path: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        adapter = RationalAdapter(CONFIG)
        torch.nn.init.constant_(adapter.get_parameter("out_proj.bias"), float(index + 1))
        save_adapter(adapter, tmp_path / f"{name}.safetensors")
    assert float(load_adapter(tmp_path).get_parameter("out_proj.bias")[0].detach()) == len(names)


def test_tensors_of_mixed_precision_get_one_type(tmp_path: Path) -> None:
    state = tensors() | {"k_proj.bias": torch.ones(16).double(), "v_proj.bias": torch.ones(16).half()}
    save_file(state, tmp_path / "a.safetensors")
    assert {value.dtype for value in load_adapter(tmp_path / "a.safetensors").parameters()} == {torch.float64}


def test_files_have_the_permissions_of_any_other_and_no_leftovers(tmp_path: Path) -> None:
    save_adapter(RationalAdapter(CONFIG), tmp_path / "a.safetensors")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(UserError, match=r"adapter cannot be written to .*: No such file or directory"):
        save_adapter(RationalAdapter(CONFIG), tmp_path / "nowhere" / "a.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"adapter cannot be written to .*: Is a directory"):
        save_adapter(RationalAdapter(CONFIG), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder", "other"]
    assert io.BytesIO((tmp_path / "a.safetensors").read_bytes()).getbuffer().nbytes > 0
