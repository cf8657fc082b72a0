"""Attention recorded while ComfyUI samples; the picture stays as it is, bit for bit.

A `Recording` belongs to one Record Attention node. The run of a sampler fills it, and replaces what an earlier run left
there; nothing else refers to it, so it ends with the node's output. What is kept, per subject and picture: of every
layer and step the attention on the word, in fp16 (0.2 MB a step for SDXL at 1024 x 1024; on the device while it
samples, then on the CPU), and of one step and block of layers the queries (26 MB there) for Explain Point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...errors import NestedAttentionError
from ...figures import PointFigure
from ...layers import CrossAttentionLayer
from ...maps import LayerQueries, WordAttention, heat, nested_attention_of, nested_values, principal_colours
from ...resampler import Resampler
from ...words import fold
from .values import Application


@dataclass
class RecordedRun:
    """What one run left. applications: the subjects, in the order of `WordAttention.subject`. grid: of the latent."""

    applications: tuple[Application, ...]
    layers: tuple[CrossAttentionLayer, ...]
    images: int
    grid: tuple[int, int]
    steps: int
    attention: list[WordAttention] = field(default_factory=list)
    queries: list[LayerQueries] = field(default_factory=list)

    def subject(self, placeholder: str) -> int:
        """Index of the subject with a placeholder; empty is the only one.

        Raises NestedAttentionError naming those that are there.
        """
        key = fold(placeholder.strip())
        names = [a.placeholder.text for a in self.applications]
        if not key and len(names) == 1:
            return 0
        for i, application in enumerate(self.applications):
            if application.placeholder.key == key:
                return i
        wanted = f"No subject with the placeholder {placeholder.strip()} acted" if key else "Several subjects acted"
        raise NestedAttentionError(f"{wanted} in the recorded run. Write one of {', '.join(names)} as the placeholder.")


class Recording:
    """NESTED_RECORDING: what the last run of one model left. explain_at: the part of the steps whose queries stay."""

    def __init__(self, explain_at: float) -> None:
        self.explain_at = explain_at
        self.run: RecordedRun | None = None

    def last(self) -> RecordedRun:
        """Raises NestedAttentionError where no run with a subject ended yet."""
        if self.run is None:
            raise NestedAttentionError(
                "Nothing is recorded. The model that comes out of Record Attention must go to the sampler, with a "
                "subject applied to it, and what that sampler makes must be connected to `after`: it has to run first."
            )
        return self.run


class Recorder:
    """Fills a recording during one run.

    Of each step and picture the first call of the model that has a subject is kept: guidance and samplers of higher
    order make more, with attention of their own.
    """

    def __init__(
        self, recording: Recording, applications: tuple[Application, ...], layers: Sequence[CrossAttentionLayer],
        latent: Sequence[int],
    ) -> None:  # fmt: skip
        self.recording = recording
        self.made = RecordedRun(applications, tuple(layers), latent[0], (latent[-2], latent[-1]), 1)
        self.explained = _explained(layers)
        self.step = -1
        self._wanted = 0
        self._done: set[tuple[int, int]] = set()  # (step, picture) of calls that are over
        self._now: set[tuple[int, int]] = set()  # of this one
        self._copied: tuple[Any, Any] = (None, None)  # queries as they came, and their copy

    def begin_step(self, step: float, steps: int) -> None:
        """A call of the model begins."""
        self._done |= self._now
        self._now.clear()
        self.step, self.made.steps = round(step), steps
        # The first call at this part of the sampling; where caches or samplers skip what follows, the last one before.
        self._wanted = round(self.recording.explain_at * max(0, steps - 1))

    def keeps(self, picture: int) -> bool:
        """Whether what this call sees of a picture is kept."""
        return (self.step, picture) not in self._done

    def explains(self, layer: int, picture: int) -> bool:
        """Whether the queries of a layer are kept for a picture."""
        return layer in self.explained and not any(
            query.step >= self._wanted and query.first <= picture < query.first + len(query.q)
            for query in self.made.queries
            if (query.step, picture) in self._done
        )

    def note(self, seen: WordAttention) -> None:
        self._now.update((self.step, seen.first + i) for i in range(len(seen.attention)))
        self.made.attention.append(replace(seen, attention=seen.attention.half()))

    def note_query(self, query: LayerQueries) -> None:
        """`query.q` is copied, once for all subjects of a layer."""
        last = query.first + len(query.q)
        self.made.queries = [
            other
            for other in self.made.queries
            if other.step == self.step or other.first >= last or other.first + len(other.q) <= query.first
        ]
        source, copied = self._copied
        if source is not query.q:
            copied = query.q.to(torch.float16, copy=True)
            self._copied = (query.q, copied)
        self.made.queries.append(replace(query, q=copied))

    def finish(self) -> None:
        """The run ended well: what was seen goes to the CPU and takes the place of an earlier run's."""
        self._copied = (None, None)
        moved: dict[int, Tensor] = {}
        for query in self.made.queries:
            if id(query.q) not in moved:
                moved[id(query.q)] = query.q.cpu()
        self.made.attention = [replace(s, attention=s.attention.cpu()) for s in self.made.attention]
        self.made.queries = [replace(q, q=moved[id(q.q)], replaced=q.replaced.cpu()) for q in self.made.queries]
        self.recording.run = self.made


