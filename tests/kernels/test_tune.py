"""Tuned tiles: the table, how launches are chosen with it, and the search, without a GPU and without a time."""

import json
import re
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from den_kernels import tune
from den_kernels._triton import choice, rules, table
from den_kernels._triton.choice import Side
from den_kernels._triton.launch import Launch
from den_kernels._triton.rules import Tile
from den_kernels._triton.trial import Case, cases

HALF, FULL = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
ENTRIES = {
    ("convolve", 64, 64, "bfloat16"): (64, 32, 32, 4, 4, 3),
    ("convolve", 32, 64, "bfloat16"): (256, 32, 64, 8, 2, 1),
    ("weight", 64, 64, "float32"): (32, 64, 32, 4, 3, 2),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of tables that is looked up instead of the installed one."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.tiles.cache_clear()
    yield tmp_path
    table.tiles.cache_clear()


def written(folder, arch: int = 90, **changes) -> None:
    text = table.render(ENTRIES, arch, "NVIDIA H200", rules.installed())
    table.file_of(arch, folder).write_text(json.dumps(json.loads(text) | changes))


def test_what_is_rendered_is_parsed():
    text = table.render(ENTRIES, 90, "NVIDIA H200", "3.6.0")
    assert table.parse(text, 90, "3.6.1") == ENTRIES
    assert text == table.render(dict(reversed(ENTRIES.items())), 90, "NVIDIA H200", "3.6.0")
    assert len(text.splitlines()) == len(ENTRIES) + 2
    assert table.parse(table.render({}, 80, "cpu", "3.6.0"), 80, "3.6.0") == {}


def test_installed_tables_are_sound():
    for path in table.FOLDER.glob("*.json"):
        document = json.loads(path.read_text())
        assert path.name == f"sm_{document['arch']}.json"
        assert table.parse(path.read_text(), document["arch"], document["triton"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 1}, "format must be 2, got 1"),
        ({"arch": 80}, "arch must be 90, got 80"),
        ({"triton": "3.5.0"}, "triton must be 3.6, got 3.5.0"),
        ({"tiles": {}}, "tiles must be a list, got dict"),
        ({"tiles": [{"kind": "convolve"}]}, "an entry must be"),
        ({"tiles": [3]}, "an entry must be"),
    ],
)
def test_foreign_tables_are_refused(changes, words):
    text = json.dumps(json.loads(table.render(ENTRIES, 90, "GPU", "3.6.0")) | changes)
    with pytest.raises(ValueError, match=re.escape(words)):
        table.parse(text, 90, "3.6.0")


@pytest.mark.parametrize("text", ["", "[]", "nonsense"])
def test_a_file_that_is_no_table_is_ignored_with_one_warning(text, folder):
    table.file_of(90).write_text(text)
    with pytest.warns(UserWarning, match=r"sm_90\.json is ignored, launches follow the rules"):
        assert table.tiles(90) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.choose_tile(64, 64, HALF, 90)


@pytest.mark.parametrize(
    ("tile", "sound"),
    [
        ((128, 64, 64, 4, 3, 2), True),
        ((128, 128, 64, 4, 3, 2), False),  # more columns than channels
        ((96, 64, 64, 4, 3, 2), False),  # not a power of two
        ((128, 64, 8, 4, 3, 2), False),
        ((128, 64, 64, 4, 0, 2), False),
        ((128, 64, 64, 4, 3), False),
        ((128, 64, 64.0, 4, 3, 2), False),
        ((True, 64, 64, 4, 3, 2), False),
    ],
)
def test_tiles_that_kernels_take(tile, sound):
    assert table.is_sound(tile, 64, 64) == sound


