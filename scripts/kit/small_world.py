"""The small world for the quickstart, the tests and the evaluation: its shipped models, and pictures of its figures.

The models are small ones that `demo/train.py` trained on drawn robots and creatures, and lie in
`demo/weights`. ComfyUI's stock loaders open them once `demo/comfyui` is among its custom nodes.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from demo import data, drawing, world
from demo.shipped import CHECKPOINT, CONTROLNET, ENCODER, LORA, VISION, WEIGHTS
from nested_core.files import whole

from .environment import SetupError
from .graphs import Shown
from .hosts import link_pack
from .paths import REPO

SIZE = drawing.SIZE
EXTENSION = "nested-attention-small-world"
FACE_DETECTOR = "small_world_finds_no_face.safetensors"
_CLEAR = ("flat", "comic")
"""Styles in which a picture looks like a photo: sharp and in colour."""
_FOLDERS = {
    CHECKPOINT: "checkpoints", VISION: "clip_vision", ENCODER: "nested_attention", CONTROLNET: "controlnet",
    LORA: "loras",
}  # fmt: skip


def link_packs(host: Path) -> list[str]:
    """Links this pack and the small world's loader into a ComfyUI; returns their folders' names, the pack's first."""
    return [link_pack(host), link_pack(host, EXTENSION, REPO / "demo" / "comfyui")]


def provide_models(models: Path, weights: Path = WEIGHTS) -> dict[str, str]:
    """Puts the shipped models into the folders of a ComfyUI models folder, where they are not there as shipped.

    This is the one place that says which models the quickstart uses. Returns their names by the graph's input.
    """
    for name, folder in _FOLDERS.items():
        shipped, placed = weights / name, models / folder / name
        if not shipped.is_file():
            raise SetupError(f"{shipped} is missing: get the repository again, or make it with python demo/train.py.")
        if placed.is_file() and placed.read_bytes() == shipped.read_bytes():
            continue
        placed.parent.mkdir(parents=True, exist_ok=True)
        with whole(placed) as part:
            shutil.copyfile(shipped, part)
    _provide_face_detector(models / "detection" / FACE_DETECTOR)
    return {
        "ckpt_name": CHECKPOINT, "clip_name": VISION, "encoder_name": ENCODER, "control_net_name": CONTROLNET,
        "lora_name": LORA,
    }  # fmt: skip


