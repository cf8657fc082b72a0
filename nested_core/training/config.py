"""What a training run is told, checked as soon as it is said. Every field is an option of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from ..attention import ValueNorm
from ..errors import NestedAttentionError
from ..resampler import ResamplerShape

Method = Literal["nested", "decoupled"]
Features = Literal["penultimate", "last"]
LayerInit = Literal["auto", "file", "unet", "random", "zero"]
Schedule = Literal["constant", "cosine", "linear"]
OptimiserKind = Literal["adamw", "adamw8bit"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
CacheKind = Literal["none", "memory", "disk"]
Layout = Literal["subjects", "pictures", "kohya"]


def _check_choices(section: Any) -> None:
    """Raises NestedAttentionError for a field that is none of its type's literals."""
    for name, hint in get_type_hints(type(section)).items():
        choices = get_args(hint)
        value = getattr(section, name)
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            raise NestedAttentionError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def _check_range(
    section: Any, names: Iterable[str], low: float, high: float = float("inf"), open_: bool = False
) -> None:
    """Raises NestedAttentionError for a number outside low..high (without `low` itself where `open_`)."""
    for name in names:
        value = getattr(section, name)
        if value is None:
            continue
        if not (low < value <= high if open_ else low <= value <= high):
            above = f"above {low:g}" if open_ else f"{low:g} or more"
            upto = "" if high == float("inf") else f", at most {high:g}"
            raise NestedAttentionError(f"{name} is {value}; expected a number {above}{upto}.")


@dataclass
class BaseConfig:
    """The frozen models.

    Attributes:
        model: a diffusers folder, a single-file checkpoint or a hub id.
        family: sdxl or sd15; "auto" reads it off the U-Net. A single-file checkpoint is taken for SDXL unless this
            says otherwise. For a U-Net of the same kind but with other layers: a .json file that describes it.
        vision: the CLIP vision tower: a transformers folder, a .safetensors file as in ComfyUI's models/clip_vision,
            or a hub id.
        dtype: of the frozen weights: float32, bfloat16 or float16; "auto" is the precision's on a GPU, else float32.
        variant: of the weights, as diffusers names it ("fp16").
    """

    model: str = ""
    family: str = "auto"
    vision: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    variant: str | None = None

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass
class DataConfig:
    """Where examples come from and how they are prepared. Layout: docs/training.md.

    Attributes:
        folders: folders of pictures, as `layout` says, or of a data set that `datasets` saved to disk.
        shards: webdataset shards: paths or addresses, braces expanded ("data/{0000..0041}.tar").
        shard_cache: folder that shards with an address are copied to.
        layout: what is one subject. "subjects": a folder of pictures. "pictures": every picture is a subject of its
            own. "kohya": a folder named by repeats and class word ("10_golden retriever"). A column of metadata.jsonl
            that says the subject wins over it.
        class_word: what subjects are, where nothing else says so (class.txt, metadata.jsonl, kohya's folder).
        placeholder: the word in captions that stands for the subject; captions may also use the class word itself.
        captions: for pictures whose own caption does not mention the subject, or who have none. "{subject}" becomes
            the placeholder, "{caption}" the picture's own caption; those with it are for pictures that have one. One
            is drawn each time.
        caption_column: of metadata.jsonl and `datasets`: the caption, or several.
        subject_column: of the same: who it is.
        class_column: of the same: the class word.
        broken: at a picture that can't be read: "stop", or "skip" it, naming it once.
        resolution: side of the square target picture, in pixels; a multiple of 8.
        crop: of targets that are not square: random or centre.
        reference: where the picture that the encoder is shown comes from, unless one is said (01.reference.png):
            "others", the subject's other pictures, or the target itself, augmented, where there are none; "self",
            always the target itself, cut to the subject by its landmarks, box or mask, as in the paper.
        margin: room around what a reference is cut to (a face's square, a box, a mask), in sides of it.
        references: pictures of a subject that are shown per example, at most; fewer where it has fewer. A random
            number from 1 to this where `vary_references`.
        vary_references: see `references`.
        fit: how a reference becomes the square that the vision tower sees, as in Encode Subject: crop or pad.
        use_masks: paint over what lies outside a reference's mask, where it has one. If not, it is cut to the mask.
        augment: share of references that are augmented (cropped, mirrored, colours shifted). Where target and
            reference are the same picture and it is not cut, always.
        flip: share of examples whose target is mirrored.
    """

    folders: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    shard_cache: str = "shard_cache"
    layout: Layout = "subjects"
    class_word: str = ""
    placeholder: str = "<subject>"
    captions: list[str] = field(default_factory=list)
    caption_column: str = "text"
    subject_column: str = "subject"
    class_column: str = "class"
    broken: Literal["stop", "skip"] = "stop"
    resolution: int = 1024
    crop: Literal["random", "centre"] = "random"
    reference: Literal["others", "self"] = "others"
    margin: float = 0.0
    references: int = 1
    vary_references: bool = False
    fit: Literal["crop", "pad"] = "crop"
    use_masks: bool = True
    augment: float = 0.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, ("resolution", "references"), 1)
        _check_range(self, ("augment", "flip"), 0, 1)
        _check_range(self, ("margin",), 0, 4)
        if self.resolution % 8:
            raise NestedAttentionError(f"resolution is {self.resolution}; expected a multiple of 8 (the VAE's step).")
        for caption in self.captions:
            if "{subject}" not in caption:
                raise NestedAttentionError(
                    f'data.captions has "{caption}", which does not say where the subject stands: write {{subject}} '
                    'into it, as in "a photo of {subject}".'
                )


