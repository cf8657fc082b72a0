"""Makes workflows/: every template in the frontend's own format, its twin for scripts (workflows/api), its preview.

    python scripts/make_workflows.py                          all of them
    python scripts/make_workflows.py two_subjects blueprints  these

A template is written down here as columns of nodes; the host's frontend, in a browser, lays it out and saves it. The
preview is what it makes with the small world's models, run from the same page. Blueprints (subgraphs/) are made of the
same pieces.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _setup
from _setup import REPO, STATE, Server, say

WORKFLOWS = REPO / "workflows"
BLUEPRINTS = REPO / "subgraphs"
PICTURES = REPO / "docs" / "images" / "workflows"
VERSION = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
_HUB = "https://huggingface.co"

CHECKPOINT = "sd_xl_base_1.0.safetensors"
ENCODER = "NestedAttentionEncoder.safetensors"
VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
CONTROLNET = "control-lora-canny-rank128.safetensors"
LORA = "sd_xl_offset_example-lora_1.0.safetensors"
_SDXL = f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main"
#: File: (folder, address). What the host's missing-models dialog offers.
MODELS = {
    CHECKPOINT: ("checkpoints", f"{_SDXL}/{CHECKPOINT}"),
    ENCODER: (
        "nested_attention",
        f"{_HUB}/orpatashnik/NestedAttentionEncoder/resolve/main/personalization_encoder/model.safetensors",
    ),
    VISION: ("clip_vision", f"{_HUB}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors"),
    CONTROLNET: (
        "controlnet", f"{_HUB}/stabilityai/control-lora/resolve/main/control-LoRAs-rank128/{CONTROLNET}",
    ),
    LORA: ("loras", f"{_SDXL}/{LORA}"),
}  # fmt: skip

# The frontend's own colours: pale blue for ours, green and red for the prompts as everyone has them.
_OURS = {"color": "#2a363b", "bgcolor": "#3f5159"}
_POSITIVE = {"color": "#232", "bgcolor": "#353"}
_NEGATIVE = {"color": "#322", "bgcolor": "#533"}
_GROUP, _OPTIONAL = "#3f789e", "#8a8a8a"
_NEGATIVE_PROMPT = "bad anatomy, monochrome, lowres, worst quality, low quality"
_SAMPLING = {
    "steps": 30,
    "cfg": 5,
    "sampler_name": "dpmpp_2m",
    "scheduler": "karras",
    "control_after_generate": "fixed",
}

Link = tuple[str, str]


@dataclass
class Template:
    """A graph as columns of nodes, with the notes above them."""

    name: str
    columns: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def built(self) -> dict[str, Any]:
        """As `nested.build` of _frontend.js takes it."""
        return {"columns": self.columns, "notes": self.notes, "links": self.links}

    @property
    def keys(self) -> list[str]:
        """The nodes' keys; a node's number is its place here, from 1."""
        return [item["key"] for column in self.columns for item in column["items"] if "key" in item]

    def column(self, width: int = 330) -> None:
        self.columns.append({"width": width, "items": []})

    def group(self, title: str, optional: bool = False) -> None:
        """Begins a frame around the nodes that follow in this column."""
        self.columns[-1]["items"].append({"group": title, "color": _OPTIONAL if optional else _GROUP})

    def node(
        self, key: str, kind: str, title: str = "", *, height: int = 0, colours: dict[str, str] | None = None,
        widgets: dict[str, Any] | None = None, **inputs: Any,
    ) -> None:  # fmt: skip
        """Adds a node. inputs: name=(key of a node, name of its output); "a__b" stands for "a.b"."""
        properties: dict[str, Any] = {}
        if kind.startswith("Nested"):
            properties = {"cnr_id": _setup.PACK, "ver": VERSION[1] if VERSION else ""}
            colours = colours or _OURS
        files = [value for value in (widgets or {}).values() if value in MODELS]
        if files:
            properties["models"] = [
                {"name": name, "url": MODELS[name][1], "directory": MODELS[name][0]} for name in files
            ]
        self.columns[-1]["items"].append(
            {"key": key, "type": kind, "title": title, "height": height, "widgets": widgets or {},
             "properties": properties, **(colours or {})}
        )  # fmt: skip
        for name, (source, output) in inputs.items():
            self.links.append((source, output, key, name.replace("__", ".")))

    def note(self, title: str, text: str, width: int = 560) -> None:
        shown = re.sub(r"\]\([^)]*\)", "]", text)
        lines = sum(-(-max(1, len(line)) * 6 // (width - 40)) for line in shown.split("\n"))
        height = 58 + 15 * lines
        # The notes are Markdown: a placeholder in angle brackets would be an HTML tag, and vanish.
        text = re.sub(r"<(\w+)>", r"&lt;\1&gt;", text)
        self.notes.append({"title": title, "text": text, "width": width, "height": height})

    # -- pieces that most graphs have --

    def loaders(self, encoder: bool = True, vision: bool = True) -> None:
        self.group("Models")
        self.node("checkpoint", "CheckpointLoaderSimple", widgets={"ckpt_name": CHECKPOINT})
        if encoder:
            self.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
        if vision:
            self.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})

    def photo(self, key: str, title: str, height: int = 330) -> None:
        self.node(key, "LoadImage", title, height=height, widgets={"image": "example.png"})

    def encode(self, key: str, photo: Link, placeholder: str, class_word: str, title: str = "", **more: Any) -> None:
        self.node(
            key, "NestedEncodeSubject", title, widgets={"placeholder": placeholder, "class_word": class_word},
            encoder=("encoder", "encoder"), clip_vision=("tower", "CLIP_VISION"), image=photo, **more,
        )  # fmt: skip

    def apply(self, key: str, subject: Link, model: Link, clip: Link, title: str = "", **more: Any) -> None:
        self.node(key, "NestedApplySubject", title, model=model, clip=clip, subject=subject, **more)

    def prompts(self, clip: Link, text: str, title: str = "Prompt") -> None:
        self.node("positive", "CLIPTextEncode", title, height=130, colours=_POSITIVE, widgets={"text": text}, clip=clip)
        self.node(
            "negative", "CLIPTextEncode", "Negative prompt", height=110, colours=_NEGATIVE,
            widgets={"text": _NEGATIVE_PROMPT}, clip=clip,
        )  # fmt: skip

    def size(self, batch: int = 1) -> None:
        self.node("latent", "EmptyLatentImage", widgets={"width": 1024, "height": 1024, "batch_size": batch})

    def sampler(
        self, model: Link, latent: Link = ("latent", "LATENT"), positive: Link = ("positive", "CONDITIONING"),
        negative: Link = ("negative", "CONDITIONING"), key: str = "sampler", title: str = "", seed: int = 1,
        denoise: float = 1.0,
    ) -> None:  # fmt: skip
        self.node(
            key, "KSampler", title, widgets={"seed": seed, "denoise": denoise, **_SAMPLING},
            model=model, positive=positive, negative=negative, latent_image=latent,
        )  # fmt: skip

    def decode(self, key: str = "decode", sampler: str = "sampler") -> None:
        self.node(key, "VAEDecode", samples=(sampler, "LATENT"), vae=("checkpoint", "VAE"))

    def save(self, image: Link = ("decode", "IMAGE"), title: str = "", height: int = 380) -> None:
        prefix = f"nested_attention/{self.name}"
        self.node("save", "SaveImage", title, height=height, widgets={"filename_prefix": prefix}, images=image)

    def picture(
        self, model: Link, clip: Link, text: str, title: str, width: int, prompt_group: str, picture_group: str
    ) -> None:
        """The last three columns of most graphs: the prompt (so wide), the sampler, the saved picture."""
        self.column(width)
        self.group(prompt_group)
        self.prompts(clip, text, title)
        self.size()
        self.column(300)
        self.group("Sample")
        self.sampler(model)
        self.decode()
        self.column(400)
        self.group(picture_group)
        self.save(height=440)

    def files_note(self) -> None:
        """The note that says which files the graph loads, with links."""
        loaded = {value for c in self.columns for item in c["items"] for value in item.get("widgets", {}).values()
                  if isinstance(value, str)}  # fmt: skip
        lines = []
        for name in (name for name in MODELS if name in loaded):
            folder, url = MODELS[name]
            other = ", or any other SDXL checkpoint" if name == CHECKPOINT else ""
            lines.append(f"- **models/{folder}**: [{name}]({url}){other}")
            if not url.endswith(name):
                lines[-1] += " (save it under this name)"
        self.note("The files", "\n".join(lines), 620)


# --- the templates ----------------------------------------------------------------------------------------------------

MODEL, CLIP = ("checkpoint", "MODEL"), ("checkpoint", "CLIP")


def first_portrait(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.group("1. Your subject")
    t.photo("photo", "Photo of your subject")
    t.column(320)
    t.group("Bind it to its word")
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))
    t.picture(
        ("apply", "model"), ("apply", "clip"), "a photo of <person> in a garden, soft light",
        "Prompt with <person>", 330, "2. Your prompt", "3. Your picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. **Load a photo of your subject**: one face (or one thing), large and clear.\n"
        "2. **Write <person> in the prompt** where the subject belongs. Everything else works as always.\n"
        "3. **Run, and look at *What the encoder sees***: is all of it there?\n\n"
        "Another word than <person>, or a dog: change *placeholder* and *class_word* in **Encode Subject**.",
        600,
    )  # fmt: skip
    t.note(
        "If the picture is not right",
        "- **Too little likeness**: *strength* up to 1.5, or a photo in which the face is larger.\n"
        "- **The prompt is ignored**: *strength* 0.7, or *start_percent* 0.1.\n"
        "- **The encoder sees too little of the subject**: *fit* to *pad*, or **Crop Subject** before **Encode "
        "Subject**.\n"
        '- **"No positive prompt mentions <person>"**: the prompt needs that word, and the *clip* that comes out of '
        "**Apply Subject**.",
        560,
    )  # fmt: skip
    t.files_note()


def two_subjects(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. The first subject")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", ("photo_anna", "IMAGE"), "<anna>", "woman", "Encode <anna>")
    t.column(330)
    t.group("1. The second subject")
    t.photo("photo_ben", "Photo of <ben>")
    t.encode("ben", ("photo_ben", "IMAGE"), "<ben>", "man", "Encode <ben>")
    t.column(330)
    t.group("One after the other")
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP, "Apply <anna>")
    t.apply("apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"), "Apply <ben>")
    t.picture(
        ("apply_ben", "model"), ("apply_ben", "clip"),
        "a photo of <anna> on the left and <ben> on the right, in a garden, soft light",
        "Prompt with <anna> and <ben>", 350, "2. A prompt with both words", "3. The picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. **A photo of each**. Each **Encode Subject** has its own word: <anna>, <ben>.\n"
        "2. **Both words in the prompt**, each with a place or a deed of its own: it is the prompt that decides who "
        "stands where.\n"
        "3. **A third one**: copy Load Image, Encode and Apply Subject, give it another word, and put its Apply into "
        "the line.",
        600,
    )  # fmt: skip
    t.note(
        "If the two melt into each other",
        "- Say in the prompt what each of them does, and where.\n"
        "- Give each a *mask*: template *regional_masks*.\n"
        "- Put **Separate Subjects** before the sampler.\n"
        "- See who is where: template *who_is_where*.",
        480,
    )  # fmt: skip
    t.files_note()


def several_views(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(300)
    t.group("1. Views of ONE subject")
    for number in (1, 2, 3):
        t.photo(f"photo{number}", f"View {number}")
    t.column(320)
    t.group("Each is encoded")
    for number in (1, 2, 3):
        t.encode(f"view{number}", (f"photo{number}", "IMAGE"), "<person>", "person", f"Encode view {number}")
    t.column(320)
    t.group("One subject")
    views: dict[str, Any] = {f"subjects__subject_{n}": (f"view{n}", "subject") for n in (1, 2, 3)}
    t.node(
        "subject", "NestedMergeSubjects", widgets={"weights": ""},
        **views,
    )  # fmt: skip
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.picture(
        ("apply", "model"), ("apply", "clip"), "a photo of <person> reading in a library",
        "Prompt with <person>", 330, "2. Your prompt", "3. Your picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. **Photos of the same subject**: front, side, another day. What one photo hides, another shows.\n"
        "2. **weights** in Merge Subjects: empty, all count the same. 1, 0.5, 2: one number each, in the order of "
        "the inputs; 0 leaves a view out.\n"
        "3. Two views: remove a link. More: connect to the free input that appears.\n\n"
        "All views share one placeholder and one class word.",
        600,
    )  # fmt: skip
    t.note(
        "Good to know",
        "- A view with the face half hidden costs more than it brings: look at *seen* of each Encode Subject.\n"
        "- Photos of equal size can also go into one Encode Subject as an image batch.\n"
        "- Two *different* subjects are not merged: template *two_subjects*.",
        480,
    )  # fmt: skip
    t.files_note()


def save_subject(t: Template) -> None:
    t.column(370)
    t.group("Models")
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of <anna>")
    t.column(330)
    t.group("Encode it once")
    t.encode("subject", ("photo", "IMAGE"), "<anna>", "woman")
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))
    t.column(360)
    t.group("2. Keep it")
    t.node("save", "NestedSaveSubject", height=150, widgets={"filename_prefix": "anna"}, subject=("subject", "subject"))
    t.note(
        "How to use this",
        "1. **Load a photo, run.** The file goes to *output/nested_subjects*: a few megabytes, without the photo.\n"
        "2. **Press R** (refresh), then open the template *reuse_subject*: Load Subject has it in its list.\n\n"
        "It works with the encoder that made it. Give it to others: into their *models/nested_subjects*.",
        620,
    )  # fmt: skip
    t.files_note()


def reuse_subject(t: Template) -> None:
    t.column(370)
    t.loaders(vision=False)
    t.group("1. Your saved subject")
    t.node("subject", "NestedLoadSubject", widgets={"subject_name": "anna_00001_.safetensors"},
           encoder=("encoder", "encoder"))  # fmt: skip
    t.column(320)
    t.group("Bind it to its word")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.column(350)
    t.group("2. As many prompts as you like")
    t.prompts(("apply", "clip"), "a photo of <anna> on a boat, morning light", "Prompt with <anna>")
    t.node(
        "positive2", "CLIPTextEncode", "Another prompt with <anna>", height=130, colours=_POSITIVE,
        widgets={"text": "a charcoal drawing of <anna> at a piano"}, clip=("apply", "clip"),
    )  # fmt: skip
    t.size()
    t.column(300)
    t.group("Sample")
    t.sampler(("apply", "model"))
    t.decode()
    t.sampler(("apply", "model"), positive=("positive2", "CONDITIONING"), key="sampler2", seed=2)
    t.decode("decode2", "sampler2")
    t.column(380)
    t.group("3. Your pictures")
    t.save(height=380)
    t.node("save2", "SaveImage", height=380, widgets={"filename_prefix": f"nested_attention/{t.name}"},
           images=("decode2", "IMAGE"))  # fmt: skip
    t.note(
        "How to use this",
        "1. **Save one first** with the template *save_subject*; press R, then choose it in **Load Subject**.\n"
        "2. **Its word** is the one it was saved with (<anna>). Another one: write it into *placeholder*.\n\n"
        "No photo and no vision model is needed any more.",
        600,
    )  # fmt: skip
    t.files_note()


def regional_masks(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.group("2. Who may be where")
    size = {"width": 1024, "height": 1024}
    t.node("black", "SolidMask", "The whole picture", widgets={"value": 0, **size})
    t.node("white", "SolidMask", "Half of it", widgets={"value": 1, **size, "width": 512})
    t.column(330)
    t.group("1. The first subject")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", ("photo_anna", "IMAGE"), "<anna>", "woman", "Encode <anna>")
    half: dict[str, Any] = {"destination": ("black", "MASK"), "source": ("white", "MASK")}
    t.node("left", "MaskComposite", "Left half", widgets={"x": 0, "y": 0, "operation": "add"}, **half)
    t.node("left_soft", "FeatherMask", "Its soft edge", widgets={"right": 64}, mask=("left", "MASK"))
    t.column(330)
    t.group("1. The second subject")
    t.photo("photo_ben", "Photo of <ben>")
    t.encode("ben", ("photo_ben", "IMAGE"), "<ben>", "man", "Encode <ben>")
    t.node("right", "MaskComposite", "Right half", widgets={"x": 512, "y": 0, "operation": "add"}, **half)
    t.node("right_soft", "FeatherMask", "Its soft edge", widgets={"left": 64}, mask=("right", "MASK"))
    t.column(330)
    t.group("Each only there")
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP, "Apply <anna>", mask=("left_soft", "MASK"))
    t.apply(
        "apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"), "Apply <ben>",
        mask=("right_soft", "MASK"),
    )  # fmt: skip
    t.node("separate", "NestedSeparateSubjects", model=("apply_ben", "model"))
    t.picture(
        ("separate", "model"), ("apply_ben", "clip"),
        "a photo of <anna> on the left and <ben> on the right, on a bench in a park",
        "Prompt with <anna> and <ben>", 350, "3. A prompt with both words", "4. The picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. **A photo of each**, each with a word of its own.\n"
        "2. **Who may be where**: here the two halves. For a shape of your own, connect a painted mask instead (Load "
        "Image, right click, *Open in Mask Editor*; its *MASK* output).\n"
        "3. **The prompt** still says who stands where: a mask says where a subject *may* be, not that it must.\n"
        "4. **Separate Subjects** keeps the two apart inside the model too. Without it: bypass (Ctrl+B).",
        640,
    )  # fmt: skip
    t.note(
        "Good to know",
        "- Masks are stretched over the picture: any size does.\n"
        "- Where masks overlap, both subjects may act.\n"
        "- A soft edge looks better than a hard one.",
        420,
    )  # fmt: skip
    t.files_note()


def controlnet_and_lora(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.node("lora", "LoraLoader", widgets={"lora_name": LORA, "strength_model": 0.7, "strength_clip": 0.7},
           model=MODEL, clip=CLIP)  # fmt: skip
    t.node("control", "ControlNetLoader", widgets={"control_net_name": CONTROLNET})
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of your subject")
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.group("2. The composition")
    t.photo("pose", "Picture with the pose")
    t.column(330)
    t.group("Bind it to its word")
    t.apply("apply", ("subject", "subject"), ("lora", "MODEL"), ("lora", "CLIP"))
    t.group("Outlines for the ControlNet")
    t.node("edges", "Canny", image=("pose", "IMAGE"))
    t.node("edges_seen", "PreviewImage", "The outlines", height=290, images=("edges", "IMAGE"))
    t.column(350)
    t.group("3. Your prompt")
    t.prompts(("apply", "clip"), "a photo of <person> waving, city street at dusk", "Prompt with <person>")
    t.node(
        "controlled", "ControlNetApplyAdvanced", widgets={"strength": 0.7, "end_percent": 0.6},
        positive=("positive", "CONDITIONING"), negative=("negative", "CONDITIONING"),
        control_net=("control", "CONTROL_NET"), image=("edges", "IMAGE"),
    )  # fmt: skip
    t.size()
    t.column(300)
    t.group("Sample")
    t.sampler(("apply", "model"), positive=("controlled", "positive"), negative=("controlled", "negative"))
    t.decode()
    t.column(400)
    t.group("4. Your picture")
    t.save(height=440)
    t.note(
        "How to use this",
        "1. **Your subject**: a photo, as always.\n"
        "2. **The composition**: another picture; of it only the outlines count.\n"
        "3. **The prompt** with <person>.\n\n"
        "A LoRA goes before or after Apply Subject: the picture is the same. ControlNet works on the conditioning, "
        "after the text encode nodes.",
        600,
    )  # fmt: skip
    t.note(
        "If the two fight",
        "- **The face follows the outlines, not your subject**: *end_percent* of Apply ControlNet down to 0.4, or its "
        "*strength*.\n"
        "- **The LoRA paints over the subject**: its strength down, or *strength* of Apply Subject up to 1.3.\n"
        "- Any SDXL LoRA will do, and any SDXL ControlNet for outlines (Canny).",
        520,
    )  # fmt: skip
    t.files_note()


def inpaint_face(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.group("1. Who")
    t.photo("photo", "Photo of your subject")
    t.column(350)
    t.group("2. Into which picture")
    t.photo("scene", "Picture, with the place painted as its mask", 340)
    t.node("grown", "GrowMask", widgets={"expand": 16}, mask=("scene", "MASK"))
    t.node("latent", "VAEEncode", pixels=("scene", "IMAGE"), vae=("checkpoint", "VAE"))
    t.node("masked", "SetLatentNoiseMask", samples=("latent", "LATENT"), mask=("grown", "MASK"))
    t.column(330)
    t.group("Bind it to its word, there")
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP, mask=("grown", "MASK"))
    t.node("soft", "DifferentialDiffusion", model=("apply", "model"))
    t.column(350)
    t.group("3. What the picture shows")
    t.prompts(("apply", "clip"), "a photo of <person>, detailed face", "Prompt with <person>")
    t.column(300)
    t.group("Sample")
    t.sampler(("soft", "MODEL"), latent=("masked", "LATENT"), denoise=0.75)
    t.decode()
    t.node(
        "back", "ImageCompositeMasked", "Only the mask changes", widgets={"x": 0, "y": 0, "resize_source": True},
        destination=("scene", "IMAGE"), source=("decode", "IMAGE"), mask=("grown", "MASK"),
    )  # fmt: skip
    t.column(400)
    t.group("4. Your picture")
    t.save(("back", "IMAGE"), height=440)
    t.note(
        "How to use this",
        "1. **Who**: a photo of your subject.\n"
        "2. **Into which picture**: right click on it, *Open in Mask Editor*, paint over the face, save. Without a "
        "mask nothing changes. Pictures of about a megapixel work best; Upscale Image makes others fit.\n"
        "3. **What the picture shows**, with <person> for the one inside the mask.\n\n"
        "Plain img2img: paint the whole picture, and set *denoise* to 0.5.",
        640,
    )  # fmt: skip
    t.note(
        "If it does not fit in",
        "- **Still the old face**: *denoise* up to 0.9.\n"
        "- **Hair or light do not fit**: a larger mask, *denoise* 0.6.\n"
        "- **A small face**: crop it, enlarge it to 1024, inpaint, paste it back (Crop Image, Upscale Image).",
        520,
    )  # fmt: skip
    t.files_note()


def who_is_where(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. Two subjects")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", ("photo_anna", "IMAGE"), "<anna>", "woman", "Encode <anna>")
    t.photo("photo_ben", "Photo of <ben>")
    t.encode("ben", ("photo_ben", "IMAGE"), "<ben>", "man", "Encode <ben>")
    t.column(330)
    t.group("Apply, and record")
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP, "Apply <anna>")
    t.apply("apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"), "Apply <ben>")
    t.node("record", "NestedRecordAttention", model=("apply_ben", "model"))
    t.column(350)
    t.group("2. The picture")
    t.prompts(
        ("apply_ben", "clip"), "a photo of <anna> on the left and <ben> on the right, in a garden, soft light",
        "Prompt with <anna> and <ben>",
    )  # fmt: skip
    t.size()
    t.column(330)
    t.group("Sample")
    t.sampler(("record", "model"))
    t.decode()
    t.node("picture", "PreviewImage", "The picture", height=330, images=("decode", "IMAGE"))
    t.column(350)
    t.group("3. Who is where")
    t.node("maps", "NestedAttentionMaps", widgets={"placeholder": "<anna>"}, recording=("record", "recording"),
           after=("decode", "IMAGE"))  # fmt: skip
    t.node("maps_seen", "PreviewImage", "Where each word was looked at", height=330, images=("maps", "image"))
    t.column(560)
    t.group("4. Why one point looks as it does")
    t.node("explain", "NestedExplain", widgets={"placeholder": "<anna>", "x": 0.3, "y": 0.35},
           recording=("record", "recording"), after=("decode", "IMAGE"))  # fmt: skip
    t.node("explained", "PreviewImage", "What the subject is there", height=430, images=("explain", "image"))
    t.column(340)
    t.group("5. A second pass, inside the mask")
    t.node("grown", "GrowMask", widgets={"expand": 12}, mask=("maps", "mask"))
    t.node("masked", "SetLatentNoiseMask", samples=("sampler", "LATENT"), mask=("grown", "MASK"))
    t.node(
        "positive2", "CLIPTextEncode", "What to change", height=130, colours=_POSITIVE,
        widgets={"text": "a photo of <anna> in a red coat on the left and <ben> on the right, in a garden, soft light"},
        clip=("apply_ben", "clip"),
    )  # fmt: skip
    t.sampler(
        ("apply_ben", "model"), latent=("masked", "LATENT"), positive=("positive2", "CONDITIONING"), key="sampler2",
        seed=2, denoise=0.65,
    )  # fmt: skip
    t.decode("decode2", "sampler2")
    t.column(380)
    t.group("6. Changed there alone")
    t.save(("decode2", "IMAGE"), height=400)
    t.note(
        "How to use this",
        "1. **Two photos**, each with a word of its own. 2. **Both words in the prompt.**\n"
        "3. **Who is where**: the heat of each word, and the mask of the one that *placeholder* names.\n"
        "4. **Why one point looks as it does**: x and y from 0 to 1.\n"
        "5. **A second pass** changes that subject alone, inside its mask.\n\n"
        "Record Attention leaves the picture as it is, bit for bit.",
        640,
    )  # fmt: skip
    t.note(
        "If the mask does not fit",
        "- **Too small**: *threshold* down, or *expand* up in Grow Mask. Attention is on what a word decides: face and "
        "body more than hat and shoes.\n"
        "- **The two are one**: a place for each in the prompt; a mask for each in **Apply Subject**; **Separate "
        "Subjects** before **Record Attention**.\n"
        "- **Another subject**: its word as *placeholder*.",
        600,
    )  # fmt: skip
    t.files_note()


def strength_identity_grid(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of your subject")
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.column(340)
    t.group("2. What to try")
    t.node("values", "NestedGridValues", widgets={"across": "0.6, 1, 1.4", "down": "1, 2, 4"})
    t.node(
        "apply", "NestedApplySubjectAdvanced", model=MODEL, clip=CLIP, subject=("subject", "subject"),
        strength=("values", "across"), identity=("values", "down"),
    )  # fmt: skip
    t.column(330)
    t.group("3. Your prompt")
    t.prompts(("apply", "clip"), "an oil painting of <person> in the mountains", "Prompt with <person>")
    t.size()
    t.column(300)
    t.group("Sample, once for each pair")
    t.sampler(("apply", "model"))
    t.decode()
    t.node("sheet", "NestedPictureGrid", images=("decode", "IMAGE"), grid=("values", "grid"))
    t.column(560)
    t.group("4. Strength across, identity down")
    t.save(("sheet", "image"), height=600)
    t.note(
        "How to use this",
        "1. **Your photo, your prompt**, a fixed seed.\n"
        "2. **What to try**: numbers with commas between them. Nine pairs are nine pictures, one after the other.\n"
        "3. Choose the pair that keeps the face *and* obeys the prompt; write it into your own graph.\n\n"
        "*identity* is alpha: how loud the subject's values are. 2 is what the public encoder was trained with.",
        620,
    )  # fmt: skip
    t.note(
        "Other knobs",
        "Drag *across* or *down* onto any other knob with decimals: *start_percent*, *focus*, *cfg*, a LoRA's "
        "strength. Change the titles in **Grid Values** with it.",
        420,
    )  # fmt: skip
    t.files_note()


TEMPLATES: dict[str, Callable[[Template], None]] = {
    f.__name__: f
    for f in (
        first_portrait, two_subjects, several_views, save_subject, reuse_subject, regional_masks, controlnet_and_lora,
        inpaint_face, who_is_where, strength_identity_grid,
    )
}  # fmt: skip


# --- blueprints: some nodes as one ------------------------------------------------------------------------------------


def subject(t: Template) -> list[tuple[str, ...]]:
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.column(330)
    t.node("checkpoint", "CheckpointLoaderSimple")
    t.node("photo", "LoadImage")
    t.encode("subject", ("photo", "IMAGE"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.column(330)
    t.prompts(("apply", "clip"), "")
    t.size()
    t.sampler(("apply", "model"))
    t.node("seen", "PreviewImage", images=("subject", "seen"))
    return [
        ("encoder", "encoder_name"), ("tower", "clip_name"), ("subject", "placeholder"), ("subject", "class_word"),
        ("apply", "strength"),
    ]  # fmt: skip


def two_subjects_in_one(t: Template) -> list[tuple[str, ...]]:
    t.column(330)
    t.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
    t.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
    t.column(330)
    t.node("checkpoint", "CheckpointLoaderSimple")
    t.node("first", "LoadImage")
    t.node("second", "LoadImage")
    t.encode("anna", ("first", "IMAGE"), "<anna>", "woman")
    t.encode("ben", ("second", "IMAGE"), "<ben>", "man")
    t.column(330)
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP)
    t.apply("apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"))
    t.column(330)
    t.prompts(("apply_ben", "clip"), "")
    t.size()
    t.sampler(("apply_ben", "model"))
    return [
        ("encoder", "encoder_name"), ("tower", "clip_name"),
        ("anna", "placeholder", "first placeholder"), ("anna", "class_word", "first class_word"),
        ("ben", "placeholder", "second placeholder"), ("ben", "class_word", "second class_word"),
    ]  # fmt: skip


#: File and title: (graph around it, what is inside).
ENCLOSED: dict[str, tuple[Callable[[Template], list[tuple[str, ...]]], list[str]]] = {
    "Your Subject (Nested Attention)": (subject, ["encoder", "tower", "subject", "apply"]),
    "Two Subjects (Nested Attention)": (
        two_subjects_in_one, ["encoder", "tower", "anna", "ben", "apply_anna", "apply_ben"],
    ),
}  # fmt: skip


def enclosed(page: Any, title: str) -> dict[str, Any]:
    """A blueprint as the frontend saves it."""
    build, keys = ENCLOSED[title]
    template = Template(title)
    widgets = build(template)
    page.evaluate("(template) => nested.build(template)", template.built)
    page.wait_for_timeout(500)
    chosen = {"keys": keys, "all": template.keys, "title": title, "widgets": widgets}
    page.evaluate("(chosen) => nested.enclose(chosen)", chosen)
    graph = page.evaluate("() => app.graph.serialize()")
    return _with_steady_ids(_clean(graph, title))


def _with_steady_ids(graph: dict[str, Any]) -> dict[str, Any]:
    """The same with identifiers that do not differ from one making to the next."""
    text = json.dumps(graph)
    found = dict.fromkeys(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))
    for number, identifier in enumerate(found):
        text = text.replace(identifier, str(uuid.uuid5(uuid.UUID(graph["id"]), str(number))))
    return dict(json.loads(text))


# --- making them ------------------------------------------------------------------------------------------------------


def made(page: Any, template: Template) -> tuple[dict[str, Any], dict[str, Any]]:
    """A template as the frontend saves it, and as its API takes it."""
    page.evaluate("(template) => nested.build(template)", template.built)
    page.wait_for_timeout(500)
    graph = page.evaluate("() => app.graph.serialize()")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    return _clean(graph, template.name), prompt


def _clean(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """Without what depends on the browser that saved it: its language, its view."""
    graph = _without_none(graph)
    for part in [graph, *graph.get("definitions", {}).get("subgraphs", [])]:
        for node in part["nodes"]:
            for slot in [*node.get("inputs", []), *node.get("outputs", [])]:
                slot.pop("localized_name", None)
            node.pop("showAdvanced", None)
            node["pos"], node["size"] = ([round(n) for n in node[key]] for key in ("pos", "size"))
    kept = dict(graph)
    kept["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_setup.PACK}/{name}"))
    kept["extra"] = {}
    return kept


def _without_none(value: Any) -> Any:
    """What the frontend leaves undefined is no part of a file; a free input (link) and an empty widget are."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None or k in ("link", "links")}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def preview(result: Path, references: list[Path]) -> Any:
    """A card of 768 x 768 for the template browser: what came out, and in its corner what went in."""
    from PIL import Image, ImageOps

    card = ImageOps.pad(Image.open(result).convert("RGB"), (768, 768), Image.Resampling.LANCZOS, color=(22, 24, 29))
    for number, reference in enumerate(references):
        inset = ImageOps.fit(Image.open(reference).convert("RGB"), (150, 150), Image.Resampling.LANCZOS)
        card.paste(ImageOps.expand(inset, 5, (245, 245, 245)), (16 + 172 * number, 768 - 160 - 16))
    return card


