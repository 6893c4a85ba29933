"""Train the embedded weights again: `python -m rada_fast.embedded.pretrain --output FILE`.

Draws a fixed pool of pictures and shows the model random resized crops of them with fresh captions. The loss is CLIP's
contrastive one, and training takes place on the CPU: 12,000 steps of 0.22 s, or three quarters of an hour, on a core
that multiplies bfloat16, and of 0.30 s, or an hour, on two cores of the same kind that are held to AVX2. At the end,
the script prints zero-shot accuracy on clean and shifted pictures of the demo's classes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rada_fast import _env
from rada_fast.embedded import world
from rada_fast.embedded.model import MEAN, STD, WordTokenizer, build_model
from rada_fast.errors import UserError
from rada_fast.ops import VIEW_COLUMNS, multi_view_crops, random_views, whole_view


@dataclass(frozen=True)
class Settings:
    """Settings are what the weights depend on; they are kept in the weights file's metadata."""

    steps: int = 12000
    batch: int = 128
    seed: int = 0
    pool: int = 30_000  # pictures; they take 1.5 GB of memory
    crop_scale: float = 0.35  # the least share of a picture in its random resized crop; the largest is all of it
    lr: float = 1.5e-3
    # The scale of the logits starts at 100, as CLIP's ends, and moves slowly, so that the features learn to fit it.
    scale_lr: float = 5e-5
    warmup: int = 150
    weight_decay: float = 0.05


_CHUNK = 500
# Some words that mean nothing here are replaced by the unknown one, so that prompts with foreign words keep working.
_UNKNOWN = 0.03


def _draw_chunk(job: tuple[int, int, int]) -> tuple[NDArray[np.uint8], list[world.Scene]]:
    seed, chunk, count = job
    rng = np.random.default_rng([seed, chunk])
    scenes = [world.pretraining_scene(rng) for _ in range(count)]
    return np.stack([world.draw(scene, rng) for scene in scenes]), scenes


def draw_pool(size: int, seed: int) -> tuple[NDArray[np.uint8], list[world.Scene]]:
    """Return size pictures (size, 96, 96, 3) uint8 and their scenes, drawn by all cores, the same for any number."""
    jobs = [(seed, chunk, min(_CHUNK, size - start)) for chunk, start in enumerate(range(0, size, _CHUNK))]
    images = np.empty((size, world.PICTURE_SIZE, world.PICTURE_SIZE, 3), dtype=np.uint8)
    scenes: list[world.Scene] = []

    def keep(chunks: Iterable[tuple[NDArray[np.uint8], list[world.Scene]]]) -> None:
        for chunk, chunk_scenes in chunks:
            images[len(scenes) : len(scenes) + len(chunk)] = chunk
            scenes.extend(chunk_scenes)

    if len(jobs) == 1:
        keep(map(_draw_chunk, jobs))
    else:
        # The workers are spawned, because a fork of a process in which PyTorch has started threads can hang.
        with multiprocessing.get_context("spawn").Pool() as workers:
            keep(workers.imap(_draw_chunk, jobs))
    return images, scenes


def whole_views(images: NDArray[np.uint8]) -> Tensor:
    """Return the network input (B, 3, 48, 48) float32 of whole pictures (B, 96, 96, 3) uint8."""
    views = whole_view(images.shape[1], images.shape[2], world.IMAGE_SIZE).repeat(len(images), 1)
    return _cut(images, views)


def _cut(images: NDArray[np.uint8], views: Tensor) -> Tensor:
    views[:, VIEW_COLUMNS.index("picture")] = torch.arange(len(images))
    return multi_view_crops(list(torch.from_numpy(images)), views, world.IMAGE_SIZE, MEAN, STD)


