"""Measure test-time training from image files to predictions, and each of its stages alone."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from rada_fast.bench.costs import episode_work
from rada_fast.bench.encoder import counted_encoder_operations, encoder_work, model_sizes, plain_features
from rada_fast.bench.inputs import pictures, unit_rows
from rada_fast.bench.report import sizes_name
from rada_fast.bench.stages import Figure, Part, Ratio, Setting, Stage, counted_operations, measure
from rada_fast.bench.views import stages_of
from rada_fast.config.bench import BenchTTTOptions
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.data.decode import Picture, read_image
from rada_fast.data.sources import Sample
from rada_fast.data.views import image_seed, make_views
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.engine.episodes import adapt_episodes
from rada_fast.engine.predictor import TestTimePredictor
from rada_fast.engine.stages import StageTimes
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter
from rada_fast.modules.rational_adapter import new_adapter
from rada_fast.ops import use_backend
from rada_fast.reports.summary import image_record
from rada_fast.system.files import append_line

OVERHEAD = Ratio("overhead ratio", "end to end", ("encode",), "time end to end / time to encode the same views alone")


def figures(options: BenchTTTOptions, device: torch.device) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each number of classes. Raises UserError naming an unusable option."""
    chosen, seed = options.model, options.measuring.seed
    vlm = load_model(chosen.model, chosen.pretrained, device=device, precision=chosen.precision, seed=seed)
    with pictures(options.data, options.pictures, image_size=vlm.preprocess.image_size, seed=seed) as samples:
        for classes in options.classes:
            yield measure(setting_of(samples, vlm, classes, options), device.type, options.measuring)


def setting_of(samples: Sequence[Sample], vlm: VisionLanguageModel, classes: int, options: BenchTTTOptions) -> Setting:
    """Return the setting of one number of classes."""
    count, views, seed = len(samples), options.views, options.measuring.seed
    config = EpisodeConfig(steps=options.steps)
    text = unit_rows(classes, vlm.embed_dim, device=vlm.device)
    names = [str(label) for label in range(classes)]
    times = StageTimes()
    predictor = TestTimePredictor(
        vlm,
        names,
        text_features=text,
        config=config,
        views=views,
        view_kind=options.view_kind,
        seed=seed,
        workers=options.workers,
        memory=options.memory,
        times=times,
    )
    sizes = model_sizes(vlm) | {
        "pictures": count, "views": views, "view_kind": options.view_kind, "steps": options.steps, "classes": classes,
        "embed_dim": vlm.embed_dim,
    }  # fmt: skip
    decode, make = stages_of(samples, vlm.preprocess, views, options.view_kind, seed, vlm.device)
    assert make.call is not None
    tensors: list[Tensor] = make.call()
    encoder = ViewEncoder(vlm, views)
    features = encoded(encoder, tensors)
    files = [(sample.id, sample.path) for sample in samples]
    adapting = tuple(
        work
        for _ in samples
        for work in episode_work(
            AdapterConfig.official(vlm.embed_dim), views, config.num_selected(views), options.steps, classes
        )
    )
    each = len(adapting) // count
    encoding = counted_encoder_operations(vlm, count * views)
    adapting_counted = count * counted_episode_operations(vlm.embed_dim, views, classes, config)
    encode = Stage(
        name="encode",
        inside="the views of all pictures, in memory, to features of unit length, and nothing else",
        call=lambda: encoded(encoder, tensors),
        pictures=count,
        work=(encoder_work(vlm, count * views),),
        operations=encoding,
    )
    adapt = Stage(
        name="adapt",
        inside="features in memory to predictions: selection, steps, prediction, results on the host",
        call=lambda: deque(predictor.predict_features(features), maxlen=0),
        pictures=count,
        work=adapting,
        operations=adapting_counted,
    )
    works = {"decode": decode.work, "views": make.work, "encode": encode.work}
    works |= {"select": adapting[::each], "predict": adapting[each - 1 :: each]}
    works["adapt"] = tuple(work for place, work in enumerate(adapting) if 0 < place % each < each - 1)
    whole = Stage(
        name="end to end",
        inside="image files on disk to lines of results on disk, as the command ttt does it",
        call=lambda: predict_to_file(predictor, files, names, times),
        pictures=count,
        work=(*decode.work, *make.work, *encode.work, *adapt.work),
        operations=encoding + adapting_counted,
        counter=counter_of(times),
        counted=tuple(Part(name, inside, works.get(name, ())) for name, inside in INSIDE.items()),
        # Where threads decode and cut views beside the other stages, nothing is left.
        rest=None if options.workers else BETWEEN,
    )
    apart = Stage(
        name="without decoding and views",
        inside="views in memory to predictions: the stages encode and adapt, timed alone and added up",
        call=None,
        parts=("encode", "adapt"),
        pictures=count,
        within=False,
        work=(*encode.work, *adapt.work),
    )
    stages, ratios = [decode, make, encode, adapt, apart, whole], [OVERHEAD]
    if options.baseline:
        plain = Stage(
            name="plain PyTorch",
            inside="the same, picture by picture: Pillow's views, open_clip's module, the published arithmetic",
            call=lambda: [predicted_plainly(sample, vlm, text, config, options) for sample in samples],
            pictures=count,
            within=False,
        )
        stages.append(plain)
        ratios.append(Ratio("speed-up", plain.name, (whole.name,), "time in plain PyTorch / time end to end"))
    return Setting(
        name=sizes_name(sizes), sizes=sizes, stages=tuple(stages), whole=whole.name, ratios=tuple(ratios)
    )  # fmt: skip


