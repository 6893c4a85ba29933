"""Data named KIND:PATH, opened by the reader of their kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rada_fast.data.readers.features import read_feature_file
from rada_fast.data.readers.imagefolder import read_image_folder, read_unlabelled_images
from rada_fast.data.sources import FeatureFile, Source
from rada_fast.errors import UserError


class Kind(NamedTuple):
    """A kind is one way in which data lie on disk.

    usage: how its data are named, for messages; read: the function that reads them.
    """

    usage: str
    read: Callable[[Path], Source]


KINDS = {
    "imagefolder": Kind("imagefolder:DIR (one sub-folder for each class)", read_image_folder),
    "images": Kind("images:DIR (no labels)", read_unlabelled_images),
    "features": Kind("features:FILE.npz (arrays features, labels)", read_feature_file),
}


def open_text_file(given: str | None) -> FeatureFile | None:
    """The feature file that an option for text features names, or None where the option names something else.

    given: the option's value: None for prompts, class-means, classifier:RUN, or features:FILE.npz.

    Raises UserError where it is none of these, or where the file does not have one row for each class.
    """
    if given is None or given == "class-means" or given.startswith("classifier:"):
        return None
    path = given.removeprefix("features:")
    source = read_feature_file(Path(path).expanduser()) if path not in (given, "") else None
    if source is None or source.features.ndim != 2:
        raise UserError(
            "text_features must be class-means, features:FILE.npz with one row for each class or classifier:RUN of an "
            f"fft, got {given!r}"
        )
    return source


def open_source(spec: str) -> Source:
    """Read the data that KIND:PATH names.

    Raises UserError where the kind is unknown or the path does not hold such data.
    """
    kind, _, path = spec.partition(":")
    if not path or kind not in KINDS:
        hint = ""
        if Path(spec).is_dir():
            hint = f"; did you mean imagefolder:{spec}?"
        elif Path(spec).is_file():
            hint = f"; did you mean features:{spec}?"
        usages = ", ".join(known.usage for known in KINDS.values())
        raise UserError(f"data must be KIND:PATH with KIND one of {usages}, got {spec!r}{hint}")
    return KINDS[kind].read(Path(path).expanduser())
