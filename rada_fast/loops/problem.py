"""What every loop starts from: model, data, classes, text features and adapter, from the options, checked."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from rada_fast import _env
from rada_fast.config import AdapterConfig, AdapterOptions, ClassOptions, ModelOptions, RunOptions, ViewKind
from rada_fast.data.sources import FeatureFile, ImageFolder, Sample, open_source
from rada_fast.data.tensor_cache import read_tensors, write_tensors
from rada_fast.data.views import CROP_SCALE, ViewDataset, as_it_is
from rada_fast.errors import UserError
from rada_fast.loops.progress import progress
from rada_fast.models.class_features import class_features, resolve_class_names, resolve_templates
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter, load_adapter

Source = ImageFolder | FeatureFile

DEFAULT_LOGIT_SCALE = 100.0
"""CLIP's multiplier after training, for feature files that come without a model."""


@dataclass(frozen=True)
class Features:
    """Encoded images: unit-norm features (N, D), labels (N,), ids; (id, label, reason) of what could not be read."""

    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    unreadable: tuple[tuple[str, int, str], ...] = ()


def resolve_device(name: str) -> torch.device:
    """The device of an option. Raises UserError where there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if _env.has_cuda() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda" and not _env.has_cuda():
        raise UserError(f"device {name!r} was asked for, but PyTorch sees no CUDA device here")
    return device


def open_data(spec: str) -> Source:
    """The data behind KIND:PATH."""
    return open_source(spec)


def load_vision_language(options: ModelOptions, run: RunOptions) -> VisionLanguageModel:
    """The model of the options on its device."""
    device = resolve_device(options.device)
    return load_model(options.model, options.pretrained, device=device, precision=options.precision, seed=run.seed)


def class_names_of(source: Source, options: ClassOptions) -> tuple[str, ...]:
    """Names of a source's classes, in label order."""
    if isinstance(source, ImageFolder):
        if source.fault is not None:
            raise UserError(source.fault)
        return resolve_class_names(source.folders, options.classes)
    folders = source.class_names or [f"class {label}" for label in range(int(source.labels.max()) + 1)]
    return resolve_class_names(folders, options.classes)


def text_features_of(
    options: ClassOptions, names: Sequence[str], vlm: VisionLanguageModel | None, training: Features | None
) -> Tensor:
    """T (K, D), unit norm, on the CPU: prompts encoded, given in a file, or the training features' class means."""
    if options.text_features is None:
        if vlm is None:
            raise UserError(
                "text_features must be class-means or features:FILE.npz where the data are features and no model's "
                "prompts can fit them; or name the --model whose features they are"
            )
        templates = resolve_templates(options.templates)
        with progress("encode prompts", len(set(names)) * len(templates)) as advance:
            return class_features(vlm, names, templates, cache_dir=_env.cache_dir() / "text", progress=advance)
    if options.text_features == "class-means":
        if training is None:
            raise UserError("text_features class-means needs training images, which this command has none of")
        return class_means(training, len(names))
    source = open_source(options.text_features)
    if not isinstance(source, FeatureFile) or source.features.ndim != 2:
        raise UserError(f"text_features must be class-means or features:FILE.npz, got {options.text_features!r}")
    if len(source.features) != len(names):
        raise UserError(
            f"text_features {options.text_features} must hold one row for each of the {len(names)} classes, "
            f"got {len(source.features)}"
        )
    return normalize(source.features, dim=-1)


def class_means(training: Features, num_classes: int) -> Tensor:
    """Unit-norm mean feature of each class. Returns (K, D). Raises UserError where a class has no image."""
    sums = torch.zeros(num_classes, training.features.shape[1]).index_add(0, training.labels, training.features)
    if empty := [str(label) for label in range(num_classes) if not bool((training.labels == label).any())]:
        raise UserError(f"text_features class-means needs an image of every class, none of {', '.join(empty[:8])}")
    return normalize(sums, dim=-1)


def make_adapter(options: AdapterOptions, embed_dim: int, seed: int) -> RationalAdapter:
    """The adapter to start from: a file's, or a new one whose draws come from the seed alone."""
    if options.adapter is not None:
        adapter = load_adapter(options.adapter).float()
        if adapter.config.embed_dim != embed_dim:
            raise UserError(
                f"adapter {options.adapter} has width {adapter.config.embed_dim}, the features have {embed_dim}"
            )
        return adapter
    config: AdapterConfig = options.resolve(embed_dim)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, and nothing would put their states back.
        torch.default_generator.manual_seed(seed)
        return RationalAdapter(config)


