"""Vision-language models: one of open_clip's, the embedded one, or the absence of one where a run needs none."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rada_fast import _env
from rada_fast.config.options import ModelOptions
from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models.trained import MOST_STARTS, TrainedRun, open_run
from rada_fast.system import notices

Precision = Literal["float32", "bfloat16", "float16"]

EMBEDDED = "embedded"
RANDOM = "random"
_QUICK_GELU = "-quickgelu"
"""What open_clip adds to a model's name for its twin with the other activation."""


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """The precision that a device computes in: float32, with a warning, for a type that a CPU has no instructions for.

    PyTorch's own products of such a type are hundreds of times slower than float32's, and less exact.
    """
    if device.type != "cpu" or _env.has_native_products(asked):
        return asked
    notices.warn(
        f"--precision {asked}: this processor has no instructions for {asked} products, so the encoders compute in "
        "float32, which is faster here"
    )
    return "float32"


class VisionLanguageModel:
    """A frozen image and text encoder pair.

    name, pretrained: what was loaded; model: the open_clip module; tokenizer: texts to token ids; preprocess: how the
    image encoder wants its images; embed_dim: D; device, precision: where and how the encoders compute;
    precision_asked: how they were to, which differs where precision_on says so; fingerprint: hash of name and weights
    as loaded; trained: the run of fft that trained the image encoder, or None.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Preprocess,
        *,
        device: torch.device,
        precision: Precision,
        trained: TrainedRun | None = None,
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.trained = trained
        self.fingerprint = _fingerprint(name, model)
        model.requires_grad_(False).eval().to(device)
        self.model = cast(Any, model)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.device = device
        self.precision_asked: Precision = precision
        self.precision: Precision = precision_on(device, precision)
        with torch.no_grad():
            # Asked of the model itself: no table of widths can fall behind open_clip.
            probe = self.model.encode_text(tokenizer(["a"]).to(device))
        self.embed_dim = int(probe.shape[-1])

    @property
    def logit_scale(self) -> float:
        """The multiplier s = exp(model.logit_scale). Raises UserError where it is no finite number."""
        scale = float(self.model.logit_scale.detach().double().exp())
        if not math.isfinite(scale):
            raise UserError(f"model {self.name} has the logit scale {scale}: its weights {self.pretrained} are damaged")
        return scale

    def loaded(self) -> Self:
        """The model itself; where a run has none, AbsentModel refuses here."""
        return self

    def stated_scale(self) -> tuple[float, str] | None:
        """The multiplier s that the model brings, and its name for a message."""
        return self.logit_scale, f"model {self.name}"

    def check_width(self, width: int, what: str) -> None:
        """Raise UserError where features are not as wide as those of this model. what: what a message
        calls them."""
        if width != self.embed_dim:
            raise UserError(f"{what} of width {width}, model {self.name} makes features of width {self.embed_dim}")

    def facts(self) -> dict[str, Any] | None:
        """What a summary says about the model."""
        names = ("name", "pretrained", "fingerprint", "precision", "precision_asked")
        return {name: getattr(self, name) for name in names}

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self.precision == "float32":
            yield
            return
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
            yield

    def image_features_with_grad(self, images: Tensor) -> Tensor:
        """Unit-norm features (N, D) float32 of images (N, 3, S, S), with gradients to an encoder that asks for them."""
        with self._arithmetic():
            features = self.model.encode_image(images.to(self.device))
        return normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Tensor, ids: Sequence[str] = ()) -> Tensor:
        """Unit-norm features (N, D) float32 of normalised images (N, 3, S, S) float32.

        ids: what the images are called, or one name for all of them. Raises UserError, naming the first image whose
        features are no numbers.
        """
        features = self.image_features_with_grad(images)
        self.check_features(features, "image", ids)
        return features

    def check_features(self, features: Tensor, kind: str, names: Sequence[str]) -> None:
        """Raise UserError where encoded features (N, D) are no numbers, or nothing but zeros.

        kind: image or text; names: what they are of, or one name for all. Such a feature would make every number after
        it meaningless. In float16 a sound encoder can overflow.
        """
        bad = ~features.detach().isfinite().all(dim=-1) | (features.detach() == 0).all(dim=-1)  # (N,)
        if not bool(bad.any()):
            return
        index = int(bad.nonzero()[0])
        name = names[index if len(names) > 1 else 0] if names else f"{index + 1} of {len(features)}"
        what = "NaN" if not bool(features[index].isfinite().all()) else "all zero"
        advice = "give --precision float32"
        if self.precision == "float32":
            advice = f"the weights {self.pretrained or self.name} are damaged, or do not fit"
        elif self.precision == "float16":
            advice += " or bfloat16"
        raise UserError(
            f"features of {kind} {name!r} are {what} in {self.precision}, and {int(bad.sum())} of {len(bad)} encoded "
            f"with it: {advice}"
        )

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm features (N, D) float32. Raises UserError, naming the first text whose features are no numbers."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        with self._arithmetic():
            features = normalize(self.model.encode_text(tokens).float(), dim=-1)
        self.check_features(features, "text", texts)
        return features


@dataclass(frozen=True)
class AbsentModel:
    """The model of a run that encodes neither images nor prompts, because files hold the features of both.

    It answers what a run asks of every model. device, precision: as the options ask for them.
    """

    device: torch.device
    precision: Precision
    fingerprint: None = None

    def loaded(self) -> NoReturn:
        """Raise UserError, as there is nothing that could encode."""
        raise UserError("data must be images to be encoded by a model, got feature files")

    def stated_scale(self) -> None:
        """The multiplier s that the model brings: none."""

    def check_width(self, width: int, what: str) -> None:
        """Accept features of any width, as there are none of a model that they would have to fit."""

    def facts(self) -> None:
        """What a summary says about the model: nothing."""


Model = VisionLanguageModel | AbsentModel


def open_model(options: ModelOptions, *, needed: bool, seed: int) -> Model:
    """The model that the options ask for, on its device, or an AbsentModel where none is needed.

    seed: of random weights.

    Raises UserError where the device does not exist or the model cannot be loaded.
    """
    device = resolve_device(options.device)
    if not needed:
        return AbsentModel(device, options.precision)
    return load_model(options.model, options.pretrained, device=device, precision=options.precision, seed=seed)


def resolve_device(name: str) -> torch.device:
    """The device that an option names. Raises UserError where there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if _env.has_cuda() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda" and not _env.has_cuda():
        raise UserError(f"device {name!r} was asked for, but PyTorch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= _env.cuda_device_count():
        raise UserError(f"device {name!r} was asked for, but PyTorch sees {_env.cuda_device_count()} CUDA devices here")
    return device


def _fingerprint(name: str, model: nn.Module) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_model(
    name: str,
    pretrained: str | None = None,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    seed: int = 0,
) -> VisionLanguageModel:
    """Load a frozen model.

    name: "embedded", or a model of open_clip; pretrained: a hub tag, a local weights file (never executed: safetensors,
    or a torch file of plain tensors), a run of fft whose image encoder takes the place of the model's, or "random";
    seed: of random weights.

    Raises UserError where the name is unknown, weights are not named, cannot be had, or do not fit the model.
    """
    runs = _runs_behind(name, pretrained)
    start, start_seed = (runs[-1].pretrained, runs[-1].seed) if runs else (pretrained, seed)
    model, tokenizer, preprocess = _parts_of_embedded(start) if name == EMBEDDED else _parts_of(name, start, start_seed)
    if (
        runs
        and len({run.fingerprint for run in runs}) == 1
        and runs[0].fingerprint not in (None, _fingerprint(name, model))
    ):
        notices.warn(f"pretrained {pretrained}: the weights {start or name} that it started from are others today")
    trained = next((run for run in runs if run.trained_encoder), None)
    if trained is not None:
        trained.put_encoder_into(model)
    return VisionLanguageModel(
        name,
        pretrained,
        model,
        tokenizer,
        preprocess,
        device=torch.device(device),
        precision=precision,
        trained=trained,
    )


Parts = tuple[nn.Module, Callable[[list[str]], Tensor], Preprocess]
"""A model with its weights, its tokenizer, and how it wants its images."""


def _runs_behind(name: str, pretrained: str | None) -> list[TrainedRun]:
    """The run that --pretrained names, the one that it started from, and so on; empty for weights of other kinds."""
    runs: list[TrainedRun] = []
    while pretrained is not None and pretrained != RANDOM and len(runs) < MOST_STARTS:
        path = Path(pretrained)
        run = open_run(path) if (path.is_dir() or path.is_file()) and not _is_tag(name, pretrained) else None
        if run is None:
            break
        if run.model != name:
            raise UserError(f"pretrained {pretrained} was trained from the model {run.model}: give --model {run.model}")
        runs.append(run)
        pretrained = run.pretrained
    return runs


def _is_tag(name: str, pretrained: str) -> bool:
    if name == EMBEDDED:
        return False
    import open_clip

    return pretrained in open_clip.list_pretrained_tags_by_model(name)


def _parts_of(name: str, pretrained: str | None, seed: int) -> Parts:
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
    except Exception as error:  # tokenizers of other libraries: not installed, or not to be downloaded
        raise UserError(f"model {name}: its tokenizer cannot be made: {_one_line(error)}") from None
    return model, tokenizer, preprocess


def _create(name: str, pretrained: str, seed: int) -> Any:
    """open_clip's model with weights; its own complaints become one line each."""
    import open_clip

    if pretrained == RANDOM:
        try:
            with _quiet_log(), torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed every CUDA device too, and nothing would put their states back.
                torch.default_generator.manual_seed(seed)
                return open_clip.create_model(name, pretrained_text=False)
        except Exception as error:  # text towers of other libraries: not installed, or not to be downloaded
            raise UserError(f"model {name} cannot be built: {_one_line(error)}") from None
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(name)
    source = pretrained if is_tag else str(Path(pretrained).expanduser())
    record = _record_of_tag(name, pretrained) if is_tag else _record_of_file(name, Path(source))
    if record is not None:
        _warn_of_quick_gelu(name, source, bool(record.get("quick_gelu", False)))
    elif any("openai" in re.split(r"[^a-z0-9]", part.lower()) for part in Path(source).parts[-2:]):
        # All of OpenAI's own weights were trained with it, whatever model they are given to.
        _warn_of_quick_gelu(name, source, True)
    try:
        with _quiet_log(), warnings.catch_warnings():
            # Said above with the name to use, and below as an error.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*looks like a TorchScript archive", category=UserWarning)
            return open_clip.create_model(
                name,
                pretrained=source,
                weights_only=True,
                force_preprocess_cfg=None if is_tag else _preprocess_of_file(name, record),
            )
    except Exception as error:  # a damaged or hostile file, or a hub out of reach, can fail in any way
        reason = _one_line(error)
    if is_tag and "Failed to download" in reason:
        raise UserError(
            f"pretrained {pretrained!r} of {name} could not be downloaded; fetch it where there is a network and "
            f"give the file instead ({reason})"
        )
    if "TorchScript" in reason:
        reason = " without executing code: it is a TorchScript archive; save its state_dict as safetensors"
    # PyTorch's own text goes on to advise loading without the safeguard.
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
    """What open_clip knows of a tag's weights: activation, preprocessing, where they come from."""
    from open_clip.pretrained import get_pretrained_cfg

    return dict(get_pretrained_cfg(name, tag))


def _record_of_file(name: str, path: Path) -> dict[str, Any] | None:
    """The record of the tag whose hub repository or name is in the file's path, or None where nothing says it."""
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
    # The longest first: "dfn2b_s39b" holds "dfn2b", and they differ.
    for tag in sorted(records, key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9])", path.name.lower().replace("-", "_")):
            return records[tag]
    return None


def _preprocess_of_file(name: str, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """How a file's images want to be prepared: as its record says, or as all of the model's tags agree.

    open_clip itself takes OpenAI's statistics for every file, which SigLIP's and others' weights do not want.
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
    """Warn where the weights were trained with the other activation than the model has."""
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
    """Keep open_clip's log lines off the terminal: what matters in them becomes an error or a warning of ours."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


def _parts_of_embedded(pretrained: str | None) -> Parts:
    from rada_fast.embedded import model as embedded
    from rada_fast.embedded.world import IMAGE_SIZE

    if pretrained is not None:
        raise UserError(f"pretrained must be left out for the embedded model, or name a run of fft, got {pretrained!r}")
    model, tokenizer = embedded.load()
    return model, tokenizer, Preprocess(IMAGE_SIZE, embedded.MEAN, embedded.STD)
