"""Compare this package with other methods of test-time adaptation, on the same views of the same pictures.

All of them have the same model, precision, allocator and threads. They are timed in turn, on a few pictures at a time,
so that a machine that slows down slows all of them. What is timed begins with the views in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from rada_fast.bench.baselines.prompts import PromptEpisodes
from rada_fast.bench.baselines.published import Encode, PublishedEpisodes, careful_episode
from rada_fast.bench.baselines.training_free import mean_shift, vision_text_ensemble, zero
from rada_fast.bench.costs import episode_work
from rada_fast.bench.encoder import counted_encoder_operations, encoder_work, model_sizes, plain_features
from rada_fast.bench.inputs import pictures, unit_rows
from rada_fast.bench.partial import PartialFigures, partial_figures
from rada_fast.bench.report import machine_facts
from rada_fast.bench.rivals_report import Score, figure_of, figures_file, show
from rada_fast.bench.stages import Figure, counted_operations
from rada_fast.bench.timing import Memory, Times, burst_ms, memory_of
from rada_fast.config.bench import RIVALS, BenchRivalsOptions, RivalName
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.config.methods import TuningName
from rada_fast.data.decode import UnreadableImageError, pixels_of_picture
from rada_fast.data.open import open_source
from rada_fast.data.sources import Sample
from rada_fast.data.views import cut_views, image_seed, plan_views
from rada_fast.embedded import world
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.engine.predictor import TestTimePredictor
from rada_fast.errors import UserError
from rada_fast.models.class_features import class_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.prompts import Prompts, resolve_prompts
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter
from rada_fast.modules.rational_adapter import new_adapter
from rada_fast.runs.progress import Advance, progress

EMBEDDED_ENSEMBLE = (
    "a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a drawing of a {}.", "this is a {}.",
    "there is a {}.", "a photo of the {}.", "a photo of one {}.",
)  # fmt: skip
"""Prompts in words that the embedded model knows, for the ensemble of VTE; other models have CLIP's 80."""
TINY_SIZES = (2, 3)
"""The numbers of views and of classes with which the operations of prompt learning are counted."""


class Rival(NamedTuple):
    """A method as the command measures it.

    about: what it does, in words.
    predict: a function from the views (V, 3, S, S) of several pictures to their logits or votes (N, K).
    operations: the operations for one picture, a multiply-add counted as two.
    """

    about: str
    predict: Callable[[Sequence[Tensor]], Tensor]
    operations: float


@dataclass(frozen=True)
class Problem:
    """What all methods have in common.

    vlm: the model; names: the names of the classes; template: the prompt of a class.
    text, ensemble: the text features (K, D) of that prompt, and the means of those of several prompts.
    views: the number V of views; seed: the seed of the adapter and of prompts that start at random.
    """

    vlm: VisionLanguageModel
    names: tuple[str, ...]
    template: str
    text: Tensor
    ensemble: Tensor
    views: int
    config: EpisodeConfig
    seed: int

    def encode(self, views: Tensor) -> Tensor:
        """Encode views with open_clip's own module in plain PyTorch, as all methods but this package's do."""
        return plain_features(self.vlm, views)

    def adapter(self) -> RationalAdapter:
        """Make the adapter with which test-time training starts."""
        return new_adapter(AdapterConfig.official(self.vlm.embed_dim), self.seed).to(self.vlm.device)


def run_rivals(options: BenchRivalsOptions, device: torch.device) -> int:
    """Measure the methods that the options name, and show their figures. Returns the exit status."""
    chosen = options.model
    vlm = load_model(chosen.model, chosen.pretrained, device=device, precision=chosen.precision, seed=options.seed)
    with opened(options, vlm) as (samples, problem, labelled):
        makers = rivals_of(problem)
        only = options.only or RIVALS
        chosen_rivals = {name: makers[name]() for name in RIVALS if name in only}
        partial = partial_figures(figures_file(options), options, machine_facts(device))
        scores = measured(chosen_rivals, samples, problem, options, partial)
    sizes = model_sizes(vlm) | {
        "pictures": len(samples), "views": options.views, "view_kind": options.view_kind,
        "classes": len(problem.names), "embed_dim": vlm.embed_dim, "data": options.data or "drawn",
    }  # fmt: skip
    labels = [sample.label for sample in samples] if labelled else None
    figures: list[Figure] = [
        figure_of(name, rival.about, rival.operations, scores[name], scores, labels, sizes)
        for name, rival in chosen_rivals.items()
    ]
    status = show(figures, device, options)
    partial.finish()
    return status


