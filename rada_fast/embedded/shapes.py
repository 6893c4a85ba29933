"""The shapes and textures of the drawn world, as functions of the points of the plane.

A shape is an implicit function on [-1, 1]^2, with y upwards: it is negative inside, and its value is about the distance
to the edge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def _polygon(x: Floats, y: Floats, sides: int, inradius: float) -> Floats:
    angles = np.pi / 2 + np.pi + 2 * np.pi * np.arange(sides) / sides
    return np.max([np.float32(np.cos(a)) * x + np.float32(np.sin(a)) * y for a in angles], axis=0) - inradius


def _arrow(x: Floats, y: Floats) -> Floats:
    shaft = np.maximum(np.abs(x + 0.42) - 0.58, np.abs(y) - 0.24)
    head = np.maximum(-0.05 - x, (0.85 * x + np.abs(y) - 0.85) / 1.31)
    return np.minimum(shaft, head)


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 0.95


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.hypot(x, y) - 1.0, 0.78 - np.hypot(x - 0.52, y))


def _cross(x: Floats, y: Floats) -> Floats:
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 0.32, ay - 0.98), np.maximum(ax - 0.98, ay - 0.32))


def _heart(x: Floats, y: Floats) -> Floats:
    y = y + 0.12
    lobes = np.hypot(np.abs(x) - 0.42, y - 0.42) - 0.59
    return np.minimum(lobes, (np.abs(x) + np.abs(y)) * 0.7071 - 0.59)


def _hexagon(x: Floats, y: Floats) -> Floats:
    return _polygon(x, y, 6, 0.86)


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - 0.73) - 0.25


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _star(x: Floats, y: Floats) -> Floats:
    sector = 2 * np.pi / 5
    # Fold onto half a sector: a tip at angle 0 (radius 1.1), a notch at angle pi/5 (radius 0.48).
    angle = np.abs(np.mod(np.arctan2(x, y) + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    nx, ny = 0.48 * np.sin(np.pi / 5), 1.1 - 0.48 * np.cos(np.pi / 5)
    scale = float(np.hypot(nx, ny))
    return ((radius * np.cos(angle) - 1.1) * nx + radius * np.sin(angle) * ny) / scale


def _triangle(x: Floats, y: Floats) -> Floats:
    return _polygon(x, y + 0.12, 3, 0.56)


IMPLICIT: dict[str, Callable[[Floats, Floats], Floats]] = {
    "arrow": _arrow,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "hexagon": _hexagon,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
"""The implicit function of every shape, in the alphabetical order of their names."""

TEXTURES: tuple[str, ...] = ("checkered", "dotted", "plain", "striped", "wavy")
"""The textures that a shape can have."""


def tone(texture: str, x: Floats, y: Floats, rng: np.random.Generator, period: float) -> Floats | None:
    """Return the share of the second tone at each point, in [0, 1], or None for the texture without a second tone.

    texture: one of TEXTURES; x, y: the points, in pixels; rng: draws the texture's direction and phase; period: of the
    pattern, in pixels.
    """
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = (x * cos + y * sin) / np.float32(period) + np.float32(rng.uniform())
    v = (y * cos - x * sin) / np.float32(period) + np.float32(rng.uniform())
    two_pi = np.float32(2 * np.pi)
    if texture == "plain":
        return None
    if texture == "striped":
        wave = np.sin(two_pi * u)
    elif texture == "wavy":
        wave = np.sin(two_pi * (u + 0.36 * np.sin(two_pi * v * 0.5)))
    elif texture == "checkered":
        wave = 1.6 * np.sin(np.pi * u * 1.1) * np.sin(np.pi * v * 1.1)
    else:
        wave = 2.2 * (0.34 - np.hypot(np.mod(u, 1) - 0.5, np.mod(v, 1) - 0.5)) / 0.34
    return np.clip(0.5 + 2.5 * wave, 0, 1)
