"""Define the options of the three loops `ttt`, `eft` and `fft`. Every default says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from rada_fast.config.checks import (
    MAX_SEED,
    bytes_of,
    check_choices,
    check_integer,
    check_paths,
    check_positive,
    check_share,
    interval_of,
)
from rada_fast.config.method import (
    EpisodeConfig,
    MaskPenalty,
    OptimizerName,
)
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS, EFTMethodName, FFTMethodName, HeadName
from rada_fast.config.options import AdapterOptions, ClassOptions, ModelOptions, RunOptions, TuningOptions
from rada_fast.errors import UserError

ViewKind = Literal["crop", "augmix"]
TrainViews = Literal["center", "crop"]
Protocol = Literal["base-to-new", "all"]
Schedule = Literal["cosine", "constant"]
Stages = Literal["both", "first"]
Shard = Literal["auto", "none", "full"]


@dataclass(frozen=True)
class TTTOptions:
    """Test-time training: adapt to each test image by itself, from its views alone (paper Sec. 4.3).

    For every image, encode the original and its random views once, keep the confident ones, take a few optimiser steps
    on a fresh copy of the adapter, predict the original, and forget the copy. Writes images.jsonl (one line per image,
    as soon as it is done) and summary.json.

    Example: rada-fast ttt --data imagefolder:photos --model ViT-B-16-quickgelu --pretrained openai --output results/ttt
    """

    data: str
    """Images as KIND:PATH: imagefolder:DIR (one sub-folder for each class), coop:ROOT/dtd (a data set of CoOp),
    imagenet-a:DIR, images:DIR (no labels; needs --classes), features:FILE.npz (arrays features (N, V, D) or (N, D), and
    labels), and others that docs/data.md lists."""
    views: int = 64
    """Views of an image, the original included (paper: 64)."""
    view_kind: ViewKind = "crop"
    """crop: random resized crops and flips, as for ImageNet's variants; augmix: also AugMix, for fine-grained sets."""
    memory: str | None = None
    """About how much memory the run may take beside the model's weights, such as 2GiB. It decides how many images are
    adapted at once, and changes no result. Default: what groups of a useful size take."""
    episodes: int | None = None
    """The most images to adapt at once, whatever the memory allows; it changes no result."""
    order_seed: int | None = None
    """Visit the images in a random order drawn from this seed; it changes no image's result."""
    run: RunOptions = RunOptions(output="results/ttt")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()
    episode: EpisodeConfig = EpisodeConfig()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        check_integer("views", self.views, 1)
        if self.memory is not None:
            bytes_of("memory", self.memory)
        if self.episodes is not None:
            check_integer("episodes", self.episodes, 1)
        if self.order_seed is not None:
            check_integer("order_seed", self.order_seed, 0, MAX_SEED)


