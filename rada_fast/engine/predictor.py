"""Test-time training as a Python object: it predicts pictures as they come, each after adapting to it alone."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor

from rada_fast import _env
from rada_fast.config.checks import MAX_SEED, MAX_WORKERS, bytes_of, check_integer, check_positive
from rada_fast.config.commands import ViewKind
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.config.options import ModelOptions, Precision
from rada_fast.data.decode import Picture, UnreadableImageError, load_into_cache
from rada_fast.data.views import image_seed
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.engine.episodes import Adaptation, arithmetic_dtype, check_trainable, prediction_entropy
from rada_fast.engine.memory import EncoderLoad, MemoryPlan, encoder_bytes, memory_plan
from rada_fast.engine.pipeline import Item, Outcome, Pipeline, Uploads, ViewMaker
from rada_fast.engine.stages import StageTimes, uncounted
from rada_fast.models.class_features import class_features, warn_of_cut_names
from rada_fast.models.prompts import resolve_prompts
from rada_fast.models.vision_language import Model, VisionLanguageModel, open_model
from rada_fast.modules import RationalAdapter, load_adapter
from rada_fast.modules.rational_adapter import new_adapter, unwrapped
from rada_fast.ops.rational_adapter import check_text_features
from rada_fast.runs.progress import progress as show_progress
from rada_fast.system.ahead import Ahead

CLIP_LOGIT_SCALE = 100.0
"""CLIP's multiplier after training, where neither a model nor an argument states one."""

RESULTS_HELD_BACK = 1024
"""The most results that wait for one before them, when they are wanted in the order of the input."""


class Loaded(NamedTuple):
    """A picture whose file is in the system's memory, or the reason why its file cannot be read.

    number, id, picture: the number of the picture in the input, its name, and the picture as it was given.
    error: the reason, or None.
    """

    number: int
    id: str
    picture: Picture
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction of one picture.

    index: the number of the picture in the input, counted from 0.
    id: its name.
    status: "ok"; "unreadable" if the picture cannot be decoded, so that it has no prediction; or "diverged" if the
        adapted logits were not finite, so that those of CLIP stand in their place.
    label: the number of the predicted class, after adaptation.
    name: the name of that class.
    logits: the logits (K,) after adaptation, on the CPU.
    zero_shot_logits: those of CLIP.
    error: the reason why the picture cannot be read.
    """

    index: int
    id: str
    status: Literal["ok", "unreadable", "diverged"]
    label: int | None = None
    name: str | None = None
    logits: Tensor | None = None
    zero_shot_logits: Tensor | None = None
    error: str | None = None

    @property
    def probabilities(self) -> Tensor | None:
        """The probabilities (K,) of the classes after adaptation."""
        return None if self.logits is None else self.logits.softmax(dim=-1)

    @property
    def zero_shot_probabilities(self) -> Tensor | None:
        """The probabilities (K,) of the classes by CLIP."""
        return None if self.zero_shot_logits is None else self.zero_shot_logits.softmax(dim=-1)

    @property
    def entropy(self) -> float | None:
        """The entropy of the probabilities after adaptation, in nats."""
        return None if self.logits is None else float(prediction_entropy(self.logits))

    @property
    def zero_shot_entropy(self) -> float | None:
        """The entropy of CLIP's probabilities, in nats."""
        return None if self.zero_shot_logits is None else float(prediction_entropy(self.zero_shot_logits))


