"""Whole calls of full-size models on a GPU that is not there (kit.pretend): devices, types, waits and kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kit.pretend import DeviceWait, PretendedGpu
from kit.pretended_host import PretendedHost

NAMES = {"<anna>": "woman", "<ben>": "man", "<cleo>": "cat", "<dan>": "dog"}
PROMPT = "a photo of <anna> and <ben> with a <cleo> and a <dan>"


@pytest.fixture(scope="module")
def case(pack, request):
    """One model at its full size, with the narrow studio of its family for texts and nodes."""
    family, name = request.param.split()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    with torch.inference_mode():
        studio = request.getfixturevalue(family)
        with PretendedGpu() as gpu:
            made = SimpleNamespace(studio=studio, gpu=gpu, host=PretendedHost(pack, gpu, family, dtype))
            made.plain = sampled(made, *applied(made, 0))
            yield made


def of(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


def applied(case, count, advanced=(), **inputs):
    """(model, positive, negative) with so many subjects. advanced: inputs of Apply Subject (Advanced) for the first."""
    model, clip = case.host.model, case.studio.clip
    for i, (name, word) in enumerate([*NAMES.items()][:count]):
        subject = case.host.subject(1024, name, word)
        if i == 0 and advanced:
            model, clip = case.studio.apply_advanced(subject, model, clip, **dict(advanced))
        else:
            model, clip = case.studio.apply(subject, model, clip, **inputs)
    return model, case.studio.encode(clip, PROMPT), case.studio.encode(clip, "bad")


def sampled(case, model, positive, negative, **options):
    """What the second step did."""
    return case.host.sample(model, positive, negative, **options)[-1]


def layers_of(case):
    return len(case.host.encoder.config.widths)


@of("sdxl fp16", "sdxl bf16", "sd15 fp16")
@pytest.mark.parametrize("count", [1, 2])
def test_a_subject_costs_six_kernels_a_layer_and_no_wait(case, count):
    plain, with_subjects = case.plain, sampled(case, *applied(case, count))
    more = with_subjects.named() - plain.named()
    attentions = more.pop("scaled_dot_product_attention")
    assert attentions == layers_of(case) * (1 + count), "one for the words' probabilities, one a subject"
    assert sum(more.values()) <= layers_of(case) * 6 * count, more
    assert with_subjects.waits == plain.waits, "the host's own"


@of("sd15 fp16")
@pytest.mark.parametrize("count", [1, 2])
def test_with_tritons_kernel_a_subject_costs_two(case, pack, count, monkeypatch):
    """One for what it adds, one for V at its word, which all subjects share; several are summed in fp32 and cast."""
    monkeypatch.setattr(pack.kernels, "chosen", lambda: True)
    more = sampled(case, *applied(case, count)).named() - case.plain.named()
    more.pop("scaled_dot_product_attention")
    assert more.pop("nested_attention::add_subject") == layers_of(case) * count
    assert sum(more.values()) <= layers_of(case) * (1 if count == 1 else 4), more


@of("sd15 fp16")
def test_memory_of_a_step_is_the_plain_one(case):
    """K̈ and V̈ are there before; nothing of their size is made in a layer."""
    assert sampled(case, *applied(case, 1)).peak - case.plain.peak < 8 * 2**20


@of("sd15 fp16")
@pytest.mark.parametrize(
    "advanced",
    [
        {"focus": 1.5},
        {"value_norm": "match_per_head", "identity": 3.0},
        {"value_norm": "unit"},
        {"value_norm": "none"},
        {"separation": 0.5},
    ],
    ids=lambda value: " ".join(map(str, value.items())),
)
def test_no_setting_waits_or_mixes_devices(case, advanced):
    assert sampled(case, *applied(case, 2, advanced)).waits == case.plain.waits


@of("sd15 fp16")
def test_masks_are_made_once_a_run(case):
    mask = torch.zeros(1, 100, 100)
    mask[..., :50] = 1
    assert sampled(case, *applied(case, 2, mask=mask)).waits == case.plain.waits


@of("sd15 fp16")
def test_a_window_waits_for_the_noise_level(case):
    """Whether a subject acts now is only known from the level, which lies on the device."""
    model, positive, negative = applied(case, 1, {"end_percent": 0.5})
    with pytest.raises(DeviceWait, match="reads"):
        sampled(case, model, positive, negative)


@of("sd15 fp16")
def test_separate_subjects(case, pack):
    model, positive, negative = applied(case, 2)
    model = pack.nodes["NestedSeparateSubjects"].execute(model, 1.0, 0.0, 1.0)[0]
    assert sampled(case, model, positive, negative).waits == case.plain.waits


@of("sd15 fp16")
def test_pictures_of_a_batch_share_their_kernels(case):
    model, positive, negative = applied(case, 1)
    batch = sampled(case, model, positive, negative, pictures=3)
    alone = sampled(case, model, positive, negative)
    assert len(batch.kernels) == len(alone.kernels)
