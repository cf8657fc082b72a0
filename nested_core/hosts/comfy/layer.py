"""One cross-attention call of the host: which of its rows have subjects, and what those add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...attention import Attend, NestedTerm, nested_delta, outer_probabilities
from ...errors import NestedAttentionError
from ...layers import CrossAttentionLayer
from ...maps import LayerQueries, WordAttention
from ...prompt import ClassWord
from .apart import Regions, cannot_separate
from .attend import as_the_host
from .recording import Recorder
from .rows import Group, Sampled, groups_of
from .store import Store
from .text import plain, rows_of

#: application -> rows of a text
Places = dict[int, tuple[int, ...]]

_BOUND = "nested_attention_bound"
_COUPLED = ("cond_or_uncond_couple", "cond_or_uncond_hook_couple")  # where couple packs say what they did to the rows


@dataclass(frozen=True, eq=False)
class Step:
    """What the sampler's present step knows of the subjects that act in it.

    strengths: by index of the run's applications. regions, recorder: where what layers see is noted, if anywhere.
    reached: the applications that some layer of the run had in it so far.
    """

    store: Store
    strengths: Mapping[int, float]
    sampled: Sampled
    regions: Regions | None
    recorder: Recorder | None
    reached: set[int] = field(default_factory=set)

    def places_in(self, group: Group) -> Places:
        """Where the acting subjects stand in a group's text.

        Raises NestedAttentionError when two of them claim one place.
        """
        applications = self.store.applications
        places: Places = {}
        words: set[ClassWord] = set()  # that are somebody's; several subjects with one: the first has it
        for i in self.strengths:
            application = applications[i]
            rows = group.places.get(application.placeholder.key, ())
            word = application.placeholder.sought
            if application.unconditional is not None and word is not None and word not in words:
                words.add(word)
                rows = tuple(sorted({*rows, *group.places.get(word, ())}))
            if rows:
                places[i] = rows
        taken: dict[int, str] = {}
        for i, rows in places.items():
            name = applications[i].placeholder.text
            for row in rows:
                if taken.setdefault(row, name) != name:
                    raise NestedAttentionError(
                        f"{taken[row]} and {name} stand at the same place of one text, as when a node averages two "
                        "texts. A place can have one subject: move the word in one of the texts, or combine the two "
                        "with Conditioning (Combine)."
                    )
        return places


class TextReader:
    """attn2_patch that takes the marks off a layer's text, last of all patches, and leaves them to the replacement."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._read: tuple[Any, Any, list[tuple[Group, Places]]] = (None, None, [])  # the text read last

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any]) -> Any:
        shape = tuple(extra_options["original_shape"][-2:])
        coupled = any(key in extra_options for key in _COUPLED)
        if self._read[0] is not context or self._read[1] != (shape, coupled):
            groups = groups_of(rows_of(context), self.step.sampled, shape, coupled)
            bound = [(group, places) for group in groups if (places := self.step.places_in(group))]
            self._read = (context, (shape, coupled), bound)
        extra_options[_BOUND] = self._read[2]
        return n, plain(context), plain(value)


