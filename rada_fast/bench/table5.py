"""Remake the paper's Table 5 on this machine: frames per second, memory and operations, in two settings.

Every row says what one of its frames is, because the paper's rows do not; what those most likely count stands beside
them, with the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast.bench.baselines.prompts import PromptEpisodes, PromptTraining
from rada_fast.bench.baselines.published import PublishedEpisodes, PublishedTraining
from rada_fast.bench.costs import episode_work, least_operations, step_work
from rada_fast.bench.encoder import counted_encoder_operations, drawn_views, encoder_work, model_sizes, plain_features
from rada_fast.bench.inputs import unit_rows
from rada_fast.bench.rivals import Problem, literal_operations, prompt_operations
from rada_fast.bench.stages import counted_operations
from rada_fast.bench.table5_memory import memory_in_own_process
from rada_fast.bench.table5_report import show
from rada_fast.bench.timing import Times, interleaved
from rada_fast.bench.training import LOGIT_SCALE, eft_step
from rada_fast.config.bench import TABLE5_METHODS, BenchTable5Options, Table5Name
from rada_fast.config.commands import EFTOptions
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.engine.predictor import TestTimePredictor
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter
from rada_fast.runs.progress import progress

TEMPLATE = "a photo of a {}."
COUNTED_CLASSES = (2, 3)
"""The operations of the text encoder are counted with so many classes; they are linear in that number."""


class Frame(NamedTuple):
    """What a row of the table counts as one frame.

    setting: "eft" or "ttt"; what: in words; views, steps: those of test-time training, 1 and 0 in the other setting.
    """

    setting: str
    what: str
    classes: int
    views: int
    steps: int


@dataclass(frozen=True)
class Row:
    """A row of the table.

    frame: what a frame is; method: the name of the method.
    operations: those of one frame, a multiply-add counted as two; forward: those of one forward pass of one image,
        which is what the paper's GFLOPs most likely are, with a multiply-add counted as one.
    counted: how the operations were found.
    """

    frame: Frame
    method: Table5Name
    operations: float
    forward: float
    counted: str


def run_table5(options: BenchTable5Options, device: torch.device) -> int:
    """Measure the methods that the options name, and show the table. Returns the exit status."""
    vlm = table5_model(options, device)
    methods = [name for name in TABLE5_METHODS if name in (options.only or TABLE5_METHODS)]
    found: list[dict[str, Any]] = []
    frames = frames_of(options)
    pairs = [(frame, name) for frame in frames for name in methods if serves(name, frame)]
    with progress("bench table5", len(pairs) + len(frames), unit="measurements") as advance:
        for frame in frames:
            calls = {name: call_of(name, frame, vlm) for name in methods if serves(name, frame)}
            times = times_of(calls, device, options)
            rows = [row_of(name, frame, vlm) for name in calls]
            calls.clear()
            advance()
            for row in rows:
                memory = memory_in_own_process(row.method, frames.index(frame), options)
                found.append(line_of(row, times[row.method], memory))
                advance()
    return show(found, model_sizes(vlm) | {"embed_dim": vlm.embed_dim}, device, options.measuring)


def table5_model(options: BenchTable5Options, device: torch.device) -> VisionLanguageModel:
    """Load the model that the options name."""
    chosen, seed = options.model, options.measuring.seed
    return load_model(chosen.model, chosen.pretrained, device=device, precision=chosen.precision, seed=seed)


def frames_of(options: BenchTable5Options) -> list[Frame]:
    """Return what is counted as a frame, one after the other."""
    frames = []
    if "eft" in options.settings:
        what = "one training iteration on one repeated picture in memory, with the encoder"
        frames.append(Frame("eft", what, options.eft_classes, 1, 0))
    if "ttt" in options.settings:
        classes = options.ttt_classes
        what = "one step on a single view and the prediction, with the encoder"
        frames.append(Frame("ttt", what, classes, 1, 1))
        what = f"one picture: {options.views} views in memory to the prediction"
        frames.append(Frame("ttt", what, classes, options.views, options.steps))
    return frames


def serves(name: Table5Name, frame: Frame) -> bool:
    """Return whether a method has such a frame. TPT trains nothing but at test time."""
    return not (name == "tpt" and frame.setting == "eft")


def times_of(
    calls: dict[Table5Name, Callable[[], Any]], device: torch.device, options: BenchTable5Options
) -> dict[str, Times]:
    """Time the frames of all methods in turn: by the clock on a CPU, by CUDA's events on a GPU."""
    measuring = options.measuring
    named: dict[str, Callable[[], Any]] = {str(name): call for name, call in calls.items()}
    return interleaved(named, device.type, seconds=measuring.seconds, repeats=measuring.repeats).times