def _provide_face_detector(path: Path) -> None:
    """Weights for the host's own face detector with which it finds no face: this world has none that it could know.

    It loads what a file has and leaves the rest as it began, so these few tensors decide.
    """
    heads = {"detector_short.cls_16": (2, 88, 1, 1), "detector_short.cls_8": (6, 96, 1, 1),
             "detector_full.cls_dw": (4, 1, 3, 3)}  # fmt: skip
    parts = ["face_oval", "left_eye", "right_eye", "left_eyebrow", "right_eyebrow", "lips", "irises", "nose"]
    tensors = {f"topology.{part}": torch.zeros(0, 2, dtype=torch.int32) for part in parts}
    tensors |= {name: torch.zeros(0) for name in ("canonical_vertices", "procrustes_indices", "procrustes_weights")}
    for head, shape in heads.items():
        tensors |= {f"{head}.weight": torch.zeros(shape), f"{head}.bias": torch.full(shape[:1], -100.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        save_file(tensors, part)


def held_out_figures(seed: int, count: int, kind: str | None = None) -> list[world.Figure]:
    """Figures that no training saw."""
    rng = random.Random(f"held out {seed}")
    return [world.random_figure(rng, kind, held_out=True) for _ in range(count)]


def portrait(figure: world.Figure, seed: int, entry: data.Entry | None = None) -> drawing.Picture:
    """A reference picture, a square around the figure: in some look, scene and clear style, or as an entry has them."""
    rng = random.Random(f"portrait {figure} {seed}")
    if entry is None:
        style = rng.choice(_CLEAR)
        entry = data.Entry([figure], [world.random_look(rng, style)], rng.choice(world.SCENES), style)
    picture = drawing.render(entry.figures, entry.looks, entry.scene, entry.style, rng, size=2 * SIZE)
    top, left, side = drawing.square_around(picture.regions, 0, 0.06)
    image = picture.image.crop((left, top, left + side, top + side))
    return drawing.Picture(image, picture.regions[top : top + side, left : left + side])


def write_portraits(
    figures: Sequence[world.Figure], folder: Path, views: int = 1, entries: Sequence[data.Entry] = ()
) -> list[Shown]:
    """Writes reference pictures into an input folder; the figures as subjects, bound to <robot> or <creature>.

    entries: what each figure's picture shows besides it, where that matters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for number, figure in enumerate(figures):
        files = []
        for view in range(views):
            entry = entries[number] if entries else None
            said = [] if entry is None else [*vars(entry.looks[0]).values(), entry.scene, entry.style]
            name = "_".join([figure.kind, *figure.identity, *said, str(view)]) + ".png"
            portrait(figure, view + 1, entry).image.save(folder / name)
            files.append(name)
        shown.append(Shown(tuple(files), f"<{figure.kind}>", figure.kind))
    return shown


def prompt(
    subjects: Sequence[Shown], scene: str, style: str, looks: Sequence[world.Look | None] = (), bound: bool = True,
    named: Collection[str] = tuple(world.LOOKS),
) -> str:  # fmt: skip
    """The prompt for subjects in a scene, in looks if any are given; `bound` False: with their class words.

    named: what is said of a look.
    """
    words = [s.placeholder if bound else s.class_word for s in subjects]
    phrases = [world.phrase(word, look, named) for word, look in zip(words, looks or [None] * len(words), strict=True)]
    return world.prompt(phrases, scene, style)


# --- workflows/ in the small world ------------------------------------------------------------------------------------

_WORDS = {"person": "robot", "woman": "creature", "man": "robot"}
#: The prompts of workflows/, in this world's words.
_PROMPTS = {
    "a photo of <person> in a garden, soft light": "a smiling <person> waving in the forest, flat drawing",
    "a photo of <anna> on the left and <ben> on the right, in a garden, soft light":
        "a smiling <anna> waving and an angry <ben> standing in the snow, comic drawing",
    "a photo of <person> reading in a library": "a surprised <person> sitting in the room, watercolour drawing",
    "a photo of <anna> on a boat, morning light": "a <anna> in the sea, flat drawing",
    "a charcoal drawing of <anna> at a piano": "a sad <anna> sitting in the room, pencil drawing",
    "a photo of <anna> on the left and <ben> on the right, on a bench in a park":
        "a <anna> and a <ben> on the beach, flat drawing",
    "a photo of <person> waving, city street at dusk":
        "a smiling <person> waving facing left in the city, comic drawing",
    "a photo of <person>, detailed face": "a <person> in the desert, flat drawing",
    "a photo of <anna> in a red coat on the left and <ben> on the right, in a garden, soft light":
        "a <anna> and a <ben> in the snow, crayon drawing",
    "an oil painting of <person> in the mountains": "a <person> dancing in space, watercolour drawing",
    "bad anatomy, monochrome, lowres, worst quality, low quality": "",
}  # fmt: skip
_SMALLER = 1024 // SIZE
#: Node: {widget: its value here, or a function of its value there}.
_WIDGETS: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "CLIPVisionLoader": {"clip_name": VISION},
    "NestedEncoderLoader": {"encoder_name": ENCODER},
    "LoadMediaPipeFaceLandmarker": {"model_name": FACE_DETECTOR},
    "ControlNetLoader": {"control_net_name": CONTROLNET},
    "LoraLoader": {"lora_name": LORA, "strength_model": 1.0},
    "NestedEncodeSubject": {"class_word": lambda word: _WORDS[word]},
    "NestedCheckEncoder": {"class_word": lambda word: _WORDS[word], "caption": "a <subject>", "size": SIZE},
    "CLIPTextEncode": {"text": lambda text: _PROMPTS[text]},
    "EmptyLatentImage": {"width": SIZE, "height": SIZE},
    "SolidMask": {"width": lambda width: width // _SMALLER, "height": SIZE},
    "MaskComposite": {"x": lambda x: x // _SMALLER},
    "FeatherMask": {side: lambda width: width // _SMALLER for side in ("left", "right")},
    "GrowMask": {"expand": lambda expand: expand // 4},
    "KSampler": {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"},
    "NestedExplain": {"x": 0.28, "y": 0.62},
    # What this world's encoder was trained with is about 6, what the public one was trained with is 2.
    "NestedGridValues": {"down": "3, 6, 12"},
}


def with_models(workflow: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A workflow of workflows/ or blueprint of subgraphs/ with this world's files, words and sizes in place of SDXL's.

    folder: the server's input folder; the pictures that the workflow loads are put there.
    """
    pictures = _pictures_by_title(folder)
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    for node in (node for graph in graphs for node in graph["nodes"]):
        widgets, changes = node.get("widgets_values"), dict(_WIDGETS.get(node["type"], {}))
        if node["type"] == "LoadImage":
            changes["image"] = pictures[node["title"]]
        for name, change in changes.items():
            place = widget_place(node, name)
            widgets[place] = change(widgets[place]) if callable(change) else change
        node.get("properties", {}).pop("models", None)  # where to download the files that were named there
    return workflow


def widget_place(node: dict[str, Any], name: str) -> int:
    """Where a widget's value stands among the node's."""
    names: list[str] = []
    for entry in node["inputs"]:
        if "widget" in entry:
            names.append(entry["widget"]["name"])
            if names[-1] in ("seed", "noise_seed"):
                names.append("control_after_generate")  # the frontend's own, no input
    return names.index(name)


def _whole_picture(figure: world.Figure, scene: str, seed: str) -> drawing.Picture:
    look = world.Look("smiling", "plush", "waving", "front", "nothing")
    return drawing.render([figure], [look], scene, "flat", random.Random(seed))


def _pictures_by_title(folder: Path) -> dict[str, str]:
    """Writes what the Load Image nodes of workflows/ show into a folder; {node's title: file}."""
    robot, creature = held_out_figures(20, 1, "robot")[0], held_out_figures(9, 1, "creature")[0]
    other = held_out_figures(5, 1, "robot")[0]
    people = write_portraits(held_out_figures(30, 6, "robot"), folder)
    (views,), (first,) = write_portraits([robot], folder, views=3), write_portraits([creature], folder)
    scene = _whole_picture(other, "city", "pose")
    scene.image.save(folder / "pose.png")
    scene = _whole_picture(other, "desert", "to inpaint")
    for picture, name in ((scene, "to_inpaint.png"), (portrait(robot, 1), "face_painted.png")):
        painted = Image.fromarray((picture.regions == 0).astype("uint8") * 255)  # a picture's mask is where it is clear
        picture.image.putalpha(painted)
        picture.image.save(folder / name)
    return {
        "Photo of your subject": views.images[0],
        "Photo, with the face painted as its mask": "face_painted.png",
        "Photo of <anna>": first.images[0],
        "Photo of <ben>": views.images[0],
        **{f"Photo {i + 1}": shown.images[0] for i, shown in enumerate(people)},
        **{f"View {i + 1}": name for i, name in enumerate(views.images)},
        "Picture with the pose": "pose.png",
        "Picture, with the place painted as its mask": "to_inpaint.png",
    }
