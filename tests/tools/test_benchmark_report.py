"""What benchmarks/ keeps, prints and draws: results files, tables, where we lose, figures, the command. No times."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import figures, harness, losses, report, results, tables  # noqa: E402
from benchmarks.harness import Case, Work  # noqa: E402
from benchmarks.targets import TARGETS, Target  # noqa: E402
from den.support.tables import with_section  # noqa: E402

TIMES = {"ours": 0.5, "dense-eager": 1.2, "dense-folded": 1.0, "masked": 1.3, "bare": 0.4}
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SOURCE = {"commit": "0123456789abcdef", "modified": False, "measured": "2026-01-02T03:04:05"}


def make_row(case: str = "residual/64x32x32/B32/uniform/float32", *, flops: float = 50.0, **times: float) -> dict:
    """A row whose times (in seconds) are TIMES but for those given; FLOPs of 100 at full structure."""
    times = TIMES | {name.replace("_", "-"): seconds for name, seconds in times.items()}
    row = harness.account(times, Work(flops, 100.0, 10.0), floor=0.25)
    for name, provider in row["providers"].items():
        spread = 0.01 * times[name]
        provider |= {"lower_quartile": times[name] - spread, "upper_quartile": times[name] + spread, "peak": 3 << 20}
    values = parse(case) if "/" in case else [case] * 5
    parts = dict(zip(("suite", "shape", "batch", "mix", "dtype"), values, strict=True))
    machine = {"machine": "box-2-cores", "processor": "Box", "threads": 2, "matrix_rate": 400.0, "bandwidth": 100.0}
    versions = {"torch": "2.13.0", "den_kernels": "0.1.0"}
    return row | SOURCE | parts | machine | {"case": case, "versions": versions}


def parse(case: str) -> tuple[str, str, int, str, str]:
    suite, shape, batch, mix, dtype = case.split("/")
    return suite, shape, int(batch.removeprefix("B")), mix, dtype


def make_run(*rows: dict) -> dict:
    infos = [{key: value for key, value in row.items() if key not in SOURCE} for row in rows]
    commit = {"id": "fedcba9876543210", "dirty": True}
    return {
        "datetime": "2026-05-06T07:08:09",
        "commit_info": commit,
        "benchmarks": [{"extra_info": info} for info in [*infos, {}]],
    }


def cells_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_targets_name_each_line_once_and_well_formed_cases():
    assert len({(target.case, target.measure, target.provider) for target in TARGETS}) == len(TARGETS)
    assert all(target.case == Case(*parse(target.case)).id for target in TARGETS)


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
        ("throughput", 3.0, {"throughput": 3.1}, "yes"),
        ("throughput", 3.0, {"throughput": 2.9}, "**no**"),
    ],
)
def test_target_lines_say_whether_they_are_met(measure, bound, row, verdict):
    target = Target("a block", "x", measure, bound)
    assert tables.target_line(target, {"x": row})[-1] == verdict
    assert tables.target_line(target, {})[-2:] == ["-", "not measured"]


def test_prepacked_dense_networks_count_in_a_column_of_their_own():
    row = make_row(dense_packed=0.8)
    assert row["best_dense"] == "dense-folded"
    assert row["best_tuned"] == "dense-packed"
    assert row["providers"]["ours"]["realised"] == pytest.approx(1.0)
    assert row["providers"]["ours"]["realised_tuned"] == pytest.approx(0.8)


def test_tables_are_markdown_with_every_case():
    text = tables.cases_table([make_row("a"), make_row("b"), {"case": "memory", "peak_share": 1.0}])
    assert len({len(line) for line in text.splitlines()}) == 1
    first, second = cells_of(text)
    assert second[0] == "b"
    assert first[:7] == ["a", "500", "1000 (folded)", "1300", "-", "400", "2.00"]
    assert first[7:] == ["2.00", "2.00", "1.00", "1.00", "25.0 %", "50 %", "3", "-"]


def test_a_case_without_a_dense_side_has_its_line():
    row = {"case": "plan"} | harness.account({"ours": 0.1, "bucket": 0.3}, Work(0, 0, 1.0), floor=0.01)
    assert cells_of(tables.cases_table([row]))[0][:9] == ["plan", "100", "-", "-", "300", "-", "-", "-", "3.00"]


def test_providers_are_listed_from_the_fastest_on():
    lines = cells_of(tables.providers_table([make_row("a")]))
    assert [line[1] for line in lines] == ["bare", "ours", "dense-folded", "dense-eager", "masked"]
    assert lines[1] == ["", "ours", "ours", "500", "50.0 %", "1.00", "50 %", "call", "3"]


def test_memory_table_is_in_mebibytes():
    peaks = {"ours": {"peak": 3 << 20, "kept": 2 << 20, "working": 1 << 20}}
    assert cells_of(tables.memory_table([make_row(), {"case": "memory", "peaks": peaks}])) == [
        ["memory", "ours", "3", "2", "1"]
    ]


@pytest.mark.parametrize(
    ("row", "best", "counts", "reason"),
    [
        (make_row(ours=0.9, bucket=0.8), "bucket", True, "moving rows and batch norm take 125 % above"),
        (make_row(ours=1.01, bare=1.005), "dense-folded", False, "within the spread"),
        (make_row(ours=1.1, bare=1.05), "dense-folded", True, "the convolutions of the levels alone take longer"),
        (make_row(ours=1.1, flops=90.0), "dense-folded", False, r"little to save \(1.11 times"),
        (make_row(ours=80e-6, bucket=60e-6), "bucket", True, "a fixed 20 us a call"),
    ],
)
def test_losses_name_what_is_faster_and_why(row, best, counts, reason):
    [loss] = losses.losses([row, make_row("won"), {"case": "memory", "peak_share": 1.0}])
    assert (loss.best, loss.counts) == (best, counts)
    assert losses.reason(loss).startswith(reason.replace("\\", ""))
    [line] = cells_of(tables.losses_table([row]))
    assert line[3] == ("**yes**" if counts else "no")


def test_private_operators_are_no_loss():
    assert losses.losses([make_row(dense_packed=0.1)]) == []


def test_the_worst_losses_that_count_come_first():
    rows = [make_row("a", ours=2.0, flops=99.0), make_row("b", ours=1.1), make_row("c", ours=1.5)]
    assert [loss.row["case"] for loss in losses.losses(rows)] == ["c", "b", "a"]


def test_a_rerun_replaces_its_rows_and_no_others(tmp_path):
    [path] = results.keep(make_run(make_row("a", ours=0.5), make_row("b", ours=0.5)), tmp_path)
    results.keep(make_run(make_row("b", ours=0.8)), tmp_path)
    assert path.name == "box-2-cores.json"
    rows = {row["case"]: row["providers"]["ours"]["median"] for row in results.load(path)}
    assert rows == {"a": 0.5, "b": 0.8}
    assert len(path.read_text().splitlines()) == 4


def test_keeping_a_run_twice_changes_nothing(tmp_path):
    run = make_run(make_row("a"), make_row("b"))
    [path] = results.keep(run, tmp_path)
    first = path.read_text()
    results.keep(run, tmp_path)
    assert path.read_text() == first


def test_the_newest_machine_comes_first_and_other_files_are_left_alone(tmp_path):
    for name, day in (("old", "2026-01-01"), ("new", "2026-02-01"), ("middle", "2026-01-15")):
        results.store(tmp_path / f"{name}.json", [make_row() | {"measured": day}])
    results.store(tmp_path / "gpu.json", [make_row()], gpu={"name": "GPU"})
    assert [path.stem for path in results.results_files(tmp_path)] == ["new", "middle", "old"]


def test_a_machine_measured_in_part_comes_behind_the_others(tmp_path):
    for name, day, cases in (
        ("whole", "2026-01-01", "abcd"),
        ("most", "2026-02-01", "abc"),
        ("part", "2026-03-01", "ab"),
    ):
        results.store(tmp_path / f"{name}.json", [make_row(case) | {"measured": day} for case in cases])
    assert [path.stem for path in results.results_files(tmp_path)] == ["most", "whole", "part"]


def test_rows_carry_commit_and_day():
    [row] = results.rows_of_run(make_run(make_row()))
    assert (row["commit"], row["modified"], row["measured"]) == ("fedcba9876543210", True, "2026-05-06T07:08:09")
    assert "commit fedcba9876 with changes; 2026-05-06" in tables.provenance([row])


def test_readme_section_is_replaced_and_compared(tmp_path):
    paths = [tmp_path / "box.json", tmp_path / "older.json"]
    results.store(paths[0], [make_row(ours=0.9, bucket=0.8)])
    readme = f"# Title\n{BEGIN}\nold\n{END}\nrest\n"
    section = report.readme_section(paths)
    written = with_section(readme, "benchmarks", section, "README")
    assert written == f"# Title\n{BEGIN}\n{section}\n{END}\nrest\n"
    assert "is saved: 1 of 1:" in written.replace("\n", " ")
    assert "Other machines: `older.json`" in written
    with pytest.raises(ValueError, match="README must hold"):
        with_section("# Title", "benchmarks", "", "README")


def test_colours_mark_verdicts_and_headings():
    text = "## box\n| a | yes |\n| b | **no** |\n| c | not measured |"
    heading, met, missed, unknown = tables.coloured(text).splitlines()
    assert heading == f"{tables.BOLD}## box{tables.PLAIN}"
    assert met == f"| a | {tables.GREEN}yes{tables.PLAIN} |"
    assert missed == f"| b | {tables.RED}**no**{tables.PLAIN} |"
    assert unknown == f"| c | {tables.YELLOW}not measured{tables.PLAIN} |"


def latency_rows(suite: str = "latency-block") -> list[dict]:
    each = {1: 1.5, 16: 1.2, 256: 0.5, 1024: 0.4}
    return [
        make_row(f"{suite}/64x16x16/B{batch}/uniform/float32", ours=ours, bucket=0.9) for batch, ours in each.items()
    ]


def test_crossing_is_the_batch_from_which_ours_stays_the_fastest():
    rows = latency_rows()
    assert figures.fastest_from(rows) == "ours is the fastest from 256 on"
    assert figures.fastest_from(rows[2:]) == "ours is the fastest at every batch"
    assert figures.fastest_from(rows[:2]) == "something else is the fastest at the largest batch"


def test_figures_are_drawn_for_what_the_rows_hold(tmp_path):
    pairs = [(mix, dtype) for mix in ("uniform", "full") for dtype in harness.DTYPES]
    blocks = [make_row(f"residual/64x32x32/B32/{mix}/{dtype}") for mix, dtype in pairs]
    drawn = figures.draw_all([*blocks, *latency_rows(), *latency_rows("latency-network")], tmp_path / "all")
    assert [path.name for path in drawn] == ["realised.png", "batch.png", "roofline.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert figures.draw_all([make_row("plan/15-blocks/B1/random-blocks/int32", flops=0.0)], tmp_path / "none") == []


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkout's results folder and README of its own."""
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\n{END}\n")
    page = tmp_path / "benchmarks.md"
    page.write_text(readme.read_text())
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for name in ("keep", "results_files"):
        plain = getattr(results, name)
        monkeypatch.setattr(results, name, lambda *a, plain=plain: plain(*a, folder=tmp_path / "results"))
    return tmp_path


