"""The drawn world is deterministic, and pretraining never shows its held-out combinations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rada_fast.config.tools import DrawnShift
from rada_fast.embedded import shapes, world
from rada_fast.errors import UserError

ALL = list(itertools.product(world.COLOURS, world.TEXTURES, world.SHAPES))


def words_of(text: str) -> list[str]:
    return text.lower().replace(".", " ").split()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_pretraining_never_sees_a_held_out_combination(seed: int) -> None:
    scene = world.pretraining_scene(np.random.default_rng(seed))
    assert not world.is_held_out(scene.colour, scene.texture, scene.shape)


def test_pretraining_sees_every_other_combination() -> None:
    rng = np.random.default_rng(0)
    seen = {(s.colour, s.texture, s.shape) for s in (world.pretraining_scene(rng) for _ in range(10_000))}
    # With 10000 draws from 460 cells, a cell stays empty with probability 4e-10.
    assert seen == {combo for combo in ALL if not world.is_held_out(*combo)}


def test_every_pair_of_words_occurs_in_pretraining() -> None:
    seen = [combo for combo in ALL if not world.is_held_out(*combo)]
    for a, b in itertools.combinations(range(3), 2):
        assert {(combo[a], combo[b]) for combo in seen} == {(combo[a], combo[b]) for combo in ALL}


def test_classes_are_base_then_new() -> None:
    names = world.class_names()
    assert list(names) == sorted(set(names))
    assert len(names) == 40
    held_out = [world.is_held_out(*name.split()) for name in names]
    assert held_out == [False] * 20 + [True] * 20


def test_every_class_has_a_neighbour_one_word_away_in_its_half() -> None:
    names = [name.split() for name in world.class_names()]
    for half in (names[:20], names[20:]):
        for name in half:
            assert any(sum(x != y for x, y in zip(name, other, strict=True)) == 1 for other in half)


def test_new_classes_use_words_that_pretraining_captions_hold() -> None:
    rng = np.random.default_rng(1)
    seen = {word for _ in range(2000) for word in words_of(world.caption(world.pretraining_scene(rng), rng))}
    assert set(world.WORDS) == seen
    prompts = [world.TEMPLATE.format(name) for name in world.class_names()]
    assert {word for prompt in prompts for word in words_of(prompt)} <= seen


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_a_caption_names_exactly_what_its_mask_marks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = world.pretraining_scene(rng)
    text, stated = world.describe(scene, rng)
    values = (scene.colour, scene.texture, scene.shape, scene.background)
    assert [value in text for value in values] == list(stated), text


@pytest.mark.parametrize("combo", [("white", "plain", "arrow"), ("red", "wavy", "star"), ("teal", "dotted", "ring")])
def test_draw_is_deterministic(combo: tuple[str, str, str]) -> None:
    scene = world.Scene(*combo, background="light", radius=25.0, centre=(70.0, 40.0), scraps=4, covered=True)
    first, again, other = (world.draw(scene, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (world.PICTURE_SIZE, world.PICTURE_SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def differing(scene: world.Scene, other: world.Scene) -> tuple[float, float, float, float]:
    """Draw two scenes from one state, and return the left, top, right and bottom end of where the pictures differ."""
    first, second = (world.draw(each, np.random.default_rng(5)).astype(int) for each in (scene, other))
    rows, columns = np.nonzero(np.abs(first - second).max(axis=2) > 40)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_the_object_lies_where_the_scene_says() -> None:
    scene = world.Scene("white", "plain", "circle", background="dark", radius=12.0, centre=(30.0, 60.0))
    elsewhere = world.Scene("white", "plain", "circle", background="dark", radius=12.0, centre=(200.0, 200.0))
    assert np.allclose(differing(scene, elsewhere), (18.6, 48.6, 41.4, 71.4), atol=1.5)


def test_a_covered_object_is_visible_for_the_greater_part() -> None:
    rng = np.random.default_rng(0)
    for colour, shape in zip(world.COLOURS, world.SHAPES, strict=True):
        for _ in range(5):
            scene = world.Scene(colour, "plain", shape, background="grey", radius=float(rng.uniform(9, 33)))
            covered = world.Scene(colour, "plain", shape, background="grey", radius=scene.radius, covered=True)
            state = int(rng.integers(2**32))
            pictures = [world.draw(each, np.random.default_rng(state)).astype(int) for each in (scene, covered)]
            changed = np.abs(pictures[0] - pictures[1]).max(axis=2) > 60
            assert changed.sum() < 0.6 * np.pi * scene.radius**2


def test_shifted_scenes_are_further_away(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[world.Scene] = []
    draw = world.draw
    monkeypatch.setattr(world, "draw", lambda scene, rng: drawn.append(scene) or draw(scene, rng))
    for seed in range(60):
        world.class_image(seed % 40, seed, None if seed < 30 else "mixed")
    near, far = drawn[:30], drawn[30:]
    assert max(scene.radius for scene in far) < 24 < max(scene.radius for scene in near)
    assert np.mean([scene.scraps for scene in far]) > np.mean([scene.scraps for scene in near])
    centres = np.array([scene.centre for scene in drawn]) / world.PICTURE_SIZE
    assert 0.2 <= centres.min() <= centres.max() <= 0.8
    assert centres.std() > 0.1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_fills_a_fair_part_of_its_box(shape: str) -> None:
    y, x = np.meshgrid(np.linspace(1.3, -1.3, 130), np.linspace(-1.3, 1.3, 130), indexing="ij")
    inside = shapes.IMPLICIT[shape](x.astype(np.float32), y.astype(np.float32)) < 0
    # Of the 2 x 2 box, a crescent and an arrow cover the least and a square the most.
    assert 0.2 < inside.mean() * 1.3**2 < 0.8
    assert not inside[:3].any()
    assert not inside[-3:].any()
    assert not inside[:, :3].any()
    assert not inside[:, -3:].any()


@pytest.mark.parametrize("shift", [None, "mixed", *world.SHIFTS])
def test_class_image_depends_only_on_its_arguments(shift: str | None) -> None:
    image = world.class_image(7, 11, shift)
    assert image.shape == (96, 96, 3)
    assert image.dtype == np.uint8
    world.class_image(8, 11, shift)
    np.testing.assert_array_equal(image, world.class_image(7, 11, shift))
    assert (image != world.class_image(7, 12, shift)).any()
    if shift is not None:
        assert (image != world.class_image(7, 11, None)).any()


def test_mixed_uses_every_shift() -> None:
    for offset in range(len(world.SHIFTS)):
        kind = world.SHIFTS[(3 + offset) % len(world.SHIFTS)]
        np.testing.assert_array_equal(world.class_image(3, offset, "mixed"), world.class_image(3, offset, kind))


def test_the_demo_offers_every_shift() -> None:
    assert get_args(DrawnShift) == (*world.SHIFTS, "mixed")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(IndexError, match=r"class_index must be in 0\.\.39, got 40"):
        world.class_image(40, 0, None)
    with pytest.raises(UserError, match="shift must be one of blur, noise"):
        world.class_image(0, 0, "fog")


def test_imagefolder_sorts_as_the_classes_do(tmp_path: Path) -> None:
    root = tmp_path / "world"
    world.write_imagefolder(root, images_per_class=1, seed=2, shift="mixed")
    folders = sorted(path.name for path in root.iterdir())
    assert [name.replace("_", " ") for name in folders] == list(world.class_names())
    files = sorted(root.rglob("*.png"))
    assert len(files) == 40
    with Image.open(files[5]) as image:
        np.testing.assert_array_equal(np.asarray(image), world.class_image(5, 200_000, "mixed"))


def test_imagefolder_refuses_arguments_that_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="root must be an empty folder"):
        world.write_imagefolder(tmp_path, 1, 0, None)
    with pytest.raises(UserError, match="shift must be one of"):
        world.write_imagefolder(tmp_path / "new", 1, 0, "fog")
    with pytest.raises(UserError, match="images_per_class must be"):
        world.write_imagefolder(tmp_path / "new", 0, 0, None)
    assert not (tmp_path / "new").exists()
