"""The two forms that data take once they have been read: image files by class, and extracted features.

Every reader in `readers/` returns one of them. What differs between them is answered by properties and methods of the
same names, so that a loop does not ask which of the two it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.data.few_shot import PublishedShots, choose_by_hash, take_in_turn
from rada_fast.data.fingerprints import tensor_fingerprint
from rada_fast.data.folders import Skipped
from rada_fast.data.stored import Location, location_stamp
from rada_fast.errors import UserError

NO_CLASS = -1
"""The label of an image whose class is not known."""


@dataclass(frozen=True)
class Sample:
    """A sample is one image.

    id: its path below the data folder, with forward slashes.
    path: its file, or its place in an archive or a table.
    label: the number of its class, or -1 where it has none.
    """

    id: str
    path: Location
    label: int


@dataclass(frozen=True)
class ImageFolder:
    """Images by class; a model has to encode them. Most lie in folders, others in archives or tables.

    path: the data folder, or the file that lists the images.
    folders: the keys of the classes in label order, which are the names of their folders or what a list calls them, or
        none if the images have no classes. Two data have the same class where the keys are equal.
    samples: all images, readable or not, sorted by id, or in the order of a published list.
    skipped: the other entries of the folder, each with the reason.
    fault: the reason why the names of the folders cannot be the names of the classes, or None. The images of such a
        folder can still be tested with the classes of another folder.
    names: the names of the classes for prompts, in label order, where they are published; otherwise they are made from
        the keys.
    counts_as: the keys that each class has in the data for training, where they are others than its own.
    published_shots: the rule by which CoOp chooses few images of each class, where the data have CoOp's lists.
    what: what a message calls the data.
    """

    path: Path
    folders: tuple[str, ...]
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    fault: str | None = None
    names: tuple[str, ...] | None = None
    published_shots: PublishedShots | None = None
    counts_as: tuple[tuple[str, ...], ...] | None = None
    what: str = "data folder"

    @property
    def holds_images(self) -> bool:
        """Return whether a model has to encode the data."""
        return True

    @property
    def description(self) -> str:
        """Return what a message calls the data."""
        return f"{self.what} {self.path}"

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of all images."""
        return tuple(sample.id for sample in self.samples)

    @property
    def labels(self) -> Tensor:
        """The labels of all images. Returns (N,) int64."""
        return torch.tensor([sample.label for sample in self.samples], dtype=torch.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in label order. Raises UserError where the folders cannot name them."""
        if self.fault is not None:
            raise UserError(self.fault)
        return self.folders

    @property
    def class_names_from(self) -> str:
        """Return where the names of the classes come from, in the words of a message."""
        return "class folders"

    @property
    def has_classes(self) -> bool:
        """Return whether the images have classes."""
        return bool(self.folders)

    @property
    def num_classes(self) -> int:
        """The number of classes, those without an image included."""
        return len(self.folders)

    @property
    def empty_folders(self) -> tuple[str, ...]:
        """The class folders without an image; they remain classes."""
        used = {sample.label for sample in self.samples}
        return tuple(folder for label, folder in enumerate(self.folders) if label not in used)

    @property
    def width(self) -> None:
        """The width of the features, which images get from a model."""

    @property
    def num_views(self) -> None:
        """The number of stored views of each image. Views of image files are made as they are needed."""

    @property
    def logit_scale(self) -> None:
        """The multiplier that the data state. Image files state none."""

    def views(self) -> None:
        """Return the stored features of the views of every image. Image files have none."""

    def known_labels(self) -> dict[str, int | None]:
        """Return the label of every image by its id, None where an image has no class."""
        return {sample.id: sample.label if sample.label >= 0 else None for sample in self.samples}

    def stamps(self) -> dict[str, str]:
        """Return what tells whether an image is still the same, by its id: its file's size and time and its label."""
        return {sample.id: f"{location_stamp(sample.path)}, class {sample.label}" for sample in self.samples}

    def subset(self, labels: Sequence[int]) -> ImageFolder:
        """Return only these classes, labelled 0, 1, ... in the order given."""
        new = {label: index for index, label in enumerate(labels)}
        samples = tuple(replace(s, label=new[s.label]) for s in self.samples if s.label in new)
        names = None if self.names is None else tuple(self.names[label] for label in labels)
        equal = None if self.counts_as is None else tuple(self.counts_as[label] for label in labels)
        folders = tuple(self.folders[label] for label in labels)
        return replace(self, folders=folders, samples=samples, names=names, counts_as=equal)

    def few_shot(self, shots: int, seed: int) -> ImageFolder:
        """Choose at most `shots` images of each class.

        The choice depends on the seed and the ids alone. Where the data have CoOp's lists, it is CoOp's choice among
        all classes, of which only the images of the present classes are kept.
        """
        if self.published_shots is not None:
            present = {sample.id: sample for sample in self.samples}
            chosen = self.published_shots.choose(shots, seed)
            return replace(self, samples=tuple(present[id] for id in chosen if id in present))
        kept = choose_by_hash(self.labels.tolist(), self.ids, shots, seed)
        return replace(self, samples=tuple(self.samples[index] for index in kept))

    def limited(self, limit: int | None) -> ImageFolder:
        """Choose at most `limit` images, taken in turn from every class, and keep their order."""
        if limit is None or limit >= len(self.samples):
            return self
        chosen = take_in_turn([sample.label for sample in self.samples], limit)
        return replace(self, samples=tuple(self.samples[index] for index in chosen))

    def class_difference(self, other: Source) -> str | None:
        """Say how the classes differ from those of other data. Returns None where nothing shows that they do."""
        if not isinstance(other, ImageFolder) or self.folders == other.folders:
            return None
        odd = sorted(set(self.folders) ^ set(other.folders))
        return f"only one of them has the class folders {', '.join(odd[:6])}"

    def classes_beyond(self, train: Source) -> str | None:
        """Say which classes are not among those of the training data. Returns None where all are."""
        if not isinstance(train, ImageFolder):
            return _OTHER_KIND
        known = frozenset(train.folders)
        pairs = zip(self.folders, self.equal_classes(), strict=True)
        unknown = sorted(name for name, equal in pairs if self.folders != train.folders and known.isdisjoint(equal))
        return f"train lacks the class folders {', '.join(unknown[:6])}" if unknown else None

    def labels_among(self, train: Source) -> list[tuple[int, ...]] | None:
        """Return the labels of each class in the training data, or None where these have the same classes.

        A class of ObjectNet can be several classes of ImageNet.
        """
        if not isinstance(train, ImageFolder) or self.folders == train.folders:
            return None
        label_of = {name: label for label, name in enumerate(train.folders)}
        return [tuple(label_of[name] for name in names if name in label_of) for names in self.equal_classes()]

    def equal_classes(self) -> tuple[tuple[str, ...], ...]:
        """Return the keys that each class may have in other data."""
        return tuple((name,) for name in self.folders) if self.counts_as is None else self.counts_as


@dataclass(frozen=True)
class FeatureFile:
    """Features that a model has extracted from images.

    path: the path of the file.
    features: (N, D), or (N, V, D) if each image has V views, of which the original is the first; float32, as stored.
    labels: (N,) int64.
    ids: the names of the N images.
    class_names: the names of the classes in label order, if the file has them.
    logit_scale: the multiplier s of the model that computed the features, if the file has it.
    """

    path: Path
    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    logit_scale: float | None = None

    @property
    def holds_images(self) -> bool:
        """Return whether a model has to encode the data."""
        return False

    @property
    def description(self) -> str:
        """Return what a message calls the data."""
        return f"feature file {self.path}"

    @property
    def names(self) -> None:
        """The published names of the classes. A feature file has names of its own or none."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The image files. Features have none."""
        return ()

    @property
    def class_names_from(self) -> str:
        """Return where the names of the classes come from, in the words of a message."""
        return f"names in the array class_names of {self.path}"

    @property
    def has_classes(self) -> bool:
        """Return whether the images have classes."""
        return bool((self.labels != NO_CLASS).any())

    @property
    def num_classes(self) -> int:
        """The number of classes, as the largest label says."""
        return int(self.labels.max()) + 1

    @property
    def width(self) -> int:
        """The width of the features."""
        return self.features.shape[-1]

    @property
    def num_views(self) -> int:
        """The number of stored views of each image."""
        return self.features.shape[1] if self.features.ndim == 3 else 1

    def views(self) -> Tensor:
        """Return the features of every image's views at unit norm, the original first: (N, V, D)."""
        features = normalize(self.features, dim=-1)
        return features if features.ndim == 3 else features[:, None]

    def known_labels(self) -> dict[str, int | None]:
        """Return the label of every image by its id, None where an image has no class."""
        labels = (None if label == NO_CLASS else label for label in self.labels.tolist())
        return dict(zip(self.ids, labels, strict=True))

    def stamps(self) -> dict[str, str]:
        """Return what tells whether the arrays are still the same: a hash of each, by its name."""
        return {"features": tensor_fingerprint(self.features), "labels": tensor_fingerprint(self.labels)}

    def subset(self, labels: Sequence[int]) -> FeatureFile:
        """Return only these classes, labelled 0, 1, ... in the order given."""
        new = {label: index for index, label in enumerate(labels)}
        kept = [index for index, label in enumerate(self.labels.tolist()) if label in new]
        names = None if self.class_names is None else tuple(self.class_names[label] for label in labels)
        chosen = self._rows(kept)
        return replace(
            chosen, labels=torch.tensor([new[label] for label in chosen.labels.tolist()]).long(), class_names=names
        )

    def few_shot(self, shots: int, seed: int) -> FeatureFile:
        """Choose at most `shots` images of each class. The choice depends on the seed and the ids alone."""
        return self._rows(choose_by_hash(self.labels.tolist(), self.ids, shots, seed))

    def limited(self, limit: int | None) -> FeatureFile:
        """Return the first `limit` images."""
        return self if limit is None or limit >= len(self.ids) else self._rows(list(range(limit)))

    def class_difference(self, other: Source) -> str | None:
        """Say how the classes differ from those of other data. Returns None where nothing shows that they do."""
        if not isinstance(other, FeatureFile):
            return None
        pairs = zip(self.class_names or (), other.class_names or (), strict=False)
        for label, (own, others) in enumerate(pairs):
            if own != others:
                return f"the class_names of label {label} are {own!r} and {others!r}"
        return None

    def classes_beyond(self, train: Source) -> str | None:
        """Say which classes are not among those of the training data. Returns None where all are."""
        if not isinstance(train, FeatureFile):
            return _OTHER_KIND
        if (difference := self.class_difference(train)) is not None:
            return difference
        if self.num_classes > train.num_classes:
            return f"its labels end at {self.num_classes - 1}, those of train at {train.num_classes - 1}"
        return None

    def labels_among(self, train: Source) -> None:
        """Return None: the training data number their classes in the same way."""

    def _rows(self, rows: list[int]) -> FeatureFile:
        ids = tuple(self.ids[row] for row in rows)
        return replace(self, features=self.features[rows], labels=self.labels[rows], ids=ids)


Source = ImageFolder | FeatureFile

_OTHER_KIND = "either both are images or both are features"