class TestTimePredictor:
    """Predict pictures by test-time training (RAda, arXiv:2507.15480, Sec. 4.3): adapt to each picture by itself.

    Each picture is encoded in V views, the confident views are kept, a fresh copy of the adapter takes a few optimiser
    steps on them, and the copy predicts the picture. Five lines in a notebook:

        import rada_fast
        predictor = rada_fast.TestTimePredictor("embedded", ["red star", "blue ring"])
        for result in predictor.predict(["a.jpg", "b.jpg"]):
            print(result.id, result.name, result.probabilities)

    A result depends on the picture, its id and the seed alone, to the bit on one machine: not on the order, on what
    else is predicted, on the number of threads or on the memory. Threads decode pictures and cut their views ahead of
    the one that encodes and adapts.

    model: a loaded model, or a name as in open_model: "embedded", or one of open_clip's; None to predict features only.
        Its weights may be changed between pictures, but not by a write into the memory of parameter.data, as in
        parameter.data.mul_(2), which PyTorch keeps no record of: the old weights would stay in use.
    class_names: the names of the K classes.
    pretrained: the weights of a model that is given by its name.
    templates: the prompts; see resolve_prompts.
    text_features: T (K, D) to be used instead of prompts.
    logit_scale: the multiplier s; None takes the model's, or CLIP's 100 without a model.
    adapter: the adapter with which every picture starts, or the path of one, or the configuration of a fresh one; None
        is a fresh one of the published code's arithmetic.
    config: the configuration of an episode; None stands for that of the paper.
    views: the number V of views.
    view_kind: "crop", or "augmix" for fine-grained classes.
    seed: decides the views of each picture, with its id, and the weights of a fresh adapter.
    workers: the threads that decode pictures and cut views beside the rest; with 0 this is done in turn with encoding
        and adapting, and a thread waits only for the input and for disks.
    memory: about how many bytes the pipeline may take, as a number or as in "2GiB"; see memory_plan for the formula,
        which picks the number of pictures that are adapted together. None takes what groups of a useful size need.
    episodes: the most pictures that are adapted together, or None.
    device, precision: those of a model that is given by its name.
    times: what counts the time of each stage, or None for a new one.
    on_group: a function that is called after each group of pictures that were adapted together, such as that of a
        profiler.

    Raises UserError, a ValueError, or TypeError naming the argument that cannot be used.
    """

    __test__ = False  # The name is that of the method. It is no test, although pytest would take it for one.

    def __init__(
        self,
        model: Model | str | None,
        class_names: Sequence[str],
        *,
        pretrained: str | None = None,
        templates: str | Sequence[str] = "photo",
        text_features: Tensor | None = None,
        logit_scale: float | None = None,
        adapter: RationalAdapter | AdapterConfig | str | Path | None = None,
        config: EpisodeConfig | None = None,
        views: int = 64,
        view_kind: ViewKind = "crop",
        seed: int = 0,
        workers: int = 0,
        memory: int | str | None = None,
        episodes: int | None = None,
        device: str = "auto",
        precision: Precision = "float32",
        times: StageTimes | None = None,
        on_group: Callable[[], None] | None = None,
    ) -> None:
        check_integer("views", views, 1)
        check_integer("seed", seed, 0, MAX_SEED)
        check_integer("workers", workers, 0, MAX_WORKERS)
        if episodes is not None:
            check_integer("episodes", episodes, 1)
        if view_kind not in ("crop", "augmix"):
            raise ValueError(f"view_kind must be crop or augmix, got {view_kind!r}")
        if isinstance(class_names, str) or not class_names:
            raise ValueError(f"class_names must be one or more names, got {class_names!r}")
        if not isinstance(model, VisionLanguageModel) and not hasattr(model, "device"):
            options = ModelOptions(model or "embedded", pretrained, device, precision)
            model = open_model(options, needed=model is not None, seed=seed)
        assert not isinstance(model, str)
        assert model is not None
        self.class_names = tuple(class_names)
        self.config = config or EpisodeConfig()
        self.times = times or StageTimes()
        self._model, self._views, self._kind, self._seed, self._workers = model, views, view_kind, seed, workers
        self._memory = bytes_of("memory", memory) if isinstance(memory, str) else memory
        if self._memory is not None:
            check_integer("memory", self._memory, 1, 2**62)
        self._episodes, self._on_group = episodes, on_group
        self._text = self._text_features(text_features, templates)
        self._scale = self._logit_scale(logit_scale)
        self._adapter = self._own_adapter(adapter)
        self._encoder: ViewEncoder | None = None
        if self._memory is not None and isinstance(model, VisionLanguageModel):
            self.memory_plan()  # This raises an error if the budget is too small.

    def _text_features(self, given: Tensor | None, templates: str | Sequence[str]) -> Tensor:
        """Return the text features T (K, D) on the model's device: those that were given, or those of prompts."""
        if given is None:
            model, chosen = self._model.loaded(), resolve_prompts(templates)
            chosen.check(self.class_names)
            warn_of_cut_names(model, self.class_names, chosen)
            given = class_features(model, self.class_names, chosen, cache_dir=_env.cache_dir() / "text")
        check_text_features(given, given.shape[-1])
        if len(given) != len(self.class_names):
            raise ValueError(
                f"text_features must have a row for each of {len(self.class_names)} classes, got {len(given)}"
            )
        self._model.check_width(given.shape[1], "text_features has rows")
        return given.detach().to(self._model.device)

    def _logit_scale(self, given: float | None) -> float:
        if given is None:
            given = stated[0] if (stated := self._model.stated_scale()) is not None else CLIP_LOGIT_SCALE
        check_positive("logit_scale", given)
        return given

    def _own_adapter(self, given: Any) -> RationalAdapter:
        """Return the adapter with which every picture starts, on the model's device."""
        width, device = self._text.shape[1], self._model.device
        if isinstance(given, str | os.PathLike):
            given = load_adapter(Path(given))
        if given is None:
            given = AdapterConfig.official(width)
        if isinstance(given, AdapterConfig):
            given = new_adapter(given, self._seed)
        adapter = unwrapped(given)
        if adapter.config.embed_dim != width:
            raise ValueError(f"adapter must have the width {width} of the features, got {adapter.config.embed_dim}")
        if any(parameter.device != device for parameter in adapter.parameters()):
            adapter = copy.deepcopy(adapter).to(device)
        check_trainable(adapter, self.config)
        return adapter

    def predict(
        self, pictures: Iterable[Picture | tuple[str, Picture]], *, progress: bool = False
    ) -> Generator[Prediction]:
        """Yield the prediction of each picture, in the order of the input.

        pictures: the paths of files, images of PIL, tensors (3, height, width) of pixels, uint8 or in 0..1, or pairs of
            an id and one of these. Without an id, a file has its path as it is given, and another picture its number.
            They are read a few at a time and may be endless. They may be asked for in another thread.
        progress: whether to show the progress on standard error.

        A file that cannot be read has a result that says so. Any other exception is raised as it is, with a note that
        names the picture. Closing the iterator stops all threads.
        """
        _check_several(pictures)
        return self._in_order(pictures, self._total(pictures, progress))

    def _in_order(self, pictures: Iterable[Any], shown: tuple[bool, int | None]) -> Generator[Prediction]:
        room = threading.Semaphore(RESULTS_HELD_BACK)

        def limited() -> Iterator[Any]:
            for picture in pictures:
                room.acquire()
                yield picture

        held: dict[int, Prediction] = {}
        first = 0
        try:
            with closing(self._run(limited(), shown)) as stream:
                for prediction in stream:
                    held[prediction.index] = prediction
                    while first in held:
                        yield held.pop(first)
                        first += 1
                        room.release()
        finally:
            # A thread that waits here would not see that it should end.
            room.release(RESULTS_HELD_BACK)

    def stream(
        self, pictures: Iterable[Picture | tuple[str, Picture]], *, progress: bool = False
    ) -> Generator[Prediction]:
        """Yield the prediction of each picture as soon as it is there, so that none waits for a slow file before it.

        The arguments are those of predict.
        """
        _check_several(pictures)
        return self._run(pictures, self._total(pictures, progress))

    def predict_features(
        self, features: Tensor | Iterable[Tensor | tuple[str, Tensor]], *, progress: bool = False
    ) -> Generator[Prediction]:
        """Yield the prediction of each picture from the features of its views, in the order of the input.

        features: (E, V, D), or an iterable of (V, D) or of pairs of an id and (V, D). The original view comes first,
            and each row has unit norm. All pictures have the same number of views.
        progress: whether to show the progress on standard error.
        """
        return self._run(features, self._total(features, progress), encode=False)

    def memory_plan(self, *, encode: bool = True, views: int | None = None) -> MemoryPlan:
        """Return how many pictures are adapted together, and about how many bytes the pipeline takes.

        encode: whether views are encoded, or features are given.
        views: the number of views where features are given.
        """
        adaptation = self._adaptation(None)
        return self._plan(adaptation, views or self._views, self._encoder_for() if encode else None)

    def _encoder_for(self) -> ViewEncoder:
        if self._encoder is None:
            self._encoder = ViewEncoder(self._model.loaded(), self._views)
        return self._encoder

    def _adaptation(self, most: int | None) -> Adaptation:
        dtype = arithmetic_dtype(self._adapter, self._text.float())
        # On a GPU the pipeline counts the time of a group by events around it.
        busy = uncounted if self._model.device.type == "cuda" else self.times.busy
        return Adaptation(self._adapter, self._text, self._scale, self.config, dtype, most=most, busy=busy)

    def _ahead(self, encoder: ViewEncoder) -> int:
        """Return how many pictures are read ahead: a batch, and one for each thread."""
        return encoder.pictures + max(1, self._workers)

    def _plan(self, adaptation: Adaptation, views: int, encoder: ViewEncoder | None) -> MemoryPlan:
        load = None
        if encoder is not None:
            model = self._model.loaded()
            view = 12 * model.preprocess.image_size**2
            # A GPU cuts the views of one picture at a time, and only pixels are read ahead.
            ahead = (self._ahead(encoder) if model.device.type == "cpu" else 1) * views
            visual = getattr(model.model, "visual", model.model)
            load = EncoderLoad(ahead, encoder.pictures * views, view, encoder_bytes(visual, view))
        return memory_plan(
            adaptation.rule, views, len(self.class_names), self._model.device,
            load=load, episodes=self._episodes, memory=self._memory,
        )  # fmt: skip

    def _total(self, pictures: Any, progress: bool) -> tuple[bool, int | None]:
        return progress, len(pictures) if isinstance(pictures, Sized) else None

    def _run(
        self,
        given: Iterable[Any],
        shown: tuple[bool, int | None],
        *,
        encode: bool = True,
    ) -> Generator[Prediction]:
        """Yield the predictions as soon as they are there.

        given: the pictures or features, with or without ids.
        shown: whether to show the progress, and the number of pictures if it is known.
        encode: whether there are pictures to be encoded.
        """
        device = self._model.device
        encoder = self._encoder_for() if encode else None
        # Nothing has to be waited for where all features are there.
        uploads, ahead, threads = None, 64, 0 if isinstance(given, Tensor | Sequence) else 1
        read: Any = self._features_item
        prepare: Any = _unchanged
        if encoder is not None:
            preprocess = self._model.loaded().preprocess
            maker = ViewMaker(preprocess, self._views, self._kind, partial(image_seed, self._seed), device, self.times)
            uploads, ahead, threads = Uploads(device, preprocess), self._ahead(encoder), max(1, self._workers)
            read, prepare = partial(_named, maker), _unchanged
            if not self._workers:
                read, prepare = partial(_named, _loaded), partial(_with_views, maker)
        plan = self._plan(self._adaptation(None), self._views, encoder)
        pipeline = Pipeline(
            Ahead(read, given, threads=threads, ahead=ahead),
            encoder, uploads, self._adaptation(plan.episodes), self._check,
            episodes=plan.episodes, device=device, times=self.times, prepare=prepare, on_group=self._on_group,
        )  # fmt: skip
        wanted, total = shown
        progress = show_progress("test-time training", total) if wanted else nullcontext()
        with progress as advance, closing(pipeline.outcomes()) as outcomes:
            for outcome in outcomes:
                yield self._prediction(outcome)
                if advance is not None:
                    advance()

    def _check(self, features: Tensor, id: str) -> None:
        """Raise UserError if the model has encoded a picture to features that cannot be used."""
        if isinstance(self._model, VisionLanguageModel):
            self._model.check_features(features, "image", [id])

    def _features_item(self, number: int, given: Any) -> Item:
        id, features = given if isinstance(given, tuple) else (str(number), given)
        width = self._text.shape[1]
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != width or not len(features):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features of {id!r} must be (V, {width}), got {found}")
        return Item(number, id, features.detach())

    def _prediction(self, outcome: Outcome) -> Prediction:
        adapted, zero_shot = outcome.adapted, outcome.zero_shot
        if adapted is None or zero_shot is None:
            return Prediction(outcome.number, outcome.id, "unreadable", error=outcome.error)
        status: Literal["ok", "diverged"] = "ok"
        if not bool(adapted.isfinite().all()):
            status, adapted = "diverged", zero_shot
        label = int(adapted.argmax())
        return Prediction(outcome.number, outcome.id, status, label, self.class_names[label], adapted, zero_shot)


