"""How the GPU kernels are launched: a table, read without a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den_kernels._triton import boxes, choice, rules, strips, table
from den_kernels._triton.choice import ALL, BITS, UNITS, Side
from den_kernels._triton.rules import Tile
from den_kernels.tune import shared_bytes

HALF, FULL = torch.bfloat16, torch.float32
SIZES = (64, 64, 128)


@pytest.fixture(autouse=True)
def _triton_3_6(monkeypatch):
    """Rules do not depend on what is installed here."""
    monkeypatch.setattr(rules, "installed", lambda: "3.6.0")


@pytest.mark.parametrize(
    ("n", "k", "dtype", "arch", "tile"),
    [
        (256, 256, HALF, 90, (64, 128, 64, 4, 4)),
        (128, 128, HALF, 90, (64, 128, 64, 4, 4)),
        (64, 64, HALF, 90, (128, 64, 64, 4, 3)),
        (256, 256, HALF, 80, (64, 128, 32, 4, 4)),
        (256, 256, FULL, 90, (64, 128, 32, 4, 4)),
        (64, 64, FULL, 80, (64, 64, 32, 4, 3)),
        (10, 3, HALF, 90, (128, 16, 16, 4, 3)),  # an instruction has 16 columns and steps of 16
        (256, 128, HALF, 100, (128, 64, 64, 4, 3)),  # its matrix instruction has 128 rows
    ],
)
def test_tile_of_a_convolution(n, k, dtype, arch, tile):
    assert choice.choose_tile(n, k, dtype, arch)[:5] == tile


BOXES = boxes.Arguments(Side(64, ()), Side(64, (16, 16, 32)), 3, (32, 32), (1, 1), 1, HALF, False, True, False)


@pytest.mark.parametrize(
    ("change", "tile"),
    [
        ({}, (128, 64, 64, 4, 3, 3)),
        ({"n": Side(128, ()), "k": Side(128, (32, 32, 64)), "out_size": (16, 16)}, (128, 128, 64, 4, 3, 2)),
        ({"n": Side(128, ()), "out_size": (16, 16), "heavy": True}, (128, 64, 64, 4, 3, 2)),
        ({"n": Side(256, ()), "out_size": (8, 8), "heavy": True}, (64, 128, 64, 4, 3, 2)),
        ({"dtype": torch.float16, "k": Side(16, ())}, (128, 64, 16, 4, 3, 3)),
        ({"dtype": FULL}, None),
        ({"out_size": (28, 28)}, None),
        ({"out_size": (4, 4)}, None),
        ({"stride": (2, 2)}, None),
        ({"masked": True}, None),
        ({"cardinality": 2}, None),
        ({"aligned": False}, None),
        ({"k": Side(64, (24, 24, 16))}, None),  # a box would hold channels that the level does not
    ],
)
def test_which_convolutions_run_on_boxes(change, tile):
    case = BOXES._replace(**change)
    chosen = boxes.choose_boxes(case, False, 90)
    assert (chosen and chosen[0]) == tile
    assert boxes.choose_boxes(case, False, 80) is None


@pytest.mark.parametrize(
    ("change", "tile"),
    [
        ({}, (256, 64, 32, 4, 2, 2)),
        ({"k": Side(16, ()), "heavy": True}, (256, 64, 16, 4, 4, 2)),
        ({"n": Side(128, (32, 32, 64)), "k": Side(128, ()), "out_size": (16, 16)}, (256, 128, 64, 8, 2, 1)),
        ({"n": Side(256, ()), "out_size": (8, 8), "heavy": True}, (256, 128, 64, 8, 2, 1)),
        ({"dtype": torch.float16, "out_size": (4, 64)}, (256, 64, 32, 4, 2, 2)),
        ({"dilation": 2}, (256, 64, 32, 4, 2, 2)),
        ({"dtype": FULL}, None),
        ({"out_size": (28, 28)}, None),
        ({"out_size": (4, 4)}, None),
        ({"out_size": (6, 8)}, None),
        ({"stride": (2, 2)}, None),
        ({"masked": True}, None),
        ({"cardinality": 2}, None),
        ({"aligned": False}, None),
        ({"pools": True}, None),
        ({"taps": 1}, None),  # no load to share
        ({"taps": 7}, None),  # two stages do not fit
        ({"k": Side(64, (24, 24, 16))}, None),
    ],
)
def test_which_convolutions_run_on_strips(change, tile, monkeypatch):
    monkeypatch.setattr(strips, "is_known", lambda: True)
    case = BOXES._replace(**change)
    wide = case.n.channels > 64
    chosen = strips.choose_strips(case, False, 90, wide)
    assert (chosen and chosen[0]) == tile
    assert strips.choose_strips(case, False, 80, wide) is strips.choose_strips(case, False, 100, wide) is None
    monkeypatch.setattr(strips, "is_known", lambda: False)
    assert strips.choose_strips(case, False, 90, wide) is None


def test_a_tuned_tile_is_none_of_strips(monkeypatch):
    monkeypatch.setattr(strips, "is_known", lambda: True)
    monkeypatch.setattr(table, "tiles", lambda arch: {table.key("convolve", 64, 64, HALF): (128, 64, 64, 4, 3, 3)})
    assert strips.choose_strips(BOXES, False, 90, False) is None


def test_a_tuned_tile_that_is_none_of_boxes_means_pointers(monkeypatch):
    for tile, boxed in (((32, 64, 64, 4, 3, 2), True), ((128, 32, 64, 4, 3, 2), False), ((256, 64, 64, 4, 3, 2), True)):
        entries = {table.key("convolve", 64, 64, HALF): tile}
        monkeypatch.setattr(table, "tiles", lambda arch, entries=entries: entries)
        chosen = boxes.choose_boxes(BOXES, False, 90)
        assert (chosen and chosen[0]) == (tile if boxed else None)


@pytest.mark.parametrize(("arch", "like"), [(86, 80), (89, 80), (103, 100), (110, 100), (120, 80), (121, 80), (75, 80)])
def test_cards_between_take_the_rules_of_their_kind(arch, like):
    for dtype in (HALF, FULL):
        assert choice.choose_tile(256, 64, dtype, arch) == choice.choose_tile(256, 64, dtype, like)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_tiles_without_tensor_cores(arch, monkeypatch):
    """Small enough that operands and sums share the registers, and no table is read: it was tuned with TF32."""
    monkeypatch.setattr(choice, "tuned", lambda *case: pytest.fail("a tuned tile is asked for"))
    assert choice.choose_tile(256, 256, FULL, arch, ieee=True)[:5] == (32, 64, 16, 4, 3)
    assert choice.choose_tile(10, 3, FULL, arch, ieee=True)[:5] == (32, 16, 16, 4, 3)
    dense, elastic = Side(256, ()), Side(256, SIZES)
    assert choice.choose_weight_tile(elastic, dense, FULL, arch, False, ieee=True)[:5] == (32, 64, 64, 4, 5)


def test_every_release_has_every_rule_sound_and_with_four_warps():
    """Convolutions of 8 and more warps were miscompiled on Hopper, and no GPU has shown that ours are not."""
    keys = rules.RULES[3, 6].keys()
    for release, found in rules.RULES.items():
        assert found.keys() == keys, release
        for (kind, chip, numbers), tiles in found.items():
            assert max(tiles) == rules.ANY
            assert list(tiles) == sorted(tiles)
            for tile in tiles.values():
                assert table.is_sound(tile, 512, 512)
                assert tile.warps == 4
                dtype = HALF if numbers == "half" else FULL
                shared = shared_bytes(kind, tile._replace(stages=tile.stages - (chip < 90)), dtype)
                assert kind == "weight" or shared <= {80: 99, 90: 227, 100: 227}[chip] << 10


@pytest.mark.parametrize(
    ("version", "release", "words"),
    [
        ("3.6.0", (3, 6), "launch rules of Triton 3.6"),
        ("3.7.1+git0a1b2c3d", (3, 7), "launch rules of Triton 3.7"),
        ("3.99.0", max(rules.RULES), "the newest known: there are none for 3.99.0"),
        ("3.5.1", max(rules.RULES), "the newest known: there are none for 3.5.1"),
        ("unknown", max(rules.RULES), "the newest known: there are none for unknown"),
        ("", max(rules.RULES), "the newest known: there are none for an absent Triton"),
    ],
)
def test_an_unknown_triton_takes_the_newest_rules_and_says_so(version, release, words):
    assert rules.release_of(version) == release
    assert words in rules.describe(version)
    known = version.startswith(("3.6", "3.7"))
    assert ("newest" not in rules.describe(version)) == known
    assert rules.find("convolve", 90, "half", 64, version) == rules.RULES[release]["convolve", 90, "half"][64]


def test_launches_follow_the_installed_triton(monkeypatch):
    tiles = {}
    for version in ("3.6.0", "3.8.0"):
        monkeypatch.setattr(rules, "installed", lambda version=version: version)
        tiles[version] = choice.choose_tile(64, 64, FULL, 100)
    assert tiles["3.6.0"] != tiles["3.8.0"]


def test_a_level_that_reads_nothing_needs_no_tile_of_its_own():
    shape = choice.shape_of_levels(Side(64, ()), Side(64, (16, 16, 32)), 3, 1, False, Tile(128, 64, 64, 4, 3, 2))
    assert shape.k_widths == (64, 32, 16, 0)
    assert (shape.rung, shape.bks) == ((0, 1, 2, 2), (64, 32, 16))


def test_every_level_runs_on_a_tile_that_fits_its_width():
    tile = Tile(128, 64, 64, 4, 3, 2)
    shape = choice.shape_of_levels(Side(64, (16, 16, 32)), Side(64, ()), 3, 1, False, tile)
    assert shape.n_widths == (64, 32, 16)
    assert [shape.bns[r] for r in shape.rung] == [64, 32, 16]
    assert shape.columns == (1, 1, 1)
    assert shape.evens == (True, True, True)


def test_levels_wider_than_the_tile_share_a_rung():
    shape = choice.shape_of_levels(Side(256, SIZES), Side(256, ()), 3, 1, False, Tile(128, 64, 64, 4, 3, 2))
    assert (shape.rung, shape.bns, shape.columns) == ((0, 0, 0), (64,), (4, 2, 1))


def test_at_most_three_rungs():
    sizes = (8,) * 32
    shape = choice.shape_of_levels(Side(256, sizes), Side(64, ()), 32, 1, False, Tile(128, 128, 64, 8, 3, 2))
    assert shape.bns == (128, 64, 32)
    assert len(shape.rung) == 32
    assert set(shape.rung) == {0, 1, 2}


def test_level_0_has_a_segment_only_where_it_writes():
    n, k, tile = Side(32, ()), Side(64, (32, 32)), Tile(128, 32, 64, 4, 3, 2)
    assert choice.shape_of_levels(n, k, 2, 1, False, tile).k_widths == (64, 32, 0)
    assert choice.shape_of_levels(n, k, 2, 1, True, tile).k_widths == (64, 32)
    assert choice.shape_of_levels(k, n, 2, 1, False, tile).n_widths == (64, 32)


@pytest.mark.parametrize(
    ("n", "k", "cardinality", "masks", "tiles"),
    [
        (Side(256, SIZES), Side(256, ()), 1, (UNITS, ALL), (64, 64)),
        (Side(256, ()), Side(256, SIZES), 1, (ALL, UNITS), (128, 64)),
        (Side(40, (13, 27)), Side(40, (13, 27)), 1, (BITS, BITS), (64, 64)),
        (Side(256, SIZES), Side(256, SIZES), 4, (UNITS, BITS), (64, 64)),
    ],
)
def test_how_sides_follow_a_mask(n, k, cardinality, masks, tiles):
    shape, *found = choice.shape_of_masks(n, k, cardinality, choice.choose_tile(n.channels, k.channels, HALF, 90))
    assert tuple(found) == masks
    assert (shape.bns[0], shape.bks[0]) == tiles


@given(st.lists(st.integers(1, 96), min_size=1, max_size=5), st.lists(st.integers(1, 96), min_size=1, max_size=5))
def test_tiles_of_any_groups_cover_every_width(out_sizes, in_sizes):
    groups = min(len(out_sizes), len(in_sizes))
    n, k = (Side(sum(sizes[:groups]), tuple(sizes[:groups])) for sizes in (out_sizes, in_sizes))
    tile = choice.choose_tile(n.channels, k.channels, HALF, 90)
    shape = choice.shape_of_levels(n, k, groups, 1, False, tile)
    for width, columns, rung in zip(shape.n_widths, shape.columns, shape.rung, strict=True):
        assert (columns - 1) * shape.bns[rung] < width <= columns * shape.bns[rung]
    for r, (bk, even) in enumerate(zip(shape.bks, shape.evens, strict=True)):
        widths = [width for width, rung in zip(shape.k_widths, shape.rung, strict=True) if rung == r]
        assert even == all(width % bk == 0 for width in [*widths, k.channels])


@pytest.mark.parametrize(
    ("n", "k", "masked", "columns", "depth"),
    [
        (Side(64, (16, 16, 32)), Side(64, ()), False, 64, 64),
        (Side(512, (128, 128, 256)), Side(512, ()), False, 128, 128),
        (Side(256, SIZES), Side(256, SIZES), False, 64, 64),
        (Side(64, (16, 16, 32)), Side(64, ()), True, 16, 64),
        (Side(40, (13, 27)), Side(3, ()), True, 16, 16),
    ],
)
def test_tile_of_a_weight_gradient(n, k, masked, columns, depth):
    assert choice.choose_weight_tile(n, k, HALF, 90, masked)[1:3] == (columns, depth)


@pytest.mark.parametrize(
    ("channels", "cardinality", "columns", "depth", "tiles"),
    [((64, 64), 1, 64, 32, 2), ((256, 256), 32, 64, 64, 1), ((128, 256), 2, 64, 64, 2), ((40, 40), 40, 16, 16, 1)],
)
def test_input_tiles_that_an_output_tile_meets(channels, cardinality, columns, depth, tiles):
    assert choice.k_tiles(*channels, cardinality, Tile(64, columns, depth, 4, 3, 2)) == tiles


def test_pixels_are_split_until_the_machine_is_busy():
    tile = Tile(64, 64, 64, 4, 5, 2)
    assert choice.choose_splits(9, 256 * 1024, tile, 132) == 59
    assert choice.choose_splits(1000, 256 * 1024, tile, 132) == 1
    assert choice.choose_splits(9, 64, tile, 132) == 1  # fewer pixels than a share is worth