@dataclass
class EncoderSettings:
    """What is trained, and what the exported file says about it.

    Attributes:
        method: "nested", or the baseline "decoupled": the subject's attention is added to the text's, as in
            IP-Adapter, bound to no word.
        tokens: N, subject tokens per picture.
        token_dim: width of a subject token; None: the width of the text tokens.
        image_features: which hidden states of the vision tower are read: penultimate or last.
        dim: width inside the Q-Former.
        depth: its layers.
        heads: its attention heads.
        dim_head: their channels.
        ff_mult: width of its feed-forwards, as a multiple of dim.
        positions: rows of a learned position embedding that is added to the features, as many as there are features or
            more (257 for CLIP ViT-H/14); 0: none.
        mean_pooled: how many of the tokens begin as the mean of the features, seen through a matrix of their own.
        bias: whether K̈ and V̈ have one.
        value_norm: what equation (4) rescales v* to: match, match_per_head, unit or none.
        alpha: α of equation (4); for the decoupled method the factor on its attention.
        learn_alpha: train α too, as one number, from `alpha` on.
        base_model: the base model in words, for the file; empty: the name of the folder or file.
        licence: of the trained weights, in words.
        title: one line about the encoder.
    """

    method: Method = "nested"
    tokens: int = 1024
    token_dim: int | None = None
    image_features: Features = "penultimate"
    dim: int = 2048
    depth: int = 4
    heads: int = 12
    dim_head: int = 64
    ff_mult: int = 4
    positions: int = 0
    mean_pooled: int = 0
    bias: bool = False
    value_norm: ValueNorm = "match"
    alpha: float = 2.0
    learn_alpha: bool = False
    base_model: str = ""
    licence: str = "unknown"
    title: str = ""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, ("tokens", "token_dim", "dim", "depth", "heads", "dim_head", "ff_mult"), 1)
        _check_range(self, ("positions", "mean_pooled"), 0)
        _check_range(self, ("alpha",), 0, open_=True)

    def resampler(self) -> ResamplerShape:
        """The sizes of the Q-Former."""
        return ResamplerShape(**{field.name: getattr(self, field.name) for field in fields(ResamplerShape)})


