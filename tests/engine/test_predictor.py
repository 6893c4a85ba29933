"""The predictor yields the same results as episodes on features, whatever the order, the threads, and the packing."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import rada_fast
from rada_fast import AdapterConfig, EpisodeConfig, Prediction, RationalAdapter, TestTimePredictor
from rada_fast.data import decode
from rada_fast.data.decode import read_image
from rada_fast.data.views import image_seed, make_views
from rada_fast.engine import pipeline
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.engine.episodes import Adaptation
from rada_fast.errors import UserError
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.ops import backends, use_backend
from tests.loops.conftest import load_tiny
from tests.ops.support import needs_extension, num_threads
from tests.support import allocated_by, wait_until_no_thread_is_ahead

NAMES = ("cat", "dog", "emu", "fox")


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return load_model("embedded")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write six pictures of different sizes."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        pixels = generator.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def tiny(**options: Any) -> TestTimePredictor:
    """Return a predictor with a model of a few hundred weights and little to do, unless options say otherwise."""
    defaults: dict[str, Any] = {"views": 3, "config": EpisodeConfig(steps=1)}
    return TestTimePredictor(load_tiny(), NAMES, **(defaults | options))


def logits(results: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return both predictions of each picture by its id."""
    return {one.id: (one.logits.tolist(), one.zero_shot_logits.tolist()) for one in results}


def test_a_prediction_is_that_of_episodes_on_the_features_of_the_views(
    model: VisionLanguageModel, files: list[Path]
) -> None:
    predictor = TestTimePredictor(model, NAMES, views=12, seed=5)
    (result,) = predictor.predict(files[:1])
    views = make_views(read_image(files[0]), model.preprocess, 12, "crop", image_seed(5, str(files[0])))
    features = model.encode_images(views)
    adapter = predictor._adapter
    expected = rada_fast.adapt_episodes(adapter, features[None], predictor._text, model.logit_scale)[0]
    assert result.logits is not None
    assert torch.equal(result.logits, expected)
    assert (result.index, result.id, result.status, result.error) == (0, str(files[0]), "ok", None)
    assert result.label == int(expected.argmax())
    assert result.name == NAMES[result.label]
    assert result.probabilities is not None
    assert float(result.probabilities.sum()) == pytest.approx(1)
    assert result.zero_shot_probabilities is not None
    assert result.entropy == pytest.approx(-float((result.probabilities * result.probabilities.log()).sum()), rel=1e-4)
    assert result.zero_shot_entropy == pytest.approx(
        -float((result.zero_shot_probabilities * result.zero_shot_probabilities.log()).sum()), rel=1e-4
    )


@pytest.mark.parametrize("views", [1, 3, 12])
def test_results_depend_on_the_picture_alone(model: VisionLanguageModel, files: list[Path], views: int) -> None:
    def predictor(**options: Any) -> TestTimePredictor:
        return TestTimePredictor(model, NAMES, views=views, config=EpisodeConfig(steps=2), **options)

    together = logits(predictor(workers=0).predict(files))
    assert list(together) == [str(path) for path in files]
    assert logits(predictor(workers=3, episodes=2).stream(files[::-1])) == together
    assert logits(predictor(workers=2, memory="64MiB").predict(files)) == together
    for path in files[:2]:
        assert logits(predictor(workers=1).predict([path])) == {str(path): together[str(path)]}


@pytest.mark.parametrize("views", [1, 2, 3])
def test_features_do_not_depend_on_what_is_encoded_beside_a_picture(model: VisionLanguageModel, views: int) -> None:
    encoder = ViewEncoder(model, views)
    assert encoder.pictures == 16 // views
    generator = torch.Generator().manual_seed(views)
    size = model.preprocess.image_size
    pictures = [torch.randn((views, 3, size, size), generator=generator) for _ in range(encoder.pictures)]
    expected = encoder(pictures)
    for first in (1, len(pictures) - 1):
        moved = pictures[first:] + pictures[:first]
        assert torch.equal(encoder(moved), expected.roll(-first, 0))
    assert torch.equal(encoder(pictures[-1:])[0], expected[-1])


