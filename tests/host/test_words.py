"""Plain words in running text, names composed or not, full-width signs: through the host's own tokenizers.

The word's tokens are told from their bytes: CLIP's tokens, one after another, are the text.
"""

from __future__ import annotations

import unicodedata

import pytest
import torch


def places(cond):
    return {name: tuple(rows) for name, rows in cond[0][1]["nested_attention"]["places"].items()}


def rows_of(sdxl, text, *words):
    """Rows of the tokens that hold a part of a word: words in the order in which they stand in the text.

    Rows as both text encoders read them: the same, as both have one vocabulary.
    """
    text = unicodedata.normalize("NFC", text).lower()
    tokenizer = sdxl.clip.tokenizer.clip_l.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"][1:-1])
    owner, at = [], 0
    for word in (unicodedata.normalize("NFC", word).lower() for word in words):
        start = text.index(word, at)
        owner += [False] * len("".join(text[at:start].split()).encode())
        owner += [True] * len("".join(word.split()).encode())
        at = start + len(word)
    owner += [False] * len("".join(text[at:].split()).encode())
    rows, at = [], 0
    for row, token in enumerate(tokens, 1):
        length = len(token.removesuffix("</w>"))
        if any(owner[at : at + length]):
            rows.append(row)
        at += length
    assert at == len(owner)
    return tuple(rows)


def bind(sdxl, *subjects):
    model, clip = None, None
    for i, (placeholder, word) in enumerate(subjects):
        subject = sdxl.subject(placeholder, word, view=i) if i else sdxl.subject(placeholder, word)
        model, clip = sdxl.apply(subject, *((model, clip) if i else ()))
    return clip


@pytest.mark.parametrize(
    ("placeholder", "text", "words"),
    [
        ("男", "我的男朋友", ["男"]),
        ("男", "男", ["男"]),
        ("人", "日本人と人形, 3人", ["人", "人", "人"]),
        ("女の子", "公園にいる女の子が笑う、写真", ["女の子"]),
        ("남자", "남자가 웃는다", ["남자"]),
        ("친구", "그남자친구는", ["친구"]),
        ("မိန်းမ", "ဓာတ်ပုံ မိန်းမ နှင့်", ["မိန်းမ"]),
        ("नमन", "यह नमन है", ["नमन"]),
        ("कुत्ता", "एक कुत्ता, बड़ा", ["कुत्ता"]),
        ("man", "一个man在花园, manさん", ["man", "man"]),
        ("ガラス", "この ｶﾞﾗｽ と", ["ｶﾞﾗｽ"]),
        ("José", "photo of Jose\u0301, José and JOSÉ", ["José", "José", "JOSÉ"]),
        ("Jose\u0301", "photo of Jose\u0301, José and josés", ["José", "José"]),
        ("葛城", "写真、葛\U000e0100城さん", ["葛\U000e0100城"]),
    ],
)
@pytest.mark.works_with(
    "Prompt", "Plain words in Chinese, Japanese, Korean, Hindi, Burmese", "also without spaces around them"
)
def test_a_plain_word_in_running_text(sdxl, placeholder, text, words):
    cond = sdxl.encode(bind(sdxl, (placeholder, "person")), text)
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, text)[0][0]), "a plain word stays as it is"
    assert places(cond) == {placeholder: rows_of(sdxl, text, *words)}


def test_a_plain_word_with_a_weight_in_running_text(sdxl):
    cond = sdxl.encode(bind(sdxl, ("小明", "person")), "小明和小红在(小明:1.2)的家")
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, "小明和小红在(小明:1.2)的家")[0][0])
    # To the tokenizer a weight begins and ends a text, as a space does.
    assert places(cond) == {"小明": rows_of(sdxl, "小明和小红在 小明 的家", "小明", "小明")}


