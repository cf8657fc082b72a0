"""Nested attention inside ComfyUI: applying subjects to a MODEL, and the attn2 replacements while it samples.

Applying is a value: `apply_subject` clones MODEL and CLIP and puts one more immutable `Application` into the clone's
attachment. No patch object is installed then, so nothing can leak between clones, branches or runs, and packs that
come later find the model as if we were not there.

Everything else lives as long as one sampling run (`_Run`, made by the OUTER_SAMPLE wrapper): K̈ and V̈ of the
subjects, which rows of which prompt they are bound to, resized masks. A wrapper on CALC_COND_BATCH decides once per
step which subjects act; one on APPLY_MODEL puts attn2 replacements into that call's own options, around whatever
replacements other packs and hooks have there by then: those compute the first term, the subjects add theirs (see
`nested_core.attention`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.hooks import EnumHookType
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention import Attend, NestedTerm, ValueNorm, nested_delta, one_hot_values, scaled_dot_product
from ..checkpoint import load_encoder
from ..encoder import EncoderConfig, NestedEncoder
from ..errors import NestedAttentionError
from ..layers import FAMILIES, CrossAttentionLayer, Family, family_of
from ..maps import Query, Seen
from ..schedule import Schedule, step_of
from ..subject import Subject
from .comfy_prompt import Placeholder, Places, bind_clip, places_in_conditioning
from .comfy_recording import Recorder, Recording
from .comfy_regions import Regions, Separation

KEY = "nested_attention"
SEPARATION_KEY = "nested_attention_separation"
RECORDING_KEY = "nested_attention_recording"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HostEncoder:
    """NESTED_ENCODER: an encoder that the host loads, offloads and counts.

    name: how the user knows it (the file's name in the loader).
    """

    patcher: comfy.model_patcher.ModelPatcher
    config: EncoderConfig
    name: str

    @property
    def module(self) -> NestedEncoder:
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class View:
    """What the encoder was shown: the square `seen` (1, S, S, 3), and its features (1, T, E) or, pooled, (1, E)."""

    seen: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class HostSubject:
    """NESTED_SUBJECT: a subject together with the encoder that made it.

    views: one for each of the encoder's runs, in the order of the tokens, for Explain Point. Empty for a subject from a
    file, which holds no photos.
    """

    encoder: HostEncoder
    subject: Subject
    views: tuple[View, ...] = ()


@dataclass(frozen=True, eq=False)
class Application:
    """One subject as applied to a model.

    strength: w, 1 is the paper. start, end: window of the sampling steps, in percent of the noise schedule (0 to 1).
    alpha, value_norm: equation (4). focus: weight of the token's logit. mask: where the subject may act, (M, H, W)
    over the whole picture, one or one per image. layer_weights: factor on the strength per layer, in the order of
    `unet_layers_of`. skip_unmentioned: let a run pass in which no positive prompt mentions the subject. separation: σ,
    how far it yields where another subject is looked at more. schedule: how the strength moves over
    the steps.
    """

    source: HostSubject
    placeholder: Placeholder
    strength: float
    start: float
    end: float
    alpha: float
    value_norm: ValueNorm
    focus: float
    mask: Tensor | None
    layer_weights: tuple[float, ...]
    skip_unmentioned: bool
    separation: float = 0.0
    schedule: Schedule | None = None

    @property
    def idle(self) -> bool:
        """Whether it can't change any picture."""
        return self.strength == 0 or self.start >= self.end or not any(self.layer_weights)


def load_host_encoder(path: str, name: str, **overrides: Any) -> HostEncoder:
    """Read an encoder file into a patcher. `overrides`: image_features, value_norm, alpha, pooled; None is the file's.

    Raises NestedAttentionError as `nested_core.checkpoint.read_encoder` does.
    """
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_fp16(device):
        dtype = torch.float16
    elif comfy.model_management.should_use_bf16(device):
        dtype = torch.bfloat16
    else:
        dtype = torch.float32
    module = load_encoder(path, operations=comfy.ops.manual_cast, dtype=dtype, **overrides)
    # The host's own choice of patcher: with dynamic VRAM, weights come to the device as they are used.
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    log.info("%s: %s", name, module.config.title)
    return HostEncoder(patcher, module.config, name)


def encode_tokens(encoder: HostEncoder, features: Tensor) -> Tensor:
    """Subject tokens (1, B·N, C) of a batch of views, from the vision tower's features (B, T, E) or (B, E)."""
    comfy.model_management.load_models_gpu([encoder.patcher])
    module = encoder.module
    dtype = next(module.parameters()).dtype
    tokens = module.encode(features.to(encoder.patcher.load_device, dtype))
    return tokens.flatten(0, 1)[None].to(comfy.model_management.intermediate_device())


def unet_layers_of(model: comfy.model_patcher.ModelPatcher) -> tuple[Family, tuple[CrossAttentionLayer, ...]]:
    """The family of a MODEL and its cross-attention layers as they are, in diffusers' order.

    Raises NestedAttentionError naming the model when it is not an SDXL base or SD 1.5 U-Net.
    """
    unet = getattr(model.model, "diffusion_model", None)
    present: dict[tuple[str, int, int], tuple[int, int]] = {}  # address -> (channels, width of the text it reads)
    for kind in ("input", "middle", "output"):
        blocks = getattr(unet, "middle_block" if kind == "middle" else f"{kind}_blocks", ())
        # The host counts the middle as one block, whatever its number of modules.
        for number, block in enumerate([blocks] if kind == "middle" else blocks):
            for module in block if blocks else ():
                for i, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                    attn2 = getattr(transformer, "attn2", None)
                    if attn2 is not None:
                        present[kind, number, i] = (attn2.to_q.out_features, attn2.to_k.in_features)
    text_width = {width for _, width in present.values()}
    for family in FAMILIES.values():
        layers = family.layers()
        if {layer.block for layer in layers} == set(present) and text_width == {family.context_dim}:
            return family, tuple(
                CrossAttentionLayer(layer.index, layer.diffusers, layer.block, present[layer.block][0])
                for layer in layers
            )
    found = f"{len(present)} cross-attention layers" if present else "no U-Net cross-attention"
    reads = f" reading text of width {', '.join(map(str, sorted(text_width)))}" if text_width else ""
    raise NestedAttentionError(
        f"This model ({type(model.model).__name__}) has {found}{reads}. Nested Attention works with SDXL base models "
        "(70 layers, text width 2048) and SD 1.5 (16 layers, text width 768): load such a checkpoint."
    )


def check_encoder_fits(
    encoder: HostEncoder, model: comfy.model_patcher.ModelPatcher
) -> tuple[Family, tuple[CrossAttentionLayer, ...]]:
    """The model's family and layers, once it is clear that the encoder was made for such a model.

    Raises NestedAttentionError naming both when it was not.
    """
    family, layers = unet_layers_of(model)
    config = encoder.config
    if config.family != family.name:
        made_for = family_of(config.family).title
        raise NestedAttentionError(
            f"The encoder {encoder.name} is for {made_for}, the model ({type(model.model).__name__}) is "
            f"{family.title}. Load an encoder for {family.title}, or a {made_for} checkpoint."
        )
    widths = tuple(layer.width for layer in layers)
    if config.widths != widths:
        differing = next(i for i, (a, b) in enumerate(zip(config.widths, widths, strict=True)) if a != b)
        raise NestedAttentionError(
            f"The encoder {encoder.name} and the model are both {family.title} but of other widths: layer "
            f"{layers[differing].diffusers} has {widths[differing]} channels, the encoder was made for "
            f"{config.widths[differing]}. Use the encoder with the base model that it was trained on."
        )
    return family, layers


def applications_of(model: comfy.model_patcher.ModelPatcher) -> tuple[Application, ...]:
    """The subjects applied to a MODEL, in order."""
    return model.get_attachment(KEY) or ()


def apply_subject(
    model: comfy.model_patcher.ModelPatcher, clip: Any, application: Application
) -> tuple[comfy.model_patcher.ModelPatcher, Any]:
    """Clones of MODEL and CLIP with one more subject; the originals are untouched.

    Raises NestedAttentionError: encoder and model don't fit; the placeholder is taken; the CLIP is unsupported.
    """
    check_encoder_fits(application.source.encoder, model)
    applied = applications_of(model)
    if application.placeholder.key in {a.placeholder.key for a in applied}:
        raise NestedAttentionError(
            f"A subject with the placeholder {application.placeholder.text} is already applied to this model. Give "
            "each subject its own in Encode Subject or Load Subject, for example <anna> and <ben>, and use both in "
            "the prompt."
        )
    clip = bind_clip(clip, application.placeholder)
    return _with_attachment(model, KEY, (*applied, application)), clip


def adjust_subjects(
    model: comfy.model_patcher.ModelPatcher, placeholder: str, change: Callable[[Application], Application]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL in which the subject of a placeholder, or every subject where that is empty, is changed.

    Raises NestedAttentionError when there is no such subject, naming those that are there.
    """
    applied = applications_of(model)
    key = placeholder.strip().lower()
    if not applied:
        raise NestedAttentionError(
            "No subject is applied to this model: connect the model that comes out of Apply Subject."
        )
    if key and key not in {a.placeholder.key for a in applied}:
        raise NestedAttentionError(
            f"No subject with the placeholder {placeholder.strip()} is applied to this model. There "
            f"{'is' if len(applied) == 1 else 'are'} {', '.join(a.placeholder.text for a in applied)}. Leave the "
            "placeholder empty to adjust all of them."
        )
    changed = tuple(change(a) if key in ("", a.placeholder.key) else a for a in applied)
    return _with_attachment(model, KEY, changed)


def separate_subjects(
    model: comfy.model_patcher.ModelPatcher, separation: Separation
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL whose subjects, those before and those to come, do not look at each other in self-attention."""
    unet_layers_of(model)
    return _with_attachment(model, SEPARATION_KEY, separation)


def record_attention(model: comfy.model_patcher.ModelPatcher, recording: Recording) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL whose runs leave in `recording` where its subjects' words were looked at."""
    unet_layers_of(model)
    return _with_attachment(model, RECORDING_KEY, recording)


def _with_attachment(model: comfy.model_patcher.ModelPatcher, key: str, value: Any) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL with a value of ours, which our wrapper around its sampling reads."""
    model = model.clone()
    model.set_attachments(key, value)
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    return model


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: everything a run needs is made here and gone when it ends, fails or is interrupted."""
    guider = executor.class_obj
    recording = guider.model_patcher.get_attachment(RECORDING_KEY)
    if recording is not None:
        recording.run = None
    applications = tuple(a for a in applications_of(guider.model_patcher) if not a.idle)
    if not applications:
        return executor(*args, **kwargs)
    noise = args[0] if args else kwargs["noise"]
    with _sampling_run(guider, applications, noise.shape):
        return executor(*args, **kwargs)


@contextmanager
def _sampling_run(guider: Any, applications: tuple[Application, ...], shape: Sequence[int]) -> Iterator[None]:
    options = guider.model_options["transformer_options"]
    texts = _read_texts(guider.conds)
    # Couple packs bring texts that are in none of the guider's lists, by patches or by hooks that bring patches: there
    # all subjects stay in the run.
    elsewhere = bool(options.get("patches", {}).get("attn2_patch")) or any(
        entry.get("hooks") is not None and entry["hooks"].get_type(EnumHookType.TransformerOptions)
        for entries in guider.conds.values()
        for entry in entries
    )
    mentioned = _check_mentioned(texts, applications, elsewhere)
    applications = tuple(a for a in applications if elsewhere or a.placeholder.key in mentioned)
    # Sums are rounded in some order: with one of its own the picture does not depend on that of the nodes.
    applications = tuple(sorted(applications, key=lambda a: a.placeholder.key))
    if not applications:
        yield
        return
    run = _Run(guider.model_patcher, applications, texts, shape)
    # The guider's options are this run's own copy: what is put there ends with the run.
    wrappers = options.setdefault("wrappers", {})
    wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [run.calc_cond_batch]
    wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[KEY] = [run.apply_model]
    try:
        run.load()
        with _uncompiled():
            yield
        if run.recorder is not None:
            run.recorder.finish()
    finally:
        run.close()


def _uncompiled() -> AbstractContextManager[None]:
    """Compiled models run as they are written while subjects act.

    The host's compile node tells the compiler to ignore changes of the options in which replacements lie: a compiled
    layer would go on with the subjects of another step, or of another run.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled in this process
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _is_negative(name: str) -> bool:
    """Whether a guider's list of conditionings by that name is there to be steered away from."""
    return any(word in name.lower() for word in ("neg", "uncond", "empty"))


@dataclass(frozen=True)
class _Text:
    """One conditioning: its rows before the host repeats them, and where its placeholders stand.

    images: one `Places`, by lower-case placeholder, or one for each image where the batch has a prompt per image.
    """

    length: int
    images: tuple[Places, ...]

    @property
    def mentions(self) -> set[str]:
        return {key for places in self.images for key in places}


def _read_text(cond: Tensor, values: Mapping[str, Any], by_likeness: bool = True) -> _Text:
    """What a conditioning (1 or images, T, D) mentions."""
    images: list[Places] = [places_in_conditioning(cond[:1], values, by_likeness)]
    if len(cond) > 1:
        # A dictionary describes one text: those of the images are known by their rows.
        each = [places_in_conditioning(cond[i : i + 1], {}) for i in range(len(cond))]
        images = each if any(each) else images
    return _Text(cond.shape[1], tuple({key.lower(): rows for key, rows in places.items()} for places in images))


def _read_texts(conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[tuple[Tensor, _Text]]]:
    """The conditionings of a guider's lists, each with what it mentions."""
    return {
        name: [
            (entry["cross_attn"], _read_text(entry["cross_attn"], entry, by_likeness=not _is_negative(name)))
            for entry in entries
            if entry.get("cross_attn") is not None
        ]
        for name, entries in conds.items()
    }


def _check_mentioned(
    texts: Mapping[str, Sequence[tuple[Tensor, _Text]]], applications: Sequence[Application], elsewhere: bool
) -> set[str]:
    """Keys of the placeholders that the run's prompts mention.

    Raises NestedAttentionError when no positive prompt mentions a subject that has to be mentioned; with `elsewhere`
    (there are texts that can't be seen here) that is a warning.
    """
    found = {name: set().union(*(text.mentions for _, text in listed)) for name, listed in texts.items()}
    positive: set[str] = set().union(*(keys for name, keys in found.items() if not _is_negative(name)))
    for application in applications:
        text = application.placeholder.text
        if application.placeholder.key in positive or application.skip_unmentioned:
            continue
        if elsewhere:
            log.warning("No positive prompt mentions %s, unless a text that another node brings does.", text)
            continue
        others = ", ".join(sorted(positive)) or "no subject at all"
        raise NestedAttentionError(
            f"No positive prompt mentions {text}. Write {text} in the prompt where the subject belongs, for example "
            f'"a photo of {text} in a garden", in a text encode node whose CLIP comes from Apply Subject (not straight '
            f"from the checkpoint). The prompts mention {others}. To let such a run pass, use Apply Subject (Advanced) "
            "with when_unmentioned = skip."
        )
    return set().union(*found.values())


@dataclass(frozen=True)
class _Chunk:
    """What the sampler calls a chunk of a batch: a prompt, and the `area` (h, w, y, x) it is sampled in, if not all."""

    text: _Text | None
    area: tuple[int, ...] | None
    negative: bool


@dataclass(frozen=True)
class _Step:
    """What one CALC_COND_BATCH call knows."""

    active: dict[int, float]  # strengths by index of the run's applications
    chunks: dict[tuple[int, Any], _Chunk]  # (index of the conds list, uuid) -> chunk
    images: int
    grid: tuple[int, int]  # (height, width) of what is sampled: the whole latent, or a window of it
    window: _Window | None
    apart: tuple[int, ...]  # the applications that do not look at each other


@dataclass(frozen=True)
class _Window:
    """A context window of the host: indices of the whole latent along an axis (0 images, 2 rows, 3 columns)."""

    axis: int
    indices: tuple[int, ...]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Window | None:
        """The window that the host samples just now, where it does so by windows."""
        window = options.get("context_window")
        if window is None:
            return None
        before = getattr(window, "causal_anchor_index", None)  # one more in front, which newer hosts add
        lead = (before,) if before is not None and before >= 0 else ()
        return cls(window.dim, (*lead, *window.index_list))

    def cut(self, x: Tensor) -> Tensor:
        """What of a picture's x (images, 1, rows, columns) is in the window."""
        if self.axis == 0 and len(x) == 1:
            return x
        return x.index_select(self.axis, torch.tensor(self.indices, device=x.device))


@dataclass(frozen=True)
class _Part:
    """Rows of a batch that share one text. `tile`: they show neither the whole picture nor the chunk's area."""

    start: int
    stop: int
    length: int
    places: Places
    area: tuple[int, ...] | None
    tile: bool
    negative: bool

    def halved(self) -> _Part:
        """The same in front of a layer whose text has half the rows.

        Packs of the NegPip kind give every token a row for K and one for V, which a patch of theirs takes apart. Where
        places do not come in such pairs, somebody cut the text.
        """
        if any(row ^ 1 not in rows for rows in self.places.values() for row in rows):
            return self
        places = {name: tuple(sorted({row // 2 for row in rows})) for name, rows in self.places.items()}
        return replace(self, length=self.length // 2, places=places)


@dataclass(frozen=True)
class _Bound:
    """A part of a batch that mentions active subjects. places: {application: its indexes on the text axis}."""

    part: _Part
    places: dict[int, tuple[int, ...]]


def _clipped(area: Sequence[int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """An area (h, w, y, x) without what lies outside of the picture, as the host samples it."""
    h, w, y, x = area
    return min(h, grid[0] - y), min(w, grid[1] - x), y, x


class _Run:
    """One sampling run with its subjects."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        applications: tuple[Application, ...],
        texts: Mapping[str, Sequence[tuple[Tensor, _Text]]],
        shape: Sequence[int],
    ) -> None:
        self.model = model
        self.layers = unet_layers_of(model)[1]
        self.shape = shape  # of the whole latent, (images, channels, rows, columns)
        self.separation: Separation | None = model.get_attachment(SEPARATION_KEY)
        self.regions: Regions | None = None
        if self.separation is not None and self.separation.strength and len(applications) > 1:
            fixed = {i: a.mask for i, a in enumerate(applications) if a.mask is not None}
            self.regions = Regions(fixed, shape, model.load_device)
        self.recorder: Recorder | None = None
        recording = model.get_attachment(RECORDING_KEY)
        if recording is not None:
            self.recorder = Recorder(recording, applications, self.layers, shape)
        self.applications = applications
        sampling = model.get_model_object("model_sampling")

        def window(of: Application | Separation) -> tuple[float, float]:
            return sampling.percent_to_sigma(of.start), sampling.percent_to_sigma(of.end)

        self.windows = [window(a) for a in applications]
        self.apart_window = (0.0, 0.0) if self.separation is None else window(self.separation)
        self.keys_values: list[list[tuple[Tensor, Tensor] | None]] = []  # per application and layer, (1, N, C) each
        self.log_weights: list[Tensor | None] = []
        self.moved: dict[Any, Any] = {}  # tensors on the device and in the type of a layer, by what they are
        # By id of the conditioning tensor, which is kept alive.
        self.texts = {id(cond): (cond, text) for listed in texts.values() for cond, text in listed}
        # By name: guiders number their prompts as they like (DualCFG begins with the negative one).
        self.negatives = {id(cond) for name, listed in texts.items() if _is_negative(name) for cond, _ in listed}
        self.negatives -= {id(cond) for name, listed in texts.items() if not _is_negative(name) for cond, _ in listed}
        self.arranged: dict[Any, _Text] = {}  # texts by where they stand in a batch that another pack arranged

    def load(self) -> None:
        """Compute K̈ and V̈ of every subject, once for the run.

        Before the host loads the model: it may then put the encoder aside for it, and sees the room that K̈ and V̈
        take. So the encoder is none of the model's additional models, which stay as long as the model.
        """
        model = self.model.model
        dtype = model.get_dtype_inference() if hasattr(model, "get_dtype_inference") else model.get_dtype()
        for application in self.applications:
            encoder, subject = application.source.encoder, application.source.subject
            tokens, weights = subject.tokens, subject.token_weights
            if weights is not None:
                tokens, weights = tokens[:, weights > 0], weights[weights > 0]
            room = 2 * tokens.shape[1] * sum(layer.width for layer in self.layers) * dtype.itemsize
            comfy.model_management.load_models_gpu([encoder.patcher], memory_required=room)
            module, device = encoder.module, encoder.patcher.load_device
            tokens = tokens.to(device, next(module.parameters()).dtype)
            pairs: list[tuple[Tensor, Tensor] | None] = []
            for layer, weight in zip(self.layers, application.layer_weights, strict=True):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if weight == 0:
                    pairs.append(None)
                    continue
                key, value = module.keys_values(tokens, layer.index)
                pairs.append((key.to(self.model.load_device, dtype), value.to(self.model.load_device, dtype)))
            self.keys_values.append(pairs)
            self.log_weights.append(None if weights is None else weights.log())

    def close(self) -> None:
        """Give back everything the run holds."""
        self.keys_values.clear()
        self.log_weights.clear()
        self.moved.clear()
        self.texts.clear()
        self.negatives.clear()
        self.arranged.clear()
        self.regions = None
        self.recorder = None

    # -- once per step ------------------------------------------------------------------------------------------

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Any:
        """CALC_COND_BATCH wrapper: which subjects act in this step, and which prompt has them where."""
        options = model_options.get("transformer_options", {})
        sigma = float(timestep[0])  # waits for the device: read once
        step, steps = self._step_of(sigma, options.get("sample_sigmas"))
        active = self._strengths(sigma, step, steps)
        if self.recorder is not None:
            self.recorder.begin_step(step, steps)
        if active:
            grid, window = (x_in.shape[-2], x_in.shape[-1]), _Window.of(options)
            chunks = {
                (i, entry["uuid"]): _Chunk(
                    self._text(entry, (i, window)),
                    _clipped(entry["area"], grid) if "area" in entry else None,
                    self._is_negative(entry, i),
                )
                for i, listed in enumerate(conds)
                for entry in listed or ()
            }
            apart: tuple[int, ...] = ()
            if self.regions is not None:
                if window is not None:
                    raise _not_apart("samples it in context windows")
                self.regions.turn()
                if self.apart_window[1] <= sigma <= self.apart_window[0]:
                    apart = tuple(i for i in active if i in self.regions.known)
            known = _Step(active, chunks, x_in.shape[0], grid, window, apart if len(apart) > 1 else ())
            options = {**options, KEY: known}
            model_options = {**model_options, "transformer_options": options}
        return executor(model, conds, x_in, timestep, model_options)

    def _strengths(self, sigma: float, step: float, steps: int) -> dict[int, float]:
        """The subjects that act at a noise level, which is a step of so many, with their strengths."""
        strengths = {}
        for i, (application, (start, end)) in enumerate(zip(self.applications, self.windows, strict=True)):
            factor = application.schedule.factor(step, steps) if application.schedule else 1.0
            if end <= sigma <= start and application.strength * factor != 0:
                strengths[i] = application.strength * factor
        return strengths

    def _step_of(self, sigma: float, sigmas: Tensor | None) -> tuple[float, int]:
        """Which of how many steps a noise level is, where anything asks for that."""
        if sigmas is None or (self.recorder is None and not any(a.schedule for a in self.applications)):
            return 0.0, 1
        # Samplers that run in parts bring others: known by what they are, read from the device once.
        levels = self._moved(("sigmas", id(sigmas)), lambda: (sigmas, sigmas.tolist()))[1]
        return step_of(sigma, levels)

    def _is_negative(self, entry: Mapping[str, Any], index: int) -> bool:
        """Whether an entry of list `index` is there to be steered away from."""
        cross_attention = entry.get("model_conds", {}).get("c_crossattn")
        if cross_attention is None or id(cross_attention.cond) not in self.texts:
            return index == 1
        return id(cross_attention.cond) in self.negatives

    def _text(self, entry: Mapping[str, Any], at: tuple[int, _Window | None]) -> _Text | None:
        """The text that an entry is sampled with. Its dictionary may be another's: where areas need an opposite, the
        host copies dictionary, area and uuid of one prompt onto the tensor of another.

        at: index of the list the entry is in, and the window it is cut to. Windows of images have texts of their own,
        made anew in every step.
        """
        cross_attention = entry.get("model_conds", {}).get("c_crossattn")
        if cross_attention is None:
            return None
        cond = cross_attention.cond
        if id(cond) not in self.texts and at[1] is not None:
            key = ("window", *at, entry["uuid"], tuple(cond.shape))
            if key not in self.arranged:
                self.arranged[key] = _read_text(cond, {})
            return self.arranged[key]
        if id(cond) not in self.texts:
            self.texts[id(cond)] = (cond, _read_text(cond, {}))
        return self.texts[id(cond)][1]

    # -- once per call of the model -----------------------------------------------------------------------------

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> Any:
        """APPLY_MODEL wrapper: our attn2 replacements around those that are there by now, hooks' ones among them."""
        step = transformer_options.get(KEY)
        options = dict(transformer_options)
        if step is not None and c_crossattn is not None:
            parts = self._parts(step, x, c_crossattn, options)
            call = _Call(self, step, parts, c_crossattn.shape[1])
            if any(self._bound(step, part) for part in parts) or options.get("patches", {}).get("attn2_patch"):
                options = self._with_patches(options, call)
            if step.apart:
                options = self._with_bounds(options, _Bounds(self, step, options, x))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _parts(self, step: _Step, x: Tensor, context: Tensor, options: Mapping[str, Any]) -> list[_Part]:
        """Which text stands in which rows of a batch x (rows, channels, h, w) with its texts `context` (rows, T, D)."""
        keys = list(zip(options["cond_or_uncond"], options["uuids"], strict=True))
        chunks = [step.chunks.get(key, _Chunk(None, None, False)) for key in keys]
        shape = tuple(x.shape[-2:])
        parts = []
        if len(x) != len(chunks) * step.images:
            # Another pack arranged the rows anew (tiles, mostly): each is known by its text, read once a run.
            for row in range(len(x)):
                text = self._arranged_text((tuple(options["uuids"]), row, tuple(context.shape)), context[row])
                parts.append(_Part(row, row + 1, text.length, text.images[0], None, True, False))
            return parts
        for number, chunk in enumerate(chunks):
            if chunk.text is None:
                continue
            tile = shape != (step.grid if chunk.area is None else tuple(chunk.area[:2]))
            start, images = number * step.images, chunk.text.images
            rows = [(start, start + step.images)]
            if len(images) > 1:
                rows = [(start + i, start + i + 1) for i in range(step.images)]
            for i, (first, last) in enumerate(rows):
                places = images[i % len(images)]
                parts.append(_Part(first, last, chunk.text.length, places, chunk.area, tile, chunk.negative))
        return parts

    def _arranged_text(self, at: Any, text: Tensor) -> _Text:
        if at not in self.arranged:
            self.arranged[at] = _read_text(text[None], {})
        return self.arranged[at]

    def coupled_parts(
        self, step: _Step, own_parts: Sequence[_Part], context: Tensor, kinds: Sequence[int], uuids: Any
    ) -> list[_Part]:
        """The parts after an attention-couple pack put further texts beside each positive one.

        kinds: what such packs record, an entry per part: 1 for the negative prompt, 0 for the positive one and then
        each of its regions. context: the texts as they go into the layer, (rows, T, D).
        """
        rows, each = len(context) // len(kinds), step.images
        own = iter(range(len(context) // each))
        by_start = {part.start // each: part for part in own_parts}
        parts, current, left = [], None, 0
        positives = sum(kind != 1 for kind in kinds)
        chunks = len(uuids)
        regions = positives // max(1, chunks - (len(kinds) - positives))
        for number, kind in enumerate(kinds):
            start, stop = number * rows, (number + 1) * rows
            if left == 0:
                current = by_start.get(next(own))
                left = 1 if kind == 1 else regions
                if current is not None:
                    parts.append(replace(current, start=start, stop=stop))
            else:
                text = self._arranged_text((tuple(uuids), "couple", number, tuple(context.shape)), context[start])
                area, tile = (current.area, current.tile) if current is not None else (None, False)
                parts.append(_Part(start, stop, text.length, text.images[0], area, tile, kind == 1))
            left -= 1
        return parts

    def _bound(self, step: _Step, part: _Part) -> dict[int, tuple[int, ...]]:
        """{application: its rows of the text} for the active subjects that a part mentions.

        Raises NestedAttentionError when two of them claim one place.
        """
        bound = {
            i: part.places[self.applications[i].placeholder.key]
            for i in step.active
            if self.applications[i].placeholder.key in part.places
        }
        taken: dict[int, str] = {}
        for i, places in bound.items():
            name = self.applications[i].placeholder.text
            for row in places:
                if taken.setdefault(row, name) != name:
                    raise NestedAttentionError(
                        f"{taken[row]} and {name} stand at the same place of a prompt that another node has rebuilt, "
                        "and their prompts read alike to the text encoder. Give the two subjects different class words "
                        '(such as "woman" and "man"), or encode with CLIP Text Encode.'
                    )
        return bound

    def _with_patches(self, options: dict[str, Any], call: _Call) -> dict[str, Any]:
        """A copy of the options with our replacements around the attn2 replacements that are there."""
        replaced = options.get("patches_replace", {})
        attn2 = dict(replaced.get("attn2", {}))
        for i, layer in enumerate(self.layers):
            # The host prefers the address with the transformer's index: one without it would never be called again.
            previous = attn2.get(layer.block) or attn2.get(layer.block[:2])
            attn2[layer.block] = _Attn2Replace(call, i, previous)
        patches = options.get("patches", {})
        return {
            **options,
            "patches_replace": {**replaced, "attn2": attn2},
            # After whatever changes queries and texts in front of the layer: see `coupled_parts`.
            "patches": {**patches, "attn2_patch": [*patches.get("attn2_patch", []), _note_context]},
        }

    def _with_bounds(self, options: dict[str, Any], bounds: _Bounds) -> dict[str, Any]:
        """A copy of the options with self-attention bounded in all layers that nobody else has replaced."""
        replaced = options.get("patches_replace", {})
        attn1 = dict(replaced.get("attn1", {}))
        for layer in self.layers:
            if layer.block not in attn1 and layer.block[:2] not in attn1:
                attn1[layer.block] = bounds
        return {**options, "patches_replace": {**replaced, "attn1": attn1}}

    # -- in the layers ------------------------------------------------------------------------------------------

    def bound_rows(self, step: _Step, parts: Sequence[_Part], text_length: int) -> list[_Bound]:
        """The parts that mention an active subject.

        text_length: rows of text that the batch has. The host repeats shorter prompts to the least common multiple of
        the batch; what is longer still was appended by somebody else and is not text.
        """
        bound = []
        for part in parts:
            copies = range(0, text_length, part.length)
            places = {
                i: tuple(start + row for start in copies for row in rows if start + row < text_length)
                for i, rows in self._bound(step, part).items()
            }
            places = {i: rows for i, rows in places.items() if rows}
            if places:
                bound.append(_Bound(part, places))
        return bound

    def _moved(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.moved:
            self.moved[key] = make()
        return self.moved[key]

    def _spatial(self, i: int, step: _Step, part: _Part, q: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The mask of an application on a layer's grid, (rows, Q)."""
        mask = self.applications[i].mask
        if mask is None:
            return None
        height, width = shape[-2:]
        if part.tile or height * width != q.shape[1]:
            raise NestedAttentionError(
                f"The mask of {self.applications[i].placeholder.text} can't be placed: another node samples the "
                f"picture in tiles or on another grid (here {height} x {width}, {q.shape[1]} queries). Apply the "
                "subject without a mask, or take that node out."
            )

        def resize() -> Tensor:
            if step.window is None:
                whole = F.interpolate(mask[:, None].float(), size=step.grid, mode="area")
            else:
                images = comfy.utils.repeat_to_batch_size(mask[:, None].float(), self.shape[0])
                whole = step.window.cut(F.interpolate(images, size=self.shape[-2:], mode="area"))
            if part.area is not None:
                h, w, y, x = part.area
                whole = whole[:, :, y : y + h, x : x + w]
            grid = F.interpolate(whole, size=(height, width), mode="area").flatten(1)
            return comfy.utils.repeat_to_batch_size(grid, step.images).to(q.device)

        key = ("mask", i, part.area, step.grid, step.window, height, width, step.images, q.device)
        images = self._moved(key, resize)
        first = part.start % step.images
        return images[first : first + len(q)]

    def add_subjects(
        self,
        out: Tensor,
        layer: int,
        step: _Step,
        bound: _Bound,
        qkv: tuple[Tensor, Tensor, Tensor],
        heads: int,
        attend: Attend,
        shape: Sequence[int],
    ) -> None:
        """Adds to a layer's output, in place, what the subjects of a part add. All tensors are of the part's rows."""
        q, k, v = qkv
        here = {i: places for i, places in bound.places.items() if self.keys_values[i][layer] is not None}
        if not here:  # their layer weights are 0
            return
        places = tuple(here.values())
        width = q.shape[-1] // heads
        one_hot = None
        if sum(map(len, places)) <= width:
            key = ("one hot", places, k.shape[1], width, k.dtype, k.device)
            one_hot = self._moved(
                key,
                lambda: one_hot_values(
                    torch.tensor([p for part in places for p in part], device=k.device), k.shape[1], width, k.dtype
                ),
            )
        terms = [self._term(i, at, layer, step, bound.part, q, shape) for i, at in here.items()]
        observe = None
        if not bound.part.negative and (self.regions is not None or self.recorder is not None):
            observe = partial(self._note, here, bound.part, step, shape, layer, q, v, heads)
        nested_delta(q, k, v, heads, terms, attend, into=out, one_hot=one_hot, observe=observe)

    def _note(
        self,
        here: Mapping[int, tuple[int, ...]],
        part: _Part,
        step: _Step,
        shape: Sequence[int],
        layer: int,
        q: Tensor,
        v: Tensor,
        heads: int,
        prob: Tensor,
    ) -> None:
        """Keeps where the words of subjects are looked at: prob (rows, Q, H, all their places) of one layer."""
        grid, first = (shape[-2], shape[-1]), part.start % step.images
        hidden = part.tile or step.window is not None or grid[0] * grid[1] != prob.shape[1]
        if hidden and self.regions is not None:
            raise _not_apart("samples the picture in tiles, or on another grid")
        if hidden:
            return
        start = 0
        for i, places in here.items():
            seen = prob[..., start : start + len(places)].sum(-1).mean(-1)
            start += len(places)
            if self.regions is not None:
                self.regions.note(i, first, seen, grid, part.area)
            if self.recorder is None or not self.recorder.open:
                continue
            self.recorder.note(Seen(self.recorder.step, layer, i, first, seen.unflatten(1, grid), part.area))
            if self.recorder.explain_now and layer in self.recorder.explained:
                at = self._moved(("places", places, q.device), partial(torch.tensor, places, device=q.device))
                replaced = v[0].index_select(0, at).float().mean(0)
                query = Query(self.recorder.step, layer, i, first, q, replaced, heads, grid, part.area)
                self.recorder.note_query(query)

    def _term(
        self, i: int, places: tuple[int, ...], layer: int, step: _Step, part: _Part, q: Tensor, shape: Sequence[int]
    ) -> NestedTerm:
        pair = self.keys_values[i][layer]
        assert pair is not None
        if pair[0].device != q.device or pair[0].dtype != q.dtype:
            original = pair
            pair = self._moved(
                ("kv", i, layer, q.device, q.dtype), lambda: tuple(t.to(q.device, q.dtype) for t in original)
            )
        application, weights = self.applications[i], self.log_weights[i]
        if weights is not None:
            weights = self._moved(("weights", i, q.device), partial(weights.to, q.device))
        return NestedTerm(
            key=pair[0],
            value=pair[1],
            places=self._moved(("places", places, q.device), partial(torch.tensor, places, device=q.device)),
            strength=step.active[i] * application.layer_weights[layer],
            alpha=application.alpha,
            value_norm=application.value_norm,
            focus=application.focus,
            spatial=self._spatial(i, step, part, q, shape),
            separation=application.separation,
            log_weights=weights,
        )


def _not_apart(what: str) -> NestedAttentionError:
    return NestedAttentionError(
        f"Separate Subjects can't tell where the subjects are: another node {what}. Take one of the two nodes out, or "
        "give the subjects masks in Apply Subject and leave Separate Subjects out."
    )


class _Bounds:
    """attn1 replacement of all layers in one call: subjects do not look at each other."""

    def __init__(self, run: _Run, step: _Step, options: Mapping[str, Any], x: Tensor) -> None:
        assert run.regions is not None and run.separation is not None
        self.regions, self.strength, self.subjects = run.regions, run.separation.strength, step.apart
        keys = zip(options["cond_or_uncond"], options["uuids"], strict=True)
        chunks = [step.chunks.get(key) for key in keys]
        self.areas = [chunk.area if chunk else None for chunk in chunks]
        self.rows = len(x)
        height, width = x.shape[-2:]
        fits = all((height, width) == (step.grid if area is None else tuple(area[:2])) for area in self.areas)
        if not fits or self.rows != len(chunks) * step.images:
            raise _not_apart("samples the picture in tiles")
        self.run, self.images = run, step.images
        self._made: dict[Any, Tensor] = {}

    def _bias(self, q: Tensor, shape: tuple[int, int], area: tuple[int, ...] | None) -> Tensor:
        """(images, Q, Q), made once a call; once a run where all regions are masks."""
        always = self.regions.fixed.issuperset(self.subjects)
        made = self.run.moved if always else self._made
        key = ("apart", self.subjects, shape, area, q.device, q.dtype)
        if key not in made:
            bias = self.regions.bias(self.subjects, self.strength, shape, area, q.device)
            made[key] = bias.to(q.dtype)
        return made[key]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        height, width = extra_options["activations_shape"][-2:]
        if len(q) != self.rows or not q.shape[1] == k.shape[1] == height * width:
            raise _not_apart("changes what self-attention sees (HyperTile and token merging do)")
        heads, parts = extra_options["n_heads"], []
        for number, area in enumerate(self.areas):
            rows = slice(number * self.images, (number + 1) * self.images)
            parts.append(scaled_dot_product(q[rows], k[rows], v[rows], heads, self._bias(q, (height, width), area)))
        return torch.cat(parts)


_CONTEXT = "nested_attention_context"


def _note_context(n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any]) -> Any:
    """attn2_patch that changes nothing: the replacement of the same layer gets to see the text before W_K."""
    extra_options[_CONTEXT] = context
    return n, context, value


class _Call:
    """One call of the model: what its 70 or 16 replacements share."""

    def __init__(self, run: _Run, step: _Step, parts: list[_Part], text_length: int) -> None:
        self.run, self.step, self.parts, self.text_length = run, step, parts, text_length
        self._rows: dict[Any, list[_Bound]] = {}

    def rows(self, q: Tensor, extra_options: Mapping[str, Any]) -> list[_Bound]:
        """Where subjects are bound in a layer's rows. Found once a call."""
        kinds = extra_options.get("cond_or_uncond_couple") or extra_options.get("cond_or_uncond_hook_couple")
        context = extra_options[_CONTEXT]
        key = (tuple(kinds) if kinds else None, q.shape[0], context.shape[1])
        if key not in self._rows:
            parts, length = self.parts, min(self.text_length, context.shape[1])
            if context.shape[1] * 2 == self.text_length:
                parts = [part.halved() for part in parts]
            if kinds and len(kinds) != len(extra_options["cond_or_uncond"]):
                parts = self.run.coupled_parts(self.step, parts, context, kinds, extra_options["uuids"])
                length = context.shape[1]
            self._rows[key] = self.run.bound_rows(self.step, parts, length)
        return self._rows[key]


class _Attn2Replace:
    """attn2 replacement of one layer in one call. The host calls it with projected q, k, v (B, Q | T, C)."""

    def __init__(self, call: _Call, layer: int, previous: Callable[..., Tensor] | None) -> None:
        self.call, self.layer, self.previous = call, layer, previous

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        heads, precision = extra_options["n_heads"], extra_options.get("attn_precision")

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
            if mask is not None:  # not every backend of the host takes one; PyTorch's always does
                return scaled_dot_product(q, k, v, heads, mask)
            return host_attention.optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )

        out = self.previous(q, k, v, extra_options) if self.previous else attend(q, k, v, heads)
        # What others computed may be theirs to keep, and gradients may need it: only our own is changed in place.
        ours = self.previous is None and "optimized_attention_override" not in extra_options and not out.requires_grad
        for bound in self.call.rows(q, extra_options):
            if not ours:
                out, ours = out.clone(), True
            rows = slice(bound.part.start, bound.part.stop)
            self.call.run.add_subjects(
                out[rows],
                self.layer,
                self.call.step,
                bound,
                (q[rows], k[rows], v[rows]),
                heads,
                attend,
                extra_options["activations_shape"],
            )
        return out
