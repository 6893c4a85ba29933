"""The prompts of the classes: templates with a place for the name, and files that describe single classes."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rada_fast.data.folders import EXAMPLES
from rada_fast.errors import UserError
from rada_fast.models.class_names import folded
from rada_fast.system import notices

PHOTO = "a photo of a {}."

# The prompt that publications on prompt learning use for each data set.
DATASET_TEMPLATES = {
    "caltech101": PHOTO,
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "food101": "a photo of {}, a type of food.",
    "imagenet": PHOTO,
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": PHOTO,
    "sun397": PHOTO,
    "ucf101": "a photo of a person doing {}.",
}
OF_DATASET = "coop"
"""With this value, every data set gets its own template of DATASET_TEMPLATES."""

# The other names of these data sets and of their folders, in lower case and without anything but letters and digits.
_OTHER_NAMES = {
    "describabletextures": "dtd",
    "flower102": "oxford_flowers",
    "flowers102": "oxford_flowers",
    "oxfordflowers102": "oxford_flowers",
    "pets": "oxford_pets",
    "cars": "stanford_cars",
    "aircraft": "fgvc_aircraft",
    "ucf101midframes": "ucf101",
    "101objectcategories": "caltech101",
    "imagenetadversarial": "imagenet",
    "imagenetrendition": "imagenet",
    "imageneta": "imagenet",
    "imagenetr": "imagenet",
    "imagenetsketch": "imagenet",
    "imagenetv2": "imagenet",
    "imagenetv2matchedfrequencyformatval": "imagenet",
    "objectnet": "imagenet",
}


@dataclass(frozen=True)
class Descriptions:
    """What a file says of each class by its name.

    path: the file.
    by_name: the sentences about each class, by its name in the form of _key.
    names: the names as the file has them, by the same keys.
    """

    path: Path
    by_name: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Prompts:
    """Everything that is said of the classes. The features of all prompts of a class are averaged.

    templates: texts with {} for the name, which serve every class.
    descriptions: files with sentences about single classes.
    """

    templates: tuple[str, ...] = ()
    descriptions: tuple[Descriptions, ...] = ()

    def of(self, name: str) -> tuple[str, ...]:
        """Return the prompts of a class. A {} in a description stands for the name, too."""
        own = [sentence for file in self.descriptions for sentence in file.by_name.get(_key(name), ())]
        return tuple(text.replace("{}", name) for text in (*self.templates, *own))

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError if a file describes only some of the classes, naming the others and what they may be called.

        names: the names of all classes.
        """
        for file in self.descriptions:
            missing = [name for name in dict.fromkeys(names) if _key(name) not in file.by_name]
            if missing:
                shown = ", ".join(f"{name!r}{_close(name, file)}" for name in missing[:EXAMPLES])
                more = f" and {len(missing) - EXAMPLES} more" if len(missing) > EXAMPLES else ""
                raise UserError(
                    f"templates file {file.path} must describe every class, it lacks {len(missing)} of {len(names)}: "
                    f"{shown}{more}"
                )
            wanted = {_key(name) for name in names}
            if others := [name for key, name in file.names.items() if key not in wanted]:
                notices.note(
                    f"templates file {file.path} also describes {len(others)} classes that are not in use, such as "
                    f"{others[0]!r}"
                )

    def identity(self) -> list[str]:
        """Return what tells whether the prompts are still the same: the templates, and a hash of each description."""
        hashes = [
            hashlib.sha256(json.dumps(sorted(file.by_name.items())).encode()).hexdigest() for file in self.descriptions
        ]
        return [*self.templates, *hashes]


def _close(name: str, file: Descriptions) -> str:
    """Return a question after a name that a file lacks, with the most similar name of the file."""
    close = difflib.get_close_matches(_key(name), file.by_name, n=1)
    return f" (is it {file.names[close[0]]!r} there?)" if close else ""


def _key(name: str) -> str:
    """Return a name in the form in which names of classes and of descriptions are compared."""
    return " ".join(folded(name).replace("_", " ").split())


