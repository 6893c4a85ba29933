"""Folders of transformers are read as that library computes them, and without code, network or random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.data.views import Preprocess, center_view
from rada_fast.errors import UserError
from rada_fast.models.transformers_models import read_preprocess
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from tests.tiny_models import write_openclip_folder, write_tokenizer, write_transformers_folder

TEXTS = ["a photo of a red ring.", "a zebra"]
KINDS = ("clip", "siglip", "align")
# What the published folders hold, of old and new versions of the library.
CLIP: dict[str, Any] = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
SIGLIP = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
}  # fmt: skip
ALIGN = {
    "crop_size": {"height": 289, "width": 289}, "do_center_crop": True, "do_normalize": False, "do_rescale": True,
    "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "include_top": False,
    "resample": 2, "rescale_factor": 1 / 127.5, "rescale_offset": True, "size": {"height": 346, "width": 346},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one folder for each kind of model, beside the model itself."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("transformers")
    for kind in KINDS:
        torch.save(write_transformers_folder(root / kind, kind), root / f"{kind}.whole")
    return root


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "clip", tmp_path / "clip"))


def opened(folder: Path) -> VisionLanguageModel:
    return load_model(f"transformers:{folder}")


def refused(folder: Path) -> str:
    """Return the one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        opened(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_logits_are_those_of_the_library(folder: Path, kind: str) -> None:
    model = opened(folder / kind)
    own = torch.load(folder / f"{kind}.whole", weights_only=False)
    images, tokens = torch.randn(3, 3, 32, 32), model.tokens(TEXTS)
    seen = {"attention_mask": (tokens != 0).long()} if kind == "align" else {}
    with torch.no_grad():
        found = own(pixel_values=images, input_ids=tokens, **seen)
    image, text = model.image_features(images), model.encode_texts(TEXTS)
    torch.testing.assert_close(image, normalize(found.image_embeds, dim=-1))
    torch.testing.assert_close(text, normalize(found.text_embeds, dim=-1))
    logits = model.logit_scale * image @ text.T + (model.logit_bias or 0.0)
    torch.testing.assert_close(logits, found.logits_per_image, rtol=1e-4, atol=1e-4)
    assert tokens.tolist()[1][:5] == [2, 4, 1, 3, 0]
    assert tokens.shape == (2, 16)


def test_the_towers_lead_to_the_blocks(folder: Path) -> None:
    for kind in ("clip", "siglip"):
        model = opened(folder / kind)
        assert (len(model.image_tower().blocks), model.image_tower().width) == (2, 16)
        assert len(model.text_tower().blocks) == 2
    model = opened(folder / "align")
    assert len(model.text_tower().blocks) == 2
    with pytest.raises(UserError, match="its image encoder is not a transformer"):
        model.image_tower()
    assert not hasattr(model.model.visual, "set_grad_checkpointing")


def test_checkpoints_change_no_gradient(folder: Path) -> None:
    model = opened(folder / "clip")
    visual, images = model.model.visual, torch.randn(2, 3, 32, 32)
    model.train_image_encoder(True)

    def gradients(checkpoints: bool) -> tuple[int, list[Tensor]]:
        """Return the number of values that are kept for the backward pass, and the gradients."""
        kept: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        visual.set_grad_checkpointing(checkpoints)
        visual.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = model.image_features_with_grad(images)
        features[:, 0].sum().backward()
        return sum(kept), [p.grad.clone() for p in visual.parameters() if p.grad is not None]

    (plain, expected), (less, found), (again, _) = (gradients(checkpoints) for checkpoints in (False, True, False))
    assert less < plain == again
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_of_batch_normalisation_stay_those_of_the_weights(folder: Path) -> None:
    model = opened(folder / "align")
    before = {name: tensor.clone() for name, tensor in model.model.visual.named_buffers()}
    model.train_image_encoder(True)
    model.image_features_with_grad(torch.randn(2, 3, 32, 32))
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.visual.named_buffers())
    assert all(parameter.requires_grad for parameter in model.model.visual.parameters())
    model.train_image_encoder(False)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not model.model.visual.training