@dataclass
class InitConfig:
    """Where the trained weights start.

    Attributes:
        encoder: an encoder file to start from: of an earlier run, or an IP-Adapter Plus file. Its sizes must be those
            of `encoder`; another number of tokens is made by repeating or dropping queries.
        layers: K̈ and V̈ of each layer: "file", as in `encoder`; "unet", copies of the U-Net's own to_k and to_v
            (token_dim must be the text's width); "random"; "zero" (random K̈, V̈ of zeros: for value_norm "none" and
            the decoupled method). "auto" is file, unet or random: the first that is possible.
    """

    encoder: str | None = None
    layers: LayerInit = "auto"

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.layers == "file" and not self.encoder:
            raise NestedAttentionError('init.layers is "file"; name the file in init.encoder.')


@dataclass
class OptimiserConfig:
    """AdamW and its schedule.

    Attributes:
        qformer_rate: learning rate of the Q-Former.
        layers_rate: learning rate of K̈ and V̈ (and of a trained α).
        weight_decay: of matrices; norms, biases and queries have none.
        beta1: AdamW's, of the mean.
        beta2: AdamW's, of the variance.
        epsilon: AdamW's.
        schedule: of both rates: constant, cosine (to 0) or linear (to 0).
        warmup: steps in which the rates rise from 0.
        max_grad_norm: gradients are scaled down to it; 0: never.
        ema: decay of the averaged weights, which are what is exported and sampled; 0: none.
        kind: "adamw", or "adamw8bit": its moments in 8 bits, a quarter of their memory. Needs bitsandbytes.
        shard: share the moments out among the processes: each has its part of them, where it had all.
    """

    qformer_rate: float = 1e-4
    layers_rate: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    schedule: Schedule = "constant"
    warmup: int = 500
    max_grad_norm: float = 1.0
    ema: float = 0.0
    kind: OptimiserKind = "adamw"
    shard: bool = False

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.shard and self.kind != "adamw":
            raise NestedAttentionError(
                f'optimiser.shard is for kind "adamw"; got "{self.kind}". Moments in 8 bits are a quarter already.'
            )
        _check_range(self, ("qformer_rate", "layers_rate", "weight_decay", "warmup", "max_grad_norm"), 0)
        _check_range(self, ("ema", "beta1", "beta2"), 0, 0.999999)


@dataclass
class LossConfig:
    """The noise-prediction loss (the scheduler says of what: noise, velocity or picture), and what is dropped.

    A row without a bound subject is the frozen model: it has no gradient. So drop_subject and drop_both only make
    sense where a row's other subjects stay, or to measure; drop_text is what teaches a subject without a scene.

    Attributes:
        min_snr_gamma: weight of timesteps as in Min-SNR (arXiv 2303.09556); None: all the same.
        mask_weight: weight of the pixels inside the target's mask, where it has one; outside it is 1.
        drop_text: share of examples whose prompt is nothing but its placeholders.
        drop_subject: share of subjects that are not bound; their class word stays.
        drop_both: share of examples with an empty prompt and no subject.
    """

    min_snr_gamma: float | None = None
    mask_weight: float = 1.0
    drop_text: float = 0.05
    drop_subject: float = 0.0
    drop_both: float = 0.0

    def __post_init__(self) -> None:
        _check_range(self, ("drop_text", "drop_subject", "drop_both"), 0, 1)
        _check_range(self, ("mask_weight",), 0, open_=True)
        _check_range(self, ("min_snr_gamma",), 0, open_=True)
        if self.drop_text + self.drop_both > 1:
            raise NestedAttentionError(
                f"drop_text and drop_both are {self.drop_text} and {self.drop_both}; together at most 1."
            )