def resolve_prompts(values: str | Sequence[str], data: str | None = None) -> Prompts:
    """Return the prompts that the option --templates names.

    values: one or more of these: a template with {}; the name of known templates; a file of templates, which is a JSON
        list or has a template on each line; a JSON file with sentences for each class, {"cat": ["A cat has ...", ...]};
        or "coop" for the template of the data set.
    data: the data with these classes as KIND:PATH, from which "coop" knows the data set.

    Raises UserError with the known names if a value is none of these, or if a template has no {}.
    """
    templates: list[str] = []
    descriptions: list[Descriptions] = []
    for value in (values,) if isinstance(values, str) else values:
        if value == OF_DATASET:
            templates.append(_template_of_dataset(data))
        elif (known := _known_templates(value)) is not None:
            templates += known
        else:
            found = _read_file(value)
            if isinstance(found, Descriptions):
                descriptions.append(found)
            else:
                templates += found
    if not templates and not descriptions:
        raise UserError("templates must hold at least one template, got none")
    # A template that two values name would count twice.
    return Prompts(tuple(dict.fromkeys(templates)), tuple(descriptions))


def _known_templates(value: str) -> list[str] | None:
    """Return a template itself, or the templates of a known name, or None."""
    if "{}" in value:
        return [value]
    if value == "photo":
        return [PHOTO]
    if value in DATASET_TEMPLATES:
        return [DATASET_TEMPLATES[value]]
    if value not in ("openai", "simple"):
        return None
    from open_clip import zero_shot_metadata

    makers = {
        "openai": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
        "simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
    }[value]
    return [make("{}") for make in makers]


def _template_of_dataset(data: str | None) -> str:
    """Return the template of the data set that some data belong to. Raises UserError if it is not known."""
    name = None if data is None else dataset_of(data)
    if name is not None:
        return DATASET_TEMPLATES[name]
    what = "no data are given here" if data is None else f"{data} is none that it knows"
    raise UserError(
        f"templates {OF_DATASET} chooses by the data set, and {what}; give one of {', '.join(DATASET_TEMPLATES)}, or a "
        "template"
    )


def dataset_of(path: str) -> str | None:
    """Return the name in DATASET_TEMPLATES of the data set that a path or KIND:PATH belongs to, or None.

    The last part of the path that is the name of a data set or of its folder decides.
    """
    kind, _, rest = path.partition(":") if re.match(r"[\w-]+:", path) else ("", "", path)
    parts = [part for part in (kind, *Path(rest).parts) if part]
    known = {_bare(name): name for name in DATASET_TEMPLATES} | _OTHER_NAMES
    for part in reversed(parts):
        for form in (_bare(part), _bare(Path(part).stem)):
            if form in known:
                return known[form]
    return None


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _read_file(value: str) -> list[str] | Descriptions:
    """Read a file of templates or of descriptions. Raises UserError naming what cannot be used."""
    path = Path(value).expanduser()
    try:
        exists = path.is_file()
    except OSError:  # the text is too long for the name of a file
        exists = False
    if not exists:
        known = ["photo", "simple", "openai", OF_DATASET, *DATASET_TEMPLATES]
        raise UserError(f"templates must be a template with {{}}, a file, or one of {', '.join(known)}; got {value!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        # JSON is not taken for a template because its file has another ending.
        as_json = path.suffix.lower() == ".json" or re.match(r'\s*[\[{]\s*"', text) is not None
        found = (
            json.loads(text, object_pairs_hook=lambda pairs: _distinct(pairs, path))
            if as_json
            else [line for line in text.splitlines() if line.strip()]
        )
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"templates file {path} cannot be read: {error}") from None
    if isinstance(found, dict):
        return _descriptions(path, found)
    sound = isinstance(found, list) and found
    if not sound or not all(isinstance(template, str) and "{}" in template for template in found):
        raise UserError(f"templates file {path} must hold one or more templates, each with {{}}")
    return found


def _distinct(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """Return an object of JSON. Raises UserError where it names a class twice, of which JSON would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"templates file {path} describes {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _descriptions(path: Path, found: Mapping[str, Any]) -> Descriptions:
    """Return the descriptions that a JSON object holds. Raises UserError naming a class without sentences."""
    by_name: dict[str, tuple[str, ...]] = {}
    names: dict[str, str] = {}
    for name, value in found.items():
        sentences = [value] if isinstance(value, str) else value
        sound = isinstance(sentences, list) and sentences
        if not sound or not all(isinstance(one, str) and one.strip() for one in sentences):
            raise UserError(
                f"templates file {path} must list one or more sentences for every class, it does not for {name!r}"
            )
        key = _key(name)
        if key in names:
            raise UserError(f"templates file {path} describes {name!r} twice, also as {names[key]!r}")
        by_name[key], names[key] = tuple(sentences), name
    if not by_name:
        raise UserError(f"templates file {path} must describe one or more classes, it is empty")
    return Descriptions(path, by_name, names)
