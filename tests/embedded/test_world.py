"""The drawn world is deterministic, and pretraining never shows its held-out combinations."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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
    values = (scene.colour, scene.texture, scene.shape, scene.position, scene.size, scene.background)
    for value, said, kind in zip(
        values, stated, ("colour", "texture", "shape", "at", "size", "background"), strict=True
    ):
        # "the left" needs its article: "left" is also half of "top left".
        assert ((f"the {value}" if kind == "at" else value) in text) == said, (text, kind)


@pytest.mark.parametrize("combo", [("white", "plain", "arrow"), ("red", "wavy", "star"), ("teal", "dotted", "ring")])
def test_draw_is_deterministic(combo: tuple[str, str, str]) -> None:
    scene = world.Scene(*combo, position="bottom right", size="large", background="light", clutter=4)
    first, again, other = (world.draw(scene, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (world.IMAGE_SIZE, world.IMAGE_SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


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
    assert image.shape == (64, 64, 3)
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