def _named(use: Callable[[int, str, Picture], Any], number: int, given: Any) -> Any:
    """Call a function with the number of a picture, its id, and the picture, which may be given without an id."""
    if isinstance(given, tuple):
        id, picture = given
    else:
        id = str(number) if isinstance(given, Image.Image | Tensor) else os.fspath(given)
        picture = given
    return use(number, id, picture)


def _loaded(number: int, id: str, picture: Picture) -> Loaded:
    """Wait until a picture's file is in the system's memory, so that nothing else waits for a disk."""
    try:
        if isinstance(picture, str | os.PathLike):
            load_into_cache(Path(picture))
    except UnreadableImageError as error:
        return Loaded(number, id, picture, str(error))
    return Loaded(number, id, picture)


def _with_views(maker: ViewMaker, loaded: Loaded) -> Item:
    """Make the views of a picture whose file is in the system's memory."""
    if loaded.error is not None:
        return Item(loaded.number, loaded.id, None, error=loaded.error)
    return maker(loaded.number, loaded.id, loaded.picture)


def _unchanged(item: Item) -> Item:
    return item


def _check_several(pictures: Any) -> None:
    # The letters of a path would be taken for paths.
    if isinstance(pictures, (str, bytes, os.PathLike, Image.Image)):
        raise ValueError(f"pictures must be an iterable of pictures, such as a list of paths, got {pictures!r}")
