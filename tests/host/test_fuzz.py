"""Random prompts through the host's tokenizers: what is bound, against an independent way to find it.

Pytest takes the same few hundred prompts every time. `NESTED_FUZZ=100000` (in the environment) takes as many new ones.
"""

from __future__ import annotations

import os
import unicodedata

import pytest
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slow_reading import read_slowly

EXAMPLES = int(os.environ.get("NESTED_FUZZ", "300"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="NESTED_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

SUBJECTS = [
    ("<anna>", "woman"),
    ("<Rex>", "golden retriever"),
    ("<a>", "zebrafish, striped"),
    ("[ben]", "man"),
    ("dog", "dog"),
    ("<Zoë>", "girl"),
    ("人", "人"),
    ("女の子", "x"),
    ("José", "x"),
    ("คน", "x"),
]

# Not what this Python's Unicode does not have yet: the tokenizer may know it for a letter, and its lower case.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])
WORDS = [
    "a photo of",
    "garden",
    "dog",
    "Dogs",
    "hotdog",
    "x",
    "supercalifragilisticexpialidocious",
    "BREAK",
    "AND",
    "1girl",
]
SIGNS = list("()[]{}<>,.:;!?*'\"\\/|&%$#@~^-_=+ \n\t") + [
    ":1.2)",
    "((",
    "))",
    r"\(",
    r"\)",
    "(x:0.5)",
    "'s",
    "...",
    "  ",
]
LETTERS = [
    "é",
    "ß",
    "写真",
    "日本",
    "سلام",
    "👩‍🦰",
    "📷",
    "\u200b",
    "e\u0301",
    "Ω",
    "naïve",
    "Ünder",
    "\x00",
    "\ufeff",
    "ﬁ",
]
PROMPTS = st.lists(
    st.sampled_from([name for name, _ in SUBJECTS] * 2)
    | st.sampled_from([unicodedata.normalize("NFD", name) for name, _ in SUBJECTS])
    | st.sampled_from(
        ["＜ａｎｎａ＞", "〈anna〉", "《Zoe\u0308》", "［ben］", "ｄｏｇ", "jose\u0301s", "<anna>\u0338", "dog\u0301"]
    )
    | st.sampled_from(["三人", "人形", "人2", "人_", "女の子と", "dogと", "小dog", "คนี", "รูปคน", "Joséさん", "개dog가"])
    | st.sampled_from(["<ANNA>", "<rEX>", "<anna", "anna>", "<", ">", "<<anna>>", "<anna><a>", "< anna >", "[BEN]"])
    | st.sampled_from(WORDS)
    | st.sampled_from(SIGNS)
    | st.sampled_from(LETTERS)
    | st.text(KNOWN, max_size=8)
    | st.sampled_from(["tree " * 80, "word" * 40]),
    max_size=14,
).map("".join)


@pytest.fixture(scope="module")
def clips(pack, sdxl):
    """(stock CLIP, CLIP under which all SUBJECTS are bound)."""
    bound = sdxl.clip
    for name, word in SUBJECTS:
        bound = pack.prompt.bind_clip(bound, pack.prompt.Placeholder(name, word))
    return sdxl.clip, bound


def flat(clip, text, branch):
    """Tokens of a prompt without those that start, end and fill up sections."""
    tokens = clip.tokenize(text, return_word_ids=True)[branch]
    return [token for section in tokens for token, _, word in section if word]


def expected_owners(tokenizer, text, subjects):
    """(who stands at each token of a prompt, who at the word that a token is of), by its bytes: tokens are strings of
    bytes, one after another. The two differ where a subject is glued to letters, as in "<anna>s"."""
    decode = {ord(letter): byte for byte, letter in _byte_letters().items()}
    exact, wide = [], []
    for segment, _ in token_weights(escape_important(text), 1.0):
        pieces = read_slowly(unescape_important(segment), subjects)
        whole = "".join(piece for piece, _ in pieces)
        # The tokenizer composes accents. It finds none to compose over the end of a piece: those are whole letters.
        composed = [(character, owner) for piece, owner in pieces for character in unicodedata.normalize("NFC", piece)]
        segment, owners = "".join(character for character, _ in composed), [owner for _, owner in composed]
        assert segment == unicodedata.normalize("NFC", whole)
        glued = [{owner} - {None} for owner in owners]
        for order in (range(1, len(segment)), range(len(segment) - 2, -1, -1)):
            step = 1 if order.step > 0 else -1
            for i in order:
                if segment[i].isalpha() and segment[i - step].isalpha():
                    glued[i] = glued[i] | glued[i - step]
        strings = tokenizer.convert_ids_to_tokens(tokenizer(whole)["input_ids"][1:-1]) if whole else []
        parts = [bytes(decode[ord(letter)] for letter in string.removesuffix("</w>")) for string in strings]
        every, at = b"".join(parts), []
        for i, character in enumerate(segment):
            encoded = character.lower().encode("utf-8", "surrogatepass")
            if every[len(at) : len(at) + len(encoded)] == encoded:  # else a blank, or what the tokenizer drops
                at += [i] * len(encoded)
        assert len(at) == len(every), (segment, every)
        start = 0
        for part in parts:
            here = at[start : start + len(part)]
            exact.append({owners[i] for i in here} - {None})
            wide.append(set().union(*(glued[i] for i in here)))
            start += len(part)
    return exact, wide


def _byte_letters():
    """The letter that stands for each byte in CLIP's vocabulary (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in kept}
    table.update({b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in kept)})
    return table


@FUZZ
@given(PROMPTS)
def test_what_is_bound_is_where_the_subjects_stand(pack, clips, text):
    stock, bound = clips
    text_read = "".join(piece for piece, _ in read_slowly(text, SUBJECTS))
    for branch, tokenizer in (("l", stock.tokenizer.clip_l), ("g", stock.tokenizer.clip_g)):
        got = flat(bound, text, branch)
        assert [token % pack.prompt._STRIDE for token in got] == flat(stock, text_read, branch)
        exact, wide = expected_owners(tokenizer.tokenizer, text, SUBJECTS)
        assert len(exact) == len(got)
        for token, sure, allowed in zip(got, exact, wide, strict=True):
            who = pack.prompt._token_of(token).placeholder.text if token >= pack.prompt._STRIDE else None
            assert who in sure if sure else who is None or who in allowed, (text, who, sure, allowed)


@FUZZ
@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=16), PROMPTS)
def test_any_placeholder_binds_or_is_refused(pack, sdxl, name, word, text):
    """Random names and class words: a clear refusal, or a word that is found wherever it is written."""
    try:
        name = pack.subject.validate_placeholder(name)
        word = pack.subject.validate_class_word(word)
        clip = pack.prompt.bind_clip(sdxl.clip, pack.prompt.Placeholder(name, word))
    except pack.errors.NestedAttentionError as error:
        assert len(str(error)) > 40
        return
    assert any(token >= pack.prompt._STRIDE for token in flat(clip, f"{text} , {name} , x", "l"))
