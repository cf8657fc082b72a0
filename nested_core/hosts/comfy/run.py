"""A sampling run: three wrappers that find the subjects of the model they run in, and the run that they are called in.

The wrappers stand on a MODEL from Apply Subject on, in its own transformer_options, so that options which another node
copied from it have them too. They are functions without state. What a run needs is made by `outer_sample` and gone when
the run ends, fails or is interrupted; `calc_cond_batch` decides once per step which subjects act, and marks each text
with the entry that it is of; `apply_model` puts attn2 replacements into that call's own options, around whatever
replacements other packs and hooks have there by then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from types import MappingProxyType
from typing import Any

import comfy.model_patcher
import torch
from comfy.hooks import EnumHookType
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...errors import NestedAttentionError
from ...prompt import ClassWord
from ...schedule import step_of
from . import last_run
from . import text as texts
from .apart import BoundedSelfAttention, Regions, cannot_separate
from .compiled import Compiled
from .last_run import LastRun
from .layer import Step, with_subjects
from .negatives import is_negative, mark_negatives, with_words
from .prompt import why_unmentioned
from .recording import Recorder, Recording
from .rows import Entry, Sampled, Window, clipped, groups_of
from .store import Store
from .text import MarkedText, mark, marks_of, plain, rows_of
from .unet import unet_layers_of
from .values import Apart, Application

KEY = "nested_attention"
APART_KEY = "nested_attention_separation"
RECORDING_KEY = "nested_attention_recording"

log = logging.getLogger(__name__)


def applications_of(model: comfy.model_patcher.ModelPatcher) -> tuple[Application, ...]:
    """The subjects applied to a MODEL, in order."""
    return model.get_attachment(KEY) or ()


def stand_on(model: comfy.model_patcher.ModelPatcher) -> None:
    """Put the wrappers into the options of a MODEL's clone, unless they are there."""
    wrappers = model.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    for kind, wrapper in _WRAPPERS.items():
        wrappers.setdefault(kind, {})[KEY] = [wrapper]


#: The noise levels between which something acts, the first one first; None: at all of them.
_Window = tuple[float, float] | None


class _Level:
    """The noise level of a step. To read it is to wait for the device: once a step, and only where somebody asks."""

    def __init__(self, timestep: Tensor) -> None:
        self._timestep = timestep

    @cached_property
    def sigma(self) -> float:
        return float(self._timestep[0])

    def within(self, window: _Window) -> bool:
        return window is None or window[1] <= self.sigma <= window[0]


