"""Folders of subjects and webdataset shards: what examples they give, and what is refused."""

from __future__ import annotations

import json
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from nested_core.errors import NestedAttentionError
from nested_core.images import NEUTRAL
from nested_core.training import DataConfig, LossConfig
from nested_core.training.data import SubjectData
from nested_core.training.examples import Draws
from nested_core.training.loop import Positions

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


def put(folder, name, colour="red", caption="a photo of <subject>", size=(40, 32), **more):
    """A picture of one colour, its caption, and other files by suffix."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    for suffix, text in more.items():
        path.with_suffix(f".{suffix}").write_text(text)


def data(*folders, **options):
    return SubjectData(DataConfig([str(f) for f in folders], **{"class_word": "dog", "resolution": 16, **options}))


def colour_of(picture):
    return next(
        n for n, c in COLOURS.items() if torch.allclose(picture[8, 8, :3] * 255, torch.tensor(c).float(), atol=2)
    )


def draws(found, count=20):
    return [found.draw(i % len(found), random.Random(i)) for i in range(count)]


def test_references_are_other_pictures_of_the_subject(tmp_path):
    put(tmp_path, "rex/1", "red")
    put(tmp_path, "rex/2", "green", "a <subject> runs\na <subject> sleeps")
    put(tmp_path, "rex/3", "blue", caption=None)  # without a caption: a reference only
    found = data(tmp_path)
    assert len(found) == 2
    seen = {(colour_of(e.target), colour_of(e.subjects[0].references[0])) for e in draws(found)}
    assert seen == {("red", "green"), ("red", "blue"), ("green", "red"), ("green", "blue")}
    assert {e.prompt for e in draws(found)} == {"a photo of <subject>", "a <subject> runs", "a <subject> sleeps"}
    example = draws(found)[0]
    assert example.target.shape == (16, 16, 3) and example.original_size == (32, 40)
    assert example.subjects[0].references[0].shape == (32, 40, 3)


def test_a_single_picture_is_augmented(tmp_path):
    put(tmp_path, "rex/1")
    texture = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(texture).save(tmp_path / "rex" / "1.png")
    first, again, other = (data(tmp_path).draw(0, random.Random(i)).subjects[0].references[0] for i in (0, 0, 1))
    assert torch.equal(first, again) and first.shape == (512, 512, 3)
    assert not torch.allclose(first, other, atol=0.05)


def test_several_references(tmp_path):
    for i in range(5):
        put(tmp_path, f"rex/{i}")
    assert {len(e.subjects[0].references) for e in draws(data(tmp_path, references=3))} == {3}
    counts = {len(e.subjects[0].references) for e in draws(data(tmp_path, references=3, vary_references=True))}
    assert counts == {1, 2, 3}


def test_the_class_word_may_stand_in_for_the_placeholder(tmp_path):
    put(tmp_path, "rex/1", caption="A golden retriever on grass")
    put(tmp_path, "tom/1", caption="a dog and <subject>")
    (tmp_path / "rex" / "class.txt").write_text("golden retriever\n")
    found = {e.name: e.subjects[0] for e in draws(data(tmp_path))}
    assert (found["rex/1"].placeholder, found["rex/1"].class_word) == ("golden retriever", "golden retriever")
    assert (found["tom/1"].placeholder, found["tom/1"].class_word) == ("<subject>", "dog")


def test_several_subjects_in_a_picture(tmp_path):
    for name, colour in (("anna/1", "red"), ("anna/2", "red"), ("rex/1", "blue")):
        put(tmp_path, name, colour)
    subjects = json.dumps({"subjects": {"<anna>": "anna", "<rex>": "rex"}})
    put(tmp_path, "both/1", "grey", "<anna> walks <rex>", json=subjects)
    (tmp_path / "anna" / "class.txt").write_text("woman")
    found = data(tmp_path)
    index = next(i for i, picture in enumerate(found.pictures) if picture.several)
    example = found.draw(index, random.Random(0))
    assert [(s.placeholder, s.class_word) for s in example.subjects] == [("<anna>", "woman"), ("<rex>", "dog")]
    assert [colour_of(s.references[0]) for s in example.subjects] == ["red", "blue"]
    assert "both" not in found.views


def test_masks_paint_over_references_and_weigh_targets(tmp_path):
    put(tmp_path, "rex/1", "red")
    put(tmp_path, "rex/2", "red")
    half = np.zeros((32, 40), np.uint8)
    half[:, :20] = 255
    for name in ("1", "2"):
        Image.fromarray(half).save(tmp_path / "rex" / f"{name}.mask.png")
    example = data(tmp_path, crop="centre").draw(0, random.Random(0))
    assert example.mask[8].tolist()[:6] == [1] * 6 and example.mask[8].tolist()[-6:] == [0] * 6
    shown = Draws([example], 0, LossConfig(), 32, "pad")[0].subjects[0].references[0]
    assert shown.shape == (32, 32, 3)
    torch.testing.assert_close(shown[16, 28], torch.tensor(NEUTRAL), atol=0.02, rtol=0)
    torch.testing.assert_close(shown[16, 4], torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0)


def test_shards_give_what_folders_give(tmp_path):
    for i in range(3):
        put(tmp_path / "in", f"rex/{i}", ["red", "green", "blue"][i], "a cat")
    (tmp_path / "in" / "rex" / "class.txt").write_text("cat")
    names = sorted(path for path in (tmp_path / "in").rglob("*") if path.is_file())
    for shard in range(2):  # a subject's pictures in two shards
        with tarfile.open(tmp_path / f"pets-{shard}.tar", "w") as archive:
            for path in names[shard::2]:
                archive.add(path, path.relative_to(tmp_path / "in"))
    shards = SubjectData(DataConfig(shards=[str(tmp_path / "pets-{0..1}.tar")], resolution=16))
    for one, other in zip(draws(data(tmp_path / "in")), draws(shards), strict=True):
        assert (one.name, one.prompt) == (other.name, other.prompt)
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.subjects[0].references[0], other.subjects[0].references[0])


def test_the_order_is_a_function_of_the_position(tmp_path):
    for i in range(7):
        put(tmp_path, f"rex/{i}")
    one, other = (Draws(data(tmp_path), 3, LossConfig(drop_text=0.5), 16) for _ in range(2))
    other[20]
    assert sorted(one.index(i) for i in range(7)) == sorted(one.index(i) for i in range(7, 14)) == list(range(7))
    assert [one.index(i) for i in range(7)] != [one.index(i) for i in range(7, 14)]
    for i in (13, 0, 5):
        assert (one[i].name, one[i].prompt) == (other[i].name, other[i].prompt)
        assert torch.equal(one[i].target, other[i].target)


def test_processes_share_the_positions():
    processes = [list(Positions(6, 2, 2, process, 3)) for process in range(3)]
    assert processes == [[[6, 7], [12, 13]], [[8, 9], [14, 15]], [[10, 11], [16, 17]]]


def test_conditions_are_dropped(tmp_path):
    put(tmp_path, "rex/1", caption="a <subject> on grass")
    put(tmp_path, "rex/2", caption="a <subject> on grass")

    def outcomes(**options):
        made = Draws(data(tmp_path), 0, LossConfig(**{"drop_text": 0, **options}), 16)
        return {(e.prompt, tuple(len(s.references) for s in e.subjects)) for e in (made[i] for i in range(30))}

    whole = ("a <subject> on grass", (1,))
    assert outcomes() == {whole}
    assert outcomes(drop_text=0.5) == {whole, ("<subject>", (1,))}
    assert outcomes(drop_subject=0.5) == {whole, ("a <subject> on grass", (0,))}
    assert outcomes(drop_both=0.5) == {whole, ("", ())}


def broken_picture(folder):
    put(folder, "rex/1")
    (folder / "rex" / "1.png").write_bytes(b"no picture")
    draws(data(folder), 1)


def no_class(folder):
    put(folder, "rex/1")
    data(folder, class_word="")


def unknown_subject(folder):
    put(folder, "both/1", json='{"subjects": {"<anna>": "anna"}}')
    data(folder)


def no_word(folder):
    put(folder, "rex/1", caption="a puppy\na dog")
    data(folder)


def wrong_mask(folder):
    put(folder, "rex/1")
    Image.new("L", (10, 30), 255).save(folder / "rex" / "1.mask.png")
    draws(data(folder), 1)


def no_captions(folder):
    put(folder, "rex/1", caption=None)
    data(folder)


def compressed(folder):
    with tarfile.open(folder / "a.tar", "w:gz"):
        pass
    SubjectData(DataConfig(shards=[str(folder / "a.tar")]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: data(folder / "nowhere"),
            r"There is no data folder .*nowhere\. Expected one folder per subject",
        ),
        (no_captions, r"(?s)No captioned pictures of subjects in .*There are 1 samples, 1 of them pictures"),
        (no_word, r'rex/1: "a puppy" has no <subject> and no class word \(dog\)'),
        (no_class, r"Write it into rex/class.txt"),
        (unknown_subject, r'both/1: there is no picture of the subject "anna" alone'),
        (broken_picture, r"Could not read the picture rex/1.png"),
        (wrong_mask, r"mask rex/1.mask.png is 10x30, its picture 40x32"),
        (compressed, r"Could not read the shard .*a.tar"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, make, message):
    with pytest.raises(NestedAttentionError, match=message):
        make(tmp_path)
