"""Grid Values and Picture Grid. The whole graph runs in test_frontend.py (strength_identity_grid)."""

from __future__ import annotations

import pytest
import torch

from kit import studio


def values(pack, **inputs):
    return studio.run_node(pack.nodes["NestedGridValues"], None, **inputs)


def laid_out(pack, images, grid, cell=64):
    return pack.nodes["NestedPictureGrid"].execute(images=images, grid=[grid], cell=[cell]).result[0]


def plain(colour, batch=1, height=8, width=8):
    """Pictures (batch, height, width, channels) of one colour."""
    return torch.tensor(colour).float().expand(batch, height, width, len(colour))


def test_every_pair_comes_once_row_by_row(pack):
    across, down, grid = values(pack, across="0.5, 1", down="1;2  4")
    assert across == [0.5, 1, 0.5, 1, 0.5, 1]
    assert down == [1, 1, 2, 2, 4, 4]
    assert (grid.across, grid.down, grid.titles) == (("0.5", "1"), ("1", "2", "4"), ("strength", "identity"))


def test_the_host_takes_the_values_one_by_one(pack):
    info = pack.nodes["NestedGridValues"].GET_NODE_INFO_V1()
    assert info["output_is_list"] == [True, True, False]
    assert pack.nodes["NestedPictureGrid"].INPUT_IS_LIST


@pytest.mark.parametrize(
    "across, said",
    [("0.5, one", '"one" in across is no number'), (" , ", "across is empty"), ("nan", "no number"),
     (", ".join(["1"] * 101), "at most 100 fit")],
)  # fmt: skip
def test_what_is_no_grid_is_said(pack, across, said):
    with pytest.raises(pack.errors.NestedAttentionError, match=said):
        values(pack, across=across, down="1")


def test_pictures_stand_in_their_rows_and_columns(pack):
    _, _, grid = values(pack, across="0, 1, 2", down="10, 20")
    colours = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
    sheet = laid_out(pack, [plain(colour) for colour in colours], grid)
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3
    found = []
    for colour in colours:
        rows, columns = ((sheet[0] - torch.tensor(colour).float()).abs().amax(-1) < 0.02).nonzero(as_tuple=True)
        assert len(rows) >= 64 * 64, "64 x 64 each"
        found.append((float(rows.float().mean()), float(columns.float().mean())))
    first, second = found[:3], found[3:]
    assert len({round(y) for y, _ in first}) == len({round(y) for y, _ in second}) == 1, "a row each"
    assert first[0][0] < second[0][0]
    assert [x for _, x in first] == sorted(x for _, x in first)
    assert all(abs(a[1] - b[1]) < 1 for a, b in zip(first, second, strict=True)), "columns"


def test_of_a_batch_each_picture_has_a_grid(pack):
    _, _, grid = values(pack, across="0, 1", down="1")
    pair = torch.cat([plain((1, 0, 0)), plain((0, 1, 0))])
    sheets = laid_out(pack, [pair, pair], grid)
    assert len(sheets) == 2
    for sheet, colour in zip(sheets, ((1, 0, 0), (0, 1, 0)), strict=True):
        assert ((sheet - torch.tensor(colour).float()).abs().amax(-1) < 0.02).sum() >= 2 * 64 * 64


def test_pictures_keep_their_shape(pack):
    _, _, grid = values(pack, across="1", down="1")
    sheet = laid_out(pack, [plain((1, 0, 0), height=16, width=8)], grid)
    rows, columns = ((sheet[0] - torch.tensor((1.0, 0, 0))).abs().amax(-1) < 0.02).nonzero(as_tuple=True)
    assert (int(rows.amax() - rows.amin()) + 1, int(columns.amax() - columns.amin()) + 1) == (64, 32)


def test_pictures_of_other_sizes_and_channels_are_laid_out(pack):
    _, _, grid = values(pack, across="0, 1, 2", down="1")
    thin = plain((0, 1, 0), height=400, width=1)
    sheet = laid_out(pack, [plain((1, 0, 0, 0.5)), thin, plain((0, 0, 1), height=4, width=8)], grid)
    assert sheet.shape[-1] == 3 and sheet.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_pictures_that_do_not_fill_the_grid_are_refused(pack, count):
    _, _, grid = values(pack, across="0, 1", down="1, 2")
    with pytest.raises(pack.errors.NestedAttentionError, match=f"A grid of 2 x 2 takes 4 pictures, {count} came"):
        laid_out(pack, [plain((1, 0, 0))] * count, grid)


def test_batches_of_unequal_length_are_refused(pack):
    _, _, grid = values(pack, across="0, 1", down="1")
    with pytest.raises(pack.errors.NestedAttentionError, match="batches of 1, 2"):
        laid_out(pack, [plain((1, 0, 0)), plain((1, 0, 0), batch=2)], grid)


@pytest.mark.parametrize(
    "colours, said",
    [("rgrg", "all rows are the same"), ("rrgg", "all columns are the same"), ("rggb", None)],
)  # fmt: skip
def test_an_output_that_is_not_connected_is_noticed(pack, caplog, colours, said):
    """Both lists have a number for each picture, so one of them alone makes as many pictures, labelled wrong."""
    known = {"r": (1, 0, 0), "g": (0, 1, 0), "b": (0, 0, 1)}
    _, _, grid = values(pack, across="0, 1", down="1, 2")
    laid_out(pack, [plain(known[colour]) for colour in colours], grid)
    warnings = [record.message for record in caplog.records if "Picture Grid" in record.message]
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]