INSIDE = {
    "decode": "reading files and decoding them, while end to end runs",
    "views": "drawing the boxes, cutting, resizing, normalising and copying to the device, while end to end runs",
    "encode": "views to features, while end to end runs",
    "select": "features to the confident views, while end to end runs",
    "adapt": "the steps on the confident views, while end to end runs; on a GPU also selection and prediction",
    "predict": "the original view to logits on the host, while end to end runs",
    "record": "logits to a line of results in a file, while end to end runs",
}
"""What the time of each stage of the pipeline is, for the legend of the table."""
BETWEEN = Part("between", "what is left of end to end: handing pictures from stage to stage, and waiting for files")


def predict_to_file(
    predictor: TestTimePredictor, files: Sequence[tuple[str, Picture]], names: Sequence[str], times: StageTimes
) -> None:
    """Predict image files, and write a line for each as the command ttt does."""
    with TemporaryDirectory(prefix="rada-fast-bench-") as folder:
        for prediction in predictor.stream(files):
            with times.busy("record"):
                before, after = prediction.zero_shot_logits, prediction.logits
                if before is not None and after is not None:
                    record = image_record(prediction.id, None, prediction.status, before, after, names)
                    append_line(Path(folder) / "images.jsonl", json.dumps(record))


def counter_of(times: StageTimes) -> Callable[[], dict[str, float]]:
    """Return a function that returns the seconds of each stage since the last call."""
    before = times.seconds()

    def count() -> dict[str, float]:
        nonlocal before
        now = times.seconds()
        since = {name: now[name] - before[name] for name in now}
        before = now
        return since

    return count


def predicted_plainly(
    sample: Sample, vlm: VisionLanguageModel, text: Tensor, config: EpisodeConfig, options: BenchTTTOptions
) -> Tensor:
    """Predict a picture by test-time training in plain PyTorch. Returns the logits (K,) on the CPU."""
    with use_backend("literal"):
        seed = image_seed(options.measuring.seed, sample.id)
        views = make_views(read_image(sample.path), vlm.preprocess, options.views, options.view_kind, seed)
        features = plain_features(vlm, views.to(vlm.device))
        adapter = new_adapter(AdapterConfig.official(vlm.embed_dim), options.measuring.seed).to(vlm.device)
        return adapt_episodes(adapter, features[None], text, vlm.logit_scale, config)[0].cpu()


def encoded(encoder: ViewEncoder, tensors: Sequence[Tensor]) -> Tensor:
    """Return the features (N, V, D) of the views of pictures, encoded in the batches of the pipeline."""
    batches = [tensors[start : start + encoder.pictures] for start in range(0, len(tensors), encoder.pictures)]
    return torch.cat([encoder(batch) for batch in batches])


def counted_episode_operations(width: int, views: int, classes: int, config: EpisodeConfig) -> float:
    """Return the operations of one episode in plain PyTorch, as PyTorch's counter finds them.

    Plain PyTorch takes the same savings but one: it does not scale the first step's projections in the second step.
    """
    adapter = RationalAdapter(AdapterConfig.official(width))
    features, text = unit_rows(1, views, width), unit_rows(classes, width)

    def adapt() -> None:
        with use_backend("reference"):
            adapt_episodes(adapter, features, text, 100.0, config)

    return counted_operations(adapt)
