"""The opening of data that an option names as KIND:PATH, by the reader of their kind."""

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

    usage: the form of KIND:PATH for this kind, for messages.
    read: the function that reads such data.
    """

    usage: str
    read: Callable[[Path], Source]


KINDS = {
    "imagefolder": Kind("imagefolder:DIR (one sub-folder for each class)", read_image_folder),
    "images": Kind("images:DIR (no labels)", read_unlabelled_images),
    "features": Kind("features:FILE.npz (arrays features, labels)", read_feature_file),
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


def open_source(spec: str) -> Source:
    """Read the data that KIND:PATH names.

    Raises UserError if the kind is unknown or the path does not hold such data.
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
