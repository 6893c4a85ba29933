"""The reading of few-shot splits that CoOp and its successors have pickled, without unpickling them.

Unpickling a file from somebody else can run any program, because the pickle names the functions to call. The reader
here interprets the few instructions that a split needs by itself: numbers, texts, lists, tuples and dictionaries, and
instances of CoOp's class Datum, which become plain records of their attributes. It looks no name up and calls nothing.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rada_fast.errors import UserError

MOST_BYTES = 2**30
"""A larger file is no split: ImageNet's 1.28 million training images take 0.2 GB."""
RECORD = "Datum"
"""The name of the only class whose instances a split may hold. The module that the pickle names with it is ignored."""

_VALUES = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    }
)  # fmt: skip
"""Instructions that push their argument."""
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickledImage(NamedTuple):
    """An image of a pickled split: the path that the file states, its label, and the name of its class."""

    path: str
    label: int
    class_name: str


@dataclass
class _Record:
    """An instance of Datum: the attributes that the pickle gives it."""

    attributes: dict[Any, Any] = field(default_factory=dict)


class _Name(NamedTuple):
    """A name of a class. It is never looked up."""

    name: str


_MARK = object()


class _RefusedError(ValueError):
    """An instruction that no split needs."""


def read_pickled_split(path: Path) -> dict[str, list[PickledImage]]:
    """Read the images of each part ("train", "val", ...) of a pickled split.

    Raises UserError where the file cannot be read or holds anything that a split does not need.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _RefusedError(f"it is larger than {MOST_BYTES >> 20} MiB")
        value = _interpret(path.read_bytes())
        if not isinstance(value, dict):
            raise _RefusedError(f"it holds a {type(value).__name__}")
        return {str(part): list(_images(images)) for part, images in value.items()}
    except OSError as error:
        raise UserError(f"few-shot split {path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"few-shot split {path} is not a dictionary of lists of {RECORD} in the format of CoOp: {error}; move the "
            "file away to draw the same images from the seed"
        ) from None


def _images(images: Any) -> Iterator[PickledImage]:
    if not isinstance(images, list):
        raise _RefusedError(f"a part of it is a {type(images).__name__}")
    for image in images:
        if not isinstance(image, _Record):
            raise _RefusedError(f"a list holds a {type(image).__name__}")
        values = [image.attributes.get(name) for name in ("_impath", "_label", "_classname")]
        path, label, class_name = values
        if not isinstance(path, str) or type(label) is not int or not isinstance(class_name, str):
            # The values are not shown: a short pickle can stand for a list of 2 ** 30 elements.
            raise _RefusedError(f"a {RECORD} has _impath, _label and _classname of types "
                                f"{', '.join(type(value).__name__ for value in values)}")  # fmt: skip
        yield PickledImage(path, label, class_name)


def _interpret(data: bytes) -> Any:
    """Return the value that a pickle describes. Raises an error at the first instruction that no split needs."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for instruction, argument, position in pickletools.genops(io.BytesIO(data)):
        name = instruction.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("APPENDS", "SETITEMS", "TUPLE", "LIST", "DICT"):
            _collect(name, stack)
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "APPEND":
            item = stack.pop()
            _as(list, stack[-1]).append(item)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _as(dict, stack[-1])[_key(key)] = value
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            _push_name(argument, stack)
        elif name == "NEWOBJ":
            if stack.pop() != () or not isinstance(stack.pop(), _Name):
                raise _RefusedError(f"byte {position} makes an object with arguments")
            stack.append(_Record())
        elif name == "BUILD":
            state = _as(dict, stack.pop())
            _as(_Record, stack[-1]).attributes.update(state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"byte {position} has the instruction {name}, which no split needs")
    raise _RefusedError("it does not end")


def _collect(name: str, stack: list[Any]) -> None:
    """Pop everything above the last mark, and make a tuple of it or put it into the container below the mark."""
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    items.reverse()
    if name == "TUPLE":
        stack.append(tuple(items))
    elif name == "LIST":
        stack.append(items)
    elif name == "APPENDS":
        _as(list, stack[-1]).extend(items)
    else:
        pairs = dict(zip(map(_key, items[::2]), items[1::2], strict=True))
        if name == "DICT":
            stack.append(pairs)
        else:
            _as(dict, stack[-1]).update(pairs)


def _key(value: Any) -> str | int:
    """Return a key of a dictionary. The hash of nested tuples could take years to compute."""
    if not isinstance(value, str | int):
        raise _RefusedError(f"a key is a {type(value).__name__}")
    return value


def _push_name(argument: str | None, stack: list[Any]) -> None:
    """Push the name of a class. Raises an error where it is not that of a record."""
    if argument is None:
        name, module = stack.pop(), stack.pop()
        argument = f"{module} {name}"
    if argument.rpartition(" ")[2] != RECORD:
        raise _RefusedError(f"it names {argument[:100]!r}, which no split needs")
    stack.append(_Name(argument))


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _RefusedError(f"it treats a {type(value).__name__} as a {kind.__name__}")
    return value