def _explained(layers: Sequence[CrossAttentionLayer]) -> frozenset[int]:
    """The layers whose queries are kept: the second block of the way up (SDXL's output.1)."""
    blocks = sorted({layer.block[1] for layer in layers if layer.block[0] == "output"})
    block = blocks[min(1, len(blocks) - 1)]
    return frozenset(i for i, layer in enumerate(layers) if layer.block[:2] == ("output", block))


# --- what can be seen in it -------------------------------------------------------------------------------------------


def heats_of(run: RecordedRun, start: float, end: float, weights: Sequence[float]) -> Tensor:
    """Heat of all subjects, (S, images, *grid), over a part of the steps (from 0 to 1) and layers by their weights.

    Raises NestedAttentionError where no subject acted there.
    """
    last = max(1, run.steps - 1)
    seen = [s for s in run.attention if start <= s.step / last <= end and weights[s.layer] > 0]
    if not seen:
        steps = sorted({s.step for s in run.attention})
        acted = f"Subjects acted in steps {steps[0] + 1} to {steps[-1] + 1} of {run.steps}" if steps else "None acted"
        raise NestedAttentionError(
            f"Nothing was recorded in this part of the sampling and these layers. {acted}. Widen start_percent, "
            "end_percent and layer_weights. (What is sampled in tiles, or in windows of a picture, can't be recorded.)"
        )
    return heat(seen, len(run.applications), run.images, run.grid, weights)


def look_into(run: RecordedRun, placeholder: str, at: tuple[float, float], index: int, picture: Tensor) -> PointFigure:
    """What a subject is to the query at a point of picture `index`, as `figures.explain` draws it.

    at: (x, y) from 0 to 1. picture: (H, W, 3).
    Raises NestedAttentionError: no such subject or picture; the subject did not act in the recorded step, or there.
    """
    subject = run.subject(placeholder)
    application = run.applications[subject]
    if not 0 <= index < run.images:
        raise NestedAttentionError(
            f"batch_index is {index}, the recorded run made {run.images} picture(s): 0 is first."
        )
    found = []
    for query in run.queries:
        if query.subject == subject and query.first <= index < query.first + len(query.q):
            place = _place(query, at, run.grid)
            if place is not None:
                found.append((query, place))
    if not found:
        raise _not_there(run, subject, at)
    source = application.source
    comfy.model_management.load_models_gpu([source.encoder.patcher])
    module, device = source.encoder.module, source.encoder.patcher.load_device
    tokens = source.subject.tokens.to(device, next(module.parameters()).dtype)
    weights = source.subject.token_weights
    log_weights = None if weights is None else weights.float().cpu().log()
    answers, values, constants = [], [], []
    shape = found[0][0].shape
    for query, place in found:
        q = query.q[index - query.first]
        key, value = (x[0].cpu() for x in module.keys_values(tokens, query.layer))
        answers.append(nested_attention_of(q[place : place + 1], key, query.heads, log_weights)[0])
        if query.shape == shape and query.area == found[0][0].area:
            nested = nested_values(q, key, value, query.heads, log_weights)
            values.append(torch.nn.functional.normalize(nested, dim=-1))
            constants.append(torch.nn.functional.normalize(query.replaced.float(), dim=-1))
    answer = torch.stack(answers).mean(0)
    colours, constant = principal_colours(torch.cat(values, -1), torch.cat(constants))
    first = found[0][0]
    names = [run.layers[q.layer].block for q, _ in found]
    return PointFigure(
        picture=picture,
        at=at,
        name=application.placeholder.text,
        word=application.placeholder.class_word,
        values=colours.unflatten(0, shape),
        constant=constant,
        tokens=answer,
        photos=torch.cat([view.square for view in source.views]).cpu() if source.views else None,
        sources=_sources(application, answer),
        footer=f"{names[0][0]}.{names[0][1]}, {len(found)} layer{'s' * (len(found) > 1)}, step {first.step + 1} of "
        f"{run.steps}, {source.encoder.config.title}",
    )


