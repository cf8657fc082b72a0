"""Placeholders in prompts: what counts as the same word, where a plain word ends, how long reading takes."""

from __future__ import annotations

import os
import re
import sys
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.errors import NestedAttentionError
from nested_core.prompt import Placeholder, PromptReader, Span, locate
from nested_core.subject import is_plain_word, validate_placeholder
from nested_core.words import fold, letters
from slow_reading import cut, read_slowly, same


def found(placeholder: str, text: str) -> list[str]:
    """What stands for the placeholder, as written in the text."""
    plain = is_plain_word(placeholder)
    reader = PromptReader([Placeholder(placeholder, "" if plain else "\0")])
    reading = reader.read(text)
    assert reader.mentions_any(text) == bool(reading.spans)
    if plain:
        assert reading.text == text or len(reading.spans) > 1  # side by side: a space between them
        return [reading.text[span.start : span.stop] for span in reading.spans]
    kept = [
        reading.text[a.stop : b.start] for a, b in zip((Span(0, 0, ""), *reading.spans), reading.spans, strict=False)
    ]
    written, at = [], 0
    for before, after in zip(
        kept, [*kept[1:], reading.text[reading.spans[-1].stop :] if reading.spans else ""], strict=True
    ):
        at += len(before)
        end = text.index(after, at) if after else len(text)
        written.append(text[at:end])
        at = end
    return written


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


# --- where a plain word ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placeholder", "text", "times"),
    [
        ("男", "我的男朋友", 1),
        ("小明", "照片中小明和小明的狗。", 2),
        ("人", "3人の女性と人形", 2),  # also inside a longer word
        ("女の子", "公園にいる女の子が笑う", 1),
        ("カメラ", "カメラマンのカメラー", 2),
        ("คน", "รูปคนในสวน", 1),
        ("ຄົນ", "ຮູບຄົນໃນສວນ", 1),
        ("មនុស្ស", "រូបមនុស្សនៅសួន", 1),
        ("လူ", "ဓာတ်ပုံလူတစ်ယောက်", 1),
        ("མི", "འདི་མི་དེ", 1),
        ("남자", "남자가 웃는다, 그남자", 2),
        ("man", "一个man在花园, manさん, man은", 3),
        ("男", "man男2男", 2),
        ("man", "woman man2 2man man_ _man mañana manу mané", 0),
        ("man", "man's man-made «man» man👩‍🦰 1️⃣man ❤️man man.", 7),
        ("man", "人_man man_人", 0),  # an underscore holds together, in any script
        ("人", "人_2 x_人 _人_", 0),
        ("person_2", "在person_2旁边", 1),
        ("नमन", "यह नमन है, नमनम", 1),
        ("नमन", "नमनी", 0),  # a vowel sign belongs to its letter
        ("คน", "คนี คนำ", 0),
        ("မ", "မာ", 0),
        ("ម", "ខ្មែរ", 0),  # stacked under another consonant
        ("가", "각", 0),
        ("가", nfd("각"), 0),
    ],
)
def test_where_a_plain_word_ends(placeholder: str, text: str, times: int) -> None:
    for written in (placeholder, nfd(placeholder)):
        for prompt in (text, nfd(text)):
            assert len(found(written, prompt)) == times, (written, prompt)
            assert all(same(cut(here), cut(placeholder)) for here in found(written, prompt))


def test_a_combining_mark_belongs_to_the_letter_before_it() -> None:
    assert found("man", "man\u0303ana man\u0301 man") == ["man"]
    assert found("<a>", "<a>\u0338 <a>") == ["<a>"]
    assert found("Jose", "José " + nfd("José") + " Jose") == ["Jose"]


def test_the_longest_placeholder_counts() -> None:
    reader = PromptReader([Placeholder("人", "x"), Placeholder(nfd("人é"), "x"), Placeholder("人形", "x")])
    reading = reader.read("人形と人と人é")
    assert [span.placeholder for span in reading.spans] == ["人形", "人", nfd("人é")]
    # A longer one that may not end there leaves the place to a shorter one.
    reader = PromptReader([Placeholder("男a", "x"), Placeholder("男", "x")])
    assert [span.placeholder for span in reader.read("男ab 男a").spans] == ["男", "男a"]


