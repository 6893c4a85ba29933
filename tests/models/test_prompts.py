"""Prompts come from names, templates and files, and a file that describes other classes is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rada_fast.config.options import ClassOptions
from rada_fast.errors import UserError
from rada_fast.models.prompts import DATASET_TEMPLATES, dataset_of, resolve_prompts
from rada_fast.system import notices


def test_templates_come_from_names_texts_and_files(tmp_path: Path) -> None:
    def templates(*values: str) -> tuple[str, ...]:
        return resolve_prompts(values).templates

    assert templates("photo") == ("a photo of a {}.",)
    assert templates("my {} picture") == ("my {} picture",)
    assert len(templates("openai")) == 80
    assert len(templates("simple")) == 7
    assert templates("dtd", "photo", "a {}", "photo") == ("{} texture.", "a photo of a {}.", "a {}")
    (tmp_path / "t.txt").write_text("a {}.\n\nthe {}.\n")
    (tmp_path / "t.json").write_text('["a {}."]')
    assert templates(str(tmp_path / "t.txt")) == ("a {}.", "the {}.")
    assert templates(str(tmp_path / "t.json")) == ("a {}.",)
    with pytest.raises(UserError, match=r"templates must be a template with {}, a file, or one of photo"):
        templates("photograph")


def test_every_known_template_has_one_place_for_the_name() -> None:
    for name in ("photo", "simple", "openai", *DATASET_TEMPLATES):
        found = resolve_prompts(name).templates
        assert all(template.count("{}") == 1 for template in found)
        assert len(set(found)) == len(found)
    assert len(DATASET_TEMPLATES) == 11


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    contents = {
        "deep.json": "[" * 100_000,
        "none.txt": "\n",
        "bad.txt": "no place\n",
        "empty.json": "{}",
        "number.json": '{"cat": 3}',
        "without.json": '{"cat": []}',
        "twice.json": '{"sea_lion": ["A."], "Sea lion": ["B."]}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for value in (*(str(tmp_path / name) for name in contents), str(tmp_path), "x" * 5000):
        with pytest.raises(UserError, match="templates") as caught:
            resolve_prompts(value)
        assert "\n" not in str(caught.value)


def test_json_is_read_whatever_its_file_is_called(tmp_path: Path) -> None:
    for name in ("a.JSON", "b.txt", "c"):
        (tmp_path / name).write_text(' ["a {}.",\n"the {}."]')
        assert resolve_prompts(str(tmp_path / name)).templates == ("a {}.", "the {}.")
    (tmp_path / "d.json").write_text('{"owl": ["It hoots."], "fox": ["Red."], "owl": ["Big."]}')
    with pytest.raises(UserError, match=r"templates file .*d.json describes 'owl' twice"):
        resolve_prompts(str(tmp_path / "d.json"))


def test_descriptions_belong_to_names(tmp_path: Path) -> None:
    path = tmp_path / "cupl.json"
    path.write_text(json.dumps({"Sea_Lion": ["It has ears.", "A {} swims."], "owl": "It hoots.", "fox": ["Red."]}))
    prompts = resolve_prompts(str(path))
    assert prompts.of("sea lion") == ("It has ears.", "A sea lion swims.")
    assert prompts.of("owl") == ("It hoots.",)
    assert resolve_prompts(["a {}.", str(path)]).of("owl") == ("a owl.", "It hoots.")
    with notices.collecting():
        prompts.check(["owl", "sea lion"])
        assert notices.so_far() == []  # a file may describe more classes than are used
    with pytest.raises(
        UserError, match=r"cupl.json must describe every class, it lacks 2 of 3: 'sea lions' \(is it 'Se"
    ):
        prompts.check(["sea lions", "owl", "zebra"])
    before = prompts.identity()
    path.write_text(path.read_text().replace("Red.", "Grey."))
    assert resolve_prompts(str(path)).identity() != before


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("coop:/data/oxford_flowers", "oxford_flowers"),
        ("/data/OxfordPets/images", "oxford_pets"),
        ("/tpt/Flower102/jpg", "oxford_flowers"),
        ("/data/food-101/images", "food101"),
        ("/data/caltech-101/101_ObjectCategories", "caltech101"),
        ("/data/ucf101/UCF-101-midframes", "ucf101"),
        ("imagenet-r:/data/r", "imagenet"),
        ("/data/imagenetv2/imagenetv2-matched-frequency-format-val", "imagenet"),
        ("features:/cache/eurosat.npz", "eurosat"),
        ("/data/my_photos", None),
    ],
)
def test_data_sets_are_known_from_their_folders(path: str, name: str | None) -> None:
    assert dataset_of(path) == name
    if name is not None:
        assert resolve_prompts("coop", path).templates == (DATASET_TEMPLATES[name],)
    else:
        with pytest.raises(UserError, match=r"templates coop chooses by the data set, and /data/my_photos is none"):
            resolve_prompts("coop", path)


def test_templates_of_options_are_a_tuple_of_texts() -> None:
    assert ClassOptions(templates=("~/{}", "photo")).templates == ("~/{}", "photo")
    assert ClassOptions(templates=("~/t.txt",)).templates == (str(Path.home() / "t.txt"),)
    for wrong in ((), "photo"):
        with pytest.raises(UserError, match="templates must name at least one template"):
            ClassOptions(templates=wrong)  # type: ignore[arg-type]
