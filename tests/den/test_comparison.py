"""The comparison of two networks: the table, the conclusions, the figures, the plain network it is timed against."""

import dataclasses
import json
import math

import pytest
import torch

from den import create_model
from den.data import load_set
from den.evaluate.accuracy import TaskReport
from den.evaluate.comparison import (
    Comparison,
    checks,
    compare,
    digits,
    most_different_block,
    remarks,
    static_structures,
    table,
    write_json,
)
from den.evaluate.timing import Timing
from den.nn.count import image_flops
from den.nn.plain import PlainNetwork
from den.report.figures.comparison import draw_all
from tests.drawn import assert_drawn

LEAST = {"digits": 0.9, "fashion": 0.8}
FULL = 100.0  # FLOPs of the full structure of the made-up reports


def made_report(task, accuracy, flops, levels, loss=0.5):
    """A report of made-up numbers; `levels` int64 [images, N]."""
    levels = torch.as_tensor(levels)
    return TaskReport(
        task=task, images=len(levels), accuracy=accuracy, loss=loss, penalty=0.1, flops=flops, flops_ratio=flops / FULL,
        structures=len(levels.unique(dim=0)), entropy=0.7, mean_entropy=0.9, levels=levels,
        usage=torch.tensor([0, 0.25, 0.5, 1])[levels].mean(0),
        probabilities=torch.nn.functional.one_hot(levels, 4).float().mean(0),
    )  # fmt: skip


def made_comparison(task="digits", accuracy=0.95, flops=50.0, levels=((3, 0), (3, 0), (1, 2), (1, 2)), **changes):
    images = load_set(task, "test").subset(torch.arange(len(levels)))
    full = made_report(task, 0.96, FULL, [[3, 3]] * len(levels))
    statics = [(0.93, 50.0), (0.94, 49.0), (0.99, 60.0)]  # the last one costs too much
    values = {
        "images": images,
        "dense": full,
        "full": full,
        "selected": made_report(task, accuracy, flops, levels),
        "statics": tuple(made_report(task, a, f, [[k, 0]] * len(levels)) for k, (a, f) in enumerate(statics)),
        "timing": Timing(plain=4e-6, full=5e-6, selected=2e-6, selector=1e-7, flops_ratio=flops / FULL),
    }
    return Comparison(**{**values, **changes})


@pytest.fixture(scope="module")
def trained_pair():
    """Two untrained networks, which is all that drawing needs, and 40 images of each task."""
    sets = [load_set(name, "test").subset(torch.arange(40)) for name in ("digits", "fashion")]
    torch.manual_seed(0)
    dense, elastic = (create_model("wrn8_1", [s.task for s in sets], trunk_size=8).eval() for _ in range(2))
    for head in elastic.selector.heads:
        torch.nn.init.normal_(head.weight)
    return dense, elastic, sets


@pytest.fixture(scope="module")
def compared(trained_pair):
    return compare(*trained_pair, near=3, spread=4)


def test_plain_network_gives_the_estimators_logits(trained_pair):
    _, model, sets = trained_pair
    model.estimator.train()
    with torch.no_grad():
        model.estimator([s.inputs() for s in sets], [s.name for s in sets])  # running statistics that are not 0 and 1
    model.eval()
    for image_set in sets:
        images = image_set.inputs()
        with torch.inference_mode():
            expected = model.estimator(images, image_set.name)
            torch.testing.assert_close(PlainNetwork(model, image_set.name)(images), expected, atol=2e-5, rtol=1e-4)


def test_comparison_measures_both_networks_on_every_task(trained_pair, compared):
    assert [c.task for c in compared] == ["digits", "fashion"]
    for c in compared:
        assert c.dense.flops_ratio == c.full.flops_ratio == 1
        assert c.selected.flops_ratio < 1
        assert len(c.statics) >= 3 + 1
        assert min(c.timing.selected, c.timing.selector) > 0
        image = image_flops(trained_pair[1], c.task)
        ends = image.stem + image.head
        whole = (ends + c.selected.flops + image.selector) / (ends + image.blocks)
        assert c.timing.flops_ratio == pytest.approx(whole)


def test_static_structures_lie_near_the_cost_and_all_over_and_hold_the_favourites(trained_pair, compared):
    _, model, _ = trained_pair
    selected = compared[1].selected
    tried = static_structures(model, selected, near=5, spread=8)
    assert len(tried.unique(dim=0)) == len(tried) >= 5
    assert (tried == selected.common[0][0]).all(1).any()
    reports = [s.flops for s in compared[1].statics]
    assert min(reports) < selected.flops < max(reports)


def test_best_static_is_the_most_accurate_that_costs_no_more():
    c = made_comparison()
    assert len(c.affordable) == 2
    assert c.best_static.accuracy == 0.94


def test_ties_between_static_structures_go_to_the_lower_loss():
    statics = tuple(made_report("digits", 0.9, 40.0, [[k, 0]], loss) for k, loss in enumerate((0.5, 0.2, 0.9)))
    assert digits(made_comparison(statics=statics).best_static.levels[0]) == "10"


def test_variety_is_the_entropy_of_the_structures_in_use():
    assert made_comparison().selected.variety == pytest.approx(math.log(2))
    assert made_comparison(levels=[[3, 0]] * 5).selected.variety == 0