def test_command_reports_a_run_and_keeps_it_when_asked(folder, capsys):
    run = folder / "run.json"
    run.write_text(json.dumps(make_run(make_row())))
    assert report.main([str(run), "--out", str(folder / "out")]) == 0
    assert not (folder / "results").exists()
    printed = capsys.readouterr().out
    assert "block 64x32², B = 32, uniform, float32" in printed
    assert "\033" not in printed  # not a terminal
    assert (folder / "out" / "report.md").read_text() in printed
    assert (folder / "out" / "box-2-cores" / "realised.png").exists()
    assert report.main([str(run), "--readme", "--colour", "always"]) == 0
    assert "\033[32m" in capsys.readouterr().out
    assert report.readme_section(results.results_files()) in report.README.read_text()
    assert report.page_section(results.results_files()) in report.PAGE.read_text()
    assert report.main([]) == 0
    assert "## box-2-cores" in capsys.readouterr().out


def test_command_says_what_is_wrong_in_one_line(folder, capsys):
    (folder / "other.json").write_text('{"a": 1}')
    for name in ("missing.json", "other.json"):
        assert report.main([str(folder / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("report: ")
        assert name in error
        assert error.count("\n") == 1
    assert report.main([]) == 0
    assert "no results yet" in capsys.readouterr().out


def test_a_run_of_some_cases_lists_their_targets_only():
    case = "residual/64x32x32/B32/uniform/float32"
    lines = cells_of(tables.targets_table([make_row(case)], only_measured=True))
    assert len(lines) == sum(target.case == case for target in TARGETS)
    assert len(cells_of(tables.targets_table([make_row(case)]))) == len(TARGETS)
