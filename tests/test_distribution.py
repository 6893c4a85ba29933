"""What is published agrees with the package: versions, optional dependencies, the citation, the files of a wheel."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import rada_fast

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIGURATION["project"]


def test_the_packages_of_the_wheel_are_all_of_the_package() -> None:
    folders = {file.parent for top in ("rada_fast", "kernels") for file in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    wanted = {f"rada_fast.{name}" if name.startswith("kernels") else name for name in names}
    assert set(CONFIGURATION["tool"]["setuptools"]["packages"]) == wanted


def test_what_commands_need_beside_code_is_package_data() -> None:
    patterns = CONFIGURATION["tool"]["setuptools"]["package-data"]["rada_fast"]
    listed = {path for pattern in patterns for path in (ROOT / "rada_fast").glob(pattern)}
    others = {
        path
        for path in (ROOT / "rada_fast").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so") and "lib" not in path.parts
    }
    assert listed == others


def test_every_extra_that_a_message_or_a_page_names_exists() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "rada_fast").rglob("*.py")]
    texts += [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
    named = {
        extra for text in texts for group in re.findall(r"rada_fast\[([\w,]+)\]'", text) for extra in group.split(",")
    }
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_oldest_python_has_a_classifier() -> None:
    versions = [name.split(" :: ")[-1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert PROJECT["requires-python"] == f">={min(versions, key=lambda name: int(name.split('.')[1]))}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rada_fast.__version__
    assert citation["license"] == PROJECT["license"]
    assert {reference["title"] for reference in citation["references"]} == {
        "One Last Attention for Your Vision-Language Model"
    }


def test_the_issue_templates_are_forms() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert forms.pop("config") == {"blank_issues_enabled": False}
    assert set(forms) == {"bug", "speed", "question"}
    for form in forms.values():
        assert form["name"]
        assert form["description"]
        assert {element["type"] for element in form["body"]} == {"textarea"}
        assert all(element["attributes"]["label"] for element in form["body"])


def test_every_public_name_has_a_place_on_the_pages_of_the_documentation() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
    listed = {name for text in texts for name in re.findall(r"^::: rada_fast\.(\S+)$", text, flags=re.MULTILINE)}
    assert set(rada_fast.__all__) - listed == {"__version__", "compat", "ops"}
    assert {f"ops.{name}" for name in rada_fast.ops.__all__ if not name.isupper()} - listed == {
        "ops.backends",
        "ops.use_backend",
    }
