"""The features of images that are encoded so far, in parts on disk, so that an interrupted encoding goes on."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rada_fast.data.decode import UnreadableImageError, read_image
from rada_fast.data.sources import Sample
from rada_fast.data.tensor_cache import read_tensors, write_tensors

PART_SECONDS = 30.0
"""A part is written about so often. This is the most work that a killed process loses."""
_NAME = re.compile(r"(\d+)-(\d+)\.safetensors")


class Encoded(NamedTuple):
    """Samples that follow one another, encoded.

    features: the features (n, D) of those that could be read, on the CPU, or None if n is 0.
    indices: the indices of their samples.
    until: the number of samples up to the end of these.
    unreadable: the indices of those that could not be read, each with the reason.
    """

    features: Tensor | None
    indices: list[int]
    until: int
    unreadable: list[tuple[int, str]]


class EncodedParts:
    """A folder with the features of the first samples of a list, a file for each part of them.

    Nobody needs the folder. If it cannot be written, a warning says so, and the encoding goes on.

    folder: the folder, whose name decides samples, model and views.
    samples: the list.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        self._folder, self._samples = folder, samples
        self._waiting: list[Encoded] = []
        self._start, self._last = 0, time.monotonic()

    def read(self) -> Iterator[Encoded]:
        """Yield the parts that are there, in their order, up to the first one that is missing or damaged.

        An image that could not be read is tried again. If it can be read now, its part and the later ones are left out.
        """
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        ranges = {int(found[1]): int(found[2]) for name in sorted(names) if (found := _NAME.fullmatch(name))}
        while (until := ranges.pop(self._start, None)) is not None:
            part = self._read_part(self._start, until)
            if part is None:
                (self._folder / f"{self._start}-{until}.safetensors").unlink(missing_ok=True)
                break
            yield part
            self._start = until
        for start, until in ranges.items():
            (self._folder / f"{start}-{until}.safetensors").unlink(missing_ok=True)

    def _read_part(self, start: int, until: int) -> Encoded | None:
        tensors = read_tensors(self._folder / f"{start}-{until}.safetensors")
        if tensors is None or set(tensors) != {"features", "indices", "unreadable"} or until > len(self._samples):
            return None
        features, indices = tensors["features"], tensors["indices"].tolist()
        try:
            unreadable = [(index, reason) for index, reason in json.loads(bytes(tensors["unreadable"].tolist()))]
        except (ValueError, TypeError):
            return None
        known = sorted(indices + [index for index, _ in unreadable]) == list(range(start, until))
        if not known or len(features) != len(indices) or not bool(features.isfinite().all()):
            return None
        if any(_is_readable(self._samples[index]) for index, _ in unreadable):
            return None
        return Encoded(features if indices else None, indices, until, unreadable)

    def add(self, part: Encoded) -> None:
        """Keep further samples, and write what waits if the last part was written long ago."""
        self._waiting.append(part)
        if time.monotonic() - self._last >= PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what waits, as one part."""
        if not self._waiting:
            return
        until = self._waiting[-1].until
        rows = [part.features for part in self._waiting if part.features is not None]
        unreadable = [one for part in self._waiting for one in part.unreadable]
        tensors = {
            "features": torch.cat(rows) if rows else torch.empty(0, 0),
            "indices": torch.tensor([index for part in self._waiting for index in part.indices], dtype=torch.int64),
            "unreadable": torch.frombuffer(bytearray(json.dumps(unreadable), "ascii"), dtype=torch.uint8),
        }
        write_tensors(self._folder / f"{self._start}-{until}.safetensors", tensors)
        self._waiting, self._start, self._last = [], until, time.monotonic()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_readable(sample: Sample) -> bool:
    try:
        read_image(sample.path)
    except UnreadableImageError:
        return False
    return True
