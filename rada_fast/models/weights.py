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
from torch import Tensor

from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models.openai_archive import NUMBERS, architecture_of, is_archive, read_archive
from rada_fast.models.protocol import ModelParts, Tokenizer

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
        close = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.6)
        advice = f"; close: {', '.join(close)}" if close else ""
        raise UserError(
            f"pretrained {pretrained!r} is neither a file nor a tag of {name} "
            f"({', '.join(tags) or 'it has none'}){advice}"
        )
    if pretrained != RANDOM and pretrained not in tags and is_archive(Path(pretrained).expanduser()):
        model = _of_archive(name, Path(pretrained).expanduser())
    else:
        model = _create(name, pretrained, seed)
    return ModelParts(model, tokenizer_of(name), preprocess_of(model), name)


def preprocess_of(model: Any) -> Preprocess:
    """Return the form in which a model of open_clip expects images."""
    config = model.visual.preprocess_cfg
    size = config["size"]
    return Preprocess(
        size if isinstance(size, int) else int(size[0]),
        tuple(config["mean"]),
        tuple(config["std"]),
        "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        "squash" if config["resize_mode"] == "squash" else "shortest",
    )


def tokenizer_of(name: str, schema: str = "", **options: Any) -> Tokenizer:
    """Make the tokenizer of a model of open_clip. Raises UserError if a library or a file for it is missing.

    name: the model; schema: what open_clip wants before the name; options: those of open_clip's get_tokenizer.
    """
    import open_clip

    try:
        with quiet_log():
            tokenizer: Tokenizer = open_clip.get_tokenizer(schema + name, **options)
    except Exception as error:  # a tokenizer of another library may be missing or impossible to download
        advice = ""
        if not schema:
            advice = "; where there is no network, give the folder of the model as --model openclip:DIR"
        if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            advice = "; pip install 'rada_fast[transformers]'"
        raise UserError(f"model {name}: its tokenizer cannot be made: {one_line(error)}{advice}") from None
    return tokenizer


def _of_archive(name: str, path: Path) -> Any:
    """Make a model of open_clip with the weights of a TorchScript archive, as OpenAI publishes them."""
    state, is_openai = read_state_of_archive(path, f"into {name}")
    if is_openai:
        _warn_of_quick_gelu(name, str(path), True)
    model = _random(name, seed=0)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = f", its tensors do not fit: {one_line(error)}"
        raise UserError(f"pretrained file {path} does not load into {name}{reason}{_twins(state, name)}") from None
    return model


def read_state_of_archive(path: Path, where: str) -> tuple[dict[str, Tensor], bool]:
    """Read the weights of a TorchScript archive in float32, and whether OpenAI made it. where: words for the message.

    Raises UserError if the file is damaged or holds anything but tensors.
    """
    try:
        state = read_archive(path)
    except ValueError as error:
        raise UserError(
            f"pretrained file {path} does not load {where} without executing code: {one_line(error)}"
        ) from None
    is_openai = all(name in state for name in NUMBERS)
    # The mask of the causal attention is no weight: a model makes its own.
    state = {name: x for name, x in state.items() if name not in NUMBERS and name.rpartition(".")[2] != "attn_mask"}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, is_openai


def _twins(state: dict[str, Tensor], name: str) -> str:
    """Return a sentence with the models of open_clip that the weights fit, if their shapes tell this."""
    import open_clip

    found = architecture_of(state)
    if found is None:
        return ""
    names = [
        other for other in open_clip.list_models()
        if other != name and _is_architecture(open_clip.get_model_config(other) or {}, found)
    ]  # fmt: skip
    return f"; they fit the model {' or '.join(names)}" if names else ""


def _is_architecture(config: dict[str, Any], found: dict[str, Any]) -> bool:
    """Return whether a configuration of open_clip has the sizes of an architecture."""
    defaults: dict[str, dict[str, Any]] = {"vision_cfg": {"patch_size": None}, "text_cfg": {}}
    return config.get("embed_dim") == found["embed_dim"] and all(
        {**default, **config.get(part, {})}.get(key) == value
        for part, default in defaults.items()
        for key, value in found[part].items()
        if key != "heads"
    )


def _random(name: str, seed: int) -> Any:
    """Make a model of open_clip with random weights, which depend on the seed alone."""
    import open_clip

    try:
        with quiet_log(), torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
            torch.default_generator.manual_seed(seed)
            return open_clip.create_model(name, pretrained_text=False)
    except Exception as error:  # a text encoder of another library may be missing or impossible to download
        raise UserError(f"model {name} cannot be built: {one_line(error)}") from None


def _create(name: str, pretrained: str, seed: int) -> Any:
    """Make a model of open_clip with weights. Its errors and warnings become one line each."""
    import open_clip

    if pretrained == RANDOM:
        return _random(name, seed)
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(name)
    source = pretrained if is_tag else str(Path(pretrained).expanduser())
    record = _record_of_tag(name, pretrained) if is_tag else _record_of_file(name, Path(source))
    if record is not None:
        _warn_of_quick_gelu(name, source, bool(record.get("quick_gelu", False)))
    elif any("openai" in re.split(r"[^a-z0-9]", part.lower()) for part in Path(source).parts[-2:]):
        # All of OpenAI's weights were trained with QuickGELU, whatever model they are loaded into.
        _warn_of_quick_gelu(name, source, True)
    try:
        with quiet_log(), warnings.catch_warnings():
            # A clearer warning was given above.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch", category=UserWarning)
            return open_clip.create_model(
                name,
                pretrained=source,
                weights_only=True,
                force_preprocess_cfg=None if is_tag else _preprocess_of_file(name, record),
            )
    except Exception as error:  # a damaged or hostile file, or a hub that cannot be reached, may raise anything
        reason = one_line(error)
    if is_tag and "Failed to download" in reason:
        raise UserError(
            f"pretrained {pretrained!r} of {name} could not be downloaded; fetch it where there is a network and "
            f"give the file instead ({reason})"
        )
    # PyTorch's own message would advise the user to load the file without this protection.
    if "weights_only" in reason or "allow_pickle" in reason:
        reason = " without executing code: it is damaged, or holds more than plain tensors"
    elif "loading state_dict" in reason:
        reason = f", its tensors do not fit: {reason}"
        with quiet_log():
            reason += _twins(open_clip.factory.load_state_dict(source), name) if not is_tag else ""
    else:
        reason = f": {reason}"
    raise UserError(f"pretrained {'weights' if is_tag else 'file'} {source} does not load into {name}{reason}")


def one_line(error: Exception) -> str:
    """Return the message of an error of another library on one line of bounded length."""
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
def quiet_log() -> Iterator[None]:
    """Suppress the log lines of open_clip. Their important contents become errors or warnings of this program."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
