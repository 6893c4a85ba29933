"""The text features T of the classes, from encoded prompts, means of images, a trained classifier, or a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast import _env
from rada_fast.config.options import ClassOptions
from rada_fast.data.folders import EXAMPLES
from rada_fast.data.sources import FeatureFile
from rada_fast.data.tensor_cache import read_tensors, write_tensors
from rada_fast.errors import UserError
from rada_fast.models.class_names import folded, resolve_class_names
from rada_fast.models.image_features import Features
from rada_fast.models.prompts import Prompts, resolve_prompts
from rada_fast.models.trained import read_classifier
from rada_fast.models.vision_language import Model, VisionLanguageModel
from rada_fast.runs.progress import progress
from rada_fast.system import notices

TEXT_BATCH_SIZE = 256
EQUALITY_TOLERANCE = 1e-6
"""The largest difference of equal features by rounding. The values of a unit-norm row are far larger."""


class ClassGroup(NamedTuple):
    """Classes whose text features are computed together.

    names: the names of the classes, in label order.
    images: the features of their images, for the option class-means.
    data: the data with these classes as KIND:PATH, from which the template of a data set is known.
    """

    names: Sequence[str]
    images: Features | None = None
    data: str | None = None


def text_features(
    options: ClassOptions,
    groups: Sequence[ClassGroup],
    model: Model,
    file: FeatureFile | None = None,
    *,
    uses_classifier: bool = False,
) -> list[Tensor]:
    """Compute or read the text features T of groups of classes. Returns a tensor (K, D) on the CPU for each group.

    The rows have unit norm, except those of the classifier of a run of fft, which stay as they were trained.

    options: the options about classes and texts.
    groups: all classes in label order, in groups.
    model: the model that encodes prompts.
    file: the result of open_text_file for the options.
    uses_classifier: whether the caller uses the classifier that was trained with the image encoder, if there is one.

    Raises UserError if the options do not fit the classes.
    """
    value = options.text_features
    if value is None:
        prompts = [resolve_prompts(options.templates, group.data) for group in groups]
        # Every group has the same files of descriptions, and only all groups together use all that these describe.
        prompts[0].check([name for group in groups for name in group.names])
        pairs = zip(groups, prompts, strict=True)
        if not uses_classifier:
            for group in groups:
                warn_of_unused_classifier(model.loaded(), group.names)
        return [_features_of_prompts(model.loaded(), group.names, own) for group, own in pairs]
    if value == "class-means":
        means = [class_means(group.images, len(group.names)) for group in groups]
        for group, rows in zip(groups, means, strict=True):
            warn_of_equal_features(group.names, rows)
        return means
    names = [name for group in groups for name in group.names]
    if file is not None:
        rows = text_features_from_file(file, names)
    else:
        rows = read_classifier(Path(value.partition(":")[2]))
        if len(rows) != len(names):
            raise UserError(
                f"text_features {value} holds a classifier of {len(rows)} classes, the data have {len(names)}"
            )
    return list(rows.split([len(group.names) for group in groups]))


def _features_of_prompts(model: VisionLanguageModel, names: Sequence[str], prompts: Prompts) -> Tensor:
    """Compute the features of prompts, or read them from the cache folder."""
    warn_of_cut_names(model, names, prompts)
    count = sum(len(prompts.of(name)) for name in set(names))
    with progress("encode prompts", count, unit="prompts") as advance:
        return class_features(model, names, prompts, cache_dir=_env.cache_dir() / "text", progress=advance)


def warn_of_unused_classifier(model: VisionLanguageModel, names: Sequence[str]) -> None:
    """Warn if prompts are used although a classifier of as many classes was trained with the encoder."""
    trained = model.trained
    # A trained text encoder computes the features that such a classifier consists of.
    if trained is not None and not trained.trained_text and trained.num_classes == len(names):
        path = trained.path
        notices.warn(
            f"the image encoder of {path} was trained with a classifier of as many classes, which prompts replace "
            f"here; --text-features classifier:{path} uses it"
        )


def class_means(images: Features | None, num_classes: int) -> Tensor:
    """Compute the mean feature of the images of each class, at unit norm. Returns (K, D).

    Raises UserError if a class has no image, or if the command has no training images.
    """
    if images is None:
        raise UserError("text_features class-means needs training images, and this command has none")
    sums = torch.zeros(num_classes, images.features.shape[1]).index_add(0, images.labels, images.features)
    if empty := [str(label) for label in range(num_classes) if not bool((images.labels == label).any())]:
        raise UserError(f"text_features class-means needs an image of every class, none of {', '.join(empty[:8])}")
    return normalize(sums, dim=-1)


def warn_of_cut_names(vlm: VisionLanguageModel, names: Sequence[str], prompts: Prompts) -> None:
    """Warn of names and of descriptions that are too long for the tokenizer of the model, which cuts prompts off."""
    check_texts(names, prompts)
    length = int(vlm.tokenizer(["a"]).shape[-1])
    if prompts.templates:
        template = max(prompts.templates, key=len)
        if cut := _cut_off(vlm, {name: template.replace("{}", name) for name in names}, length):
            shown = ", ".join(repr(_short(name)) for name in cut[:EXAMPLES])
            notices.warn(
                f"{len(cut)} of {len(names)} class names are too long: of a prompt such as {template!r} the model "
                f"reads {length} tokens, and what lies beyond changes nothing: {shown}"
            )
    described = [text for name in dict.fromkeys(names) for text in prompts.of(name)[len(prompts.templates) :]]
    if cut := _cut_off(vlm, {text: text for text in described}, length):
        notices.warn(
            f"{len(cut)} of {len(described)} descriptions are too long: the model reads {length} tokens, and what lies "
            f"beyond changes nothing: {_short(cut[0])!r}"
        )


def _cut_off(vlm: VisionLanguageModel, texts: Mapping[str, str], length: int) -> list[str]:
    """Return the keys of texts whose last word the tokenizer cuts off. length: the number of tokens that it makes."""
    # A token has at least one byte, and two tokens mark the ends. Texts of fewer bytes are never cut off.
    long = {key: text for key, text in texts.items() if len(text.encode()) > length - 2}
    shorter = {key: found[1] for key, text in long.items() if (found := re.fullmatch(r"(.*\W)\w+\W*", text))}
    if not shorter:
        return []
    tokens, shorter_tokens = (vlm.tokenizer([some[key] for key in shorter]) for some in (long, shorter))
    return [key for key, same in zip(shorter, (tokens == shorter_tokens).all(dim=-1).tolist(), strict=True) if same]


def check_texts(names: Sequence[str], prompts: Prompts) -> None:
    """Raise UserError if a name or a prompt is not valid Unicode, such as the name of a folder that is not UTF-8."""
    described = [text for file in prompts.descriptions for texts in file.by_name.values() for text in texts]
    for option, texts in (("classes", names), ("templates", (*prompts.templates, *described))):
        for text in texts:
            if text.encode("utf-8", "replace").decode() != text:
                raise UserError(f"--{option} must be texts in UTF-8, got {text!r}; give others in a file")


def class_features(
    vlm: VisionLanguageModel,
    names: Sequence[str],
    prompts: Prompts,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Compute the text features T of the classes from prompts.

    The unit-norm features of the prompts of a class are averaged, and the mean is normalised.

    vlm: the model that encodes the prompts.
    names: the K class names.
    prompts: what is said of the classes.
    cache_dir: the folder of the cache, or None. The key of an entry depends on the model, its weights, the arithmetic,
        the names and the prompts.
    progress: a function that is called after each batch with the number of prompts in it.

    Returns (K, D) float32 on the CPU, unit norm. Raises UserError if there is no name, or a class has no prompt.
    """
    if not names:
        raise UserError("classes must hold at least one name, got K = 0")
    # A name that occurs twice is encoded once, because matrix products may round equal rows of a batch differently.
    texts = {name: prompts.of(name) for name in names}
    if not all(texts.values()):
        raise UserError("templates must hold at least one template or describe every class, got none")
    check_texts(names, prompts)
    path = None
    if cache_dir is not None:
        key = json.dumps([vlm.fingerprint, vlm.precision, vlm.device.type, list(names), list(texts.items())])
        path = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if (found := _read(path, len(names), vlm.embed_dim)) is not None:
            warn_of_equal_features(names, found)
            return found
    rows = {name: row for row, name in enumerate(texts)}
    every = [text for own in texts.values() for text in own]
    encoded = []
    for first in range(0, len(every), TEXT_BATCH_SIZE):
        chunk = every[first : first + TEXT_BATCH_SIZE]
        encoded.append(vlm.encode_texts(chunk))
        if progress is not None:
            progress(len(chunk))
    parts = torch.cat(encoded).split([len(own) for own in texts.values()])
    # The feature of a single prompt is not normalised again, because that would change its last digits.
    distinct = torch.stack([part[0] if len(part) == 1 else normalize(part.mean(dim=0), dim=-1) for part in parts]).cpu()
    result = distinct[[rows[name] for name in names]]
    warn_of_equal_features(names, result)
    if path is not None:
        write_tensors(path, {"features": result})
    return result


