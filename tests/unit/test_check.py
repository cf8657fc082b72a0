"""Check Encoder: the statistics, the search, what it says and remembers, and all of it on diffusers."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from demo import checking, export, models
from demo.shipped import CHECKPOINT, ENCODER, VISION, WEIGHTS
from nested_core.check.__main__ import main
from nested_core.check.chart import chart
from nested_core.check.diffusers import DiffusersBench
from nested_core.check.keep import keep
from nested_core.check.search import LEVELS, Found, noise_of, passes_of, search
from nested_core.check.settings import Settings, combinations, config_with, settings_of
from nested_core.check.statistics import chances, interval, means_that_fit, photos_to_settle
from nested_core.check.verdict import headline, is_about_the_subject, report, settled, works
from nested_core.checkpoint import load_encoder, read_encoder, write_encoder
from nested_core.encoder import EncoderConfig, NestedEncoder
from nested_core.errors import NestedAttentionError
from nested_core.remembered import path_beside, remember

SD15 = EncoderConfig(family="sd15", token_dim=768, base_model="SD 1.5")
PHOTOS = checking.portraits(16)
FEW = PHOTOS[:4]  # where nothing is to be told from its like
TRUE = Settings("penultimate", "match", 2.0, "eos")


class Invented:
    """Losses by a rule: the true settings' are lowest, by what each other setting costs; photos differ, and so does
    what the settings do to them."""

    def __init__(
        self,
        config: EncoderConfig = SD15,
        true: Settings = TRUE,
        photos: int = 8,
        costs: tuple[float, float, float, float] = (0.01, 0.03, 0.02, 0.02),
        noise: float = 0.003,
        gain: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.config, self.true, self.photos, self.costs, self.noise, self.gain = (
            config,
            true,
            photos,
            costs,
            noise,
            gain,
        )
        self.noise, self.gain, self.seed, self.asked = noise, gain, seed, 0

    def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> Iterator[float]:
        for photo, seen in enumerate(shown):
            self.asked += 1
            of_photo = random.Random(f"{self.seed} {photo} {level}").uniform(0.5, 2.0)
            if settings is None:
                yield of_photo
                continue
            names = ("image_features", "value_norm", "alpha", "pooled")
            off = sum(
                cost * (getattr(settings, name) != getattr(self.true, name))
                for cost, name in zip(self.costs, names, strict=True)
            )
            off += 0.1 * (seen != photo) * self.gain / 0.2
            moved = random.Random(f"{self.seed} {photo} {settings} {level}").gauss(0, self.noise)
            yield of_photo * (1 - self.gain + off + moved)


# --- statistics ---


def test_means_have_the_students_spread() -> None:
    torch.manual_seed(1)
    measured = torch.randn(1, 6, dtype=torch.float64)
    low, high = interval(measured[0])
    half = 2.5706 * float(measured.std()) / 6**0.5  # t of 5 degrees of freedom at 97.5 %
    assert low == pytest.approx(float(measured.mean()) - half, abs=0.04 * half)
    assert high == pytest.approx(float(measured.mean()) + half, abs=0.04 * half)
    assert torch.equal(means_that_fit(measured), means_that_fit(measured))


def test_what_two_candidates_share_does_not_count() -> None:
    """Photos differ a lot, candidates little but always in the same direction: the pairing tells them apart."""
    torch.manual_seed(2)
    photos = torch.randn(8, 1, dtype=torch.float64).expand(8, 4)
    ahead = photos + 0.001 * torch.randn(8, 4, dtype=torch.float64)
    losses = torch.stack([ahead, ahead + 0.01])
    assert float(chances(losses, 0)[0]) > 0.999
    unpaired = torch.stack([ahead, ahead[torch.randperm(8)] + 0.01])
    assert float(chances(unpaired, 0)[0]) < 0.8


def test_stated_certainty_is_kept() -> None:
    """What is said to be 75 to 95 % sure is right about as often, however far two candidates are apart."""
    torch.manual_seed(3)
    said, right = [], []
    for _ in range(600):
        truth = float(3 * torch.rand(1) - 1.5)
        losses = torch.stack([torch.zeros(6, 1), truth + torch.randn(6, 1)]).double()
        best = int(losses.mean((1, 2)).argmin())
        certainty = float(chances(losses, best)[best])
        if 0.75 < certainty < 0.95:
            said.append(certainty)
            right.append((truth > 0) == (best == 0))
    assert len(said) > 90
    assert sum(right) / len(right) == pytest.approx(sum(said) / len(said), abs=0.06)


def test_how_many_photos_would_settle_it() -> None:
    few = torch.tensor([0.1, -0.05, 0.15, 0.0, 0.1], dtype=torch.float64)
    needed = int((1.64485 * float(few.std()) / float(few.mean())) ** 2) + 2
    assert photos_to_settle(few) == photos_to_settle(-few / 2) == needed
    assert photos_to_settle(few + 0.1) < needed
    assert photos_to_settle(few - few.mean()) is None


# --- the search ---


@pytest.mark.parametrize(
    "true", [TRUE, Settings("last", "none", None, "eos"), Settings("penultimate", "unit", 8.0, "eos")], ids=str
)
def test_it_finds_the_settings_in_few_passes(true: Settings) -> None:
    bench = Invented(true=true)
    steps: list[int] = []
    found = search(bench, lambda: steps.append(1))
    assert found.settings == true
    assert bench.asked == found.passes == len(steps) == passes_of(SD15, 8)
    everything = (len(combinations(SD15)) + 2) * 8 * len(LEVELS)
    assert found.passes < 0.6 * everything
    assert works(found) and is_about_the_subject(found)
    assert settled(found)["value_norm"] == true.value_norm
    assert config_with(SD15, found.settings).value_norm == true.value_norm
    assert settings_of(config_with(SD15, found.settings)) == true


@pytest.mark.parametrize("pooled", ["eos", "placeholder"])
def test_where_the_pooled_vector_is_taken_is_tried_for_sdxl_alone(pooled: str) -> None:
    config = EncoderConfig()
    found = search(Invented(config, replace(TRUE, pooled=pooled)))
    assert found.settings.pooled == pooled and found.passes == passes_of(config, 8)
    assert {candidate.pooled for candidate in search(Invented()).candidates} == {"eos"}


def test_a_tie_is_called_one_and_not_remembered() -> None:
    found = search(Invented(costs=(0.0, 0.03, 0.02, 0.02), noise=0.004))
    assert found.certainty("image_features") < 0.95 < found.certainty("value_norm")
    assert settled(found) == {"value_norm": "match", "alpha": 2.0}
    said = report(found, SD15, "x.safetensors", None)
    assert "Nearly as good: " in said and ("more photos would settle it" in said or "either will do" in said)


def test_alpha_is_nothing_without_its_norm() -> None:
    found = search(Invented(costs=(0.03, 0.0, 0.03, 0.0)))
    assert "value_norm" not in settled(found) and "alpha" not in settled(found)


def test_an_encoder_that_does_nothing() -> None:
    found = search(Invented(gain=0.0))
    assert not works(found) and settled(found) == {}
    assert "DOES NOTHING" in report(found, SD15, "x", None) and "does nothing" in headline(found)


def test_an_encoder_that_does_not_see_the_photo() -> None:
    class Blind(Invented):
        def losses(self, settings: Settings | None, shown: Sequence[int], level: float) -> Iterator[float]:
            return super().losses(settings, range(self.photos), level)

    found = search(Blind())
    assert works(found) and not is_about_the_subject(found) and settled(found) == {}
    assert "IS NOT THE PHOTO" in report(found, SD15, "x", None) and "does not see" in headline(found)


def test_too_few_photos_are_called_that() -> None:
    found = search(Invented(photos=3, noise=0.05, gain=0.06, costs=(0.1, 0.1, 0.1, 0.1), seed=3))
    assert not works(found) and settled(found) == {}
    said = report(found, SD15, "x", None)
    assert "NOT SURE YET" in said and "more photos would settle it" in said and "not sure yet" in headline(found)


def test_few_photos_and_broken_numbers_are_refused() -> None:
    with pytest.raises(NestedAttentionError, match=r"2 photo\(s\) can't settle anything: give at least 3"):
        search(Invented(photos=2))
    broken = Invented(noise=float("inf"))
    with pytest.raises(NestedAttentionError, match="not a number"):
        search(broken)


def test_noise_is_a_photos_own() -> None:
    assert torch.equal(noise_of((1, 4, 8, 8), 3, 0.4), noise_of((1, 4, 8, 8), 3, 0.4))
    assert not torch.equal(noise_of((1, 4, 8, 8), 3, 0.4), noise_of((1, 4, 8, 8), 4, 0.4))
    assert not torch.equal(noise_of((1, 4, 8, 8), 3, 0.4), noise_of((1, 4, 8, 8), 3, 0.6))


# --- what is remembered ---


@pytest.fixture
def foreign_file(tmp_path: Path) -> Path:
    """An encoder of SD 1.5's layers that does not say what it is."""
    config = replace(SD15, tokens=4, feature_dim=16, resampler=replace(SD15.resampler, dim=16, depth=1, heads=1))
    path = tmp_path / "theirs.pt"
    state = NestedEncoder(config).state_dict()
    torch.save({name.replace("resampler.", "image_proj."): tensor for name, tensor in state.items()}, path)
    return path


