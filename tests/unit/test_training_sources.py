"""People's data as it lies there: imagefolder, `datasets` on disk, kohya's folders, photos without captions."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pillow_heif
import pytest
import skimage
import torch
from PIL import Image
from torch.utils.data import DataLoader

from nested_core.errors import NestedAttentionError
from nested_core.training import DataConfig, LossConfig, TrainingConfig
from nested_core.training.__main__ import main
from nested_core.training.captions import make_captions
from nested_core.training.data import SubjectData
from nested_core.training.examples import Draws
from nested_core.training.look import look

PHOTOS = Path(skimage.data_dir)
pillow_heif.register_heif_opener()


def photo(name, size=(96, 64)):
    return Image.open(PHOTOS / f"{name}.png").convert("RGB").resize(size)


def put(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (photo("coffee") if image is None else image).save(path, **options)
    return path


def config(*folders, **options):
    return DataConfig([str(folder) for folder in folders], **{"class_word": "dog", "resolution": 16, **options})


def data(*folders, **options):
    return SubjectData(config(*folders, **options))


def draws(found, count=20):
    return [found.draw(i % len(found), random.Random(i)) for i in range(count)]


def shown(found):
    """What a data set has to show: per picture its subject, class words and captions."""
    return {
        picture.sample.name: (
            next(iter(picture.subjects.values())),
            {word for caption in picture.captions for _, word, _ in found.catalogue.bindings(picture, caption)},
            picture.captions,
        )
        for picture in found.pictures
    }


# --- imagefolder and datasets


ROWS = [
    {"file_name": "0001.png", "text": "a <subject> on grass", "subject": "rex"},
    {"file_name": "0002.png", "text": ["a <subject> runs", "a cat sleeps"], "subject": "tom", "class": "cat"},
    {"file_name": "more/0003.v2.PNG", "text": "a dog", "subject": "rex"},
]
READ = {
    "0001": ("rex", {"dog"}, ["a <subject> on grass"]),
    "0002": ("tom", {"cat"}, ["a <subject> runs", "a cat sleeps"]),
    "more/0003.v2": ("rex", {"dog"}, ["a dog"]),
}


def imagefolder(folder, rows=ROWS):
    for row, name in zip(ROWS, ("coffee", "chelsea", "astronaut"), strict=True):
        put(folder / row["file_name"], photo(name))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    return folder


def test_an_imagefolder_says_captions_subjects_and_class_words(tmp_path):
    assert shown(data(imagefolder(tmp_path))) == READ


def test_the_columns_of_an_imagefolder_have_the_names_that_are_said(tmp_path):
    renamed = [{"file_name": r["file_name"], "prompt": r["text"], "who": r["subject"]} for r in ROWS]
    found = data(imagefolder(tmp_path, renamed), caption_column="prompt", subject_column="who", class_word="cat",
                 captions=["{subject}, {caption}"])  # fmt: skip
    assert found.views.keys() == {"rex", "tom"} and shown(found)["more/0003.v2"][2] == ["<subject>, a dog"]


def test_a_metadata_csv_is_read_as_the_jsonl(tmp_path):
    folder = imagefolder(tmp_path)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text,subject\n0001.png,"a <subject>, sitting",rex\n', "utf-8")
    assert shown(data(folder)) == {"0001": ("rex", {"dog"}, ["a <subject>, sitting"])}


def test_a_saved_data_set_gives_what_its_imagefolder_gives(tmp_path):
    """Written by `datasets` itself; two worker processes read it."""
    folder = imagefolder(tmp_path / "in")
    rows = [{"image": str(folder / r["file_name"]), "text": r["text"] if isinstance(r["text"], str) else r["text"][1],
             "subject": r["subject"], "class": r.get("class")} for r in ROWS]  # fmt: skip
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    made = made.cast_column("subject", datasets.ClassLabel(names=["rex", "tom"]))
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    with pytest.raises(NestedAttentionError, match=r"several splits: name one .*saved/train"):
        data(tmp_path / "saved")
    found = data(tmp_path / "saved" / "train", crop="centre")
    assert shown(found) == {
        "train#0000000": ("rex", {"dog"}, ["a <subject> on grass"]),
        "train#0000001": ("tom", {"cat"}, ["a cat sleeps"]),
        "train#0000002": ("rex", {"dog"}, ["a dog"]),
    }
    examples = Draws(found, 0, LossConfig(drop_text=0), 16)
    with_workers = list(DataLoader(examples, batch_sampler=[[0], [1], [2]], collate_fn=list, num_workers=2))
    for position, (example,) in enumerate(with_workers):
        assert torch.equal(example.target, examples[position].target)
    by_subject = {e.name: e.target for e in draws(found, 3)}
    plain = data(folder, crop="centre", caption_column="text")
    assert torch.equal(by_subject["train#0000001"], next(e.target for e in draws(plain, 3) if e.name == "0002"))


# --- kohya


def kohya(folder):
    put(folder / "3_golden retriever" / "a.png").with_suffix(".txt").write_text("golden retriever, on grass")
    put(folder / "3_golden retriever" / "b.jpg").with_suffix(".caption").write_text("a golden retriever indoors")
    put(folder / "1_cat" / "c.webp")
    return folder


def test_kohyas_folders_say_class_word_and_repeats(tmp_path):
    found = data(kohya(tmp_path), layout="kohya", class_word="")
    assert shown(found) == {
        "1_cat/c": ("1_cat", {"cat"}, ["cat"]),
        "3_golden retriever/a": ("3_golden retriever", {"golden retriever"}, ["golden retriever, on grass"]),
        "3_golden retriever/b": ("3_golden retriever", {"golden retriever"}, ["a golden retriever indoors"]),
    }
    epoch = [Draws(found, 0, LossConfig(), 16)[position].name for position in range(len(found))]
    assert {name: epoch.count(name) for name in epoch} == {
        "1_cat/c": 1, "3_golden retriever/a": 3, "3_golden retriever/b": 3
    }  # fmt: skip


def test_tags_that_name_no_subject_get_it_from_a_template(tmp_path):
    put(tmp_path / "10_anna woman" / "1.png").with_suffix(".txt").write_text("smiling, red dress")
    with pytest.raises(NestedAttentionError, match=r'(?s)"smiling, red dress" has no <subject>.*\{caption\}'):
        data(tmp_path, layout="kohya")
    found = data(tmp_path, layout="kohya", captions=["{subject}, {caption}", "a photo of {subject}"])
    assert shown(found)["10_anna woman/1"] == ("10_anna woman", {"anna woman"}, ["<subject>, smiling, red dress"])


# --- photos without captions


def test_photos_without_captions_get_one_of_several_at_random(tmp_path):
    for name in ("1", "2"):
        put(tmp_path / "rex" / f"{name}.png")
    put(tmp_path / "rex" / "3.png").with_suffix(".txt").write_text("a dog in the snow")
    found = data(tmp_path, captions=["a photo of {subject}", "{subject}"])
    assert {e.prompt for e in draws(found)} == {"a photo of <subject>", "<subject>", "a dog in the snow"}
    assert {e.subjects[0].class_word for e in draws(found)} == {"dog"}


def test_each_picture_may_be_a_subject_of_its_own(tmp_path):
    for name in ("1", "2", "3"):
        put(tmp_path / f"{name}.png")
    found = data(tmp_path, layout="pictures", captions=["a photo of {subject}"])
    assert found.views.keys() == {"1", "2", "3"} and all(len(views) == 1 for views in found.views.values())
    with pytest.raises(NestedAttentionError, match=r'3 of these in no subject\'s folder.*layout to "pictures"'):
        data(tmp_path, captions=["a photo of {subject}"])


CAPTIONER = """
import sys
from PIL import Image
for line in sys.stdin:
    print("a {} of {} x {}".format("dog", *Image.open(line.strip()).size))
