"""Pickled splits are read without unpickling: nothing is called, no name is looked up, and the rest is refused."""

from __future__ import annotations

import collections
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from rada_fast.data.pickled_split import PickledImage, read_pickled_split
from rada_fast.errors import UserError
from tests.miniatures import dassl, write_pickled_split


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_coops_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    rows = {"train": [["a/é.jpg", 0, "owl"], ["b/1.jpg", 1, "cat"]] * 700, "val": []}
    path = write_pickled_split(tmp_path / "split.pkl", rows, "/data", protocol)
    images = read_pickled_split(path)
    assert images["val"] == []
    assert images["train"] == [PickledImage("/data/a/é.jpg", 0, "owl"), PickledImage("/data/b/1.jpg", 1, "cat")] * 700


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


def test_nothing_in_a_pickle_is_called_or_looked_up(tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    values = [
        _Call(os.system, f"touch {mark}"),
        {"train": [_Call(eval, f"open({str(mark)!r}, 'w')")]},
        {"train": [_Call(getattr, [], "append")]},
        {"train": collections.OrderedDict()},
        {"train": [Path("a")]},
        [1, 2],
        {"train": [{"_impath": "a", "_label": 0, "_classname": "b"}]},
        {"train": {"a"}},
    ]
    path = tmp_path / "split.pkl"
    for value in values:
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match="is not a dictionary of lists of Datum in the format of CoOp"):
            read_pickled_split(path)
    with dassl() as datum:
        built = datum("a", 0, "b")
        built.__dict__ = {"_impath": "a", "_label": _Call(os.system, f"touch {mark}"), "_classname": "b"}
        path.write_bytes(pickle.dumps({"train": [built]}))
    with pytest.raises(UserError, match=r"it names '.* system', which no split needs"):
        read_pickled_split(path)
    assert not mark.exists()


def test_short_pickles_of_huge_values_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "split.pkl"
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    with dassl() as datum:
        built = datum("a", 0, "b")
        built.__dict__ = {"_impath": "a", "_label": nested, "_classname": "b"}
        path.write_bytes(pickle.dumps({"train": [built]}))
    with pytest.raises(UserError, match="has _impath, _label and _classname of types str, list, str"):
        read_pickled_split(path)
    pairs = b"".join(b"h" + bytes([index]) + b"h" + bytes([index]) + b"\x86\x94" for index in range(60))
    for end in (b"}h\x3cK\x01s.", b"}(h\x3cK\x01u.", b"(h\x3cK\x01d."):
        path.write_bytes(b"\x80\x04)\x94" + pairs + end)
        with pytest.raises(UserError, match="a key is a tuple"):
            read_pickled_split(path)


def test_damaged_and_hostile_pickles_are_refused(tmp_path: Path) -> None:
    path = write_pickled_split(tmp_path / "split.pkl", {"train": [["a.jpg", 0, "owl"]] * 9}, "/data")
    whole = path.read_bytes()
    hostile = [
        whole[:end] for end in range(0, len(whole), 7)
    ] + [
        b"\x80\x04." , b"\x80\x04e.", b"\x80\x04}]s.", b"\x80\x04h\x05.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**50) + b"a.",  # a text of a petabyte
        b"\x80\x04]r\xff\xff\xff\xff.",  # a memory of four billion entries
        b"\x80\x04]2" + b"2a" * 9 + b".",
        b"\x80\x04cos\nDatum\n)R.",  # a call of something that is named like the record
        b"\x80\x04(" * 5000 + b".",
        b"not a pickle",
    ]  # fmt: skip
    for data in hostile:
        path.write_bytes(data)
        with pytest.raises(UserError, match="few-shot split"):
            read_pickled_split(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_pickled_split(tmp_path / "none.pkl")
