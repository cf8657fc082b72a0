"""What the encoder is shown: said, cut out of the target, or drawn from the subject's other pictures."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from nested_core.errors import NestedAttentionError
from nested_core.faces import align_face
from nested_core.images import NEUTRAL, prepare
from nested_core.training import DataConfig, TrainingConfig
from nested_core.training.__main__ import RECIPES, parse
from nested_core.training.data import SubjectData
from nested_core.training.look import look

POINTS = np.load(Path(__file__).resolve().parents[1] / "data" / "astronaut_landmarks.npz")
MESH, DLIB = POINTS["mesh 0 1.0"].astype(float), POINTS["dlib 0 1.0"].astype(float)
BOX = [176, 64, 272, 192]  # of the astronaut's head


def put(folder, name="anna/1", picture=None, caption="a <subject>", **said):
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(astronaut() if picture is None else picture).save(path)
    path.with_suffix(".txt").write_text(caption)
    if said:
        path.with_suffix(".json").write_text(json.dumps(said))
    return path


def plain(value):
    return np.full((40, 40, 3), value, np.uint8)


def references(folder, draws=1, **options):
    options = {"class_word": "woman", "resolution": 16, "reference": "self", **options}
    found = SubjectData(DataConfig([str(folder)], **options))
    return [found.draw(i % len(found), random.Random(i)).subjects[0].references for i in range(draws)]


def reference(folder, **options):
    ((only,),) = references(folder, **options)
    return only


def aligned(points, margin=0.0):
    """What Crop Subject makes of the photograph."""
    photo = torch.from_numpy(astronaut()).float()[None] / 255
    frames = {"frames": [[{"landmarks_xy": points}]], "image_size": (512, 512)}
    return align_face(photo, frames, margin)[0][0]


def five_of(mesh):
    """Eyes, nose and corners of the mouth."""
    eyes = [mesh[[33, 160, 158, 133, 153, 144]].mean(0), mesh[[362, 385, 387, 263, 373, 380]].mean(0)]
    return [*eyes, mesh[1], mesh[61], mesh[291]]


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("points", [MESH, np.array(five_of(MESH))], ids=["mesh", "five points"])
def test_a_face_is_cut_as_crop_subject_cuts_it(tmp_path, points, margin):
    put(tmp_path, landmarks=points.tolist())
    made = reference(tmp_path, margin=margin)
    torch.testing.assert_close(made, aligned(MESH, margin), atol=0.6 / 255, rtol=0)


def test_the_points_of_another_program_give_nearly_the_same_face(tmp_path):
    put(tmp_path, landmarks=DLIB.tolist())
    difference = (reference(tmp_path) - aligned(MESH)).abs().mean()
    assert difference < 0.02 < 0.1 < (reference(tmp_path).flip(1) - aligned(MESH)).abs().mean()


def test_a_box_is_cut_to_the_square_around_it(tmp_path):
    put(tmp_path, box=BOX)
    photo = torch.from_numpy(astronaut()).float() / 255
    torch.testing.assert_close(reference(tmp_path), photo[64:192, 160:288])
    torch.testing.assert_close(reference(tmp_path, margin=0.25), photo[32:224, 128:320])


def test_a_mask_is_painted_over_or_cut_to(tmp_path):
    mask = np.zeros((512, 512), np.uint8)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    put(tmp_path)
    Image.fromarray(mask).save(tmp_path / "anna" / "1.mask.png")
    photo = torch.from_numpy(astronaut()).float() / 255
    torch.testing.assert_close(reference(tmp_path, use_masks=False), photo[64:192, 160:288])
    seen = prepare(reference(tmp_path)[None], None, "crop", 128)[0]  # as the vision tower is shown it
    torch.testing.assert_close(seen[:, 16:112], photo[64:192, 176:272])
    torch.testing.assert_close(seen[60, 2], torch.tensor(NEUTRAL))


def test_a_mask_is_cut_with_the_face_that_it_is_on(tmp_path):
    put(tmp_path, landmarks=MESH.tolist())
    left = np.zeros((512, 512), np.uint8)
    left[:, : round(float(MESH[1][0]))] = 255  # up to the nose
    Image.fromarray(left).save(tmp_path / "anna" / "1.mask.png")
    made = reference(tmp_path)
    assert made.shape == (512, 512, 4)
    assert made[256, 100, 3] == 1 and made[256, 412, 3] == 0


def test_a_reference_that_is_said_is_the_one(tmp_path):
    for name, value in (("1", 50), ("2", 100), ("3", 150)):
        put(tmp_path, f"anna/{name}", plain(value))
    Image.fromarray(plain(250)).save(tmp_path / "anna" / "1.reference.jpg")
    for options in ({"reference": "self"}, {"reference": "others", "references": 2}):
        made = references(tmp_path, 30, augment=0.0, **options)
        assert {round(r.mean().item() * 255) for r in made[0]} == {250}
        others = {round(r.mean().item() * 255) for views in made[1::3] for r in views}
        assert 250 not in others  # for no other picture


def test_others_are_cut_where_they_say_their_subject_is(tmp_path):
    put(tmp_path, "anna/1", plain(50))
    put(tmp_path, "anna/2", landmarks=MESH.tolist())
    made = references(tmp_path, reference="others")[0][0]
    torch.testing.assert_close(made, aligned(MESH), atol=0.6 / 255, rtol=0)


def test_self_is_the_target_even_where_there_are_others(tmp_path):
    for name, value in (("1", 50), ("2", 200)):
        put(tmp_path, f"anna/{name}", plain(value), box=[0, 0, 20, 20])
    shades = [round(views[0].mean().item() * 255) for views in references(tmp_path, 6)]
    assert shades == [50, 200] * 3


def test_where_nothing_says_where_the_subject_is_the_whole_picture_is_augmented(tmp_path, caplog):
    put(tmp_path)
    put(tmp_path, "rex/1", box=BOX)
    with caplog.at_level(logging.WARNING):
        (one,), _, (other,) = references(tmp_path, 3)
    assert "1 of 2 pictures do not say where their subject is" in caplog.text and "anna/1" in caplog.text
    assert one.shape == (512, 512, 3) and not torch.allclose(one, other, atol=0.05)
    run = TrainingConfig(output=str(tmp_path), data=DataConfig([str(tmp_path)], class_word="woman", reference="self"))
    assert "1 pictures do not say where their subject is; the reference is the whole picture:\n  anna/1" in look(run)[0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"box": [176, 64, 96, 128]}, r"anna/1: \"box\" should be \[left, top, right, bottom\].*position and size"),
        ({"box": [600, 64, 700, 128]}, r"the box \[600.*\] is not in the picture of 512x512"),
        ({"landmarks": [[1, 2]] * 7}, r"anna/1: \"landmarks\" should be points.*5 \(eyes.*got 7 entries"),
        ({"landmarks": "face.txt"}, r"got 8 entries"),
        ({"landmarks": [[100, 100]] * 5}, r"anna/1: The landmarks .* do not form a face"),
    ],
)
def test_places_that_are_none_are_named(tmp_path, said, message):
    put(tmp_path, **said)
    with pytest.raises(NestedAttentionError, match=message):
        reference(tmp_path)


# --- the recipe


def test_the_papers_recipe_is_one_setting(tmp_path):
    """One picture per person, in one folder, with landmarks in a table; the person's own crop is the reference."""
    rows = []
    for name in ("0001", "0002"):
        put(tmp_path, name).with_suffix(".txt").unlink()
        rows.append({"file_name": f"{name}.png", "text": "a person in a space suit", "landmarks": DLIB.tolist()})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = parse(["--recipe", "paper", "--data.folders", json.dumps([str(tmp_path)]), "--data.resolution", "64"])
    found = SubjectData(made["data"])
    assert repr(found) == "2 captioned pictures of 2 subjects"
    example = found.draw(0, random.Random(0))
    assert (example.subjects[0].placeholder, example.subjects[0].class_word) == ("person", "person")
    assert (example.subjects[0].references[0] - aligned(MESH)).abs().mean() < 0.02
    settings = made["encoder"]
    assert (settings.value_norm, settings.alpha, settings.tokens) == ("match", 2.0, 1024)


def test_what_a_config_says_wins_over_its_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: paper\ndata:\n  class_word: cat\nencoder:\n  tokens: 16\n")
    made = parse(["--config", str(tmp_path / "mine.yaml"), "--encoder.alpha", "1.5"])
    assert (made["data"].class_word, made["data"].reference, made["data"].layout) == ("cat", "self", "pictures")
    assert (made["encoder"].tokens, made["encoder"].alpha, made["encoder"].value_norm) == (16, 1.5, "match")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid(recipe):
    assert parse(["--recipe", recipe])["data"].references == 1
