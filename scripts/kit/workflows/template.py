"""What a template is written down with: columns of nodes, their links, notes and groups."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from nested_core.health import pack_version

from ..paths import PACK

_HUB = "https://huggingface.co"

CHECKPOINT = "sd_xl_base_1.0.safetensors"
ENCODER = "NestedAttentionEncoder.safetensors"
VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
FACE = "mediapipe_face_fp32.safetensors"
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
    FACE: ("detection", f"{_HUB}/Comfy-Org/mediapipe/resolve/main/detection/{FACE}"),
    CONTROLNET: (
        "controlnet", f"{_HUB}/stabilityai/control-lora/resolve/main/control-LoRAs-rank128/{CONTROLNET}",
    ),
    LORA: ("loras", f"{_SDXL}/{LORA}"),
}  # fmt: skip

# What Load Checkpoint, of that key in all templates, gives.
MODEL, CLIP = ("checkpoint", "MODEL"), ("checkpoint", "CLIP")
# The frontend's own colours: pale blue for ours, green and red for the prompts as everyone has them.
_OURS = {"color": "#2a363b", "bgcolor": "#3f5159"}
POSITIVE = {"color": "#232", "bgcolor": "#353"}
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
        """As `nested.build` of kit/frontend.js takes it."""
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
            properties = {"cnr_id": PACK, "ver": pack_version()}
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

    def note(self, title: str, *lines: str, width: int = 600) -> None:
        """A note above the graph. Each line is a heading: only their letters can be read where a graph opens whole."""
        shown = [re.sub(r"\]\([^)]*\)|[*\[\]]", "", line) for line in lines]
        rows = sum(-(-len(line) * 10.5 // (width - 44)) for line in shown)  # of letters of 20 pixels, on the canvas
        height = 56 + 25 * int(rows) + 13 * len(lines)
        # The notes are Markdown: a placeholder in angle brackets would be an HTML tag, and vanish.
        text = re.sub(r"<(\w+)>", r"&lt;\1&gt;", "\n".join(f"# {line}" for line in lines))
        self.notes.append({"title": title, "text": text, "width": width, "height": height})

    # -- pieces that most graphs have --

    def loaders(self, checkpoint: bool = True, photo: bool = True, face: bool = True) -> None:
        """The models. photo: whether a photo is encoded; face: whether a face is found in it."""
        self.group("Models")
        if checkpoint:
            self.node("checkpoint", "CheckpointLoaderSimple", widgets={"ckpt_name": CHECKPOINT})
        self.node("encoder", "NestedEncoderLoader", widgets={"encoder_name": ENCODER})
        if photo:
            self.node("tower", "CLIPVisionLoader", widgets={"clip_name": VISION})
        if photo and face:
            self.node("detector", "LoadMediaPipeFaceLandmarker", widgets={"model_name": FACE})

    def photo(self, key: str, title: str, height: int = 330) -> None:
        self.node(key, "LoadImage", title, height=height, widgets={"image": "example.png"})

    def face(self, key: str, photo: str, of: str = "") -> Link:
        """The face in a photo, upright, as the public encoder was trained on faces; `key` is its node's."""
        self.node(
            f"{key}_found", "MediaPipeFaceLandmarker", f"Find the face of {of}" if of else "",
            widgets={"detector_variant": "both", "num_faces": 0},
            face_detection_model=("detector", "FACE_DETECTION_MODEL"), image=(photo, "IMAGE"),
        )  # fmt: skip
        self.node(
            key, "NestedCropSubject", f"Crop {of}" if of else "", height=230, image=(photo, "IMAGE"),
            face_landmarks=(f"{key}_found", "face_landmarks"),
        )  # fmt: skip
        return key, "image"

    def encode(self, key: str, photo: Link, placeholder: str, class_word: str, title: str = "", **more: Any) -> None:
        self.node(
            key, "NestedEncodeSubject", title, widgets={"placeholder": placeholder, "class_word": class_word},
            encoder=("encoder", "encoder"), clip_vision=("tower", "CLIP_VISION"), image=photo, **more,
        )  # fmt: skip

    def apply(self, key: str, subject: Link, model: Link, clip: Link, title: str = "", **more: Any) -> None:
        self.node(key, "NestedApplySubject", title, model=model, clip=clip, subject=subject, **more)

    def prompts(self, clip: Link, text: str, title: str = "Prompt") -> None:
        self.node("positive", "CLIPTextEncode", title, height=130, colours=POSITIVE, widgets={"text": text}, clip=clip)
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
        """The note that says which files the graph loads, with links; before it what to do where no face is found."""
        if "detector" in self.keys:
            self.note(
                "Faces",
                "Red nodes? This ComfyUI finds no faces: template *portrait_by_hand*.",
                "Pets or things, with an encoder for them: connect the photo with Encode Subject.",
                width=520,
            )
        loaded = {value for c in self.columns for item in c["items"] for value in item.get("widgets", {}).values()
                  if isinstance(value, str)}  # fmt: skip
        files = [(name, *MODELS[name]) for name in MODELS if name in loaded]
        lines = [f"{folder}: [{name}]({url})" for name, folder, url in files]
        if not all(url.endswith(name) for name, _, url in files):
            lines.append("Save each under the name that it has here.")
        self.note("The files", *lines, width=700)