def test_launches_follow_the_table_of_their_architecture(folder):
    rules = [
        choice.choose_tile(64, 64, HALF, 80),
        choice.choose_tile(64, 64, FULL, 90),
        choice.choose_tile(128, 64, HALF, 90),
    ]
    weight_rule = choice.choose_weight_tile(Side(64, (32, 32)), Side(64, ()), FULL, 90, True)
    written(folder)
    table.tiles.cache_clear()
    assert choice.choose_tile(64, 64, HALF, 90) == Tile(*ENTRIES["convolve", 64, 64, "bfloat16"])
    assert choice.choose_tile(20, 40, HALF, 90) == Tile(*ENTRIES["convolve", 32, 64, "bfloat16"])
    sides = Side(64, (32, 32)), Side(64, ())
    assert choice.choose_weight_tile(*sides, FULL, 90, False) == Tile(*ENTRIES["weight", 64, 64, "float32"])
    assert choice.choose_weight_tile(*sides, FULL, 90, True) == weight_rule  # masks keep within a group
    assert rules == [
        choice.choose_tile(64, 64, HALF, 80),
        choice.choose_tile(64, 64, FULL, 90),
        choice.choose_tile(128, 64, HALF, 90),
    ]


def test_trying_a_tile_leaves_the_table_as_it_was(folder):
    written(folder)
    key, other = ("convolve", 64, 64, "bfloat16"), Tile(128, 64, 16, 4, 2, 1)
    rule = tune.rule(Case("convolve", 64, 32, 8, HALF), 90)
    assert rule != Tile(*ENTRIES[key])
    with tune.trying(90, key, other):
        assert choice.choose_tile(64, 64, HALF, 90) == other
    with pytest.raises(RuntimeError), tune.trying(90, ("convolve", 16, 16, "bfloat16"), other):
        raise RuntimeError
    assert table.tiles(90) == ENTRIES


def test_cases_are_the_stages_of_residual_networks():
    found = cases(("convolve", "weight"), (64, 512), (HALF,))
    assert [(p.kind, p.channels, p.size) for p in found] == [
        ("convolve", 64, 32), ("convolve", 512, 4), ("weight", 64, 32), ("weight", 512, 4),
    ]  # fmt: skip
    assert found[0].key == ("convolve", 64, 64, "bfloat16")


def test_candidates_fit_the_chip():
    case, tile = Case("convolve", 256, 8, 8, HALF), Tile(128, 128, 64, 8, 3, 2)
    shared = 227 << 10
    for field in tune.VALUES:
        for other in tune.neighbours(case, tile, field, shared):
            assert sum(a != b for a, b in zip(other, tile, strict=True)) == 1
            assert tune.shared_bytes("convolve", other, HALF) <= shared
    assert tune.neighbours(case, tile, "stages", tune.shared_bytes("convolve", tile, HALF)) == [tile._replace(stages=2)]
    assert not tune.fits("convolve", Tile(256, 256, 32, 4, 2, 1), 256, 256, HALF, shared)  # too many sums in registers
    assert tune.shared_memory(CPU) == 163 << 10


def test_more_warps_must_win_clearly_and_be_trusted():
    rule, few, many = Tile(64, 64, 32, 4, 2, 1), Tile(64, 64, 32, 4, 3, 1), Tile(64, 64, 32, 8, 3, 1)
    everybody = lambda tile: True  # noqa: E731
    assert tune.choose({rule: 1.0, few: 0.9, many: 0.89}, rule, everybody) == few
    assert tune.choose({rule: 1.0, few: 0.9, many: 0.8}, rule, everybody) == many
    assert tune.choose({rule: 1.0, few: 0.9, many: 0.8}, rule, lambda tile: tile.warps < 8) == few
    assert tune.choose({rule: 1.0, few: 0.99}, rule, everybody) == rule  # not worth an entry
    assert tune.choose({rule: 1.0, few: 0.5}, rule, lambda tile: False) == rule
    assert tune.choose({rule: float("inf"), few: 0.5}, rule, everybody) == few  # the rule's result is wrong


