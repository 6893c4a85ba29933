"""The opening of data that an option names as KIND:PATH, by the reader of their kind."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rada_fast.data.parts import Part, split_part
from rada_fast.data.readers.coop import read_coop
from rada_fast.data.readers.features import read_feature_file
from rada_fast.data.readers.imagefolder import read_image_folder, read_nested_folder, read_unlabelled_images
from rada_fast.data.readers.imagenet import imagenet_reader
from rada_fast.data.readers.objectnet import read_objectnet
from rada_fast.data.readers.saved_dataset import read_saved_dataset
from rada_fast.data.readers.table import read_table
from rada_fast.data.readers.webdataset import read_shards
from rada_fast.data.sources import FeatureFile, Source
from rada_fast.errors import UserError


class Kind(NamedTuple):
    """A kind is one way in which data lie on disk.

    usage: the form of KIND:PATH for this kind, for messages.
    read: the function that reads a part of such data.
    """

    usage: str
    read: Callable[[Path, Part], Source]


def _whole(read: Callable[[Path], Source]) -> Callable[[Path, Part], Source]:
    """Return the reader of a kind whose data have no parts."""
    return lambda path, part: read(path)


KINDS = {
    "imagefolder": Kind("imagefolder:DIR (one sub-folder for each class)", _whole(read_image_folder)),
    "coop": Kind("coop:ROOT/NAME (a data set of CoOp, such as coop:data/dtd)", read_coop),
    "imagenet": Kind("imagenet:DIR", imagenet_reader("imagenet")),
    "imagenet-v2": Kind("imagenet-v2:DIR", imagenet_reader("imagenet-v2")),
    "imagenet-r": Kind("imagenet-r:DIR", imagenet_reader("imagenet-r")),
    "imagenet-a": Kind("imagenet-a:DIR", imagenet_reader("imagenet-a")),
    "imagenet-sketch": Kind("imagenet-sketch:DIR", imagenet_reader("imagenet-sketch")),
    "objectnet": Kind("objectnet:DIR", read_objectnet),
    "nested": Kind("nested:DIR (every folder with pictures is a class)", _whole(read_nested_folder)),
    "webdataset": Kind("webdataset:PATTERN (tar archives, such as webdataset:data/{000..009}.tar)", read_shards),
    "hf": Kind("hf:DIR (a data set of the library datasets, saved to disk)", read_saved_dataset),
    "csv": Kind("csv:FILE (a table of paths with labels or names of classes)", read_table),
    "images": Kind("images:DIR (no labels)", _whole(read_unlabelled_images)),
    "features": Kind("features:FILE.npz (arrays features, labels)", _whole(read_feature_file)),
}


def open_text_file(value: str | None) -> FeatureFile | None:
    """Read the feature file that the option --text-features names. Returns None if the option names something else.

    value: the value of the option: None for prompts, class-means, classifier:RUN, or features:FILE.npz.

    Raises UserError if the value has another form, or if the file does not have one row for each class.
    """
    if value is None or value == "class-means" or value.startswith("classifier:"):
        return None
    path = value.removeprefix("features:")
    source = read_feature_file(Path(path).expanduser()) if path not in (value, "") else None
    if source is None or source.features.ndim != 2:
        raise UserError(
            "text_features must be class-means, features:FILE.npz with one row for each class or classifier:RUN of an "
            f"fft, got {value!r}"
        )
    return source


def _path(text: str) -> Path:
    """Return a path, with the home folder for a leading ~. Raises UserError where no file can have its name."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and "{" not in text:
            raise UserError(f"data {text[:100]}... cannot be read: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # no home folder of that name, a NUL character
        raise UserError(f"data {text!r} cannot be read: {error}") from None
    return path


def open_source(spec: str, part: Part = "test") -> Source:
    """Read the data that KIND:PATH or KIND:PATH@PART names.

    spec: the kind and the path, perhaps with @train, @val or @test.
    part: the part to read where the kind has parts and the spec names none.

    Raises UserError if the kind is unknown or the path does not hold such data.
    """
    kind, _, path = spec.partition(":")
    if not path or kind not in KINDS:
        hint = ""
        if Path(spec).is_dir():
            hint = f"; did you mean imagefolder:{spec}?"
        elif Path(spec).is_file():
            hint = f"; did you mean features:{spec}?"
        elif path and (close := difflib.get_close_matches(kind, KINDS, n=1)):
            hint = f"; did you mean {close[0]}:{path}?"
        usages = ", ".join(known.usage for known in KINDS.values())
        raise UserError(f"data must be KIND:PATH with KIND one of {usages}, got {spec!r}{hint}")
    without, named = (path, None) if os.path.exists(_path(path)) else split_part(path)  # noqa: PTH110
    return KINDS[kind].read(_path(without), named or part)