def test_plain_words_side_by_side_stay_two_words() -> None:
    reading = PromptReader([Placeholder("男", "x"), Placeholder("<a>", "dog")]).read("男男<A>男と")
    assert reading.text == "男 男 dog 男と"
    assert reading.spans == (Span(0, 1, "男"), Span(2, 3, "男"), Span(4, 7, "<a>"), Span(8, 9, "男"))


def test_plain_words_of_every_script() -> None:
    for word in ("नमस्ते", "คนดี", "မြန်မာ", "José", "한국", "עִבְרִית", "ｍａｎ＿２", "葛\U000e0100城", "golden retriever"):
        assert is_plain_word(word) and is_plain_word(nfd(word)), word
    assert not any(is_plain_word(word) for word in ("＜ａ＞", "男·", "a②?", "@anna", ""))


# --- the same word ---------------------------------------------------------------------------------------------------

EQUAL = [
    ("<José>", nfd("<José>")),
    ("<person>", "＜person＞"),
    ("<person>", "〈person〉"),
    ("<person>", "《person》"),
    ("<person>", "\u2329PERSON\u232a"),  # what NFC makes 〈 〉 of
    ("<person1>", "＜ｐｅｒＳＯＮ１＞"),
    ("[person]", "［person］"),
    ("@anna", "＠anna"),
    ("s*", "Ｓ＊"),
    ("<カラダ>", "<ｶﾗﾀﾞ>"),
    ("ガラス", "ｶﾞﾗｽ"),
    ("golden retriever", "Golden\u3000Retriever"),
    ("<가나>", nfd("<가나>")),
    ("葛城", "葛\U000e0100城"),
    ("<❤a>", "<❤\ufe0fa>"),
    ("<groß>", "<GROẞ>"),
    ("<İrem>", "<irem>"),
    ("<İrem>", nfd("<İREM>")),
    ("<ılker>", "<ILKER>"),
    ("<ΣΑΣ>", "<σας>"),
    ("<susi>", "<ſuſi>"),
    ("<Ǆ>", "<ǅ>"),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_writings_of_the_same_word(one: str, other: str) -> None:
    assert Placeholder(one, "x").key == Placeholder(other, "y").key == Placeholder(nfd(other).upper(), "z").key
    for placeholder, written in ((one, other), (other, one), (nfd(one), other), (other, nfd(one))):
        assert found(placeholder, f"photo of {written}, oil") == [written]
        assert "\u3000" in placeholder or validate_placeholder(placeholder) == placeholder


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("<a2>", "<a²>"), ("<1>", "<①>"), ("<fi>", "<ﬁ>"), ("<gross>", "<groß>"), ("<kg>", "<㎏>"), ("<a>", "⟨a⟩")),
        *(("<a>", "«a»"), ("[a]", "【a】"), ("<jose>", "<José>"), ("<a>", "<<a>"), ("<は>", "<ば>"), ("<h>", "<ℌ>")),
        *(("<かな>", "<カナ>"), ("<α\u0345>", "<αι>"), ("<k>", "<к>")),
    ],
)
def test_writings_of_different_words(one: str, other: str) -> None:
    assert Placeholder(one, "x").key != Placeholder(other, "x").key
    assert len(PromptReader([Placeholder(one, "x")]).read(other).spans) == (one in other)


def test_a_key_is_what_people_would_write() -> None:
    assert Placeholder("＜ＪＯＳÉ＞", "x").key == "<josé>"
    assert all(fold(chr(c)) == chr(c).lower() for c in range(128))


