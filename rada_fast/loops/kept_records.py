"""Records of an evaluation that is under way, kept in the folder of the run, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rada_fast.data.fingerprints import state_fingerprint
from rada_fast.runs.contents import EVALUATED
from rada_fast.runs.folder import RunFolder


class KeptRecords:
    """The records of one evaluation in a file of the run, which also holds those of others until the run is finished.

    folder: the folder of the run.
    head: the weights of the head and, where it has one, of its classifier.
    """

    def __init__(self, folder: RunFolder, head: Mapping[str, Tensor]) -> None:
        self._folder, self._head, self._key = folder, head, ""
        folder.when_stored(lambda: folder.remove(EVALUATED))

    def read(self, tensors: Mapping[str, Tensor], values: Sequence[Any], ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return the records of the first images that an earlier run has evaluated with the same weights.

        tensors, values: everything else that the records depend on.
        ids: the names of all images of the evaluation, in their order.
        """
        digest = hashlib.sha256(repr([values, ids]).encode("utf-8", "surrogatepass"))
        digest.update(f"{state_fingerprint(self._head)} {state_fingerprint(tensors)}".encode())
        self._key = digest.hexdigest()[:32]
        lines = [line for line in self._folder.read_lines(EVALUATED) if line.pop("of", None) == self._key]
        return lines if [line.get("id") for line in lines] == list(ids[: len(lines)]) else []

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the records of the next images."""
        self._folder.append_all(EVALUATED, [{"of": self._key} | dict(record) for record in records])