def adapter_fingerprint(adapter: RationalAdapter) -> str:
    """A short hash of an adapter's configuration and weights."""
    digest = hashlib.sha256(repr(adapter.config).encode())
    for name, tensor in adapter.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tensor_fingerprint(tensor: Tensor) -> str:
    """A short hash of a CPU tensor's values."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def spread_limit(samples: Sequence[Sample], limit: int | None) -> tuple[Sample, ...]:
    """At most limit samples, taken in turn from every class, in the original order."""
    if limit is None or limit >= len(samples):
        return tuple(samples)
    by_class: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_class.setdefault(sample.label, []).append(index)
    ranked = sorted((rank, index) for group in by_class.values() for rank, index in enumerate(group))
    return tuple(samples[index] for index in sorted(index for _, index in ranked[:limit]))


def iterate_views(
    samples: Sequence[Sample],
    vlm: VisionLanguageModel,
    *,
    views: int,
    kind: ViewKind,
    seed: int,
    workers: int,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> Iterator[tuple[int, Tensor | None, str | None]]:
    """(index, views (V, 3, S, S) or None, reason or None) for each sample, in order; see ViewDataset."""
    dataset = ViewDataset(samples, vlm.preprocess, views, kind, seed, crop_scale)
    yield from DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=as_it_is)


def encode_images(
    samples: Sequence[Sample],
    vlm: VisionLanguageModel,
    *,
    title: str,
    workers: int,
    cached: bool = True,
    batch: int = 32,
) -> Features:
    """The centre view's features of every image, cached on disk under model, arithmetic, ids, sizes and times.

    cached: False for a model whose weights are no longer those it was loaded with.
    """
    path = _features_path(samples, vlm)
    if cached and (found := _read_features(path, samples)) is not None:
        return found
    features, kept, unreadable = [], [], []
    pending: list[Tensor] = []

    def flush() -> None:
        if pending:
            features.append(vlm.encode_images(torch.stack(pending)).cpu())
            pending.clear()

    with progress(title, len(samples)) as advance:
        stream = iterate_views(samples, vlm, views=1, kind="crop", seed=0, workers=workers)
        for index, view, reason in stream:
            if view is None:
                unreadable.append((samples[index].id, samples[index].label, reason or ""))
            else:
                kept.append(samples[index])
                pending.append(view[0])
                if len(pending) == batch:
                    flush()
            advance()
        flush()
    if not kept:
        raise UserError(f"none of the {len(samples)} images could be read; the first: {unreadable[0][2]}")
    result = Features(
        torch.cat(features),
        torch.tensor([sample.label for sample in kept]),
        tuple(sample.id for sample in kept),
        tuple(unreadable),
    )
    if cached and not unreadable:
        write_tensors(path, {"features": result.features, "labels": result.labels})
    return result


def _features_path(samples: Sequence[Sample], vlm: VisionLanguageModel) -> Path:
    digest = hashlib.sha256(f"{vlm.fingerprint} {vlm.precision} {vlm.device} {vlm.preprocess}".encode())
    for sample in samples:
        stat = sample.path.stat()
        digest.update(os.fsencode(f"{sample.id} {sample.label} {stat.st_size} {stat.st_mtime_ns}\n"))
    return _env.cache_dir() / "images" / f"{digest.hexdigest()[:32]}.safetensors"


def _read_features(path: Path, samples: Sequence[Sample]) -> Features | None:
    tensors = read_tensors(path)
    if tensors is None or set(tensors) != {"features", "labels"} or len(tensors["features"]) != len(samples):
        return None
    return Features(tensors["features"], tensors["labels"], tuple(sample.id for sample in samples))


def features_of(
    source: Source, vlm: VisionLanguageModel | None, *, title: str, run: RunOptions, cached: bool = True
) -> Features:
    """Centre-view features of a source, unit norm, on the CPU. cached: see encode_images."""
    if isinstance(source, FeatureFile):
        features = source.normalised()
        # Several views of an image: the first is the original.
        features = features[:, 0] if features.ndim == 3 else features
        result = Features(features, source.labels, tuple(source.ids))
        if run.limit is not None and run.limit < len(result.ids):
            result = replace(
                result, features=features[: run.limit], labels=source.labels[: run.limit], ids=result.ids[: run.limit]
            )
        return result
    assert vlm is not None
    samples = spread_limit(source.samples, run.limit)
    return encode_images(samples, vlm, title=title, workers=run.workers, cached=cached)


def check_width(features: Tensor, text_features: Tensor, data: str) -> None:
    """Raise UserError where the data's width is not the text features'."""
    if features.shape[-1] != text_features.shape[-1]:
        raise UserError(
            f"data {data} has features of width {features.shape[-1]}, the text features have {text_features.shape[-1]}"
        )


def needs_model(options: ClassOptions, *sources: Source) -> bool:
    """Whether a model has to be loaded: to encode images, or prompts."""
    return options.text_features is None or any(isinstance(source, ImageFolder) for source in sources)


def identity_of(
    command: str, config: Any, vlm: VisionLanguageModel | None, adapter: RationalAdapter, text_features: Tensor
) -> dict[str, Any]:
    """All that decides a run's results: its options, less where and how it runs, and what they resolved to."""
    options = dataclasses.asdict(config)
    for name in ("output", "workers", "limit", "overwrite", "allow_unreadable", "json"):
        options["run"].pop(name, None)
    for name in ("episodes", "order_seed"):
        options.pop(name, None)
    return {
        "command": command,
        "options": options,
        "adapter": {**adapter.config.to_dict(), "preset": adapter.config.preset},
        # A new adapter follows from the seed; one from a file is known by its weights.
        "adapter_file": adapter_fingerprint(adapter) if config.adapter.adapter is not None else None,
        "model": vlm.fingerprint if vlm is not None else None,
        "text_features": tensor_fingerprint(text_features),
    }
