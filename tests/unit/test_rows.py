"""Which text stands in which rows of a batch: tiles, windows, couples, single prompts. No host."""

from __future__ import annotations

from nested_core.hosts.comfy.rows import NEGATIVE, Entry, Group, Sampled, Window, clipped, groups_of
from nested_core.prompt import ClassWord

GRID = (8, 6)


def text(entry=None, negative=False, **places):
    """What a batch row's text is marked with."""
    marks = {} if entry is None else {entry: (0, 1, 2)}
    return {**marks, **({NEGATIVE: (0,)} if negative else {}), **places}


def test_two_prompts_for_two_pictures():
    positive, negative = Entry(None), Entry(None)
    marked = [text(negative, True)] * 2 + [text(positive, a=(3,))] * 2
    assert groups_of(marked, Sampled(2, GRID), GRID) == [
        Group(0, 2, {}, 0, None, False, True),
        Group(2, 4, {"a": (3,)}, 0, None, False, False),
    ]


def test_a_prompt_for_each_picture():
    entry = Entry(None)
    groups = groups_of([text(entry, a=(1,)), text(entry, a=(7,))], Sampled(2, GRID), GRID)
    assert [(g.rows, g.places, g.image) for g in groups] == [
        (slice(0, 1), {"a": (1,)}, 0),
        (slice(1, 2), {"a": (7,)}, 1),
    ]


def test_an_area_is_cut_to_the_picture():
    assert clipped((6, 6, 4, 2), GRID) == (4, 4, 4, 2)
    entry = Entry((4, 4, 4, 2))
    (group,) = groups_of([text(entry, a=(1,))], Sampled(1, GRID), (4, 4))
    assert (group.area, group.tile) == ((4, 4, 4, 2), False)
    (group,) = groups_of([text(entry, a=(1,))], Sampled(1, GRID), (2, 4))
    assert group.tile


def test_tiles_in_an_order_of_their_own():
    positive, negative = Entry(None), Entry(None)
    marked = [text(negative, True), text(positive, a=(1,)), text(negative, True), text(positive, a=(1,))]
    groups = groups_of(marked, Sampled(1, GRID), (4, 6))
    assert [(g.start, g.places, g.tile, g.negative) for g in groups] == [
        (0, {}, True, True),
        (1, {"a": (1,)}, True, False),
        (2, {}, True, True),
        (3, {"a": (1,)}, True, False),
    ]


def test_one_picture_of_several_by_itself():
    """Which picture it is can't be known."""
    (group,) = groups_of([text(Entry(None), a=(1,))], Sampled(2, GRID), GRID)
    assert group.image is None and not group.tile


def test_rows_of_the_same_text_that_another_pack_repeats():
    (group,) = groups_of([text(Entry(None), a=(1,))] * 4, Sampled(2, GRID), GRID)
    assert (group.start, group.stop, group.image) == (0, 4, None)


def test_texts_of_regions_show_what_their_prompt_shows():
    positive, negative = Entry((8, 3, 0, 3)), Entry(None)
    marked = [text(positive, a=(1,))] * 2 + [text(b=(5,))] * 2 + [text()] * 2
    groups = groups_of(marked, Sampled(2, GRID), (8, 3), coupled=True)
    assert groups == [
        Group(0, 2, {"a": (1,)}, 0, (8, 3, 0, 3), False, False),
        Group(2, 4, {"b": (5,)}, 0, (8, 3, 0, 3), False, False),
        Group(4, 6, {}, 0, (8, 3, 0, 3), False, False),
    ]
    unsaid = groups_of(marked, Sampled(2, GRID), (8, 3))
    assert unsaid[1].image is None and unsaid[1].tile and unsaid[1].places == {"b": (5,)}
    first = groups_of([text(negative, True)] + marked[:1] + [text(b=(2,))], Sampled(1, GRID), (8, 3), coupled=True)
    assert [g.negative for g in first] == [True, False, False]


def test_windows_of_frames():
    window = Sampled(3, GRID, Window(0, (4, 5, 0)))
    assert [window.picture(i) for i in range(3)] == [4, 5, 0]
    assert Sampled(3, GRID, Window(2, (4, 5, 0))).picture(1) == 1
    (group,) = groups_of([text(Entry(None), a=(1,))] * 3, window, GRID)
    assert (group.image, group.tile) == (0, False)


def test_class_words_count_in_negative_texts_alone():
    word, negative, positive = ClassWord("cat"), Entry(None), Entry(None)
    marked = [{**text(negative, True, a=(3,)), word: (1,)}, *({**text(positive, a=(3,)), word: (n,)} for n in (1, 2))]
    groups = groups_of(marked, Sampled(1, GRID), GRID)
    assert [(g.rows, g.places) for g in groups] == [
        (slice(0, 1), {"a": (3,), word: (1,)}),
        (slice(1, 3), {"a": (3,)}),
    ]
