"""What the frozen models make of a batch: latents, text embeddings and vision features, kept where that is wanted."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..files import open_weights, save_tensors
from .base import BaseModel
from .examples import Batch
from .model import Conditions

Entry = dict[str, Tensor]
Part = TypeVar("Part")


class Cache(Protocol):
    """Tensors by content hash."""

    def get(self, key: str) -> Entry | None: ...

    def put(self, key: str, entry: Entry) -> None: ...


class MemoryCache:
    """The newest entries up to a number of bytes, on the CPU."""

    def __init__(self, gigabytes: float) -> None:
        self.limit, self.size = int(gigabytes * 1e9), 0
        self.entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str) -> Entry | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: str, entry: Entry) -> None:
        self.entries[key] = entry
        self.size += _bytes(entry)
        while self.size > self.limit:
            self.size -= _bytes(self.entries.popitem(last=False)[1])


class DiskCache:
    """A safetensors file per entry. Several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Entry | None:
        path = self._path(key)
        return open_weights(path).read() if path.exists() else None

    def put(self, key: str, entry: Entry) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, entry, None, "cache's entry")


def _bytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _mark(module: torch.nn.Module) -> str:
    """A short hash by which a model's weights are told from others: of a run of numbers from each tensor."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class FrozenEncoders:
    """The VAE, the text encoders and the vision tower. Without gradients, outside autocast, in their own types.

    device: where results go. dtype: their type. image_features: which hidden states of the tower.
    """

    def __init__(
        self, base: BaseModel, device: torch.device, dtype: torch.dtype, image_features: str, cache: Cache | None = None
    ) -> None:
        self.base, self.device, self.dtype, self.image_features, self.cache = base, device, dtype, image_features, cache
        # Another base model's results have no place in a shared folder.
        self._salt = f"{base.family.name} {_mark(base.vae)} {_mark(base.vision)} {list(map(_mark, base.text_encoders))}"

    @torch.no_grad()
    def conditions(self, batch: Batch) -> Conditions:
        """Everything that the U-Net and the encoder are given for a batch."""
        text, pooled = self.text(batch.prompts)
        groups = tuple(group.to(self.device) for group in batch.groups)
        added = {}
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": batch.time_ids.to(self.device, pooled.dtype)}
        return Conditions(text, added, self.features(batch.references), groups)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Squares (R, S, S, 3) -> the tower's hidden states (R, T, E)."""

        def encode(parts: Sequence[Tensor]) -> list[Entry]:
            states = self.base.vision.features(torch.stack(list(parts)).to(self.device), self.image_features)
            return [{"features": row.to(self.dtype)} for row in states]

        entries = self._cached(f"vision {self.image_features}", list(images), _pixels, encode)
        if not entries:
            return torch.zeros(0, 1, self.base.vision.feature_dim, device=self.device, dtype=self.dtype)
        return torch.stack([entry["features"] for entry in entries]).to(self.device)

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Targets (B, H, W, 3) -> scaled latents (B, C, H/8, W/8), fp32: the mean of the VAE's posterior."""
        return self.encoded(batch.targets) if batch.latents is None else batch.latents.to(self.device)

    @torch.no_grad()
    def encoded(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in 0..1 -> scaled latents, as in `latents`."""

        def encode(parts: Sequence[Tensor]) -> list[Entry]:
            vae = self.base.vae
            pixels = torch.stack(list(parts)).permute(0, 3, 1, 2).to(self.device, vae.dtype) * 2 - 1
            out = vae.encode(pixels)
            # Kinds of VAEs differ in what they call it: KL, Tiny, DC.
            found = out.latent_dist.mode() if "latent_dist" in out else out["latents" if "latents" in out else "latent"]
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            return [{"latents": row.float()} for row in (found - shift) * vae.config.scaling_factor]

        entries = self._cached("vae", list(pictures), _pixels, encode)
        return torch.stack([entry["latents"] for entry in entries]).to(self.device)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> text tokens (B, T, D), and SDXL's pooled vector (B, D') or None."""

        def encode(parts: Sequence[str]) -> list[Entry]:
            out = self.base.pipeline.encode_prompt(
                prompt=list(parts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            rows = [{"text": row.to(self.dtype)} for row in out[0]]
            if len(out) == 4:  # SDXL: prompt, negative, pooled, negative pooled
                rows = [{**row, "pooled": pooled.to(self.dtype)} for row, pooled in zip(rows, out[2], strict=True)]
            return rows

        entries = self._cached("text", list(prompts), str.encode, encode)
        text = torch.stack([entry["text"] for entry in entries]).to(self.device)
        pooled = torch.stack([e["pooled"] for e in entries]).to(self.device) if "pooled" in entries[0] else None
        return text, pooled

    def _cached(
        self,
        kind: str,
        parts: list[Part],
        content: Callable[[Part], bytes],
        encode: Callable[[list[Part]], list[Entry]],
    ) -> list[Entry]:
        """`encode`'s entries of the parts. With a cache each different part is encoded once, if it is not known yet."""
        if not parts:
            return []
        if self.cache is None:
            return encode(parts)
        salt = f"{self._salt} {kind} {self.dtype}\n".encode()
        keys = [hashlib.blake2b(salt + content(part), digest_size=20).hexdigest() for part in parts]
        found = {key: self.cache.get(key) for key in keys}
        new = {key: part for key, part in zip(keys, parts, strict=True) if found[key] is None}
        if new:
            for key, entry in zip(new, encode(list(new.values())), strict=True):
                entry = {name: tensor.cpu().contiguous() for name, tensor in entry.items()}
                self.cache.put(key, entry)
                found[key] = entry
        return [cast(Entry, found[key]) for key in keys]


def make_cache(kind: str, gigabytes: float, folder: Path) -> Cache | None:
    """The cache that a config names: "none", "memory" or "disk"."""
    if kind == "none":
        return None
    return MemoryCache(gigabytes) if kind == "memory" else DiskCache(folder)


def _pixels(image: Tensor) -> bytes:
    return repr(tuple(image.shape)).encode() + (image * 255).round().to(torch.uint8).numpy().tobytes()