@pytest.fixture
def landscape(monkeypatch):
    """Times as a function of the tile, best at 256 rows, 64 deep and 3 programs; no kernel runs."""
    tried = []

    def score(tile, tested, arch):
        tried.append(tile)
        if tile.stages == 5:
            return float("inf")  # a wrong result
        return 1.0 + abs(tile.rows - 256) / 256 + abs(tile.depth - 64) / 64 + abs(tile.programs - 3)

    monkeypatch.setattr(tune, "score", score)
    monkeypatch.setattr(tune, "trials", lambda case, device: [])
    monkeypatch.setattr(tune, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(tune, "is_trusted", lambda *_: True)
    return tried


def test_candidates_are_compiled_side_by_side_each_with_its_tile(folder):
    compiled = []
    case, device = Case("convolve", 64, 32, 8, HALF), torch.device("cuda")

    class Trial(NamedTuple):
        case: Case
        x: SimpleNamespace

        def launch(self):
            kernel = SimpleNamespace(warmup=lambda grid, tile: compiled.append((grid, tile)))
            return Launch(kernel, 7, {"tile": choice.choose_tile(64, 64, HALF, 90)})

    tiles = [Tile(64, 64, 32, 4, stages, 1) for stages in (2, 3)]
    tune.compile_ahead(tiles, [Trial(case, SimpleNamespace(device=device))], 90)
    assert compiled == [((7,), tile) for tile in tiles]


def test_the_search_climbs_field_by_field(landscape, folder):
    found = tune.search(Case("convolve", 64, 32, 8, HALF), CPU, 1.0, clock=lambda: 0.0)
    assert (found.tile.rows, found.tile.depth, found.tile.programs) == (256, 64, 3)
    assert found.tried == len(landscape) == len(set(landscape))
    assert found.tried < 40


def test_the_search_ends_at_its_deadline(landscape, folder):
    times = iter(range(100))
    found = tune.search(Case("convolve", 64, 32, 8, HALF), CPU, 3.0, clock=lambda: next(times))
    assert found.tried <= 3


def test_what_gains_is_written_and_the_rest_kept(landscape, folder, tmp_path):
    written(folder, 80)
    lines = []
    todo = [Case("convolve", 128, 16, 8, HALF), Case("weight", 64, 32, 8, FULL)]
    results = tune.tune(todo, CPU, 60.0, None, lines.append)
    kept = table.parse(table.file_of(80).read_text(), 80, rules.installed())
    assert kept["convolve", 128, 128, "bfloat16"] == tuple(results[0].tile)
    assert kept["convolve", 64, 64, "bfloat16"] == ENTRIES["convolve", 64, 64, "bfloat16"]
    assert len(lines) == 2
    assert re.match(r"convolve 128 bfloat16: \(128, 128, 64, .* rule \(.*x, \d+ tried", lines[0])


def test_out_of_time_is_said(landscape, folder):
    lines = []
    assert tune.tune([Case("convolve", 64, 32, 8, HALF)], CPU, 0.0, None, lines.append) == []
    assert lines == ["out of time: 1 of 1 cases were not searched"]


def test_the_command_needs_a_gpu_and_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "den_kernels.tune: a CUDA device is needed, torch finds none\n"
    with pytest.raises(SystemExit, match="0"):
        tune.main(["--help"])
    assert "compared with float64" in capsys.readouterr().out


def test_the_command_passes_its_arguments_on(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", lambda *arguments: given.extend(arguments))
    arguments = [
        "--kinds",
        "weight",
        "--channels",
        "64",
        "--dtypes",
        "float16",
        "--out",
        str(tmp_path),
        "--seconds",
        "9",
    ]
    assert tune.main(arguments) == 0
    todo, device, seconds, folder, _ = given
    assert [(p.kind, p.channels, p.dtype) for p in todo] == [("weight", 64, torch.float16)]
    assert (device, seconds, folder) == (torch.device("cuda:0"), 9.0, tmp_path)