def line_of(row: Row, times: Times, memory: dict[str, float | None]) -> dict[str, Any]:
    """Return the line of figures of a row. memory: what memory_in_own_process returns."""
    return {
        "bench": "table5",
        "kind": "measured",
        "setting": row.frame.setting,
        "method": row.method,
        "frame": row.frame.what,
        "classes": row.frame.classes,
        "views": row.frame.views,
        "steps": row.frame.steps,
        "frames_per_second": 1e3 / times.median,
        "best_ms": times.best,
        "median_ms": times.median,
        "spread_ms": times.spread,
        "rounds": len(times.rounds),
        **memory,
        "multiply_adds_per_frame": row.operations / 2,
        "operations_per_frame": row.operations,
        "multiply_adds_of_one_forward": row.forward / 2,
        "operations_of_one_forward": row.forward,
        "counted": row.counted,
    }


def names_of(classes: int) -> tuple[str, ...]:
    """Return names for so many classes; all prompts have as many tokens, so that the names decide no cost."""
    return tuple(f"object {number}" for number in range(classes))


def problem_of(frame: Frame, vlm: VisionLanguageModel) -> Problem:
    """Return the problem of test-time training with random text features."""
    text = unit_rows(frame.classes, vlm.embed_dim, device=vlm.device)
    config = EpisodeConfig(steps=frame.steps)
    return Problem(vlm, names_of(frame.classes), TEMPLATE, text, text, frame.views, config, 0)


def call_of(name: Table5Name, frame: Frame, vlm: VisionLanguageModel) -> Callable[[], Any]:
    """Return a function that computes one frame of a method."""
    return training_call(name, frame, vlm) if frame.setting == "eft" else episode_call(name, frame, vlm)


def training_call(name: Table5Name, frame: Frame, vlm: VisionLanguageModel) -> Callable[[], Any]:
    """Return a function that takes one iteration of efficient fine-tuning on one repeated picture."""
    image, labels = drawn_views(vlm, 1), torch.zeros(1, dtype=torch.int64, device=vlm.device)
    if name == "maple":
        prompts = PromptTraining(vlm, names_of(frame.classes), TEMPLATE)
        return lambda: prompts(image, labels)
    text, config = unit_rows(frame.classes, vlm.embed_dim, device=vlm.device), AdapterConfig.official(vlm.embed_dim)
    if name == "rada-literal":
        published = PublishedTraining(RationalAdapter(config).to(vlm.device), text, LOGIT_SCALE)
        return lambda: published(image, labels, lambda views: plain_features(vlm, views))
    step = eft_step(config, text)
    return lambda: step(vlm.image_features(image), labels, EFTOptions.lr)


