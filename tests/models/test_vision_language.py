"""Weights are loaded with their activation and preprocessing, and unusable files are refused, without a network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file

from rada_fast import _env
from rada_fast.config.options import ModelOptions
from rada_fast.errors import UserError
from rada_fast.models.vision_language import (
    AbsentModel,
    VisionLanguageModel,
    device_of_rank,
    load_model,
    open_model,
)
from rada_fast.models.weights import _record_of_file
from rada_fast.system.ranks import Ranks

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SQUASH = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Add two architectures to open_clip for the tests of this module, and write weights that fit both."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "Small.json").write_text(json.dumps(SMALL))
    (folder / "Small-quickgelu.json").write_text(json.dumps(SMALL | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    save_file(load_model("Small", "random").model.state_dict(), folder / "weights.safetensors")
    yield folder / "weights.safetensors"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._rescan_model_configs()


@pytest.fixture
def tags(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add tags for these weights. One tag's name begins with the other's, as with open_clip's dfn2b tags."""
    quick: dict[str, Any] = {"file": str(weights), "hf_hub": "org/small-quick/", "quick_gelu": True}
    plain: dict[str, Any] = {"file": str(weights), "hf_hub": "org/small-plain/", **SQUASH}
    for name in ("Small", "Small-quickgelu"):
        monkeypatch.setitem(_PRETRAINED, name, {"web2b": quick, "web2b_s39b": plain})


