"""Models that are files are read with the right names, numbers and preprocessing, and unusable ones are refused."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.errors import UserError
from rada_fast.models.openai_archive import architecture_of, is_archive, read_archive
from rada_fast.models.vision_language import load_model
from tests.tiny_models import CONFIGS, known_to_open_clip, made, write_archive, write_openclip_folder

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXTS = ["a photo of a cat.", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write an archive of each kind of OpenAI's models, and open_clip's folder of a SigLIP."""
    root = tmp_path_factory.mktemp("models")
    with known_to_open_clip(root):
        for name in ("Small-ViT", "Small-RN"):
            write_archive(root / f"{name}.pt", name)
        write_openclip_folder(root / "siglip", "Small-Sigmoid")
        yield root


def features_of(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit-norm features of IMAGES and of tokens that a module of open_clip computes itself."""
    with torch.no_grad():
        return normalize(module.encode_image(IMAGES), dim=-1), normalize(module.encode_text(tokens), dim=-1)


def errors_of(name: str, pretrained: Path | str | None = None) -> str:
    """Return the one line with which a model is refused."""
    with pytest.raises(UserError) as caught:
        load_model(name, None if pretrained is None else str(pretrained))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["Small-ViT", "Small-RN"])
def test_an_archive_has_the_names_and_numbers_that_pytorch_reads(folder: Path, name: str) -> None:
    path = folder / f"{name}.pt"
    assert is_archive(path)
    found = read_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(path).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    architecture = architecture_of(found)
    config = CONFIGS[name]
    assert architecture is not None
    assert architecture["embed_dim"] == config["embed_dim"]
    assert architecture["text_cfg"] == config["text_cfg"]
    assert architecture["vision_cfg"] == {key: config["vision_cfg"][key] for key in architecture["vision_cfg"]}


@pytest.mark.parametrize("name", ["Small-ViT", "Small-RN"])
def test_an_archive_is_the_same_model_by_a_name_and_by_itself(folder: Path, name: str) -> None:
    path = folder / f"{name}.pt"
    module = made(name).half().float()  # the archive holds numbers in float16
    for model in (load_model(f"openai:{path}"), load_model(name, str(path))):
        assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
        expected = features_of(module, open_clip.SimpleTokenizer(context_length=16)(TEXTS))
        torch.testing.assert_close(model.image_features(IMAGES), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_texts(TEXTS), expected[1])
        assert model.preprocess.mean == open_clip.OPENAI_DATASET_MEAN
        assert (model.preprocess.image_size, model.embed_dim) == (32, 32)
    # Another place is the same model.
    moved = folder / "moved.pt"
    moved.write_bytes(path.read_bytes())
    assert load_model(f"openai:{moved}").fingerprint == load_model(f"openai:{path}").fingerprint


def test_a_wrong_name_for_an_archive_is_refused_with_the_right_one(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the activation differs too
        message = errors_of("Small-Sigmoid", folder / "Small-ViT.pt")
    assert "does not load into Small-Sigmoid, its tensors do not fit" in message
    assert message.endswith("they fit the model Small-ViT")
    with pytest.warns(UserWarning, match="QuickGELU mismatch: .* with QuickGELU, the model Small-Sigmoid has GELU"):
        errors_of("Small-Sigmoid", folder / "Small-ViT.pt")
    state = read_archive(folder / "Small-RN.pt")
    save_file({name: tensor for name, tensor in state.items() if tensor.ndim}, folder / "rn.safetensors")
    message = errors_of("Small-ViT", folder / "rn.safetensors")
    assert message.endswith("they fit the model Small-RN")


def rewritten(path: Path, source: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy an archive, with other contents for the records whose names end as given."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = next((found for end, found in records.items() if name.endswith(end)), old.read(name))
            new.writestr(name, content)
    return path


class Hostile:
    """An object whose unpickling writes a file, if a reader looks up functions by their names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


def test_archives_that_are_damaged_or_more_than_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    good = folder / "Small-ViT.pt"
    mark = tmp_path / "executed"
    hostile = pickle.dumps(Hostile(mark), protocol=2)
    deep = pickle.dumps(None)
    with zipfile.ZipFile(good) as archive:
        described = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    cases = {
        rewritten(tmp_path / "hostile.pt", good, {"/data.pkl": hostile}): "it asks for .*open, which is no part of ten",
        rewritten(tmp_path / "cut.pt", good, {"/data/0": b"xx"}): "its record 0 is cut off",
        rewritten(tmp_path / "packed.pt", good, {}, zipfile.ZIP_DEFLATED): "data.pkl is compressed",
        rewritten(tmp_path / "torn.pt", good, {"/data.pkl": described[:500]}): "it is damaged",
        rewritten(tmp_path / "empty.pt", good, {"/data.pkl": deep}): "tensors are not those of a CLIP of OpenAI",
    }
    for path, message in cases.items():
        assert re.search(message, errors_of(f"openai:{path}")), path
        errors_of("Small-ViT", path)
    assert not mark.exists()
    (tmp_path / "text.pt").write_text("text")
    assert "must be a TorchScript archive, as OpenAI publishes" in errors_of(f"openai:{tmp_path}/text.pt")


def test_a_folder_of_open_clip_is_read_with_its_preprocessing_and_bias(folder: Path) -> None:
    model = load_model(f"openclip:{folder}/siglip")
    expected = features_of(made("Small-Sigmoid"), model.tokens(TEXTS))
    torch.testing.assert_close(model.image_features(IMAGES), expected[0])
    torch.testing.assert_close(model.encode_texts(TEXTS), expected[1])
    assert (model.preprocess.mean, model.preprocess.resize) == ((0.5, 0.5, 0.5), "squash")
    assert model.logit_bias == -10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "asks for a text encoder of transformers"),
        ({"vision_cfg": {"timm_model_pretrained": True}}, "asks for weights from a network"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:someone/thing"}}, "asks for weights from a network"),
        ({"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}, "asks for code of its own"),
        ({"text_cfg": {"layers": 2}}, "Missing key"),
        ({"text_cfg": None}, "has no model_cfg with vision_cfg and text_cfg"),
    ],
)
def test_folders_that_need_code_or_a_network_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "siglip" / "open_clip_model.safetensors")
    described = json.loads((folder / "siglip" / "open_clip_config.json").read_text())
    for part, changes in change.items():
        described["model_cfg"][part] = changes and described["model_cfg"][part] | changes
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    assert message in errors_of(f"openclip:{tmp_path}")