#: Whose picture is the preview where it is not the saved one; these say by themselves what went in.
_SHOWN = {"who_is_where": "maps_seen", "save_subject": "seen", "strength_identity_grid": "save"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: all of them; {', '.join(TEMPLATES)}, blueprints")
    arguments = parser.parse_args()
    names = arguments.names or [*TEMPLATES, "blueprints"]
    if unknown := [name for name in names if name not in {*TEMPLATES, "blueprints"}]:
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(TEMPLATES)}, blueprints")
    if "reuse_subject" in names:  # it loads what the other saves
        names = ["save_subject", *(name for name in names if name != "save_subject")]
    host = _setup.prepared_host()

    from _browser import browser, frontend, load, queue, shoot

    import small_world

    work = STATE / "frontend"
    packs = small_world.link_packs(host)
    small_world.provide_models(STATE / "models")
    shutil.rmtree(work / "output" / "nested_subjects", ignore_errors=True)  # perhaps of another encoder
    for folder in (WORKFLOWS / "api", PICTURES):
        folder.mkdir(parents=True, exist_ok=True)
    with Server(host, work, models=STATE / "models", only=packs) as server, browser() as chromium:
        page = frontend(chromium, server, 2600, 1300)
        if "blueprints" in names:
            BLUEPRINTS.mkdir(exist_ok=True)
            for title in ENCLOSED:
                _write(BLUEPRINTS / f"{title}.json", enclosed(page, title))
                say(f"{title}: a blueprint")
        for name in (name for name in names if name in TEMPLATES):
            template = Template(name)
            TEMPLATES[name](template)
            graph, prompt = made(page, template)
            _write(WORKFLOWS / f"{name}.json", graph)
            _write(WORKFLOWS / "api" / f"{name}.json", prompt)
            here = small_world.with_models(json.loads(json.dumps(graph)), server.input)
            load(page, here, name)
            entry = queue(page, server)
            page.wait_for_timeout(1500)
            shoot(page, PICTURES / f"{name}.jpg")
            made_by = str(template.keys.index(_SHOWN.get(name, "save")) + 1)
            first = entry["outputs"][made_by]["images"][0]
            result = server.work / first["type"] / first["subfolder"] / first["filename"]
            photos = [node["widgets_values"][0] for node in here["nodes"] if node["type"] == "LoadImage"]
            references = [] if name in _SHOWN else [server.input / photo for photo in photos]
            preview(result, references).save(WORKFLOWS / f"{name}.jpg", quality=88)
            say(f"{name}: {len(graph['nodes'])} nodes, run; see {PICTURES / f'{name}.jpg'}")
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    _setup.run_main(main)