class SubjectLayer:
    """attn2 replacement of one layer. The host calls it with projected q, k, v (B, Q | T, C)."""

    def __init__(self, step: Step, layer: int, previous: Callable[..., Tensor] | None) -> None:
        """layer: in diffusers' order. previous: the replacement that was there, which computes the first term."""
        self.step, self.layer, self.previous = step, layer, previous

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        heads = extra_options["n_heads"]
        own = self.previous or (lambda q, k, v, options: as_the_host(options)(q, k, v, heads, None))
        out = own(q, k, v, extra_options)
        # What others computed may be theirs to keep, and gradients may need it: only our own is changed in place.
        ours = self.previous is None and "optimized_attention_override" not in extra_options and not out.requires_grad
        attend = as_the_host(extra_options, beside=True)
        for group, places in extra_options.get(_BOUND, ()):
            here = {i: rows for i, rows in places.items() if self.step.store.acts_in(i, self.layer)}
            if not here:  # their layer weights are 0
                continue
            if not ours:
                out, ours = out.clone(), True
            at = group.rows
            part = _Part(group, here, q[at], k[at], v[at], heads, tuple(extra_options["activations_shape"][-2:]))
            self._add(out[at], part, attend)
            self.step.reached.update(here)
        return out

    def _add(self, out: Tensor, part: _Part, attend: Attend) -> None:
        """Adds to a layer's output for a group's rows, in place, what its subjects add."""
        places = tuple(row for rows in part.places.values() for row in rows)
        one_hot = self.step.store.one_hot(places, part.k, part.heads)
        index = self.step.store.places(places, part.q.device)
        prob = outer_probabilities(part.q, part.k, part.heads, index, one_hot, attend)
        terms = [self._term(i, rows, part) for i, rows in part.places.items()]
        nested_delta(part.q, part.k, part.v, part.heads, terms, attend, into=out, prob=prob)
        if not part.group.negative and (self.step.regions is not None or self.step.recorder is not None):
            self._note(part, prob)

    def _term(self, i: int, rows: tuple[int, ...], part: _Part) -> NestedTerm:
        store, application = self.step.store, self.step.store.applications[i]
        key, value = store.keys_values(i, self.layer, part.q, part.group.negative)
        return NestedTerm(
            key=key,
            value=value,
            places=store.places(rows, part.q.device),
            strength=self.step.strengths[i] * application.layer_weights[self.layer],
            alpha=application.alpha,
            value_norm=application.value_norm,
            focus=application.focus,
            spatial=store.mask(i, part.group, self.step.sampled, part.q, part.grid),
            separation=application.separation,
            log_weights=store.log_weights(i, part.q.device, part.group.negative),
        )

    def _note(self, part: _Part, prob: Tensor) -> None:
        """Keeps where the words of subjects are looked at: prob (rows, Q, H, all their places) of this layer."""
        group, sampled = part.group, self.step.sampled
        image = group.image
        inside = sampled.window is not None and sampled.window.axis != 0  # of a picture
        if image is None or group.tile or inside or part.grid[0] * part.grid[1] != prob.shape[1]:
            if self.step.regions is not None:
                raise cannot_separate("samples the picture in tiles, or on another grid")
            return
        start = 0
        for i, rows in part.places.items():
            seen = prob[..., start : start + len(rows)].sum(-1).mean(-1)
            start += len(rows)
            if self.step.regions is not None:
                self.step.regions.note(i, image, seen, part.grid, group.area)
            if self.step.recorder is not None:
                self._record(self.step.recorder, i, rows, part, seen.unflatten(1, part.grid), image)

    def _record(self, recorder: Recorder, i: int, rows: tuple[int, ...], part: _Part, seen: Tensor, image: int) -> None:
        """seen: attention on application i's word (images, *grid), from the step's image `image` on."""
        sampled, area = self.step.sampled, part.group.area
        # In a window, images that are side by side need not be so in what is sampled.
        each = range(len(seen)) if sampled.window is not None else [slice(None)]
        for at in each:
            chosen = slice(at, at + 1) if isinstance(at, int) else at
            picture = sampled.picture(image + (at if isinstance(at, int) else 0))
            if not recorder.keeps(picture):
                continue
            recorder.note(WordAttention(recorder.step, self.layer, i, picture, seen[chosen], area))
            if recorder.explains(self.layer, picture):
                index = self.step.store.places(rows, part.q.device)
                replaced = part.v[0].index_select(0, index).float().mean(0)
                q = part.q if isinstance(at, slice) else part.q[chosen]
                recorder.note_query(
                    LayerQueries(recorder.step, self.layer, i, picture, q, replaced, part.heads, part.grid, area)
                )


@dataclass(frozen=True, eq=False)
class _Part:
    """A group's rows of one layer: q (rows, Q, C), k and v (rows, T, C), whose queries lie on a grid (h, w)."""

    group: Group
    places: Places
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    grid: tuple[int, int]


def with_subjects(options: Mapping[str, Any], step: Step, layers: Sequence[CrossAttentionLayer]) -> dict[str, Any]:
    """A copy of transformer_options with a step's subjects around the attn2 replacements that are there.

    Subjects that an earlier call put there are not added twice.
    """
    replaced = options.get("patches_replace", {})
    attn2 = dict(replaced.get("attn2", {}))
    for i, layer in enumerate(layers):
        # The host prefers the address with the transformer's index: one without it would never be called again.
        previous = attn2.get(layer.block) or attn2.get(layer.block[:2])
        while isinstance(previous, SubjectLayer):
            previous = previous.previous
        attn2[layer.block] = SubjectLayer(step, i, previous)
    patches = options.get("patches", {})
    others = [patch for patch in patches.get("attn2_patch", ()) if not isinstance(patch, TextReader)]
    return {
        **options,
        "patches_replace": {**replaced, "attn2": attn2},
        "patches": {**patches, "attn2_patch": [*others, TextReader(step)]},
    }