class _Run:
    """What a run knows from its start on. Without applications: of a model whose subjects have nothing to do."""

    def __init__(
        self, guider: Any, applications: tuple[Application, ...], latent: Sequence[int], sigmas: Tensor
    ) -> None:
        model: comfy.model_patcher.ModelPatcher = guider.model_patcher
        self.applications = applications
        self.sigmas = sigmas
        self.layers = unet_layers_of(model)[1]
        self.store = Store(model, applications, self.layers, latent)
        self.latent = latent
        self.compiled = Compiled(guider.model_options)
        self.stepped = False
        self.asked: set[int] = set()  # applications that a text of some step mentioned while they acted
        self.reached: set[int] = set()  # those that some layer had in it
        self.unread: set[str] = set()  # placeholders in texts that a layer read in this step without us
        self.kept_apart: Apart | None = model.get_attachment(APART_KEY)
        self.regions: Regions | None = None
        if self.kept_apart is not None and self.kept_apart.strength and len(applications) > 1:
            fixed = {i: a.mask for i, a in enumerate(applications) if a.mask is not None}
            self.regions = Regions(fixed, latent, model.load_device)
        recording: Recording | None = model.get_attachment(RECORDING_KEY)
        self.recorder: Recorder | None = None
        if recording is not None and applications:
            self.recorder = Recorder(recording, applications, self.layers, latent)
        sampling = model.get_model_object("model_sampling")

        def window(of: Application | Apart) -> _Window:
            if of.start <= 0 and of.end >= 1:
                return None
            return sampling.percent_to_sigma(of.start), sampling.percent_to_sigma(of.end)

        self.windows = [window(a) for a in applications]
        self.apart_window = None if self.kept_apart is None else window(self.kept_apart)

    def begin_step(self, timestep: Tensor, sampled: Sampled, options: Mapping[str, Any]) -> _Now | None:
        """What acts at a noise level; None where nothing does."""
        level = _Level(timestep)
        number, steps = self._step_of(level, options.get("sample_sigmas", self.sigmas))
        strengths = self._strengths(level, number, steps)
        self.stepped = True
        self.unread.clear()
        if self.recorder is not None:
            self.recorder.begin_step(number, steps)
        if not strengths:
            return None
        step = Step(self.store, strengths, sampled, self.regions, self.recorder, self.reached)
        return _Now(self, step, level, self._apart(step, level))

    def _step_of(self, level: _Level, sigmas: Tensor) -> tuple[float, int]:
        """Which of how many steps a noise level is, where anything asks for that."""
        if self.recorder is None and not any(a.schedule for a in self.applications):
            return 0.0, 1
        # Samplers that run in parts bring others: known by what they are, read from the device once.
        levels = self.store.kept(("sigmas", id(sigmas)), lambda: (sigmas, sigmas.tolist()))[1]
        return step_of(level.sigma, levels)

    def _strengths(self, level: _Level, step: float, steps: int) -> dict[int, float]:
        """The subjects that act at a noise level, which is a step of so many, with their strengths."""
        strengths = {}
        for i, (application, window) in enumerate(zip(self.applications, self.windows, strict=True)):
            factor = application.schedule.factor(step, steps) if application.schedule else 1.0
            if application.strength * factor != 0 and level.within(window):
                strengths[i] = application.strength * factor
        return strengths

    def _apart(self, step: Step, level: _Level) -> tuple[int, ...]:
        """The applications that do not look at each other in a step; fewer than two are none."""
        if self.regions is None:
            return ()
        if step.sampled.window is not None:
            raise cannot_separate("samples in context windows")
        self.regions.turn()
        if not level.within(self.apart_window):
            return ()
        apart = tuple(i for i in step.strengths if i in self.regions.known)
        return apart if len(apart) > 1 else ()


_current: ContextVar[_Run | None] = ContextVar("nested_attention_run", default=None)


