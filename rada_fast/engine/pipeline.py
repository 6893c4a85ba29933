"""The way of pictures through test-time training: decode, views, encode, select, adapt, predict, result.

Threads decode pictures and cut their views, ahead of the thread that asks for results. That thread alone encodes and
adapts, in turn, so that the two never compete for cores. Without such threads it decodes and cuts as well, in turn with
the rest, and one thread only waits for the source and for disks. On a GPU the thread only launches the encoder and the
adapter, and reads the results of a group of episodes when the next group is launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast.config.commands import ViewKind
from rada_fast.data.decode import Picture, UnreadableImageError, pixels_of_picture
from rada_fast.data.views import Preprocess, ViewPlan, cut_views, plan_views
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.engine.episodes import Adaptation
from rada_fast.engine.stages import StageTimes, uncounted
from rada_fast.system.ahead import Ahead

PATIENCE = 0.02
"""The longest wait in seconds for another picture of a batch or group, while one is being read."""

CUT_BY_THREADS = ("cpu",)
"""The types of the devices whose views are cut by the threads that decode. Other devices cut them themselves."""
GROUPS_BEHIND = {"cpu": 0, "cuda": 1}
"""How many groups are launched after one before its results are read, by the type of the device."""


class Item(NamedTuple):
    """A picture on its way.

    number: its number in the input, counted from 0.
    id: its name.
    views: its views (V, 3, S, S), or their features (V, D) if there is nothing to encode.
    plan: the boxes of the views if they are still to be cut; views are then the pixels (height, width, 3).
    error: the reason why it cannot be read, or None.
    """

    number: int
    id: str
    views: Tensor | None
    plan: ViewPlan | None = None
    error: str | None = None


class Outcome(NamedTuple):
    """The end of a picture's way: its logits (K,) on the CPU, or the reason why it cannot be read."""

    number: int
    id: str
    adapted: Tensor | None
    zero_shot: Tensor | None
    error: str | None = None


class ViewMaker:
    """Decode pictures and cut their views, in any thread.

    preprocess: the form of the views.
    views, kind: the number V of views, and what they are; see plan_views.
    seed_of: the seed of a picture's views, by its name.
    device: the device that cuts the views. For another one than the CPU, threads prepare pixels in pinned memory.
    times: this counts the time of the stages.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        views: int,
        kind: ViewKind,
        seed_of: Callable[[str], int],
        device: torch.device,
        times: StageTimes,
    ) -> None:
        self.preprocess, self._views, self._kind = preprocess, views, kind
        self._seed_of, self._device, self._times = seed_of, device, times

    def __call__(self, number: int, id: str, picture: Picture) -> Item:
        """Return the views of a picture, or of a GPU's picture the pixels and the plan of the views."""
        with _naming([id]):
            try:
                with self._times.busy("decode"):
                    pixels = pixels_of_picture(picture)
            except UnreadableImageError as error:
                return Item(number, id, None, error=str(error))
            with self._times.busy("views"):
                height, width, _ = pixels.shape
                plan = plan_views(height, width, self.preprocess, self._views, self._kind, self._seed_of(id))
                if self._device.type in CUT_BY_THREADS:
                    return Item(number, id, cut_views(pixels, plan, self.preprocess))
                return Item(number, id, pixels.pin_memory() if self._device.type == "cuda" else pixels, plan)


class Uploads:
    """Bring pictures to a device and cut their views there, beside what the device computes.

    device: the device.
    preprocess: the form of the views.
    """

    def __init__(self, device: torch.device, preprocess: Preprocess) -> None:
        self._device, self._preprocess = device, preprocess
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, item: Item) -> Item:
        """Return an item with its views, which the current stream may use."""
        assert item.views is not None
        if item.plan is None:
            return item
        if self._stream is None:
            return item._replace(views=cut_views(item.views, item.plan, self._preprocess), plan=None)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pixels = item.views.to(self._device, non_blocking=True)
            views = cut_views(pixels, item.plan, self._preprocess)
        current.wait_stream(self._stream)
        # The memory must not be used again by the side stream while the current one reads it.
        views.record_stream(current)
        return item._replace(views=views, plan=None)


class _Group(NamedTuple):
    """A group of episodes whose results are on their way to the CPU.

    items: the pictures.
    results: (E, 2 K + 1) on the CPU: the adapted logits, those of CLIP, and whether the features can be used.
    features: the features (E, V, D).
    arrived: the event on a GPU that says that the results have arrived.
    """

    items: Sequence[Item]
    results: Tensor
    features: Tensor
    arrived: torch.cuda.Event | None