@dataclass(frozen=True)
class EFTOptions:
    """Efficient fine-tuning: train the adapter with frozen encoders; report base, new and their harmonic mean
    (paper Sec. 4.2).

    Writes epochs.jsonl (one line per epoch, as soon as it is done), images.jsonl (one line per test image),
    adapter.safetensors and summary.json.

    With --sets or --seeds, one run for each set and seed, and tables of all of them.

    Example: rada-fast eft --train imagefolder:train --test imagefolder:test --model ViT-B-16-quickgelu --pretrained
    openai --output results/eft
    """

    train: str = ""
    """Training images as KIND:PATH: imagefolder:DIR, coop:ROOT/dtd, features:FILE.npz, and others that docs/data.md
    lists. Where the data have parts, these are the training images, and those of --test are the test images. With
    --sets, a {set} in it stands for the name of each set."""
    test: str = ""
    """Test images as KIND:PATH."""
    sets: tuple[str, ...] = ()
    """Run each of these data sets of CoOp in turn, such as dtd eurosat, or all for the eleven."""
    seeds: tuple[int, ...] = ()
    """Run each of these seeds in turn."""
    root: str = "data"
    """The folder with the data sets that --sets names. --train and --test can then be left out."""
    evaluate_on: tuple[str, ...] = ()
    """Also evaluate on these data, one or more KIND:PATH, each with classes of its own."""
    new_test: str | None = None
    """Test images of new classes, where they are data of their own. Needs --protocol all."""
    method: EFTMethodName = "rada"
    """rada, or a method of the paper's Tables 2, 4 and 8: clip-adapter; coop (learned words); prompt and adapter (deep
    prompts, or adapters, in both encoders), which rada+prompt and rada+adapter combine with RAda; maple (deep prompts
    of images that are projected from those of texts); attend-text, attend-image and attend-both (masks learned in
    isolation)."""
    protocol: Protocol = "base-to-new"
    """base-to-new: train on the first half of the classes, test on both halves; all: train and test on all classes."""
    shots: int | None = 16
    """Training images per class (paper: 16); None takes all."""
    epochs: int = 13
    """Passes over the training images (paper: 13)."""
    batch_size: int = 1
    """Images per step (paper: 1)."""
    lr: float = 9e-4
    """Learning rate (paper: 9e-4)."""
    optimizer: OptimizerName = "adamw"
    """adamw, adam or sgd (momentum 0.9), all three found in published configurations."""
    weight_decay: float = 5e-4
    """Weight decay (published configurations: 5e-4)."""
    schedule: Schedule = "cosine"
    """cosine with one warm-up epoch at 1e-5 (published configurations), or constant."""
    penalty: MaskPenalty = "l2"
    """Mask penalty: l2 (paper), l1, or linf (what the published code runs)."""
    penalty_weight: float = 1.5
    """Weight of the mask penalty (paper: 1.5)."""
    train_views: TrainViews = "center"
    """center: one fixed view, encoded once and cached; crop: a new random crop and flip each epoch (published)."""
    evaluate_every: int = 0
    """Also test after every this many epochs; 0 tests at the end only."""
    save_every: str | None = None
    """Save the state within epochs, too, whenever so much time or so many steps have passed, such as 10min or 500steps.
    Default: every minute, or less often where saving would take more than one per cent of the time."""
    run: RunOptions = RunOptions(output="results/eft")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()
    tuning: TuningOptions = TuningOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        _check_head(self.method, EFT_METHODS[self.method].head, self.adapter)
        for name in ("train", "test"):
            if getattr(self, name):  # both are left out where --sets names the data
                check_paths(self, name)
        check_paths(self, "new_test", "sets", "root", "evaluate_on")
        for seed in self.seeds:
            check_integer("seeds", seed, 0, MAX_SEED)
        for name in ("sets", "seeds", "evaluate_on"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name} must name everything once, got {' '.join(map(str, getattr(self, name)))}")
        if self.evaluate_on and self.text.text_features is not None:
            raise UserError("evaluate_on needs prompts for the classes of other data, not --text-features")
        if self.shots is not None:
            check_integer("shots", self.shots, 1)
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("evaluate_every", self.evaluate_every, 0)
        check_positive("lr", self.lr)
        check_positive("weight_decay", self.weight_decay, zero_ok=True)
        check_positive("penalty_weight", self.penalty_weight, zero_ok=True)
        if self.save_every is not None:
            interval_of("save_every", self.save_every)
        if self.new_test is not None and self.protocol != "all":
            raise UserError("new_test needs protocol 'all': with 'base-to-new' the new classes are test's second half")