def test_missing_files_and_unknown_kinds_are_named_with_what_is_close(folder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in errors_of(f"openclip:{folder}/siglop")
    assert f"; close: {folder}/siglip" in errors_of(f"openclip:{folder}/siglop")
    assert f"; close: {folder}/Small-ViT.pt" in errors_of(f"openai:{folder}/Small-ViT.pth")
    assert f"nor a folder {tmp_path}/none" in errors_of(f"transformers:{tmp_path}/none/clip")
    assert "the folder has no open_clip_config.json" in errors_of(f"openclip:{tmp_path}")
    assert "the folder has no config.json" in errors_of(f"transformers:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "align2"}')
    assert "must be of the model_type clip, siglip, align, got 'align2'; close: align" in errors_of(
        f"transformers:{tmp_path}"
    )
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in errors_of(f"transformers:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS["Small-Sigmoid"]}))
    assert "the folder has no weights, such as open_clip_model.safetensors" in errors_of(f"openclip:{tmp_path}")
    assert "must be a name or one of openai:FILE.pt" in errors_of("hf:somewhere")
    assert "; transformers:x is close" in errors_of("transformer:x")
    assert "pretrained must be left out for the model openclip:" in errors_of(f"openclip:{folder}/siglip", "openai")
    assert "close: laion2b_s34b_b88k" in errors_of("ViT-B-16", "laion2b_s34b_b88")