@contextmanager
def opened(options: BenchRivalsOptions, vlm: VisionLanguageModel) -> Iterator[tuple[list[Sample], Problem, bool]]:
    """Open the pictures and the classes; drawn pictures lie in a temporary folder while the context lasts.

    Yields the pictures, the problem, and whether the labels of the pictures mean anything to the model.
    """
    with TemporaryDirectory(prefix="rada-fast-bench-") as folder:
        data = options.data
        if data is None and vlm.name == "embedded":
            # The pictures of the demo: the shifted domain of the embedded world.
            drawn = Path(folder) / "pictures"
            classes = len(world.class_names())
            world.write_imagefolder(drawn, -(-options.pictures // classes), 3 * options.seed, "mixed")
            data = f"imagefolder:{drawn}"
        if data is None:
            names = tuple(f"object {number}" for number in range(options.numbered_classes))
            size = vlm.preprocess.image_size
            with pictures(None, options.pictures, image_size=size, seed=options.seed) as samples:
                yield samples, problem_of(options, vlm, names), False
            return
        source = open_source(data)
        if not source.holds_images:
            raise UserError(f"data must be image files, got {data}")
        names = class_names_of(source, options.classes, prompts=True)
        yield list(source.limited(options.pictures).samples), problem_of(options, vlm, names), True


def problem_of(options: BenchRivalsOptions, vlm: VisionLanguageModel, names: tuple[str, ...]) -> Problem:
    """Return what all methods have in common: the classes and their text features."""
    default: tuple[str, ...] = EMBEDDED_ENSEMBLE if vlm.name == "embedded" else ("openai",)
    if (options.data is None and vlm.name != "embedded") or "vte" not in (options.only or RIVALS):
        # Many prompts take minutes to encode, and those of pictures that are no data decide neither cost nor accuracy.
        default = options.templates
    ensemble = resolve_prompts(options.ensemble or default, options.data)
    prompts = resolve_prompts(options.templates, options.data)
    if len(prompts.templates) != 1 or prompts.descriptions:
        raise UserError(f"templates must be a single one, got {' '.join(options.templates)}")

    def features(of: Prompts) -> Tensor:
        return class_features(vlm, names, of, cache_dir=None).to(vlm.device)

    return Problem(
        vlm, names, prompts.templates[0], features(prompts), features(ensemble), options.views,
        EpisodeConfig(steps=options.steps), options.seed,
    )  # fmt: skip


def rivals_of(problem: Problem) -> Mapping[RivalName, Callable[[], Rival]]:
    """Return a function for each method that makes it."""
    text, scale, encode = problem.text, problem.vlm.logit_scale, problem.encode
    image = counted_encoder_operations(problem.vlm, 1)
    encoding = problem.views * image

    def on_features(about: str, method: Callable[[Tensor], Tensor]) -> Rival:
        """Return a method that encodes all views once and works on their features."""
        drawn = unit_rows(problem.views, problem.vlm.embed_dim, device=problem.vlm.device)
        operations = encoding + counted_operations(lambda: method(drawn))
        return Rival(about, lambda views: torch.stack([method(encode(own)) for own in views]), operations)

    def zero_shot() -> Rival:
        def predict(views: Sequence[Tensor]) -> Tensor:
            return torch.stack([(scale * encode(own[:1]) @ text.T)[0] for own in views])

        return Rival("the original view alone, by open_clip's module", predict, image + 2 * text.numel())

    def encode_fast() -> Rival:
        encoder = ViewEncoder(problem.vlm, problem.views)

        def predict(views: Sequence[Tensor]) -> Tensor:
            return scale * encoded(encoder, views)[:, 0] @ text.T

        about = "this package's encoder for all views, and the zero-shot answer of the original"
        operations = encoder_work(problem.vlm, problem.views).operations + 2 * text.numel()
        return Rival(about, predict, operations)

    def fast() -> Rival:
        encoder = ViewEncoder(problem.vlm, problem.views)
        predictor = TestTimePredictor(
            problem.vlm, list(problem.names), text_features=text, adapter=problem.adapter(), config=problem.config,
            views=problem.views, seed=problem.seed,
        )  # fmt: skip

        def predict(views: Sequence[Tensor]) -> Tensor:
            found = predictor.predict_features(encoded(encoder, views))
            return torch.stack([one.logits for one in found if one.logits is not None])

        kept = problem.config.num_selected(problem.views)
        work = episode_work(
            AdapterConfig.official(problem.vlm.embed_dim), problem.views, kept, problem.config.steps, len(text)
        )
        operations = encoder_work(problem.vlm, problem.views).operations + sum(part.operations for part in work)
        about = "RAda by this package; its operations are those of the formula, not counted"
        return Rival(about, predict, operations)

    def literal() -> Rival:
        episodes = PublishedEpisodes(problem.adapter(), text, scale, problem.config)
        about = "RAda as published, in TPT's loop: every step encodes all views and adapts all of them"
        return Rival(about, each(episodes, encode), literal_operations(problem, image))

    def careful() -> Rival:
        adapter = problem.adapter()
        about = "RAda in plain PyTorch as a careful user writes it: encoded once, only confident views adapted"
        return on_features(about, lambda own: careful_episode(own, adapter, text, scale, problem.config))

    def prompts(tuning: TuningName, about: str) -> Rival:
        episodes = PromptEpisodes(problem.vlm, problem.names, problem.template, tuning, seed=problem.seed)
        return Rival(about, each(episodes, encode), prompt_operations(problem, tuning))

    maple = "MaPLe in TPT's loop, one step on deep prompts of both encoders that start untrained"
    zero_about = "ZERO: the votes of the confident views; no training"
    return {
        "rada_fast": fast,
        "zero-shot": zero_shot,
        "encode-fast": encode_fast,
        "encode": lambda: on_features(
            "open_clip's module for all views, and the zero-shot answer", lambda own: scale * own[0] @ text.T
        ),
        "rada-literal": literal,
        "rada-careful": careful,
        "tpt": lambda: prompts("context", "TPT: one step on four words of the prompt, through the text encoder"),
        "maple": lambda: prompts("coupled-prompts", maple),
        "zero": lambda: on_features(zero_about, lambda own: zero(own, text, scale)),
        "mta": lambda: on_features(
            "MTA: the mode of the features of all views; no training", lambda own: mean_shift(own, text, scale)
        ),
        "vte": lambda: on_features(
            "VTE: the mean feature of the confident views against several prompts; no training",
            lambda own: vision_text_ensemble(own, problem.ensemble, scale),
        ),
    }


def each(method: Callable[[Tensor, Encode], Tensor], encode: Encode) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return a function that applies a method to one picture after the other."""
    return lambda views: torch.stack([method(own, encode) for own in views])


def encoded(encoder: ViewEncoder, views: Sequence[Tensor]) -> Tensor:
    """Return the features (N, V, D) of the views of pictures, encoded in the batches of the pipeline."""
    batches = [views[start : start + encoder.pictures] for start in range(0, len(views), encoder.pictures)]
    return torch.cat([encoder(batch) for batch in batches])


def literal_operations(problem: Problem, image: float) -> float:
    """Return the operations of one picture in the published loop. image: those of encoding one image."""
    adapter = RationalAdapter(AdapterConfig.official(problem.vlm.embed_dim), device="meta")
    episodes = PublishedEpisodes(adapter, problem.text.to("meta"), problem.vlm.logit_scale, problem.config)
    images = 0

    def encode(views: Tensor) -> Tensor:
        nonlocal images
        images += len(views)
        return torch.empty(len(views), problem.vlm.embed_dim, device="meta")

    views = torch.empty(problem.views, 1, device="meta")
    return counted_operations(lambda: episodes(views, encode)) + images * image


def prompt_operations(problem: Problem, tuning: TuningName) -> float:
    """Return the operations of one picture with a method that learns prompts.

    They are a + b V + c K + d V K, which four counts with few views and classes determine.
    """
    size = problem.vlm.preprocess.image_size
    counts: dict[tuple[int, int], float] = {}
    for classes in TINY_SIZES:
        names = (problem.names * classes)[:classes]
        episodes = PromptEpisodes(problem.vlm, names, problem.template, tuning)
        for views in TINY_SIZES:
            drawn = torch.zeros(views, 3, size, size, device=problem.vlm.device)
            counts[views, classes] = counted_operations(lambda: episodes(drawn, problem.encode))  # noqa: B023
    return extrapolated(counts, problem.views, len(problem.names))


def extrapolated(counts: Mapping[tuple[int, int], float], views: int, classes: int) -> float:
    """Return the value of a + b V + c K + d V K, which has these values at four pairs of TINY_SIZES."""
    low, high = TINY_SIZES
    both = counts[high, high] - counts[high, low] - counts[low, high] + counts[low, low]
    by_view = counts[high, low] - counts[low, low]
    by_class = counts[low, high] - counts[low, low]
    more_views, more_classes = views - low, classes - low
    return counts[low, low] + more_views * by_view + more_classes * by_class + more_views * more_classes * both


def measured(
    rivals: Mapping[RivalName, Rival],
    samples: Sequence[Sample],
    problem: Problem,
    options: BenchRivalsOptions,
    partial: PartialFigures,
) -> dict[str, Score]:
    """Let all methods predict all pictures, a few pictures at a time in turn. Returns the score of each.

    partial: keeps what is known of each few pictures, so that an interrupted run goes on after them.
    """
    groups: list[dict[str, Figure]] = []
    warm = False
    with progress("bench rivals", len(rivals) * len(samples), unit="predictions") as advance:
        for start in range(0, len(samples), options.together):
            name, some = f"pictures from {start}", samples[start : start + options.together]
            found = partial.figures_of(name)
            if found is None:
                views = [views_of(one, problem, options) for one in some]
                found = group_figures(rivals, views, problem, advance, warm=warm)
                partial.keep(name, found)
                warm = True
            else:
                advance(len(rivals) * len(some))
            groups.append({figure["name"]: figure for figure in found})
    # The first call of a run shows the memory.
    before = [answer for group in groups for answer in group[BEFORE]["answers"]]
    return {
        name: Score(
            Times(tuple(group[name]["ms"] for group in groups)),
            None if (memory := groups[0][name]["memory"]) is None else Memory(*memory),
            [answer for group in groups for answer in group[name]["answers"]],
            before,
        )
        for name in rivals
    }


BEFORE = "the original view by open_clip's module"
"""The name of the line that has the answers without any adaptation."""


def group_figures(
    rivals: Mapping[RivalName, Rival], views: Sequence[Tensor], problem: Problem, advance: Advance, *, warm: bool
) -> list[Figure]:
    """Let all methods predict a few pictures in turn, and return a line of plain values for each.

    advance: is told of each prediction of a picture.
    warm: whether all methods have been called before. Otherwise a first call of each on one picture shows its memory.
    """
    device = problem.vlm.device.type
    memory: dict[str, Memory | None] = {}
    if not warm:
        for name, rival in rivals.items():
            memory[name] = memory_of(lambda: rival.predict(views[:1]), device)  # noqa: B023
            advance(0, note=f"warming up {name}")
    lines: list[Figure] = []
    for name, rival in rivals.items():
        found: list[Tensor] = []
        ms = burst_ms(lambda: found.append(rival.predict(views)), 1, device)  # noqa: B023
        peak = memory.get(name)
        advance(len(views), note=name)
        lines.append(
            {
                "name": name,
                "ms": ms / len(views),
                "answers": found[0].argmax(dim=-1).tolist(),
                "memory": None if peak is None else list(peak),
            }
        )
    first = torch.cat([own[:1] for own in views])
    answers = (problem.encode(first) @ problem.text.T).argmax(dim=-1).tolist()
    return [*lines, {"name": BEFORE, "answers": answers}]


def views_of(sample: Sample, problem: Problem, options: BenchRivalsOptions) -> Tensor:
    """Make the views of a picture on the model's device. Raises UserError if it cannot be read."""
    try:
        pixels = pixels_of_picture(sample.path)
    except UnreadableImageError as error:
        raise UserError(f"data must be pictures that can be read: {error}") from None
    height, width, _ = pixels.shape
    form, seed = problem.vlm.preprocess, image_seed(options.seed, sample.id)
    plan = plan_views(height, width, form, options.views, options.view_kind, seed)
    return cut_views(pixels.to(problem.vlm.device), plan, form)