@dataclass(frozen=True)
class FFTOptions:
    """Full fine-tuning: a linear classifier, started from the text features, replaces the text encoder (Sec. 4.1).

    RAda trains the adapter and the classifier with frozen encoders; RAda-FT goes on from the weights after a few of
    those epochs and trains everything, without the mask penalty. Writes epochs.jsonl, images.jsonl, the trained
    weights and summary.json.

    Example: rada-fast fft --train imagefolder:train --test imagefolder:val imagefolder:sketch --model
    ViT-B-16-quickgelu --pretrained openai --output results/fft
    """

    train: str
    """Training images as KIND:PATH. features:FILE.npz serves --stages first or --method lp only."""
    test: tuple[str, ...]
    """Test images, one or more KIND:PATH: the training domain's and shifted ones with the same classes."""
    method: FFTMethodName = "rada"
    """rada, or a method of the paper's Tables 1 and 6: lp trains the classifier, ft the image encoder too, l2-sp pulls
    its weights to where they started, lp-ft does lp and then ft; flyp trains both encoders with CLIP's contrastive
    loss; clip-adapter trains as rada does."""
    stages: Stages = "both"
    """both, or first: the stage with a frozen encoder alone, of the methods rada, lp-ft and clip-adapter."""
    epochs: int = 10
    """Epochs of RAda, or of another method's first stage (paper: 10)."""
    finetune_from: int = 5
    """RAda-FT, or another second stage, starts from the weights after this many epochs of the first one (paper: 5)."""
    finetune_epochs: int = 5
    """Epochs of RAda-FT, or of another second stage (paper: 5)."""
    ensemble: tuple[float, ...] = ()
    """Also evaluate means of the weights at the start and at the end, each of these shares from 0 to 1 of the weights
    at the end (WiSE-FT); they can be given to a finished run."""
    batch_size: int = 512
    """Images per step (paper: 512)."""
    micro_batch: int | None = None
    """Split a step into parts of this many images in each process to save memory; gradients are accumulated. Default:
    as many as fit into 1 GiB on a CPU and 8 GiB on a GPU, or into the memory."""
    memory: str | None = None
    """About how much memory a step may take beside the frozen weights, such as 4GiB, which picks the number of images
    that are computed at once. Another number rounds the sums of gradients in another way."""
    grad_checkpointing: bool = False
    """RAda-FT: let the image encoder compute its activations again in the backward pass, which saves memory."""
    shard: Shard = "auto"
    """Where torchrun starts several processes and an encoder is trained: none stores all of its weights in each (DDP);
    full stores a part of weights, gradients and moments in each (FSDP2); auto does so from 250 million weights on."""
    lr: float = 4e-3
    """Learning rate of RAda, and of every stage with frozen encoders (paper: 4e-3)."""
    finetune_lr: float = 4e-6
    """Learning rate of RAda-FT, and of every stage that trains an encoder (paper: 4e-6)."""
    weight_decay: float = 0.1
    """AdamW's weight decay (paper: 0.1)."""
    pull_weight: float = 0.1
    """Weight of the pull of l2-sp towards the weights at the start, which takes the place of weight decay."""
    feature_ratio: float = 0.2
    """The share of the adapted feature in clip-adapter (published: 0.2)."""
    warmup_steps: int = 500
    """Linear warm-up, then cosine; at most a fifth of a stage's steps."""
    penalty: MaskPenalty = "l2"
    """Mask penalty, in RAda only."""
    penalty_weight: float = 1.0
    """Weight of the mask penalty (Eq. 14 writes none, so 1)."""
    train_views: TrainViews = "crop"
    """crop: random crops of 90 to 100 % of the picture, as open_clip trains; center: one fixed view."""
    save_every: str | None = None
    """Save the state within epochs, too, whenever so much time or so many steps have passed, such as 10min or 500steps.
    Default: every minute, or less often where saving would take more than one per cent of the time."""
    run: RunOptions = RunOptions(output="results/fft")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.test:
            raise UserError("test must name at least one source, got none")
        check_paths(self, "train", "test")
        for name in ("epochs", "finetune_epochs", "batch_size", "finetune_from"):
            check_integer(name, getattr(self, name), 1)
        if self.micro_batch is not None:
            check_integer("micro_batch", self.micro_batch, 1)
        if self.memory is not None:
            bytes_of("memory", self.memory)
            if self.micro_batch is not None:
                raise UserError("memory and micro_batch both give the size of a step's parts: give one of them")
        if self.save_every is not None:
            interval_of("save_every", self.save_every)
        check_integer("warmup_steps", self.warmup_steps, 0)
        stages = FFT_METHODS[self.method].stages
        _check_head(self.method, FFT_METHODS[self.method].head, self.adapter)
        if self.stages == "first" and stages[0].trains != "head":
            raise UserError(f"stages must be both with method {self.method}, whose one stage trains an encoder")
        if self.ensemble and (self.stages == "first" or stages[-1].trains == "head"):
            raise UserError("ensemble needs a stage that trains the encoder, and this run has none")
        for share in self.ensemble:
            check_share("ensemble", share)
        if len(stages) > 1 and self.finetune_from > self.epochs:
            raise UserError(
                f"finetune_from must be at most epochs {self.epochs}, got {self.finetune_from}; unless given it is 5"
            )
        for name in ("lr", "finetune_lr"):
            check_positive(name, getattr(self, name))
        check_positive("pull_weight", self.pull_weight, zero_ok=True)
        check_share("feature_ratio", self.feature_ratio)
        check_positive("weight_decay", self.weight_decay, zero_ok=True)
        check_positive("penalty_weight", self.penalty_weight, zero_ok=True)


def _check_head(method: str, head: HeadName, adapter: AdapterOptions) -> None:
    """Raise UserError if options of the rational adapter are given to a method that has none."""
    if head == "rational":
        return
    # The attention of the heads that attend in one modality has as many heads as the rational adapter would have.
    allowed = {"num_heads"} if head.startswith("attend") else set()
    for field in fields(adapter):
        if field.name not in allowed and getattr(adapter, field.name) != field.default:
            raise UserError(f"{field.name} belongs to the rational adapter, and method {method} has none: leave it out")