# --- the run ----------------------------------------------------------------------------------------------------------


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: everything a run needs is made here and gone when it ends, fails or is interrupted."""
    guider = executor.class_obj
    recording = guider.model_patcher.get_attachment(RECORDING_KEY)
    if recording is not None:
        recording.run = None
    noise = args[0] if args else kwargs["noise"]
    sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]
    told = last_run.remember(guider, applications_of(guider.model_patcher), noise.shape, sigmas, KEY)
    with told.watched(), _sampling_run(guider, noise.shape, sigmas, told):
        return executor(*args, **kwargs)


@contextmanager
def _sampling_run(guider: Any, latent: Sequence[int], sigmas: Tensor, told: LastRun) -> Iterator[None]:
    options = guider.model_options["transformer_options"]
    applied = applications_of(guider.model_patcher)
    applications = tuple(a for a in applied if not a.idle)
    # Couple packs bring texts that are in none of the guider's lists, by patches or by hooks that bring patches: there
    # all subjects stay in the run.
    elsewhere = bool(options.get("patches", {}).get("attn2_patch")) or any(
        entry.get("hooks") is not None and entry["hooks"].get_type(EnumHookType.TransformerOptions)
        for entries in guider.conds.values()
        for entry in entries
    )
    _warn_of_strangers(guider.conds, applied)
    mentioned = _check_mentioned(guider.conds, applications, elsewhere)
    if not elsewhere:
        applications = with_words(guider, [a for a in applications if a.placeholder.key in mentioned])
    # Sums are rounded in some order: with one of its own the picture does not depend on that of the nodes.
    applications = tuple(sorted(applications, key=lambda a: a.placeholder.key))
    run = _Run(guider, applications, latent, sigmas)
    for kind, wrapper in _WRAPPERS.items():  # innermost, so that what other wrappers change is there by then
        wrappers = options["wrappers"].setdefault(kind, {})
        wrappers.pop(KEY, None)
        wrappers[KEY] = [wrapper]
    mark_negatives(guider.conds)
    token = _current.set(run)
    try:
        yield
        _check_all_acted(run, mentioned, guider.model_options)
        if run.recorder is not None:
            run.recorder.finish()
    finally:
        told.acted = len(run.reached)
        _current.reset(token)
        run.store.close()


def _mentioned_in(text: Any) -> set[str]:
    return {key for key, marks in marks_of(text).items() if isinstance(key, str) and bool(marks.any())}


def _check_mentioned(
    conds: Mapping[str, Sequence[Mapping[str, Any]]], applications: Sequence[Application], elsewhere: bool
) -> set[str]:
    """Keys of the placeholders that the run's prompts mention.

    Raises NestedAttentionError when no positive prompt mentions a subject that has to be mentioned; not with
    `elsewhere`, where there are texts that can't be seen here: the run's end tells.
    """
    found = {
        name: set().union(*(_mentioned_in(entry.get("cross_attn")) for entry in entries))
        for name, entries in conds.items()
    }
    positive: set[str] = set().union(*(keys for name, keys in found.items() if not is_negative(name)))
    for application in applications:
        placeholder = application.placeholder
        if placeholder.key in positive or application.skip_unmentioned or elsewhere:
            continue
        seen = [
            (entry["cross_attn"], entry)
            for name, entries in conds.items()
            for entry in entries
            if not is_negative(name) and entry.get("cross_attn") is not None
        ]
        others = ", ".join(sorted(positive)) or "no subject at all"
        raise NestedAttentionError(
            f"No positive prompt mentions {placeholder.text}. Write {placeholder.text} in the prompt where the subject "
            f'belongs, for example "a photo of {placeholder.text} in a garden", in a text encode node whose CLIP comes '
            f"from Apply Subject (not straight from the checkpoint). The prompts mention {others}. "
            f"{why_unmentioned(placeholder, seen)} To let such a run pass, use Apply Subject (Advanced) with "
            "when_unmentioned = skip."
        )
    return set().union(*found.values())


def _warn_of_strangers(conds: Mapping[str, Sequence[Mapping[str, Any]]], applied: Sequence[Application]) -> None:
    """A word of a subject that is not on this model is its class word and no more. That may be meant."""
    mentioned = set().union(*(_mentioned_in(e.get("cross_attn")) for entries in conds.values() for e in entries))
    if strangers := mentioned - {a.placeholder.key for a in applied}:
        _warn_of_plain_model(strangers)


# --- once per step ----------------------------------------------------------------------------------------------------


def _calc_cond_batch(
    executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """CALC_COND_BATCH wrapper: which subjects act in this step; each text is marked with the entry that it is of."""
    run = _current.get()
    if run is None or not run.applications:
        return executor(model, conds, x_in, timestep, model_options)
    options = model_options.get("transformer_options", {})
    now = run.begin_step(
        timestep, Sampled(x_in.shape[0], (x_in.shape[-2], x_in.shape[-1]), _window_of(options)), options
    )
    options = {**options, KEY: now}
    if now is None:
        return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})
    if "model_function_wrapper" in model_options and not _hooked(conds):
        # It may run the U-Net's blocks by itself. Hooks' replacements are not in these options yet, and ours would
        # take their place: with hooks, only what calls the model as a whole has subjects.
        options = with_subjects(options, now.step, run.layers)
    out = executor(
        model,
        [_labelled(entries, now.step.sampled.grid) for entries in conds],
        x_in,
        timestep,
        {**model_options, "transformer_options": options},
    )
    now.check_reached(conds, model_options)
    return out


def _window_of(options: Mapping[str, Any]) -> Window | None:
    """The window that is sampled just now, where a node samples by windows."""
    window = options.get("context_window")
    if window is not None:
        before = getattr(window, "causal_anchor_index", None)  # one more in front, which newer hosts add
        lead = (before,) if before is not None and before >= 0 else ()
        return Window(window.dim, (*lead, *window.index_list))
    frames = (options.get("ad_params") or {}).get("sub_idxs")  # AnimateDiff-Evolved's
    return None if frames is None else Window(0, tuple(frames))


def _hooked(conds: Any) -> bool:
    return any(entry.get("hooks") is not None for entries in conds for entry in entries or ())


def _labelled(entries: Any, grid: tuple[int, int]) -> Any:
    """A list of the sampler's with its texts marked by entry. Shared dictionaries and texts stay as they are."""
    if entries is None:
        return None
    labelled = []
    for entry in entries:
        text = entry.get("model_conds", {}).get("c_crossattn")
        if text is not None:
            label = Entry(clipped(entry["area"], grid) if "area" in entry else None)
            marked = type(text)(mark(text.cond, {label: torch.ones((), dtype=torch.bool)}))
            entry = {**entry, "model_conds": {**entry["model_conds"], "c_crossattn": marked}}
        labelled.append(entry)
    return labelled


