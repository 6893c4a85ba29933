"""Train the embedded weights again: `python -m rada_fast.embedded.pretrain --output FILE`.

Draws a fixed pool of pictures with fresh captions each time one is used, trains with CLIP's contrastive loss on the
CPU, and prints zero-shot accuracy on clean and shifted pictures of the demo's classes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.transformer import PatchDropout
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rada_fast import _env
from rada_fast.embedded import world
from rada_fast.embedded.model import MEAN, STD, WordTokenizer, build_model
from rada_fast.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings are what the weights depend on; they are kept in the weights file's metadata."""

    steps: int = 1300
    batch: int = 256
    seed: int = 0
    pool: int = 60_000  # pictures; they take 737 MB of memory, and each is used five to six times
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    # Dropping half the patches halves the cost of a step; the later part sees whole pictures.
    patch_dropout: float = 0.5
    patch_dropout_until: float = 0.4


_CHUNK = 500
# Some words that mean nothing here are replaced by the unknown one, so that prompts with foreign words keep working.
_UNKNOWN = 0.03


def _draw_chunk(job: tuple[int, int, int]) -> tuple[NDArray[np.uint8], list[world.Scene]]:
    seed, chunk, count = job
    rng = np.random.default_rng([seed, chunk])
    scenes = [world.pretraining_scene(rng) for _ in range(count)]
    return np.stack([world.draw(scene, rng) for scene in scenes]), scenes


def draw_pool(size: int, seed: int) -> tuple[NDArray[np.uint8], list[world.Scene]]:
    """Return size pictures (size, 64, 64, 3) uint8 and their scenes, drawn by all cores, the same for any number."""
    jobs = [(seed, chunk, min(_CHUNK, size - start)) for chunk, start in enumerate(range(0, size, _CHUNK))]
    images = np.empty((size, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), dtype=np.uint8)
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


def normalise(images: Tensor) -> Tensor:
    """Return (B, 3, 64, 64) float32 network input from (B, 64, 64, 3) uint8 pictures."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _mirrored(scene: world.Scene) -> world.Scene:
    row, column = divmod(world.POSITIONS.index(scene.position), 3)
    return world.Scene(**{**asdict(scene), "position": world.POSITIONS[3 * row + 2 - column]})


def make_batch(
    images: NDArray[np.uint8], scenes: list[world.Scene], tokenizer: WordTokenizer, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch of the pool with fresh captions, mirror images and crops.

    Returns pixels (size, 3, 64, 64) float32, tokens (size, context_length) int64 and matches (size, size) bool:
    whether the caption of column j is true of the picture of row i.
    """
    chosen = rng.integers(len(scenes), size=size)
    flips = rng.uniform(size=size) < 0.5
    batch = [_mirrored(scenes[i]) if flip else scenes[i] for i, flip in zip(chosen, flips, strict=True)]
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

    # One bilinear resampling makes the mirror image and a crop of 80 to 100 % of the side.
    zoom = rng.uniform(0.8, 1.0, size=size)
    offset = rng.uniform(-1, 1, size=(size, 2)) * (1 - zoom)[:, None]
    theta = np.zeros((size, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = np.where(flips, -zoom, zoom), zoom, offset
    pixels = normalise(torch.from_numpy(images[chosen]))
    grid = F.affine_grid(torch.from_numpy(theta), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False), tokens, matches


def contrastive_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Return CLIP's symmetric loss where a caption may be true of several pictures of the batch.

    logits: (B, B), pictures by captions. matches: (B, B) bool with a true diagonal. Targets are uniform over the
    matches of a row (of a column); with one match each it is CLIP's loss. Returns a scalar in nats.
    """
    target = matches.float()
    by_image = -(F.log_softmax(logits, dim=1) * target).sum(1) / target.sum(1)
    by_text = -(F.log_softmax(logits, dim=0) * target).sum(0) / target.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


def learning_rate(settings: Settings, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


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
            logits.append(model.encode_image(normalise(torch.from_numpy(images)), normalize=True) @ text.T)
    scores = torch.cat(logits)
    base, new = labels < half, labels >= half
    return (
        float((scores.argmax(1) == labels).float().mean()),
        float((scores[base, :half].argmax(1) == labels[base]).float().mean()),
        float((scores[new, half:].argmax(1) + half == labels[new]).float().mean()),
    )


def report(model: CLIP, tokenizer: WordTokenizer, images_per_class: int) -> None:
    """Print zero-shot accuracy in percent, clean, mixed and per shift."""
    model.eval()
    print(f"zero-shot accuracy, {images_per_class} images per class     all    base     new", flush=True)
    for shift in (None, "mixed", *world.SHIFTS):
        accuracies = zero_shot(model, tokenizer, shift, images_per_class)
        print(f"  {shift or 'clean':32s}", *(f"{100 * value:5.1f} %" for value in accuracies), flush=True)


def save_weights(model: CLIP, settings: Settings, path: Path) -> None:
    """Write the weights as float16 safetensors, atomically, with the settings in the metadata."""
    # Measured on 2000 pictures per domain: float16 leaves clean, blur, noise, hue and occlusion accuracy as they were
    # in float32 (80.8, 59.1, 44.4, 69.2, 48.3 %), and halves the file to 3.5 MB.
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
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
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
        dropping = step < settings.patch_dropout_until * settings.steps and settings.patch_dropout > 0
        model.visual.patch_dropout = PatchDropout(settings.patch_dropout) if dropping else torch.nn.Identity()
        # The step decides the seed, so that a resumed run gets the batches that it would have had.
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rng = np.random.default_rng([settings.seed, 1_000_000 + step])
        pixels, tokens, matches = make_batch(images, scenes, tokenizer, settings.batch, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
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