def test_where_words_have_spaces_a_plain_word_is_a_whole_word(sdxl):
    text = "womanly man2 _man mañana man, manу"
    cond = sdxl.encode(bind(sdxl, ("man", "person")), text)
    assert places(cond) == {"man": rows_of(sdxl, text, "man, ")[:1]}


def test_thai_binds_every_token_of_the_word(sdxl):
    """Thai's tokens reach over letters: one that ends in the next letter may bring that letter's rest with it."""
    text = "รูปคนดี"
    bound = set(places(sdxl.encode(bind(sdxl, ("คน", "person")), text))["คน"])
    sure = set(rows_of(sdxl, text, "คน"))
    assert sure <= bound and bound - sure <= {max(sure) + 1}


@pytest.mark.parametrize(
    ("placeholder", "written"),
    [
        ("<José>", "<José>"),
        ("<José>", "<Jose\u0301>"),
        ("<Jose\u0301>", "<JOSÉ>"),
        ("<person>", "＜person＞"),
        ("<person>", "〈person〉"),
        ("<person>", "《Person》"),
        ("<person>", "＜ＰＥＲＳＯＮ＞"),
        ("＜person＞", "<person>"),
        ("[person]", "［person］"),
        ("@anna", "＠ａｎｎａ"),
        ("<ガラ>", "<ｶﾞﾗ>"),
        ("<가나>", unicodedata.normalize("NFD", "<가나>")),
        ("<नमन>", "<नमन>"),
    ],
)
@pytest.mark.works_with(
    "Prompt", "Placeholders as input methods write them: ＜person＞, 《person》, accents apart", "the same placeholder"
)
def test_a_placeholder_in_another_writing(sdxl, placeholder, written):
    clip = bind(sdxl, (placeholder, "woman"))
    for text, stock in (
        ("photo of {}, oil", "photo of woman, oil"),
        ("照片：{}", "照片：woman"),
        ("({}:1.2)!", "(woman:1.2)!"),
    ):
        cond, plain = sdxl.encode(clip, text.format(written)), sdxl.encode(sdxl.clip, stock)
        assert torch.equal(cond[0][0], plain[0][0])
        read = stock.replace("(", "").replace(":1.2)", "")
        assert places(cond) == {placeholder: rows_of(sdxl, read, "woman")}


def test_a_class_word_in_running_text_takes_nothing_of_its_neighbours(sdxl):
    cond = sdxl.encode(bind(sdxl, ("<rex>", "golden retriever")), "我的<rex>在花园")
    assert places(cond) == {"<rex>": rows_of(sdxl, "我的golden retriever在花园", "golden retriever")}
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, "我的golden retriever在花园")[0][0])


def test_two_plain_words_side_by_side_each_have_their_tokens(sdxl):
    clip = bind(sdxl, ("男", "man"), ("女", "woman"))
    cond = sdxl.encode(clip, "一男女と男")
    read = "一男 女と男"
    assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, read)[0][0])
    assert places(cond) == {"男": rows_of(sdxl, read, "男", "男"), "女": rows_of(sdxl, read, "女")}


def test_a_mark_behind_a_word_makes_it_another(sdxl):
    clip = bind(sdxl, ("man", "person"))
    for text in ("man\u0303ana", "man\u0301", "มman\u0e31"):
        cond = sdxl.encode(clip, text)
        assert places(cond) == {}
        assert torch.equal(cond[0][0], sdxl.encode(sdxl.clip, text)[0][0])


@pytest.mark.parametrize(("one", "other"), [("<José>", "<Jose\u0301>"), ("<anna>", "＜ＡＮＮＡ＞"), ("ガラス", "ｶﾞﾗｽ")])
def test_two_writings_of_one_placeholder_are_one(pack, sdxl, one, other):
    with pytest.raises(pack.errors.NestedAttentionError, match=f"Two subjects use the placeholder {other}"):
        sdxl.apply(sdxl.subject(other, "man", view=1), clip=bind(sdxl, (one, "woman")))
