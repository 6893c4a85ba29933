"""The writing of feature files, which the reader of the kind `features` reads again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from rada_fast.system import files


def write_feature_file(
    path: Path,
    features: Tensor,
    labels: Tensor | None,
    *,
    ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    logit_scale: float | None = None,
) -> None:
    """Write a feature file, as a whole or not at all.

    path: the file, which should end in .npz.
    features: (N, D), or (N, V, D) with V views of each image, the original first.
    labels: (N,), or None if the images have no classes.
    ids: the names of the N images.
    class_names: the names of the classes in label order.
    logit_scale: the multiplier of the model.
    """
    arrays = {"features": features.numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    if class_names is not None:
        arrays["class_names"] = _texts(class_names)
    if ids is not None:
        arrays["ids"] = _texts(ids)
    if logit_scale is not None:
        arrays["logit_scale"] = np.array(logit_scale)

    def write(temporary: Path) -> None:
        # With a name alone, NumPy would add .npz to it.
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    files.write_by(path, write)


def _texts(values: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    """Return texts as an array. Bytes of a file name that are not UTF-8 become escapes."""
    return np.array([value.encode("utf-8", "backslashreplace").decode() for value in values], dtype=np.str_)
