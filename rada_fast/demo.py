"""Show the method on the embedded CLIP and its drawn images: run TTT and a short EFT, and report what they gain."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from rada_fast.config.commands import EFTOptions, TTTOptions
from rada_fast.config.options import RunOptions
from rada_fast.config.tools import DemoOptions
from rada_fast.data.decode import read_image
from rada_fast.embedded import world
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.setup import open_data_and_model
from rada_fast.loops.ttt import run_ttt
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.image_features import encode_images
from rada_fast.modules import load_adapter
from rada_fast.ops import rational_adapter
from rada_fast.reports.measures import Gain, gain
from rada_fast.reports.pictures import mask_picture
from rada_fast.reports.results import read_run
from rada_fast.system import files
from rada_fast.system.terminal import PlainConsole

SHOTS = 16
TEST_IMAGES_PER_CLASS = 48
"""EFT is tested on these; each half of the classes then has 960 images, a point of accuracy is ten."""
BATCH_SIZE = 8
"""EFT trains on this many images per step; the paper's 1 takes many times longer and needs as many epochs."""
HISTOGRAM_IMAGES = 32
WORLD = "world"
OUTPUTS = frozenset({WORLD, "ttt", "eft", "report.json", "demo.png"})
"""The demo writes these into its folder, the drawn world first."""


def run_demo(config: DemoOptions) -> int:
    """Draw the images, run TTT and EFT on them and print the table. Returns the exit status."""
    start = time.perf_counter()
    console = PlainConsole()
    output = Path(config.output)
    check_output(output)
    folders = draw_images(output, config)

    ttt = run_ttt(
        TTTOptions(
            data=f"imagefolder:{folders['ttt']}",
            run=RunOptions(output=str(output / "ttt"), limit=config.images, seed=config.seed, overwrite=True),
        )
    )
    eft = run_eft(
        EFTOptions(
            train=f"imagefolder:{folders['train']}",
            test=f"imagefolder:{folders['test']}",
            shots=SHOTS,
            epochs=config.epochs,
            batch_size=BATCH_SIZE,
            train_views="crop",  # as published
            run=RunOptions(output=str(output / "eft"), seed=config.seed, overwrite=True),
        )
    )
    picture = draw_picture(output, folders["test"])
    gains = gains_of(output)

    seconds = time.perf_counter() - start
    report = {"seconds": round(seconds, 1), "ttt": ttt, "eft": eft}
    report["gains"] = {name: one and one._asdict() for name, one in gains.items()}
    files.write_json(output / "report.json", report)
    console.print(demo_table(config, ttt, eft, gains))
    console.print(
        "TTT adapts to each image by itself (64 views, 3 steps); its images are of all kinds of shift. EFT trains on "
        "random crops of 16 images of each base class, all of one kind of shift, and never sees the new classes; its "
        "mean is harmonic, and its images/s are of training. The gain is in points of accuracy on the same images, "
        "with its 95 % interval."
    )
    console.print(
        f"The demo took {seconds:.0f} s. Every image: {output / 'ttt' / 'images.jsonl'}; "
        f"summaries: {output / 'report.json'}; picture: {picture}",
        soft_wrap=True,
    )
    return 0


def check_output(output: Path) -> None:
    """Raise UserError where the folder holds anything that no demo made and that the demo's files could replace."""
    try:
        present = {path.name for path in output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"output {output} cannot be used: {error.strerror}") from None
    foreign = present - OUTPUTS if WORLD in present else present
    if foreign:
        raise UserError(
            f"output {output} must be empty, new, or an earlier demo's folder, but it holds "
            f"{ascii(min(foreign))[1:-1]}; give another --output"
        )


def draw_images(output: Path, config: DemoOptions) -> dict[str, Path]:
    """Draw image folders of the shifted world for TTT and for EFT's training and test, each from seeds of its own."""
    classes = len(world.class_names())
    plans = {
        "ttt": ("mixed", math.ceil(config.images / classes)),
        "train": (config.eft_shift, SHOTS),
        "test": (config.eft_shift, TEST_IMAGES_PER_CLASS),
    }
    folders = {}
    for index, (name, (shift, count)) in enumerate(plans.items()):
        folders[name] = output / WORLD / f"{name}-{shift}-seed{config.seed}-{count}"
        # A folder gets this name only when it is complete.
        if not folders[name].is_dir():
            temporary = folders[name].with_name(f"{folders[name].name}.partial")
            try:
                world.write_imagefolder(temporary, count, 3 * config.seed + index, shift)
            except OSError as error:
                raise UserError(f"output {output} cannot be written: {error.strerror}") from None
            temporary.replace(folders[name])
    return folders