def text_features_from_file(file: FeatureFile, names: Sequence[str]) -> Tensor:
    """Return the text features T in a file, one row for each class, in the order of the names.

    file: its labels are the classes of the rows, and its class_names, if it has them, the names of the classes.
    names: the names of the K classes.

    Returns (K, D) float32 on the CPU, unit norm. Raises UserError if the file does not have exactly one row for each
    class.
    """
    if len(file.features) != len(names):
        raise UserError(
            f"text_features features:{file.path} must hold one row for each of the {len(names)} classes, "
            f"got {len(file.features)}"
        )
    features = normalize(file.features, dim=-1)
    if sorted(file.labels.tolist()) == list(range(len(names))):
        features = features[file.labels.argsort()]
    else:
        notices.warn(
            f"text_features features:{file.path} has labels that are not 0 ... {len(names) - 1}, each once: its rows "
            "are taken in the order of the classes"
        )
    if file.class_names is not None:
        own = [folded(name) for name in resolve_class_names(file.class_names, None, prompts=False)][: len(names)]
        wanted = [folded(name) for name in names]
        if len(set(own)) == len(own) and set(own) == set(wanted) and own != wanted:
            notices.note(f"text_features features:{file.path} has the classes in another order; each has its own row")
            features = features[[own.index(name) for name in wanted]]
        elif differing := [index for index, name in enumerate(own) if name != wanted[index] and name in wanted]:
            index = differing[0]
            notices.warn(
                f"text_features features:{file.path} names class {index} {file.class_names[index]!r}, the data name it "
                f"{names[index]!r}: its rows must be in the order of the classes"
            )
    warn_of_equal_features(names, features)
    return features