class _Now:
    """A step on its way through the host: what its calls of the model share, and what became of its texts."""

    def __init__(self, run: _Run, step: Step, level: _Level, apart: tuple[int, ...]) -> None:
        self.run, self.step, self.level = run, step, level
        self.apart = apart  # applications that do not look at each other
        self.came: set[str] | None = None  # placeholders in texts that the model was called with, if it was

    def bounded(self, options: dict[str, Any], groups: Any) -> dict[str, Any]:
        """A copy of the options with self-attention bounded in all layers that nobody else has replaced."""
        kept_apart = self.run.kept_apart
        assert self.run.regions is not None and kept_apart is not None
        bounds = BoundedSelfAttention(self.run.regions, kept_apart.strength, self.apart, groups, self.run.store)
        replaced = options.get("patches_replace", {})
        attn1 = dict(replaced.get("attn1", {}))
        for layer in self.run.layers:
            if layer.block not in attn1 and layer.block[:2] not in attn1:
                attn1[layer.block] = bounds
        return {**options, "patches_replace": {**replaced, "attn1": attn1}}

    def check_reached(self, conds: Any, model_options: Mapping[str, Any]) -> None:
        """Raises NestedAttentionError where a subject should have acted in this step and is known not to have.

        Where nothing read the texts (a cache may have skipped the model), the end of the run tells.
        """
        self.run.asked |= self._asked_for(conds)
        for i in sorted(self.run.asked - self.run.reached):
            placeholder = self.run.applications[i].placeholder
            if placeholder.key in self.run.unread:
                why = "it calls the model's layers with options that it made itself"
            elif self.came is not None and placeholder.key not in self.came:
                why = "it makes the texts anew while sampling, outside of PyTorch"
            else:
                continue
            raise _acted_nowhere(placeholder.text, why, model_options)
        if self.apart and self.came is None and self.run.reached:
            raise cannot_separate("runs the model's blocks by itself")

    def _asked_for(self, conds: Any) -> set[int]:
        """The acting subjects that a text of this step mentions."""
        mentioned: set[str] = set()
        for entry in (entry for entries in conds for entry in entries or ()):
            late = "timestep_start" in entry and self.level.sigma > entry["timestep_start"]
            over = "timestep_end" in entry and self.level.sigma < entry["timestep_end"]
            text = entry.get("model_conds", {}).get("c_crossattn")
            if text is not None and not late and not over:
                mentioned |= _mentioned_in(text.cond) if "default" not in entry else set()
        return {i for i in self.step.strengths if self.run.applications[i].placeholder.key in mentioned}


def _acted_nowhere(name: str, why: str, model_options: Mapping[str, Any]) -> NestedAttentionError:
    others = _others_in(model_options)
    suspects = f"On this model there are: {', '.join(others)}. " if others else ""
    return NestedAttentionError(
        f"{name} is in a prompt and on the model, but reached no layer: another node stands in the way ({why}). "
        f"{suspects}Put Apply Subject in front of that node, or take it out."
    )


