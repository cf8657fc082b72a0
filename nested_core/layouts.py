"""Where the parts of an encoder are in a file, whoever wrote it.

Names differ from trainer to trainer, so what counts is suffixes and shapes: the Q-Former is found by its parts, the
K̈ / V̈ layers as pairs of matrices whose names differ in k / v only, and the order of numbered layers is settled by
the sequence of their output widths. Whatever does not add up is refused with what was expected and what came.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .errors import NestedAttentionError
from .files import few, looks_like
from .layers import DIFFUSERS_ORDER, EXECUTION_ORDER, PUBLISHED, Family, compress, family_of

log = logging.getLogger(__name__)

State = dict[str, Tensor]
_Place = str | tuple[int, ...]


class Projection(NamedTuple):
    """Where the Q-Former (or the pooled projection) is: `names` maps the module's parameter names to file keys."""

    prefix: str
    names: dict[str, str]
    pooled: bool


class Pair(NamedTuple):
    k: str
    v: str


@dataclass(frozen=True)
class Layers:
    """The K̈ / V̈ layers in diffusers' order, `scheme` being the form of their names and `order` how it was settled.

    biases: of the same layers, or empty where they have none.
    """

    family: Family
    scheme: str
    pairs: tuple[Pair, ...]
    order: str
    biases: tuple[Pair, ...] = ()

    @property
    def named_ip_adapter(self) -> bool:
        return _preference(self.scheme)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The Q-Former, or the pooled projection

# Names inside a resampler, but for the feed-forward, whose parts are told by shape.
_RESAMPLER_NAME = re.compile(
    r"latents|pos_emb\.weight|(?:proj_in|proj_out|norm_out|to_latents_from_mean_pooled_seq\.[01])\.(?:weight|bias)"
    r"|layers\.\d+\.0\.(?:norm[12]\.(?:weight|bias)|to_(?:q|kv|out)\.weight)"
)
POSITIONS, MEAN_POOLED = "pos_emb.weight", "to_latents_from_mean_pooled_seq.1.weight"
_FEED_FORWARD_NAME = re.compile(r"(layers\.\d+\.1)\..+")
_NEEDED = ("latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")


def find_projection(tensors: State) -> Projection:
    """The Q-Former or the pooled projection, under any prefix.

    Raises NestedAttentionError when there is none, more than one, or an incomplete one.
    """
    prefixes = [key[: -len("latents")] for key in tensors if re.search(r"(^|\.)latents$", key)]
    # Training checkpoints hold the U-Net too, so any prefix with a proj and a norm won't do: theirs fit together.
    pooled = [key[: -len("proj.weight")] for key in tensors if re.search(r"(^|\.)proj\.weight$", key)]
    pooled = [prefix for prefix in pooled if _is_pooled_projection(tensors, prefix)]
    found = [_resampler_at(tensors, prefix) for prefix in prefixes] or [
        Projection(prefix, {name: prefix + name for name in _POOLED_NAMES}, pooled=True) for prefix in pooled
    ]
    if not found:
        raise NestedAttentionError(_refusal(tensors))
    if len(found) > 1:
        places = ", ".join(f'"{projection.prefix}"' for projection in found)
        raise NestedAttentionError(
            f"The file holds {len(found)} image projections, under {places}; expected one. "
            f"If it is a training checkpoint, export the one to use (without the averaged copy, say)."
        )
    return found[0]


_POOLED_NAMES = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")


def _is_pooled_projection(tensors: State, prefix: str) -> bool:
    if not all(prefix + name in tensors for name in _POOLED_NAMES):
        return False
    proj, norm = tensors[f"{prefix}proj.weight"], tensors[f"{prefix}norm.weight"]
    return proj.ndim == 2 and norm.ndim == 1 and proj.shape[0] % norm.shape[0] == 0


