"""A subject: its words, merging views, and files that survive the trip or say what is wrong with them."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core import files
from nested_core.errors import NestedAttentionError
from nested_core.subject import (
    Subject,
    is_plain_word,
    load_subject,
    merge_subjects,
    save_subject,
    validate_class_word,
    validate_placeholder,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(tokens: int = 4, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Subject:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "tokens": torch.randn(1, tokens, width, generator=generator).to(dtype),
        "placeholder": "<person>",
        "class_word": "person",
        "encoder": "0123456789abcdef",
        "encoder_title": "Faces, SDXL",
        "family": "sdxl",
        "views": 1,
        "provenance": {"pack": "1.0.0", "images": f"hash{seed}"},
    }
    return Subject(**(values | fields))


@dataclass(frozen=True)
class Config:
    """The fields of an EncoderConfig that a subject is compared with."""

    fingerprint: str = "0123456789abcdef"
    title: str = "Faces, SDXL"
    family: str = "sdxl"
    token_dim: int = 8


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(NestedAttentionError) as error:
        call(*args, **kwargs)
    return str(error.value)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["<person>", "man", "my dog", "<Zoë>", "小明", "s*", "[anna]", "<person-2>", "x" * 64])
def test_placeholders_that_work(word: str) -> None:
    assert validate_placeholder(f"  {word} ") == word


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("", ["placeholder is empty", "<person>"]),
        ("  \t\n ", ["placeholder is empty"]),
        ("(person)", ["'(person)'", "holds ( )", "<person>"]),
        ("a\\b", ["holds \\"]),
        ("<person:1>", ["holds :", "weights"]),
        ("{a|b}", ["holds { | }", "wildcards"]),
        ("a\nb", ["line break", "U+000A"]),
        ("a\0b", ["U+0000"]),
        ("a\u200bb", ["cannot be seen", "U+200B"]),
        ("embedding", ["starts with 'embedding'"]),
        ("Embedding_x", ["textual inversion"]),
        ("a//b", ["//", "comment"]),
        ("/*a", ["/*", "comment"]),
        ("<>", ["no letter and no digit"]),
        ("x" * 65, ["65 characters", "at most 64"]),
        (None, ["a NoneType"]),
    ],
)
def test_placeholders_that_would_break_a_prompt_are_refused(word: Any, words: list[str]) -> None:
    text = message(validate_placeholder, word)
    assert all(part in text for part in words), text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_a_placeholder_is_valid_or_refused_and_stays_valid(text: str) -> None:
    try:
        word = validate_placeholder(text)
    except NestedAttentionError:
        return
    assert word == text.strip() == validate_placeholder(word)
    assert 1 <= len(word) <= 64 and not set(word) & set("()\\:{}|\n\r\t\0")


def test_plain_words() -> None:
    assert all(is_plain_word(word) for word in ("man", "golden retriever", "小明", "person_2"))
    assert not any(is_plain_word(word) for word in ("<person>", "s*", "man-2", "[anna]", ""))


@pytest.mark.parametrize("word", ["person", "golden retriever", "t-shirt", "café", "child's toy"])
def test_class_words_that_work(word: str) -> None:
    assert validate_class_word(f" {word}\n") == word


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (" ", ["class word is empty", "golden retriever"]),
        ("a\nb", ["class word", "U+000A"]),
        ("a\0", ["U+0000"]),
        ("...", ["no letter"]),
        ("(man)", ["holds ( )", "(<person>:1.2)"]),
        ("x" * 65, ["65 characters"]),
        (3, ["a int"]),
    ],
)
def test_class_words_that_are_refused(word: Any, words: list[str]) -> None:
    text = message(validate_class_word, word)
    assert all(part in text for part in words), text


# --- the value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_keep_their_dtype(dtype: torch.dtype) -> None:
    assert make(dtype=dtype).tokens.dtype == dtype


def test_a_subject_is_immutable_and_owns_its_provenance() -> None:
    provenance = {"pack": "1"}
    subject = make(provenance=provenance, placeholder=" <person> ", tokens=4)
    provenance["pack"] = "2"
    assert subject.provenance == {"pack": "1"} and subject.placeholder == "<person>"
    with pytest.raises(FrozenInstanceError):
        subject.placeholder = "man"  # type: ignore[misc]
    assert len({subject, make()}) == 2  # hashable: the host caches by it
    assert "<person>" in repr(subject) and "Faces, SDXL" in repr(subject) and "4 tokens of width 8" in repr(subject)


def test_a_subject_does_not_keep_a_graph() -> None:
    assert not make_from(torch.randn(1, 2, 3, requires_grad=True) * 2).tokens.requires_grad


def make_from(tokens: Any, **fields: Any) -> Subject:
    return Subject(tokens, "<person>", "person", "abc", "Faces", "sdxl", **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": torch.randn(4, 8)}, ["(1, N, C)", "(4, 8)"]),
        ({"tokens": torch.randn(2, 4, 8)}, ["(2, 4, 8)", "one after another"]),
        ({"tokens": torch.randn(1, 0, 8)}, ["(1, 0, 8)"]),
        ({"tokens": torch.zeros(1, 4, 8, dtype=torch.int32)}, ["fp32, fp16 or bf16", "int32"]),
        ({"tokens": torch.full((1, 4, 8), torch.inf)}, ["not numbers", "fp32 or bf16"]),
        ({"tokens": [1.0]}, ["a list"]),
        ({"views": 0}, ["1 or more", "0"]),
        ({"encoder": ""}, ["encoder", "not empty"]),
        ({"family": None}, ["family", "None"]),
        ({"placeholder": "(x)"}, ["placeholder"]),
        ({"class_word": ""}, ["class word"]),
        ({"token_weights": torch.ones(3)}, ["(4,)", "(3,)"]),
        ({"token_weights": torch.tensor([1.0, 2.0, 0.0, 1.0])}, ["above 0"]),
        ({"token_weights": torch.tensor([1.0, 2.0, torch.nan, 1.0])}, ["finite"]),
        ({"token_weights": [1.0] * 4}, ["list"]),
        ({"provenance": {"views": 3}}, ["texts to texts"]),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {"tokens": torch.randn(1, 4, 8)} | fields
    base: dict[str, Any] = {
        "placeholder": "<person>", "class_word": "person", "encoder": "abc", "encoder_title": "Faces", "family": "sdxl",
    }  # fmt: skip
    text = message(Subject, **(base | arguments))
    assert all(word in text for word in words), text


# --- merging ---------------------------------------------------------------------------------------------------------


def nested_softmax(subject: Subject, query: torch.Tensor) -> torch.Tensor:
    """Equation 1 with K = V = tokens and the weights as multiplicities."""
    tokens = subject.tokens.double()[0]
    logits = query @ tokens.T
    if subject.token_weights is not None:
        logits = logits + subject.token_weights.double().log()
    return logits.softmax(-1) @ tokens


def test_merging_concatenates_in_order() -> None:
    a, b, c = make(4, seed=1), make(4, seed=2, placeholder="<b>", class_word="man"), make(2, seed=3, views=2)
    merged = merge_subjects([a, b, c], [1, 1, 1])
    assert torch.equal(merged.tokens, torch.cat((a.tokens, b.tokens, c.tokens), dim=1))
    assert merged.token_weights is None
    assert (merged.placeholder, merged.class_word, merged.views) == ("<person>", "person", 4)
    assert (merged.encoder, merged.encoder_title, merged.family) == (a.encoder, a.encoder_title, a.family)
    assert merged.provenance == {"pack": "1.0.0", "images": "hash1; hash2; hash3", "merge_weights": "1, 1, 1"}


def test_a_weight_of_two_is_the_view_twice() -> None:
    a, b = make(4, seed=1), make(3, seed=2)
    merged = merge_subjects([a, b], [2, 1])
    assert merged.token_weights is not None
    assert merged.token_weights.tolist() == [2, 2, 2, 2, 1, 1, 1]
    twice = merge_subjects([a, a, b])
    query = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(nested_softmax(merged, query), nested_softmax(twice, query), atol=1e-12)


def test_only_ratios_matter() -> None:
    a, b = make(4, seed=1), make(3, seed=2)
    query = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    one, other = merge_subjects([a, b], [0.5, 1.5]), merge_subjects([a, b], [2, 6])
    assert torch.allclose(nested_softmax(one, query), nested_softmax(other, query), atol=1e-6)
    for weights in ([3, 3], [0.25, 0.25], [1, 1], None):
        assert merge_subjects([a, b], weights).token_weights is None


def test_weight_zero_leaves_a_view_out() -> None:
    a, b, c = make(4, seed=1), make(4, seed=2), make(4, seed=3)
    merged = merge_subjects([a, b, c], [1, 0, 1])
    assert torch.equal(merged.tokens, torch.cat((a.tokens, c.tokens), dim=1))
    assert merged.views == 2 and merged.token_weights is None and merged.provenance["images"] == "hash1; hash3"
    only = merge_subjects([a, b], [0, 2.5])
    assert torch.equal(only.tokens, b.tokens) and only.token_weights is None and only.provenance == b.provenance
    assert merge_subjects([a]).views == 1


def test_merging_again_keeps_earlier_weights_in_proportion() -> None:
    a, b, c = make(4, seed=1), make(4, seed=2), make(4, seed=3)
    inner = merge_subjects([a, b], [3, 1])
    outer = merge_subjects([inner, c], [2, 1])
    assert outer.token_weights is not None
    assert outer.token_weights.tolist() == [3] * 4 + [1] * 4 + [1] * 4  # the inner pair: mean 1, times 2
    assert outer.views == 3
    scaled = merge_subjects([merge_subjects([a, b], [300, 100]), c], [2, 1])
    assert torch.equal(scaled.token_weights, outer.token_weights)  # type: ignore[arg-type]


def test_merging_mixed_precision_loses_nothing() -> None:
    merged = merge_subjects([make(dtype=torch.float16), make(seed=1)])
    assert merged.tokens.dtype == torch.float32 and torch.equal(merged.tokens[:, 4:], make(seed=1).tokens)
    assert merge_subjects([make(dtype=torch.float16)] * 2).tokens.dtype == torch.float16


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0, 2.0])), min_size=1, max_size=6))
def test_any_merge_has_one_weight_per_token(parts: list[tuple[int, float]]) -> None:
    subjects = [make(count, seed=i) for i, (count, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    if not any(weights):
        assert "All weights are 0" in message(merge_subjects, subjects, weights)
        return
    merged = merge_subjects(subjects, weights)
    expected = [weight for count, weight in parts for _ in range(count) if weight > 0]
    if merged.token_weights is None:
        assert len(set(expected)) == 1 and merged.tokens.shape[1] == len(expected)
    else:
        assert merged.token_weights.tolist() == expected


@pytest.mark.parametrize(
    ("subjects", "weights", "words"),
    [
        ([], None, ["no subject to merge", "Connect"]),
        ([make(), "x"], None, ["Subject 2 of 2", "a str", "Encode Subject"]),
        ([make(), make()], [1], ["2 subject(s) and 1 weights", "one per subject"]),
        ([make(), make()], [1, -1], ["Weight 2", "-1", "0 leaves the view out"]),
        ([make(), make()], [float("nan"), 1], ["Weight 1", "nan"]),
        ([make(), make()], [float("inf"), 1], ["Weight 1", "inf"]),
        ([make(), make()], [1e-9, 1], ["Weight 1", "1e-06", "1e-09"]),
        ([make(), make()], ["1", 1], ["Weight 1", "'1'"]),
        ([make(), make()], [0, 0], ["All weights are 0", "above 0"]),
        (
            [make(), make(encoder="fedcba9876543210", encoder_title="Pets")],
            None,
            [
                "one encoder",
                "'Faces, SDXL' [0123456789abcdef]",
                "subject 2",
                "'Pets' [fedcba9876543210]",
                "same encoder",
            ],
        ),
        ([make(), make(width=16)], None, ["width 8", "width 16"]),
    ],
)
def test_merges_that_are_refused(subjects: list[Any], weights: Any, words: list[str]) -> None:
    text = message(merge_subjects, subjects, weights)
    assert all(word in text for word in words), text


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_saved_subject_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, weighted: bool) -> None:
    subject = merge_subjects([make(dtype=dtype), make(3, seed=1, dtype=dtype)], [2 if weighted else 1, 1])
    path = save_subject(tmp_path / "anna.safetensors", subject)
    loaded = load_subject(path, Config())  # type: ignore[arg-type]
    assert loaded.tokens.dtype == dtype and torch.equal(loaded.tokens, subject.tokens)
    if weighted:
        assert torch.equal(loaded.token_weights, subject.token_weights)  # type: ignore[arg-type]
    else:
        assert loaded.token_weights is None
    for name in ("placeholder", "class_word", "encoder", "encoder_title", "family", "views"):
        assert getattr(loaded, name) == getattr(subject, name)
    assert loaded.provenance == subject.provenance | {"created": loaded.provenance["created"]}
    assert os.listdir(tmp_path) == ["anna.safetensors"]


def test_other_languages_and_a_view_of_a_larger_tensor_survive(tmp_path: Path) -> None:
    tokens = torch.randn(1, 8, 6).transpose(1, 2)[:, 1:5]
    subject = make_from(tokens, provenance={"note": 'Zoë "小明" \\ 🙂'})
    loaded = load_subject(save_subject(tmp_path / "小明.safetensors", subject))
    assert torch.equal(loaded.tokens, tokens) and loaded.provenance["note"] == 'Zoë "小明" \\ 🙂'


def test_the_file_is_plain_safetensors_with_its_metadata(tmp_path: Path) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {"tokens"}
    assert metadata["format"] == "nested_attention.subject" and metadata["version"] == "1"
    assert metadata["placeholder"] == "<person>" and metadata["class_word"] == "person" and metadata["views"] == "1"
    assert metadata["encoder"] == "0123456789abcdef" and metadata["encoder_title"] == "Faces, SDXL"
    assert json.loads(metadata["provenance"])["images"] == "hash0"


def test_the_date_is_that_of_the_first_save(tmp_path: Path) -> None:
    subject = make(provenance={"created": "2025-01-02T03:04:05+00:00"})
    first = load_subject(save_subject(tmp_path / "a.safetensors", subject))
    again = load_subject(save_subject(tmp_path / "b.safetensors", first))
    assert again.provenance["created"] == "2025-01-02T03:04:05+00:00"


def test_a_loaded_subject_does_not_hold_its_file(tmp_path: Path) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    loaded = load_subject(path)
    before = loaded.tokens.clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.tokens, before)


def test_overrides(tmp_path: Path) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    renamed = load_subject(path, placeholder=" <anna> ", class_word="woman")
    assert (renamed.placeholder, renamed.class_word) == ("<anna>", "woman")
    kept = load_subject(path, placeholder="", class_word="  ")
    assert (kept.placeholder, kept.class_word) == ("<person>", "person")
    assert "holds :" in message(load_subject, path, placeholder="a:b")
    assert "class word" in message(load_subject, path, class_word="(b)")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    before = path.read_bytes()
    for broken in ("fsync", "replace"):
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

            def fail(*_: object, error: BaseException = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(os, broken, fail)
                if isinstance(error, OSError):
                    text = message(save_subject, path, make(seed=1))
                    assert "No space left on device" in text and "anna.safetensors" in text and "MB free" in text
                else:
                    with pytest.raises(KeyboardInterrupt):
                        save_subject(path, make(seed=1))
            assert path.read_bytes() == before and os.listdir(tmp_path) == ["anna.safetensors"]
    save_subject(path, make(seed=1))
    assert torch.equal(load_subject(path).tokens, make(seed=1).tokens)


def test_saves_that_are_refused(tmp_path: Path) -> None:
    assert "'anna.png'" in message(save_subject, tmp_path / "anna.png", make())
    text = message(save_subject, tmp_path / "missing" / "anna.safetensors", make())
    assert "missing" in text and "exists, can be written to" in text


def test_a_subject_of_another_encoder_is_refused_with_both_names(tmp_path: Path) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    other = Config(fingerprint="fedcba9876543210", title="Pets, SD 1.5", family="sd15")
    text = message(load_subject, path, other)
    parts = (
        "anna.safetensors",
        "'Faces, SDXL' [0123456789abcdef] for sdxl",
        "'Pets, SD 1.5' [fedcba9876543210] for sd15",
        "Load the encoder",
        "Encode Subject",
    )
    for part in parts:
        assert part in text
    text = message(load_subject, path, Config(token_dim=16))
    assert "width 8" in text and "have 16" in text


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    assert "no .safetensors file in that folder" in message(load_subject, tmp_path / "anna.safetensors")
    for i in range(7):
        save_subject(tmp_path / f"s{i}.safetensors", make())
    text = message(load_subject, tmp_path / "anna.safetensors")
    assert "no saved subject anna.safetensors" in text and "s0.safetensors, " in text and "and 3 more" in text
    assert "no saved subject" in message(load_subject, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "file is empty"),
        (b"\0\1", "neither a safetensors file"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 100, "is a PyTorch file (.bin, .pt, .ckpt), not a safetensors file"),
        (b"\x80\x02}q\0" + b"\0" * 100, "is a PyTorch file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "is a picture"),
        (bytes(range(7, 256)), "neither a safetensors file"),
        (struct.pack("<Q", 20) + b"{not json, not at all" + b"\0" * 9, "safetensors file is damaged"),
        (struct.pack("<Q", 2) + b"{}", "it holds no tensors"),
        (struct.pack("<Q", 17) + b'{"a": {"b": "c"}}', "safetensors file is damaged"),
        (struct.pack("<Q", 21) + b'{"__metadata__": "x"}', "safetensors file is damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "anna.safetensors"
    path.write_bytes(content)
    text = message(load_subject, path)
    assert "anna.safetensors" in text and words in text and "Save Subject" in text


@pytest.mark.parametrize(
    ("key", "metadata", "words"),
    [
        ("lora_unet_down_blocks_1.lora_up.weight", None, "LoRA"),
        ("unet.down_blocks.1.attn2.to_k.lora_A.weight", {"format": "pt"}, "LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", None, "checkpoint"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", None, "CLIP vision"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", None, "text encoder"),
        ("control_model.input_hint_block.0.weight", None, "ControlNet"),
        ("image_proj.latents", None, "Load Nested Encoder"),
        ("resampler.latents", {"format": "nested_attention.encoder"}, "it is a Nested Attention encoder file"),
        ("clip_g", None, "textual inversion"),
        ("decoder.conv_in.weight", None, "VAE"),
        ("down_blocks.1.resnets.0.conv1.weight", None, "diffusion model"),
        ("foo", None, "1 other tensor(s): foo"),
    ],
)
def test_other_safetensors_files_are_recognised(tmp_path: Path, key: str, metadata: Any, words: str) -> None:
    path = tmp_path / "anna.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2, 2)}, path, metadata)
    text = message(load_subject, path)
    assert "not a saved subject" in text and words in text


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> None:
    """A saved subject with some of its contents replaced; None takes a field out."""
    with safetensors.safe_open(path, "pt") as file:
        fields = dict(file.metadata())
        content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    fields = {key: value for key, value in (fields | metadata).items() if value is not None}
    safetensors.torch.save_file(content if tensors is None else tensors, path, fields)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (None, {"version": "2"}, ["version 2", "up to version 1", "Update the pack"]),
        (None, {"version": "one"}, ["damaged", "'one'"]),
        (None, {"version": None}, ["damaged", "None"]),
        (None, {"placeholder": None}, ["damaged", "'placeholder' is missing"]),
        (None, {"encoder": None}, ["damaged", "'encoder' is missing"]),
        (None, {"class_word": "a\nb"}, ["damaged", "class word", "U+000A"]),
        (None, {"views": "many"}, ["damaged", "many"]),
        (None, {"provenance": "{"}, ["damaged"]),
        (None, {"provenance": "[]"}, ["damaged"]),
        (None, {"provenance": "[" * 100_000}, ["damaged"]),
        ({"other": torch.zeros(1)}, {}, ["damaged", "'tokens' is missing"]),
        ({"tokens": torch.zeros(4, 8)}, {}, ["damaged", "(4, 8)", "(1, N, C)"]),
        ({"tokens": torch.full((1, 4, 8), torch.nan)}, {}, ["damaged", "NaN"]),
        ({"tokens": torch.zeros(1, 4, 8, dtype=torch.int8)}, {}, ["damaged", "int8"]),
        ({"tokens": torch.zeros(1, 4, 8), "token_weights": torch.ones(5)}, {}, ["damaged", "(5,)", "(4,)"]),
    ],
)
def test_damaged_subjects_are_refused(tmp_path: Path, tensors: Any, metadata: dict[str, Any], words: list[str]) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    rewrite(path, tensors, **metadata)
    text = message(load_subject, path)
    assert all(word in text for word in ["anna.safetensors", *words]), text


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = save_subject(tmp_path / "anna.safetensors", make())
    content = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(0, len(content), 7):
        cut.write_bytes(content[:length])
        text = message(load_subject, cut)
        assert "cut.safetensors" in text and ("cut short" in text or length <= 8), text


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_never_ends_in_another_exception(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    content = bytearray(save_subject(path, make(provenance={"created": "now"})).read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        load_subject(path, Config())  # type: ignore[arg-type]
    except NestedAttentionError as error:
        assert len(str(error)) > 40


def test_a_large_foreign_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    safetensors.torch.save_file({"model.diffusion_model.x": torch.zeros(1000)}, path)

    def fail(*args: object) -> torch.Tensor:
        raise AssertionError("its tensors were read")

    monkeypatch.setattr(files, "_read_tensor", fail)
    assert "checkpoint (a whole diffusion model)" in message(load_subject, path)
