"""The command inspect measures what eval measures, and its page shows it without a network or a script."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rada_fast.config.commands import EFTOptions
from rada_fast.config.inference import EvalOptions, InspectOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.errors import UserError
from rada_fast.loops import inspection
from rada_fast.loops.eft import run_eft
from rada_fast.loops.evaluation import run_eval
from rada_fast.loops.fft import run_fft
from rada_fast.loops.inspection import run_inspect
from rada_fast.modules import RationalAdapter, load_adapter, save_adapter
from rada_fast.reports.inspection import Inspection
from rada_fast.reports.results import read_results
from rada_fast.reports.tables import class_rows, measures_of
from rada_fast.runs.contents import INSPECTION

from .support import features_file, fft_options, lines, text_file

NAMES = ["plain", "<b>&\"'bold", "$x^2$ and $", "日本語", "a name much longer than a picture has room for"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write features of 30 images of five classes with odd names, their text features, and an adapter."""
    folder = tmp_path_factory.mktemp("inspect")
    random = np.random.default_rng(0)
    text = random.normal(size=(5, 16))
    labels = np.arange(30) % 5
    features = text[labels] + 1.5 * random.normal(size=(30, 16))
    unit = [(one / np.linalg.norm(one, axis=-1, keepdims=True)).astype(np.float32) for one in (text, features)]
    np.savez(folder / "text.npz", features=unit[0])
    np.savez(folder / "a.npz", features=unit[1], labels=labels, class_names=NAMES, logit_scale=30.0)
    torch.manual_seed(1)
    adapter = RationalAdapter(AdapterConfig.official(16, num_heads=2))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.5)
    save_adapter(adapter, folder / "adapter.safetensors")
    return folder


def options_of(files: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run": RunOptions(output=str(output)),
        "text": ClassOptions(text_features=f"features:{files / 'text.npz'}"),
        "adapter": AdapterOptions(adapter=str(files / "adapter.safetensors")),
        **changes,
    }


@pytest.fixture(scope="module")
def inspected(files: Path) -> Path:
    """Inspect the adapter once, for the tests that read what the command has written."""
    run_inspect(InspectOptions(f"features:{files / 'a.npz'}", images=20, **options_of(files, files / "run")))
    return files / "run"


def test_the_numbers_are_those_of_eval_and_of_the_mask(files: Path, inspected: Path) -> None:
    data = f"features:{files / 'a.npz'}"
    run_eval(EvalOptions((data,), **options_of(files, files / "eval")))
    assert lines(inspected) == lines(files / "eval")
    (evaluation,) = read_results([str(files / "eval")])
    numbers = json.loads((inspected / "inspect.json").read_text())
    assert numbers["measures"] == measures_of(evaluation)
    for own, row in zip(numbers["classes"], class_rows([evaluation]), strict=True):
        assert own == {name: row[name] for name in own}
        assert own["name"] in NAMES
    for place, name in enumerate(("zero_shot", "adapted")):
        bins = numbers["reliability"][name]
        assert sum(one["answers"] for one in bins) == 30
        right = sum(one["answers"] * (one["accuracy"] or 0) for one in bins)
        assert right == pytest.approx(sum((a.right_before, a.right_after)[place] for a in evaluation.answers))

    stored = np.load(files / "a.npz")
    chosen = [
        int(one["id"].removeprefix("image-")) if "-" in one["id"] else int(one["id"]) for one in numbers["images"]
    ]
    assert len(chosen) == 20
    assert np.bincount(stored["labels"][chosen]).min() >= 2
    features, text = (
        torch.from_numpy(stored["features"][chosen]),
        torch.from_numpy(np.load(files / "text.npz")["features"]),
    )
    with torch.no_grad():
        mask = load_adapter(files / "adapter.safetensors").mask(features, text, 30.0)
    found = numbers["mask"]
    expected = {
        "mean": mask.mean(), "std": mask.std(correction=0), "min": mask.min(), "max": mask.max(),
        "share_near_0": (mask.abs() <= 0.1).double().mean(), "share_below_0": (mask < 0).double().mean(),
        "share_near_1": ((mask - 1).abs() <= 0.1).double().mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-5), name
    assert found["quantiles"]["0.5"] == pytest.approx(float(mask.quantile(0.5)), abs=1e-5)
    flat = (mask * features[:, None] * text).flatten(1)
    nearest = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(dim=1)
    labels = torch.from_numpy(stored["labels"][chosen])
    same = (labels[nearest] == labels).double().mean()
    assert numbers["projection"]["MR"]["nearest_is_of_same_class"] == pytest.approx(float(same))


def test_a_plane_has_several_images_of_a_class() -> None:
    labels = [place % 8 for place in range(160)]
    chosen = inspection.drawn_images(labels, 40)
    assert sorted({labels[place] for place in chosen}) == [0, 2, 4, 6]
    assert np.bincount([labels[place] for place in chosen]).tolist() == [10, 0, 10, 0, 10, 0, 10]
    assert inspection.drawn_images(labels, 1000) == list(range(160))
    assert inspection.drawn_images([3, 3, 5], 1) == [0]
    # A class with few images leaves room for others.
    assert len(inspection.drawn_images([0, *[1] * 30], 12)) == 12