def test_what_is_sure_is_used_until_the_loader_is_told_otherwise(
    foreign_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = foreign_file.read_bytes()
    config, _ = read_encoder(foreign_file)
    assert (config.value_norm, config.image_features) == ("match", "penultimate")
    found = search(Invented(config, Settings("last", "unit", 8.0, "eos")))
    said = keep(foreign_file, config, found, "a model")
    assert said.startswith("Remembered in ") and foreign_file.read_bytes() == before
    with caplog.at_level(logging.INFO):
        after, _ = read_encoder(foreign_file)
    assert (after.value_norm, after.alpha, after.image_features) == ("unit", 8.0, "last")
    assert "theirs.pt: " in caplog.text and "as Check Encoder found (theirs.pt.check.json)" in caplog.text
    assert read_encoder(foreign_file, value_norm="none")[0].value_norm == "none"
    assert load_encoder(foreign_file, alpha=3.0).config.alpha == 3.0


def test_a_file_that_says_it_itself_is_believed(tmp_path: Path, foreign_file: Path) -> None:
    encoder = load_encoder(foreign_file)
    own = tmp_path / "own.safetensors"
    write_encoder(own, encoder)
    config, _ = read_encoder(own)
    found = search(Invented(config, Settings("last", "unit", 8.0, "eos")))
    assert keep(own, config, found, "a model") == "Nothing was remembered: the file says its settings itself."
    remember(own, config.fingerprint, {"value_norm": "unit"}, "by hand")
    assert read_encoder(own)[0].value_norm == "match"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other", "version": 1}', '{"format": 3}'])
def test_something_else_beside_the_file(foreign_file: Path, content: str) -> None:
    path_beside(foreign_file).write_text(content)
    with pytest.raises(NestedAttentionError, match="is not what Check Encoder writes"):
        read_encoder(foreign_file)


def test_findings_about_another_file(foreign_file: Path) -> None:
    config, _ = read_encoder(foreign_file)
    remember(foreign_file, "another", {"value_norm": "unit"}, "")
    with pytest.raises(NestedAttentionError, match="about another encoder than the one beside it"):
        read_encoder(foreign_file)
    remember(foreign_file, config.fingerprint, {"value_norm": "loud"}, "")
    with pytest.raises(NestedAttentionError, match='Unknown value_norm "loud"'):
        read_encoder(foreign_file)


# --- on diffusers, in the small world ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's shipped models as diffusers and transformers have them."""
    unet, text, codec = export.load_checkpoint(WEIGHTS / CHECKPOINT)
    folder = tmp_path_factory.mktemp("small") / "pipeline"
    export.write_pipeline(folder, unet, text, codec, export.load_vision(WEIGHTS / VISION))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, picture in enumerate(PHOTOS):
        Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_the_command_names_the_shipped_encoders_settings(
    pipeline: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(WEIGHTS / ENCODER), "--base", str(pipeline), "--vision", str(pipeline / "image_encoder"), "--family",
        str(Path(models.__file__).parent / "family.json"), "--photos", str(photos), "--class-word", "robot",
        "--caption", "a <subject>", "--size", "128", "--out", str(tmp_path), "--remember",
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "forward passes of the U-Net at 128 x 128 are ahead" in said
    assert "Most likely trained with: penultimate features, norm match, alpha " in said
    assert "Nothing was remembered: the file says its settings itself." in said
    assert not path_beside(WEIGHTS / ENCODER).exists()
    assert (tmp_path / "report.txt").read_text("utf-8").strip() in said
    assert Image.open(tmp_path / "chart.png").width == 1200
    assert main([*arguments[:-1], "--caption", "a robot"]) == 1
    assert "<subject>" in capsys.readouterr().err


def told(bench: DiffusersBench) -> tuple[Found, str]:
    found = search(bench)
    return found, report(found, bench.config, "x", bench.kinship())


def test_an_encoder_of_its_base_model_works() -> None:
    found, said = told(checking.bench(checking.silent()[0], PHOTOS))
    assert found.settings in [Settings("penultimate", "match", alpha, "eos") for alpha in (4.0, 8.0)]  # it has 5.7
    # It learned from other pictures than it is shown here: it knows them, and lowers their error by next to nothing.
    assert is_about_the_subject(found) and said.splitlines()[2].startswith("This encoder ")
    assert "on this model" in said.splitlines()[2]
    picture = chart(found, "x", headline(found))
    assert picture.shape[1:] == (1200, 3) and 0 <= picture.min() < picture.max() <= 1


def test_an_encoder_of_another_base_model_is_called_that() -> None:
    plain, turned = (checking.bench(checking.silent()[0], FEW, turned=t) for t in (False, True))
    same = [list(bench.losses(None, range(len(FEW)), 0.4)) for bench in (plain, turned)]
    torch.testing.assert_close(torch.tensor(same[0]), torch.tensor(same[1]), rtol=1e-3, atol=1e-5)
    found, said = told(turned)
    assert not works(found) and settled(found) == {}
    assert "it was made for another base model" in said


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_loss_is_of_the_picture_whatever_the_unet_predicts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its U-Net predicts what is exactly right, so that nothing is left."""
    bench = checking.bench(checking.silent()[0], FEW)
    scheduler = bench.base.scheduler
    monkeypatch.setattr(scheduler, "_internal_dict", FrozenDict({**scheduler.config, "prediction_type": kind}))

    def right(module: torch.nn.Module, given: tuple[torch.Tensor, torch.Tensor], out: Any) -> Any:
        noisy, time = given
        clean, kept = bench.latents, scheduler.alphas_cumprod[time]
        noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
        velocity = scheduler.get_velocity(clean, noise, time)
        out.sample = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
        return out

    hook = bench.base.unet.register_forward_hook(right)
    try:
        assert max(bench.losses(None, range(len(FEW)), 0.4)) < 1e-8
        monkeypatch.setattr(scheduler, "_internal_dict", FrozenDict({**scheduler.config, "prediction_type": "flow"}))
        with pytest.raises(NestedAttentionError, match='predicts "flow"; expected epsilon, v_prediction or sample'):
            list(bench.losses(None, range(len(FEW)), 0.4))
    finally:
        hook.remove()


def test_a_random_encoder_is_called_untrained() -> None:
    found, said = told(checking.bench(checking.random_encoder(), FEW))
    assert not works(found) and "it was hardly trained" in said


def test_a_wrong_vision_tower_is_called_that() -> None:
    found, said = told(checking.bench(checking.silent()[0], FEW, tower_seed=9))
    assert settled(found) == {}
    assert "the wrong vision tower" in said and "another base model" not in said
