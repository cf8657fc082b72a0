"""What comes from outside, in the real host: masks out of range, videos for photos, files that change or are bad."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def refused(pack):
    """refused(match): the block raises NestedAttentionError whose message fits."""
    return lambda match: pytest.raises(pack.errors.NestedAttentionError, match=match)


# -- masks and batches ----------------------------------------------------------------------------------------------

MASKS = [
    (torch.ones(1, 64, 64).tril() * 255, r"0 \(black\) to 1 \(white\); this one goes from 0 to 255.*divide it by 255"),
    (torch.ones(1, 64, 64).tril() - 1.5, r"goes from -1.5 to -0.5.*Combine Masks"),
    (torch.ones(1, 64, 64).tril() * 1.2, r"goes from 0 to 1.2.*Combine Masks"),
    (torch.ones(0, 64, 64), r"got shape \(0, 64, 64\), float32. It has no images or no pixels"),
    (torch.ones(1, 0, 64), r"got shape \(1, 0, 64\), float32. It has no images or no pixels"),
]


@pytest.mark.parametrize(("mask", "said"), MASKS)
def test_masks_out_of_range_are_refused_wherever_one_goes_in(pack, sdxl, refused, mask, said):
    encode, crop = pack.nodes["NestedEncodeSubject"].execute, pack.nodes["NestedCropSubject"].execute
    for give in (
        lambda: sdxl.apply(mask=mask),
        lambda: sdxl.apply_advanced(mask=mask),
        lambda: encode(sdxl.encoder, sdxl.clip_vision, sdxl.photo, "<a>", "cat", "crop", mask),
        lambda: crop(sdxl.photo, 0.0, mask),
    ):
        with refused(said):
            give()


def test_a_mask_that_rounding_moved_is_the_mask(sdxl):
    positive = negative = None
    pictures = []
    for mask in (torch.ones(1, 64, 64), torch.full((1, 64, 64), 1.0005)):
        model, clip = sdxl.apply(mask=mask)
        positive, negative = positive or sdxl.encode(clip, "<person>"), negative or sdxl.encode(clip, "")
        pictures.append(sdxl.sample(model, positive, negative))
    assert torch.equal(*pictures)


def test_a_video_for_photos_is_said(pack, sdxl, caplog):
    """Sixty-four frames are sixty-four views: that works, and costs."""
    node, frame = pack.nodes["NestedEncodeSubject"], sdxl.photo[:, :64, :64]
    subject = node.execute(sdxl.encoder, sdxl.clip_vision, frame.repeat(12, 1, 1, 1), "<a>", "cat", "crop")[0]
    assert "views" not in caplog.text
    node.execute(sdxl.encoder, sdxl.clip_vision, frame.repeat(64, 1, 1, 1), "<a>", "cat", "crop")
    assert "has 64 views: 512 tokens" in caplog.text and "frames of a video, take a few" in caplog.text
    caplog.clear()
    pack.nodes["NestedMergeSubjects"].execute({"subject_1": subject, "subject_2": subject}, "")
    assert "has 24 views: 192 tokens" in caplog.text