@dataclass
class SampleConfig:
    """Pictures made during training: a grid of reference, target and samples.

    Attributes:
        every: steps between grids; 0: none. One is also made at the end.
        count: examples (rows of the grid): the first of the run.
        seeds: samples per example.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        negative: the negative prompt.
    """

    every: int = 0
    count: int = 4
    seeds: int = 2
    steps: int = 25
    guidance: float = 5.0
    negative: str = ""

    def __post_init__(self) -> None:
        _check_range(self, ("every",), 0)
        _check_range(self, ("count", "seeds", "steps"), 1)


@dataclass
class ValidationConfig:
    """Subjects that are not trained on, to measure the encoder with at every checkpoint (and at the start).

    Attributes:
        share: of the subjects, chosen by their names, two at least; 0: none.
        subjects: names of subjects (folders) that are held out too.
        pictures: of each held-out subject, at most.
    """

    share: float = 0.0
    subjects: list[str] = field(default_factory=list)
    pictures: int = 2

    def __post_init__(self) -> None:
        _check_range(self, ("share",), 0, 0.9)
        _check_range(self, ("pictures",), 1)

    @property
    def wanted(self) -> bool:
        """Whether any are held out."""
        return self.share > 0 or bool(self.subjects)


@dataclass
class TrainingConfig:
    """A whole run.

    Attributes:
        output: folder of the run: checkpoints, logs, sample grids and the exported encoder.
        steps: optimiser steps.
        batch_size: examples per process and pass.
        accumulation: passes per optimiser step.
        precision: of the passes: fp32, bf16 or fp16, by autocast; trained weights stay fp32. "auto": what the machine
            is fastest with; on a CPU it measures that. A run that goes on keeps what it began with.
        gradient_checkpointing: recompute the U-Net's blocks in the backward pass: less memory, a third more time.
        compile: compile the U-Net's convolution blocks and feed-forwards (torch.compile; the first steps take minutes).
        seed: of everything random. Two runs of one config are equal, and a resumed run is equal to one without a stop.
        workers: processes that read data; 0: the training process itself.
        cpu: train on the CPU even where there is a GPU.
        save_every: steps between checkpoints; 0: only at the end.
        keep: checkpoints that are kept, the newest; and the best one, where subjects are held out.
        resume: "auto" goes on from the newest checkpoint in `output`, "never" starts anew (in an empty folder), and a
            path goes on from that checkpoint.
        log_every: steps between log entries.
        tracker: "tensorboard" or "none".
        cache: keep what the frozen models made of a picture or text: none, memory or disk (in `output`/cache).
        cache_gb: limit of the memory cache, in GB; the oldest goes.
        base: the frozen models.
        data: examples.
        encoder: what is trained.
        init: where it starts.
        optimiser: how it learns.
        loss: what it learns from.
        samples: pictures on the way.
        validation: held-out subjects.
    """

    output: str = "runs/encoder"
    steps: int = 100_000
    batch_size: int = 1
    accumulation: int = 1
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 2
    cpu: bool = False
    save_every: int = 1000
    keep: int = 3
    resume: str = "auto"
    log_every: int = 10
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    cache: CacheKind = "none"
    cache_gb: float = 4.0
    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    init: InitConfig = field(default_factory=InitConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, ("steps", "batch_size", "accumulation", "keep", "log_every"), 1)
        _check_range(self, ("workers", "save_every", "cache_gb"), 0)
        if self.precision == "fp32" and self.base.dtype not in ("auto", "float32"):
            raise NestedAttentionError(
                f'precision is "fp32" and base.dtype "{self.base.dtype}": without autocast both must be fp32. Set '
                'precision to "bf16" or "fp16", or leave base.dtype at "auto".'
            )
        if (
            self.init.layers == "zero"
            and self.encoder.method == "nested"
            and self.encoder.value_norm != "none"
        ):  # fmt: skip
            raise NestedAttentionError(
                f'init.layers is "zero", but a value of 0 can\'t be rescaled (value_norm "{self.encoder.value_norm}"): '
                'it would stay 0 for ever. Use "unet" or "random", or value_norm "none".'
            )
