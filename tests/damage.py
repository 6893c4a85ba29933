"""Damage picture files in the ways in which large collections of them are damaged.

`python -m tests.damage FOLDER COUNT` writes COUNT pictures of two classes, of which one per cent are damaged.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _noise_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    # This byte cannot occur in the data of a JPEG.
    content[middle : middle + 2] = b"\xff\xc1"
    path.write_bytes(content)


def _bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def _replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _socket(path: Path) -> None:
    # The name of a socket is short, so it is made in the folder.
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": _cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * 4000),
    "text": lambda path: path.write_text("<html>404 Not Found</html>"),
    "noise inside": _noise_inside,
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)),
    "bomb": _bomb,
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "archive": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 100),
    "tensor": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + b"\0" * 100),
    "script": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
    "drawing": lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>'),
}
"""Damage of the contents of a file, by name. A run records these pictures as unreadable."""
REPLACED: dict[str, Callable[[Path], object]] = {
    "loop of links": _replaced_by(lambda path: path.symlink_to(path)),
    "link to nothing": _replaced_by(lambda path: path.symlink_to(path.with_name("nothing.jpg"))),
    "link to a device": _replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "pipe": _replaced_by(os.mkfifo),
    "folder": _replaced_by(Path.mkdir),
    "socket": _replaced_by(_socket),
}
"""Other things in the place of a file. A run records them, or names them in a warning because they are no files."""


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Write pictures of noise into two class folders, and return their paths."""
    generator = np.random.default_rng(0)
    paths = []
    for index in range(count):
        path = folder / ("cat", "dog")[index % 2] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        pixels[..., index % 2] //= 4
        Image.fromarray(pixels).save(path, quality=90)
        paths.append(path)
    return paths


if __name__ == "__main__":
    every, kinds = write_pictures(Path(sys.argv[1]), int(sys.argv[2])), {**DAMAGE, **REPLACED}
    for number, damaged in enumerate(every[50::100]):
        name = list(kinds)[number % len(kinds)]
        kinds[name](damaged)
        print(name, damaged)