print("done", file=sys.stderr)
"""


def test_captions_by_a_command_are_written_beside_the_pictures(tmp_path, capsys):
    folder = tmp_path / "data"
    put(folder / "rex" / "1.JPG", photo("coffee", (30, 20)))
    put(folder / "rex" / "2 b.png", photo("chelsea", (40, 20)))
    put(folder / "rex" / "3.png").with_suffix(".txt").write_text("a dog, by hand")
    (tmp_path / "captions.py").write_text(CAPTIONER)
    arguments = ["--data.folders", json.dumps([str(folder)]), "--data.class_word", "dog"]
    assert main([*arguments, "--caption", f'"{sys.executable}" "{tmp_path / "captions.py"}"']) == 0
    assert "Captions written: 2" in capsys.readouterr().out
    assert [picture.captions for picture in data(folder).pictures] == [
        ["a dog of 30 x 20"], ["a dog of 40 x 20"], ["a dog, by hand"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo loading; cat", "given 2 pictures and answered with 3 lines"),
        ("echo; echo", "2 lines, 2 of them empty"),
        ("exit 3", "ended with 3"),
    ],
)
def test_a_caption_command_that_answers_otherwise_writes_nothing(tmp_path, command, message):
    for name in ("1", "2"):
        put(tmp_path / "rex" / f"{name}.png")
    with pytest.raises(NestedAttentionError, match=message):
        make_captions(config(tmp_path), command)
    assert sorted(path.name for path in (tmp_path / "rex").iterdir()) == ["1.png", "2.png"]


# --- picture files


@pytest.mark.parametrize("name", ["a.webp", "a.avif", "a.heic", "a.JPEG", "a.tiff", "a.b.png"])
def test_pictures_of_every_kind_are_read(tmp_path, name):
    put(tmp_path / "rex" / name, photo("chelsea"), quality=95)
    example = data(tmp_path, captions=["{subject}"], crop="centre", resolution=64).draw(0, random.Random(0))
    expected = np.asarray(photo("chelsea").crop((16, 0, 80, 64)), np.float32) / 255
    assert (example.target - torch.from_numpy(expected)).abs().mean() < 0.03


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    put(tmp_path / "rex" / "a.png", photo("chelsea").transpose(Image.Transpose.ROTATE_90), exif=exif)
    example = data(tmp_path, captions=["{subject}"], crop="centre", resolution=64).draw(0, random.Random(0))
    expected = np.asarray(photo("chelsea").crop((16, 0, 80, 64)), np.float32) / 255
    assert example.original_size == (64, 96)
    torch.testing.assert_close(example.target, torch.from_numpy(expected), atol=0.02, rtol=0)


def test_sixteen_bits_are_scaled_and_what_is_transparent_is_not_shown(tmp_path):
    grey = np.full((32, 32), 40000, np.uint16)
    put(tmp_path / "rex" / "deep.png", Image.fromarray(grey))
    cutting = np.zeros((32, 32, 4), np.uint8)
    cutting[..., 0] = 200  # red, also where it is hidden
    cutting[:, :16, 3] = 255
    put(tmp_path / "tom" / "cut.png", Image.fromarray(cutting))
    found = {e.name: e for e in draws(data(tmp_path, captions=["{subject}"], crop="centre"), 2)}
    torch.testing.assert_close(found["rex/deep"].target, torch.full((16, 16, 3), 40000 / 65535), atol=0.01, rtol=0)
    target = found["tom/cut"].target
    assert target[8, 12].tolist() == [1, 1, 1] and target[8, 3, 1] == 0
    assert found["tom/cut"].mask[8, 3] == 1 and found["tom/cut"].mask[8, 12] == 0
    assert found["tom/cut"].subjects[0].references[0].shape[-1] == 4


def with_a_broken_one(folder):
    for subject in ("rex", "tom"):
        for name in ("1", "2", "3"):
            put(folder / subject / f"{name}.jpg")
    whole = (folder / "rex" / "2.jpg").read_bytes()
    (folder / "rex" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def test_broken_pictures_are_named_once_and_skipped(tmp_path, caplog):
    folder = with_a_broken_one(tmp_path)
    found = data(folder, captions=["{subject}"], broken="skip", references=2)
    with caplog.at_level(logging.WARNING):
        first, again = draws(found, 60), draws(found, 60)
    assert [record.message.count("rex/2.jpg") for record in caplog.records] == [1]
    assert {e.name for e in first} == {f"{subject}/{n}" for subject in ("rex", "tom") for n in "123"} - {"rex/2"}
    assert {len(e.subjects[0].references) for e in first if e.name == "tom/1"} == {2}
    for one, other in zip(first, again, strict=True):  # whether it is known to be broken or not
        assert one.name == other.name and torch.equal(one.target, other.target)


def test_broken_pictures_stop_a_training(tmp_path):
    with pytest.raises(NestedAttentionError, match=r"Could not read the picture rex/2\.jpg: .*truncated"):
        draws(data(with_a_broken_one(tmp_path), captions=["{subject}"]))


def test_where_all_are_broken_it_ends(tmp_path):
    put(tmp_path / "rex" / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(NestedAttentionError, match="100 pictures in a row can't be read"):
        data(tmp_path, captions=["{subject}"], broken="skip").draw(0, random.Random(0))


def test_a_format_that_needs_a_plugin_says_which(tmp_path):
    put(tmp_path / "rex" / "1.png").rename(tmp_path / "rex" / "1.jxl")
    (tmp_path / "rex" / "1.jxl").write_bytes(b"\xff\x0a" + bytes(40))
    with pytest.raises(NestedAttentionError, match="pip install 'pillow-jxl-plugin'"):
        data(tmp_path, captions=["{subject}"]).draw(0, random.Random(0))


def test_what_systems_leave_behind_is_no_picture(tmp_path):
    put(tmp_path / "rex" / "1.png")
    for name in ("._1.png", "__MACOSX/rex/1.png", ".thumbnails/1.png"):
        put(tmp_path / "rex" / name)
    put(tmp_path / "rex" / "1.depth.png")  # of another tool, beside the picture
    assert [view.name for view in data(tmp_path, captions=["{subject}"]).views["rex"]] == ["rex/1"]


def missing_row(folder):
    imagefolder(folder, [*ROWS, {"file_name": "0009.png", "text": "a dog"}])
    data(folder)


def no_name(folder):
    imagefolder(folder, [{"text": "a dog"}])
    data(folder)


def other_columns(folder):
    imagefolder(folder, [{"file_name": r["file_name"], "prompt": r["text"]} for r in ROWS])
    data(folder)


def not_kohyas(folder):
    put(folder / "rex" / "1.png")
    data(folder, layout="kohya")


def no_pictures_in_it(folder):
    datasets.Dataset.from_list([{"text": "a dog"}]).save_to_disk(folder / "saved")
    data(folder / "saved")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing_row, r"metadata.jsonl names 1 files that are not beside it: 0009.png"),
        (no_name, r'metadata.jsonl, line 1: expected a row with "file_name"'),
        (other_columns, r"The columns that are said of them: file_name, prompt \(data.caption_column"),
        (not_kohyas, r'expected pictures in folders named by repeats and class word, as in "10_golden.*got rex'),
        (no_pictures_in_it, r"no column of pictures \(datasets.Image\). Its columns: text \(Value\)"),
        (lambda folder: data(folder, captions=["a photo"]), r'"a photo", which does not say where the subject stands'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, make, message):
    with pytest.raises(NestedAttentionError, match=message):
        make(tmp_path)


# --- the first look


@pytest.fixture
def troubled(tmp_path):
    """Real photographs with what goes wrong in real folders."""
    folder = tmp_path / "pets"
    put(folder / "rex" / "1.png", photo("astronaut", (300, 200))).with_suffix(".txt").write_text("a puppy")
    put(folder / "rex" / "2.jpg", photo("coffee"), quality=90).with_suffix(".txt").write_text("a <subject>")
    put(folder / "tom" / "1.png", photo("chelsea")).with_suffix(".txt").write_text("a dog")
    put(folder / "max" / "1.webp", photo("coffee", (200, 133)).transpose(Image.Transpose.FLIP_LEFT_RIGHT), quality=60)
    put(folder / "max" / "2.png", photo("brick")).with_suffix(".json").write_text('{"box": [10, 10, 60, 50]}')
    put(folder / "stray.png")
    shutil.copy(folder / "rex" / "2.jpg", folder / "tom" / "2.jpg")
    (folder / "tom" / "2.jpg").write_bytes((folder / "tom" / "2.jpg").read_bytes()[:900])
    return folder


def test_the_first_look_says_all_of_it_before_any_model_is_loaded(troubled, tmp_path, capsys):
    arguments = [
        "--look", "--output", str(tmp_path / "run"), "--data.folders", json.dumps([str(troubled)]),
        "--data.class_word", "dog", "--data.resolution", "128",
    ]  # fmt: skip
    assert main(arguments) == 1
    said = capsys.readouterr().out
    for words in (
        "6 pictures of 3 subjects, 0 of several subjects; 3 are targets, with 3 captions",
        "class words: dog (3 subjects)",
        "sizes: 96 x 64 to 300 x 200; files: 4 png, 2 jpg, 1 webp",
        "4 are smaller than data.resolution 128",
        'rex/1: "a puppy" has no <subject> and no class word (dog)',
        "1 pictures can't be read; they stop a training",
        "tom/2: Could not read the picture tom/2.jpg",
        "1 pictures lie in no subject's folder and are not used:\n  stray",
        "1 pairs of near-duplicates between subjects:\n  ",
        "A training would stop at this.",
    ):
        assert words in said, words
    assert "max/1 and rex/2" in said or "rex/2 and max/1" in said
    sheet = Image.open(tmp_path / "run" / "look.png")
    assert sheet.width == 8 + 7 * 168 and np.asarray(sheet).std() > 30
    arguments += ["--data.broken", "skip", "--data.captions", '["a photo of {subject}", "{subject}, {caption}"]']
    assert main(arguments) == 0
    assert "A training can begin." in capsys.readouterr().out


def test_photographs_that_differ_are_no_duplicates(tmp_path):
    names = ("astronaut", "coffee", "chelsea", "brick", "grass", "gravel", "camera", "moon", "coins", "page", "text")
    for name in names:
        put(tmp_path / name / "1.png", photo(name, (256, 256)))
    said, fine = look(TrainingConfig(output=str(tmp_path / "run"), data=config(tmp_path, captions=["{subject}"])))
    assert fine and "duplicates" not in said
    assert f"{len(names)} subjects have one picture" in said


def test_the_contact_sheet_shows_a_bounded_number_and_as_many_subjects_as_it_can(tmp_path):
    for subject in range(60):
        for name in ("1", "2"):
            put(tmp_path / f"{subject:02}" / f"{name}.png", photo("coffee", (16, 16)))
    look(TrainingConfig(output=str(tmp_path / "run"), data=config(tmp_path, captions=["{subject}"])))
    rows = 96 // 8  # 60 first pictures, 36 second ones
    assert Image.open(tmp_path / "run" / "look.png").size == (8 + 8 * 168, 8 + rows * 204)