def make_batch(
    images: NDArray[np.uint8],
    scenes: list[world.Scene],
    tokenizer: WordTokenizer,
    settings: Settings,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random resized crops of pictures of the pool, half of them mirrored, with fresh captions.

    Some crops miss the object that their captions name, so the model learns to be unsure where it sees no object.

    Returns pixels (B, 3, 48, 48) float32, tokens (B, context_length) int64 and matches (B, B) bool: whether the caption
    of column j is true of the picture of row i.
    """
    size = settings.batch
    chosen = rng.integers(len(scenes), size=size)
    batch = [scenes[i] for i in chosen]
    described = [world.describe(scene, rng) for scene in batch]
    tokens = tokenizer([text for text, _ in described])
    meaningless = tokens < tokenizer.eot_token_id
    meaningless &= tokens > tokenizer.sot_token_id
    for word in (*world.COLOURS, *world.TEXTURES, *world.SHAPES):
        meaningless &= tokens != tokenizer.encode(word)[0]
    tokens[meaningless & torch.from_numpy(rng.uniform(size=tokens.shape) < _UNKNOWN)] = tokenizer.unk_id

    attributes = np.array([scene.attributes() for scene in batch])
    stated = np.array([mask for _, mask in described])
    agree = attributes[:, None, :] == attributes[None, :, :]
    matches = torch.from_numpy((agree | ~stated[None, :, :]).all(axis=2))

    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    side = world.PICTURE_SIZE
    views = random_views(side, side, world.IMAGE_SIZE, size, generator, scale=(settings.crop_scale, 1.0))
    return _cut(images[chosen], views), tokens, matches


def contrastive_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Return CLIP's symmetric loss where a caption may be true of several pictures of the batch.

    logits: (B, B), pictures by captions. matches: (B, B) bool with a true diagonal. Targets are uniform over the
    matches of a row (of a column); with one match each it is CLIP's loss. Returns a scalar in nats.
    """
    target = matches.float()
    by_image = -(F.log_softmax(logits, dim=1) * target).sum(1) / target.sum(1)
    by_text = -(F.log_softmax(logits, dim=0) * target).sum(0) / target.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


def share_of_rate(settings: Settings, step: int) -> float:
    """Return the share of the learning rates at a step: a linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def zero_shot(model: CLIP, tokenizer: WordTokenizer, shift: str | None, images_per_class: int) -> tuple[float, ...]:
    """Return accuracy in [0, 1] on the demo's classes: over all, and of base and new ones among their own half."""
    names = world.class_names()
    half = len(names) // 2
    labels = torch.arange(len(names)).repeat_interleave(images_per_class)
    with torch.inference_mode():
        text = model.encode_text(tokenizer([world.TEMPLATE.format(name) for name in names]), normalize=True)
        logits = []
        for index in range(len(names)):
            images = np.stack([world.class_image(index, seed, shift) for seed in range(images_per_class)])
            logits.append(model.encode_image(whole_views(images), normalize=True) @ text.T)
    scores = torch.cat(logits)
    base, new = labels < half, labels >= half
    return (
        float((scores.argmax(1) == labels).float().mean()),
        float((scores[base, :half].argmax(1) == labels[base]).float().mean()),
        float((scores[new, half:].argmax(1) + half == labels[new]).float().mean()),
    )


class CropAccuracies(NamedTuple):
    """The accuracies in [0, 1] of whole pictures, of single random crops, and of the mean of the confident views."""

    original: float
    crop: float
    confident: float


def crop_accuracies(
    encode: Callable[[Tensor], Tensor],
    text_features: Tensor,
    logit_scale: float,
    images_per_class: int,
    views: int = 64,
) -> CropAccuracies:
    """Measure on shifted pictures whether the views that the model is sure of tell more than the whole picture.

    Test-time training lives on that: it makes the model surer of what it sees in those views.

    encode: computes the features at unit norm (V, D) of pixels (V, 3, 48, 48).
    text_features: the features at unit norm (K, D) of the demo's classes.
    logit_scale: the model's multiplier of cosines.
    images_per_class: how many pictures of each class to take.
    views: how many views of a picture there are, of which a tenth with the lowest entropy is taken as confident.
    """
    side, size = world.PICTURE_SIZE, world.IMAGE_SIZE
    right = []
    for label, seed in itertools.product(range(len(text_features)), range(images_per_class)):
        image = torch.from_numpy(world.class_image(label, seed, "mixed"))
        generator = torch.Generator().manual_seed(seed * len(text_features) + label)
        boxes = torch.cat([whole_view(side, side, size), random_views(side, side, size, views - 1, generator)])
        with torch.inference_mode():
            features = encode(multi_view_crops([image], boxes, size, MEAN, STD))
            probabilities = (logit_scale * features @ text_features.T).softmax(dim=1)
        entropies = torch.special.entr(probabilities).sum(dim=1)
        confident = probabilities[entropies.argsort()[: views // 10]].mean(dim=0)
        answers = probabilities.argmax(dim=1) == label
        right.append([float(answers[0]), float(answers[1:].float().mean()), float(confident.argmax() == label)])
    return CropAccuracies(*np.mean(right, axis=0).tolist())


def report(model: CLIP, tokenizer: WordTokenizer, images_per_class: int) -> None:
    """Print zero-shot accuracy in percent, clean, mixed and per shift, and that of crops of shifted pictures."""
    model.eval()
    print(f"zero-shot accuracy, {images_per_class} images per class     all    base     new", flush=True)
    for shift in (None, "mixed", *world.SHIFTS):
        accuracies = zero_shot(model, tokenizer, shift, images_per_class)
        print(f"  {shift or 'clean':32s}", *(f"{100 * value:5.1f} %" for value in accuracies), flush=True)
    with torch.inference_mode():
        text = model.encode_text(
            tokenizer([world.TEMPLATE.format(name) for name in world.class_names()]), normalize=True
        )
    scale = float(model.logit_scale.detach().exp())
    found = crop_accuracies(lambda pixels: model.encode_image(pixels, normalize=True), text, scale, images_per_class)
    print(
        f"shifted pictures: the original {100 * found.original:.1f} %, a random crop {100 * found.crop:.1f} %, "
        f"the mean of the confident tenth of 64 views {100 * found.confident:.1f} %",
        flush=True,
    )


def save_weights(model: CLIP, settings: Settings, path: Path) -> None:
    """Write the weights as float16 safetensors, atomically, with the settings in the metadata."""
    # float16 halves the file to 3.7 MB. Of 960 pictures, half of them shifted, it changed one answer (of a model after
    # 5000 steps).
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    # There is one entry only, because safetensors writes several in random order, and equal weights should give equal
    # files.
    metadata = {"pretraining": json.dumps({**asdict(settings), "torch": torch.__version__.split("+")[0]})}
    temporary = path.with_name(path.name + ".tmp")
    save_file(state, temporary, metadata=metadata)
    temporary.chmod(0o644)
    temporary.replace(path)


def train(settings: Settings, output: Path, resume: bool, checkpoint_every: int = 200) -> CLIP:
    """Return the trained model; a checkpoint beside output lets an interrupted run go on exactly where it was.

    Raises UserError where resume finds a checkpoint of other settings.
    """
    torch.manual_seed(settings.seed)
    model, tokenizer = build_model(), WordTokenizer()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2 and p is not model.logit_scale]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay, "lr": settings.lr},
        {"params": plain, "weight_decay": 0.0, "lr": settings.lr},
        {"params": [model.logit_scale], "weight_decay": 0.0, "lr": settings.scale_lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    rates = [group["lr"] for group in groups]
    checkpoint = output.with_name(output.name + ".checkpoint")
    first = 0
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != asdict(settings):
            raise UserError(f"--resume: {checkpoint} was made with other settings, {saved['settings']}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"resuming at step {first}", flush=True)

    start = time.perf_counter()
    images, scenes = draw_pool(settings.pool, settings.seed)
    print(f"drew {settings.pool} pictures in {time.perf_counter() - start:.0f} s", flush=True)
    model.train()
    start, running, count = time.perf_counter(), 0.0, 0
    for step in range(first, settings.steps):
        # The step decides the seed, so that a resumed run gets the batches that it would have had.
        rng = np.random.default_rng([settings.seed, 1_000_000 + step])
        pixels, tokens, matches = make_batch(images, scenes, tokenizer, settings, rng)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share_of_rate(settings, step)
        # Measured on two AVX512-BF16 cores: bfloat16 autocast with PyTorch's fused CPU attention saves 20 % of a step,
        # with the plain attention, whose products oneDNN runs in bfloat16, 45 to 55 %.
        # Without such instructions bfloat16's products are hundreds of times slower than float32's.
        low = _env.has_native_products("bfloat16")
        with torch.autocast("cpu", torch.bfloat16, enabled=low), sdpa_kernel(SDPBackend.MATH):
            image_features, text_features, logit_scale = model(pixels, tokens)
        logits = logit_scale * image_features.float() @ text_features.float().T
        loss = contrastive_loss(logits, matches)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        running, count = running + float(loss.detach()), count + 1
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            seconds = (time.perf_counter() - start) / (step + 1 - first)
            print(
                f"step {step + 1}/{settings.steps}  loss {running / count:.3f} nats  "
                f"logit scale {float(model.logit_scale.detach().exp()):.1f}  {seconds:.2f} s/step",
                flush=True,
            )
            running, count = 0.0, 0
        if (step + 1) % checkpoint_every == 0 and step + 1 < settings.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            temporary = checkpoint.with_name(checkpoint.name + ".tmp")
            torch.save({**state, "settings": asdict(settings)}, temporary)
            temporary.replace(checkpoint)
    save_weights(model, settings, output)
    checkpoint.unlink(missing_ok=True)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, train, and report."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m rada_fast.embedded.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="weights file to write (safetensors)")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--pool", type=int, default=defaults.pool, help="pictures to draw")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside the output")
    parser.add_argument("--images-per-class", type=int, default=50, help="of the report at the end")
    options = parser.parse_args(arguments)
    settings = Settings(steps=options.steps, batch=options.batch, seed=options.seed, pool=options.pool)
    model = train(settings, options.output, options.resume)
    report(model, WordTokenizer(), options.images_per_class)


if __name__ == "__main__":
    main()
