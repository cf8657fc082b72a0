"""The training of the small world, stage by stage; `python demo/train.py` is its command."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nested_core.checkpoint import load_encoder, read_encoder, write_encoder
from nested_core.encoder import NestedEncoder
from nested_core.files import whole
from nested_core.training import (
    InitConfig,
    LossConfig,
    OptimiserConfig,
    SampleConfig,
    TrainingConfig,
    train,
)
from nested_core.training.precision import fastest

from . import data, drawing, export, models, world
from .encoders import COMPARED, ENCODER_NAME, ENCODERS, finished
from .encoders import SHIPPED as SHIPPED_ENCODER
from .fit import Draw, Loss, Recipe, fit
from .judging import answers_of, judge, kinds_of, parts_of, portrayed, score, share_right, stray, true_of
from .lessons import (
    PART_WEIGHT,
    Examples,
    at_night,
    caption,
    coarse,
    coarseness,
    cropped,
    described,
    edges,
    references,
    roughen,
    weights,
)
from .listening import SIDES, Listening, asked_of, cells_of, class_words
from .listening import WEIGHT as LISTENING_WEIGHT
from .sampling import sample
from .shipped import CHECKPOINT, CONTROLNET, ENCODER, LORA, PROBE, VISION, WEIGHTS
from .telling import WEIGHT as TELLING_WEIGHT
from .telling import Telling

HERE = Path(__file__).resolve().parent
SHIPPED = ("codec", "vision", "probe", "base")
CAPTIONS = 8  # of each picture


@dataclass(frozen=True)
class Plan:
    """Of a stage. rate: the highest learning rate."""

    steps: int
    batch: int
    rate: float


#: By device. A GPU is as quick with many examples as with few.
PLANS = {
    "cpu": {
        "codec": Plan(4500, 16, 1.5e-3), "half": Plan(1182, 32, 1e-3), "base": Plan(6000, 32, 1e-3),
        "probe": Plan(3000, 32, 2e-3), "vision": Plan(2000, 64, 1e-3), "qformer": Plan(600, 64, 1e-3),
        "encoder": Plan(800, 64, 3e-3), "longer": Plan(2400, 64, 2e-3), "controlnet": Plan(1000, 32, 5e-4),
        "lora": Plan(400, 32, 2e-3),
    },
    "cuda": {
        "codec": Plan(5000, 64, 1e-3), "half": Plan(3000, 256, 1.5e-3), "base": Plan(7500, 256, 1.5e-3),
        "probe": Plan(4000, 64, 2e-3),
        "vision": Plan(4000, 64, 1e-3), "qformer": Plan(1000, 64, 1e-3), "encoder": Plan(800, 64, 3e-3),
        "longer": Plan(2400, 64, 2e-3), "controlnet": Plan(1000, 64, 5e-4), "lora": Plan(400, 64, 2e-3),
    },
}  # fmt: skip


class Run:
    """A training of the whole world in a folder. Each stage is a method that returns its trained, frozen module, or the
    file that it wrote."""

    def __init__(
        self, folder: Path, seed: int, scale: float, shipped: frozenset[str] = frozenset(), warm: bool = False,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        """scale: of steps and pictures. shipped: what is taken from demo/weights. warm: where the base model starts.
        compiled: whether the U-Net runs as torch.compile makes it while it or an encoder is trained.

        Raises SystemExit where the folder belongs to another run: what lies there would not fit.
        """
        self.folder, self.seed, self.scale, self.shipped, self.warm = folder, seed, scale, shipped, warm
        self.compiled = compiled
        # A whole training from nothing is what becomes the shipped files; any other keeps its own to itself.
        self.weights = WEIGHTS if scale == 1 and folder == HERE / "run" else folder / "weights"
        about, said = folder / "run.json", {"seed": seed, "scale": scale, "shipped": sorted(shipped), "warm": warm}
        if about.is_file() and json.loads(about.read_text("utf-8")) != said:
            raise SystemExit(f"{folder} belongs to another run, {about.read_text('utf-8')}: name another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        if not about.is_file():
            about.write_text(json.dumps(said), "utf-8")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def autocast(self) -> torch.autocast:
        """Passes without gradients in the type that the machine is fastest with."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fastest(self.device) != "fp32")

    def log(self, line: str) -> None:
        """Prints a line and keeps it in train.log."""
        with open(self.folder / "train.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(f"\r{line}", flush=True)

    def plan(self, stage: str) -> Plan:
        planned = PLANS[self.device.type][stage]
        return replace(planned, steps=max(2, round(planned.steps * self.scale)))

    def chosen(self, stage: str, rng: random.Random, among: int) -> list[int]:
        """Which pictures a step of a stage sees."""
        return rng.sample(range(among), min(self.plan(stage).batch, among))

    def placed(self, array: np.ndarray) -> Tensor:
        """A file's array where it is computed with."""
        return torch.from_numpy(array).to(self.device)

    def fit(
        self,
        stage: str,
        module: torch.nn.Module,
        loss: Loss,
        draw: Draw,
        seed: int,
        *,
        name: str = "",
        note: Callable[[int], dict[str, float]] | None = None,
        note_every: int = 1000,
        **recipe: Any,
    ) -> torch.nn.Module:
        """Trains the module of a stage, saved under `name` or the stage's own. seed: added to the run's."""
        plan = self.plan(stage)
        made = Recipe(plan.steps, plan.rate, self.seed + seed, **recipe)
        return fit(name or stage, self.folder, module, loss, draw, made, log=self.log, note=note, note_every=note_every)

    def count(self, pictures: int) -> int:
        return max(64, round(pictures * self.scale))

    @functools.cache  # noqa: B019 - a run lives as long as its process
    def pictures(self) -> data.Pictures:
        return data.pictures(self.folder, "pictures", self.count(data.PICTURES), self.seed)

    def unseen(self) -> data.Pictures:
        """Pictures of held-out figures."""
        return data.pictures(self.folder, "unseen", self.count(1000), self.seed + 1, held_out=True)

    def crops(self, shown: data.Pictures, name: str = "crops") -> np.ndarray:
        """Squares around the figures of pictures, uint8 (N, 2, 96, 96, 3)."""

        def cut(at: list[int]) -> Tensor:
            squares = np.zeros((len(at), *shape[1:]), np.uint8)
            for row, i in enumerate(at):
                rng = random.Random(f"{self.seed} {name} {i}")
                for figure in range(len(shown.entries[i].figures)):
                    margin = rng.uniform(0.02, 0.14)
                    squares[row, figure] = cropped(shown.pixels[i], shown.regions[i], figure, margin)
            return torch.from_numpy(squares)

        shape = (len(shown), 2, models.VISION_SIZE, models.VISION_SIZE, 3)
        return self.made_once(f"{name}.u8", np.uint8, shape, cut)

    def of_figures(self, stage: str, shown: data.Pictures, rng: random.Random) -> list[Tensor]:
        """What a step about single figures sees: which pictures, and which figure of each, (B,) each."""
        chosen = self.chosen(stage, rng, len(shown))
        which = [rng.randrange(len(shown.entries[i].figures)) for i in chosen]
        return [torch.tensor(chosen), torch.tensor(which)]

    def pixels(self, pictures: np.ndarray, chosen: list[int]) -> Tensor:
        """Chosen ones of uint8 (N, H, W, 3) as (B, 3, H, W) in [-1, 1]."""
        return models.normalise(torch.from_numpy(pictures[np.array(chosen)])).to(self.device)

    @functools.cached_property
    def shipped_parts(self) -> tuple[Any, Any, Any]:
        """U-Net, text encoder and codec of the shipped checkpoint."""
        unet, text_encoder, codec = export.load_checkpoint(WEIGHTS / CHECKPOINT)
        return unet.to(self.device), text_encoder.to(self.device), codec.to(self.device)

    def codec(self) -> torch.nn.Module:
        if "codec" in self.shipped:
            return self.shipped_parts[2]
        torch.manual_seed(self.seed)
        codec, shown, unseen = models.codec(), self.pictures(), self.unseen()
        crop, size = 64, drawing.SIZE
        models.start_codec(codec, self.pixels(shown.pixels, list(range(min(200, len(shown))))).cpu())

        pictures, side = self.placed(shown.pixels), torch.arange(crop, device=self.device)

        def draw(rng: random.Random) -> list[Tensor]:
            chosen = self.chosen("codec", rng, len(shown))
            corners = [[rng.randrange(0, size - crop + 1, 8) for _ in chosen] for _ in range(2)]
            return [torch.tensor(of) for of in (chosen, *corners)]

        def loss(chosen: Tensor, top: Tensor, left: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            rows, columns = top[:, None, None] + side[:, None], left[:, None, None] + side
            pixels = models.normalise(pictures[chosen[:, None, None], rows, columns])
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            latents = codec.encode(pixels).latent.float()
            # Noise makes the latent space smooth and the decoder lenient towards what a U-Net makes.
            out = codec.decode(latents + 0.03 * torch.randn_like(latents)).sample.float()
            error = out - pixels
            edges = F.l1_loss(out.diff(dim=2), pixels.diff(dim=2)) + F.l1_loss(out.diff(dim=3), pixels.diff(dim=3))
            size_of = latents.square().mean()
            value = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.001 * size_of
            return value, {"mse": error.detach().square().mean(), "latent": size_of.detach()}

        def note(step: int) -> dict[str, float]:
            pixels = self.pixels(unseen.pixels, list(range(min(32, len(unseen)))))
            error = (codec.decode(codec.encode(pixels).latent).sample - pixels).square().mean()
            return {"unseen PSNR": float(10 * torch.log10(4 / error))}

        self.fit("codec", codec, loss, draw, 0, note=note, note_every=200)
        with torch.no_grad():
            latents = codec.encode(self.pixels(shown.pixels, list(range(min(128, len(shown)))))).latent
        codec.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
        return codec

    def latents(self, half: bool = False) -> np.ndarray:
        """Scaled latents of `pictures`, (N, 24, 16, 16) float16, encoded once. half: of pictures of half the size."""
        shown, codec = self.pictures(), self.codec()
        side = models.LATENT_SIZE // (1 + half)

        def encode(at: list[int]) -> Tensor:
            pixels = self.pixels(shown.pixels, at)
            pixels = F.avg_pool2d(pixels, 2) if half else pixels
            return codec.encode(pixels).latent.float() * codec.config.scaling_factor

        name, shape = "latents_half.f16" if half else "latents.f16", (len(shown), models.LATENT_CHANNELS, side, side)
        return self.made_once(name, np.float16, shape, encode)

    def made_once(
        self, name: str, dtype: type, shape: tuple[int, ...], make: Callable[[list[int]], Tensor]
    ) -> np.ndarray:
        """The array of a file; where it is not there yet, `make` makes the rows at given places."""
        path = self.folder / name
        if not path.is_file():
            with whole(path) as part, torch.no_grad(), self.autocast():
                made = np.memmap(part, dtype, "w+", shape=shape)
                for at in _batches(shape[0], 64, f"making {name}"):
                    made[at] = make(at).cpu().numpy()
                del made  # flushes; an open map can't be renamed on Windows
        return np.memmap(path, dtype, "c", shape=shape)

    def probe(self) -> models.Probe:
        """The judge: trained on pictures as drawn and with less detail; no other model sees it.

        It is told where to look for what, or a belly's sign, one fiftieth of a picture, is found late.
        """
        if "probe" in self.shipped:
            return models.load_probe(WEIGHTS / PROBE).to(self.device)
        torch.manual_seed(self.seed + 10)
        probe, shown, unseen = models.Probe(), self.pictures(), self.unseen()
        answers, unseen_answers = answers_of(shown.entries).to(self.device), answers_of(unseen.entries)
        pictures, parts = self.placed(shown.pixels), self.placed(self.parts(models.Probe.SIDE))
        first = self.pixels(shown.pixels, list(range(min(200, len(shown)))))
        mean, basis = coarseness(first)
        kinds = kinds_of(shown.entries).to(self.device)

        def draw(rng: random.Random) -> list[Tensor]:
            return [torch.tensor(self.chosen("probe", rng, len(shown)))]

        def loss(chosen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            pixels = models.normalise(pictures[chosen])
            detail = torch.rand(len(chosen), 1, 1, 1, device=self.device) * 2
            pixels = torch.lerp(coarse(pixels, mean, basis), pixels, detail.clamp(max=1))  # half of them as drawn
            out, looks = probe.seen(roughen(pixels).contiguous(memory_format=torch.channels_last))
            asked = answers[chosen]
            value, right = score(out, asked, list(models.SCORED))
            astray = stray(looks, parts[chosen], kinds[chosen], asked)
            return value + 0.1 * astray, {"right": right, "astray": astray.detach()}

        def note(step: int) -> dict[str, float]:
            parts = [probe(self.pixels(unseen.pixels, at)) for at in _batches(len(unseen), 50)]
            out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            rights = {name: share_right(out[name], unseen_answers[:, i]) for i, name in enumerate(models.SCORED)}
            return {"unseen": sum(rights.values()) / len(rights), "worst": min(rights.values())}

        return self.fit("probe", probe, loss, draw, 10, note=note, note_every=500)

    def vision(self) -> torch.nn.Module:
        """The tower, trained as CLIP's are, on portraits and on phrases that are true of them; it sees everything."""
        if "vision" in self.shipped:
            return export.load_vision(WEIGHTS / VISION).to(self.device)
        torch.manual_seed(self.seed + 30)
        tower, shown, unseen = models.vision_tower(), self.pictures(), self.unseen()
        crops, unseen_crops = self.placed(self.crops(shown)), self.placed(self.crops(unseen, "unseen_crops"))
        truth, unseen_truth = true_of(shown.entries).to(self.device), true_of(unseen.entries)[:, 0].to(self.device)
        matching = models.Matching(tower).to(self.device)
        places = {fact: i for i, fact in enumerate(world.all_facts())}

        def loss(chosen: Tensor, which: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found = matching(roughen(models.normalise(crops[chosen, which])))
            parts = [F.binary_cross_entropy_with_logits(logits.float(), truth[chosen, which]) for logits in found]
            return (parts[0] + parts[1]) * 10, {"by patches": parts[1].detach() * 10}

        def note(step: int) -> dict[str, float]:
            parts = [matching(models.normalise(unseen_crops[at, 0])) for at in _batches(len(unseen), 100)]
            figures = {}
            for way, logits in zip(("embedding", "patches"), map(torch.cat, zip(*parts, strict=True)), strict=True):
                rights = {
                    name: _chosen(logits, unseen_truth, [places[f] for f in facts]) for name, facts in _questions()
                }
                figures |= {f"unseen, by {way}": sum(rights.values()) / len(rights)}
                worst = min(rights, key=lambda name: rights[name])
                figures[f"worst {worst}"] = rights[worst]
            return figures

        draw = functools.partial(self.of_figures, "vision", shown)
        self.fit("vision", matching, loss, draw, 30, note=note, note_every=250, warmup=300)
        return tower

    def base(self) -> Base:
        """U-Net and text encoder, trained together on captions that say some of what belongs to the picture."""
        torch.manual_seed(self.seed + 20)
        base = Base()
        if self.warm or "base" in self.shipped:
            base.unet, base.text_encoder, _ = export.load_checkpoint(WEIGHTS / CHECKPOINT)
            base.requires_grad_(True).to(self.device)
        if self.device.type == "cpu":
            # The fused attention's backward pass is slow there: written out, a training step takes two thirds.
            base.unet.set_attn_processor(AttnProcessor())
            base.text_encoder.set_attn_implementation("eager")
        if "base" in self.shipped:
            return base.eval().requires_grad_(False)
        base.unet.set_attn_processor(Listening())
        if not self.warm:
            self._learn("half", base)
        self._learn("base", base)
        base.unet.set_attn_processor(AttnProcessor())
        return base

    def _learn(self, stage: str, base: Base) -> None:
        """Denoising with captions, listening and telling. half: on pictures of half the size, a quarter of the work."""
        shown, latents, codec = self.pictures(), self.placed(self.latents(stage == "half")), self.codec()
        cells, words = self.placed(self.cells()), class_words(shown.entries).to(self.device)
        parts, kinds = self.placed(self.parts(models.LATENT_SIZE)), kinds_of(shown.entries).to(self.device)
        answers = answers_of(shown.entries).to(self.device)
        telling = Telling(base.unet).to(self.device)
        taught = torch.nn.ModuleDict({"base": base.requires_grad_(True), "telling": telling})
        unet = torch.compile(base.unet) if self.compiled else base.unet

        def loss(*drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            heard: list[Tensor] = []

            def predict(noisy: Tensor, times: Tensor, text: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
                listening = {"asked": asked_of(cells[chosen], words[chosen], tokens), "heard": heard}
                return unet(noisy, times, text, cross_attention_kwargs=listening).sample

            value, figures = self.denoising_loss(drawn, latents, base, predict)
            unheard, untold = torch.stack(heard).mean(), telling(*(of[drawn[0]] for of in (parts, kinds, answers)))
            figures |= {"unheard": unheard.detach(), "untold": untold.detach()}
            return value + LISTENING_WEIGHT * unheard + TELLING_WEIGHT * untold, figures

        def note(step: int) -> dict[str, float]:
            rng = random.Random(0)
            texts = [data.plain_prompt(data.random_entry(rng, i % 3 // 2 + 1)) for i in range(32)]
            pictures = self.sample(base, codec, texts, 0, latents.shape[-1])
            _save_sheet(pictures, self.folder / "samples" / f"{stage}_{step:06}.png")
            return {}

        draw = functools.partial(self.denoising, stage, len(latents))
        self.fit(stage, taught, loss, draw, 20, ema=0.9995, warmup=300, note=note)
        telling.leave()

    def obedience(self) -> None:
        """Logs how often the base model's pictures show what their prompts say, for looks held out and not."""
        base, codec, probe = self.base(), self.codec(), self.probe()
        for title, held_out in (("seen", False), ("held out", True)):
            rng = random.Random(f"obedience {title}")
            entries = [data.random_entry(rng, 1, held_out) for _ in range(self.count(96))]
            parts = [
                self.sample(base, codec, [data.plain_prompt(entries[i]) for i in at], seed=at[0])
                for at in _batches(len(entries), 32)
            ]
            told = judge(probe, torch.cat(parts), entries)
            said = {name: share for name, share in told.items() if not name.startswith("identity")}
            self.log(f"obedience, combinations {title}: {', '.join(f'{k} {v:.2f}' for k, v in said.items())}")

    def captions(self) -> np.ndarray:
        """Tokens of some captions of each of `pictures`, int16 (N, captions, 77)."""
        shown, tokenizer = self.pictures(), models.tokenizer()

        def write(at: list[int]) -> Tensor:
            rngs = [random.Random(f"{self.seed} captions {i}") for i in at]
            texts = [caption(shown.entries[i], rng) for i, rng in zip(at, rngs, strict=True) for _ in range(CAPTIONS)]
            tokens = tokenizer(texts, padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt")
            return tokens.input_ids.view(len(at), CAPTIONS, -1)

        return self.made_once("captions.i16", np.int16, (len(shown), CAPTIONS, models.TEXT_LENGTH), write)

    def cells(self) -> np.ndarray:
        """`cells_of` each of `pictures`, int8 (N, 2, cells)."""
        shape = (self.count(data.PICTURES), 2, sum(side * side for side in SIDES))
        return self.made_once("cells.i8", np.int8, shape, lambda at: cells_of(self.regions(at)))

    def weighing(self) -> np.ndarray:
        """What the places of `latents` weigh in a loss, float16 (N, 1, 16, 16)."""
        shape = (self.count(data.PICTURES), 1, models.LATENT_SIZE, models.LATENT_SIZE)
        return self.made_once(
            "weights.f16", np.float16, shape, lambda at: F.avg_pool2d(weights(self.regions(at))[:, None], 8)
        )

    def parts(self, side: int) -> np.ndarray:
        """`parts_of` each of `pictures` on a grid, uint8 (N, 2, parts, side * side)."""
        shape = (self.count(data.PICTURES), 2, drawing.NEXT_FIGURE, side * side)
        return self.made_once(f"parts_{side}.u8", np.uint8, shape, lambda at: parts_of(self.regions(at), side))

    def regions(self, chosen: list[int]) -> Tensor:
        """Maps of parts of chosen ones of `pictures`, (B, H, W)."""
        return torch.from_numpy(self.pictures().regions[chosen]).to(self.device)

    @functools.cached_property
    def _lessons(self) -> tuple[Tensor, Tensor]:
        """`captions` and `weighing` where they are computed with."""
        return self.placed(self.captions()), self.placed(self.weighing())

    def denoising(self, stage: str, among: int, rng: random.Random) -> list[Tensor]:
        """What a step of denoising sees: which pictures, which captions of theirs, and timesteps, (B,) each."""
        which = self.chosen(stage, rng, among)
        # Most around the noise at which shapes are decided: below timestep 500 a figure that is there stays sharp.
        times = [
            rng.randrange(1000) if rng.random() < 0.3 else min(max(int(rng.gauss(720, 150)), 0), 999) for _ in which
        ]
        return [torch.tensor(of) for of in (which, [rng.randrange(CAPTIONS) for _ in which], times)]

    @functools.cached_property
    def _scheduler(self) -> Any:
        return models.scheduler()

    @functools.cached_property
    def _pressing(self) -> Tensor:
        """What a timestep's error weighs: what it would in a prediction of v, but no more than five times the least."""
        return (1 / (1 - self._scheduler.alphas_cumprod)).clamp(max=5).to(self.device)

    def denoising_loss(
        self, drawn: Sequence[Tensor], latents: Tensor, base: Base,
        predict: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss of pictures that `latents` has, with captions of theirs. drawn: `denoising`.

        predict  (noisy latents, times, text (B, 77, 128), which pictures (B,), captions' tokens (B, 77)) -> latents
        """
        chosen, said, times = drawn
        captions, weighing = self._lessons
        tokens, clean = captions[chosen, said].long(), latents[chosen].float()
        noise = torch.randn_like(clean)
        noisy = self._scheduler.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        text = base.text_encoder(tokens).last_hidden_state
        predicted = predict(noisy, times, text, chosen, tokens).float()
        error = (predicted - clean).square() * self._pressing[times][:, None, None, None]
        weight = F.adaptive_avg_pool2d(weighing[chosen].float(), clean.shape[-1])
        return (error * weight).mean() / weight.mean(), {"plain": error.detach().mean()}

    def controlnet(self) -> Path:
        """A ControlNet for edges, as the host's Canny node draws them; its file."""
        path = self.folder / CONTROLNET
        if path.is_file():
            return path
        torch.manual_seed(self.seed + 50)
        base, shown, latents = self.base(), self.pictures(), self.placed(self.latents())
        controlnet: Any = ControlNetModel.from_unet(base.unet)
        if self.device.type == "cpu":
            controlnet.set_attn_processor(AttnProcessor())
        count = min(self.count(3000), len(shown))
        drawn = self.placed(self.made_once(
            "edges.u8", np.uint8, (count, drawing.SIZE, drawing.SIZE),
            lambda at: edges(self.pixels(shown.pixels, at).float() / 2 + 0.5),
        ))  # fmt: skip

        def predict(noisy: Tensor, times: Tensor, text: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
            hints = drawn[chosen].float()[:, None].expand(-1, 3, -1, -1)
            down, mid = controlnet(noisy, times, text, hints, return_dict=False)
            return base.unet(
                noisy, times, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample

        self.fit(
            "controlnet", controlnet, lambda *drawn: self.denoising_loss(drawn, latents, base, predict),
            functools.partial(self.denoising, "controlnet", count), 50, ema=0.995, note_every=250,
        )  # fmt: skip
        export.write_controlnet(path, controlnet)
        return path

    def lora(self) -> Path:
        """A LoRA for a look that the world's styles do not have: night, with a light on the middle; its file."""
        path = self.folder / LORA
        if path.is_file():
            return path
        torch.manual_seed(self.seed + 60)
        base, shown, codec = self.base(), self.pictures(), self.codec()
        count = min(self.count(4000), len(shown))
        shape = (count, models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
        latents = self.placed(self.made_once(
            "night_latents.f16", np.float16, shape,
            lambda at: codec.encode(at_night(self.pixels(shown.pixels, at))).latent.float()
            * codec.config.scaling_factor,
        ))  # fmt: skip
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
        base.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
        trained = torch.nn.ParameterList([p for p in base.unet.parameters() if p.requires_grad])
        self.fit(
            "lora", trained,
            lambda *drawn: self.denoising_loss(
                drawn, latents, base, lambda noisy, times, text, *_: base.unet(noisy, times, text).sample
            ),
            functools.partial(self.denoising, "lora", count), 60, ema=0.99, warmup=20, note_every=100,
        )  # fmt: skip
        export.write_lora(path, base.unet)
        return path

    def qformer(self, tokens: int = 16, features: Literal["penultimate", "last"] = "penultimate") -> Path:
        """A nested encoder whose Q-Former learned to tell attributes; its K̈ / V̈ layers know nothing yet."""
        name = "qformer" + (f"_{tokens}_tokens" if tokens != 16 else "") + ("_last" if features == "last" else "")
        path = self.folder / f"{name}.safetensors"
        torch.manual_seed(self.seed + 40)
        tower, shown, unseen = self.vision(), self.pictures(), self.unseen()
        crops, unseen_crops = self.placed(self.crops(shown)), self.placed(self.crops(unseen, "unseen_crops"))
        truth, unseen_truth = portrayed(shown.entries).to(self.device), portrayed(unseen.entries)[:, 0]
        config = replace(models.encoder_config(), tokens=tokens, image_features=features)
        layer = -1 if features == "last" else -2
        encoder = NestedEncoder(config)
        judged = torch.nn.ModuleDict({"encoder": encoder, "reader": models.TokenReader(config.tokens)})

        def read(squares: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                seen = tower(models.normalise(squares), output_hidden_states=True).hidden_states[layer]
            return judged["reader"](encoder.encode(seen))

        def loss(chosen: Tensor, which: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, right = score(read(crops[chosen, which]), truth[chosen, which], [*models.PORTRAIT])
            return value, {"right": right}

        def note(step: int) -> dict[str, float]:
            parts = [read(unseen_crops[at, 0]) for at in _batches(len(unseen), 100)]
            rights = [
                share_right(torch.cat([told[name] for told in parts]), unseen_truth[:, i])
                for i, name in enumerate(models.PORTRAIT)
            ]
            return {"unseen": sum(rights) / len(rights), "worst": min(rights)}

        if not path.is_file():
            draw = functools.partial(self.of_figures, "qformer", shown)
            self.fit("qformer", judged, loss, draw, 40, name=name, note=note, note_every=250)
            write_encoder(path, encoder)
        return path

    def encoder(self, name: str) -> Path:
        """Trains an encoder with the pack's own training code; returns its file.

        name: a method of ENCODERS, with "_pairs" where references are other pictures of a figure and not crops of the
        target, "_<N>_tokens", "_<value_norm>_norm", "_alpha<A>", "_last", "_<N>_steps" and
        "_seed<S>", in this order, for others than 16 tokens, the method's own value_norm, an α that is learned, the
        last but one of the vision tower's layers, 1,500 steps and seed 0.
        """
        match = ENCODER_NAME.fullmatch(name)
        assert match
        settings = models.encoder_settings(**ENCODERS[match["method"]])
        if match["tokens"]:
            settings = replace(settings, tokens=int(match["tokens"]))
        if match["norm"]:  # without a norm to match, α would be a second scale of V̈
            settings = replace(settings, value_norm=match["norm"], learn_alpha=match["norm"] != "none")
        if match["alpha"]:
            settings = replace(settings, alpha=float(match["alpha"]), learn_alpha=False)
        if match["features"]:
            settings = replace(settings, image_features="last")
        base, tower, codec = self.base(), self.vision(), self.codec()
        planned, init = PLANS[self.device.type]["encoder"], None
        if match["longer"]:
            planned = PLANS[self.device.type]["longer"]
            shorter = self.folder / name.removesuffix("_longer")
            begun = shorter / "encoder.safetensors" if finished(shorter) else self.encoder(shorter.name)
            init = InitConfig(encoder=str(begun), layers="file")
        config = TrainingConfig(
            output=str(self.folder / name),
            compile=self.compiled,
            steps=max(2, round(int((not match["longer"] and match["steps"]) or planned.steps) * self.scale)),
            batch_size=planned.batch,
            seed=self.seed + int(match["seed"] or 0),
            workers=0,
            save_every=250,
            keep=1,
            tracker="none",
            encoder=settings,
            init=init
            or InitConfig(encoder=str(self.qformer(settings.tokens, settings.image_features)), layers="unet"),
            optimiser=OptimiserConfig(
                qformer_rate=planned.rate / 6, layers_rate=planned.rate, warmup=100, schedule="cosine", ema=0.995
            ),
            loss=LossConfig(mask_weight=PART_WEIGHT, drop_text=0.05),
            samples=SampleConfig(every=500, count=6, seeds=3, guidance=4.0),
        )  # fmt: skip
        shown, pairs = self.pictures(), bool(match["pairs"])
        path = self.folder / "references.u8"
        examples = Examples(shown, self.latents(), references(path, shown, self.seed) if pairs else self.crops(shown))
        parts = models.base_model(base.unet, base.text_encoder, codec, tower)
        # Which base it is for: the evaluation refuses to run it on another.
        about, fits = self.folder / name / "base.txt", export.fingerprint(base.unet)
        if about.is_file() and about.read_text("utf-8") != fits:
            raise SystemExit(
                f"{about.parent} has an encoder for another base model: move it away, or name another --out."
            )
        about.parent.mkdir(parents=True, exist_ok=True)
        about.write_text(fits, "utf-8")
        path = train(config, parts, examples)
        metrics = (self.folder / name / "metrics.jsonl").read_text("utf-8").splitlines()
        said = json.loads(metrics[-1])
        alpha = f", alpha {read_encoder(path)[0].alpha:.3g}" if config.encoder.learn_alpha else ""
        self.log(f"{name}: {config.steps} steps, loss {said['loss']:.4f}{alpha}")
        return path

    def compared(self) -> None:
        """The encoders of COMPARED."""
        for name in COMPARED:
            self.encoder(name)

    def pipeline(self) -> None:
        """The base model as a diffusers folder and figures as a data folder: what the training's command line takes."""
        base, folder = self.base(), self.folder / "pipeline"
        export.write_pipeline(folder, base.unet, base.text_encoder, self.codec(), self.vision())
        for i in range(self.count(2000)):
            rng = random.Random(f"{self.seed} figures {i}")
            figure = world.random_figure(rng)
            of_it = self.folder / "figures" / "_".join([figure.kind, *figure.identity])
            of_it.mkdir(parents=True, exist_ok=True)
            (of_it / "class.txt").write_text(figure.kind, "utf-8")
            for view in range(3):
                style = rng.choice(world.STYLES)
                entry = data.Entry([figure], [world.random_look(rng, style)], rng.choice(world.SCENES), style)
                data.draw(entry, rng).image.save(of_it / f"{view}.png")
                (of_it / f"{view}.txt").write_text(described(entry, ["<subject>"], rng), "utf-8")
        self.log(f"pipeline: {folder} and {folder.with_name('figures')}")

    def export(self) -> None:
        """Writes what is trained as the files that ComfyUI opens, with the log of their training."""
        folder, base = self.weights, self.base()
        export.write_checkpoint(folder / CHECKPOINT, base.unet.float(), base.text_encoder, self.codec())
        export.write_vision(folder / VISION, self.vision())
        probe = {name: weight.half().contiguous() for name, weight in self.probe().state_dict().items()}
        export.write_file(folder / PROBE, probe, "Small World: the probe that scores pictures")
        encoder = load_encoder(self.encoder(SHIPPED_ENCODER))
        write_encoder(folder / ENCODER, encoder.half())
        for path in (self.controlnet(), self.lora()):
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(self.folder / "train.log", folder / "train.log")
        self.log(f"export: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")

    @torch.no_grad()
    def sample(
        self, base: Base, codec: torch.nn.Module, texts: list[str], seed: int, side: int = models.LATENT_SIZE
    ) -> Tensor:
        """uint8 pictures (B, 3, 8 * side, 8 * side) for prompts."""
        shape = (len(texts), models.LATENT_CHANNELS, side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        with self.autocast():
            return sample(base.unet, codec, base.read([*texts, *([""] * len(texts))]), noise)


class Base(torch.nn.Module):
    """U-Net and text encoder of the small world."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = models.unet(), models.text_encoder()
        self.tokenizer = models.tokenizer()

    def read(self, texts: list[str]) -> Tensor:
        """Prompts -> (B, 77, 128)."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=models.TEXT_LENGTH, return_tensors="pt"
        )
        device = next(self.parameters()).device
        return self.text_encoder(tokens.input_ids.to(device)).last_hidden_state


def _batches(count: int, size: int, title: str = "") -> Iterator[list[int]]:
    starts = range(0, count, size)
    for start in tqdm(starts, desc=title, mininterval=5) if title else starts:
        yield list(range(start, min(start + size, count)))


def _save_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = torchvision.utils.make_grid(pictures.cpu(), columns, padding=0)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def _questions() -> list[tuple[str, list[str]]]:
    """What a tower can be asked: axis by axis, the facts of which one is true."""
    figure, look = world.random_figure(random.Random(0)), world.random_look(random.Random(0), "flat")
    questions = []
    for name, options in (("kind", world.KINDS), *world.ATTRIBUTES.items(), *world.LOOKS.items()):
        place = [*vars(figure), *vars(look)].index(name)
        shown = [
            (replace(figure, **{name: v}), look) if name in vars(figure) else (figure, replace(look, **{name: v}))
            for v in options
        ]
        questions.append((name, [world.facts(*both)[place] for both in shown]))
    questions.append(("scene", [world.place(scene) for scene in world.SCENES]))
    return [*questions, ("style", [f"{style} drawing" for style in world.STYLES])]


def _chosen(logits: Tensor, truth: Tensor, places: list[int]) -> float:
    """How often the likeliest of some facts is the true one; logits, truth (N, facts)."""
    return float((logits[:, places].argmax(-1) == truth[:, places].argmax(-1)).float().mean())


STAGES = (
    "codec", "base", "probe", "obedience", "vision", "qformer", SHIPPED_ENCODER, "controlnet", "lora", "export",
)  # fmt: skip
