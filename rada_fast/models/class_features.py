"""Class names, prompt templates and the text features T made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.data.sources import read_names
from rada_fast.data.tensor_cache import read_tensors, write_tensors
from rada_fast.errors import UserError
from rada_fast.models.vision_language import VisionLanguageModel

PHOTO = "a photo of a {}."

# The single prompts that prompt-learning work uses for each data set.
DATASET_TEMPLATES = {
    "caltech101": PHOTO,
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "food101": "a photo of {}, a type of food.",
    "imagenet": PHOTO,
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": PHOTO,
    "sun397": PHOTO,
    "ucf101": "a photo of a person doing {}.",
}

TEXTS_AT_ONCE = 256


def resolve_templates(spec: str) -> tuple[str, ...]:
    """The prompt templates of an option: a template with {}, a known name, or a file (JSON list or a line each).

    Raises UserError naming the known ones where it is none of these, or a template has no {}.
    """
    if "{}" in spec:
        return (spec,)
    if spec == "photo":
        return (PHOTO,)
    if spec in ("openai", "simple"):
        from open_clip import zero_shot_metadata

        makers = {
            "openai": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
            "simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
        }[spec]
        return tuple(make("{}") for make in makers)
    if spec in DATASET_TEMPLATES:
        return (DATASET_TEMPLATES[spec],)
    path = Path(spec).expanduser()
    try:
        exists = path.is_file()
    except OSError:  # a text too long for a file's name
        exists = False
    if not exists:
        known = ["photo", "simple", "openai", *DATASET_TEMPLATES]
        raise UserError(f"templates must be a template with {{}}, a file, or one of {', '.join(known)}; got {spec!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"templates file {path} cannot be read: {error}") from None
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and "{}" in v for v in values):
        raise UserError(f"templates file {path} must hold one or more templates, each with {{}}")
    return tuple(values)


def resolve_class_names(folders: Sequence[str], spec: str | None) -> tuple[str, ...]:
    """Names of the classes, in the folders' order.

    folders: class folders' names; none where the data have no classes of their own and a file has to name them.
    spec: None takes open_clip's names for ImageNet's folders (n01440764, ...), else the folder's name with spaces for
        underscores; otherwise a file (see read_names): as many names as folders, or a name for each folder.

    Raises UserError naming the file, what was expected and what it holds.
    """
    if spec is None:
        if not folders:
            raise UserError("classes must be given (--classes FILE): these data have no class folders")
        return _imagenet_names(folders) or tuple(folder.replace("_", " ") for folder in folders)
    names = read_names(Path(spec).expanduser())
    if isinstance(names, dict):
        if not folders:
            return tuple(names.values())
        if missing := [folder for folder in folders if folder not in names]:
            raise UserError(
                f"classes file {spec} must name every class folder, {len(missing)} of {len(folders)} are missing: "
                f"{', '.join(missing[:5])}"
            )
        return tuple(names[folder] for folder in folders)
    if folders and len(names) != len(folders):
        raise UserError(f"classes file {spec} must hold {len(folders)} names, one a class folder, got {len(names)}")
    return tuple(names)


def _imagenet_names(folders: Sequence[str]) -> tuple[str, ...] | None:
    """ImageNet's names, where every folder is one of its synsets."""
    if not all(len(folder) == 9 and folder[0] == "n" and folder[1:].isdigit() for folder in folders):
        return None
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    names = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    return tuple(names[folder] for folder in folders) if all(folder in names for folder in folders) else None


def class_features(
    vlm: VisionLanguageModel,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Text features T of the classes: each prompt's unit-norm feature, averaged over templates, normalised again.

    names: K class names; templates: each with one {}; cache_dir: folder to keep them in, under a key that changes with
    model, weights, arithmetic, names and templates; progress: told after each chunk how many prompts it had.

    Returns (K, D) float32 on the CPU, unit norm. Raises UserError where there is no name or no template.
    """
    if not names:
        raise UserError("classes must hold at least one name, got K = 0")
    if not templates:
        raise UserError("templates must hold at least one template, got none")
    path = None
    if cache_dir is not None:
        key = json.dumps([vlm.fingerprint, vlm.precision, vlm.device.type, list(names), list(templates)])
        path = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if (found := _read(path, len(names), vlm.embed_dim)) is not None:
            return found
    # A name that occurs twice is encoded once: matrix products may round equal rows of a batch differently.
    rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
    prompts = [template.replace("{}", name) for name in rows for template in templates]
    encoded = []
    for first in range(0, len(prompts), TEXTS_AT_ONCE):
        chunk = prompts[first : first + TEXTS_AT_ONCE]
        encoded.append(vlm.encode_texts(chunk))
        if progress is not None:
            progress(len(chunk))
    features = torch.cat(encoded).view(len(rows), len(templates), -1)
    # One template's feature is taken as it is: normalising twice would move its last digits.
    distinct = (features[:, 0] if len(templates) == 1 else normalize(features.mean(dim=1), dim=-1)).cpu()
    result = distinct[[rows[name] for name in names]]
    if path is not None:
        write_tensors(path, {"features": result})
    return result


def _read(path: Path, num_classes: int, embed_dim: int) -> Tensor | None:
    """What the cache holds, or None where it is missing, damaged or not unit-norm features of this shape."""
    features = (read_tensors(path) or {}).get("features")
    if features is None or features.dtype != torch.float32 or features.shape != (num_classes, embed_dim):
        return None
    # A flipped bit leaves the file readable; float32 rows are within 1e-6 of unit norm when whole.
    return features if bool(((features.norm(dim=-1) - 1).abs() < 1e-4).all()) else None