class Pipeline:
    """Adapt to pictures as they come, and yield the outcome of each.

    reader: the pictures, for each of which prepare makes an item.
    encoder: what encodes views, or None if the items have features.
    uploads: what brings the views to the device.
    adaptation: what adapts groups of episodes.
    check: a function that raises an error for features (V, D) that cannot be used, naming the picture.
    episodes: the number E of pictures that are adapted together if so many are there.
    device: the device.
    times: this counts the time of the stages.
    prepare: what makes an item of a result of the reader, in turn with the other stages.
    on_group: a function that is called after each group of episodes.
    """

    def __init__(
        self,
        reader: Ahead[Any, Any],
        encoder: ViewEncoder | None,
        uploads: Uploads | None,
        adaptation: Adaptation,
        check: Callable[[Tensor, str], None],
        *,
        episodes: int,
        device: torch.device,
        times: StageTimes,
        prepare: Callable[[Any], Item],
        on_group: Callable[[], None] | None = None,
    ) -> None:
        self._prepare, self._on_group = prepare, on_group
        self._reader, self._encoder, self._uploads, self._adaptation = reader, encoder, uploads, adaptation
        self._check, self._episodes, self._device, self._times = check, episodes, device, times
        self._batch: list[Item] = []
        self._encoded: deque[tuple[Item, Tensor]] = deque()
        self._launched: deque[_Group] = deque()
        self._timings: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def outcomes(self) -> Generator[Outcome]:
        """Yield the outcomes as soon as they are there. Closing the generator stops the threads of the reader."""
        pictures = self._encoder.pictures if self._encoder is not None else 1
        try:
            while True:
                taken = self._reader.take(self._patience())
                if taken is not None:
                    item = self._prepare(taken)
                    if item.views is None:
                        self._reader.make_room()
                        yield Outcome(item.number, item.id, None, None, item.error)
                        continue
                    self._batch.append(item)
                    if len(self._batch) == pictures:
                        self._encode()
                elif self._batch:
                    self._encode()
                elif self._encoded:
                    self._adapt()
                elif self._launched:
                    yield from self._arrived()
                elif self._reader.ended:
                    return
                if len(self._encoded) >= self._episodes:
                    self._adapt()
                # A GPU computes the last group while the results of the one before it are read.
                while len(self._launched) > GROUPS_BEHIND[self._device.type]:
                    yield from self._arrived()
        finally:
            self._reader.close()

    def _patience(self) -> float | None:
        """Return how long to wait for another picture: for ever if there is nothing else to do."""
        if self._batch or self._encoded:
            return PATIENCE if self._reader.at_work else 0
        return 0 if self._encoded or self._launched else None

    def _encode(self) -> None:
        """Encode the pictures that have come."""
        batch, self._batch = self._batch, []
        with _naming([item.id for item in batch]):
            if self._encoder is None or self._uploads is None:
                for item in batch:
                    assert item.views is not None
                    self._encoded.append((item, item.views.to(self._device, non_blocking=True)))
            else:
                with self._times.busy("views"):
                    views = [uploaded.views for item in batch if (uploaded := self._uploads(item)).views is not None]
                with self._busy("encode"):
                    features = self._encoder(views)
                # The views are not needed any more, and nothing may keep their memory.
                self._encoded.extend(
                    (item._replace(views=None), own) for item, own in zip(batch, features, strict=True)
                )
        self._reader.make_room(len(batch))

    @torch.no_grad()
    def _adapt(self) -> None:
        """Adapt to the pictures that are encoded, and let their results be brought to the CPU."""
        count = min(len(self._encoded), self._episodes)
        items, features = zip(*(self._encoded.popleft() for _ in range(count)), strict=True)
        # On a CPU the adaptation counts the time of its own stages, and this what comes before and after them.
        on_host = self._device.type != "cuda"
        whole, part = (uncounted, self._times.busy) if on_host else (self._busy, uncounted)
        with _naming([item.id for item in items]), whole("adapt"):
            with part("select"):
                views = torch.stack(features)  # (E, V, D)
            logits = self._adaptation(views)
            with part("predict"):
                usable = views.isfinite().all(-1) & (views != 0).any(-1)  # (E, V)
                results = torch.cat([logits.adapted, logits.zero_shot, usable.all(-1, keepdim=True)], dim=1)
            arrived = None
            if results.is_cuda:
                # Memory that is not pinned would let the host wait.
                pinned = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
                results = pinned.copy_(results, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(self._device))
        self._launched.append(_Group(items, results, views, arrived))
        if self._on_group is not None:
            self._on_group()

    @contextmanager
    def _busy(self, stage: str) -> Iterator[None]:
        """Count the time of a stage: of a GPU that of the device, which is known when its results have arrived."""
        if self._device.type != "cuda":
            with self._times.busy(stage):
                yield
            return
        stream = torch.cuda.current_stream(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        yield
        end.record(stream)
        self._timings.append((stage, start, end))

    def _arrived(self) -> Iterator[Outcome]:
        """Yield the outcomes of the group that was launched first."""
        group = self._launched.popleft()
        if group.arrived is not None:
            group.arrived.synchronize()
        while self._timings and self._timings[0][2].query():
            stage, start, end = self._timings.popleft()
            self._times.add(stage, start.elapsed_time(end) / 1e3)
        classes = group.results.shape[1] // 2
        for item, features, row in zip(group.items, group.features, group.results, strict=True):
            if not row[-1]:
                self._check(features, item.id)
            # A picture's logits must not keep those of its whole group in memory.
            adapted, zero_shot = row[:-1].clone().split(classes)
            yield Outcome(item.number, item.id, adapted, zero_shot)


@contextmanager
def _naming(ids: Sequence[str]) -> Iterator[None]:
    """Add the names of the pictures that are worked on to an exception."""
    try:
        yield
    except Exception as error:
        shown = ", ".join(map(repr, ids[:4])) + (" and others" if len(ids) > 4 else "")
        error.add_note(f"while predicting {shown}")
        raise
