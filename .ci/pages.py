"""What the documentation pages need beside the files in docs/: a hook of mkdocs and an extension of griffe.

The hook adds pages that are made of other files of the checkout: the README as the first page, the examples, and the
pages of the project. The extension makes lists of the plain text in docstrings that describes arguments.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
DESCRIBED = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>\S.*)")
"""A line of a docstring that describes arguments or attributes."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of docs/ that mkdocs.yml does not list at the end of the guide."""
    listed = json.dumps(config.nav)
    others = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f'"{path.name}"' not in listed]
    for section in config.nav or []:
        if isinstance(section, dict) and "Guide" in section:
            section["Guide"] += others
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    files.append(File.generated(config, "index.md", content=linked((ROOT / "README.md").read_text(encoding="utf-8"))))
    files.append(File.generated(config, "examples.md", content=examples()))
    for name, page in PROJECT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=linked(text)))
    return files


def linked(text: str) -> str:
    """Return the text with links to files of the checkout turned into links to pages."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    text = re.sub(r"\]\(examples/?[^)]*\)", "](examples.md)", text)
    for name, page in PROJECT.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text


def examples() -> str:
    """Return a page with every example: programs as they are, and notebooks as text and code."""
    parts = ["# Examples", "These are the files of the folder `examples`. The tests run each of them as it is."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {path.name}", f"```python\n{path.read_text(encoding='utf-8').rstrip()}\n```"]
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        parts.append(f"## {path.name}")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            # The page and its files have the upper two levels of headings.
            heading = re.sub(r"^#+", "###", source)
            parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else heading)
    return "\n\n".join(parts) + "\n"


class HouseDocstrings(griffe.Extension):
    """Turn "name: text" lines of docstrings into items of a Markdown list."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring whose descriptions of arguments are items of a list.

    A paragraph whose first line describes an argument is a list. Indented lines go on with their item.
    """
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        if DESCRIBED.fullmatch(lines[0]):
            lines = [item(line) for line in lines]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def item(line: str) -> str:
    """Return a line of a list, with the names in bold if it begins an item."""
    found = DESCRIBED.fullmatch(line)
    if found is None:
        return line
    names = ", ".join(f"**{name}**" for name in found["names"].split(", "))
    return f"- {names}: {found['text']}"
