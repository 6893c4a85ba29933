"""Models are loaded by name and weights and encode classes; the tests use tiny architectures and no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from rada_fast import _env
from rada_fast.config.options import ModelOptions
from rada_fast.errors import UserError
from rada_fast.models.class_features import class_features
from rada_fast.models.class_names import resolve_class_names
from rada_fast.models.prompts import Prompts
from rada_fast.models.vision_language import VisionLanguageModel, load_model, open_model, precision_on
from rada_fast.system import notices

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Add two architectures to open_clip that differ in their activation, as its ViT-B-16 pair does."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "Tiny.json").write_text(json.dumps(TINY))
    (folder / "Tiny-quickgelu.json").write_text(json.dumps(TINY | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._rescan_model_configs()


@pytest.fixture(scope="module")
def tiny(_tiny_models: None) -> VisionLanguageModel:
    return load_model("Tiny", "random")


def test_a_random_model_depends_on_its_seed_alone(tiny: VisionLanguageModel) -> None:
    torch.rand(7)
    state = torch.get_rng_state()
    again = load_model("Tiny", "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint == tiny.fingerprint
    assert load_model("Tiny", "random", seed=1).fingerprint != tiny.fingerprint
    assert load_model("Tiny-quickgelu", "random").fingerprint != tiny.fingerprint
    assert tiny.embed_dim == 24
    assert tiny.preprocess.image_size == 32
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert not tiny.model.training


def test_features_have_unit_norm_in_float32(tiny: VisionLanguageModel) -> None:
    images = torch.randn(3, 3, 32, 32)
    low = load_model("Tiny", "random", precision="bfloat16")
    for vlm in (tiny, low):
        for features in (vlm.encode_images(images), vlm.encode_texts(["a cat", "a dog"])):
            assert features.dtype == torch.float32
            assert not features.requires_grad
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    # bfloat16 has 8 significant bits: unit-norm features agree to a few of its units.
    torch.testing.assert_close(low.encode_images(images), tiny.encode_images(images), rtol=0, atol=3e-2)
    assert tiny.logit_scale == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_processor_without_instructions_for_a_precision_computes_in_float32(
    tiny: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    monkeypatch.setattr(_env, "has_native_products", lambda dtype: dtype == "float32")
    with notices.collecting():
        low = load_model("Tiny", "random", precision=precision)
        load_model("Tiny", "random", precision=precision)
        assert len(notices.so_far()) == 1
    assert (low.precision_asked, low.precision) == (precision, "float32")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(low.encode_images(images), tiny.encode_images(images))
    # The same holds for the shipped model and for one that is made or opened in another way.
    for made in (
        load_model("embedded", precision=precision),
        open_model(ModelOptions(device="cpu", precision=precision), needed=True, seed=0),
    ):
        assert (made.precision_asked, made.precision) == (precision, "float32")
    # There is no note for float32, nor on a device that multiplies the type.
    with notices.collecting():
        assert precision_on(torch.device("cpu"), "float32") == "float32"
        assert precision_on(torch.device("cuda"), precision) == precision
        monkeypatch.setattr(_env, "has_native_products", lambda dtype: True)
        assert precision_on(torch.device("cpu"), precision) == precision
        assert notices.so_far() == []


def test_local_weights_of_both_formats_are_loaded(tmp_path: Path) -> None:
    source = load_model("Tiny", "random", seed=3)
    state = source.model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "trained.pt")
    for name in ("w.safetensors", "w.pt", "trained.pt"):
        assert load_model("Tiny", str(tmp_path / name)).fingerprint == source.fingerprint


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


def test_unusable_models_and_weights_are_refused(tmp_path: Path) -> None:
    state = load_model("Tiny", "random").model.state_dict()
    state["visual.proj"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "nothing.safetensors")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    torch.save({"state_dict": Hostile(tmp_path / "executed")}, tmp_path / "hostile.pt")
    cases = {
        ("ViT-B-61", "openai"): r"model 'ViT-B-61' is neither one of open_clip's nor 'embedded'; close: .*ViT-B-16",
        ("Tiny", None): "model Tiny needs --pretrained: a tag .* a weights file",
        ("ViT-B-16", "opnai"): r"pretrained 'opnai' is neither a file nor a tag of ViT-B-16 \(openai, ",
        ("Tiny", str(tmp_path / "none.pt")): "is neither a file nor a tag",
        ("Tiny", str(tmp_path / "other.safetensors")): "other.safetensors does not load into Tiny",
        ("Tiny", str(tmp_path / "nothing.safetensors")): "nothing.safetensors does not load into Tiny",
        ("Tiny", str(tmp_path / "torn.pt")): "torn.pt does not load into Tiny",
        ("Tiny", str(tmp_path / "hostile.pt")): "hostile.pt does not load into Tiny without executing code",
        ("embedded", "openai"): "pretrained must be left out for the embedded model",
    }
    for (name, pretrained), message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_model(name, pretrained)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_tag_that_cannot_be_downloaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    with pytest.raises(
        UserError, match=r"pretrained 'laion2b_s34b_b88k' of ViT-B-16 could not be downloaded; .*no route to"
    ):
        load_model("ViT-B-16", "laion2b_s34b_b88k")


def test_quick_gelu_mismatches_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai").mkdir()
    path = tmp_path / "openai" / "w.safetensors"
    save_file(load_model("Tiny", "random").model.state_dict(), path)
    with pytest.warns(UserWarning, match="QuickGELU mismatch: .* use Tiny-quickgelu"):
        load_model("Tiny", str(path))
    load_model("Tiny-quickgelu", str(path))
    # The activation of a tag is in open_clip's own records.
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(path))
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *args, **kwargs: {})
    with pytest.warns(UserWarning, match="QuickGELU mismatch"):
        load_model("ViT-B-32", "openai")


def test_class_names_come_from_folders_and_files(tmp_path: Path) -> None:
    assert resolve_class_names(["red_fox", "owl"], None) == ("red fox", "owl")
    assert resolve_class_names(["n01440764", "n01443537"], None) == ("tench", "goldfish")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    (tmp_path / "by_folder.json").write_text('{"b": "dog", "a": "cat"}')
    assert resolve_class_names(["a", "b"], str(tmp_path / "two.txt")) == ("cat", "dog")
    assert resolve_class_names(["a", "b"], str(tmp_path / "by_folder.json")) == ("cat", "dog")
    assert resolve_class_names([], str(tmp_path / "two.txt")) == ("cat", "dog")
    with pytest.raises(UserError, match="must hold 3 names, one for each class folder, got 2"):
        resolve_class_names(["a", "b", "c"], str(tmp_path / "two.txt"))
    with pytest.raises(UserError, match="must name every class folder, 1 of 3 are missing: c"):
        resolve_class_names(["a", "b", "c"], str(tmp_path / "by_folder.json"))
    with pytest.raises(UserError, match="classes must be given"):
        resolve_class_names([], None)


def test_class_features_average_after_normalisation_and_are_cached(tiny: VisionLanguageModel, tmp_path: Path) -> None:
    names, templates = ["cat", "dog", "cat"], ("a {}.", "the {}!")
    prompts, one = Prompts(templates), Prompts(templates[:1])
    features = class_features(tiny, names, prompts, cache_dir=tmp_path)
    each = torch.stack([tiny.encode_texts([t.format(n) for n in names]) for t in templates])
    torch.testing.assert_close(features, normalize(each.mean(0), dim=-1))
    assert torch.equal(features[0], features[2])
    single = class_features(tiny, names, one, cache_dir=tmp_path)
    torch.testing.assert_close(single, each[0])

    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(class_features(tiny, names, prompts, cache_dir=tmp_path), features)
    other = load_model("Tiny", "random", seed=9)
    assert not torch.equal(class_features(other, names, prompts, cache_dir=tmp_path), features)
    with pytest.raises(UserError, match="K = 0"):
        class_features(tiny, [], prompts)


def test_the_embedded_model_loads_by_name() -> None:
    vlm = load_model("embedded")
    assert vlm.embed_dim == 512
    assert vlm.encode_images(torch.randn(2, 3, 48, 48)).shape == (2, 512)
