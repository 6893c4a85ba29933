"""A run finds its adapter, the scale of its logits and the names of its classes from options and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rada_fast.config.commands import TTTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import AdapterOptions, ClassOptions
from rada_fast.data.open import open_source, open_text_file
from rada_fast.errors import UserError
from rada_fast.loops.setup import make_adapter, open_data_and_model
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.vision_language import AbsentModel
from rada_fast.modules import RationalAdapter, save_adapter
from rada_fast.system import notices
from tests.pictures import write_class_folders

ABSENT = AbsentModel(torch.device("cpu"), "float32")


def own_file(path: Path, **changes: Any) -> str:
    save_adapter(RationalAdapter(AdapterConfig.official(16, **changes)), path)
    return str(path)


def published_file(path: Path, **changes: Any) -> str:
    """Write a checkpoint as the published code does, which says nothing about the arithmetic."""
    state = RationalAdapter(AdapterConfig.official(16, **changes)).state_dict()
    torch.save({"state_dict": {f"mha.{name}": tensor for name, tensor in state.items()}}, path)
    return str(path)


def test_a_published_adapter_takes_its_temperature_from_the_options(tmp_path: Path) -> None:
    file = published_file(tmp_path / "model.pth.tar-13")
    plain = make_adapter(AdapterOptions(adapter=file), 16, 0)
    warm = make_adapter(AdapterOptions(adapter=file, temperature=4.0, num_heads=2), 16, 0)
    assert plain.config == AdapterConfig.official(16)
    assert warm.config == AdapterConfig.official(16, temperature=4.0, num_heads=2)
    assert all(torch.equal(tensor, warm.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_an_adapter_takes_options_that_agree_with_it(tmp_path: Path) -> None:
    file = own_file(tmp_path / "a.safetensors", temperature=4.0, queries=("image", "text"), num_layers=2)
    options = AdapterOptions(
        adapter=file, preset="official", temperature=4.0, num_heads=8, queries=("text", "image"), num_layers=2,
        mask_function="attention",
    )  # fmt: skip
    assert make_adapter(options, 16, 0).config == make_adapter(AdapterOptions(adapter=file), 16, 0).config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # The default value contradicts the file too, if it was given.
        ({"temperature": 1.0}, "temperature must be 4.0, as adapter .* has it, or be left out; got 1.0"),
        ({"num_heads": 2}, "num_heads must be 8, as adapter"),
        ({"queries": ("image",)}, r"queries must be \('image', 'text', 'rational'\), as adapter"),
        ({"num_layers": 2}, "num_layers must be 1, as adapter"),
        ({"mask_function": "mlp"}, "mask_function must be 'attention', as adapter"),
        ({"preset": "paper"}, "preset must fit adapter .*, whose softmax is 'matrix', or be left out; got 'paper'"),
    ],
)
def test_options_that_contradict_the_adapters_file_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_adapter(AdapterOptions(adapter=own_file(tmp_path / "a.safetensors", temperature=4.0), **options), 16, 0)
    if not {"temperature", "num_heads"} & set(options):
        with pytest.raises(UserError, match=message):
            make_adapter(AdapterOptions(adapter=published_file(tmp_path / "b.pth"), **options), 16, 0)


def test_without_a_file_the_options_decide(tmp_path: Path) -> None:
    assert make_adapter(AdapterOptions(), 16, 0).config == AdapterConfig.official(16)
    assert make_adapter(AdapterOptions(preset="paper", temperature=2.0), 16, 0).config == AdapterConfig.paper(16, 2.0)


def features(path: Path, **arrays: Any) -> str:
    generator = np.random.default_rng(0)
    np.savez(path, **({"features": generator.normal(size=(3, 16)), "labels": np.arange(3)} | arrays))
    return f"features:{path}"


def scale(tmp_path: Path, data: float | None, text: float | None, option: float | None = None) -> tuple[float, str]:
    specs = [
        features(tmp_path / f"{name}.npz", **({} if value is None else {"logit_scale": np.float32(value)}))
        for name, value in (("data", data), ("text", text))
    ]
    options = ClassOptions(text_features=specs[1], logit_scale=option)
    opened = open_data_and_model(TTTOptions(data=specs[0], text=options), {"data": specs[0]})
    return opened.logit_scale, opened.logit_scale_from


def test_the_scale_comes_from_the_option_or_a_file_or_is_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale(tmp_path, 50.0, None) == (50.0, f"array logit_scale of {tmp_path / 'data.npz'}")
    assert scale(tmp_path, None, 117.5) == (117.5, f"array logit_scale of {tmp_path / 'text.npz'}")
    assert scale(tmp_path, 50.0, 50.01)[0] == 50.0
    assert scale(tmp_path, 50.0, 60.0, option=2.0) == (2.0, "--logit-scale")
    assert capsys.readouterr().err == ""
    assert scale(tmp_path, None, None) == (100.0, "default, as nothing states it")
    assert "no file states a logit_scale: CLIP's 100 is taken (--logit-scale changes it)" in capsys.readouterr().err


def test_unusable_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logit_scale must be given, the array logit_scale of .*data.npz has 50 and"):
        scale(tmp_path, 50.0, 60.0)
    with pytest.raises(
        UserError, match=r"holds 4.60517, which looks like the logarithm .*: give --logit-scale 100, or"
    ):
        scale(tmp_path, None, 4.60517)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UserError, match=r"data.npz: logit_scale must be one number above 0 that float32 holds"):
            scale(tmp_path, bad, None)
    with pytest.raises(UserError, match=r"logit_scale must be one number above 0 that .* got float64 \(2,\)"):
        open_source(features(tmp_path / "two.npz", logit_scale=np.ones(2)))


def test_the_scale_of_the_model_and_of_its_features_must_agree(tmp_path: Path) -> None:
    width = {"features": np.random.default_rng(0).normal(size=(3, 512)), "class_names": ["a", "b", "c"]}

    def opened(**changes: Any) -> tuple[float, str]:
        config = TTTOptions(data=features(tmp_path / "f.npz", **width, **changes))
        opened = open_data_and_model(config, {"data": config.data})
        return opened.logit_scale, opened.logit_scale_from

    value, source = opened()
    assert source == "model embedded"
    assert opened(logit_scale=value) == (value, source)
    with pytest.raises(UserError, match="logit_scale must be given, the model embedded has"):
        opened(logit_scale=2 * value)


def test_labels_without_names_make_no_prompts(tmp_path: Path) -> None:
    source = open_source(features(tmp_path / "f.npz"))
    with pytest.raises(UserError, match=r"classes must be given.*f.npz has no array class_names"):
        class_names_of(source, None, prompts=True)
    assert class_names_of(source, None, prompts=False) == ("class 0", "class 1", "class 2")
    numbered = open_source(features(tmp_path / "g.npz", class_names=["0", "1", "2"]))
    with pytest.raises(UserError, match=r"names in the array class_names of .*g.npz are numbers \(0, 1, 2\)"):
        class_names_of(numbered, None, prompts=True)
    ids = open_source(features(tmp_path / "h.npz", class_names=["n01440764", "n01443537", "n01484850"]))
    with notices.collecting():
        assert class_names_of(ids, None, prompts=True) == ("tench", "goldfish", "great white shark")
        assert notices.so_far() == []


def test_a_folder_without_classes_of_its_own_names_the_one_with_them(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", ("cat", "dog"))
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match=rf"did you mean imagefolder:{tmp_path}/images\?"):
        class_names_of(open_source(f"imagefolder:{tmp_path}"), None, prompts=True)


def test_a_feature_file_has_the_views_that_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rada_fast.loops.ttt import mention_fixed_views, num_views

    spec = features(tmp_path / "f.npz", features=np.random.default_rng(0).normal(size=(3, 10, 16)))
    single = open_source(features(tmp_path / "g.npz"))
    source = open_source(spec)
    config = TTTOptions(data=spec)
    assert (num_views(config, source), num_views(config, single)) == (10, 1)
    with notices.collecting():
        mention_fixed_views(config, source)
        mention_fixed_views(TTTOptions(data=spec, views=10), source)
        assert notices.so_far() == []
        assert f"--views makes no views of a feature file: {spec} holds 10 of each" in capsys.readouterr().err
        mention_fixed_views(TTTOptions(data=spec, views=8, view_kind="augmix"), source)
        assert [warning.split(" makes")[0] for warning in notices.so_far()] == ["--views 8", "--view-kind augmix"]


def test_the_summary_holds_the_views_and_the_scale_that_were_used(tmp_path: Path) -> None:
    from rada_fast.config.method import EpisodeConfig
    from rada_fast.config.options import RunOptions
    from rada_fast.loops.ttt import run_ttt

    data = features(tmp_path / "f.npz", features=np.random.default_rng(0).normal(size=(3, 10, 16)))
    config = TTTOptions(
        data=data,
        view_kind="augmix",
        text=ClassOptions(text_features=features(tmp_path / "t.npz", logit_scale=np.array(50))),
        episode=EpisodeConfig(steps=1),
        run=RunOptions(output=str(tmp_path / "run")),
    )
    with notices.collecting():
        summary = run_ttt(config)
    assert summary["views"] == 10
    assert summary["logit_scale"] == {"value": 50.0, "from": f"array logit_scale of {tmp_path / 't.npz'}"}
    assert summary["warnings"] == [f"--view-kind augmix makes no views of a feature file: {data} holds its own"]


def test_rows_of_text_features_are_matched_with_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.eye(3, 4)

    def rows_and_warnings(**arrays: Any) -> tuple[list[int], list[str]]:
        """Return the row that each class gets, and the warnings."""
        spec = features(tmp_path / "t.npz", features=rows, **arrays)
        with notices.collecting():
            options, group = ClassOptions(text_features=spec), ClassGroup(("black cat", "dog", "tench"))
            (matched,) = text_features(options, [group], ABSENT, open_text_file(spec))
            return matched.argmax(dim=-1).tolist(), notices.so_far()

    assert rows_and_warnings() == ([0, 1, 2], [])
    assert rows_and_warnings(labels=np.array([2, 0, 1])) == ([1, 2, 0], [])
    assert rows_and_warnings(class_names=["dog", "n01440764", "black_cat"]) == ([2, 0, 1], [])
    assert "has the classes in another order; each has its own row" in capsys.readouterr().err
    assert rows_and_warnings(class_names=["x", "y", "z"]) == ([0, 1, 2], [])
    places, (warning,) = rows_and_warnings(class_names=["dog", "y", "z"])
    assert places == [0, 1, 2]
    assert "names class 0 'dog', the data name it 'black cat'" in warning
    assert "has labels that are not 0 ... 2, each once" in rows_and_warnings(labels=np.array([0, 0, 1]))[1][0]
    rows = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    assert "2 of 3 classes have the same text feature" in rows_and_warnings()[1][0]
