"""Plan an evaluation of ImageNet and its variants on many GPUs: the time, the cost, and what is used up first.

    python -m benchmarks.scale

prints the tables of docs/scale.md. Every number follows from the values at the top of this file, and docs/scale.md says
which of them were measured, which were read elsewhere, and which are estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

VIEWS, SEEDS = 64, 3
GFLOP_OF_VIEW = 35.13
"""ViT-B/16 at 224 pixels: 17.56e9 multiplications and additions."""
DECODE_MS, JPEG_KB, PIXELS = 1.7, 135, 500 * 375
HOST_MS = 0.44
"""What the thread that launches the work spends on a picture besides: its record, its line, and the loop."""
LINE_BYTES = 474
START_SECONDS = 60
CORES_OF_GPU, PCIE_GB, DISK_GB_OF_NODE, GPUS_OF_NODE = 12, 25.0, 2.0, 8


class Pictures(NamedTuple):
    """A set of pictures: how many there are, of how many classes, and their size in GB."""

    name: str
    number: int
    classes: int
    gigabytes: float


SETS = (
    Pictures("ImageNet, validation", 50_000, 1000, 6.7),
    Pictures("ImageNetV2, matched frequency", 10_000, 1000, 1.3),
    Pictures("ImageNet-Sketch", 50_889, 1000, 7.6),
    Pictures("ImageNet-A", 7_500, 200, 0.7),
    Pictures("ImageNet-R", 30_000, 200, 2.2),
)


class Device(NamedTuple):
    """A GPU: the peak of its products in bfloat16, the share of it that the encoder reaches, and its price.

    adapt_ms: the time of the adaptation to one picture in float32, three steps, by the number of classes.
    """

    name: str
    peak_tflops: float
    utilisation: float
    adapt_ms: dict[int, float]
    dollars: float


_H100 = {200: 4.75 / 4, 1000: 38.71 / 4}
_TF32_RATIO = 494 / 156
DEVICES = (
    Device("A100 40GB", 312, 0.37, {classes: _TF32_RATIO * ms for classes, ms in _H100.items()}, 1.50),
    Device("H100 80GB", 989, 0.35, _H100, 2.50),
)


def encode_ms(device: Device) -> float:
    """Return the milliseconds to encode the views of one picture."""
    return VIEWS * GFLOP_OF_VIEW / (device.utilisation * device.peak_tflops)


def picture_ms(device: Device, classes: int) -> float:
    """Return the milliseconds that a GPU takes for one picture."""
    return encode_ms(device) + device.adapt_ms[classes]


def gpu_seconds(device: Device) -> float:
    """Return the seconds that one GPU takes for all sets and seeds, without the starts of the runs."""
    return SEEDS * sum(one.number * picture_ms(device, one.classes) for one in SETS) / 1e3


def sets_table() -> list[str]:
    """Return the sets, and what one seed of each takes in GPU hours."""
    rows = [
        [one.name, f"{one.number:,}", f"{one.classes}", f"{one.gigabytes:.1f}"]
        + [f"{one.number * picture_ms(device, one.classes) / 3.6e6:.2f}" for device in DEVICES]
        for one in SETS
    ]
    total = [f"{sum(one.number for one in SETS):,}", "", f"{sum(one.gigabytes for one in SETS):.1f}"]
    hours = [f"{gpu_seconds(device) / SEEDS / 3600:.2f}" for device in DEVICES]
    header = ["set", "pictures", "classes", "GB", *(f"{device.name}, hours" for device in DEVICES)]
    return markdown(header, [*rows, ["all", *total, *hours]])


def speed_table() -> list[str]:
    """Return what one picture takes on each GPU, and how many a GPU does in a second."""
    rows = [
        [
            f"{device.name}, {classes} classes",
            f"{encode_ms(device):.2f}",
            f"{device.adapt_ms[classes]:.2f}",
            f"{picture_ms(device, classes):.2f}",
            f"{1e3 / picture_ms(device, classes):.0f}",
        ]
        for device in DEVICES
        for classes in (200, 1000)
    ]
    return markdown(["GPU", "encode ms", "adapt ms", "together ms", "pictures/s"], rows)


def plan_table() -> list[str]:
    """Return time and cost of all sets and seeds on 8 and 64 GPUs: one run at a time, or one for each node."""
    rows = []
    runs = len(SETS) * SEEDS
    for device in DEVICES:
        for gpus in (8, 64):
            work = gpu_seconds(device)
            nodes = gpus // GPUS_OF_NODE
            one_by_one = work / gpus + runs * START_SECONDS
            # A node takes the next run when it has finished one. The longest run must not be begun last.
            side_by_side = _longest(device, nodes)
            hours = [one_by_one * gpus / 3600, side_by_side * gpus / 3600]
            rows.append(
                [
                    f"{gpus} x {device.name}",
                    f"{work / gpus / 60:.1f}",
                    f"{one_by_one / 60:.1f}",
                    f"{side_by_side / 60:.1f}",
                    f"{hours[0]:.1f}, {hours[1]:.1f}",
                    f"{hours[0] * device.dollars:.0f}, {hours[1] * device.dollars:.0f}",
                ]
            )
    header = ["GPUs", "work, min", "one run after the other, min", "a run for each node, min", "GPU hours", "dollars"]
    return markdown(header, rows)


def _longest(device: Device, nodes: int) -> float:
    """Return the seconds until all runs are done if each node takes the longest run that is left."""
    runs = sorted((one.number * picture_ms(device, one.classes) / 1e3 / GPUS_OF_NODE for one in SETS), reverse=True)
    busy = [0.0] * nodes
    for seconds in runs:
        for _ in range(SEEDS):
            least = busy.index(min(busy))
            busy[least] += seconds + START_SECONDS
    return max(busy)


class Need(NamedTuple):
    """What a picture needs of something, in the unit of its supply to one GPU in a second."""

    name: str
    of_picture: float
    supply: float
    unit: str


NEEDS = (
    Need("cores that decode", DECODE_MS / 1e3, CORES_OF_GPU, "cores"),
    Need("the thread that launches", HOST_MS / 1e3, 1, "threads"),
    Need("pixels to the GPU", PIXELS * 3 / 1e9, PCIE_GB, "GB/s"),
    Need("files from the disk", JPEG_KB / 1e6, DISK_GB_OF_NODE / GPUS_OF_NODE, "GB/s"),
)


def needs_table() -> list[str]:
    """Return what one GPU needs of the rest of the machine at 200 classes, and the share of what there is."""
    rows = []
    for need in NEEDS:
        cells = [need.name]
        for device in DEVICES:
            used = need.of_picture * 1e3 / picture_ms(device, 200)
            cells.append(f"{used:.3g} {need.unit}, {100 * used / need.supply:.2g} %")
        rows.append([*cells, f"{need.supply / need.of_picture:,.0f}"])
    return markdown(["for one GPU", *(device.name for device in DEVICES), "suffices for pictures/s"], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


TABLES: tuple[Callable[[], list[str]], ...] = (sets_table, speed_table, plan_table, needs_table)


def main() -> None:
    """Print all tables."""
    for table in TABLES:
        print("\n".join(table()), end="\n\n")
    pictures = SEEDS * sum(one.number for one in SETS)
    print(
        f"pictures {pictures:,}, views {pictures * VIEWS / 1e6:.1f} million, lines {pictures * LINE_BYTES / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
