"""Text features are averages of prompts, tie for equal names, are encoded in chunks and cached."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.errors import UserError
from rada_fast.models import class_features as module
from rada_fast.models.class_features import class_features, warn_of_cut_names
from rada_fast.models.prompts import Prompts, resolve_prompts
from rada_fast.system import notices


class Encoder:
    """Encoder stands for a model: a text's feature depends on the text, and in its last bit on the row of the batch."""

    embed_dim = 8
    precision = "float32"
    device = torch.device("cpu")

    def __init__(self, fingerprint: str = "a") -> None:
        self.fingerprint = fingerprint
        self.batches: list[list[str]] = []

    def encode_texts(self, texts: list[str]) -> Tensor:
        self.batches.append(list(texts))
        draws = [torch.Generator().manual_seed(int(hashlib.sha256(t.encode()).hexdigest()[:12], 16)) for t in texts]
        features = torch.stack([torch.randn(self.embed_dim, generator=draw) for draw in draws])
        return normalize(features * (1 + 1e-6 * torch.arange(len(texts))[:, None]) + 0, dim=-1)


def features_of(encoder: Encoder, names: list[str], templates: list[str], **kwargs: Any) -> Tensor:
    return class_features(encoder, names, Prompts(tuple(templates)), **kwargs)  # type: ignore[arg-type]


def test_equal_names_have_equal_features() -> None:
    # ImageNet has two such pairs. Equal names must have equal features, however the rows of a batch are rounded.
    names = ["missile", "crane", "sunglasses", "missile", "crane"]
    for templates in (["a {}."], ["a {}.", "the {}.", "{}"]):
        features = features_of(Encoder(), names, templates)
        assert features.shape == (5, 8)
        assert torch.equal(features[0], features[3])
        assert torch.equal(features[1], features[4])
        assert not torch.equal(features[0], features[1])


def test_prompts_are_encoded_in_chunks_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    names, templates = [f"thing {index}" for index in range(7)], ["a {}.", "the {}."]
    whole = features_of(Encoder(), names, templates)
    monkeypatch.setattr(module, "TEXT_BATCH_SIZE", 4)
    encoder = Encoder()
    told: list[int] = []
    torch.testing.assert_close(features_of(encoder, names, templates, progress=told.append), whole)
    assert told == [len(batch) for batch in encoder.batches] == [4, 4, 4, 2]