def _not_there(run: RecordedRun, subject: int, at: tuple[float, float]) -> NestedAttentionError:
    """Why nothing was kept of a subject at a point."""
    application = run.applications[subject]
    if any(query.subject == subject for query in run.queries):
        return NestedAttentionError(
            f"The point ({at[0]:g}, {at[1]:g}) is outside of the area whose prompt mentions "
            f"{application.placeholder.text}. Take a point inside, or write the placeholder of another subject."
        )
    looked = sorted({f"{k}.{n}" for k, n, _ in (run.layers[i].block for i in _explained(run.layers))})
    if not any(application.layer_weights[i] for i in _explained(run.layers)):
        return NestedAttentionError(
            f"Explain Point looks into {', '.join(looked)}, where the layer_weights of "
            f"{application.placeholder.text} are 0. Leave those layers on, or explain another subject."
        )
    acted = sorted({s.step + 1 for s in run.attention if s.subject == subject})
    return NestedAttentionError(
        f"{application.placeholder.text} did not act in the step that Record Attention kept. It "
        f"acted in {f'steps {acted[0]} to {acted[-1]} of {run.steps}' if acted else 'no step'}: set explain_at to "
        "a part of the sampling where it acts."
    )


def _place(query: LayerQueries, at: tuple[float, float], grid: tuple[int, int]) -> int | None:
    """Index of the query at a point, or None where the point is outside of the query's area."""
    h, w, y, x = (*grid, 0, 0) if query.area is None else query.area
    row, column = (at[1] * grid[0] - y) / h, (at[0] * grid[1] - x) / w
    if not (0 <= row <= 1 and 0 <= column <= 1):
        return None
    rows, columns = query.shape
    return min(int(row * rows), rows - 1) * columns + min(int(column * columns), columns - 1)


def _sources(application: Application, answer: Tensor) -> tuple[Tensor, Tensor] | str:
    """Where in the photos the strongest token, and the whole answer (N,), come from: (views, g, g) each. Or why not."""
    source = application.source
    resampler = source.encoder.module.resampler
    if not isinstance(resampler, Resampler):
        return "This encoder reads one vector\nof the whole photo: its tokens come\nfrom no place in it."
    if not source.views:
        return "The subject comes from a file,\nwhich holds no photos. Encode it in\nthis graph to see this."
    each = source.encoder.config.tokens
    if len(answer) != each * len(source.views):
        return "The subject's tokens can't be told\napart by photo."
    one, every = [], []
    strongest = int(answer.argmax())
    device, dtype = source.encoder.patcher.load_device, next(resampler.parameters()).dtype
    for number, view in enumerate(source.views):
        looks = resampler.attention(view.features.to(device, dtype))[0].cpu()  # (N, T)
        side = int(looks.shape[-1] ** 0.5)
        looks = looks[:, looks.shape[-1] - side * side :]  # without the token of the whole photo, which comes first
        looks = looks.unflatten(-1, (side, side))
        here = answer[number * each : (number + 1) * each]
        chosen = torch.zeros_like(here)
        if number == strongest // each:
            chosen[strongest % each] = 1
        one.append(torch.einsum("n,nhw->hw", chosen, looks))
        every.append(torch.einsum("n,nhw->hw", here, looks))
    both = [torch.stack(maps) for maps in (one, every)]
    return both[0] / both[0].sum().clamp_min(1e-12), both[1] / both[1].sum().clamp_min(1e-12)
