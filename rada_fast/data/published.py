"""What is published about data sets: their folders in different projects, and their numbers of classes and images."""

from __future__ import annotations

import re
from typing import NamedTuple


class CoopSet(NamedTuple):
    """One of the data sets of CoOp whose split into training, validation and test images is published.

    name: the name in its split file, split_zhou_NAME.json.
    folders: the names of its folder, CoOp's first.
    images: the places of the images below the folder.
    classes: the number of classes.
    counts: the numbers of training, validation and test images.
    """

    name: str
    folders: tuple[str, ...]
    images: tuple[str, ...]
    classes: int
    counts: tuple[int, int, int]

    @property
    def split_file(self) -> str:
        """The name of the file that lists its images."""
        return f"split_zhou_{self.name}.json"


COOP_SETS = (
    CoopSet("Caltech101", ("caltech-101", "Caltech101"), ("101_ObjectCategories", ""), 100, (4128, 1649, 2465)),
    CoopSet("OxfordPets", ("oxford_pets", "OxfordPets", "pets"), ("images", ""), 37, (2944, 736, 3669)),
    CoopSet("StanfordCars", ("stanford_cars", "StanfordCars", "cars"), ("",), 196, (6509, 1635, 8041)),
    CoopSet("OxfordFlowers", ("oxford_flowers", "Flower102", "flowers102"), ("jpg", ""), 102, (4093, 1633, 2463)),
    CoopSet("Food101", ("food-101", "Food101"), ("images", ""), 101, (50500, 20200, 30300)),
    CoopSet("FGVCAircraft", ("fgvc_aircraft", "aircraft"), ("images",), 100, (3334, 3333, 3333)),
    CoopSet("SUN397", ("sun397", "SUN397"), ("SUN397", ""), 397, (15880, 3970, 19850)),
    CoopSet("DescribableTextures", ("dtd", "DTD"), ("images", ""), 47, (2820, 1128, 1692)),
    CoopSet("EuroSAT", ("eurosat", "EuroSAT"), ("2750", ""), 10, (13500, 5400, 8100)),
    CoopSet("UCF101", ("ucf101", "UCF101"), ("UCF-101-midframes", ""), 101, (7639, 1898, 3783)),
)
"""The ten data sets beside ImageNet, with the numbers of images in CoOp's split files."""
AIRCRAFT = "FGVCAircraft"
"""The set whose images are listed in the text files of its authors instead."""


def plain(name: str) -> str:
    """Return a name without capital letters, spaces and signs, which projects write in different ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def coop_set(name: str) -> CoopSet | None:
    """Return the data set of CoOp that a folder or a project calls by this name, or None."""
    wanted = plain(name)
    return next((one for one in COOP_SETS if wanted in map(plain, (one.name, *one.folders))), None)
