"""Each command of docs/training.md is run as it stands there, on small data and the small world's base model.

Those of its first page run in tests/host/test_training_guide.py, which opens the result in the nodes; those of several
processes in tests/unit/test_training_processes.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import guide
import numpy as np
import pytest
import skimage
import yaml
from PIL import Image

from nested_core.checkpoint import read_encoder
from nested_core.training import (
    BaseConfig,
    BaseModel,
    DataConfig,
    EncoderSettings,
    TrainingConfig,
    load_base,
    train,
)
from nested_core.training.__main__ import main
from nested_core.training.data import SubjectData

PHOTOS = Path(skimage.data_dir)
PIPELINE = "python demo/train.py --shipped --quick --stage pipeline"
COMMANDS = {
    command: heading
    for command, heading in guide.commands().items()
    if heading != guide.FIRST_PAGE and not command.startswith("accelerate launch")
}
SAID = {  # what a command has to say, by a part of it
    "pip install": "",
    "--look": "A training can begin.",
    "--caption": "Captions written: 2",
    "--dry_run": "First batch:",
    "--print_config": "resolution: 768",
    "tar ": "",
}


def put(path, photo, size=(96, 64), caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(PHOTOS / photo).convert("RGB").resize(size).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def lay_out_data(folder):
    pets = folder / "data" / "pets"
    put(pets / "rex" / "01.jpg", "coffee.png", caption="a <subject> lying on a red sofa")
    put(pets / "rex" / "02.jpg", "rocket.jpg", caption="a <subject> running on a beach, side view")
    Image.new("L", (96, 64), 255).save(pets / "rex" / "01.mask.png")
    put(pets / "tom" / "01.jpg", "chelsea.png")
    put(pets / "tom" / "02.jpg", "chelsea.png", (60, 60))
    put(pets / "rex_and_tom" / "01.jpg", "motorcycle_left.png", caption="<rex> and <tom> asleep")
    (pets / "rex_and_tom" / "01.json").write_text('{"subjects": {"<rex>": "rex", "<tom>": "tom"}}')
    for subject, word in (("rex", "robot"), ("tom", "creature")):
        (pets / subject / "class.txt").write_text(word)
    put(folder / "data" / "kohya" / "10_creature" / "1.png", "astronaut.png", caption="creature, in space")
    put(folder / "data" / "people" / "0001.png", "astronaut.png", (512, 512))
    points = np.load(guide.REPO / "tests" / "data" / "astronaut_landmarks.npz")["dlib 0 1.0"]
    row = {"file_name": "0001.png", "text": "a person in a suit", "landmarks": points.tolist()}
    (folder / "data" / "people" / "metadata.jsonl").write_text(json.dumps(row))
    (folder / "my_captions.py").write_text("import sys\nfor path in sys.stdin:\n    print('a creature in a box')\n")


def write_configs(folder):
    """pets.yaml and people.yaml, from sdxl.yaml as the guide says, for the small world and two steps."""
    said = yaml.safe_load((folder / "nested_core" / "training" / "configs" / "sdxl.yaml").read_text("utf-8"))
    base = "demo/run_quick_shipped/pipeline"
    said["base"] = {"model": base, "vision": f"{base}/image_encoder", "family": "demo/family.json"}
    said["data"].update(class_word="robot", resolution=64)
    said["encoder"].update(tokens=4, dim=32, heads=1, depth=1, base_model="Small World", licence="MIT", title="pets")
    said.update(output="runs/pets", steps=2, batch_size=1, accumulation=1, precision="fp32", cpu=True, workers=0,
                gradient_checkpointing=False, samples={"every": 0})  # fmt: skip
    (folder / "pets.yaml").write_text(yaml.safe_dump(said))
    people = {"output": "runs/people", "data": {"folders": ["data/people"], "resolution": 64}}
    (folder / "people.yaml").write_text(yaml.safe_dump(people))


def run(command, folder):
    """(exit code, what was said) of a command of the guide. The training's own run in this process: it is the same
    `main`, without the minute that importing its packages takes."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "nested_core.training"]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for the captions
            try:
                return main(words[3:]), said.getvalue()
            except SystemExit as stop:  # --print_config
                return stop.code or 0, said.getvalue()
    if words[0] in ("python", "pip"):
        words = [sys.executable, *(["-m", "pip"] if words[0] == "pip" else []), *words[1:]]
    if "pip" in words:
        words.append("--dry-run")  # all of it is here already
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = guide.clone(tmp_path_factory.mktemp("clone"))
    lay_out_data(made)
    write_configs(made)
    code, said = run(PIPELINE, made)
    assert code == 0, said
    return made


