"""The arithmetic of benchmarks/: accounts, floors, tables, results files. Nothing here takes a time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import floors, harness, memory, peers, report  # noqa: E402
from benchmarks.harness import Case, Expected, Provider, Settings, Work  # noqa: E402
from benchmarks.targets import TARGETS, Target  # noqa: E402

ROLES = {"ours": "ours", "dense-eager": "dense", "dense-folded": "dense", "masked": "alternative", "bare": "floor"}
TIMES = {"ours": 0.5, "dense-eager": 1.2, "dense-folded": 1.0, "masked": 1.3, "bare": 0.4}


def make_row(case: str = "residual/64x32x32/B32/uniform/float32", ours: float = 0.5) -> dict:
    row = harness.account(ROLES, TIMES | {"ours": ours}, Work(50.0, 100.0, 10.0), floor=0.25)
    versions = {"torch": "2.13.0", "den_kernels": "0.1.0"}
    source = {"commit": "0123456789abcdef", "modified": False, "measured": "2026-01-02T03:04:05"}
    return row | source | {
        "case": case, "machine": "box-2-cores", "processor": "Box", "threads": 2, "versions": versions
    }  # fmt: skip


def make_block(channels: int = 8) -> peers.PreactBlock:
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
    norms = [nn.BatchNorm2d(channels) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    return peers.PreactBlock(convs[0], norms[0], convs[1], norms[1]).eval().to(memory_format=torch.channels_last)


def test_account_compares_with_the_fastest_dense_provider():
    row = harness.account(ROLES, TIMES, Work(50.0, 100.0, 10.0), floor=0.25)
    assert row["best_dense"] == "dense-folded"
    assert row["flops_ratio"] == 2
    assert row["providers"]["ours"]["realised"] == pytest.approx(1.0)
    assert row["providers"]["ours"]["dense_share"] == pytest.approx(0.5)
    assert row["providers"]["masked"]["realised"] == pytest.approx(1 / 1.3 / 2)


def test_account_measures_overhead_above_the_fastest_bare_convolutions():
    row = harness.account(ROLES | {"bare-packed": "floor"}, TIMES | {"bare-packed": 0.25}, Work(1, 2, 0), floor=0.1)
    assert row["bare"] == "bare-packed"
    assert row["providers"]["ours"]["overhead"] == pytest.approx(1.0)
    assert "overhead" not in row["providers"]["bare"]
    assert row["providers"]["ours"]["floor_share"] == pytest.approx(0.2)


def test_nothing_to_compute_has_no_ratio_but_a_share_of_dense():
    row = harness.account({"ours": "ours", "dense": "dense"}, {"ours": 0.01, "dense": 1.0}, Work(0, 8, 8), floor=0.0)
    assert row["flops_ratio"] is None
    assert row["providers"]["ours"]["realised"] is None
    assert row["providers"]["ours"]["dense_share"] == pytest.approx(0.01)


def test_floor_is_the_larger_of_matrix_and_bytes():
    assert floors.floor_seconds(flops=2e9, traffic=1e6, rate=1e11, bandwidth=1e10) == 0.02
    assert floors.floor_seconds(flops=2e9, traffic=1e9, rate=1e11, bandwidth=1e10) == 0.1


def test_machine_name_is_a_file_name():
    assert floors.machine_name("AMD EPYC(TM) 9B14 96-Core / x", 4) == "amd-epyc-9b14-96-core-x-4-cores"


@pytest.mark.parametrize(("round_seconds", "rounds"), [(10.0, 7), (0.1, 15), (1e-6, 51), (0.0, 51)])
def test_rounds_fit_the_time_within_limits(round_seconds, rounds):
    assert harness.choose_rounds(round_seconds, Settings(seconds=1.5)) == rounds


def test_interleaved_times_each_peer_once_a_round_in_rotating_order():
    ticks, calls = iter(range(100)), []
    expected = Expected(torch.zeros(0), 0.0)
    providers = [
        Provider(name, "dense", lambda name=name: calls.append(name), expected, prepare=lambda: calls.append("prepare"))
        for name in "oab"
    ]
    hook = harness.Interleaved(providers[0], providers[1:], clock=lambda: next(ticks))
    hook()
    hook()
    assert calls == ["prepare", "a", "prepare", "b", "prepare", "prepare", "b", "prepare", "a", "prepare"]
    assert hook.times == {"a": [1, 1], "b": [1, 1]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, 2.1]), "error against float64 must be at most 0.01, got 0.1"),
        (torch.tensor([1.0, float("nan")]), "got nan"),
        (torch.tensor([1.0]), "shape must be"),
        ([torch.tensor([1.0]), torch.tensor([3.0])], "got 1"),
    ],
)
def test_check_refuses_wrong_results(result, message):
    with pytest.raises(AssertionError, match=message):
        harness.check("case", result, Expected(torch.tensor([1.0, 2.0], dtype=torch.float64), 0.01))


def test_check_takes_lists_as_their_concatenation():
    parts = [torch.tensor([1.0]), torch.tensor([[2.0]])]
    harness.check("case", parts, Expected(torch.tensor([1.0, 2.0], dtype=torch.float64), 0.0))


def test_expect_allows_twice_the_error_of_the_dtype():
    expected = harness.expect(lambda dtype: torch.full((2,), 1 + 2**-9, dtype=torch.float64).to(dtype), torch.bfloat16)
    assert expected.allowed == pytest.approx(2 * 2**-9)


def test_uniform_mix_has_equal_counts_and_is_shuffled():
    levels = harness.mix_levels("uniform", 128)
    assert levels.bincount().tolist() == [32] * 4
    assert not torch.equal(levels, levels.sort().values)
    assert harness.mix_levels("quarter", 3).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="got 'half'"):
        harness.mix_levels("half", 3)


@pytest.mark.parametrize("ratio", [1.2, 1.9, 2.29, 5.0])
def test_drawn_structures_cost_what_was_asked(ratio):
    costs = torch.tensor([[0, 10, 20, 40], [0, 16, 32, 64], [0, 16, 32, 64]])
    levels = harness.draw_structures(costs, 64, ratio)
    cost = costs.gather(1, levels.T.long()).sum().item()
    assert levels.shape == (64, 3)
    assert 64 * 168 / cost == pytest.approx(ratio, rel=0.003)


@pytest.mark.parametrize("groups", [[[1, 1], [0, 1], [1, 0], [0, 0], [0, 1]], [[0, 0]], [[1, 1], [1, 1]]])
def test_bucketed_block_equals_the_masked_one(groups):
    block, selection = make_block(), peers.select_channels(torch.tensor(groups, dtype=torch.bool), (3, 5))
    x = peers.channels_last(torch.randn(len(groups), 8, 5, 5))
    with torch.no_grad():
        masked, bucketed = peers.MaskedBlock(block, selection)(x), peers.BucketBlock(block, selection)(x)
    torch.testing.assert_close(bucketed, masked, atol=1e-4, rtol=1e-4)
    assert torch.equal(bucketed[~selection.any(1)], x[~selection.any(1)])


def test_folded_and_packed_blocks_equal_the_eager_one():
    block, x = make_block(16), peers.channels_last(torch.randn(3, 16, 6, 6))
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(peers.FoldedBlock(block)(x), expected, atol=1e-4, rtol=1e-4)
        if peers.can_pack():
            torch.testing.assert_close(peers.PackedBlock(block, x.shape)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sides", ["out", "in", "both"])
@pytest.mark.parametrize("groups", [[[1, 0, 0], [0, 0, 0], [1, 1, 1]], [[0, 1, 0], [1, 0, 1], [0, 1, 0]]])
def test_bucketed_convolution_equals_the_masked_one(sides, groups):
    selection = peers.select_channels(torch.tensor(groups, dtype=torch.bool), (2, 2, 4))
    conv, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), peers.channels_last(torch.randn(3, 8, 5, 5))
    mask, outputs, inputs = selection[:, :, None, None], sides != "in", sides != "out"
    elastic = peers.ElasticConv(conv, selection if outputs else None, selection if inputs else None)
    with torch.no_grad():
        expected = conv(x * mask if inputs else x) * (mask if outputs else 1)
        torch.testing.assert_close(peers.BucketConv(elastic)(x), expected, atol=1e-5, rtol=1e-5)


def test_status_sizes_are_bytes():
    assert memory.read_status("VmPeak:\t  9 kB\nVmHWM:\t  12 kB\n", "VmHWM") == 12288
    with pytest.raises(ValueError, match="got 'VmRSS'"):
        memory.read_status("VmHWM: 1 kB\n", "VmRSS")


def test_targets_name_each_line_once_and_well_formed_cases():
    assert len({(target.case, target.measure, target.provider) for target in TARGETS}) == len(TARGETS)
    assert all(target.case == Case(*parse(target.case)).id for target in TARGETS)


def parse(case: str) -> tuple[str, str, int, str, str]:
    suite, shape, batch, mix, dtype = case.split("/")
    return suite, shape, int(batch.removeprefix("B")), mix, dtype


@pytest.mark.parametrize(
    ("measure", "bound", "row", "verdict"),
    [
        ("realised", 0.95, make_row(ours=0.5), "yes"),
        ("realised", 0.95, make_row(ours=0.6), "**no**"),
        ("overhead", 0.3, make_row(ours=0.5), "yes"),
        ("overhead", 0.2, make_row(ours=0.5), "**no**"),
        ("speed", 0.98, make_row(ours=1.0), "yes"),
        ("speed", 0.98, make_row(ours=1.1), "**no**"),
        ("dense_share", 0.02, make_row(ours=0.5), "**no**"),
        ("peak_share", 1.0, {"peak_share": 0.9}, "yes"),
        ("peak_share", 1.0, {"peak_share": 1.1}, "**no**"),
        ("peak_share", 1.0, make_row(), "not measured"),
    ],
)
def test_target_lines_say_whether_they_are_met(measure, bound, row, verdict):
    target = Target("a block", "x", measure, bound)
    assert report.target_line(target, {"x": row})[-1] == verdict
    assert report.target_line(target, {})[-2:] == ["-", "not measured"]


def test_prepacked_dense_networks_count_in_a_column_of_their_own():
    roles, times = ROLES | {"dense-packed": harness.dense_role("dense-packed")}, TIMES | {"dense-packed": 0.8}
    row = harness.account(roles, times, Work(1, 2, 0), floor=0.1)
    assert row["best_dense"] == "dense-folded"
    assert row["best_tuned"] == "dense-packed"
    assert row["providers"]["ours"]["realised"] == pytest.approx(1.0)
    assert row["providers"]["ours"]["realised_tuned"] == pytest.approx(0.8)


def test_tables_are_markdown_with_every_case():
    lines = report.cases_table([make_row("a"), make_row("b"), {"case": "memory", "peak_share": 1.0}]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["a", "500", "1000 (folded)", "1300", "-", "400", "2.00", "2.00", "1.00", "1.00", "25.0 %", "50 %"]


def test_memory_table_is_in_mebibytes():
    peaks = {"ours": {"peak": 3 << 20, "kept": 2 << 20, "working": 1 << 20}}
    lines = report.memory_table([make_row(), {"case": "memory", "peaks": peaks}]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["memory", "ours", "3", "2", "1"]


def test_a_rerun_replaces_its_rows_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    [path] = report.keep(make_run(make_row("a", ours=0.5), make_row("b", ours=0.5)))
    report.keep(make_run(make_row("b", ours=0.8)))
    assert path.name == "box-2-cores.json"
    rows = {row["case"]: row["providers"]["ours"]["median"] for row in report.load(path)}
    assert rows == {"a": 0.5, "b": 0.8}
    assert len(path.read_text().splitlines()) == 4


def make_run(*rows: dict) -> dict:
    source = ("commit", "modified", "measured")
    infos = [{key: value for key, value in row.items() if key not in source} for row in rows]
    commit = {"id": "fedcba9876543210", "dirty": True}
    return {
        "datetime": "2026-05-06T07:08:09",
        "commit_info": commit,
        "benchmarks": [{"extra_info": info} for info in [*infos, {}]],
    }


def test_rows_carry_commit_and_day():
    [row] = report.rows_of_run(make_run(make_row()))
    assert (row["commit"], row["modified"], row["measured"]) == ("fedcba9876543210", True, "2026-05-06T07:08:09")
    assert "commit fedcba9876 with changes; 2026-05-06" in report.provenance([row])


def test_readme_section_is_replaced_and_compared(tmp_path):
    path = tmp_path / "box.json"
    report.store(path, [make_row()])
    readme = f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n"
    assert not report.readme_agrees(readme, [path])
    written = report.with_section(readme, report.readme_section([path]))
    assert report.readme_agrees(written, [path])
    assert written.startswith("# Title\n")
    assert written.endswith("rest\n")
    with pytest.raises(ValueError, match="README must hold"):
        report.with_section("# Title", "")


def test_command_keeps_a_run_and_writes_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    run, text = tmp_path / "run.json", tmp_path / "table.md"
    run.write_text(json.dumps(make_run(make_row())))
    assert report.main([str(run), "--markdown", str(text)]) == 0
    assert "block 64x32², B = 32, uniform, float32" in capsys.readouterr().out
    assert "## box-2-cores" in text.read_text()
    assert report.main([str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err


def test_readme_agrees_with_the_kept_results():
    if not report.results_files():
        pytest.skip("no results are kept")
    assert report.readme_agrees(report.README.read_text(), report.results_files())
