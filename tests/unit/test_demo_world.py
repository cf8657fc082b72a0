"""The small world: pictures whose truth is known. What is claimed of them is checked here."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo import models, world

VISIBLE = 16  # of 255, in any colour
SPREAD = 2  # pixels that ink and soft edges reach beyond what they belong to


def every_figure(kind: str) -> list[world.Figure]:
    return [world.Figure(kind, *values) for values in itertools.product(*world.ATTRIBUTES.values())]


def some_figure(rng: random.Random, kind: str) -> world.Figure:
    return world.random_figure(rng, kind, held_out=rng.random() < 0.5)


def changed(a: world.Picture, b: world.Picture) -> np.ndarray:
    """Which pixels of two pictures differ visibly, (height, width)."""
    return np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max(-1) > VISIBLE


def shows(part: str, *pictures: world.Picture, figure: int = 0) -> np.ndarray:
    """Where any of the pictures shows a part of a figure, grown by SPREAD."""
    code = world.PARTS[part] + figure * world.NEXT_FIGURE
    mask = np.any([picture.regions == code for picture in pictures], axis=0)
    grown = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * SPREAD + 1))
    return np.asarray(grown) > 0


# -- rendering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("size", [world.SIZE, 64])
def test_a_seed_decides_the_whole_picture(style, size):
    figures = [some_figure(random.Random(0), kind) for kind in world.KINDS]
    first, again, other = (
        world.render(figures, "city", style, random.Random(seed), size) for seed in ("same", "same", "other")
    )
    assert first.image.size == (size, size) and first.regions.shape == (size, size)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.regions, again.regions)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("scene", world.SCENES)
def test_every_scene_and_style_looks_its_own(scene):
    figure = some_figure(random.Random(1), "robot")
    pictures = [world.render([figure], scene, style, random.Random(2)) for style in world.STYLES]
    pictures += [world.render([figure], other, "flat", random.Random(2)) for other in world.SCENES if other != scene]
    for a, b in itertools.combinations(pictures, 2):
        assert changed(a, b).mean() > 0.05


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_an_attribute_is_seen_in_its_own_region_and_nowhere_else(name, style):
    for trial in range(6):
        rng = random.Random(f"{name} {style} {trial}")
        figure = some_figure(rng, world.KINDS[trial % 2])
        value = rng.choice([v for v in world.ATTRIBUTES[name] if v != getattr(figure, name)])
        scene = rng.choice(world.SCENES)
        before, after = (
            world.render([f], scene, style, random.Random(trial)) for f in (figure, replace(figure, **{name: value}))
        )
        different = changed(before, after)
        own = shows(world.PART_OF[name], before, after)
        if name == "body":  # feet and the posts of wheels are of the body's colour
            own |= shows("legs", before, after)
        assert different.sum() > 50, "it can't be seen"
        assert not (different & ~own).any()


def test_all_values_of_an_attribute_look_different():
    figure = some_figure(random.Random(3), "creature")
    for name, values in world.ATTRIBUTES.items():
        pictures = [world.render([replace(figure, **{name: v})], "room", "flat", random.Random(0)) for v in values]
        for a, b in itertools.combinations(pictures, 2):
            assert changed(a, b).sum() > 50


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("kinds", [("robot",), ("creature",), ("robot", "creature"), ("creature", "robot")])
def test_the_region_map_shows_every_part_of_every_figure_and_no_other(kinds, close):
    for seed in range(5):
        rng = random.Random(seed)
        figures = [some_figure(rng, kind) for kind in kinds]
        regions = world.render(figures, "beach", "comic", rng, close=close).regions
        parts = {part + i * world.NEXT_FIGURE for i in range(len(kinds)) for part in world.PARTS.values()}
        assert set(np.unique(regions)) == {0} | parts
        assert min((regions == code).sum() for code in parts) >= 10


def test_two_figures_share_no_code_and_stand_left_and_right():
    first = set(world.PARTS.values())
    second = {code + world.NEXT_FIGURE for code in first}
    assert 0 not in first | second and not first & second
    rng = random.Random(4)
    for _ in range(5):
        figures = [some_figure(rng, kind) for kind in world.KINDS]
        regions = world.render(figures, "snow", "flat", rng).regions
        left, right = (np.nonzero(np.isin(regions, list(codes)))[1].mean() for codes in (first, second))
        assert left < world.SIZE / 2 < right


def test_one_figures_attribute_leaves_the_other_figure_alone():
    rng = random.Random(5)
    left, right = (some_figure(rng, kind) for kind in world.KINDS)
    hat = next(h for h in world.ATTRIBUTES["hat"] if h != right.hat)
    before, after = (
        world.render([left, other], "desert", "watercolour", random.Random(0))
        for other in (right, replace(right, hat=hat))
    )
    different = changed(before, after)
    assert different.any() and not (different & ~shows("hat", before, after, figure=1)).any()


# -- who there is ---------------------------------------------------------------------------------------------------


def test_there_are_more_than_ten_thousand_figures_of_each_kind():
    for kind in world.KINDS:
        assert len(set(every_figure(kind))) == 34_560


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_tenth_of_all_figures_is_held_out(kind):
    figures = every_figure(kind)
    held_out = [figure for figure in figures if figure.held_out]
    assert 0.09 < len(held_out) / len(figures) < 0.115
    # Held out is the combination: each value of each attribute is seen in training, and tested.
    for side in (held_out, [figure for figure in figures if not figure.held_out]):
        for name, values in world.ATTRIBUTES.items():
            assert {getattr(figure, name) for figure in side} == set(values)


def test_random_figures_come_from_the_side_that_was_asked_for():
    rng = random.Random(6)
    train = {world.random_figure(rng) for _ in range(3000)}
    test = {world.random_figure(rng, held_out=True) for _ in range(300)}
    assert not any(figure.held_out for figure in train) and all(figure.held_out for figure in test)
    assert not train & test
    assert {figure.kind for figure in train} == set(world.KINDS)
    assert {world.random_figure(rng, "robot").kind for _ in range(20)} == {"robot"}


# -- prompts --------------------------------------------------------------------------------------------------------


def test_every_word_of_every_prompt_is_one_token():
    tokenizer = models.tokenizer()
    for word in world.words():
        assert len(tokenizer(word).input_ids) == 3, word  # between start and end
    known = set(world.words())
    rng = random.Random(7)
    for scene, style in itertools.product(world.SCENES, world.STYLES):
        figures = [some_figure(rng, kind) for kind in world.KINDS]
        text = world.prompt([figure.words() for figure in figures], scene, style)
        assert set(text.replace(",", " ").split()) <= known
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= models.TEXT_LENGTH
        assert tokenizer.decode(ids[1:-1]).replace(" ,", ",").strip() == text


def test_words_say_the_whole_identity_or_what_is_asked_for():
    seen = {figure.words() for figure in every_figure("robot")}
    assert len(seen) == 34_560
    figure = world.Figure("robot", "blue", "star", "crown", "red", "one", "springs")
    assert figure.words() == "star belly red crown one eyes springs below blue robot"
    assert figure.words(["body"]) == "blue robot" and figure.words([]) == "robot"
    assert figure.words(["hat"]) == "crown robot" and figure.words(["hat", "hat_colour"]) == "red crown robot"
    assert figure.identity == ("blue", "star", "crown", "red", "one", "springs")
    assert world.prompt(["<bolt>", "creature"], "sea", "flat") == "a <bolt> and a creature in the sea, flat drawing"


def test_the_tokenizers_files_are_those_of_the_world(tmp_path):
    models.write_tokenizer(tmp_path)
    shipped = Path(models.__file__).parent / "tokenizer"
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text("utf-8") == (shipped / name).read_text("utf-8")