def test_table_has_a_column_per_task_and_the_measured_numbers():
    lines = table([made_comparison(), made_comparison("fashion", accuracy=0.875, flops=48.0)]).splitlines()
    cells = {line[:36].strip(): line[36:].split() for line in lines}
    assert cells[""] == ["digits", "fashion"]
    assert cells["accuracy, Deep Elastic Network"] == ["95.00%", "87.50%"]
    assert cells["difference in points"] == ["-1.00", "-8.50"]
    assert cells["times fewer"] == ["2.00", "2.08"]
    assert cells["us per image, dense"] == ["4.0", "4.0"]
    assert cells["times as fast"] == ["2.00", "2.00"]
    assert cells["realised fraction"] == ["1.00", "0.96"]
    assert cells["structures in use"] == ["2", "2"]
    assert cells["their entropy in nats"] == ["0.69", "0.69"]
    assert cells["best single structure of that cost"] == ["94.00%", "94.00%"]
    assert cells["gain of choosing per image"] == ["+1.00", "-6.50"]
    assert len({len(line) for line in lines}) == 1


def test_collapse_to_one_structure_is_said_in_words():
    collapsed = made_comparison(levels=[[3, 1]] * 4)
    assert "digits: the selector COLLAPSED to one structure (31)" in remarks([collapsed])[0]
    assert "COLLAPSED" not in " ".join(remarks([made_comparison()]))


@pytest.mark.parametrize(("accuracy", "words"), [(0.95, "1.00 points better than"), (0.93, "NO better than")])
def test_gain_of_choosing_per_image_is_said_in_words(accuracy, words):
    assert words in remarks([made_comparison(accuracy=accuracy)])[0]


def test_block_that_tasks_use_most_differently():
    first = made_comparison(levels=[[3, 0]] * 4)
    second = made_comparison("fashion", levels=[[2, 3]] * 4)
    assert first.selected.usage.tolist() == [1, 0]
    assert second.selected.usage.tolist() == [0.5, 1]
    assert most_different_block(first.selected.usage, second.selected.usage) == (1, 1)
    assert "block 2: digits uses 0% of it, fashion 100%" in remarks([first, second])[-1]
    assert remarks([first, first])[-1] == "Both tasks use all blocks alike."


SLOW = Timing(plain=2e-6, full=3e-6, selected=2e-6, selector=1e-7, flops_ratio=0.5)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, ["at least 10 structures"]),
        ({"levels": [[i % 4, i // 4] for i in range(12)]}, []),
        (
            {"accuracy": 0.89},
            [
                "accuracy at least",
                "within 1 point",
                "times fewer",
                "realised fraction",
                "at least 10",
                "better than one structure",
            ],
        ),  # nothing good is said of a network that has not learnt
        ({"accuracy": 0.9499}, ["within 1 point", "at least 10"]),
        ({"flops": 60.0, "accuracy": 0.995}, ["times fewer", "at least 10"]),
        ({"timing": SLOW}, ["realised fraction", "at least 10"]),
    ],
    ids=["few-structures", "all-well", "inaccurate", "far-from-dense", "dear", "slow"],
)
def test_each_promise_fails_by_itself(changes, failing):
    broken = [check.claim for check in checks([made_comparison(**changes)], LEAST) if not check.holds]
    assert len(broken) == len(failing)
    assert all(words in claim for words, claim in zip(failing, broken, strict=True))


def test_tasks_that_use_the_blocks_alike_fail_the_promise_that_they_differ():
    alike = [made_comparison(), made_comparison("fashion")]
    apart = [made_comparison(), made_comparison("fashion", levels=[[0, 3]] * 4)]
    assert [c.holds for c in checks(alike, LEAST)][-1] is False
    assert [c.holds for c in checks(apart, LEAST)][-1] is True


def test_json_holds_the_numbers(tmp_path):
    write_json(tmp_path / "results.json", [made_comparison()], {"seed": 3})
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["seed"] == 3
    task = stored["tasks"]["digits"]
    assert task["selected"]["accuracy"] == 0.95
    assert task["structures"] == [{"levels": "12", "images": 2}, {"levels": "30", "images": 2}]
    assert task["best_static"]["levels"] == "10"
    assert task["timing"]["speedup"] == 2


def test_figures_are_drawn_and_not_blank(tmp_path, trained_pair, compared):
    paths = draw_all(compared, trained_pair[1], tmp_path)
    names = ["accuracy_flops", "levels", "structures", "images_digits", "images_fashion"]
    assert [path.stem for path in paths] == names
    for path in paths:
        assert_drawn(path)


def test_figures_of_a_collapsed_selector_say_so(trained_pair, compared):
    from den.report.figures.selection import example_images, structure_histogram

    c = compared[0]
    levels = c.selected.levels[:1].expand(len(c.images), -1)
    collapsed = dataclasses.replace(c.selected, levels=levels, structures=1)
    titles = [axes.get_title(loc="left") for axes in structure_histogram([collapsed], trained_pair[1]).axes]
    assert titles == ["digits: one structure in use"]
    assert "every class costs" in example_images(collapsed, c.images, trained_pair[1]).get_suptitle()