def draw_picture(output: Path, test: Path) -> Path:
    """Draw the trained adapter's mask on images of new classes: one image in detail, many in a histogram."""
    options = TTTOptions(data=f"imagefolder:{test}")
    opened = open_data_and_model(options, {"data": options.data})
    source = opened.sources["data"]
    names = class_names_of(source, None, prompts=True)
    new = range(math.ceil(len(names) / 2), len(names))
    names = tuple(names[label] for label in new)
    (text,) = text_features(options.text, [ClassGroup(names)], opened.model)
    chosen = source.subset(list(new)).limited(HISTOGRAM_IMAGES).samples
    encoded = encode_images(chosen, opened.model.loaded(), title="encode for the picture", workers=0)
    adapter = load_adapter(output / "eft" / "adapter.safetensors")
    parameters = dict(adapter.named_parameters())
    with torch.no_grad():
        result = rational_adapter(
            encoded.features, text, opened.logit_scale, parameters, adapter.config, return_mask=True
        )
    assert result.mask is not None
    first = encoded.features[0]
    rational = first[None] * text
    before, after = int(rational.sum(-1).argmax()), int(result.logits[0].argmax())
    title = (
        f"A new class after EFT: {names[int(encoded.labels[0])]}; zero-shot: {names[before]}; adapted: {names[after]}"
    )
    path = output / "demo.png"
    mask_picture(
        path,
        image=np.asarray(read_image(chosen[0].path)),
        title=title,
        mask=result.mask[0],
        rational=rational,
        class_names=names,
        logit_scale=opened.logit_scale,
        histogram=result.mask,
    )
    return path


def gains_of(output: Path) -> dict[str, Gain | None]:
    """Return the gain in accuracy of test-time training, "ttt", and of EFT on both halves of the classes."""
    parts = {"ttt": read_run(output / "ttt")[0]} | {one.part: one for one in read_run(output / "eft")}
    return {
        name: gain((answer.right_before, answer.right_after) for answer in part.answers) for name, part in parts.items()
    }


def demo_table(config: DemoOptions, ttt: dict[str, Any], eft: dict[str, Any], gains: dict[str, Gain | None]) -> Table:
    """Make the table of accuracy before and after, speed and peak memory, with one row for each setting."""
    table = Table(title="Top-1 accuracy on the shifted world of the embedded CLIP", title_justify="left")
    for column in (
        "setting",
        "shift",
        "classes",
        "images",
        "zero-shot %",
        "adapted %",
        "gain",
        "images/s",
        "peak MiB",
    ):
        table.add_column(column, justify="left" if column in ("setting", "shift") else "right")
    speed, memory = ttt["time"]["images_per_second"], ttt["peak_memory"]["process_mib"]
    rows = [("TTT", "mixed", "ttt", ttt, speed, memory)]
    speed, memory = eft["time"]["images_per_second"], eft["peak_memory"]["process_mib"]
    for name, label in (("base", "EFT, base"), ("new", "EFT, new")):
        rows.append((label, config.eft_shift, name, eft[name], speed, memory))
    for label, shift, name, accuracy, speed, memory in rows:
        table.add_row(
            label,
            shift,
            str(accuracy["classes"]),
            str(accuracy["images"]),
            f"{accuracy['zero_shot_top1']:.1f}",
            f"{accuracy['adapted_top1']:.1f}",
            shown_gain(gains[name]),
            f"{speed:.1f}",
            f"{memory:.0f}",
        )
    table.add_row(
        "EFT, mean",
        config.eft_shift,
        "",
        "",
        f"{eft['zero_shot_harmonic_mean']:.1f}",
        f"{eft['adapted_harmonic_mean']:.1f}",
        f"{eft['adapted_harmonic_mean'] - eft['zero_shot_harmonic_mean']:+z.1f}",
        "",
        "",
    )
    return table


def shown_gain(one: Gain | None) -> str:
    """Return the text of a gain and its interval, such as "+4.1 (2.5 to 5.7)", or nothing if it is not known.

    An end that rounds to zero has no minus sign.
    """
    return "" if one is None else f"{one.mean:+z.1f} ({one.interval.low:z.1f} to {one.interval.high:z.1f})"
