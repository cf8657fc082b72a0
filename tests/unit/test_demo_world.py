"""The small world: pictures whose truth is known. What is claimed of them is checked here."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from demo import data, drawing, models, world
from demo.lessons import caption, cropped, described, other_entry
from demo.listening import asked_of, cells_of, class_words

VISIBLE = 16  # of 255, in any colour
SPREAD = 3  # pixels that ink, soft edges and light reach beyond what they belong to


def every_figure(kind: str) -> list[world.Figure]:
    return [world.Figure(kind, *values) for values in itertools.product(*world.ATTRIBUTES.values())]


def some_figure(rng: random.Random, kind: str) -> world.Figure:
    return world.random_figure(rng, kind, held_out=rng.random() < 0.5)


def drawn(figures, looks, scene, style, seed, **options) -> drawing.Picture:
    return drawing.render(figures, looks, scene, style, random.Random(seed), **options)


def changed(a: drawing.Picture, b: drawing.Picture) -> np.ndarray:
    """Which pixels of two pictures differ visibly, (height, width)."""
    return np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max(-1) > VISIBLE


def shows(part: str, *pictures: drawing.Picture, figure: int = 0) -> np.ndarray:
    """Where any of the pictures shows a part of a figure, grown by SPREAD."""
    code = drawing.PARTS[part] + figure * drawing.NEXT_FIGURE
    mask = np.any([picture.regions == code for picture in pictures], axis=0)
    grown = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * SPREAD + 1))
    return np.asarray(grown) > 0


LOOK = world.Look("smiling", "metal", "standing", "front", "nothing")

# -- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("size", [drawing.SIZE, 64])
def test_a_seed_decides_the_whole_picture(style, size):
    figures = [some_figure(random.Random(0), kind) for kind in world.KINDS]
    first, again, other = (drawn(figures, [LOOK, LOOK], "city", style, seed, size=size) for seed in "aab")
    assert first.image.size == (size, size) and first.regions.shape == (size, size)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.regions, again.regions)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("scene", world.SCENES)
def test_every_scene_and_style_looks_its_own(scene):
    figure = some_figure(random.Random(1), "robot")
    pictures = [drawn([figure], [LOOK], scene, style, 2) for style in world.STYLES]
    pictures += [drawn([figure], [LOOK], other, "flat", 2) for other in world.SCENES if other != scene]
    for a, b in itertools.combinations(pictures, 2):
        assert changed(a, b).mean() > 0.05


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_an_attribute_is_seen_in_its_own_region_and_nowhere_else(name, style, monkeypatch):
    for trial in range(6):
        rng = random.Random(f"{name} {style} {trial}")
        figure, look = some_figure(rng, world.KINDS[trial % 2]), world.random_look(rng, style)
        value = rng.choice([v for v in world.ATTRIBUTES[name] if v != getattr(figure, name)])
        scene = rng.choice(world.SCENES)
        both = figure, replace(figure, **{name: value})
        before, after = (drawn([f], [look], scene, style, trial) for f in both)
        different, own = changed(before, after), shows(drawing.PART_OF[name], before, after)
        if name == "body":  # feet and the posts of wheels are of the body's colour
            own |= shows("legs", before, after)
        if name == "legs":  # where an arm hides a foot, the foot's ink can look out beside the arm
            with monkeypatch.context() as patch:
                patch.setattr(drawing.figure, "_draw_arm", lambda *_: None)
                own |= shows("legs", *(drawn([f], [look], scene, style, trial) for f in both))
        if style == "neon":  # light falls on what is near
            different &= changed(before, after) & (np.abs(np.asarray(before.image, int) - after.image).max(-1) > 60)
        assert different.sum() > 20, "it can't be seen"
        assert not (different & ~own).any()


@pytest.mark.parametrize("style", world.STYLES)
def test_all_values_of_an_attribute_and_of_a_look_are_seen(style):
    figure = some_figure(random.Random(3), "creature")
    for name, values in world.ATTRIBUTES.items():
        pictures = [drawn([replace(figure, **{name: v})], [LOOK], "room", style, 0) for v in values]
        for a, b in itertools.combinations(pictures, 2):
            assert changed(a, b).sum() > 20, name
    for name, values in world.LOOKS.items():
        pictures = [drawn([figure], [replace(LOOK, **{name: v})], "room", style, 0) for v in values]
        for a, b in itertools.combinations(pictures, 2):
            assert changed(a, b).sum() > 20, name


@pytest.mark.parametrize("kinds", [("robot",), ("creature",), ("robot", "creature"), ("creature", "robot")])
def test_the_region_map_shows_every_part_of_every_figure_and_no_other(kinds):
    for seed in range(10):
        rng = random.Random(seed)
        figures = [some_figure(rng, kind) for kind in kinds]
        looks = [replace(world.random_look(rng, "comic"), held="balloon") for _ in kinds]
        regions = drawn(figures, looks, "beach", "comic", seed).regions
        parts = {part + i * drawing.NEXT_FIGURE for i in range(len(kinds)) for part in drawing.PARTS.values()}
        assert set(np.unique(regions)) == {0} | parts
        assert min((regions == code).sum() for code in parts) >= 5


def test_two_figures_share_no_code_and_stand_left_and_right():
    first = set(drawing.PARTS.values())
    second = {code + drawing.NEXT_FIGURE for code in first}
    assert 0 not in first | second and not first & second
    rng = random.Random(4)
    for touching in (False, True):
        figures = [some_figure(rng, kind) for kind in world.KINDS]
        regions = drawn(figures, [LOOK, LOOK], "snow", "flat", 1, touching=touching).regions
        left, right = (np.nonzero(np.isin(regions, list(codes)))[1] for codes in (first, second))
        assert left.mean() < drawing.SIZE / 2 < right.mean()
        assert (left.max() > right.min()) == touching


def test_a_reference_is_cropped_to_its_figure():
    rng = random.Random(5)
    for _ in range(5):
        entry = data.random_entry(rng, 2)
        picture = data.draw(entry, rng)
        for index in (0, 1):
            marked = np.repeat((picture.regions // drawing.NEXT_FIGURE == index)[..., None] * np.uint8(255), 3, -1)
            marked[picture.regions == 0] = 0
            square = cropped(marked, picture.regions, index, 0.05)
            assert square.shape == (models.VISION_SIZE, models.VISION_SIZE, 3)
            # All of it is in the crop, and it fills the crop's longer side.
            rows, columns = (square[..., 0] > 128).nonzero()
            assert max(np.ptp(rows), np.ptp(columns)) > 0.8 * models.VISION_SIZE
            assert square[..., 0].mean() > 20


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


def test_looks_that_are_held_out_are_a_tenth_in_every_style():
    looks = [world.Look(*values) for values in itertools.product(*world.LOOKS.values())]
    assert len(looks) == 1200
    for style in world.STYLES:
        assert 0.07 < np.mean([look.held_out(style) for look in looks]) < 0.13
        rng = random.Random(style)
        assert all(world.random_look(rng, style, True).held_out(style) for _ in range(20))
        look = world.random_look(rng, style)
        others = [world.other_look(rng, look, style) for _ in range(20)]
        assert not any(getattr(o, name) == getattr(look, name) for o in others for name in world.LOOKS)
        assert not any(o.held_out(style) for o in others)


# -- prompts --------------------------------------------------------------------------------------------------------


def test_every_word_of_every_prompt_is_one_token():
    tokenizer = models.tokenizer()
    for word in world.words():
        assert len(tokenizer(word).input_ids) == 3, word  # between start and end
    known = set(world.words())
    rng = random.Random(7)
    for _ in range(100):
        text = data.plain_prompt(data.random_entry(rng, 2))
        assert set(text.replace(",", " ").split()) <= known
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= models.TEXT_LENGTH
        assert tokenizer.decode(ids[1:-1]).replace(" ,", ",").strip() == text
    assert {word for fact in world.all_facts() for word in fact.split()} <= known


def test_prompts_say_the_look_and_never_the_identity():
    look = world.Look("sad", "wooden", "waving", "left", "umbrella")
    assert world.phrase("<bolt>", look) == "sad wooden <bolt> waving facing left holding an umbrella"
    assert world.phrase("robot", replace(look, held="nothing"), ["pose", "held"]) == "robot waving holding nothing"
    assert world.phrase("robot") == "robot"
    assert world.prompt(["<bolt>", "creature"], "sea", "flat") == "a <bolt> and a creature in the sea, flat drawing"
    assert world.prompt(["robot"], style="neon") == "a robot, neon drawing"
    assert world.prompt(["angry <bolt>"], "beach") == "an angry <bolt> on the beach"
    assert world.prompt(["robot"], "space") == "a robot in space"
    rng = random.Random(8)
    entry = data.random_entry(rng, 2)
    identity = {v for options in world.ATTRIBUTES.values() for v in options} | {"belly", "hat", "eyes", "body"}
    said = [caption(entry, rng) for _ in range(400)]
    assert not identity & {word for text in said for word in text.replace(",", "").split()}
    assert "" in said and data.plain_prompt(entry) in said and len(set(said)) > 100, "they leave out what they like"
    assert all("<a>" in described(entry, ["<a>", "<b>"], rng) for _ in range(20))


def test_facts_are_true_and_tell_looks_and_figures_apart():
    rng = random.Random(9)
    seen = {}
    for _ in range(300):
        figure, look = some_figure(rng, rng.choice(world.KINDS)), world.random_look(rng, "flat")
        facts = tuple(world.facts(figure, look))
        assert set(facts) <= set(world.all_facts())
        assert seen.setdefault(facts, (figure, look)) == (figure, look)
    assert len(world.all_facts()) == len(set(world.all_facts())) == 2 + 35 + 21 + 14


def test_another_picture_of_a_figure_shares_nothing_but_the_figure():
    rng = random.Random(10)
    for _ in range(30):
        entry = data.random_entry(rng, 2)
        other = other_entry(entry, 1, rng)
        assert other.figures == [entry.figures[1]]
        assert other.scene != entry.scene and other.style != entry.style
        assert not any(getattr(other.looks[0], name) == getattr(entry.looks[1], name) for name in world.LOOKS)


def test_a_class_word_is_asked_for_on_its_figure_alone():
    rng = random.Random(11)
    entry = data.random_entry(rng, 2)
    picture = data.draw(entry, rng)
    text = data.plain_prompt(entry)
    tokens = models.tokenizer()([text], padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt")
    cells = cells_of(torch.from_numpy(picture.regions)[None])
    asked = asked_of(cells, class_words([entry]), tokens.input_ids)
    assert asked[256].shape == (1, 256, models.TEXT_LENGTH) and asked[64].shape == (1, 64, models.TEXT_LENGTH)
    words = text.replace(",", " ,").split()
    for index, figure in enumerate(entry.figures):
        column = asked[256][0, :, 1 + words.index(figure.kind)].reshape(16, 16).numpy()
        shown = (picture.regions > 0) & (picture.regions // drawing.NEXT_FIGURE == index)
        cells = shown.reshape(16, 8, 16, 8).mean((1, 3))
        assert (column[cells > 0.3] == 1).all() and (column[cells == 0] == -1).all()
    others = [1 + i for i, word in enumerate(words) if word not in world.KINDS]
    assert not asked[256][0][:, others].any()


def test_the_tokenizers_files_are_those_of_the_world(tmp_path):
    models.write_tokenizer(tmp_path)
    shipped = Path(models.__file__).parent / "tokenizer"
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text("utf-8") == (shipped / name).read_text("utf-8")
