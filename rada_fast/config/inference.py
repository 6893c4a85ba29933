"""Define the options of the commands that use a model or an adapter as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rada_fast.config.checks import bytes_of, check_choices, check_integer, check_paths, check_positive
from rada_fast.config.commands import ViewKind
from rada_fast.config.method import EpisodeConfig
from rada_fast.config.options import AdapterOptions, ClassOptions, ModelOptions, RunOptions
from rada_fast.errors import UserError

StoredType = Literal["float32", "float16"]
MAX_SHOWN = 12
"""So many images have heat maps at most, because all of them are in one picture."""


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a trained adapter, or all that a method trained, on sets of labelled images, each with own classes.

    An adapter that was trained on one data set can be evaluated on others, because it has no weights of a class. Writes
    images.jsonl (one line per image) and summary.json.

    Example: rada-fast eval --adapter results/eft --data coop:data/dtd coop:data/eurosat --model ViT-B-16-quickgelu
    --pretrained openai --output results/cross-data-set
    """

    data: tuple[str, ...]
    """Labelled images, one or more KIND:PATH."""
    run: RunOptions = RunOptions(output="results/eval")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        if not self.data:
            raise UserError("data must name at least one source, got none")
        if repeated := [one for index, one in enumerate(self.data) if one in self.data[:index]]:
            raise UserError(f"data must name every source once, got {repeated[0]} twice")


@dataclass(frozen=True)
class InspectOptions:
    """Show what a trained adapter does with labelled images: the values of its mask, heat maps of M, R and M * R, the
    images in a plane by R and by M * R, and the accuracy and calibration before and after.

    Writes inspect.html (one page with all pictures, for any browser, without a network), the pictures as PNG files,
    inspect.json (the numbers), images.jsonl (one line per image) and summary.json.

    Example: rada-fast inspect --adapter results/eft --data coop:data/eurosat --model ViT-B-16-quickgelu --pretrained
    openai --output results/inspect
    """

    data: str
    """Labelled images as KIND:PATH."""
    images: int = 500
    """The most images whose masks are computed and which are drawn in the plane: of all classes, or of so many classes
    that each has ten. The accuracies are those of all images."""
    show: tuple[str, ...] = ()
    """Names of images, as in images.jsonl, whose heat maps are drawn. Default: one that adaptation puts right, one that
    it puts wrong, and one that stays right."""
    perplexity: float = 30.0
    """About how many neighbours of an image count in t-SNE."""
    run: RunOptions = RunOptions(output="results/inspect")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        check_integer("images", self.images, 1)
        check_positive("perplexity", self.perplexity)
        if len(self.show) > MAX_SHOWN:
            raise UserError(f"show must name at most {MAX_SHOWN} images, got {len(self.show)}")


@dataclass(frozen=True)
class PredictOptions:
    """Predict the classes of images: zero-shot, with a trained adapter, or with test-time training on each image.

    The images need no labels, and --classes names the classes that are possible. Writes predictions.jsonl (one line per
    image, as soon as it is predicted), the same as predictions.csv, and summary.json.

    Example: rada-fast predict --data images:photos --classes names.txt --model ViT-B-16-quickgelu --pretrained openai
    --output results/predict
    """

    data: str
    """Images as KIND:PATH: images:DIR (no labels), csv:FILE (a list of paths), or any other kind."""
    ttt: bool = False
    """Adapt to every image by itself before it is predicted, as the command ttt does."""
    top: int = 5
    """The number of classes in a line, the best first."""
    views: int = 64
    """With --ttt: views of an image, the original included."""
    view_kind: ViewKind = "crop"
    """With --ttt: crop, or augmix."""
    memory: str | None = None
    """With --ttt: about how much memory the run may take beside the model's weights, such as 2GiB."""
    episodes: int | None = None
    """With --ttt: the most images to adapt at once, whatever the memory allows."""
    run: RunOptions = RunOptions(output="results/predict")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()
    episode: EpisodeConfig = EpisodeConfig()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        check_integer("top", self.top, 1)
        check_integer("views", self.views, 1)
        if self.memory is not None:
            bytes_of("memory", self.memory)
        if self.episodes is not None:
            check_integer("episodes", self.episodes, 1)


@dataclass(frozen=True)
class FeaturesOptions:
    """Encode images once, and write their features to a file that every command reads as features:FILE.npz.

    Writes features.npz (features, labels, names of the images and of the classes, multiplier), images.jsonl (one line
    per image) and summary.json; with --prompts also text.npz, the text features of the classes.

    Example: rada-fast features --data imagefolder:photos --views 64 --model ViT-B-16-quickgelu --pretrained openai
    --output results/features
    """

    data: str
    """Images as KIND:PATH."""
    views: int = 1
    """Views of an image, the original included, as ttt makes them."""
    view_kind: ViewKind = "crop"
    """The kind of the views: crop, or augmix."""
    dtype: StoredType = "float32"
    """Type of the stored features. float16 takes half the space."""
    prompts: bool = False
    """Also encode the prompts of the classes, for --text-features features:RUN/text.npz."""
    run: RunOptions = RunOptions(output="results/features")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        check_integer("views", self.views, 1)
        if self.text.text_features is not None or self.text.logit_scale is not None:
            raise UserError("text_features and logit_scale have no use in 'features', which encodes them")
