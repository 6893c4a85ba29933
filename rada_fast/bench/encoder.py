"""Measure the image encoder, beside open_clip's own module in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.bench.costs import Work
from rada_fast.bench.report import sizes_name
from rada_fast.bench.stages import Figure, Ratio, Setting, Stage, counted_operations, measure
from rada_fast.config.bench import BenchEncoderOptions
from rada_fast.models.image_encoder import reason_not_served
from rada_fast.models.vision_language import VisionLanguageModel, load_model

PLAIN = "open_clip"


def figures(options: BenchEncoderOptions, device: torch.device) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each number of views. Raises UserError if the model cannot be loaded."""
    chosen = options.model
    vlm = load_model(
        chosen.model, chosen.pretrained, device=device, precision=chosen.precision, seed=options.measuring.seed
    )
    for batch in options.batch:
        yield measure(setting_of(vlm, batch), device.type, options.measuring)


def setting_of(vlm: VisionLanguageModel, batch: int) -> Setting:
    """Return the setting of one number of views."""
    views = drawn_views(vlm, batch)
    operations = counted_encoder_operations(vlm, batch)
    sizes = model_sizes(vlm) | {"batch": batch}

    return Setting(
        name=sizes_name(sizes),
        sizes=sizes,
        stages=(
            Stage(
                name="encode",
                inside="views in memory to features of unit length",
                call=lambda: vlm.encode_images(views),
                pictures=batch,
                work=(encoder_work(vlm, batch),),
                operations=operations,
            ),
            Stage(
                name=PLAIN,
                inside="the same by open_clip's module in plain PyTorch, with the same allocator and threads",
                call=lambda: plain_features(vlm, views),
                pictures=batch,
                work=(module_work(vlm, batch),),
                operations=operations,
            ),
        ),
        ratios=(Ratio("speed-up", PLAIN, ("encode",), "time of open_clip's module / time of this encoder"),),
    )


@torch.no_grad()
def plain_features(vlm: VisionLanguageModel, views: Tensor) -> Tensor:
    """Encode views (N, 3, S, S) to features (N, D) of unit length with open_clip's own module in plain PyTorch."""
    with torch.autocast(vlm.device.type, dtype=getattr(torch, vlm.precision), enabled=vlm.precision != "float32"):
        features = vlm.model.encode_image(views)
    return normalize(features.float(), dim=-1)


def drawn_views(vlm: VisionLanguageModel, count: int) -> Tensor:
    """Draw random normalised views (V, 3, S, S) on the device of a model; their content decides no time."""
    size = vlm.preprocess.image_size
    return torch.randn(count, 3, size, size).to(vlm.device)


def model_sizes(vlm: VisionLanguageModel) -> dict[str, str | None]:
    """Return what the lines of figures say about a model."""
    return {"model": vlm.name, "pretrained": vlm.pretrained, "precision": vlm.precision}


def encoder_work(vlm: VisionLanguageModel, views: int) -> Work:
    """Return the least work of encoding views: all products whose results are needed, and weights and views read once.

    For open_clip's vision transformer the products follow the formula of transformer_multiply_adds, where the last
    block computes the pooled token only; for another image encoder they are those of the module.
    """
    served = reason_not_served(vlm.model) is None
    operations = 2.0 * views * transformer_multiply_adds(vlm.model.visual, pooled_only=True) if served else None
    return _work(vlm, views, counted_encoder_operations(vlm, views) if operations is None else operations)


def module_work(vlm: VisionLanguageModel, views: int) -> Work:
    """Return the work of open_clip's own module, which computes every token in every block."""
    return _work(vlm, views, counted_encoder_operations(vlm, views))


def _work(vlm: VisionLanguageModel, views: int, operations: float) -> Work:
    size = getattr(torch, vlm.precision).itemsize
    moved = size * sum(parameter.numel() for parameter in vlm.model.visual.parameters())
    return Work(operations, moved + 4 * views * 3 * vlm.preprocess.image_size**2, vlm.precision)


def transformer_multiply_adds(visual: Any, *, pooled_only: bool) -> int:
    """Return the multiply-adds for one image of open_clip's vision transformer.

    With n tokens (the patches and the class token), width W, an MLP of width M, L blocks and patches of P x P pixels:

        (n - 1) 3 P^2 W  +  L (n (4 W^2 + 2 W M) + 2 n^2 W)  +  W D

    Where the last block computes the pooled token only, (n - 1) (2 W^2 + 2 W M + 2 n W) of it are not needed.

    visual: an image encoder that models.image_encoder.reason_not_served lets pass.
    pooled_only: whether the last block computes the pooled token only.
    """
    blocks = visual.transformer.resblocks
    width, inner = blocks[0].mlp.c_fc.in_features, blocks[0].mlp.c_fc.out_features
    patches = visual.grid_size[0] * visual.grid_size[1]
    tokens = patches + 1
    total = patches * visual.conv1.weight.numel()
    total += len(blocks) * (tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width)
    total += visual.proj.numel() if visual.proj is not None else 0
    return int(total - (patches * (2 * width**2 + 2 * width * inner + 2 * tokens * width) if pooled_only else 0))


def counted_encoder_operations(vlm: VisionLanguageModel, views: int) -> float:
    """Return the operations of encoding views as PyTorch's counter finds them in open_clip's module."""
    return views * counted_operations(lambda: vlm.model.encode_image(drawn_views(vlm, 1)))