def _others_in(model_options: Mapping[str, Any]) -> list[str]:
    """What other nodes put around the model, by the modules it comes from."""
    found: dict[str, None] = {}
    for name, value in model_options.items():
        if name.startswith(("model_function_wrapper", "sampler_")):
            for function in value if isinstance(value, list) else [value]:
                found[f"{name} of {getattr(function, '__module__', type(function).__module__)}"] = None
    for kind, by_key in model_options.get("transformer_options", {}).get("wrappers", {}).items():
        for function in (f for key, functions in by_key.items() if key != KEY for f in functions):
            found[f"{kind} wrapper of {getattr(function, '__module__', type(function).__module__)}"] = None
    return list(found)


def _check_all_acted(run: _Run, mentioned: set[str], model_options: Mapping[str, Any]) -> None:
    """At the end of a run. Raises NestedAttentionError where a subject should have acted and reached no layer."""
    if len(run.sigmas) < 2:  # no step at all
        return
    for i in sorted(set(range(len(run.applications))) - run.reached):
        application = run.applications[i]
        name = application.placeholder.text
        if i in run.asked or not run.stepped:
            raise _acted_nowhere(name, "no layer was called with a text that mentions it", model_options)
        if application.placeholder.key not in mentioned and not application.skip_unmentioned:
            raise NestedAttentionError(
                f"No prompt mentions {name}, neither those of the sampler nor those that other nodes bring. Write "
                f"{name} in one of them, in a text encode node whose CLIP comes from Apply Subject."
            )
        if application.placeholder.key in mentioned:
            log.warning("%s acted in no step: none of those it acts in samples a text that mentions it.", name)


# --- once per call of the model ---------------------------------------------------------------------------------------


def _apply_model(
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
    options = dict(transformer_options)
    run = _current.get()
    if KEY not in options and run is not None and run.applications:
        # Past the host's calc_cond_batch: whose rows are whose is known, which picture they show is not.
        options[KEY] = run.begin_step(t, Sampled(run.latent[0], (x.shape[-2], x.shape[-1])), options)
    now: _Now | None = options.get(KEY)
    if now is None or c_crossattn is None:
        text = plain(c_crossattn) if c_crossattn is not None else None
        return executor(x, t, c_concat, text, control, options, **kwargs)
    here = _mentioned_in(c_crossattn)
    now.came = (now.came or set()) | here
    if now.apart:
        groups = groups_of(rows_of(c_crossattn), now.step.sampled, (x.shape[-2], x.shape[-1]))
        options = now.bounded(options, groups)
    words = any(isinstance(key, ClassWord) for key in marks_of(c_crossattn))
    if here or words or options.get("patches", {}).get("attn2_patch"):
        options = with_subjects(options, now.step, now.run.layers)
    else:
        c_crossattn = plain(c_crossattn)
    with now.run.compiled(executor.class_obj):
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _unread(text: MarkedText) -> None:
    """A layer reads a marked text as plain numbers: a ControlNet's, a U-Net's that is called past our replacements or
    has no subjects, or one in a node that transforms texts."""
    run = _current.get()
    if run is not None and run.unread.issuperset(key for key in marks_of(text) if isinstance(key, str)):
        return
    mentioned = _mentioned_in(text)
    labelled = any(isinstance(key, Entry) for key in marks_of(text))
    if run is None:
        if mentioned and not labelled:
            _warn_of_plain_model(mentioned)
        return
    run.unread |= mentioned
    here = [a.placeholder.text for a in run.applications if a.placeholder.key in mentioned]
    if here and not labelled:
        raise _acted_nowhere(", ".join(here), "it samples with options from before Apply Subject", {})


_warned: tuple[Any, ...] = ()  # (prompt, node) that the last warning was for: a node reads its text in many layers


def _warn_of_plain_model(mentioned: set[str]) -> None:
    global _warned
    context = get_executing_context()
    at = (context and context.prompt_id, context and context.node_id, *sorted(mentioned))
    if at == _warned:
        return
    _warned = at
    log.warning(
        "A text that mentions %s is read by a model that has no such subject: there the word is its class word and no "
        "more. If the subject is meant to be in the picture, take MODEL from Apply Subject as well as CLIP.",
        ", ".join(sorted(mentioned)),
    )


texts.on_unread = _unread

_WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _outer_sample,
    WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
    WrappersMP.APPLY_MODEL: _apply_model,
}
