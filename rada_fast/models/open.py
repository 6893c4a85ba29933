"""Open what --model and --pretrained name: the shipped model, one of open_clip's by its name, or KIND:PATH.

A model that is given as KIND:PATH describes itself: its files hold the architecture, the weights and, but for OpenAI's,
the tokenizer and the preprocessing. Nothing is downloaded for it, and no code in its files is executed.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models import weights
from rada_fast.models.descriptions import read_json
from rada_fast.models.openai_archive import architecture_of, is_archive
from rada_fast.models.protocol import ModelParts
from rada_fast.models.weights import EMBEDDED

KINDS = {
    "openai": "openai:FILE.pt, weights that OpenAI published",
    "openclip": "openclip:DIR, a folder with open_clip_config.json and weights",
    "transformers": "transformers:DIR, a folder with config.json and weights",
}
"""The kinds of models that are files, with the words for them in a message."""


def open_parts(name: str, pretrained: str | None, seed: int) -> ModelParts:
    """Make the model that two options name. See load_model for the arguments and the errors."""
    if name == EMBEDDED:
        return _embedded(pretrained)
    kind, colon, place = name.partition(":")
    if not colon:
        return weights.parts_of(name, pretrained, seed)
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.3)
        advice = f"; {close[0]}:{place} is close" if close else ""
        raise UserError(f"model {name!r} must be a name or one of {', '.join(KINDS.values())}{advice}")
    if pretrained is not None:
        raise UserError(
            f"pretrained must be left out for the model {name}, which has its own weights, or name a run of fft, "
            f"got {pretrained!r}"
        )
    path = Path(place).expanduser()
    wanted, exists = ("file", path.is_file()) if kind == "openai" else ("folder", path.is_dir())
    if not exists:
        raise UserError(f"model {name}: there is no {wanted} {path}{_close_file(path)}")
    match kind:
        case "openai":
            return _of_openai(name, path)
        case "openclip":
            return _of_openclip(name, path)
    from rada_fast.models.transformers_models import parts_of_folder

    return parts_of_folder(name, path)


def _close_file(path: Path) -> str:
    """Return words for the file or folder beside a missing path whose name is closest to it."""
    try:
        beside = [other.name for other in path.parent.iterdir()]
    except OSError:
        return f", nor a folder {path.parent}"
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    return f"; close: {path.parent / close[0]}" if close else ""


def _embedded(pretrained: str | None) -> ModelParts:
    from rada_fast.embedded import model as embedded
    from rada_fast.embedded.world import IMAGE_SIZE

    if pretrained is not None:
        raise UserError(f"pretrained must be left out for the embedded model, or name a run of fft, got {pretrained!r}")
    model, tokenizer = embedded.load()
    return ModelParts(model, tokenizer, Preprocess(IMAGE_SIZE, embedded.MEAN, embedded.STD), EMBEDDED)


def _of_openai(name: str, path: Path) -> ModelParts:
    """Make the CLIP of OpenAI that the shapes of the weights in a file describe."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if not is_archive(path):
        raise UserError(
            f"model {name} must be a TorchScript archive, as OpenAI publishes; for other weights give the model by its "
            "name, and the file as --pretrained"
        )
    state, _ = weights.read_state_of_archive(path, "as a model of OpenAI")
    architecture = architecture_of(state)
    if architecture is None:
        raise UserError(f"model {name}: its {len(state)} tensors are not those of a CLIP of OpenAI")
    words = architecture["text_cfg"]["vocab_size"]
    if words != (known := len(open_clip.tokenizer.SimpleTokenizer().encoder)):
        raise UserError(f"model {name} has {words} tokens, CLIP's tokenizer {known}")
    try:
        with torch.random.fork_rng(devices=[]):
            # All of OpenAI's weights were trained with QuickGELU.
            model = open_clip.CLIP(
                architecture["embed_dim"],
                CLIPVisionCfg(**architecture["vision_cfg"]),
                CLIPTextCfg(**architecture["text_cfg"]),
                quick_gelu=True,
            )
        model.load_state_dict(state)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"model {name}: its tensors do not fit one another: {weights.one_line(error)}") from None
    size = architecture["vision_cfg"]["image_size"]
    preprocess = Preprocess(size, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    tokenizer = open_clip.SimpleTokenizer(context_length=architecture["text_cfg"]["context_length"])
    return ModelParts(model, tokenizer, preprocess, f"openai {json.dumps(architecture, sort_keys=True)}")


def _of_openclip(name: str, path: Path) -> ModelParts:
    """Make the model that open_clip has written to a folder."""
    import open_clip

    config = _openclip_config(name, path)
    try:
        with weights.quiet_log():
            model = open_clip.create_model(f"local-dir:{path}", weights_only=True, require_pretrained=True)
    except Exception as error:  # damaged files may raise anything
        reason = weights.one_line(error)
        if "weights_only" in reason or "allow_pickle" in reason:
            reason = "its weights do not load without executing code: they are damaged, or more than plain tensors"
        elif "Required pretrained weights" in reason:
            reason = "the folder has no weights, such as open_clip_model.safetensors"
        raise UserError(f"model {name}: {reason}") from None
    options = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
    tokenizer = weights.tokenizer_of(str(path), schema="local-dir:", **options)
    return ModelParts(model, tokenizer, weights.preprocess_of(model), f"openclip {json.dumps(config, sort_keys=True)}")


def _openclip_config(name: str, path: Path) -> dict[str, Any]:
    """Read the configuration of a model in a folder. Raises UserError for one that would need code or a network."""
    config = read_json(name, path / "open_clip_config.json").get("model_cfg")
    parts = [config.get(part) if isinstance(config, dict) else None for part in ("vision_cfg", "text_cfg")]
    if not isinstance(config, dict) or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"model {name}: open_clip_config.json has no model_cfg with vision_cfg and text_cfg")
    vision, text = parts
    assert vision is not None
    assert text is not None
    reasons = {
        "a text encoder of transformers": text.get("hf_model_name"),
        "weights from a network": vision.get("timm_model_pretrained") or ":" in str(vision.get("timm_model_name")),
        "code of its own": "trust_remote_code" in (text.get("tokenizer_kwargs") or {}),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(f"model {name}: open_clip_config.json asks for {reason}, which is not read from a folder")
    return config
