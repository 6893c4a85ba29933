"""Vision-language models: those of open_clip, the embedded one, and AbsentModel for a run that needs none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from rada_fast import _env
from rada_fast.config.options import ModelOptions
from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models.image_encoder import ImageEncoder, reason_not_served
from rada_fast.models.open import open_parts
from rada_fast.models.protocol import Tokenizer, Tower, image_tower, text_tower
from rada_fast.models.trained import MAX_CHAINED_RUNS, TrainedRun, open_run
from rada_fast.models.weights import RANDOM, is_tag
from rada_fast.system import memory, notices, ranks
from rada_fast.system.ranks import Ranks

Precision = Literal["float32", "bfloat16", "float16"]


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """Return the precision in which a device computes.

    It is the one that was asked for, unless a CPU has no instructions for its products. Then it is float32, with a
    warning, because PyTorch's emulation of such products is hundreds of times slower and less exact.
    """
    if device.type != "cpu" or _env.has_native_products(asked):
        return asked
    notices.warn(
        f"--precision {asked}: this processor has no instructions for {asked} products, so the encoders compute in "
        "float32, which is faster here"
    )
    return "float32"


class VisionLanguageModel:
    """A frozen pair of an image encoder and a text encoder.

    name, pretrained: the name of the model, and the name or the file of its weights.
    model: the module, which is a DualEncoder of protocol.py.
    tokenizer: a function from texts to token ids.
    preprocess: the form in which the image encoder expects images.
    embed_dim: the width D of the features.
    device: the device of the encoders.
    precision: the precision in which the encoders compute.
    precision_asked: the precision that the options ask for; see precision_on for the difference.
    identity: a text of what decides the features beside the weights; by default it is the name.
    fingerprint: a hash of the identity and of the weights as they were loaded.
    trained: the run of fft that trained the image encoder, or None.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        model: nn.Module,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        *,
        device: torch.device,
        precision: Precision,
        identity: str | None = None,
        trained: TrainedRun | None = None,
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.trained = trained
        self.identity = name if identity is None else identity
        self.fingerprint = _fingerprint(self.identity, model)
        model.requires_grad_(False).eval().to(device)
        self.model = cast(Any, model)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.device = device
        self.precision_asked: Precision = precision
        self.precision: Precision = precision_on(device, precision)
        self._most_images: int | None = None
        self._image_encoder = ImageEncoder(self.model, getattr(torch, self.precision))
        with torch.no_grad():
            # The model itself tells its width, so that no table of widths has to follow the libraries.
            probe = self.model.encode_text(tokenizer(["a"]).to(device))
        self.embed_dim = int(probe.shape[-1])

    @property
    def logit_scale(self) -> float:
        """The multiplier s = exp(model.logit_scale). Raises UserError if it is not finite."""
        scale = float(self.model.logit_scale.detach().double().exp())
        if not math.isfinite(scale):
            raise UserError(f"model {self.name} has the logit scale {scale}: its weights {self.pretrained} are damaged")
        return scale

    @property
    def logit_bias(self) -> float | None:
        """The constant that a sigmoid loss adds to all logits, or None if the model has none."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach().double())

    def loaded(self) -> Self:
        """Return the model itself. In a run without a model, AbsentModel raises UserError here."""
        return self

    def train_image_encoder(self, training: bool) -> None:
        """Let the image encoder be trained, or freeze it again.

        Batch normalisation keeps the statistics of the weights: a step encodes its images in parts, and their own
        statistics would depend on the size of the parts.
        """
        encoder: nn.Module = self.model.visual
        encoder.requires_grad_(training).train(training)
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def encoder_was_trained(self) -> None:
        """Compute the fingerprint anew, so that caches keep no features of the weights before a training."""
        self.fingerprint = _fingerprint(self.identity, self.model)

    def image_tower(self) -> Tower:
        """Return the blocks of the image encoder. Raises UserError if it is not a transformer."""
        return self._tower(image_tower(self.model), "image")

    def text_tower(self) -> Tower:
        """Return the blocks of the text encoder. Raises UserError if it is not a transformer."""
        return self._tower(text_tower(self.model), "text")

    def _tower(self, found: Tower | None, kind: str) -> Tower:
        if found is None:
            raise UserError(f"model {self.name}: its {kind} encoder is not a transformer, which prompts need")
        return found

    def stated_scale(self) -> tuple[float, str] | None:
        """Return the multiplier s of the model, with the name of the model for messages."""
        return self.logit_scale, f"model {self.name}"

    def check_width(self, width: int, what: str) -> None:
        """Raise UserError if features are not as wide as those of this model. what: the words for them in a message."""
        if width != self.embed_dim:
            raise UserError(f"{what} of width {width}, model {self.name} makes features of width {self.embed_dim}")

    def facts(self) -> dict[str, Any] | None:
        """Return the facts about the model that the summary of a run contains."""
        names = ("name", "pretrained", "fingerprint", "precision", "precision_asked")
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {name: getattr(self, name) for name in names} | bias

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self.precision == "float32":
            yield
            return
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
            yield

    def image_features_with_grad(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, S, S) to unit-norm features (N, D) float32, with gradients if the encoder is trained."""
        return normalize(self._encode_by_module(images.to(self.device)).float(), dim=-1)

    def _encode_by_module(self, images: Tensor) -> Tensor:
        with self._arithmetic():
            features: Tensor = self.model.encode_image(images)
        return features

    @torch.no_grad()
    def image_features(self, views: Tensor) -> Tensor:
        """Encode normalised images (N, 3, S, S) float32 to unit-norm features (N, D) float32 on the model's device.

        It reads nothing back from the device, so the features are not checked: see check_features. Where the memory
        does not suffice, fewer images are encoded at once from there on.
        """
        most = max(1, min(self._most_images or len(views), len(views)))
        while True:
            try:
                parts = [self._features_at_once(part) for part in views.split(most)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except Exception as error:
                # What is recorded in a CUDA graph cannot be repeated in another way.
                if most == 1 or not memory.is_lack_of_memory(error) or _env.is_capturing():
                    raise
            most = self._encode_fewer(most)

    def _encode_fewer(self, images: int) -> int:
        """Encode half as many images at once from here on. Returns the number."""
        fewer = self._most_images = images // 2
        memory.free_unused()
        same = "which changes no result" if self.encodes_each_by_itself() else "which may change last bits of features"
        notices.warn(
            f"the memory did not suffice to encode {images} images at once; from here on it is {fewer}, {same}"
        )
        return fewer

    def _features_at_once(self, views: Tensor) -> Tensor:
        images = views.to(self.device)
        prepared = self._image_encoder.prepared_for(images)
        features = self._encode_by_module(images) if prepared is None else prepared(images)
        return normalize(features.float(), dim=-1)

    def encodes_each_by_itself(self) -> bool:
        """Return whether the features of an image are the same, to the bit, whatever is encoded in the same call."""
        size = self.preprocess.image_size
        sample = torch.zeros((1, 3, size, size), device=self.device)
        prepared = self._image_encoder.prepared_for(sample)
        return prepared is not None and prepared.encodes_each_by_itself

    @torch.no_grad()
    def encode_images(self, images: Tensor, ids: Sequence[str] = ()) -> Tensor:
        """Encode images as image_features does, and check the features.

        ids: the names of the images, or one name for all of them. Raises UserError naming the first image whose
        features are not usable; see check_features.
        """
        features = self.image_features(images)
        self.check_features(features, "image", ids)
        return features

    def check_features(self, features: Tensor, kind: str, names: Sequence[str]) -> None:
        """Raise UserError if a feature is not finite or all zero. Every later number would then be meaningless.

        In float16 an undamaged encoder can overflow.

        features: the encoded features (N, D).
        kind: "image" or "text".
        names: the names of the images or the texts, or one name for all.
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

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids (N, L) of texts on the model's device."""
        return self.tokenizer(list(texts)).to(self.device)

    def text_features_with_grad(self, tokens: Tensor) -> Tensor:
        """Encode token ids (N, L) to unit-norm features (N, D) float32, with gradients if the encoder has some."""
        with self._arithmetic():
            return normalize(self.model.encode_text(tokens).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts to unit-norm features (N, D) float32. Raises UserError as encode_images does."""
        features = self.text_features_with_grad(self.tokens(texts))
        self.check_features(features, "text", texts)
        return features


@dataclass(frozen=True)
class AbsentModel:
    """The model of a run that encodes neither images nor prompts, because files hold the features of both.

    It has the methods that a run calls on every model. device, precision: those that the options ask for.
    """

    device: torch.device
    precision: Precision
    fingerprint: None = None

    def loaded(self) -> NoReturn:
        """Raise UserError, because there is no model that could encode."""
        raise UserError("data must be images to be encoded by a model, got feature files")

    def stated_scale(self) -> None:
        """Return None, because without a model there is no multiplier of a model."""

    def check_width(self, width: int, what: str) -> None:
        """Accept features of any width, because there is no model that they have to fit."""

    def facts(self) -> None:
        """Return None, because the summary of a run without a model contains no facts about it."""


Model = VisionLanguageModel | AbsentModel


def open_model(options: ModelOptions, *, needed: bool, seed: int) -> Model:
    """Load the model that the options ask for to its device, or return an AbsentModel if no model is needed.

    options: the options of the model; needed: whether a model is needed; seed: the seed of random weights.

    Raises UserError if the device does not exist or the model cannot be loaded.
    """
    device = device_of_rank(resolve_device(options.device), ranks.current())
    if not needed:
        return AbsentModel(device, options.precision)
    return load_model(options.model, options.pretrained, device=device, precision=options.precision, seed=seed)


def resolve_device(name: str) -> torch.device:
    """Return the device that an option names. Raises UserError if it does not exist."""
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


def device_of_rank(device: torch.device, group: Ranks) -> torch.device:
    """Return the device of one of several processes, which on a machine with several GPUs is a GPU of its own.

    It becomes the current GPU of the process. Raises UserError if the device was chosen by its number.
    """
    if not group.several or device.type != "cuda":
        return device
    if ":" in str(device):
        raise UserError(f"device must be auto, cpu or cuda in several processes, got {device}")
    own = torch.device("cuda", group.cuda_index())
    torch.cuda.set_device(own)
    return own


def _fingerprint(identity: str, model: nn.Module) -> str:
    digest = hashlib.sha256(identity.encode())
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
    """Load a frozen model. The process then keeps freed memory, see system/memory.py.

    name: "embedded", the name of a model of open_clip, or KIND:PATH; see open.py.
    pretrained: a tag of a hub, a local file of weights (safetensors, or a torch file of plain tensors; no code in it is
        executed), a run of fft whose image encoder replaces that of the model, or "random".
    device: the device of the encoders.
    precision: the precision in which the encoders compute.
    seed: the seed of random weights.

    Raises UserError if the name is unknown, or if the weights are not named, cannot be read or do not fit the model.
    """
    memory.keep_freed_memory()
    runs = _run_chain(name, pretrained)
    start, start_seed = (runs[-1].pretrained, runs[-1].seed) if runs else (pretrained, seed)
    parts = open_parts(name, start, start_seed)
    if (
        runs
        and len({run.fingerprint for run in runs}) == 1
        and runs[0].fingerprint not in (None, _fingerprint(parts.identity, parts.module))
    ):
        notices.warn(f"pretrained {pretrained}: the weights {start or name} that it started from have changed since")
    trained = next((run for run in runs if run.trained_encoder), None)
    if trained is not None:
        trained.put_encoder_into(parts.module)
    if (reason := reason_not_served(parts.module.requires_grad_(False).eval())) is not None:
        notices.note(f"model {name}: {reason}, so that its own module encodes the images")
    return VisionLanguageModel(
        name,
        pretrained,
        parts.module,
        parts.tokenizer,
        parts.preprocess,
        device=torch.device(device),
        precision=precision,
        identity=parts.identity,
        trained=trained,
    )


def _run_chain(name: str, pretrained: str | None) -> list[TrainedRun]:
    """Return the run that --pretrained names, the run it started from, and so on; an empty list for other weights."""
    runs: list[TrainedRun] = []
    while pretrained is not None and pretrained != RANDOM and len(runs) < MAX_CHAINED_RUNS:
        path = Path(pretrained)
        run = open_run(path) if (path.is_dir() or path.is_file()) and not is_tag(name, pretrained) else None
        if run is None:
            break
        if run.model != name:
            raise UserError(f"pretrained {pretrained} was trained from the model {run.model}: give --model {run.model}")
        runs.append(run)
        pretrained = run.pretrained
    return runs
