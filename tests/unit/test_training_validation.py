"""Held-out subjects, the best checkpoint, and what a run says of its speed, memory and time."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch

from narrow_training import arguments, checkpoint, entries, save_config
from nested_core.check import diffusers
from nested_core.check.diffusers import DiffusersBench
from nested_core.check.search import LEVELS, Race, noise_of
from nested_core.check.settings import settings_of
from nested_core.checkpoint import read_encoder
from nested_core.errors import NestedAttentionError
from nested_core.training import (
    DataConfig,
    Example,
    ExampleSubject,
    TrainingConfig,
    ValidationConfig,
    loop,
    validation,
)
from nested_core.training.__main__ import main, make_parser
from nested_core.training.checkpoints import best_checkpoint, found_checkpoints
from nested_core.training.data import SubjectData
from nested_core.training.validation import HeldOutBench, held_out, split


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("validation"))


@pytest.fixture
def pets(configured):
    return SubjectData(DataConfig([str(configured / "pets")], class_word="dog", resolution=64, flip=0.5))


def test_a_subject_is_held_out_by_its_name():
    names = [f"dog{i}" for i in range(200)]
    chosen = held_out(names, ValidationConfig(share=0.1))
    assert 10 <= len(chosen) <= 30
    assert set(chosen) <= set(held_out([*names, "cat", "cow"], ValidationConfig(share=0.1)))
    assert set(chosen) <= set(held_out(names, ValidationConfig(share=0.3)))
    assert held_out(names, ValidationConfig(subjects=["dog7", "dog3"])) == ["dog3", "dog7"]
    assert len(held_out(names[:5], ValidationConfig(share=0.01))) == 2
    with pytest.raises(NestedAttentionError, match=r"names cat, but there is no such subject. There are dog0"):
        held_out(names, ValidationConfig(subjects=["cat"]))


def test_what_is_held_out_is_not_trained_on(pets):
    part, found = split(pets, ValidationConfig(subjects=["dog0", "dog1"], pictures=1))
    seen = {part.draw(i, random.Random(i)).name for i in range(len(part))}
    assert seen == {"dog2/2", "dog2/6", "dog3/3", "dog3/7"} and set(found) == {"dog0", "dog1"}
    assert [len(examples) for examples in found.values()] == [1, 1]
    again = split(pets, ValidationConfig(subjects=["dog0", "dog1"], pictures=1))[1]
    assert all(torch.equal(found[name][0].target, again[name][0].target) for name in found)
    with pytest.raises(NestedAttentionError, match="0 pictures are left to train on"):
        split(pets, ValidationConfig(subjects=["dog0", "dog1", "dog2", "dog3"]))
    with pytest.raises(NestedAttentionError, match="of which 1 have captioned pictures"):
        split(pets, ValidationConfig(subjects=["dog0"]))


def test_the_curve_and_the_best_checkpoint(configured, pets, tmp_path, caplog):
    """In the log and in TensorBoard; the best is kept although `keep` is 1, and its encoder beside the newest."""
    changes = {"validation__share": 0.5, "save_every": 1, "keep": 1, "steps": 4, "optimiser__ema": 0,
               "optimiser__warmup": 0, "optimiser__layers_rate": 3e-3, "loss__drop_both": 0}  # fmt: skip
    with caplog.at_level("INFO"):
        assert main(arguments(configured, tmp_path, **changes)) == 0
    curve = [entry for entry in entries(tmp_path) if "validation_gain" in entry]
    assert [entry["step"] for entry in curve] == [0, 1, 2, 3, 4]
    assert len({entry["validation_loss"] for entry in curve}) == 5
    best = max(curve[1:], key=lambda entry: entry["validation_gain"])["step"]
    assert {path.name for path in found_checkpoints(tmp_path / "checkpoints")} == {
        f"step-{step:08}" for step in (best, 4)
    }
    said = json.loads((checkpoint(tmp_path, best) / "run.json").read_text())["validation"]
    assert best_checkpoint(tmp_path / "checkpoints", said) == checkpoint(tmp_path, best)
    assert best_checkpoint(tmp_path / "checkpoints", {"subjects": ["another"]}) is None
    trained = json.loads(read_encoder(tmp_path / "encoder-best.safetensors")[0].training)
    assert (trained["step"], trained["subjects"], trained["held_out_subjects"]) == (best, 2, 2)
    assert trained["pictures"] == len(split(pets, ValidationConfig(share=0.5))[0])
    assert not [name for name in said["subjects"] if name in json.dumps(trained)]
    assert "held out, not trained on | 2 subjects" in (tmp_path / "encoder-best.md").read_text("utf-8")
    for words in ("gap to no subject", "the forecast was"):
        assert words in caplog.text
    (events,) = tmp_path.rglob("events.out*")
    assert b"validation_own" in events.read_bytes()


@pytest.fixture
def bench(configured, tmp_path):
    """make(examples) -> a bench of them as held-out subjects, on the narrow small world with a fresh encoder."""
    parser = make_parser()
    made = parser.instantiate(parser.parse_args(arguments(configured, tmp_path)))
    config = TrainingConfig(**{field.name: made[field.name] for field in fields(TrainingConfig)})

    @contextmanager
    def make(examples):
        with loop.accelerated(config) as accelerator:
            run = loop.prepare(config, accelerator, None, examples, examples)
            with run.model.attached():
                yield HeldOutBench(run, run.held_out)

    return make


def portraits(count=3):
    pictures = torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return pictures, [
        Example(picture, "a photo of <subject>", [ExampleSubject("<subject>", "dog", [picture])], name=f"{i}")
        for i, picture in enumerate(pictures)
    ]


def test_measures_what_check_encoder_measures(bench, monkeypatch):
    """The same losses, as shares of the loss without a subject, once both have the same noise."""

    def noise(shape, photo, level):
        return noise_of(shape, 0, level)

    for module in (validation, diffusers):
        monkeypatch.setattr(module, "noise_of", noise)
    pictures, examples = portraits()
    with bench(examples) as ours:
        losses = Race(ours)
        settings = settings_of(ours.config)
        mine = [losses.row(settings, range(len(LEVELS))), losses.of_others(settings)]
        base, encoder = ours.run.base, ours.run.model.encoder
    theirs = Race(DiffusersBench(base, encoder, pictures, "a photo of <subject>", "dog", 64))
    expected = [theirs.row(settings, range(len(LEVELS))), theirs.of_others(settings)]
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (mine[0] - 1).abs().max() > 1e-3  # the subject does something


def test_the_gaps_open_where_it_learns(configured, tmp_path):
    """Trained on the very pictures that are measured: the subject's own photo comes to help, and more than others'."""
    parser = make_parser()
    changes = {"steps": 60, "batch_size": 3, "optimiser__ema": 0, "optimiser__layers_rate": 3e-3,
               "optimiser__qformer_rate": 3e-3, "loss__drop_both": 0, "save_every": 0}  # fmt: skip
    made = parser.instantiate(parser.parse_args(arguments(configured, tmp_path, **changes)))
    config = TrainingConfig(**{field.name: made[field.name] for field in fields(TrainingConfig)})
    examples, curve = portraits()[1], []
    loop.train(config, None, examples, lambda entry: curve.append(entry), examples)
    first, last = (entry for entry in curve if "validation_gain" in entry)
    # Small numbers: a U-Net of random weights makes little of what it reads.
    assert last["validation_gain"] > 5 * abs(first["validation_gain"])
    assert last["validation_own"] > first["validation_own"]
    assert last["validation_loss"] < first["validation_loss"]
    assert last["validation_gain_low"] < last["validation_gain"]


def test_held_out_examples_that_can_not_be_compared(configured, tmp_path):
    config = TrainingConfig(output=str(tmp_path))
    examples = portraits()[1]
    assert list(loop.held_out_of(examples, config)) == ["0 0", "1 1", "2 2"]
    with pytest.raises(NestedAttentionError, match=r"has 1 example\(s\); expected two or more"):
        loop.held_out_of(examples[:1], config)
    with pytest.raises(NestedAttentionError, match="Not of one subject: 1"):
        loop.held_out_of([examples[0], replace(examples[1], subjects=())], config)
    with pytest.raises(NestedAttentionError, match="Give train\\(\\) the held-out examples"):
        loop.held_out_of(examples, replace(config, validation=ValidationConfig(share=0.1)))