def _resampler_at(tensors: State, prefix: str) -> Projection:
    names: dict[str, str] = {}
    feed_forwards: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        if key.startswith(prefix):
            name = key[len(prefix) :]
            if _RESAMPLER_NAME.fullmatch(name):
                names[name] = key
            elif match := _FEED_FORWARD_NAME.fullmatch(name):
                feed_forwards[match[1]].append(key)
    for place, keys in feed_forwards.items():
        names |= _feed_forward(tensors, place, sorted(keys, key=_natural))
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise NestedAttentionError(
            f"The file has the queries of a resampler ({_show(tensors, [prefix + 'latents'])}), but no "
            f"{', '.join(prefix + name for name in missing)}. "
            f"{_refusal(tensors)}"
        )
    if tensors[names["latents"]].ndim not in (2, 3):
        raise NestedAttentionError(
            f"The resampler's queries should have the shape (1, tokens, width), "
            f"got {_show(tensors, [names['latents']])}."
        )
    return Projection(prefix, names, pooled=False)


def _feed_forward(tensors: State, place: str, keys: list[str]) -> dict[str, str]:
    """One feed-forward's tensors under our names: a norm (weight and bias) and two matrices in order."""
    matrices = [key for key in keys if tensors[key].ndim == 2]
    vectors = [key for key in keys if tensors[key].ndim == 1]
    weights = [key for key in vectors if key.endswith("weight")]
    biases = [key for key in vectors if key.endswith("bias")]
    if len(keys) != 4 or len(matrices) != 2 or len(weights) != 1 or len(biases) != 1:
        raise NestedAttentionError(
            f"A feed-forward of the resampler should be a norm (weight and bias) and two matrices without bias, "
            f"got {_show(tensors, keys)}."
        )
    return {
        f"{place}.0.weight": weights[0],
        f"{place}.0.bias": biases[0],
        f"{place}.1.weight": matrices[0],
        f"{place}.3.weight": matrices[1],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The K̈ / V̈ layers

_DIFFUSERS_PLACE = re.compile(
    r"(?:(?P<side>down|up)_blocks[._](?P<block>\d+)|(?P<mid>mid_block))[._]attentions[._](?P<attention>\d+)"
    r"[._]transformer_blocks[._](?P<transformer>\d+)(?:[._]attn(?P<attn>\d))?"
)
_ORIGINAL_PLACE = re.compile(
    r"(?P<place>(?:(?:in|out)put_blocks[._]\d+|middle_block)[._]1[._]transformer_blocks[._]\d+)(?:[._]attn(?P<attn>\d))?"
)
_VALUE_FOR_KEY = {"k": "v", "key": "value", "keys": "values", "wk": "wv", "kproj": "vproj"}
_QUERY_FOR_KEY = {"k": "q", "key": "query", "keys": "queries", "wk": "wq", "kproj": "qproj"}
_KEY_FOR_VALUE = {value: key for key, value in _VALUE_FOR_KEY.items()}
_BY_ORIGINAL_NAME = {layer.original: layer.diffusers for family in PUBLISHED.values() for layer in family.layers()}


def families_of(said: Mapping[str, str]) -> dict[int, Family]:
    """The families that a file can be for, by number of layers: the published ones, and the one our metadata names.

    Raises NestedAttentionError when that is not known here.
    """
    named = [family_of(said["family"])] if "family" in said else []
    return {len(family.layers()): family for family in [*PUBLISHED.values(), *named]}


def find_layers(tensors: State, projection: Projection, counts: dict[int, Family]) -> Layers:
    """The pairs of K̈ / V̈ layers in diffusers' order, as many as a family of `counts` has.

    Raises NestedAttentionError when there are none, or their number, partners, shapes or order don't add up.
    """
    taken = set(projection.names.values())
    schemes = _schemes(key for key, tensor in tensors.items() if tensor.ndim == 2 and key not in taken)
    complete = [name for name, places in schemes.items() if sum(map(_is_pair, places.values())) in counts]
    if not complete:
        raise NestedAttentionError(_incomplete(tensors, schemes, counts.values()))
    best = max(map(_preference, complete))
    chosen = [name for name in complete if _preference(name) == best]
    if len(chosen) > 1:
        raise NestedAttentionError(
            f"The file holds {len(chosen)} complete sets of key / value layers, named {' and '.join(sorted(chosen))}; "
            f"expected one. Export the one to use."
        )
    scheme, places = chosen[0], schemes[chosen[0]]
    alone = [key for sides in places.values() if not _is_pair(sides) for key in sides.values()]
    if alone:
        raise NestedAttentionError(_without_partner(tensors, alone))
    pairs = {place: Pair(sides["k"], sides["v"]) for place, sides in places.items()}
    _check_pairs(tensors, list(pairs.values()), projection)
    _refuse_queries(tensors, _own_queries(tensors, (pair.k for pair in pairs.values())))
    return _in_order(tensors, counts[len(pairs)], scheme, pairs)


def _in_order(tensors: State, family: Family, scheme: str, pairs: dict[_Place, Pair]) -> Layers:
    if "@" in scheme:
        expected = [layer.diffusers for layer in family.layers()]
        missing = [name for name in expected if name not in pairs]
        if missing:
            extra = sorted(str(place) for place in pairs if place not in expected)
            raise NestedAttentionError(
                f"The layers are named by their place in the U-Net, but not those of {family.title}: "
                f"no {few(missing)}; instead {few(extra)}."
            )
        listed = [pairs[name] for name in expected]
    else:
        listed = [pairs[place] for place in sorted(pairs)]
    found = [tensors[pair.k].shape[0] for pair in listed]
    settled = family.order_of(found)
    if settled is None or ("@" in scheme and settled[0] != DIFFUSERS_ORDER):
        raise NestedAttentionError(
            f"The output widths of the {len(found)} key / value layers fit no known order of an {family.title} U-Net. "
            f"Found {compress(found)}; expected {family.describe_orders()}."
        )
    order, indexes = settled
    by_index = dict(zip(indexes, listed, strict=True))
    if "@" in scheme:
        order = f"{order}, by name"
    elif family.is_ambiguous(found):
        order = f"{order} (their widths would fit {EXECUTION_ORDER} as well)"
    in_order = tuple(by_index[index] for index in range(len(listed)))
    return Layers(family, scheme, in_order, order, _biases(tensors, in_order))


def _schemes(keys: Iterable[str]) -> dict[str, dict[_Place, dict[str, str]]]:
    """Keys by the form of their names: scheme -> place -> {"k": key, "v": key}.

    In a scheme, "@" stands for the place in the U-Net or "#" for each number, and "{k}" for the word that is k or v.
    """
    keys = list(keys)
    known = set(keys)
    schemes: dict[str, dict[_Place, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in keys:
        located = _locate(key)
        # A to_k with a to_q beside it is the U-Net's own attention, in a training checkpoint.
        if located is None or re.sub(r"to_[kv](\.weight)$", r"to_q\1", key) in known - {key}:
            continue
        place, rest = located
        for side, scheme in _readings(rest):
            schemes[scheme][place][side] = key
    return schemes


def _locate(key: str) -> tuple[_Place, str] | None:
    """A key's place (name in diffusers, or its numbers) and the rest of its name; None for self-attention."""
    if match := _DIFFUSERS_PLACE.search(key):
        block = "mid_block" if match["mid"] else f"{match['side']}_blocks.{match['block']}"
        place = f"{block}.attentions.{match['attention']}.transformer_blocks.{match['transformer']}.attn2"
    elif match := _ORIGINAL_PLACE.search(key):
        original = re.sub(r"(?<=blocks)_|(?<=middle_block)_|_(?=\d)|(?<=\d)_", ".", match["place"]) + ".attn2"
        place = _BY_ORIGINAL_NAME.get(original, original)
    else:
        return tuple(int(number) for number in re.findall(r"\d+", key)), re.sub(r"\d+", "#", key)
    if match["attn"] == "1":
        return None
    return place, key[: match.start()] + "@" + key[match.end() :]


def _readings(rest: str) -> Iterator[tuple[str, str]]:
    """Which side ("k" or "v") a name can be, each with the name's form once the telling word is left open."""
    pieces = re.split(r"([._])", rest.lower())
    for side, words in (("k", _VALUE_FOR_KEY), ("v", _KEY_FOR_VALUE)):
        where = [i for i, piece in enumerate(pieces) if piece in words]
        # "keys.3.to_k" against "values.3.to_v": every such word may change, or only one of them.
        for changing in [[i] for i in where] + ([where] if len(where) > 1 else []):
            form = [
                f"{{{words[piece] if side == 'v' else piece}}}" if i in changing else piece
                for i, piece in enumerate(pieces)
            ]
            yield side, "".join(form)


def _is_pair(sides: dict[str, str]) -> bool:
    return len(sides) == 2


def _preference(scheme: str) -> tuple[int, bool]:
    """Training checkpoints hold the same layers twice, and IP-Adapter layers beside nested ones: which to take."""
    return (2 if "nest" in scheme else 1 if "ip" in re.split(r"[._]", scheme) else 0), "@" in scheme


def _check_pairs(tensors: State, pairs: list[Pair], projection: Projection) -> None:
    unlike = [pair for pair in pairs if tensors[pair.k].shape != tensors[pair.v].shape]
    if unlike:
        raise NestedAttentionError(
            f"The key and the value matrix of a layer should have the same shape, got "
            f"{_show(tensors, [key for pair in unlike for key in pair])}."
        )
    name = "norm.weight" if projection.pooled else "proj_out.weight"
    token_dim = tensors[projection.names[name]].shape[0]
    other = [pair for pair in pairs if tensors[pair.k].shape[1] != token_dim]
    if other:
        raise NestedAttentionError(
            f"The key / value layers should read tokens of width {token_dim}, as the image projection gives them "
            f"({_show(tensors, [projection.names[name]])}), got {_show(tensors, [key for p in other for key in p])}."
        )


def _biases(tensors: State, pairs: Collection[Pair]) -> tuple[Pair, ...]:
    """The biases of these layers; empty where none has one."""
    biases = [Pair(*(re.sub("weight$", "bias", key) for key in pair)) for pair in pairs]
    wanted = {bias: key for both, pair in zip(biases, pairs, strict=True) for bias, key in zip(both, pair, strict=True)}
    found = [bias for bias, key in wanted.items() if bias != key and bias in tensors]
    if not found:
        return ()
    without = [bias for bias in wanted if bias not in found]
    if without:
        raise NestedAttentionError(
            f"Some key / value layers have a bias ({_show(tensors, found)}), and others none: no {few(without)}. "
            "The file is incomplete: get it again, or export it again."
        )
    wrong = [bias for bias in found if tensors[bias].shape != tensors[wanted[bias]].shape[:1]]
    if wrong:
        raise NestedAttentionError(
            f"The bias of a key / value layer has a number per output of the layer, got {_show(tensors, wrong)} beside "
            f"{_show(tensors, [wanted[bias] for bias in wrong])}."
        )
    return tuple(biases)


def _own_queries(keys: Collection[str], found: Iterable[str]) -> list[str]:
    """Query matrices that stand beside these key matrices: k in the name, or some of its k's, read as q."""
    queries = []
    for key in found:
        pieces = re.split(r"([._])", key)
        where = [i for i, piece in enumerate(pieces) if piece.lower() in _QUERY_FOR_KEY]
        for changing in [[i] for i in where] + ([where] if len(where) > 1 else []):
            name = "".join(_QUERY_FOR_KEY[p.lower()] if i in changing else p for i, p in enumerate(pieces))
            if name in keys:
                queries.append(name)
    return queries


def _queries_of_sets(tensors: State, counts: Collection[int]) -> list[str]:
    """The query matrices of layers that are whole attentions and not the U-Net's, if a family has as many."""
    sets: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        located = _locate(key) if key.endswith("to_k.weight") else None
        if located and not located[1].endswith("@.to_k.weight"):
            sets[located[1]].append(key)
    whole = [keys for keys in sets.values() if len(keys) in counts]
    return [query for keys in whole for query in _own_queries(tensors, keys)]


def _refuse_queries(tensors: State, queries: list[str]) -> None:
    if queries:
        raise NestedAttentionError(
            f"The key / value layers of this file have queries of their own: {_show(tensors, queries)}. In nested "
            "attention the queries are the U-Net's (equation 1), which the subject's keys were trained against; these "
            "layers were trained for another attention, and this pack can't run them."
        )


def _incomplete(tensors: State, schemes: dict[str, dict[_Place, dict[str, str]]], families: Collection[Family]) -> str:
    """Why no complete set of layers was found."""
    counts = [len(family.layers()) for family in families]
    full = " or ".join(f"{count} ({family.title})" for count, family in zip(counts, families, strict=True))
    _refuse_queries(tensors, _queries_of_sets(tensors, counts))
    ranked = sorted(schemes.items(), key=lambda item: (sum(map(_is_pair, item[1].values())), len(item[1])))
    if not ranked:
        return f"The file has an image projection but no key / value layers; expected {full} pairs. {_refusal(tensors)}"
    places = ranked[-1][1]
    pairs = [sides for _, sides in sorted(places.items(), key=lambda item: str(item[0])) if _is_pair(sides)]
    alone = [key for sides in places.values() if not _is_pair(sides) for key in sides.values()]
    if alone:
        return _without_partner(tensors, alone)
    keys = sorted((sides["k"] for sides in pairs), key=_natural)
    return (
        f"Expected {full} pairs of key / value layers, found {len(pairs)}, from {keys[0]} to {keys[-1]}, of widths "
        f"{compress([tensors[key].shape[0] for key in keys])}. Known sequences: "
        + "; ".join(f"{family.title}: {family.describe_orders()}" for family in families)
        + "."
    )


def _without_partner(tensors: State, alone: list[str]) -> str:
    return (
        f"Every cross-attention layer needs a key and a value matrix, but these have no partner: "
        f"{_show(tensors, sorted(alone, key=_natural))}. The file is incomplete: get it again, or export it again."
    )


def check_rest(tensors: State, projection: Projection, layers: Layers) -> None:
    """What is left over: inside the image projection it would change the result, elsewhere it is reported."""
    used = set(projection.names.values()) | {key for pair in (*layers.pairs, *layers.biases) for key in pair}
    rest = [key for key in tensors if key not in used]
    # What lies beside a weight of one byte may be its scale, under a name this pack does not know.
    quantised = [key.removesuffix("weight") for key in used if tensors[key].element_size() == 1]
    inside = [key for key in rest if key.startswith((projection.prefix, *quantised))]
    if inside:
        raise NestedAttentionError(
            f"The file has parts of the encoder that this pack does not know: {_show(tensors, inside)}. "
            f"Leaving them out would change the result, so the file was not loaded."
        )
    if rest:
        log.warning("%d tensors of the file are not the encoder's and were left out: %s", len(rest), few(rest))


# ---------------------------------------------------------------------------------------------------------------------
# Other files, and messages

PLAIN_IP_ADAPTER = (
    "This is not a nested attention encoder: it is a plain IP-Adapter file, which makes its few tokens from the pooled "
    "image embedding. Of the IP-Adapter files only the Plus ones can be used (as an experimental encoder)."
)


def _refusal(tensors: State) -> str:
    """Why a state dict is no encoder: what it looks like instead, or what is in it."""
    other = looks_like(tensors)
    if other:
        return f"This is not a nested attention encoder: it looks like {other[0]}. {other[1]}"
    held = f"{len(tensors)} tensors, such as {_show(tensors, list(tensors))}" if tensors else "no tensors at all"
    return (
        "This is not a nested attention encoder: expected a resampler (latents, proj_in, layers, proj_out, norm_out) "
        "or a pooled projection (proj, norm), and a pair of key / value layers for each cross-attention layer. "
        f"The file has {held}."
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key that reads numbers as numbers: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _show(tensors: State, keys: list[str]) -> str:
    return few([f"{key} {tuple(tensors[key].shape)}" for key in keys])
