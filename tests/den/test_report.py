"""den report: grouping, the paper's numbers, tables, verdicts, figures, the command."""

import csv
import dataclasses
import io
import json

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den import cli
from den.data import load_set
from den.evaluate.accuracy import Timing
from den.nn.count import ParameterCounts
from den.report.command import section_text, slug, sweeps
from den.report.figures.neighbours import nearest_images, neighbours
from den.report.figures.tradeoff import accuracy_against, sweep
from den.report.groups import Stat, group_runs, sections
from den.report.paper import CIFAR10, CIFAR100, COARSE, M1, MEAN, PAPER, entries, nearest_backbone
from den.report.tables import build_table
from den.report.verdicts import verdicts
from den.runs.evaluation import Budget, Chosen, Evaluation, Null, TaskResult, read_evaluation
from den.support.settings import to_dict
from den.support.tables import csv_table, latex_table, markdown_table
from den.train.config import DataConfig, NetworkConfig, SelectorTraining, TrainConfig

FULL = 100e6  # FLOPs of the full structure of the made-up runs


def made_result(task, accuracy, ratio, structures=12, usage=(0.5, 0.5), timing=None, **changes):
    null = Null(structures=90, variety=4.0, information=0.0, usage=(0.5, 0.5), shuffled=accuracy - 0.02)
    result = TaskResult(
        task=task, classes=10, images=100, accuracy=accuracy, loss=0.5, flops=ratio * FULL, flops_ratio=ratio,
        parameters=ratio * 1e6, usage=usage, structures=structures, variety=1.5, entropy=0.7, mean_entropy=0.9,
        probabilities=((0, 0, 0, 1.0),) * 2, histogram=((0, 0, 0, 100),) * 2, common=(Chosen("33", 1.0),),
        timing=timing, null=null,
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


def made_run(mode="den", accuracy=0.8, ratio=0.5, *, seed=0, tasks=(CIFAR100,), scenario="c1", rho=0.1, **changes):
    """A made-up record; `changes`: of network (levels, backbone) or of the results."""
    network = NetworkConfig(changes.pop("backbone", "wrn14_1"), levels=changes.pop("levels", 4))
    selector = SelectorTraining(rho=rho)
    config = TrainConfig(mode=mode, seed=seed, data=DataConfig(tasks=tasks), network=network, selector=selector)
    results = tuple(made_result(task, accuracy, ratio, **changes) for task in tasks)
    counts = ParameterCounts(1_000_000, 10, 10, 10, 5000)
    return Evaluation({**to_dict(config), "scenario": scenario}, "last", 100, counts, results, "1 CPU threads")


def seeds_of(mode="den", accuracy=0.8, ratio=0.5, *, spread=0.001, **changes):
    """Three seeds of a made-up run, whose accuracies lie `spread` apart."""
    return [made_run(mode, accuracy + spread * (s - 1), ratio, seed=s, **changes) for s in range(3)]


def only_section(records):
    (section,) = sections(group_runs(records))
    return section


def cells(table):
    """The lines of a table by method and task: the cells by the names of the columns."""
    return {(row[0], row[1]): dict(zip(table.head, row, strict=True)) for row in table.rows}


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


SLOW = Timing(plain=2e-3, full=2e-3, selected=2e-3, selector=1e-4, flops_ratio=0.5)
GOOD = {"accuracy": 0.795}


@pytest.mark.parametrize(
    ("changes", "others", "failing"),
    [
        (GOOD, [], []),
        (GOOD | {"accuracy": 0.775}, [], ["within 1 point", "no further below"]),
        (GOOD | {"structures": 1}, [], ["structures differ"]),
        (GOOD | {"mean_entropy": 0.6}, [], ["structures differ"]),
        (GOOD | {"timing": SLOW}, [], ["realised fraction"]),
        (GOOD, [("random", 0.7, 0.5, 0.1)], []),
        (GOOD, [("random", 0.8, 0.5, 0.1)], ["more accurate than random"]),
        (GOOD, [("den", 0.78, 0.4, 1.0)], []),
        (GOOD, [("den", 0.793, 0.55, 1.0)], ["rho = 0.1 costs more than 1"]),
    ],
    ids=["well", "inaccurate", "one", "uninformed", "slow", "above-random", "below-random", "rho", "rho-wrong-way"],
)
def test_each_claim_fails_by_itself(changes, others, failing):
    runs = seeds_of("dense", 0.79, 1.0) + seeds_of(spread=0.0011, **changes)
    runs += [
        r for mode, accuracy, ratio, rho in others for r in seeds_of(mode, accuracy, ratio, rho=rho, spread=0.0009)
    ]
    checks = verdicts(build_table(only_section(runs)))
    assert [c.claim for c in checks if c.holds]
    broken = [c.claim for c in checks if c.holds is False and not c.claim.startswith("DEN (rho = 1)")]
    assert len(broken) == len(failing), broken
    assert all(words in claim for words, claim in zip(failing, broken, strict=True))


def test_one_seed_decides_nothing_but_that_there_is_something_to_decide():
    runs = [made_run("dense", 0.79, 1.0), made_run(), made_run("random", 0.5), made_run(rho=1.0, ratio=0.3)]
    checks = verdicts(build_table(only_section(runs)))
    assert {c.holds for c in checks} == {None, True}
    assert all("above chance" in c.claim for c in checks if c.holds)


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.13])
def test_nothing_good_is_said_of_runs_at_chance(accuracy):
    tasks = (COARSE, CIFAR100)
    kinds = [("den", 0.5, 0.1), ("den", 0.4, 1.0), ("dense", 1.0, 0.1), ("random", 0.5, 0.1)]
    timing = Timing(plain=4e-3, full=5e-3, selected=2e-3, selector=1e-4, flops_ratio=0.5)
    runs = [
        run
        for mode, ratio, rho in kinds
        for run in seeds_of(mode, accuracy, ratio, rho=rho, spread=0, tasks=tasks, scenario="m3", timing=timing)
    ]
    checks = verdicts(build_table(only_section(runs)))
    assert len(checks) > 10
    assert not any(c.holds for c in checks), [c.claim for c in checks if c.holds]