def warnings_of(name: str, pretrained: Path | str) -> list[str]:
    """Return the warnings of loading a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(name, str(pretrained))
    return [str(warning.message) for warning in caught]


@pytest.mark.usefixtures("tags")
def test_a_tag_of_the_other_activation_warns_once_with_the_name_to_use() -> None:
    assert warnings_of("Small-quickgelu", "web2b") == []
    assert warnings_of("Small", "web2b_s39b") == []
    (message,) = warnings_of("Small", "web2b")
    assert message.startswith("QuickGELU mismatch: the weights web2b were trained with QuickGELU, the model Small has")
    assert message.endswith("; use Small-quickgelu")
    (message,) = warnings_of("Small-quickgelu", "web2b_s39b")
    assert "were trained with GELU, the model Small-quickgelu has QuickGELU" in message
    assert message.endswith("; use Small")


@pytest.mark.usefixtures("tags")
@pytest.mark.parametrize(
    ("place", "twin"),
    [
        ("Small-web2b.safetensors", "Small-quickgelu"),
        # This path contains the other tag's name too; a search for "web2b" alone would warn wrongly.
        ("small_web2b-s39b.safetensors", "Small"),
        ("models--org--small-quick/snapshots/0a1b/model.safetensors", "Small-quickgelu"),
        ("small-plain/model.safetensors", "Small"),
        ("openai/model.safetensors", "Small-quickgelu"),
        # Here the tag's name is no word of its own, or too far up in the path to describe the file.
        ("openaire/model.safetensors", None),
        ("openai/runs/mine/model.safetensors", None),
        ("model.safetensors", None),
    ],
)
def test_a_file_warns_only_where_its_path_says_what_it_is(
    tmp_path: Path, weights: Path, place: str, twin: str | None
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(weights.read_bytes())
    for name in ("Small", "Small-quickgelu"):
        assert [message.rpartition("; use ")[2] for message in warnings_of(name, path)] == (
            [twin] if twin not in (None, name) else []
        )


def test_the_activation_of_every_tag_of_open_clip_is_read_from_its_record() -> None:
    # The names of these families do not tell their activation: each of these was trained with plain GELU.
    for name, tag in (
        ("ViT-L-14", "dfn2b_s39b"),
        ("ViT-H-14", "metaclip_altogether"),
        ("ViT-bigG-14-worldwide", "metaclip2_worldwide"),
    ):
        record = _record_of_file(name, Path(f"{name}-{tag}.safetensors"))
        assert record is not None
        assert not record.get("quick_gelu", False)
    # LAION's first weights were trained with QuickGELU, and its later ones with GELU.
    for tag, quick in (("laion400m_e32", True), ("laion2b_s34b_b79k", False)):
        record = _record_of_file("ViT-B-32", Path(f"ViT-B-32-{tag}.safetensors"))
        assert record is not None
        assert bool(record.get("quick_gelu", False)) is quick
    record = _record_of_file("ViT-B-16", Path("models--timm--vit_base_patch16_clip_224.openai/snapshots/0/a.bin"))
    assert record is not None
    assert record["quick_gelu"]


@pytest.mark.usefixtures("tags")
def test_preprocessing_follows_the_weights(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squash = load_model("Small", "web2b_s39b").preprocess
    assert (squash.mean, squash.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (squash.interpolation, squash.resize, squash.image_size) == ("bilinear", "squash", 32)
    known = tmp_path / "web2b_s39b.safetensors"
    known.write_bytes(weights.read_bytes())
    assert load_model("Small", str(known)).preprocess == squash
    # A path that says nothing gets open_clip's default while the tags disagree, and what they say once they agree.
    default = load_model("Small", str(weights)).preprocess
    assert (default.interpolation, default.resize) == ("bicubic", "shortest")
    monkeypatch.setitem(_PRETRAINED, "Small", {"one": SQUASH, "two": SQUASH})
    assert load_model("Small", str(weights)).preprocess == squash


@pytest.mark.usefixtures("weights")
def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    state = load_model("Small", "random").model.state_dict()
    save_file(
        {name: tensor for name, tensor in state.items() if name != "text_projection"}, tmp_path / "less.safetensors"
    )
    torch.save({}, tmp_path / "empty.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "text.npz").write_bytes(b"text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but published weights are in its format
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    for name, message in {
        "less.safetensors": r"its tensors do not fit: .*Missing key.*text_projection",
        "empty.pt": "does not load into Small",
        "tensor.pt": "does not load into Small",
        "torn.safetensors": "does not load into Small",
        "text.npz": "without executing code",
        "program.pt": "its tensors do not fit: .*Missing key",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_model("Small", str(tmp_path / name))
        assert "\n" not in str(caught.value)
        # The errors of PyTorch and NumPy advise switching their safeguards off, which must not be passed on.
        assert "weights_only" not in str(caught.value)
        assert "allow_pickle" not in str(caught.value)


@pytest.mark.usefixtures("weights")
def test_missing_libraries_of_encoders_and_tokenizers_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named\n'transformers'")

    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", fail)
        with pytest.raises(
            UserError, match="model Small: its tokenizer cannot be made: No module named 'transformers'"
        ):
            load_model("Small", "random")
    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(UserError, match="model Small cannot be built: No module named 'transformers'"):
        load_model("Small", "random")


@pytest.mark.usefixtures("weights")
def test_the_fingerprint_depends_on_every_weight() -> None:
    model = load_model("Small", "random")

    def fingerprint(name: str = "Small") -> str:
        return VisionLanguageModel(
            name,
            "random",
            model.model,
            model.tokenizer,
            model.preprocess,
            device=torch.device("cpu"),
            precision="float32",
        ).fingerprint

    assert len(model.fingerprint) == 64
    assert fingerprint() == model.fingerprint
    assert fingerprint("Other") != model.fingerprint
    with torch.no_grad():
        model.model.logit_scale.add_(torch.finfo(torch.float32).eps * 4)
    assert fingerprint() != model.fingerprint


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_only_the_method_for_fine_tuning_computes_gradients(precision: Any) -> None:
    model = load_model("Small", "random", precision=precision)
    images = torch.randn(2, 3, 32, 32)
    assert not model.encode_images(images).requires_grad
    assert torch.equal(model.image_features(images), model.encode_images(images))
    model.model.visual.requires_grad_(True)
    features = model.image_features_with_grad(images)
    assert features.dtype == torch.float32
    features[:, 0].sum().backward()
    gradients = [parameter.grad for parameter in model.model.visual.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.usefixtures("weights")
def test_features_are_checked_by_encode_images_alone() -> None:
    """The check waits for the device; a caller that must not wait makes it later, for many images at once."""
    model = load_model("Small", "random")
    images = torch.randn(3, 3, 32, 32)
    images[1, 0, 0, 0] = torch.nan
    features = model.image_features(images)
    assert features.isnan().any(dim=-1).tolist() == [False, True, False]
    with pytest.raises(UserError, match="features of image 'b' are NaN"):
        model.check_features(features, "image", ["a", "b", "c"])
    with pytest.raises(UserError, match="features of image 'b' are NaN"):
        model.encode_images(images, ["a", "b", "c"])


def test_a_run_that_encodes_nothing_has_an_absent_model() -> None:
    model = open_model(ModelOptions(model="no such model", device="cpu"), needed=False, seed=0)
    assert isinstance(model, AbsentModel)
    assert (model.device, model.precision) == (torch.device("cpu"), "float32")
    assert (model.fingerprint, model.stated_scale(), model.facts()) == (None, None, None)
    model.check_width(7, "anything")
    with pytest.raises(UserError, match="data must be images to be encoded by a model, got feature files"):
        model.loaded()


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(_env, "cuda_device_count", lambda: 4)
    cuda, cpu, second = torch.device("cuda"), torch.device("cpu"), torch.device("cuda:2")
    assert device_of_rank(cuda, Ranks(6, 8, 2, 4)) == second
    assert chosen == [second]
    assert device_of_rank(cpu, Ranks(6, 8, 2, 4)) == cpu
    assert device_of_rank(second, Ranks()) == second
    with pytest.raises(UserError, match="must be auto, cpu or cuda in several processes"):
        device_of_rank(second, Ranks(6, 8, 2, 4))
    assert chosen == [second]
