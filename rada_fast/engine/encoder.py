"""Encode the views of several pictures at once, so that no feature depends on what is encoded beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rada_fast.engine.graphs import Recording, usable
from rada_fast.models.vision_language import VisionLanguageModel

PACKED_VIEWS = {"cpu": 16, "cuda": 64}
"""Views of several pictures are encoded together up to this number, by the type of the device. More would not be faster
on a CPU; 64 views of a ViT-B/16 fill a large GPU."""


class ViewEncoder:
    """Encode the views of up to P pictures at once.

    Libraries choose how to compute a product by its shape, and this choice decides about the last bits, as the place of
    a row in the product may. Where the model does not keep to the same bits by itself, every call therefore encodes the
    same number of rows, filled up with zeros. On a GPU it is tried once whether the place of a picture then matters. If
    it does, and on a CPU, such a model encodes one picture at a time.

    model: the model that encodes the views.
    views: the number V of views of a picture.
    """

    def __init__(self, model: VisionLanguageModel, views: int) -> None:
        self._model, self.views = model, views
        self.pictures = max(1, PACKED_VIEWS[model.device.type] // views)
        """The number P of pictures of a batch."""
        self._any_number = model.encodes_each_by_itself()
        self._recordable = True
        self._input: Tensor | None = None
        self._recording: Recording[Tensor] | None = None
        if self.pictures > 1 and not self._any_number and not self._is_equal_everywhere():
            self.pictures = 1

    def _is_equal_everywhere(self) -> bool:
        """Return whether a trial shows that a picture has the same features wherever it stands in a batch.

        A CPU's products of few rows are known to differ.
        """
        if self._model.device.type == "cpu":
            return False
        size = self._model.preprocess.image_size
        generator = torch.Generator().manual_seed(0)
        views = torch.randn((self.pictures * self.views, 3, size, size), generator=generator).to(self._model.device)
        features = self._model.image_features(views)
        moved = self._model.image_features(views.roll(self.views, 0))
        return torch.equal(features.roll(self.views, 0), moved)

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """Return the features (N, V, D) of N pictures, at most P, without a wait for the device.

        pictures: the views (V, 3, S, S) of each picture, on the model's device.
        """
        recorded = self._recordable and usable(self._model.device)
        if not recorded and (self._any_number or self.pictures == 1):
            views = pictures[0] if len(pictures) == 1 else torch.cat(list(pictures))
            return self._model.image_features(views).unflatten(0, (len(pictures), self.views))
        if self._input is None:
            self._input = pictures[0].new_zeros((self.pictures * self.views, *pictures[0].shape[1:]))
        if recorded and self._recording is None:
            self._recording = self._record(self._input)
        if recorded and self._recording is not None:
            with self._recording.in_order():
                self._fill(self._input, pictures)
                features = self._recording.replay().clone()
        else:
            self._fill(self._input, pictures)
            features = self._model.image_features(self._input)
        return features.unflatten(0, (self.pictures, self.views))[: len(pictures)]

    def _fill(self, batch: Tensor, pictures: Sequence[Tensor]) -> None:
        """Copy the views of pictures to a batch, and zeros to the rest of it."""
        with torch.no_grad():
            for slot, views in zip(batch.split(self.views), pictures, strict=False):
                slot.copy_(views)
            batch[len(pictures) * self.views :].zero_()

    def _record(self, batch: Tensor) -> Recording[Tensor] | None:
        """Record the launches that encode a batch, or return None with a warning where that fails."""
        try:
            return Recording(lambda: self._model.image_features(batch), self._model.device)
        except Exception as error:
            self._recordable = False
            warnings.warn(
                "the image encoder could not be recorded in a CUDA graph, and its kernels are launched one by one: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
