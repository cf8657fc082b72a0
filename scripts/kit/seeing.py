"""What scripts/see.py measures and draws, in the ComfyUI of this process."""

from __future__ import annotations

import asyncio
import random
import statistics
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from demo import data, drawing, world
from demo.drawing import SIZE
from nested_core.figures import to_image, to_tensor

from . import small_world, studio
from .environment import say
from .paths import REPO

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
APART: dict[str, dict[str, float]] = {
    "as it is": {},
    "separation 1 in both Apply Subject (Advanced)": {"separation": 1.0},
    "Separate Subjects 1": {"apart": 1.0},
}
DENOISE, STEPS = 0.5, 16  # the sampler does half of the steps
POINTS = 6  # looked into per part and picture


class Seeing:
    """The shipped small world in a ComfyUI of this process."""

    @torch.inference_mode()
    def __init__(self) -> None:
        self.pack = studio.load_pack()
        assert asyncio.run(studio.host_nodes.load_custom_node(str(REPO / "demo" / "comfyui"))), "see the log above"
        names = small_world.provide_models(Path(folder_paths.models_dir))
        self.model, self.clip, self.vae = self.run("CheckpointLoaderSimple", ckpt_name=names["ckpt_name"])
        (self.tower,) = self.run("CLIPVisionLoader", clip_name=names["clip_name"])
        (self.encoder,) = self.run("NestedEncoderLoader", encoder_name=names["encoder_name"])

    def run(self, node_id: str, **inputs: Any) -> Any:
        """The outputs of a node, what is not given at its default."""
        return studio.run_node(self.pack.host_nodes[node_id], **inputs)

    def subject(self, figure: world.Figure, picture: Any) -> Any:
        return self.run(
            "NestedEncodeSubject", encoder=self.encoder, clip_vision=self.tower, image=_tensor(picture),
            placeholder=f"<{figure.kind}>", class_word=figure.kind,
        )[0]  # fmt: skip

    def sample(
        self, entry: data.Entry, portraits: list[Any], start: Any, seed: int,
        separation: float = 0.0, apart: float = 0.0,
    ) -> tuple[Any, Any]:  # fmt: skip
        """(pictures, recording). start: a picture to begin with, half noised; None begins with noise alone.

        separation: of Apply Subject (Advanced). apart: the strength of Separate Subjects.
        """
        model, clip = self.model, self.clip
        for figure, portrait in zip(entry.figures, portraits, strict=True):
            subject = self.subject(figure, portrait)
            model, clip = self.run(
                "NestedApplySubjectAdvanced", model=model, clip=clip, subject=subject, separation=separation
            )
        if apart:
            (model,) = self.run("NestedSeparateSubjects", model=model, strength=apart)
        model, recording = self.run("NestedRecordAttention", model=model)
        words = [world.phrase(f"<{f.kind}>", look) for f, look in zip(entry.figures, entry.looks, strict=True)]
        text = world.prompt(words, entry.scene, entry.style)
        positive, negative = (self.run("CLIPTextEncode", clip=clip, text=t)[0] for t in (text, ""))
        if start is None:
            latent = self.run("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)[0]
        else:
            latent = self.run("VAEEncode", vae=self.vae, pixels=_tensor(start))[0]
        out = self.run(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=seed,
            steps=STEPS if start is None else round(STEPS * DENOISE), cfg=4.0, sampler_name="euler",
            scheduler="normal", denoise=1.0 if start is None else DENOISE,
        )[0]  # fmt: skip
        return self.run("VAEDecode", vae=self.vae, samples=out)[0], recording

    @torch.inference_mode()
    def report(self, cases: int) -> None:
        """Measures and draws; writes docs/seeing.md."""
        overlaps = {count: self.overlaps(count, cases) for count in (1, 2)}
        parts = self.parts(cases)
        leaks = {name: self.leaks(cases, **knobs) for name, knobs in APART.items()}
        self.draw()
        lines = _page(overlaps, parts, leaks, cases)
        (REPO / "docs" / "seeing.md").write_text("\n".join(lines) + "\n", "utf-8")
        print("\n".join(lines))
        say("written: docs/seeing.md and its figures")

    # -- measured ------------------------------------------------------------------------------------------------------

    def overlaps(self, count: int, cases: int) -> dict[float, list[float]]:
        """Intersection over union of each subject's mask and its figure, by threshold."""
        found: dict[float, list[float]] = {t: [] for t in THRESHOLDS}
        for case in tqdm(range(cases), desc=f"masks, {count} figures", mininterval=2):
            entry, portraits, drawn, seed = _case(case, count)
            pictures, recording = self.sample(entry, portraits, drawn.image, seed)
            owner = _owners(drawn)
            for threshold in THRESHOLDS:
                for number, figure in enumerate(entry.figures):
                    mask = self.run(
                        "NestedAttentionMaps", recording=recording, after=pictures, placeholder=f"<{figure.kind}>",
                        threshold=threshold,
                    )[1][0].numpy() > 0.5  # fmt: skip
                    truth = owner == number + 1
                    found[threshold].append(float((mask & truth).sum() / max(1, (mask | truth).sum())))
        return found

    def leaks(self, cases: int, **knobs: float) -> list[float]:
        """Of the attention on a word that lies on either of two figures, the share that lies on the other one."""
        found = []
        for case in tqdm(range(cases), desc=f"leaks {knobs}", mininterval=2):
            entry, portraits, drawn, seed = _case(case, 2)
            _, recording = self.sample(entry, portraits, drawn.image, seed, **knobs)
            run = recording.last()
            heats = self.pack.recording.heats_of(run, 0.0, 1.0, [1.0] * len(run.layers))[:, 0]
            size = heats.shape[-1]
            owner = _owners(drawn)
            owner = owner[SIZE // size // 2 :: SIZE // size, SIZE // size // 2 :: SIZE // size]
            for number, figure in enumerate(entry.figures):
                heat = heats[run.subject(f"<{figure.kind}>")].numpy()
                own, other = heat[owner == number + 1].sum(), heat[owner == 2 - number].sum()
                found.append(float(other / (own + other)))
        return found

    def parts(self, cases: int) -> dict[str, dict[str, list[float]]]:
        """For points on each part of a figure: where in the reference picture Explain Point says it comes from.

        By part: "hit", whether the strongest place is that part; "mass", how much of the heat is on it; "area", how
        much of the reference it covers, which is what chance would give; and the same for the strongest token alone.
        """
        found: dict[str, dict[str, list[float]]] = {part: {} for part in drawing.PARTS}
        for case in tqdm(range(cases), desc="points", mininterval=2):
            entry, portraits, drawn, seed = _case(case, 1)
            regions = small_world.portrait(entry.figures[0], case).regions
            pictures, recording = self.sample(entry, portraits, drawn.image, seed)
            rng = random.Random(case)
            for part, number in drawing.PARTS.items():
                rows, columns = (drawn.regions == number).nonzero()
                there = regions == number
                if not len(rows) or not there.any():
                    continue
                for _ in range(POINTS):
                    i = rng.randrange(len(rows))
                    at = ((columns[i] + 0.5) / SIZE, (rows[i] + 0.5) / SIZE)
                    point = self.pack.recording.look_into(recording.last(), "", at, 0, pictures[0])
                    for name, source in zip(("token", "all"), point.sources, strict=True):
                        _judge(found[part], name, source[0], there)
        return found

    # -- drawn ---------------------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """docs/images/attention_maps.png and explain_point.png: a picture of two figures, made from noise."""
        entry, portraits, _, seed = _case(20, 2)
        pictures, recording = self.sample(entry, portraits, None, seed)
        images, masks = self.run("NestedAttentionMaps", recording=recording, after=pictures)
        folder = REPO / "docs" / "images"
        shown = to_image(images[0])
        plain = to_image(pictures[0]).resize((shown.width, shown.width), Image.Resampling.BICUBIC)
        sheet = Image.new("RGB", (2 * shown.width + 12, shown.height), (22, 24, 29))
        sheet.paste(plain, (0, 0))
        sheet.paste(shown, (shown.width + 12, 0))
        sheet.save(folder / "attention_maps.png", optimize=True)
        rows, columns = masks[0].nonzero(as_tuple=True)
        x, y = (float(v.float().mean() + 0.5) / len(masks[0]) for v in (columns, rows))
        explained = self.run(
            "NestedExplain", recording=recording, after=pictures, placeholder=f"<{entry.figures[0].kind}>", x=x, y=y
        )[0]
        to_image(explained[0]).save(folder / "explain_point.png", optimize=True)


def _tensor(picture: Any) -> torch.Tensor:
    """An image -> (1, H, W, 3)."""
    return to_tensor(picture)[None]


def _owners(drawn: drawing.Picture) -> np.ndarray:
    """Whose each pixel is, (H, W): 0 nobody's, 1 the first figure's, 2 the second's."""
    return (drawn.regions > 0) * (1 + (drawn.regions > drawing.NEXT_FIGURE))


def _case(number: int, count: int) -> tuple[data.Entry, list[Any], drawing.Picture, int]:
    """(what is shown, the figures' portraits, a picture of it, seed) of a case; the same each time."""
    rng = random.Random(f"seeing {number} {count}")
    entry = data.random_entry(rng, count)
    return entry, [small_world.portrait(f, number).image for f in entry.figures], data.draw(entry, rng), number


def _judge(found: dict[str, list[float]], name: str, source: torch.Tensor, there: np.ndarray) -> None:
    """Adds whether a source map (g, g) is on a part, whose places in the reference are `there` (H, W)."""
    truth = torch.from_numpy(there).float()[None, None]
    share = F.interpolate(truth, size=source.shape, mode="area")[0, 0]  # of each patch
    found.setdefault(f"{name} mass", []).append(float((source * share).sum()))
    found.setdefault(f"{name} hit", []).append(float(share.flatten()[source.argmax()] > 0))
    found.setdefault("area", []).append(float(share.mean()))
    found.setdefault("patches", []).append(float((share > 0).float().mean()))


def _page(
    overlaps: dict[int, dict[float, list[float]]],
    parts: dict[str, dict[str, list[float]]],
    leaks: dict[str, list[float]],
    cases: int,
) -> list[str]:
    mean = statistics.fmean
    lines = [
        "# Seeing what the subject does",
        "",
        "Made by `python scripts/see.py` in the small world, through the nodes and the stock sampler. The figures are",
        f"none that a training saw; {cases} pictures with one and {cases} with two.",
        "",
        "![A picture, and where its two subjects are](images/attention_maps.png)",
        "",
        "![One point of it, explained](images/explain_point.png)",
        "",
        "## Attention Maps: how well the masks fit",
        "",
        "Pictures of the figures, half noised and sampled on from there, so that the true regions are known.",
        "Intersection over union of the mask and the figure, the mean over figures:",
        "",
        "| threshold | one figure | two figures |",
        "|---|---|---|",
    ]
    for threshold in THRESHOLDS:
        lines.append(f"| {threshold:g} | {mean(overlaps[1][threshold]):.2f} | {mean(overlaps[2][threshold]):.2f} |")
    lines += [
        "",
        "## Explain Point: where in the reference it comes from",
        "",
        f"{POINTS} points on each part of the figure in each picture. *mass*: how much of the heat over the reference",
        "is on the same part there; *of chance*: that, over the share of the reference that the part covers. *hit*:",
        "whether the strongest patch touches the part, and in brackets how many patches do, which is chance.",
        "",
        "| part | mass, all tokens | of chance | hit, all tokens | mass, strongest token | hit, strongest token |",
        "|---|---|---|---|---|---|",
    ]
    for part, found in parts.items():
        area = mean(found["area"])
        lines.append(
            f"| {part} | {mean(found['all mass']):.2f} | x {mean(found['all mass']) / area:.1f} | "
            f"{mean(found['all hit']):.2f} ({mean(found['patches']):.2f}) | {mean(found['token mass']):.2f} | "
            f"{mean(found['token hit']):.2f} |"
        )
    lines += [
        "",
        "## Two subjects: attention on the other one",
        "",
        "Of the attention on a subject's word that lies on either figure, the share that lies on the other one:",
        "",
        "| | share |",
        "|---|---|",
        *(f"| {name} | {mean(found):.3f} |" for name, found in leaks.items()),
        "",
        "Neither knob changes where a word is looked at; they change what is done with that: `separation` what the",
        "subject adds there, Separate Subjects who sees whom. What they do to the pictures is in evaluation.md.",
    ]
    return lines