def warn_of_equal_features(names: Sequence[str], features: Tensor) -> None:
    """Warn of different names that have the same feature. features: (K, D), unit norm, on the CPU."""
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    shown = list(first)
    distinct = features[list(first.values())]
    order = distinct[:, 0].argsort()
    distinct = distinct[order]
    alike: set[str] = set()
    # Sorted by one column, equal rows lie side by side, with few other rows between them.
    for offset in range(1, min(9, len(shown))):
        # Equal prompts at different positions in a batch may differ in their last bits.
        equal = (distinct[offset:] - distinct[:-offset]).abs().amax(dim=-1) < EQUALITY_TOLERANCE
        for row in equal.nonzero().flatten().tolist():
            alike |= {shown[order[row]], shown[order[row + offset]]}
    if alike:
        examples = [name for name in names if name in alike][:2]
        notices.warn(
            f"{len(alike)} of {len(names)} classes have the same text feature as another and cannot be told apart, "
            f"such as {' and '.join(repr(_short(name)) for name in examples)} (a tokenizer may ignore letter case, cut "
            "long names or not know their words)"
        )


def _short(name: str) -> str:
    """Shorten a name, but keep its end, because names may differ in their ends alone."""
    return name if len(name) < 60 else f"{name[:30]} ... {name[-20:]}"


def _read(path: Path, num_classes: int, embed_dim: int) -> Tensor | None:
    """Read features from the cache. Returns None unless the file holds unit-norm features of this shape."""
    features = (read_tensors(path) or {}).get("features")
    if features is None or features.dtype != torch.float32 or features.shape != (num_classes, embed_dim):
        return None
    # A file with a wrong bit may still be readable. The norms of undamaged rows differ from 1 by at most 1e-6.
    return features if bool(((features.norm(dim=-1) - 1).abs() < 1e-4).all()) else None