def test_a_class_that_is_most_of_the_images_is_chance():
    runs = seeds_of("dense", 0.91, 1.0, majority=0.9) + seeds_of("den", 0.91, 0.5, majority=0.9)
    assert not any(c.holds for c in verdicts(build_table(only_section(runs))))


def test_seeds_that_disagree_leave_the_claim_open():
    others = [made_run("random", 0.75 + 0.05 * s, seed=s) for s in range(3)]
    checks = verdicts(build_table(only_section(seeds_of(accuracy=0.81) + others)))
    assert [c.holds for c in checks if "than random" in c.claim] == [None]


def test_a_record_without_a_null_leaves_variety_open():
    runs = seeds_of(null=None, tasks=(COARSE, CIFAR100), scenario="m3")
    found = {c.claim: c.holds for c in verdicts(build_table(only_section(runs)))}
    assert [found[c] for c in found if "structures differ" in c or "levels differ" in c] == [None] * 3


@pytest.mark.parametrize(
    ("accuracy", "ratio", "holds"),
    [(0.82, 0.5, False), (0.82, 0.6, None), (0.7, 0.4, None), (0.7, 0.6, True), (0.8, 0.6, None)],
)
def test_a_better_but_dearer_method_decides_nothing(accuracy, ratio, holds):
    checks = verdicts(build_table(only_section(seeds_of() + seeds_of("blockdrop", accuracy, ratio))))
    assert [c.holds for c in checks if "blockdrop" in c.claim] == [holds]


def test_an_operating_point_of_equal_flops_decides():
    runs, others = seeds_of(), seeds_of("random", 0.75, 0.4)
    budget = Budget("flops", 0.4, {"cifar100": 1.0})
    points = {
        id(run): [dataclasses.replace(point, budget=budget)]
        for run, point in zip(runs, seeds_of("den", 0.78, 0.4), strict=True)
    }
    table = build_table(only_section(runs + others))
    for measured, holds, label in (({}, None, "DEN (rho = 0.1)"), (points, True, "at 0.4 flops")):
        check = next(c for c in verdicts(table, measured) if "random" in c.claim)
        assert check.holds is holds
        assert label in check.claim


@pytest.mark.parametrize(("usage", "holds"), [(((0.5, 0.5),) * 2, False), (((0.1, 0.5), (0.9, 0.5)), True)])
def test_tasks_that_use_the_blocks_alike_are_told(usage, holds):
    runs = seeds_of(tasks=(COARSE, CIFAR100), scenario="m3")
    for k, run in enumerate(runs):
        results = tuple(dataclasses.replace(t, usage=u) for t, u in zip(run.tasks, usage, strict=True))
        runs[k] = dataclasses.replace(run, tasks=results)
    check = next(c for c in verdicts(build_table(only_section(runs))) if "levels differ" in c.claim)
    assert check.holds is holds