def test_a_folder_of_open_clip_has_its_tokenizer_from_transformers(folder: Path, tmp_path: Path) -> None:
    write_openclip_folder(tmp_path / "siglip", "Small-Sigmoid")
    file = tmp_path / "siglip" / "open_clip_config.json"
    described = json.loads(file.read_text())
    described["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "timm/somewhere"}
    file.write_text(json.dumps(described))
    name = f"openclip:{tmp_path}/siglip"
    with pytest.raises(UserError, match="its tokenizer cannot be made"):
        load_model(name)
    write_tokenizer(tmp_path / "siglip")
    assert load_model(name).tokens(["a photo of a zebra"]).tolist()[0][:7] == [2, 4, 5, 6, 4, 1, 3]


def test_torch_files_are_read_and_safetensors_preferred(copied: Path) -> None:
    expected = opened(copied).fingerprint
    state = load_file(copied / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, copied / "pytorch_model.bin")
    assert opened(copied).fingerprint == expected
    (copied / "model.safetensors").unlink()
    assert opened(copied).fingerprint != expected
    torch.save(state, copied / "pytorch_model.bin")
    assert opened(copied).fingerprint == expected
    # Weights in a lower precision are widened.
    torch.save({name: tensor.half() for name, tensor in state.items()}, copied / "pytorch_model.bin")
    model = opened(copied)
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


def test_no_code_in_a_folder_is_executed(copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (copied / name).write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((copied / "config.json").read_text())
    auto = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    (copied / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    opened(copied)
    words = json.loads((copied / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (copied / "tokenizer_config.json").write_text(json.dumps(words | own))
    opened(copied)
    (copied / "model.safetensors").unlink()
    torch.save({"logit_scale": Hostile(mark)}, copied / "pytorch_model.bin")
    assert "its weights do not load without executing code" in refused(copied)
    assert not mark.exists()


def test_folders_that_lack_something_are_refused(copied: Path) -> None:
    state = load_file(copied / "model.safetensors")
    lacking = {name: tensor for name, tensor in state.items() if name != "visual_projection.weight"}
    save_file(lacking, copied / "model.safetensors", {"format": "pt"})
    assert "its weights lack 1 tensors, such as visual_projection.weight" in refused(copied)
    save_file(lacking | {"visual_projection.weight": torch.zeros(3, 3)}, copied / "model.safetensors", {"format": "pt"})
    assert "cannot be read" in refused(copied)
    (copied / "model.safetensors").write_bytes(b"torn")
    assert "cannot be read" in refused(copied)
    (copied / "model.safetensors").unlink()
    assert "the folder has no weights, such as model.safetensors or pytorch_model.bin" in refused(copied)
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    described = json.loads((copied / "preprocessor_config.json").read_text())
    larger = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    (copied / "preprocessor_config.json").write_text(json.dumps(described | larger))
    assert "have 64 pixels a side in preprocessor_config.json, and 32 in config.json" in refused(copied)
    (copied / "preprocessor_config.json").unlink()
    assert "the folder has no preprocessor_config.json" in refused(copied)
    (copied / "processor_config.json").write_text(json.dumps({"image_processor": described}))
    opened(copied)
    (copied / "tokenizer.json").unlink()
    assert "its tokenizer cannot be made" in refused(copied)


def test_without_the_library_its_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert "needs the library transformers (pip install 'rada_fast[transformers]')" in refused(tmp_path)


def written(folder: Path, description: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(description))
    return folder


def test_published_descriptions_of_preprocessing_are_understood(tmp_path: Path) -> None:
    mean, std = tuple(CLIP["image_mean"]), tuple(CLIP["image_std"])
    expected = Preprocess(224, mean, std, "bicubic", "shortest")
    assert read_preprocess("m", written(tmp_path, CLIP)) == expected
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    assert read_preprocess("m", written(tmp_path, CLIP | new)) == expected
    half = (0.5, 0.5, 0.5)
    assert read_preprocess("m", written(tmp_path, SIGLIP)) == Preprocess(224, half, half, "bicubic", "squash")
    assert read_preprocess("m", written(tmp_path, ALIGN)) == Preprocess(289, half, half, "bilinear", "squash", 346)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resample": 1}, "resample must be 2 .bilinear. or 3 .bicubic., got 1"),
        ({"size": {"height": 224, "width": 200}}, "images must be square, got 224 x 200"),
        ({"size": None}, "is not the description of a preprocessing that is known"),
        ({"do_resize": False}, "it does not resize or rescale images"),
        ({"do_center_crop": False}, "does not cut out the centre"),
        ({"crop_size": 225}, "the centre of 225 pixels is not inside 224"),
        ({"image_std": [0.0, 1.0, 1.0]}, "must have three values each"),
        ({"image_mean": [0.0]}, "must have three values each"),
    ],
)
def test_descriptions_that_cannot_be_followed_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_preprocess("m", written(tmp_path, CLIP | change))


def test_a_picture_is_prepared_as_the_librarys_description_says(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    inner = image.resize((346, 346), Image.Resampling.BILINEAR).crop((28, 28, 317, 317))
    expected = torch.from_numpy(np.asarray(inner).copy()).permute(2, 0, 1).float() / 127.5 - 1
    found = center_view(image, read_preprocess("m", written(tmp_path, ALIGN)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
