"""Define the options that everything shares that the command `bench` measures, and the checks of sizes."""

from __future__ import annotations

from dataclasses import dataclass

from rada_fast.config.checks import check_integer, check_paths, check_positive
from rada_fast.errors import UserError

GRID = ((1, 50), (1, 500), (6, 200), (6, 1000), (64, 100), (32, 1000))
"""The pairs (B, K) at which the adapter is measured."""
MAX_SIZE = 2**20
"""No number of images, views or classes may be larger."""


@dataclass(frozen=True)
class MeasuringOptions:
    """These options say how long to measure and where the figures go."""

    seconds: float = 10.0
    """About how long the rounds of one setting take together; there are at least three rounds."""
    repeats: int | None = None
    """Rounds of each setting, whatever time they take. In a round, everything is timed in turn."""
    seed: int = 0
    """Seed of the drawn pictures, of the drawn features and of random weights."""
    output: str | None = None
    """Draw the figures into this PNG file; or a folder, for the picture and the figures as JSON."""
    json: bool = False
    """Print one JSON line for each figure instead of a table."""

    def __post_init__(self) -> None:
        check_positive("seconds", self.seconds)
        if self.repeats is not None:
            check_integer("repeats", self.repeats, 1, 10**6)
        check_integer("seed", self.seed, 0, 2**31 - 1)
        check_paths(self, "output")


def check_sizes(name: str, values: tuple[int, ...]) -> None:
    """Raise UserError unless there is at least one size, all are numbers that can be used, and none is repeated."""
    if not values:
        raise UserError(f"{name} must name at least one number, got none")
    for value in values:
        check_integer(name, value, 1, MAX_SIZE)
    if len(set(values)) < len(values):
        raise UserError(f"{name} must not repeat a number, got {' '.join(map(str, values))}")


def check_width(width: int | None) -> None:
    """Raise UserError unless a width D can be used; None can."""
    if width is not None:
        check_integer("embed_dim", width, 1, 2**16)
        if width % 8:
            raise UserError(f"embed_dim must be a multiple of the adapter's 8 heads, got {width}")