def test_every_letter_is_what_it_was_in_any_case_and_composition() -> None:
    """What Python's `re` holds to be the same letter stays so; one mark excepted, whose capital is a letter."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Co", "Cs"):
            continue
        folded = fold(character)
        assert fold(folded) == folded and len(letters(folded)) == 1
        if unicodedata.normalize("NFC", character) != character or unicodedata.normalize("NFD", character) != character:
            assert folded == fold(unicodedata.normalize("NFC", character)) == fold(nfd(character))
        for other in {character.lower(), character.upper(), character.title()} - {character}:
            if len(other) == 1 and code != 0x345 and re.fullmatch(re.escape(character), other, re.IGNORECASE):
                assert fold(other) == folded, (character, other)


# --- against the slow reading ----------------------------------------------------------------------------------------

ALPHABET = [
    *"ananmMéÉñ12_ -<>[]@.,",
    *(
        "e\u0301",
        "n\u0303",
        "\u0301",
        "\u0303",
        "ｍ",
        "ａ",
        "＜",
        "＞",
        "〈",
        "〉",
        "《",
        "》",
        "［",
        "］",
        "＠",
        "＿",
        "１",
        "　",
    ),
    *(
        "男",
        "人",
        "形",
        "々",
        "の",
        "か",
        "か\u3099",
        "が",
        "カ",
        "ｶ",
        "ﾞ",
        "ー",
        "ｰ",
        "〆",
        "가",
        "각",
        "ᄀ",
        "ᅡ",
        "ᆨ",
        "는",
    ),
    *("ค", "น", "ี", "ำ", "ນ", "ก็", "ក", "្", "ម", "မ", "ာ", "္", "ྀ", "ཀ", "ན", "म", "ी", "्", "ब", "ب", "ה", "ִ"),
    *(
        "ß",
        "ẞ",
        "ſ",
        "s",
        "ss",
        "İ",
        "i",
        "ı",
        "I",
        "\u0307",
        "Σ",
        "ς",
        "ﬁ",
        "²",
        "①",
        "\u200d",
        "\u200c",
        "\u200b",
        "\ufe0f",
    ),
    *("👩", "👩‍🦰", "🏽", "🇩", "🇪", "1️⃣", "❤", "\n", "\r", "\r\n", "\u0600", "ൎ", "\U000e0100", "\x00"),
]
TEXT = st.lists(st.sampled_from(ALPHABET), max_size=24).map("".join)
NAME = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=4).map("".join)
NAMES = st.lists(NAME | NAME.map(lambda name: f"<{name}>"), min_size=1, max_size=4)


@settings(
    max_examples=int(os.environ.get("NESTED_FUZZ", "1500")), derandomize="NESTED_FUZZ" not in os.environ, deadline=None
)
@given(NAMES, TEXT, TEXT, st.sampled_from(["NFC", "NFD", ""]))
def test_reading_finds_what_the_slow_reading_finds(names: list[str], before: str, after: str, form: str) -> None:
    text = before + names[0] + after
    text = unicodedata.normalize(form, text) if form else text
    subjects: list[tuple[str, str]] = []
    for name in names:
        try:
            name = validate_placeholder(name)
        except NestedAttentionError:
            continue
        equal = [same(cut(name), cut(other)) for other, _ in subjects]
        assert equal == [fold(name) == fold(other) for other, _ in subjects]
        if not any(equal):
            subjects.append((name, "dog"))
    slow = read_slowly(text, subjects)
    reading = PromptReader(Placeholder(name, word) for name, word in subjects).read(text)
    assert reading.text == "".join(piece for piece, _ in slow)
    spans, at = [], 0
    for piece, owner in slow:
        if owner is not None:
            spans.append(Span(at, at + len(piece), owner))
        at += len(piece)
    assert reading.spans == tuple(spans)


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=12) | NAME, TEXT)
def test_a_placeholder_that_is_allowed_is_found_wherever_it_stands_alone(name: str, text: str) -> None:
    try:
        name = validate_placeholder(name)
    except NestedAttentionError:
        return
    for form in ("NFC", "NFD"):
        prompt = unicodedata.normalize(form, f"{text} , {name} , {text}")
        assert PromptReader([Placeholder(name, "x")]).mentions_any(prompt)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | TEXT)
def test_comparing_never_fails_and_settles(text: str) -> None:
    assert "".join(letters(text)) == text
    assert fold(fold(text)) == fold(text) == fold(nfd(text)) == fold(unicodedata.normalize("NFC", text))


# --- placeholders that would melt with their neighbours --------------------------------------------------------------


@pytest.mark.parametrize("word", ["\u0301anna", "ﾞか", "ำคน", "annaൎ"])
def test_half_a_letter_at_an_end_is_refused(word: str) -> None:
    with pytest.raises(NestedAttentionError, match="begins or ends with half a letter, such as an accent without"):
        validate_placeholder(word)


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *(
            "tree " * 20_000,
            "<anna" * 20_000,
            "<anna> " * 14_000,
            "man" * 33_000,
            "我的男朋友" * 20_000,
            "คนำ" * 33_000,
        ),
        *(
            "🇦" * 100_001,
            "🇦🇦x" * 33_000,
            "a" + "\u0315\u0316" * 50_000,
            "👩\u200d" * 50_000,
            "ក្ម" * 33_000,
            "क्" * 50_000,
        ),
        *("ᄀ" * 100_000, "\u0600" * 100_000, "\u200d" * 100_000, "".join(map(chr, range(0x4E00, 0x9FFF))) * 5),
    ],
    ids=lambda text: repr(text[:3]),
)
def test_a_long_prompt_is_read_at_once(text: str) -> None:
    reader = PromptReader(Placeholder(name, "x") for name in ("<anna>", "man", "男", "golden retriever", "คน"))
    start = time.process_time()
    reader.read(text)
    assert time.process_time() - start < 2  # it takes a fifth of a second; minutes where it is not linear


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[int]:
    """A tokenizer like CLIP's: lower case, words of letters, where a word's last token differs from others."""
    ids: list[int] = []
    for word in re.findall(r"[^\W\d_]+|\S", text.lower()):
        parts = re.findall("man|cat|s|[^s]", word)
        ids += [hash(part) for part in parts[:-1]] + [hash(parts[-1] + "</w>")]
    return ids


@pytest.mark.parametrize(
    ("placeholder", "text", "expected"),
    [
        ("男", "我的男朋友", [2]),
        ("男", "男朋友", [0]),
        ("男", "我的男", [2]),
        ("man", "一个man在", [2]),
        ("<p>", "我的<p>在", [2]),
        ("<p>", "x <p>s", [1]),
        ("<p>", "caté<p>s", [2]),
        ("ман", "xман", []),
    ],
)
def test_tokens_in_running_text(placeholder: str, text: str, expected: list[int]) -> None:
    reading = PromptReader([Placeholder(placeholder, "man")]).read(text)
    assert list(locate(reading, tokens(reading.text), tokens)) == expected


def test_a_class_word_without_letters_is_located_too() -> None:
    reading = PromptReader([Placeholder("<p>", "")]).read("a<p>")
    assert locate(reading, tokens("a"), tokens) == {}  # never an error


# --- class words as themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_word", "text", "expected"),
    [
        ("dog", "a Dog, dogs, <p>, hot-dog", ["Dog", "dog"]),  # <p> reads dog as well: that is the placeholder's
        ("dog", "<p>dog dog<p>", []),  # no text that the encoder reads changes, so this is one word: dogdog
        ("golden retriever", "a golden retriever, a retriever", ["golden retriever"]),
        ("T-shirt", "t-shirt, T-shirts, (T-shirt)", ["t-shirt", "T-shirt"]),
        ("犬", "子犬と犬", ["犬", "犬"]),
        ("josé", f"{nfd('José')} and Jose", [nfd("José")]),
    ],
)
def test_class_words_that_stand_as_themselves(class_word: str, text: str, expected: list[str]) -> None:
    seeking, other = (PromptReader([Placeholder("<p>", class_word, seeks_class_word=seek)]) for seek in (True, False))
    reading = seeking.read(text)
    assert reading == other.read(text)
    words = seeking.class_words(reading)
    assert words.text == reading.text
    assert [words.text[span.start : span.stop] for span in words.spans] == expected
    assert {span.placeholder for span in words.spans} <= {fold(class_word)}
    assert not other.class_words(reading).spans
    assert seeking.concerns(text) and other.concerns(text) == other.mentions_any(text) == ("<p>" in text)


def test_class_words_of_several_subjects() -> None:
    """The longest of them; one that two share is one; and a placeholder has what is its own."""
    subjects = [("<a>", "woman"), ("<b>", "WOMAN"), ("<c>", "young woman"), ("girl", "woman")]
    reader = PromptReader(Placeholder(name, word, seeks_class_word=True) for name, word in subjects)
    words = reader.class_words(reader.read("<a> girl, a young woman, woman"))
    assert [span.placeholder for span in words.spans] == ["young woman", "woman"]
