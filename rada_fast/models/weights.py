"""Open_clip's models by their names: their weights, tokenizers and preprocessing, and clear errors and warnings."""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models.protocol import ModelParts

EMBEDDED = "embedded"
RANDOM = "random"
_QUICK_GELU = "-quickgelu"
"""The ending of the names of open_clip's models with the activation QuickGELU."""


def is_tag(name: str, pretrained: str) -> bool:
    """Return whether open_clip can download weights of that name for a model."""
    if name == EMBEDDED:
        return False
    import open_clip

    return pretrained in open_clip.list_pretrained_tags_by_model(name)


def parts_of(name: str, pretrained: str | None, seed: int) -> ModelParts:
    """Make a model of open_clip. See load_model for the arguments and the errors."""
    import open_clip

    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
        advice = f"; close: {', '.join(close)}" if close else ""
        raise UserError(f"model {name!r} is neither one of open_clip's nor 'embedded'{advice}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise UserError(
            f"model {name} needs --pretrained: a tag ({', '.join(tags[:6]) or 'it has none'}), a weights file, "
            f'or "{RANDOM}" to try the machinery without weights'
        )
    if pretrained != RANDOM and pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise UserError(
            f"pretrained {pretrained!r} is neither a file nor a tag of {name} ({', '.join(tags) or 'it has none'})"
        )
    model = _create(name, pretrained, seed)
    config = model.visual.preprocess_cfg
    size = config["size"]
    preprocess = Preprocess(
        size if isinstance(size, int) else int(size[0]),
        tuple(config["mean"]),
        tuple(config["std"]),
        "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        "squash" if config["resize_mode"] == "squash" else "shortest",
    )
    try:
        with _quiet_log():
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a tokenizer of another library may be missing or impossible to download
        raise UserError(f"model {name}: its tokenizer cannot be made: {_one_line(error)}") from None
    return ModelParts(model, tokenizer, preprocess, name)


def _create(name: str, pretrained: str, seed: int) -> Any:
    """Make a model of open_clip with weights. Its errors and warnings become one line each."""
    import open_clip

    if pretrained == RANDOM:
        try:
            with _quiet_log(), torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
                torch.default_generator.manual_seed(seed)
                return open_clip.create_model(name, pretrained_text=False)
        except Exception as error:  # a text encoder of another library may be missing or impossible to download
            raise UserError(f"model {name} cannot be built: {_one_line(error)}") from None
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(name)
    source = pretrained if is_tag else str(Path(pretrained).expanduser())
    record = _record_of_tag(name, pretrained) if is_tag else _record_of_file(name, Path(source))
    if record is not None:
        _warn_of_quick_gelu(name, source, bool(record.get("quick_gelu", False)))
    elif any("openai" in re.split(r"[^a-z0-9]", part.lower()) for part in Path(source).parts[-2:]):
        # All of OpenAI's weights were trained with QuickGELU, whatever model they are loaded into.
        _warn_of_quick_gelu(name, source, True)
    try:
        with _quiet_log(), warnings.catch_warnings():
            # A clearer warning was given above, and an archive that cannot be loaded becomes an error below.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*looks like a TorchScript archive", category=UserWarning)
            return open_clip.create_model(
                name,
                pretrained=source,
                weights_only=True,
                force_preprocess_cfg=None if is_tag else _preprocess_of_file(name, record),
            )
    except Exception as error:  # a damaged or hostile file, or a hub that cannot be reached, may raise anything
        reason = _one_line(error)
    if is_tag and "Failed to download" in reason:
        raise UserError(
            f"pretrained {pretrained!r} of {name} could not be downloaded; fetch it where there is a network and "
            f"give the file instead ({reason})"
        )
    if "TorchScript" in reason:
        reason = " without executing code: it is a TorchScript archive; save its state_dict as safetensors"
    # PyTorch's own message would advise the user to load the file without this protection.
    elif "weights_only" in reason or "allow_pickle" in reason:
        reason = " without executing code: it is damaged, or holds more than plain tensors"
    elif "loading state_dict" in reason:
        reason = f", its tensors do not fit: {reason}"
    else:
        reason = f": {reason}"
    raise UserError(f"pretrained {'weights' if is_tag else 'file'} {source} does not load into {name}{reason}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _record_of_tag(name: str, tag: str) -> dict[str, Any]:
    """Return open_clip's record of the weights of a tag: their activation, preprocessing and origin."""
    from open_clip.pretrained import get_pretrained_cfg

    return dict(get_pretrained_cfg(name, tag))


def _record_of_file(name: str, path: Path) -> dict[str, Any] | None:
    """Return the record of the tag whose repository or name occurs in the path of the file, or None."""
    import open_clip

    base = name.removesuffix(_QUICK_GELU)
    records = {
        tag: _record_of_tag(model, tag)
        for model in (base, base + _QUICK_GELU)
        for tag in open_clip.list_pretrained_tags_by_model(model)
    }
    folders = {part.lower() for part in path.absolute().parent.parts}
    for record in records.values():
        owner, _, repository = str(record.get("hf_hub") or "").lower().partition("/")
        repository = repository.partition("/")[0]
        if repository and folders & {repository, f"models--{owner}--{repository}"}:
            return record
    # The longest names come first, because "dfn2b_s39b" contains "dfn2b", which is another tag.
    for tag in sorted(records, key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9])", path.name.lower().replace("-", "_")):
            return records[tag]
    return None


def _preprocess_of_file(name: str, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the preprocessing for the weights in a file: that of its record, or what all tags of a model share.

    open_clip itself uses the statistics of OpenAI for every file, which are wrong for SigLIP and some other models.
    """
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    records = (
        [record]
        if record is not None
        else [_record_of_tag(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    )
    found = [{key: known[key] for key in keys if known.get(key) is not None} for known in records]
    return found[0] if found and all(one == found[0] for one in found) else None


def _warn_of_quick_gelu(name: str, pretrained: str, wants: bool) -> None:
    """Warn if the weights were trained with another activation than that of the model."""
    import open_clip

    has = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if wants == has:
        return
    twin = name.removesuffix(_QUICK_GELU) if has else name + _QUICK_GELU
    advice = f"; use {twin}" if twin != name and twin in open_clip.list_models() else ""
    trained, built = ("QuickGELU", "GELU") if wants else ("GELU", "QuickGELU")
    warnings.warn(
        f"QuickGELU mismatch: the weights {pretrained} were trained with {trained}, the model {name} has {built}, "
        f"which quietly costs accuracy{advice}",
        UserWarning,
        stacklevel=4,
    )


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Suppress the log lines of open_clip. Their important contents become errors or warnings of this program."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


def parts_of_embedded(pretrained: str | None) -> ModelParts:
    """Read the model that is shipped. Raises UserError if other weights are asked for."""
    from rada_fast.embedded import model as embedded
    from rada_fast.embedded.world import IMAGE_SIZE

    if pretrained is not None:
        raise UserError(f"pretrained must be left out for the embedded model, or name a run of fft, got {pretrained!r}")
    model, tokenizer = embedded.load()
    return ModelParts(model, tokenizer, Preprocess(IMAGE_SIZE, embedded.MEAN, embedded.STD), EMBEDDED)
