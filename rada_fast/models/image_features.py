"""The features of images: views of the images are encoded, and the results are cached on disk."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rada_fast import _env
from rada_fast.config.commands import ViewKind
from rada_fast.data.sources import Sample, Source
from rada_fast.data.stored import location_stamp
from rada_fast.data.tensor_cache import read_tensors, write_tensors
from rada_fast.data.views import CROP_SCALE, ViewDataset, collate_single, image_seed
from rada_fast.errors import UserError
from rada_fast.models.encoded_parts import Encoded, EncodedParts
from rada_fast.models.vision_language import Model, VisionLanguageModel
from rada_fast.runs.progress import progress
from rada_fast.runs.shards import shared_counts
from rada_fast.system import notices, patience, ranks
from rada_fast.system.ranks import Ranks

ENCODER_BATCH = 32
"""The number of images that are encoded at once."""
SECONDS_TO_SIGNAL = 5.0
"""The longest wait for the signal that a worker process has ended. It usually comes at once."""


class Unreadable(NamedTuple):
    """An image that could not be read, and the reason."""

    id: str
    label: int
    reason: str


@dataclass(frozen=True)
class Features:
    """Encoded images.

    features: the features (N, D), unit norm.
    labels: the labels (N,).
    ids: the names of the N images.
    unreadable: the images that could not be read.
    parts: what is on disk of features that have no lasting entry in the cache, to be removed when they are used up.
    """

    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    unreadable: tuple[Unreadable, ...] = ()
    parts: EncodedParts | None = None


def features_of(
    source: Source, model: Model, *, title: str, workers: int, limit: int | None = None, trained: str = ""
) -> Features:
    """Return the features of the original views of images, on the CPU. Several ranks, which must all call this, share
    the work, and each has all features at the end.

    source: the images or their features.
    model: the model that encodes images.
    title: the title of the progress bar.
    workers: see iterate_views.
    limit: the largest number of images, or None for all.
    trained: see encode_images.
    """
    chosen = source.limited(limit)
    if (views := chosen.views()) is not None:
        return Features(views[:, 0], chosen.labels, chosen.ids)
    return encode_images(chosen.samples, model.loaded(), title=title, workers=workers, trained=trained)


def iterate_views(
    samples: Sequence[Sample],
    vlm: VisionLanguageModel,
    *,
    views: int,
    kind: ViewKind,
    seed: int,
    workers: int,
    crop_scale: tuple[float, float] = CROP_SCALE,
    ahead: int = 0,
) -> Iterator[tuple[int, Tensor | None, str | None]]:
    """Yield the index of each sample and its views (V, 3, S, S), or None and the reason why it cannot be read.

    samples: the image files.
    vlm: the model, which determines the form of the views.
    views, kind, seed, crop_scale: see ViewDataset, where views is num_views.
    workers: the number of processes that make the views. If the system cannot start them, this process makes the views,
        and a warning says so.
    ahead: the number of images that the workers may read before they are needed; at least two each.

    Raises RuntimeError if the system ends a worker. PyTorch raises it wherever this process is at that moment. Raises
    OSError if the disk with the images has gone.
    """
    dataset = ViewDataset(samples, vlm.preprocess, views, kind, seed, crop_scale)
    # A loader draws a seed that nothing here uses. It must not come from the numbers that a training draws.
    unused = torch.Generator()
    if workers:
        try:
            # If /dev/shm cannot be written, this fails first; an incomplete loader would print another error later.
            multiprocessing.Lock()
            stream = iter(
                DataLoader(
                    dataset, batch_size=None, num_workers=workers, collate_fn=prepare_for_sending, generator=unused,
                    prefetch_factor=max(2, -(-ahead // workers)),
                    worker_init_fn=partial(_begin_worker, patience.limit()),
                )
            )  # fmt: skip
        except OSError as error:  # no semaphores without a writable /dev/shm, no more processes, no more memory
            notices.warn(f"--workers {workers} cannot be started ({error}); the images are read without them")
        else:
            try:
                for index, sent, reason in stream:
                    yield index, torch.from_numpy(sent) if isinstance(sent, np.ndarray) else sent, reason
            except TimeoutError:
                # The worker's error comes with the trace of the worker. Its own thread has nothing else to say.
                raise TimeoutError(
                    f"more than {patience.MOST_STUCK} pictures hang at the same time in a process that reads images, "
                    f"each for more than {patience.limit():g} s: the disk or the network does not answer"
                ) from None
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                # A worker was ended while it sent views. The signal of its end makes PyTorch raise an error of its own
                # here. Without this wait it would be raised while the loader is taken down, where nobody can catch it.
                time.sleep(SECONDS_TO_SIGNAL)
                raise RuntimeError(f"DataLoader worker (pid unknown) has gone: {error}") from error
            except OSError as error:
                if error.errno is not None:
                    raise
                # A worker's error comes as a text that ends with the error, behind the trace of the worker.
                raise OSError(str(error).strip().splitlines()[-1].partition("Error: ")[2] or str(error)) from None
            return
    yield from DataLoader(dataset, batch_size=None, collate_fn=collate_single, generator=unused)


def _begin_worker(limit: float, number: int) -> None:
    """Let a worker wait for a picture as long as the process that has started it."""
    patience.set_limit(limit)


def prepare_for_sending(item: Any) -> tuple[int, Tensor | np.ndarray[Any, Any] | None, str | None]:
    """Move the views of an Item to shared memory or, if that is full, to an array that is sent through a pipe.

    This runs in a worker. The loader would share a tensor in a thread; if that failed, no error would be reported, and
    the main process would wait for ever.
    """
    index, views, reason = item
    if views is None:
        return index, None, reason
    try:
        return index, views.share_memory_(), reason
    except RuntimeError:
        return index, views.numpy(), reason


class Rows(NamedTuple):
    """Images that follow one another in a stream, or their features.

    rows: the images (n, 3, S, S) or the features (n, D), or None if n is 0.
    indices: the indices of their samples.
    until: the number of samples that the stream has read so far.
    unreadable: the images among them that could not be read.
    """

    rows: Tensor | None
    indices: list[int]
    until: int
    unreadable: tuple[Unreadable, ...] = ()


Stream = Iterator[tuple[int, Tensor | None, str | None]]
"""What iterate_views yields, in the order of the samples."""


def iterate_images(stream: Stream, samples: Sequence[Sample]) -> Iterator[Rows]:
    """Yield the first view of each image of a stream. samples: the samples of the stream."""
    for index, views, reason in stream:
        if views is None:
            unreadable = Unreadable(samples[index].id, samples[index].label, reason or "")
            yield Rows(None, [], index + 1, (unreadable,))
        else:
            yield Rows(views[:1], [index], index + 1)


def iterate_features(
    stream: Stream, samples: Sequence[Sample], vlm: VisionLanguageModel, *, batch: int = ENCODER_BATCH
) -> Iterator[Rows]:
    """Yield the features of the first view of each image of a stream, on the model's device.

    stream, samples: see iterate_images.
    vlm: the model that encodes the images.
    batch: the number of samples whose images are encoded at once: the first so many, the next so many, and so on. Those
        that cannot be read leave the others where they are.

    Raises UserError if the features of an image are not usable.
    """
    images: list[Tensor] = []
    indices: list[int] = []
    unreadable: list[Unreadable] = []
    for part in iterate_images(stream, samples):
        indices += part.indices
        unreadable += part.unreadable
        if part.rows is not None:
            images.append(part.rows)
        if part.until % batch == 0 or part.until == len(samples):
            features = None
            if images:
                features = vlm.encode_images(torch.cat(images), [samples[index].id for index in indices])
            yield Rows(features, indices, part.until, tuple(unreadable))
            images, indices, unreadable = [], [], []


def encode_images(
    samples: Sequence[Sample], vlm: VisionLanguageModel, *, title: str, workers: int, trained: str = ""
) -> Features:
    """Compute the features of the centre view of every image, or read them from the cache on disk.

    The key of a cache entry depends on the model, the arithmetic, and the ids, labels, sizes and times of the files. An
    encoding that was interrupted goes on from the parts that it has left there.

    samples: the image files.
    vlm: the model that encodes them.
    title: the title of the progress bar.
    workers: see iterate_views.
    trained: what tells apart what was trained in the model since it was loaded, such as a hash. Features of such a
        model get no lasting entry: their parts are there until Features.parts is removed.

    Raises UserError if none of the images can be read, or if the features of an image are not usable.
    """
    group = ranks.current()
    path = _features_path(samples, vlm, trained)
    found = None if trained else _read_features(path, samples)
    # Ranks on several machines may have different caches.
    if all(group.all_gather(found is not None)) and found is not None:
        return found
    notices.release()
    parts = _parts(samples, vlm, trained, group)

    def stream(rest: Sequence[Sample]) -> Stream:
        return iterate_views(rest, vlm, views=1, kind="crop", seed=0, workers=workers)

    result = _encode(stream, samples, vlm, title, parts, group)
    if trained or result.unreadable:
        # An image that cannot be read is tried again by the next run, so the parts stay as they are.
        parts.write()
    else:
        if group.local_rank == 0:
            write_tensors(path, {"features": result.features, "labels": result.labels})
        parts.remove()
    return result if trained else replace(result, parts=None)


def encode_crops(
    samples: Sequence[Sample], vlm: VisionLanguageModel, *, title: str, seed: int, draw: str, workers: int
) -> Features:
    """Compute the features of one random crop of each image, or read what an interrupted run has left of them.

    The parts of them are in the cache on disk until Features.parts is removed.

    samples: the image files.
    vlm: the model that encodes them.
    title: the title of the progress bar.
    seed, draw: the seed of the run and the name of the draw. The crop of an image depends on them and on its id alone.
    workers: see iterate_views.

    Raises UserError if none of the images can be read, or if the features of an image are not usable.
    """
    group = ranks.current()
    parts = _parts(samples, vlm, f"crops {seed} {draw}", group)

    def stream(rest: Sequence[Sample]) -> Stream:
        return iterate_views(rest, vlm, views=0, kind="crop", seed=image_seed(seed, draw), workers=workers)

    result = _encode(stream, samples, vlm, title, parts, group)
    parts.write()
    return result


def _own_indices(total: int, group: Ranks) -> list[int]:
    """Return the indices of the samples that a rank encodes: whole batches, so that each is the same as in one process.

    The last bits of a feature may depend on the images that are encoded beside it.
    """
    return [
        index
        for first in group.share(range(0, total, ENCODER_BATCH))
        for index in range(first, min(first + ENCODER_BATCH, total))
    ]


def _parts(samples: Sequence[Sample], vlm: VisionLanguageModel, variant: str, group: Ranks) -> EncodedParts:
    """Return the parts on disk of what this rank has encoded. variant: what decides the features besides the model."""
    own = [samples[index] for index in _own_indices(len(samples), group)]
    return EncodedParts(_features_path(own, vlm, variant).with_suffix(".parts"), own)


def _encode(
    stream: Callable[[Sequence[Sample]], Stream],
    samples: Sequence[Sample],
    vlm: VisionLanguageModel,
    title: str,
    parts: EncodedParts,
    group: Ranks,
) -> Features:
    """Encode the images that no part holds yet, and show the progress.

    stream: a function from samples to their views.
    """
    own = _own_indices(len(samples), group)
    rows = torch.zeros(len(own), vlm.embed_dim)
    faults: list[tuple[int, str]] = []
    with progress(title, len(own), unit="images", gather=shared_counts(group)) as advance:
        finished = 0
        for one in _encoded(stream, [samples[index] for index in own], vlm, parts):
            if one.features is not None:
                rows[one.indices] = one.features
            faults += [(own[index], reason) for index, reason in one.unreadable]
            advance(one.until - finished)
            finished = one.until
        told = group.all_gather(faults, lambda: advance(0))
    reasons = {index: reason for rank_faults in told for index, reason in rank_faults}
    unreadable = [Unreadable(samples[index].id, samples[index].label, reasons[index]) for index in sorted(reasons)]
    check_some_readable(unreadable, samples)
    rows = group.all_gather_rows(rows, len(samples), ENCODER_BATCH)
    indices = [index for index in range(len(samples)) if index not in reasons]
    kept = [samples[index] for index in indices]
    labels = torch.tensor([sample.label for sample in kept])
    features = rows if not reasons else rows[indices]
    return Features(features, labels, tuple(sample.id for sample in kept), tuple(unreadable), parts)


def _encoded(
    stream: Callable[[Sequence[Sample]], Stream],
    samples: Sequence[Sample],
    vlm: VisionLanguageModel,
    parts: EncodedParts,
) -> Iterator[Encoded]:
    """Yield the images that the parts hold, then encode the others, yield them as well and add them to the parts."""
    start = 0
    for part in parts.read():
        start = part.until
        yield part
    first, rest = start, samples[start:]
    if not rest:
        return
    try:
        for rows in iterate_features(stream(rest), rest, vlm):
            until, indices = first + rows.until, [first + index for index in rows.indices]
            missing = [index for index in range(start, until) if index not in frozenset(indices)]
            reasons = [image.reason for image in rows.unreadable]
            features = None if rows.rows is None else rows.rows.cpu()
            encoded = Encoded(features, indices, until, list(zip(missing, reasons, strict=True)))
            parts.add(encoded)
            yield encoded
            start = until
    except BaseException:
        parts.write()
        raise


def check_some_readable(unreadable: Sequence[Unreadable], samples: Sequence[Sample]) -> None:
    """Raise UserError if none of the samples can be read."""
    if unreadable and len(unreadable) == len(samples):
        place = samples[0].path
        root = str(place).removesuffix(samples[0].id).rstrip("/") if isinstance(place, Path) else place.name
        raise UserError(
            f"data {root}: none of the {len(samples)} images could be read; the first: {unreadable[0].reason}"
        )


def _features_path(samples: Sequence[Sample], vlm: VisionLanguageModel, variant: str) -> Path:
    digest = hashlib.sha256(f"{vlm.fingerprint} {vlm.precision} {vlm.device} {vlm.preprocess}{variant}".encode())
    for sample in samples:
        digest.update(os.fsencode(f"{sample.id} {sample.label} {location_stamp(sample.path)}\n"))
    return _env.cache_dir() / "images" / f"{digest.hexdigest()[:32]}.safetensors"


def _read_features(path: Path, samples: Sequence[Sample]) -> Features | None:
    tensors = read_tensors(path)
    if tensors is None or set(tensors) != {"features", "labels"} or len(tensors["features"]) != len(samples):
        return None
    if not bool(tensors["features"].isfinite().all()):
        return None
    return Features(tensors["features"], tensors["labels"], tuple(sample.id for sample in samples))