def test_pictures_are_encoded_one_by_one_where_their_place_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU this is tried when the encoder is made; on a CPU only open_clip's transformers may share a call."""
    model = load_tiny()
    assert ViewEncoder(model, 2).pictures == 1
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self)
    original = VisionLanguageModel.image_features
    for noise, pictures in ((0.0, 32), (1e-7, 1)):

        def by_place(self: VisionLanguageModel, views: Tensor, noise: float = noise) -> Tensor:
            # In the end each row is computed by itself, as far as the model goes.
            return torch.cat([original(self, view) for view in views.split(1)]) + noise * torch.arange(64)[:, None]

        monkeypatch.setattr(VisionLanguageModel, "image_features", by_place)
        monkeypatch.setattr(VisionLanguageModel, "encodes_each_by_itself", lambda self: False)
        assert ViewEncoder(model, 2).pictures == pictures


def test_batches_of_one_shape_are_filled_up(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []
    original = VisionLanguageModel.image_features

    def noted(self: VisionLanguageModel, views: Tensor) -> Tensor:
        shapes.append(len(views))
        return original(self, views)

    pictures = list(torch.randn(6, 2, 3, 48, 48).unbind())
    expected = torch.stack([model.image_features(views) for views in pictures])
    monkeypatch.setattr(VisionLanguageModel, "image_features", noted)
    monkeypatch.setattr(VisionLanguageModel, "encodes_each_by_itself", lambda self: False)
    monkeypatch.setattr(ViewEncoder, "_is_equal_everywhere", lambda self: True)
    encoder = ViewEncoder(model, 2)
    assert torch.equal(torch.cat([encoder(pictures[:5]), encoder(pictures[5:])]), expected)
    assert shapes == [16, 16]


@needs_extension
def test_the_way_of_a_gpus_pictures_has_the_same_results(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads then draw the boxes and leave the cutting to the device, and results are read a group later."""
    expected = logits(tiny().predict(files))
    monkeypatch.setattr(pipeline, "CUT_BY_THREADS", ())
    monkeypatch.setitem(pipeline.GROUPS_BEHIND, "cpu", 1)
    for options in ({"episodes": 1}, {"episodes": 2, "workers": 0}, {"episodes": 4, "workers": 2}):
        assert logits(tiny(**options).predict(files)) == expected
    # The last group is not held back until another one follows.
    more = threading.Event()

    def source() -> Iterator[Path]:
        yield files[0]
        assert more.wait(20)

    stream = tiny().stream(source())
    assert next(stream).index == 0
    more.set()
    assert list(stream) == []


def test_all_forms_of_a_picture_have_one_result(files: list[Path]) -> None:
    images = [read_image(path) for path in files]
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    by_path = logits(tiny().predict((f"p{number}", path) for number, path in enumerate(files)))
    forms: list[list[Any]] = [images, pixels, [value / 255 for value in pixels]]
    for form in forms:
        assert logits(tiny().predict((f"p{number}", picture) for number, picture in enumerate(form))) == by_path
    assert list(logits(tiny().predict(images))) == [str(number) for number in range(6)]
    assert logits(tiny(seed=1).predict(files)) != logits(tiny().predict(files))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_file_that_cannot_be_read_has_a_result_in_its_place(files: list[Path], tmp_path: Path, workers: int) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    results = list(tiny(workers=workers).predict([files[0], bad, Image.new("RGB", (3, 3)), tmp_path / "none.png"]))
    assert [one.status for one in results] == ["ok", "unreadable", "ok", "unreadable"]
    assert [one.index for one in results] == [0, 1, 2, 3]
    assert results[1].error == "bad.png cannot be read: not an image of a known kind"
    assert results[1].logits is results[1].probabilities is results[1].entropy is results[1].name is None


def test_without_workers_nothing_is_computed_while_a_picture_is_decoded(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work: list[str] = []

    def alone(name: str, call: Any) -> Any:
        def watched(*given: Any, **named: Any) -> Any:
            at_work.append(name)
            assert len(at_work) == 1
            time.sleep(0.002)
            result = call(*given, **named)
            assert at_work == [name]
            at_work.clear()
            return result

        return watched

    monkeypatch.setattr(pipeline, "pixels_of_picture", alone("decode", pipeline.pixels_of_picture))
    monkeypatch.setattr(VisionLanguageModel, "image_features", alone("encode", VisionLanguageModel.image_features))
    groups: list[int] = []
    original = Adaptation.__call__

    def adapt(adaptation: Adaptation, views: Tensor, **named: Any) -> Any:
        groups.append(len(views))
        return original(adaptation, views, **named)

    monkeypatch.setattr(Adaptation, "__call__", alone("adapt", adapt))
    assert len(list(tiny(workers=0, episodes=4).predict(islice(cycle(files), 24)))) == 24
    # Groups are filled, because the next picture is waited for while a thread reads it.
    assert groups == [4] * 6


def test_without_workers_no_result_waits_for_the_sources_next_picture(files: list[Path]) -> None:
    more = threading.Event()

    def source() -> Iterator[Path]:
        yield from files[:3]
        assert more.wait(20)
        yield files[3]

    stream = tiny(workers=0).stream(source())
    assert [next(stream).index for _ in range(3)] == [0, 1, 2]
    more.set()
    assert [one.index for one in stream] == [3]


def test_nothing_waits_for_a_slow_file_or_a_slow_source(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow, more = threading.Event(), threading.Event()

    def read(picture: Any) -> Tensor:
        if picture == files[0]:
            assert slow.wait(20)
        return decode.pixels_of(read_image(picture))

    def source() -> Iterator[Path]:
        yield from files[:3]
        assert more.wait(20)
        yield files[3]

    monkeypatch.setattr("rada_fast.engine.pipeline.pixels_of_picture", read)
    stream = tiny(workers=2).stream(source())
    assert {next(stream).index, next(stream).index} == {1, 2}
    slow.set()
    assert next(stream).index == 0
    more.set()
    assert [one.index for one in stream] == [3]
    wait_until_no_thread_is_ahead()


def test_an_endless_source_is_read_as_far_as_is_needed(files: list[Path]) -> None:
    read: list[Path] = []

    def endless() -> Iterator[Path]:
        for path in cycle(files):
            read.append(path)
            yield path

    predictor = tiny(workers=2, views=64)
    results = predictor.predict(endless())
    assert [one.index for one in islice(results, 20)] == list(range(20))
    # One group may be complete and another one begun, and three pictures are read ahead: a batch of one, and one for
    # each thread. The next one may be asked for.
    assert len(read) <= 20 + 2 * predictor.memory_plan().episodes + 3 + 1
    results.close()
    wait_until_no_thread_is_ahead()
    assert results.gi_frame is None


@needs_extension
@pytest.mark.parametrize("adapter", [AdapterConfig.official(128), AdapterConfig.paper(128)], ids=["official", "paper"])
def test_results_do_not_depend_on_the_number_of_threads(adapter: AdapterConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(4, 1, 128, generator=generator) + 0.3 * torch.randn(4, 12, 128, generator=generator)
    text = normalize(torch.randn(40, 128, generator=generator), dim=-1)

    def predicted(threads: int) -> list[list[float]]:
        with num_threads(threads):
            predictor = TestTimePredictor(None, [str(k) for k in range(40)], text_features=text, adapter=adapter)
            results = predictor.predict_features(normalize(pictures, dim=-1))
            return [result.logits.tolist() for result in results if result.logits is not None]

    alone = predicted(1)
    assert len(alone) == 4
    assert predicted(2) == alone
    assert predicted(3) == alone


def test_a_generator_that_nobody_keeps_stops_its_threads(files: list[Path]) -> None:
    for make in (tiny().stream, tiny().predict):
        results = make(cycle(files))
        next(results)
        del results
        gc.collect()
        wait_until_no_thread_is_ahead()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_surfaces_once_and_names_the_picture(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise ZeroDivisionError("spoilt")

    with monkeypatch.context() as patch:
        patch.setattr("rada_fast.engine.pipeline.plan_views", fails)
        results = tiny(workers=workers).predict(files[:1])
        with pytest.raises(ZeroDivisionError, match="spoilt") as caught:
            next(results)
        assert caught.value.__notes__ == [f"while predicting {str(files[0])!r}"]
        assert list(results) == []
    for owner, name in ((VisionLanguageModel, "image_features"), (Adaptation, "__call__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(ZeroDivisionError) as caught:
                list(tiny(workers=workers).stream(files[:1]))
            assert caught.value.__notes__ == [f"while predicting {str(files[0])!r}"]
    with pytest.raises(TypeError, match="a picture must be a path, an image of PIL or a tensor, got int"):
        list(tiny(workers=workers).predict([("seven", 7)]))  # type: ignore[list-item]
    wait_until_no_thread_is_ahead()


def test_features_that_the_model_makes_nonsense_of_name_the_picture(files: list[Path]) -> None:
    predictor = tiny()
    predictor._model.loaded().model.visual[1].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"features of image '.*0\.png' are NaN in float32"):
        next(predictor.predict(files))


def test_features_are_predicted_like_pictures(model: VisionLanguageModel, files: list[Path]) -> None:
    predictor = TestTimePredictor(model, NAMES, views=4)
    views = [make_views(read_image(path), model.preprocess, 4, "crop", image_seed(0, str(path))) for path in files]
    encoder = ViewEncoder(model, 4)
    features = torch.cat([encoder([one]) for one in views])
    expected = logits(predictor.predict(files))
    forms: list[Any] = [
        [(str(path), one) for path, one in zip(files, features, strict=True)],
        ((str(path), one) for path, one in zip(files, features, strict=True)),
    ]
    for form in forms:
        assert logits(predictor.predict_features(form)) == expected
    assert [one.id for one in predictor.predict_features(features)] == ["0", "1", "2", "3", "4", "5"]
    with pytest.raises(ValueError, match=r"features of '0' must be \(V, 512\), got \(4, 3\)"):
        next(predictor.predict_features(features[..., :3]))
    without = TestTimePredictor(
        None, NAMES, text_features=predictor._text, logit_scale=model.logit_scale, adapter=predictor._adapter
    )
    assert logits(without.predict_features(forms[0])) == expected
    with pytest.raises(UserError, match="data must be images to be encoded by a model"):
        next(without.predict(files))


def test_an_adapter_may_be_an_object_a_file_or_a_configuration(tmp_path: Path, files: list[Path]) -> None:
    adapter = RationalAdapter(AdapterConfig.official(16))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.5)
    rada_fast.save_adapter(adapter, tmp_path / "a.safetensors")
    found = [logits(tiny(adapter=given).predict(files[:2])) for given in (adapter, tmp_path / "a.safetensors")]
    assert found[0] == found[1]
    fresh = [logits(tiny(adapter=given).predict(files[:2])) for given in (None, AdapterConfig.official(16))]
    assert fresh[0] == fresh[1] != found[0]
    with pytest.raises(ValueError, match="adapter must have the width 16 of the features, got 24"):
        tiny(adapter=AdapterConfig.official(24))


def test_an_episode_that_diverges_leaves_clips_answer(files: list[Path]) -> None:
    (result,) = tiny(config=EpisodeConfig(lr=1e30, optimizer="sgd", steps=3)).predict(files[:1])
    assert result.status == "diverged"
    assert result.logits is not None
    assert result.zero_shot_logits is not None
    assert torch.equal(result.logits, result.zero_shot_logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views must be a whole number of at least 1"),
        ({"view_kind": "zoom"}, "view_kind must be crop or augmix, got 'zoom'"),
        ({"workers": -1}, "workers must be a whole number of at least 0"),
        ({"episodes": 0}, "episodes must be a whole number of at least 1"),
        ({"memory": "much"}, "memory must be an amount of memory such as 2GiB"),
        ({"memory": "1kB"}, r"memory must be at least \d+MiB for 3 views and 4 classes, got 0MiB"),
        ({"seed": -1}, "seed must be a whole number"),
        ({}, "pictures must be an iterable of pictures, such as a list of paths, got 'a.png'"),
        ({"logit_scale": 0.0}, "logit_scale must be above 0"),
        ({"text_features": torch.ones(3, 16)}, "text_features must have a row for each of 4 classes, got 3"),
        (
            {"text_features": torch.ones(4, 24)},
            "text_features has rows of width 24, model tiny makes features of width 16",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options).predict("a.png")


def test_progress_is_shown_only_if_it_is_asked_for(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PLAIN_INTERVAL", "FIRST_LINE"):
        monkeypatch.setattr(f"rada_fast.runs.progress.{name}", 0.0)
    list(tiny().predict(files))
    assert capsys.readouterr().err == ""
    list(tiny().predict(files, progress=True))
    assert "test-time training: 6/6" in capsys.readouterr().err
    list(tiny().stream(iter(files), progress=True))
    assert "test-time training: 6, " in capsys.readouterr().err


def test_times_are_counted_for_every_stage(files: list[Path]) -> None:
    predictor = tiny()
    list(predictor.predict(files))
    seconds = predictor.times.seconds()
    assert all(seconds[stage] > 0 for stage in ("decode", "views", "encode", "select", "adapt", "predict"))


def test_memory_stays_flat_over_hundreds_of_pictures(files: list[Path]) -> None:
    """Objects that the pipeline keeps for a picture would add up here."""
    results = tiny(workers=2).predict(islice(cycle(files), 400))

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    counts = []
    for prediction in results:
        if prediction.index % 100 == 99:
            counts.append(tensors())
    # One tensor that was kept for each picture would make 300 more; what is on its way varies by some dozens.
    assert counts[-1] < counts[0] + 150


@needs_extension
def test_nothing_of_an_episode_outlives_it(files: list[Path]) -> None:
    """Tensors are freed to the last byte while others follow, and at the end of a call. No other object is kept."""
    predictor, objects = tiny(config=EpisodeConfig(steps=2), episodes=4), list[int]()

    def predict(results: Iterator[Prediction], count: int) -> None:
        for _ in range(count):
            assert next(results).status == "ok"

    views = normalize(torch.randn(112, 3, predictor._text.shape[1]), dim=-1)
    results = predictor.predict_features(views)
    predict(results, 20)
    allocated_by(partial(predict, results, 8))
    assert allocated_by(partial(predict, results, 12)).left == 0
    for count in (12, 60):
        predict(results, count)
        gc.collect()
        objects.append(len(gc.get_objects()))
    results.close()
    left = [allocated_by(lambda: predict(predictor.predict(files), len(files))).left for _ in range(2)]
    assert left[1] == 0
    # An object that was kept of each episode would be sixty.
    assert objects[1] - objects[0] < 30


@pytest.mark.parametrize(("backend", "episodes"), [("cpu", None), ("cpu", 1), ("reference", None), ("literal", None)])
@pytest.mark.parametrize("value", [1e25, torch.inf])
def test_a_loss_that_is_no_number_harms_no_other_image(backend: str, episodes: int | None, value: float) -> None:
    """The image keeps CLIP's answer, flagged. The others have the bits that they have beside a usable image."""
    if backends()[backend] != "usable":
        pytest.skip(f"{backend}: {backends()[backend]}")
    generator = torch.Generator().manual_seed(0)
    text, *views = (normalize(torch.randn(5, 16, generator=generator), dim=-1) for _ in range(7))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RationalAdapter(AdapterConfig.official(16))
        torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.5)

    def predict() -> list[Prediction]:
        with use_backend(backend):
            predictor = TestTimePredictor(
                None, [str(label) for label in range(5)], text_features=text, logit_scale=100.0, adapter=adapter,
                config=EpisodeConfig(steps=2, selection=1.0), episodes=episodes,
            )  # fmt: skip
            return list(predictor.predict_features(views))

    clean = predict()
    views[2] = views[2] * 1.0
    views[2][1:, 0] = value
    spoilt = predict()
    assert [one.status for one in spoilt] == ["ok", "ok", "diverged", "ok", "ok", "ok"]
    assert spoilt[2].label == clean[2].zero_shot_logits.argmax()
    assert torch.equal(spoilt[2].logits, clean[2].zero_shot_logits)
    for number in (0, 1, 3, 4, 5):
        assert torch.equal(spoilt[number].logits, clean[number].logits)
