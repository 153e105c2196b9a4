"""den report: what it says of claims, and what it leaves open."""

import dataclasses

import pytest

from den.evaluate.timing import Timing
from den.report.paper import CIFAR100, COARSE
from den.report.tables import build_table
from den.report.verdicts import verdicts
from den.runs.evaluation import Budget, Static
from tests.made_runs import made_run, only_section, seeds_of

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


@pytest.mark.parametrize(
    ("single", "held_out", "correlation", "expected"),
    [
        (0.78, True, 0.2, [True, True]),
        (0.82, True, -0.2, [False, False]),
        (0.78, False, None, []),
        (None, True, 0.2, [True]),
    ],
)
def test_choosing_is_held_against_a_single_structure(single, held_out, correlation, expected):
    static = Static("11", 60, single, 0.5, held_out) if single else None
    checks = verdicts(build_table(only_section(seeds_of(static=static, cost_correlation=correlation))))
    assert [c.holds for c in checks if "single structure" in c.claim or "cost more" in c.claim] == expected


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
