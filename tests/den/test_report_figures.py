"""den report: sweeps, figures, the command."""

import csv
import io
import json

import pytest
import torch

from den import cli
from den.data import load_set
from den.evaluate.timing import Timing
from den.report.command import slug, sweeps
from den.report.figures.neighbours import nearest_images, neighbours
from den.report.figures.tradeoff import accuracy_against, sweep
from den.runs.evaluation import read_evaluation
from tests.drawn import assert_drawn
from tests.made_runs import made_run, only_section


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
        assert_drawn(tmp_path / "out" / figure)
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