@pytest.fixture(scope="module")
def done(folder):
    """Exit code and words of each command, run in the guide's order; the captions are made where it makes them."""
    order = sorted(COMMANDS, key=lambda command: "--caption" not in command)
    return {command: run(command, folder) for command in order}


def test_the_guide_has_the_commands_that_are_run():
    assert PIPELINE in guide.commands() and len(COMMANDS) >= 8
    assert all(any(part in command for part in SAID) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_does_what_it_says(done, command):
    code, said = done[command]
    assert code == 0, said
    assert next(words for part, words in SAID.items() if part in command) in said


def test_what_the_commands_leave(done, folder):
    assert (folder / "data" / "pets" / "tom" / "01.txt").read_text().strip() == "a creature in a box"
    for name in ("pets/look.png", "pets/first_batch.png", "people/look.png"):
        assert Image.open(folder / "runs" / name).size > (60, 60)


def test_the_file_and_the_card_say_what_it_was_trained_on_and_no_more(done, folder):
    code, said = run("python -m nested_core.training --config pets.yaml", folder)
    assert code == 0, said
    config, _ = read_encoder(folder / "runs" / "pets" / "encoder.safetensors")
    trained = json.loads(config.training)
    expected = {
        "base_model": "Small World", "resolution": 64, "pictures": 5, "subjects": 2, "captions": 5, "step": 2,
    }  # fmt: skip
    assert {name: trained[name] for name in expected} == expected
    assert trained["class_words"] == {"robot": 1, "creature": 1}
    assert trained["settings"]["optimiser"]["schedule"] == "cosine" and "torch" in trained["versions"]
    card = (folder / "runs" / "pets" / "encoder.md").read_text("utf-8")
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "mit" and "# pets\n" in text
    for words in (
        "5 pictures of 2 subjects",
        "robot (1 subjects), creature (1 subjects)",
        config.fingerprint,
        "64 x 64",
    ):
        assert words in text
    for private in (str(folder), "data/", "rex", "tom", "run_quick"):
        assert private not in card and private not in config.training


def test_from_python(folder, monkeypatch):
    """The guide's lines, with what they leave open filled in: a pipeline, a tower, a data set."""
    monkeypatch.chdir(folder)
    base = "demo/run_quick_shipped/pipeline"
    loaded = load_base(BaseConfig(base, "demo/family.json", f"{base}/image_encoder"))
    found = SubjectData(DataConfig(["data/people"], layout="pictures", class_word="person", resolution=64))

    class Pictures:
        def __len__(self):
            return len(found)

        def __getitem__(self, i):
            return found.draw(i, random.Random(i))

    config = TrainingConfig(
        "runs/python", steps=1, precision="fp32", cpu=True, workers=0, tracker="none",
        encoder=EncoderSettings(tokens=4, dim=32, depth=1, heads=1),
    )  # fmt: skip
    path = train(config, BaseModel(loaded.pipeline, loaded.vision, name="my base"), Pictures())
    trained = json.loads(read_encoder(path)[0].training)
    assert (trained["base_model"], trained["pictures"], trained["step"]) == ("my base", 1, 1)