def test_the_cache_serves_the_same_names_templates_and_model_only(tmp_path: Path) -> None:
    first = Encoder()
    features = features_of(first, ["a", "b"], ["{}."], cache_dir=tmp_path)
    again = Encoder()
    assert torch.equal(features_of(again, ["a", "b"], ["{}."], cache_dir=tmp_path), features)
    assert again.batches == []
    low = Encoder()
    low.precision = "bfloat16"
    for encoder, names, templates in (
        (Encoder("other weights"), ["a", "b"], ["{}."]),
        (low, ["a", "b"], ["{}."]),
        (Encoder(), ["b", "a"], ["{}."]),
        (Encoder(), ["a", "b"], ["{}!"]),
        # These are the same characters in other names.
        (Encoder(), ["a", "b", "{}."], ["{}."]),
    ):
        features_of(encoder, names, templates, cache_dir=tmp_path)
        assert encoder.batches
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["torn", "value", "shape", "dtype", "key"])
def test_a_damaged_cache_is_written_again(tmp_path: Path, damage: str) -> None:
    features = features_of(Encoder(), ["a", "b"], ["{}."], cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    match damage:
        case "torn":
            path.write_bytes(path.read_bytes()[:-5])
        case "value":
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 0x40  # the highest exponent bit of the last value
            path.write_bytes(raw)
        case "shape":
            save_file({"features": features[:1].contiguous()}, path)
        case "dtype":
            save_file({"features": features.double()}, path)
        case _:
            save_file({"other": features}, path)
    again = features_of(Encoder(), ["a", "b"], ["{}."], cache_dir=tmp_path)
    for found in (again, load_file(path)["features"]):
        # torch.equal does not compare the dtype.
        assert found.dtype == torch.float32
        assert torch.equal(found, features)
    assert list(tmp_path.iterdir()) == [path]


def test_no_names_have_no_features() -> None:
    with pytest.raises(UserError, match="K = 0"):
        features_of(Encoder(), [], ["{}."])
    with pytest.raises(UserError, match="templates must hold at least one template"):
        features_of(Encoder(), ["a"], [])


def test_braces_in_a_name_are_left_alone() -> None:
    # str.format would act on them.
    encoder = Encoder()
    features_of(encoder, ["{0.__class__}"], ["a {}."])
    assert encoder.batches == [["a {0.__class__}."]]


def test_templates_and_descriptions_are_averaged_at_unit_norm(tmp_path: Path) -> None:
    path = tmp_path / "described.json"
    path.write_text('{"cat": ["It purrs.", "A {} sleeps."], "dog": ["It barks."]}')
    encoder = Encoder()
    features = class_features(encoder, ["cat", "dog"], resolve_prompts(["a {}.", str(path)]))  # type: ignore[arg-type]
    assert encoder.batches == [["a cat.", "It purrs.", "A cat sleeps.", "a dog.", "It barks."]]
    encoded = Encoder().encode_texts(encoder.batches[0])
    torch.testing.assert_close(features[0], normalize(encoded[:3].mean(0), dim=-1))
    torch.testing.assert_close(features[1], normalize(encoded[3:].mean(0), dim=-1))


def test_names_that_the_model_cannot_tell_apart_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    class TruncatingEncoder(Encoder):
        def encode_texts(self, texts: list[str]) -> Tensor:
            return super().encode_texts([text.lower()[:40] for text in texts])

    names = ["crane", "Crane", "x" * 100 + "a", "x" * 100 + "b", "missile", "missile"]
    with notices.collecting():
        features_of(TruncatingEncoder(), names, ["a photo of a {}."])
        (warning,) = notices.so_far()
    assert warning.startswith("4 of 6 classes have the same text feature as another and cannot be told apart, such as")
    assert "'crane' and 'Crane'" in warning
    with notices.collecting():
        features_of(Encoder(), names, ["a photo of a {}."])
        assert notices.so_far() == []


def test_equal_features_from_the_cache_are_warned_of_again(tmp_path: Path) -> None:
    class ConstantEncoder(Encoder):
        def encode_texts(self, texts: list[str]) -> Tensor:
            return super().encode_texts(["" for _ in texts])

    for _ in range(2):
        with notices.collecting():
            features_of(ConstantEncoder(), [f"name {index}" for index in range(40)], ["{}."], cache_dir=tmp_path)
            (warning,) = notices.so_far()
            assert warning.startswith("40 of 40 classes have the same text feature")


@pytest.mark.parametrize("model", ["embedded", "ViT-B-32"])
def test_names_longer_than_a_prompt_are_warned_of(model: str) -> None:
    import open_clip

    from rada_fast.embedded.model import WordTokenizer

    class Tokenizing(Encoder):
        tokenizer = WordTokenizer() if model == "embedded" else open_clip.get_tokenizer(model)

    def warnings_of(names: list[str], template: str = "a photo of a {}.") -> list[str]:
        with notices.collecting():
            warn_of_cut_names(Tokenizing(), names, Prompts((template,)))  # type: ignore[arg-type]
            return notices.so_far()

    words = " ".join(["word"] * 100)
    (warning,) = warnings_of(["cat", f"{words} one", f"{words} two"])
    assert warning.startswith("2 of 3 class names are too long: of a prompt such as 'a photo of a {}.' the model reads")
    assert "word one'" in warning
    # A prompt has at most 20 or 77 tokens. Two of them mark its ends; four, or five with the dot, are the template's.
    # With one word too many, open_clip's tokenizer drops only the dot.
    longest = " ".join(["word"] * (14 if model == "embedded" else 70))
    assert warnings_of([longest, "great white shark", "*" * 30]) == []
    assert len(warnings_of([f"{longest} word word"])) == 1
    assert len(warnings_of(["cat"], "{}, " + words)) == 1