class Page(html.parser.HTMLParser):
    """Page collects the elements of a page, and fails where an end tag does not fit."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_needs_nothing_else(inspected: Path) -> None:
    page = Page((inspected / "inspect.html").read_text(encoding="utf-8"))
    assert not page.open
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "form", "b"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 6
    assert all(attributes["alt"] for attributes in images)
    assert ("html", {"lang": "en"}) in page.elements
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes["href"][1:] in ids for tag, attributes in page.elements if tag == "a" and attributes["href"])
    assert set(NAMES) <= set(page.texts)


def test_the_pictures_can_be_read(inspected: Path) -> None:
    for name in INSPECTION:
        if name.endswith(".png"):
            with Image.open(inspected / name) as picture:
                picture.load()
                assert np.asarray(picture.convert("L")).std() > 5, name


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_opens_the_page_without_a_message(inspected: Path, tmp_path: Path) -> None:
    assert BROWSER is not None

    def messages_of(page: Path) -> list[str]:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "What the adapter changes" in done.stdout
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    assert messages_of(inspected / "inspect.html") == []
    # The policy of the page refuses what comes from elsewhere, which the browser reports.
    other = tmp_path / "other.html"
    text = (inspected / "inspect.html").read_text(encoding="utf-8")
    other.write_text(
        text.replace("</main>", "<img src='http://127.0.0.1:9/a.png'><script>1</script></main>"), encoding="utf-8"
    )
    assert len(messages_of(other)) >= 2


def test_a_finished_inspection_is_made_again_only_where_a_file_is_missing(
    files: Path, inspected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = InspectOptions(f"features:{files / 'a.npz'}", images=20, **options_of(files, inspected))
    drawn: list[str] = []
    monkeypatch.setattr(inspection, "write_inspection", lambda folder, *_: drawn.append(str(folder.path)))
    assert run_inspect(options)["mask"]["images"] == 20
    assert not drawn
    kept = (inspected / "mask.png").read_bytes()
    (inspected / "mask.png").unlink()
    run_inspect(options)
    assert drawn == [str(inspected)]
    (inspected / "mask.png").write_bytes(kept)


def test_the_matrices_give_the_answers_of_everything_that_was_trained(
    files: Path, specks: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fft(fft_options(specks, specks, tmp_path / "fft", lr=1e-2, finetune_lr=1e-2))
    found: list[Inspection] = []
    monkeypatch.setattr(inspection, "write_inspection", lambda folder, one, facts: found.append(one))
    trained = AdapterOptions(adapter=str(tmp_path / "fft"))
    run = RunOptions(output=str(tmp_path / "run"))
    run_inspect(InspectOptions(f"imagefolder:{specks}", adapter=trained, run=run))
    records = {record["id"]: record for record in lines(tmp_path / "run")}
    (one,) = found
    assert set(one.matrices.ids) == set(records)
    for index, id in enumerate(one.matrices.ids):
        matrices = (one.matrices.before(index), one.matrices.after(index))
        sure = [float((one.logit_scale * matrix.sum(dim=-1)).softmax(dim=-1).max()) for matrix in matrices]
        assert sure == pytest.approx(records[id]["confidence"], abs=1e-5)
    masks, before, after = one.matrices.class_means([1])
    own = (one.matrices.labels == 1).nonzero().flatten().tolist()
    torch.testing.assert_close(masks[0], one.matrices.mask[own, 1].mean(dim=0))
    torch.testing.assert_close(before[0], torch.stack([one.matrices.before(index)[1] for index in own]).mean(dim=0))
    torch.testing.assert_close(after[0], torch.stack([one.matrices.after(index)[1] for index in own]).mean(dim=0))


def test_a_method_without_a_mask_is_refused(tmp_path: Path) -> None:
    data, text = features_file(tmp_path / "a.npz"), ClassOptions(text_features=text_file(tmp_path / "text.npz"))
    run = RunOptions(output=str(tmp_path / "eft"))
    run_eft(EFTOptions(data, data, method="clip-adapter", protocol="all", epochs=1, batch_size=30, text=text, run=run))
    run, trained = RunOptions(output=str(tmp_path / "run")), AdapterOptions(adapter=str(tmp_path / "eft"))
    with pytest.raises(UserError, match="has no rational adapter, so there is no mask to inspect"):
        run_inspect(InspectOptions(data, text=text, adapter=trained, run=run))
    assert not (tmp_path / "run").exists()


def test_images_can_be_chosen_and_fewer_fit_into_the_memory(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "MAX_ELEMENTS", 3 * 5 * 16)
    monkeypatch.setattr(inspection, "write_pictures", lambda *_: None)
    monkeypatch.setattr(inspection, "page_of", lambda *_: "")
    ids = [line["id"] for line in lines(files / "run")]
    data, options = f"features:{files / 'a.npz'}", options_of(files, tmp_path / "run")
    run_inspect(InspectOptions(data, show=(ids[7], ids[3]), **options))
    numbers = json.loads((tmp_path / "run" / "inspect.json").read_text())
    assert numbers["shown"] == [ids[7], ids[3]]
    assert numbers["mask"]["images"] == 3
    assert "leave room for those of 3 images" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"show must name images of the data.*got 'nothing'"):
        run_inspect(InspectOptions(data, show=("nothing",), **options_of(files, tmp_path / "other")))
    with pytest.raises(UserError, match="show must name at most 12 images"):
        InspectOptions(data, show=("a",) * 13)