def episode_call(name: Table5Name, frame: Frame, vlm: VisionLanguageModel) -> Callable[[], Any]:
    """Return a function that adapts to one picture whose views lie in memory, and predicts it."""
    problem, views = problem_of(frame, vlm), drawn_views(vlm, frame.views)
    match name:
        case "maple" | "tpt":
            tuning = "context" if name == "tpt" else "coupled-prompts"
            prompts = PromptEpisodes(vlm, problem.names, TEMPLATE, tuning)  # type: ignore[arg-type]
            return lambda: prompts(views, problem.encode)
        case "rada-literal":
            published = PublishedEpisodes(problem.adapter(), problem.text, vlm.logit_scale, problem.config)
            return lambda: published(views, problem.encode)
    predictor = TestTimePredictor(
        vlm, list(problem.names), text_features=problem.text, config=problem.config, views=frame.views
    )
    encoder = ViewEncoder(vlm, frame.views)
    return lambda: list(predictor.predict_features(encoder([views])))


def row_of(name: Table5Name, frame: Frame, vlm: VisionLanguageModel) -> Row:
    """Count the operations of a method's frame."""
    width, classes = vlm.embed_dim, frame.classes
    config, image = AdapterConfig.official(width), counted_encoder_operations(vlm, 1)
    training = frame.setting == "eft"
    by_counter = "by PyTorch's counter of products"
    match name:
        case "maple" | "tpt":
            forward = prompt_forward_operations(name, classes, vlm, training=training)
            if training:
                operations = linear_in_classes(
                    lambda few: counted_operations(training_call(name, frame._replace(classes=few), vlm)), classes
                )
            else:
                tuning = "context" if name == "tpt" else "coupled-prompts"
                operations = prompt_operations(problem_of(frame, vlm), tuning)  # type: ignore[arg-type]
        case "rada-literal":
            forward = image + literal_adapter_operations(config, classes)
            if training:
                adapter = RationalAdapter(config, device="meta")
                published = PublishedTraining(adapter, torch.empty(classes, width, device="meta"), LOGIT_SCALE)
                features = torch.empty(1, width, device="meta")
                labels = torch.empty(1, dtype=torch.int64, device="meta")
                operations = image + counted_operations(lambda: published(features, labels, lambda views: views))
            else:
                operations = literal_operations(problem_of(frame, vlm), image)
        case "rada_fast":
            by_counter = "by the formula of the least work"
            encoding = encoder_work(vlm, frame.views).operations
            forward = encoder_work(vlm, 1).operations + least_operations(1, classes, width)
            if training:
                operations = encoding + step_work(config, 1, classes).operations
            else:
                kept = EpisodeConfig(steps=frame.steps).num_selected(frame.views)
                parts = episode_work(config, frame.views, kept, frame.steps, classes)
                operations = encoding + sum(part.operations for part in parts)
    return Row(frame, name, operations, forward, by_counter)


def prompt_forward_operations(name: str, classes: int, vlm: VisionLanguageModel, *, training: bool) -> float:
    """Return the operations of one forward pass of one image and of the prompts of all classes."""
    image = drawn_views(vlm, 1)

    def count(few: int) -> float:
        if training:
            learned = PromptTraining(vlm, names_of(few), TEMPLATE)
            return counted_operations(lambda: learned.predict(image))
        tuning = "context" if name == "tpt" else "coupled-prompts"
        episodes = PromptEpisodes(vlm, names_of(few), TEMPLATE, tuning)  # type: ignore[arg-type]
        return counted_operations(lambda: episodes.predict(image, lambda views: plain_features(vlm, views)))

    return linear_in_classes(count, classes)


def linear_in_classes(count: Callable[[int], float], classes: int) -> float:
    """Return the value for so many classes of a function that is linear in their number."""
    few, more = COUNTED_CLASSES
    low, high = count(few), count(more)
    return low + (classes - few) * (high - low) / (more - few)


def literal_adapter_operations(config: AdapterConfig, classes: int) -> float:
    """Return the operations of the published adapter's forward pass for one image."""
    parameters = dict(RationalAdapter(config, device="meta").named_parameters())
    features: Sequence[Tensor] = [torch.empty(rows, config.embed_dim, device="meta") for rows in (1, classes)]
    return counted_operations(
        lambda: rational_adapter(features[0], features[1], LOGIT_SCALE, parameters, config, backend="literal")
    )
