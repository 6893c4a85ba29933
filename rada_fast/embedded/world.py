"""A procedurally drawn world with compositional captions, and a shifted version of it.

Every picture shows one object, such as a red striped star, off the centre of a shaded background on which scraps of
any colour lie about; one of them may cover a part of the object. A picture has twice the side that the model sees, so
a crop shows details that the whole picture loses. Ten colours x five textures x ten shapes make 500 combinations; 40
of them (`is_held_out`) never occur in pre-training, and half of those are the demo's new classes. NumPy and PIL only.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rada_fast.embedded import shapes
from rada_fast.embedded.shapes import TEXTURES as TEXTURES
from rada_fast.embedded.shapes import Floats
from rada_fast.errors import UserError

Pixels = NDArray[np.uint8]

PICTURE_SIZE = 96
"""The side of a drawn picture, in pixels."""
IMAGE_SIZE = 48
"""The side of what the model sees: a whole picture at half its resolution, or a crop, which loses less."""
TEMPLATE = "a photo of a {}."
SHIFTS: tuple[str, ...] = ("blur", "noise", "contrast", "hue", "occlusion", "sketch")

# Alphabetical, so that the image folders of the demo sort as `class_names()` does: base classes take the first five
# colours and new classes the last five.
_RGB: dict[str, tuple[int, int, int]] = {
    "blue": (45, 85, 215),
    "brown": (128, 78, 38),
    "green": (50, 160, 60),
    "orange": (242, 138, 28),
    "pink": (246, 134, 190),
    "purple": (132, 62, 184),
    "red": (212, 38, 42),
    "teal": (20, 156, 156),
    "white": (242, 242, 240),
    "yellow": (246, 222, 48),
}
COLOURS: tuple[str, ...] = tuple(_RGB)
SHAPES: tuple[str, ...] = tuple(shapes.IMPLICIT)


class _Distance(NamedTuple):
    """The distance of a scene: the least and the largest radius of its object, in pixels, and number of its scraps."""

    radius: tuple[float, float]
    scraps: tuple[int, int]


_NEAR = _Distance(radius=(12.0, 36.0), scraps=(2, 8))
_FAR = _Distance(radius=(12.0, 24.0), scraps=(6, 12))
_LUMINANCE: dict[str, tuple[float, float]] = {"dark": (30.0, 75.0), "grey": (95.0, 145.0), "light": (175.0, 218.0)}
BACKGROUNDS: tuple[str, ...] = tuple(_LUMINANCE)

_OPENINGS: tuple[str, ...] = (
    "a photo of a {}", "a picture of a {}", "an image of a {}", "a drawing of a {}", "a {}", "the {}",
    "this is a {}", "there is a {}", "a photo of the {}", "a photo of one {}",
)  # fmt: skip
_GROUNDS: tuple[str, ...] = (" on a {} background", " over a {} background")


def _words() -> tuple[str, ...]:
    parts = itertools.chain(COLOURS, TEXTURES, SHAPES, BACKGROUNDS, _OPENINGS, _GROUNDS, (TEMPLATE,))
    return tuple(sorted({word for part in parts for word in part.replace("{}", " ").strip(string.punctuation).split()}))


WORDS: tuple[str, ...] = _words()


@dataclass(frozen=True)
class Scene:
    """The content of a picture. The generator of `draw` decides the rest, such as rotations, tints and the scraps.

    colour, texture, shape, background: one of COLOURS, TEXTURES, SHAPES, BACKGROUNDS.
    radius: the radius of the object, in pixels.
    centre: the centre of the object, (x, y) in pixels, with y downwards.
    scraps: how many bars and ovals lie about.
    covered: whether another scrap covers a part of the object.
    """

    colour: str
    texture: str
    shape: str
    background: str = "grey"
    radius: float = 20.0
    centre: tuple[float, float] = (PICTURE_SIZE / 2, PICTURE_SIZE / 2)
    scraps: int = 0
    covered: bool = False

    def attributes(self) -> tuple[int, int, int, int]:
        """Return the four attributes that captions name as indices, in the order of the fields."""
        return (
            COLOURS.index(self.colour),
            TEXTURES.index(self.texture),
            SHAPES.index(self.shape),
            BACKGROUNDS.index(self.background),
        )

    @property
    def name(self) -> str:
        """Return the class name, "red striped star"."""
        return f"{self.colour} {self.texture} {self.shape}"


def is_held_out(colour: str, texture: str, shape: str) -> bool:
    """Return whether pre-training must not see this combination.

    Colour c (index 0..9) loses a 2 x 2 block: shapes c//2 and c//2 + 5, textures c%5 and (c+1)%5. It loses
    blocks rather than scattered cells, so that held-out combinations have held-out neighbours one word away. Every pair
    of words (colour-texture, colour-shape, texture-shape) still occurs in pre-training.
    """
    c, t, s = COLOURS.index(colour), TEXTURES.index(texture), SHAPES.index(shape)
    return s % 5 == c // 2 and t in (c % 5, (c + 1) % 5)


@cache
def _pretraining_combinations() -> tuple[tuple[str, str, str], ...]:
    return tuple(combo for combo in itertools.product(COLOURS, TEXTURES, SHAPES) if not is_held_out(*combo))


def _any_scene(colour: str, texture: str, shape: str, rng: np.random.Generator, distance: _Distance) -> Scene:
    least, most = distance.radius
    radius = float(least * (most / least) ** rng.uniform())
    # Photographs have their object off the centre, but rarely at the border.
    x, y = PICTURE_SIZE * rng.uniform(0.2, 0.8, size=2)
    return Scene(
        colour=colour,
        texture=texture,
        shape=shape,
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        radius=radius,
        centre=(float(x), float(y)),
        scraps=int(rng.integers(*distance.scraps, endpoint=True)),
        covered=bool(rng.uniform() < 0.4),
    )


def pretraining_scene(rng: np.random.Generator) -> Scene:
    """Return a random scene whose (colour, texture, shape) is not held out."""
    combinations = _pretraining_combinations()
    return _any_scene(*combinations[rng.integers(len(combinations))], rng, _NEAR)


@cache
def class_names() -> tuple[str, ...]:
    """Return the demo's 40 classes in alphabetical order: 20 base classes, then 20 new ones.

    Base classes are combinations seen in pre-training; new classes were held out of it. In either half each colour has
    two shapes in two textures, so every class has neighbours one word away.
    """
    names = []
    for c, colour in enumerate(COLOURS):
        base = c < len(COLOURS) // 2
        # A base block sits one shape further than the held-out block of its colour, hence in pre-training.
        first = (c // 2 + (1 if base else 0)) % 5
        for shape, texture in itertools.product((first, first + 5), (c % 5, (c + 1) % 5)):
            names.append(f"{colour} {TEXTURES[texture]} {SHAPES[shape]}")
    return tuple(sorted(names))


def _bilinear(coarse: int) -> Floats:
    """Return the (PICTURE_SIZE, coarse) matrix that upsamples linearly."""
    at = np.linspace(0, coarse - 1, PICTURE_SIZE)
    return np.clip(1 - np.abs(at[:, None] - np.arange(coarse)[None, :]), 0, None).astype(np.float32)


_UPSAMPLE = _bilinear(6)
_GRID = ((np.arange(PICTURE_SIZE) + 0.5) / PICTURE_SIZE * 2 - 1).astype(np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_SUPERSAMPLE = 2


def _paint_background(kind: str, rng: np.random.Generator) -> Floats:
    base = rng.uniform(*_LUMINANCE[kind]) + rng.uniform(-16, 16, size=3)
    slope = rng.uniform(-22, 22, size=2)[:, None] + rng.uniform(-6, 6, size=(2, 3))
    cloud = _UPSAMPLE @ rng.normal(0, 9, size=(6, 6)).astype(np.float32) @ _UPSAMPLE.T
    canvas = base + _GRID[:, None, None] * slope[0] + _GRID[None, :, None] * slope[1] + cloud[:, :, None]
    return canvas.astype(np.float32)


def _paint_shape(
    canvas: Floats,
    shape: str,
    texture: str,
    colour: str,
    centre: tuple[float, float],
    radius: float,
    rng: np.random.Generator,
    shadow: bool,
) -> None:
    """Paint one shape onto canvas (H, W, 3) in place; centre is (x, y) in pixels, y downwards."""
    reach = 1.15 * radius + 3.0
    x0, x1 = max(0, int(centre[0] - reach)), min(PICTURE_SIZE, int(centre[0] + reach) + 1)
    y0, y1 = max(0, int(centre[1] - reach)), min(PICTURE_SIZE, int(centre[1] + reach) + 1)
    if x0 >= x1 or y0 >= y1:
        return
    k = _SUPERSAMPLE
    px = ((np.arange((x1 - x0) * k) + 0.5) / k + x0 - centre[0]).astype(np.float32)[None, :]
    py = (centre[1] - ((np.arange((y1 - y0) * k) + 0.5) / k + y0)).astype(np.float32)[:, None]
    # Arrows and crescents point anywhere; the others tilt, so that a square never reads as a diamond.
    angle = rng.uniform(-np.pi, np.pi) if shape in ("arrow", "crescent") else rng.uniform(-0.35, 0.35)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    implicit = shapes.IMPLICIT[shape]
    x, y = px * cos + py * sin, py * cos - px * sin
    unit = np.float32(1 / radius)
    distance = implicit(x * unit, y * unit) * radius  # pixels

    # Colour jitter is well inside the gaps between the ten colours.
    rgb = np.clip(np.array(_RGB[colour]) * rng.uniform(0.86, 1.08) + rng.uniform(-12, 12, size=3), 0, 255)
    rgb = rgb.astype(np.float32)
    second = rgb * 0.42 if float(rgb @ _LUMA) > 95 else rgb + (255 - rgb) * 0.62
    tone = shapes.tone(texture, x, y, rng, period=float(np.clip(rng.uniform(0.42, 0.58) * radius, 4.0, 14.0)))
    paint = np.broadcast_to(rgb, (*distance.shape, 3)) if tone is None else rgb + tone[:, :, None] * (second - rgb)
    # A thin dark rim and light from above keep white shapes on white legible.
    rim = np.clip(distance / 1.4 + 1.0, 0, 1)[:, :, None]
    light = 1 + 0.16 * np.clip(py * unit, -1, 1)[:, :, None]
    paint = paint * light * (1 - 0.45 * rim)

    def pool(values: Floats) -> Floats:
        h, w = y1 - y0, x1 - x0
        pooled: Floats = values.reshape(h, k, w, k, -1).mean(axis=(1, 3), dtype=np.float32)
        return pooled

    cover = np.clip(0.5 - distance * k, 0, 1)[:, :, None]
    region = canvas[y0:y1, x0:x1]
    if shadow:
        sx, sy = px - 1.5, py + 2.0
        shade = implicit((sx * cos + sy * sin) * unit, (sy * cos - sx * sin) * unit) * radius
        region *= 1 - 0.4 * pool(np.clip(0.5 - shade / 3.0, 0, 1)[:, :, None])
    region *= 1 - pool(cover)
    region += pool(paint * cover)


def _paint_scrap(canvas: Floats, centre: Floats, length: float, width: float, rng: np.random.Generator) -> None:
    """Paint a bar or an oval without texture; length and width are half of its sides, in pixels."""
    reach = length + 2.0
    x0, x1 = max(0, int(centre[0] - reach)), min(PICTURE_SIZE, int(centre[0] + reach) + 1)
    y0, y1 = max(0, int(centre[1] - reach)), min(PICTURE_SIZE, int(centre[1] + reach) + 1)
    angle = rng.uniform(0, np.pi)
    px = (np.arange(x0, x1) + 0.5 - centre[0]).astype(np.float32)[None, :]
    py = (np.arange(y0, y1) + 0.5 - centre[1]).astype(np.float32)[:, None]
    u = np.abs(px * np.float32(np.cos(angle)) + py * np.float32(np.sin(angle)))
    v = np.abs(py * np.float32(np.cos(angle)) - px * np.float32(np.sin(angle)))
    if rng.uniform() < 0.5:
        distance = np.maximum(u - np.float32(length), v - np.float32(width))
    else:
        distance = (np.hypot(u / np.float32(length), v / np.float32(width)) - 1) * np.float32(width)
    rgb = np.array(_RGB[COLOURS[rng.integers(len(COLOURS))]]) * rng.uniform(0.7, 1.08) + rng.uniform(-20, 20, size=3)
    rgb = np.clip(rgb, 0, 255).astype(np.float32)
    cover = np.clip(0.5 - distance, 0, 1)[:, :, None]
    region = canvas[y0:y1, x0:x1]
    region += cover * (rgb - region)


def draw(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Return a picture of the scene.

    scene: any combination, held out or not.
    rng: source of everything the scene leaves open; the same state draws the same picture.
    Returns (96, 96, 3) uint8, RGB.
    """
    canvas = _paint_background(scene.background, rng)
    for _ in range(scene.scraps):
        length = rng.uniform(4, 12)
        _paint_scrap(canvas, rng.uniform(0, PICTURE_SIZE, size=2), length, length * rng.uniform(0.2, 0.5), rng)
    _paint_shape(canvas, scene.shape, scene.texture, scene.colour, scene.centre, scene.radius, rng, shadow=True)
    if scene.covered:
        angle, radius = rng.uniform(0, 2 * np.pi), scene.radius
        centre = np.array(scene.centre) + rng.uniform(0.5, 1.0) * radius * np.array([np.cos(angle), np.sin(angle)])
        length = rng.uniform(0.5, 1.0) * radius
        _paint_scrap(canvas, np.clip(centre, 0, PICTURE_SIZE), length, length * rng.uniform(0.25, 0.5), rng)
    canvas += 3.5 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[bool, ...]]:
    """Return a caption and, for each of `Scene.attributes`, whether the caption states it.

    A caption is true of every scene that agrees on the stated attributes: pre-training uses that for its targets.
    """
    chance = rng.uniform(size=4)
    says_texture = bool(chance[0] < 0.93)
    says_background = bool(chance[1] < 0.25)
    words = [scene.colour, scene.texture] if says_texture else [scene.colour]
    if chance[2] < 0.15:
        words.reverse()
    text = _OPENINGS[rng.integers(len(_OPENINGS))].format(" ".join([*words, scene.shape]))
    if text.startswith("a orange"):
        text = "an" + text[1:]
    if says_background:
        text += _GROUNDS[rng.integers(len(_GROUNDS))].format(scene.background)
    if chance[3] < 0.7:
        text += "."
    return text, (True, says_texture, True, says_background)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption that is true of the scene; templates and stated attributes vary."""
    return describe(scene, rng)[0]


def _blur(image: Floats, rng: np.random.Generator) -> Floats:
    sigma = rng.uniform(1.3, 2.0)
    taps = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(image, ((6, 6), (6, 6), (0, 0)), mode="edge")
    # Row i of the band matrix holds the taps that make output pixel i from the padded ones.
    band = np.stack([np.pad(taps, (i, PICTURE_SIZE - 1 - i)) for i in range(PICTURE_SIZE)])
    blurred: Floats = np.einsum("iy,yxc,jx->ijc", band, padded, band, optimize=True)
    return blurred


def _noise(image: Floats, rng: np.random.Generator) -> Floats:
    noisy: Floats = image + rng.normal(0, rng.uniform(30, 50), size=image.shape).astype(np.float32)
    return noisy


def _contrast(image: Floats, rng: np.random.Generator) -> Floats:
    level = np.float32(rng.uniform(90, 165))
    flattened: Floats = (image - image.mean()) * np.float32(rng.uniform(0.3, 0.5)) + level
    return flattened


def _hue(image: Floats, rng: np.random.Generator) -> Floats:
    # The chroma plane turns about the grey axis by 10 to 20 degrees; neighbouring colours are 30 or more apart.
    angle = rng.uniform(10, 20) * rng.choice([-1, 1]) * np.pi / 180
    saturation = rng.uniform(0.5, 0.9)
    grey = image @ _LUMA
    chroma = image - grey[:, :, None]
    axis = np.ones(3) / np.sqrt(3)
    rotated = chroma * np.cos(angle) + np.cross(np.broadcast_to(axis, image.shape), chroma) * np.sin(angle)
    return (grey[:, :, None] + saturation * rotated).astype(np.float32)


def _occlusion(image: Floats, rng: np.random.Generator) -> Floats:
    covered = image.copy()
    for _ in range(int(rng.integers(3, 6))):
        h, w = rng.integers(9, 19, size=2)
        y, x = rng.integers(4, PICTURE_SIZE - h - 3), rng.integers(4, PICTURE_SIZE - w - 3)
        covered[y : y + h, x : x + w] = rng.uniform(40, 200) + rng.uniform(-15, 15, size=3)
    return covered


def _sketch(image: Floats, rng: np.random.Generator) -> Floats:
    smooth = _UPSAMPLE @ rng.normal(0, 1, size=(6, 6)).astype(np.float32) @ _UPSAMPLE.T
    padded = np.pad(image @ _LUMA, 1, mode="edge")
    dx = (padded[:-2, 2:] + 2 * padded[1:-1, 2:] + padded[2:, 2:]) - (
        padded[:-2, :-2] + 2 * padded[1:-1, :-2] + padded[2:, :-2]
    )
    dy = (padded[2:, :-2] + 2 * padded[2:, 1:-1] + padded[2:, 2:]) - (
        padded[:-2, :-2] + 2 * padded[:-2, 1:-1] + padded[:-2, 2:]
    )
    strokes = 0.8 * np.clip(np.hypot(dx, dy) / 400.0 - 0.2, 0, 1)[:, :, None]
    # The picture becomes a pencil drawing: paper shows through hatching that fades in and out, edges become strokes.
    yy, xx = np.mgrid[:PICTURE_SIZE, :PICTURE_SIZE]
    hatch = 0.15 * np.sin(2 * np.pi * (xx + yy) / rng.uniform(3.2, 4.5))
    pressure = np.clip(0.6 + 0.1 * smooth + hatch, 0.2, 1.0)[:, :, None]
    paper = 240 + rng.normal(0, 4, size=(PICTURE_SIZE, PICTURE_SIZE, 1))
    drawn = paper + pressure * (image - paper)
    return (drawn * (1 - strokes) + 45 * strokes).astype(np.float32)


_SHIFT: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "blur": _blur,
    "noise": _noise,
    "contrast": _contrast,
    "hue": _hue,
    "occlusion": _occlusion,
    "sketch": _sketch,
}


def shifted(image: Pixels, name: str, rng: np.random.Generator) -> Pixels:
    """Return the picture as the shifted domain shows it.

    image: (96, 96, 3) uint8. name: one of SHIFTS. rng: draws the severity and the details.
    Returns (96, 96, 3) uint8. Raises UserError for another name.
    """
    if name not in _SHIFT:
        raise UserError(f"shift must be one of {', '.join(SHIFTS)}, got {name!r}")
    return np.clip(_SHIFT[name](image.astype(np.float32), rng) + 0.5, 0, 255).astype(np.uint8)


def class_image(class_index: int, seed: int, shift: str | None) -> Pixels:
    """Return one picture of a class, the same for the same arguments.

    class_index: 0 to len(class_names()) - 1. seed: 0 or more.
    shift: None for a picture as pre-training draws them; one of SHIFTS for one that shows its object from further away,
        among more scraps, and is then blurred and so on; or "mixed", which takes the kinds in turn.
    Returns (96, 96, 3) uint8. Raises IndexError for a class that is not there, UserError for an unknown shift.
    """
    names = class_names()
    if not 0 <= class_index < len(names):
        raise IndexError(f"class_index must be in 0..{len(names) - 1}, got {class_index}")
    # The leading number separates these streams from those of pre-training, whose seeds start at small integers.
    rng = np.random.default_rng([20250721, class_index, seed])
    colour, texture, shape = names[class_index].split()
    image = draw(_any_scene(colour, texture, shape, rng, _NEAR if shift is None else _FAR), rng)
    if shift is None:
        return image
    kind = SHIFTS[(class_index + seed) % len(SHIFTS)] if shift == "mixed" else shift
    return shifted(image, kind, rng)


def write_imagefolder(root: Path, images_per_class: int, seed: int, shift: str | None) -> None:
    """Write PNG files, one sub-folder per class (the class name with underscores).

    root: a folder that is empty or not there yet. images_per_class: 1 to 100000. seed: 0 or more; folders written
    with different seeds share no picture. shift: as in `class_image`. Raises UserError for what cannot be used.
    """
    if not 1 <= images_per_class <= 100_000:
        raise UserError(f"images_per_class must be in 1..100000, got {images_per_class}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    if shift is not None and shift != "mixed" and shift not in SHIFTS:
        raise UserError(f"shift must be one of {', '.join(SHIFTS)}, mixed or None, got {shift!r}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"root must be an empty folder or a new one, got {root}")
    for index, name in enumerate(class_names()):
        folder = root / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for i in range(images_per_class):
            Image.fromarray(class_image(index, seed * 100_000 + i, shift)).save(folder / f"{i:05d}.png")