def test_runs_that_differ_in_one_setting_are_a_sweep():
    runs = [made_run(levels=k, accuracy=0.7 + k / 100, seed=s) for k in (5, 2, 3) for s in (0, 1)]
    runs += [made_run("dense", 0.8, 1.0), made_run(rho=0.7, levels=3)]
    found = dict(sweeps(only_section(runs)))
    assert {name: len(groups) for name, groups in found.items()} == {"network.levels": 3, "selector.rho": 2}
    assert [group.first.settings["network"]["levels"] for group in found["network.levels"]] == [2, 3, 5]
    figure = sweep("network.levels", found["network.levels"])
    assert figure.get_suptitle() == "number of levels:\n5 is the most accurate of 3"


def test_accuracy_figure_tells_what_is_saved():
    timing = Timing(plain=4e-3, full=5e-3, selected=2e-3, selector=1e-4, flops_ratio=0.5)
    section = only_section(
        [made_run("dense", 0.79, 1.0, timing=timing), made_run(timing=timing), made_run("random", 0.7)]
    )
    words = "C1, wrn14_1\nDEN (rho = 0.1): 2.0 times"
    assert accuracy_against(section, "flops").get_suptitle() == f"{words} fewer FLOPs, +1.0 points against dense"
    figure = accuracy_against(section, "ms")
    assert figure.get_suptitle() == f"{words} as fast, +1.0 points against dense"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "DEN (rho = 0.1)"]


def test_nearest_images_by_brute_force():
    chances = [torch.rand(30, 3, 4), torch.rand(20, 3, 4)]
    for (positions, distances), of in zip(nearest_images(chances[0][7], chances), chances, strict=True):
        expected = sorted(((of[i] - chances[0][7]).square().sum().sqrt().item(), i) for i in range(len(of)))[:4]
        assert positions.tolist() == [i for _, i in expected]
        assert distances.tolist() == pytest.approx([d for d, _ in expected])


def test_the_query_is_not_its_own_neighbour():
    images = load_set("digits", "test").subset(torch.arange(6))
    chances = torch.arange(6.0).view(6, 1, 1)
    titles = [axes.get_title() or axes.get_title(loc="left") for axes in neighbours([images], [chances]).axes]
    assert titles[1].startswith("nearest of digits, L2 1.00 to")


@pytest.mark.parametrize(("text", "expected"), [("M1, wrn32_4", "m1-wrn32-4"), ("DEN (rho = 0.1)", "den-rho-0.1")])
def test_slug(text, expected):
    assert slug(text) == expected


@pytest.fixture
def few_images(monkeypatch):
    whole = load_set("digits", "test").subset(torch.arange(60))
    monkeypatch.setattr("den.data.load_set", lambda name, split, root: whole)


def test_the_command_writes_tables_figures_and_words(tmp_path, stored_run, few_images, capsys):
    for seed in (0, 1):
        stored_run(tmp_path / f"den{seed}", seed=seed)
        stored_run(tmp_path / f"dense{seed}", "dense", seed=seed)
    folders = [str(tmp_path / name) for name in ("den0", "den1", "dense0", "dense1")]
    assert cli.main(["report", *folders, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    name = "digits-wrn8-1"
    found = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = ("nearest", "levels", "structures", "favourites")
    figures = {f"{name}-accuracy-flops.png", *(f"{name}-den-rho-0.3-{kind}.png" for kind in kinds)}
    assert found == {"report.md", f"{name}.md", f"{name}.csv", f"{name}.tex", *figures}
    for figure in figures:
        pixels = matplotlib.image.imread(tmp_path / "out" / figure)
        assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 20
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"![{name}-accuracy-flops]({name}-accuracy-flops.png)" in report
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / f"{name}.csv").read_text())))
    assert [(row["method"], row["seeds"]) for row in rows] == [("DEN (rho = 0.3)", "2"), ("dense", "2")]
    accuracy = [read_evaluation(tmp_path / f"den{seed}" / "evaluation.json").accuracy for seed in (0, 1)]
    assert rows[0]["accuracy %"].startswith(f"{50 * sum(accuracy):.2f} ± ")
    assert "claims do not hold" in printed
    said = [line.split()[0] for line in printed.splitlines() if line.startswith(("  yes ", "  NO ", "  open "))]
    assert len(said) >= 4
    assert "yes" not in said  # of networks that were never trained
    assert str(tmp_path) not in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs must be at least one run folder, got none"),
        (["{tmp}/absent"], "config.json must be a readable JSON file"),
        (["{tmp}/old"], "version of {tmp}/old/evaluation.json must be 1, got 0 (measure the run again: den evaluate"),
    ],
)
def test_wrong_input_is_told_in_one_line(tmp_path, stored_run, capsys, arguments, message):
    stored_run(tmp_path / "old")
    (tmp_path / "old" / "evaluation.json").write_text(json.dumps({"version": 0}))
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    assert cli.main(["report", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("den: error: ")
    assert message.format(tmp=tmp_path) in error
