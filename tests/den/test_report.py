"""den report: grouping, the paper's numbers, tables."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from den.evaluate.timing import Timing
from den.report.command import section_text
from den.report.groups import Stat, group_runs, sections
from den.report.paper import CIFAR10, CIFAR100, COARSE, M1, MEAN, PAPER, entries, nearest_backbone
from den.report.tables import build_table
from den.report.verdicts import verdicts
from den.support.tables import csv_table, latex_table, markdown_table
from tests.made_runs import cells, made_run, only_section, seeds_of


def test_paper_means_are_those_of_its_tasks():
    for entry in (e for e in PAPER if e.scenario == "m1" and e.task == MEAN):
        alike = [e for e in PAPER if (e.table, e.method, e.rho) == (entry.table, entry.method, entry.rho)]
        of_tasks = [e.accuracy for e in alike if e.task != MEAN]
        assert [e.task for e in alike] == [*M1, MEAN]
        assert sum(of_tasks) / 3 == pytest.approx(entry.accuracy, abs=0.01)


@pytest.mark.parametrize(
    ("table", "method", "rho", "task", "accuracy", "fewer", "parameters"),
    [
        ("2b", "den", 0.1, CIFAR100, 75.65, None, None),
        ("2b", "den", 0.1, MEAN, 73.82, 2.13 / 1.14, 7.35e6),
        ("2a", "dense", None, MEAN, 69.51, 1, 89.4e6),
        ("3", "routing", None, MEAN, 58.97, 1, 0.14e6),
        ("4a", "den", 1.0, COARSE, 84.87, 2.91 / 1.37, 7.35e6),
        ("5", "den", 0.1, CIFAR10, 92.31, 2.4, 18.5e6),
        ("5", "random", None, CIFAR100, 69.67, 2.3, 9.8e6),
    ],
)
def test_paper_numbers_stand_where_the_paper_has_them(table, method, rho, task, accuracy, fewer, parameters):
    found = next(e for e in PAPER if (e.table, e.method, e.rho, e.task) == (table, method, rho, task))
    assert (found.accuracy, found.parameters) == (accuracy, parameters)
    assert found.fewer == pytest.approx(fewer)


def test_every_backbone_of_the_paper_has_its_rows_once():
    keys = [(e.table, e.backbone, e.method, e.rho, e.task) for e in PAPER]
    assert len(keys) == len(set(keys))
    assert {e.table for e in PAPER} == {"2a", "2b", "3", "4a", "4b", "5"}
    names = "vgg19_elastic_fc", "resnext29_8x64d_narrow", "resnext29_4x64d_narrow"
    assert [len(entries("c1", name)) for name in names] == [8, 16, 14]


@pytest.mark.parametrize(
    ("scenario", "backbone", "expected"),
    [
        ("m1", "resnet42", "resnet42"),
        ("m1", "wrn14_1", "wrn32_4"),
        ("m1", "resnet26", "resnet42"),
        ("c1", "wrn14_1", "resnext29_8x64d_narrow"),
        ("c1", "vgg16", "vgg19_elastic_fc"),
        ("c1", "vgg16_elastic_fc", "vgg19_elastic_fc"),
        ("c1", "/tmp/mine.py:thin", "resnext29_8x64d_narrow"),
        (None, "wrn32_4", None),
    ],
)
def test_nearest_backbone(scenario, backbone, expected):
    assert nearest_backbone(scenario, backbone) == expected


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9))
def test_mean_and_deviation(values):
    stat = Stat.of(values)
    assert stat.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert stat.count == len(values)
    assert stat.deviation == (pytest.approx(np.std(values, ddof=1), abs=1e-9) if len(values) > 1 else None)


def test_runs_that_differ_in_nothing_but_the_seed_are_one_group():
    runs = [made_run(seed=0), made_run(seed=1), made_run(seed=1), made_run(rho=0.3), made_run(levels=3, seed=2)]
    groups = group_runs(runs)
    assert [[record.seed for record in group.records] for group in groups] == [[0, 1], [0], [2]]
    labels = [row.label for row in only_section(runs).rows]
    assert labels == ["DEN (rho = 0.1), network.levels 4", "DEN (rho = 0.1), network.levels 3", "DEN (rho = 0.3)"]


def test_sections_are_by_scenario_and_backbone_and_without_a_scenario_by_tasks():
    runs = [
        made_run(),
        made_run(backbone="vgg19_elastic_fc"),
        made_run(scenario="m3"),
        made_run(scenario=None, tasks=("digits", "fashion")),
        made_run("dense", scenario=None, tasks=("digits",)),
        made_run(scenario=None),
    ]
    titles = [section.title for section in sections(group_runs(runs))]
    assert titles == [
        "C1, wrn14_1",
        "C1, vgg19_elastic_fc",
        "M3, wrn14_1",
        "digits + fashion, wrn14_1",
        "cifar100, wrn14_1",
    ]


def test_separate_baselines_are_one_row_of_several_networks():
    tasks = (COARSE, CIFAR100)
    runs = [made_run(tasks=tasks, scenario="m3", seed=s, accuracy=0.7 + s / 100) for s in (0, 1)]
    runs += [
        made_run("dense", 0.6 + 0.1 * k, 1.0, tasks=(t,), scenario="m3", seed=s)
        for k, t in enumerate(tasks)
        for s in (0, 1)
    ]
    section = only_section(runs)
    den, dense = section.rows
    assert section.dense is dense
    assert (len(dense.groups), dense.parameters, den.parameters) == (2, 2e6, 1e6)
    assert dense.stat("accuracy", MEAN) == Stat(pytest.approx(0.65), pytest.approx(0), 2)
    assert den.stat("accuracy", MEAN).mean == pytest.approx(0.705)
    table = cells(build_table(section))
    assert table["DEN (rho = 0.1)", CIFAR100]["Δ dense"] == "+0.50"
    assert table["dense", MEAN]["accuracy %"] == "65.00 ± 0.00"


def test_the_papers_numbers_stand_beside_the_same_backbone():
    runs = [
        made_run("dense", 0.79, 1.0, backbone="resnext29_8x64d_narrow"),
        made_run(backbone="resnext29_8x64d_narrow"),
    ]
    table = build_table(only_section(runs))
    ours = cells(table)["DEN (rho = 0.1)", CIFAR100]
    assert (ours["accuracy %"], ours["paper: accuracy %"]) == ("80.00", "78.68")
    assert (ours["Δ dense"], ours["paper: Δ dense"]) == ("+1.00", "-0.05")
    assert (ours["times fewer"], ours["paper: times fewer"]) == ("2.00", "1.90")
    assert (ours["parameters M"], ours["paper: parameters M"]) == ("0.500", "13.50")
    only_paper = cells(table)["blockdrop", CIFAR100]
    assert (only_paper["accuracy %"], only_paper["paper: accuracy %"]) == ("", "78.35")
    assert "Beside Table 5 of the paper" in section_text(table)


def test_of_another_backbone_only_the_papers_changes_stand():
    runs = [made_run("dense", 0.79, 1.0), made_run()]
    table = build_table(only_section(runs))
    ours = cells(table)["DEN (rho = 0.1)", CIFAR100]
    assert (ours["paper: accuracy %"], ours["paper: parameters M"]) == ("", "")
    assert (ours["paper: Δ dense"], ours["paper: times fewer"]) == ("-0.05", "1.90")
    assert "has resnext29_8x64d_narrow, not wrn14_1" in section_text(table)
    assert len(table.lines) == 2


def test_without_a_paper_table_there_are_no_paper_columns():
    table = build_table(only_section([made_run(scenario=None)]))
    assert not any("paper" in name for name in table.head)
    assert cells(table)["DEN (rho = 0.1)", CIFAR100]["ms"] == ""


def test_times_stand_where_all_runs_were_timed():
    timing = Timing(plain=4e-3, full=5e-3, selected=2e-3, selector=1e-4, flops_ratio=0.5)
    section = only_section([made_run(seed=0, timing=timing), made_run(seed=1, timing=timing)])
    ours = cells(build_table(section))["DEN (rho = 0.1)", CIFAR100]
    assert (ours["ms dense"], ours["ms"], ours["times as fast"]) == ("4.000 ± 0.000", "2.000 ± 0.000", "2.00 ± 0.00")
    untimed = only_section([made_run(seed=0, timing=timing), made_run(seed=1)])
    assert cells(build_table(untimed))["DEN (rho = 0.1)", CIFAR100]["ms"] == ""


def test_many_tasks_are_shown_by_their_mean():
    tasks = tuple(f"imagenet50-{k}@84" for k in range(10))
    table = build_table(only_section([made_run(tasks=tasks, scenario="m2", backbone="simpleconvnet")]))
    assert [line.task for line in table.lines] == [MEAN] * 5
    ours = cells(table)["DEN (rho = 0.1)", MEAN]
    assert (ours["paper: accuracy %"], ours["paper: MFLOP"]) == ("62.62", "38.8")  # 19.4M multiply-adds
    assert ours["parameters M"] == "1.000"  # with the ten of the fully connected layers


@pytest.mark.parametrize(
    ("scenario", "tasks", "backbone"),
    [
        ("m2", tuple(f"tin50-{k}" for k in range(10)), "simpleconvnet"),
        ("m1", (CIFAR100, "tin50", "stl10"), "wrn32_4"),
        ("m1", (CIFAR100, "tinyimagenet@32", "stl10@32"), "wrn32_4"),
        ("m3", (CIFAR100,), "wrn32_4"),
    ],
)
def test_nothing_of_the_paper_stands_beside_other_tasks(scenario, tasks, backbone):
    runs = [
        run for mode in ("den", "dense") for run in seeds_of(mode, tasks=tasks, scenario=scenario, backbone=backbone)
    ]
    table = build_table(only_section(runs))
    assert all(line.paper is None for line in table.lines if line.label.startswith("DEN") and line.row)
    assert not any("than the paper's" in check.claim for check in verdicts(table))


def test_a_baseline_for_one_task_of_the_papers_stands_beside_the_papers():
    runs = [made_run("dense", tasks=(task,), scenario="m1", backbone="wrn32_4") for task in M1]
    found = cells(build_table(only_section(runs)))
    assert [found["dense", task]["paper: accuracy %"] for task in (*M1, MEAN)] == ["75.01", "58.89", "79.88", "71.26"]


@pytest.mark.parametrize(
    ("share", "label", "paper"), [(0.25, "1/4", "74.83"), (0.5, "1/2", "74.98"), (1, "1", "76.16")]
)
def test_nestednet_stands_beside_the_papers_level_of_as_many_weights(share, label, paper):
    found = cells(build_table(only_section([made_run("nestednet", ratio=share, backbone="resnext29_8x64d_narrow")])))
    assert found[f"nestednet {label}", CIFAR100]["paper: accuracy %"] == paper


def test_tables_in_three_forms_hold_the_same():
    head, rows = ["method", "accuracy %"], [["a_b & c", "1.00 ± 0.10"], ["d, e", ""]]
    assert markdown_table(head, rows).splitlines()[2] == "| a_b & c | 1.00 ± 0.10 |"
    assert list(csv.reader(io.StringIO(csv_table(head, rows)))) == [head, *rows]
    latex = latex_table(head, rows)
    assert r"a\_b \& c & 1.00 $\pm$ 0.10 \\" in latex
    assert latex.splitlines()[0] == r"\begin{tabular}{lr}"
