"""Experiments by name: their settings, the command line, ablations, end to end."""

import dataclasses
import json

import pytest
import torch

from den import cli
from den.dag.scenarios import named_settings
from den.data import load_set
from den.nn.tasks import Task
from den.recipes import method_of, prepare
from den.recipes.den import derive_structures, first_structures
from den.recipes.setup import hold_out, new_model
from den.support.settings import from_dict, to_dict
from den.train.config import DataConfig, EstimatorTraining, PhaseConfig, SelectorTraining, TrainConfig
from den.train.engine import Engine
from den.train.folder import read_metrics, stored_config
from den.train.phases import run_phases
from den.train.scenarios import SCENARIOS, ScenarioOptions, expand_tasks, scenario_config
from tests.image_files import random_images, write_jpegs


@pytest.mark.parametrize(
    ("name", "tasks", "batch", "levels", "backbone", "trunk"),
    [
        ("m1", ("cifar100", "tinyimagenet", "stl10"), 384, 4, "wrn32_4", 32),
        ("m2", tuple(f"imagenet50-{k}@84" for k in range(10)), 256, 2, "simpleconvnet", 84),
        ("m3", ("cifar100-coarse", "cifar100"), 128, 4, "wrn32_4", 32),
        ("c1", ("cifar100",), 128, 4, "resnext29_8x64d_narrow", 32),
    ],
)
def test_scenarios_are_those_of_the_paper(name, tasks, batch, levels, backbone, trunk):
    config = scenario_config(name)
    assert (config.scenario, config.selector.rho) == (name, 0.1)
    assert (config.data.tasks, config.data.batch_size) == (tasks, batch)
    assert dataclasses.astuple(config.network)[:1] == (backbone,)
    assert (config.network.levels, config.network.trunk_size) == (levels, trunk)
    assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        ("vgg19", 3),
        ("vgg19_elastic_fc", 3),
        ("resnext29_4x64d_narrow", 3),
        ("resnext29_8x64d_narrow", 4),
        ("wrn14_1", 4),
    ],
)
def test_levels_follow_the_backbone(backbone, levels):
    assert scenario_config("c1", ScenarioOptions(backbone=backbone)).network.levels == levels


def test_the_full_schedule_is_that_of_the_authors_code():
    phases = run_phases(scenario_config("m1"))
    assert [phase.settings.steps for phase in phases] == [78_200] + 9 * [4_693, 15_642] + [4_693]
    assert [phase.network for phase in phases] == 10 * ["estimator", "selector"]
    first = phases[0]
    assert [first.rate(step) for step in (0, 39_099, 39_100, 58_650)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    selector = [phase.rate(0) for phase in phases[1::2]]
    assert selector == pytest.approx(3 * [1e-3] + 3 * [1e-4] + 4 * [1e-5])
    estimator = [phase.rate(0) for phase in phases[2::2]]  # of stages 2 to 10
    assert estimator == pytest.approx(3 * [0.1] + 3 * [1e-2] + 3 * [1e-3])


@pytest.mark.parametrize(("tasks", "batch"), [((), 384), (("stl10",), 128), (("tin50-0..3",), 512)])
def test_a_step_of_m1_sees_as_many_images_of_every_task(tasks, batch):
    assert scenario_config("m1", ScenarioOptions(tasks=tasks)).data.batch_size == batch


def test_nestednet_has_the_levels_of_the_paper_on_its_tasks():
    assert scenario_config("m1").methods.levels == (2, 1, 3)  # Tiny-ImageNet lowest, STL-10 highest
    assert scenario_config("m1", ScenarioOptions(tasks=("stl10", "cifar100", "tinyimagenet"))).methods.levels == ()


@pytest.mark.parametrize("mode", ["nestednet", "random", "routing", "cross-stitch", "packnet", "blockdrop", "adashare"])
def test_compared_methods_get_as_many_updates_as_the_estimator(mode):
    config = scenario_config("m3", ScenarioOptions("wrn8_1"))
    config = dataclasses.replace(config, mode=mode, network=dataclasses.replace(config.network, trunk_size=8))
    tasks = [Task(name, classes, 32) for name, classes in zip(config.data.tasks, (20, 100), strict=True)]
    phases = method_of(new_model(config.network, tasks, 0, config.joint), config).phases()
    of_network = [phase.settings.steps for phase in phases if phase.network != "selector"]
    each = 2 if mode == "packnet" else 1  # which trains the two tasks one after the other
    assert sum(of_network) == pytest.approx(each * (78_200 + 9 * 15_642), rel=1e-3)
    shorter = dataclasses.replace(config, methods=dataclasses.replace(config.methods, updates="first"))
    shorter_phases = method_of(new_model(config.network, tasks, 0, config.joint), shorter).phases()
    assert max(phase.settings.steps for phase in shorter_phases) == 78_200


def test_matched_flops_count_the_levels_that_an_update_passes():
    config = scenario_config("c1", ScenarioOptions("wrn8_1"))
    methods = dataclasses.replace(config.methods, updates="flops")
    spent = {}
    for mode in ("random", "nestednet"):
        one = dataclasses.replace(config, mode=mode, methods=methods)
        method = method_of(new_model(config.network, [Task("cifar100", 100, 32)], 0), one)
        spent[mode] = method.phases()[0].settings.steps * method.update_cost()
    assert spent["random"] == pytest.approx(spent["nestednet"], rel=1e-3)
    assert method.update_cost() == pytest.approx(0.25 + 0.5 + 1)


def test_the_letter_of_the_paper(capsys, monkeypatch):
    config = scenario_config("m1", ScenarioOptions(paper=True))
    selector, estimator, network = config.selector, config.estimator, config.network
    assert (selector.phase.rate, selector.baseline, selector.entropy_bonus) == (1e-5, "none", 0)
    assert {p.until for p in (selector.phase, estimator.first, estimator.later)} == {"converge"}
    assert (estimator.structures, estimator.initial_share, config.data.validation) == ("sample", 0, 0)
    assert (network.start, network.selector, network.selector_head) == ("xavier", "paper", "shared")
    monkeypatch.setattr("den.recipes.den.train", lambda config, resume: None)
    assert cli.main(["train", "m1", "--paper"]) == 0
    assert "not as in" not in capsys.readouterr().out


def test_what_is_changed_in_the_authors_schedule_is_told(capsys, monkeypatch):
    monkeypatch.setattr("den.recipes.den.train", lambda config, resume: None)
    assert cli.main(["train", "m1"]) == 0
    assert "not as in" not in capsys.readouterr().out
    assert cli.main(["train", "m1", "--estimator.later.rate", "0.01", "--data.batch-size", "64"]) == 0
    told = "not as in the code of the authors (theirs): data.batch_size 64 (384), estimator.later.rate 0.01 (0.1)"
    assert told in capsys.readouterr().out
    assert cli.main(["train", "m1", "--budget", "0.5"]) == 0
    assert "estimator.first.steps 39100 (78200)" in capsys.readouterr().out


def test_a_first_look_is_short_and_small():
    config = scenario_config("c1", ScenarioOptions(quick=True, tasks=("folder:x@64",)))
    assert (config.network.backbone, config.network.trunk_size) == ("wrn14_1", 16)
    assert sum(phase.settings.steps for phase in run_phases(config)) < 2000


def test_a_budget_shortens_every_phase_and_keeps_its_rates():
    full, short = (run_phases(scenario_config("m3", ScenarioOptions(budget=b))) for b in (1.0, 0.01))
    assert [phase.settings.steps for phase in short] == [782] + 9 * [47, 156] + [47]
    for one, other in zip(full, short, strict=True):
        for progress in (0.0, 0.49, 0.51, 0.76):
            rates = [phase.rate(int(progress * phase.settings.steps)) for phase in (one, other)]
            assert rates[0] == pytest.approx(rates[1])
    explored = [scenario_config("m3", ScenarioOptions(budget=b)).selector.exploration ** (100 * b) for b in (1.0, 0.01)]
    assert explored[0] == pytest.approx(explored[1])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("stl10",), ("stl10",)),
        (("tin50-0..2",), ("tin50-0", "tin50-1", "tin50-2")),
        (("a", "imagenet50-8..9@224", "b"), ("a", "imagenet50-8@224", "imagenet50-9@224", "b")),
    ],
)
def test_ranges_of_tasks_are_written_out(names, expected):
    assert expand_tasks(names) == expected


@pytest.mark.parametrize(
    ("tasks", "trunk"), [(("imagenet50-0..9@224",), 224), (("tin50-0..9",), 84), (("stl10@96", "stl10@32"), 96)]
)
def test_simpleconvnet_sees_the_largest_images_themselves(tasks, trunk):
    assert scenario_config("m2", ScenarioOptions(tasks=tasks)).network.trunk_size == trunk


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "m4"], "scenario must be one of m1, m2, m3, c1, got 'm4'"),
        (["train", "m1", "--budget", "0"], "budget must be above 0, got 0.0"),
        (["train", "m1", "--rho", "-1"], "selector.rho must be at least 0, got -1.0"),
        (["train", "m1", "--share", "0"], "data.share must be in 1e-06..1, got 0.0"),
        (["train", "m1", "--data-root", "{tmp}"], "data root of 'cifar100' must hold cifar-100-python.tar.gz or"),
        (["train", "m1", "--data-root", "{tmp}/absent"], "must be a folder"),
        (["train", "m1", "--tasks", "digits", "--backbone", "wrn15_1"], "depth must be 6 n + 2"),
        (["train", "m1", "--tasks", "digits", "--backbone", "alexnet"], "got 'alexnet'"),
        (["train", "m1", "--tasks", "digits", "--backbone", "wrn8_1", "--network.levels", "9"], "for 9 levels, got 16"),
        (["fetch", "--data-root", "{tmp}"], "names must be at least one image set, got none"),
        (["fetch", "mnist", "--data-root", "{tmp}"], "name must be one of digits, fashion, cifar10"),
        (["fetch", "digits", "--data-root", "{tmp}"], "fetch: name must be one of cifar10, cifar100"),
    ],
)
def test_wrong_input_is_told_in_one_line(tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    arguments += ["--out", str(tmp_path / "run")] if arguments[0] == "train" else []
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("den: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_every_setting_of_a_scenario_can_be_changed(monkeypatch):
    seen = []
    monkeypatch.setattr("den.recipes.den.train", lambda config, resume: seen.append((config, resume)))
    options = ["--budget", "0.5", "--backbone", "wrn14_1", "--rho", "0.2", "--tasks", "digits", "fashion", "--resume"]
    changed = ["--stages", "3", "--selector.samples", "6", "--estimator.first.rate", "0.05", "--share", "0.25"]
    assert cli.main(["train", "m1", *changed, *options]) == 0
    config, resume = seen[0]
    expected = scenario_config("m1", ScenarioOptions("wrn14_1", 0.2, 0.5, ("digits", "fashion")))
    assert resume
    assert (config.stages, config.selector.samples, config.estimator.first.rate) == (3, 6, 0.05)
    assert (config.data.share, config.estimator.first.steps, config.scenario) == (0.25, 39_100, "m1")
    assert dataclasses.replace(config, stages=10, data=expected.data, estimator=expected.estimator) == (
        dataclasses.replace(expected, selector=dataclasses.replace(expected.selector, samples=6))
    )


def test_help_of_a_scenario_names_its_choices_and_all_settings(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "m3", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("--backbone", "--rho", "--budget", "--tasks", "--selector.rho", "--share"))
    assert "--scenario" not in text


def test_dag_scenarios_are_handed_on(monkeypatch):
    seen = []
    monkeypatch.setattr("den.recipes.dag.search.train", lambda config, resume: seen.append((config, resume)))
    assert cli.main(["train", "dag-omniglot", "--seed", "1"]) == 0
    assert cli.main(["dag", "train", "dag-omniglot", "--seed", "1"]) == 0
    assert seen == [(dataclasses.replace(named_settings("dag-omniglot"), seed=1), False)] * 2


TINY = [
    "--backbone", "wrn8_1", "--budget", "1e-5", "--network.trunk-size", "8", "--stages", "1", "--no-progress",
    "--selector.samples", "2", "--data.validation", "0.2", "--estimator.finish.steps", "1",
]  # fmt: skip


def test_two_tasks_of_a_packed_set_run_end_to_end_and_resume(tmp_path, capsys):
    y = torch.arange(60).numpy() % 10
    for split in ("train", "val"):
        write_jpegs(tmp_path / f"tin50.{split}0.npz", random_images(60, 16), y=y, c=y // 5)
    command = ["train", "m2", *TINY, "--tasks", "tin50-0..1", "--data.batch-size", "8", "--data-root", str(tmp_path)]
    out = tmp_path / "run"
    assert cli.main([*command, "--out", str(out)]) == 0
    config = stored_config(out)
    assert (config.scenario, config.data.tasks) == ("m2", ("tin50-0", "tin50-1"))
    assert [line["phase"] for line in read_metrics(out)] == ["estimator", "selector", "estimator"]
    assert set(read_metrics(out)[-1]["held_out"]) == {"tin50-0", "tin50-1"}
    assert cli.main([*command, "--out", str(out), "--resume"]) == 0
    assert cli.main([*command, "--out", str(out), "--resume", "--rho", "0.7"]) == 2
    assert "selector.rho must stay 0.1 to continue" in capsys.readouterr().err
    assert cli.main(["evaluate", str(out)]) == 0
    assert "tin50-1: 30 images" in capsys.readouterr().out


def test_runs_from_before_scenarios_are_still_read(tmp_path):
    values = to_dict(TrainConfig())
    del values["scenario"], values["data"]["share"], values["estimator"]["initial"], values["estimator"]["decay_at"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert stored_config(tmp_path) == TrainConfig()


def test_share_takes_that_part_of_every_class_by_the_seed():
    whole = load_set("fashion", "train")
    kept, held = hold_out([whole], TrainConfig(data=DataConfig(("fashion",), share=0.1, validation=0.25)))
    assert (len(kept[0]), len(held[0])) == (900, 300)
    assert (kept[0].labels.bincount() + held[0].labels.bincount()).tolist() == [120] * 10
    other, _ = hold_out([whole], TrainConfig(seed=1, data=DataConfig(("fashion",), share=0.1, validation=0.25)))
    assert not torch.equal(kept[0].images, other[0].images)


def engine_of(tmp_path, **estimator):
    return Engine(
        TrainConfig(
            out=tmp_path / "run",
            progress=False,
            data=DataConfig(tasks=("digits",), batch_size=512),
            network=dataclasses.replace(scenario_config("m3").network, backbone="wrn8_1", trunk_size=8),
            estimator=EstimatorTraining(first=PhaseConfig(1, 0.1), **estimator),
            selector=SelectorTraining(phase=PhaseConfig(1, 1e-3)),
        ),
        prepare,
    )


@pytest.mark.parametrize(
    ("initial", "low", "high"), [("equation8", 0.7, 0.85), ("uniform", 0.0, 0.05), ("selector", 0.0, 0.0)]
)
def test_initial_distributions_differ_as_in_figure_5(tmp_path, initial, low, high):
    """The share of full structures; the selector is made never to choose them."""
    with engine_of(tmp_path, initial=initial) as engine:
        with torch.no_grad():
            engine.model.selector.heads[0].bias.view(3, 4)[:] = torch.tensor([0.0, 0.0, 0.0, -1e4])
        engine.model.eval()
        batch = engine.batches["all"].next()
        structures = derive_structures(engine, 1, batch)
        full = (structures == 3).all(1).float().mean().item()
        assert low <= full <= high
        others = structures[(structures != 3).any(1)]
        counts = others.flatten().bincount(minlength=4) / others.numel()
        if initial == "selector":
            assert counts[:3].tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
        elif initial == "uniform":
            assert counts.tolist() == pytest.approx([1 / 4] * 4, abs=0.06)
        assert first_structures(engine, batch).shape == (512, 3)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_two_to_five_levels_train(tmp_path, levels):
    arguments = ["--tasks", "digits", "--data.batch-size", "16", "--share", "0.1", "--network.levels", str(levels)]
    assert cli.main(["train", "m3", *TINY, *arguments, "--out", str(tmp_path / "run")]) == 0
    histogram = read_metrics(tmp_path / "run")[-1]["held_out"]["digits"]["histogram"]
    assert {len(block) for block in histogram} == {levels}


@pytest.mark.parametrize("baseline", ["leave-one-out", "running-mean", "none"])
def test_selectors_train_with_and_without_baseline_and_exploration(tmp_path, baseline):
    arguments = ["--tasks", "digits", "--data.batch-size", "16", "--share", "0.1", "--selector.exploration", "0"]
    arguments += ["--selector.baseline", baseline, "--out", str(tmp_path / "run")]
    assert cli.main(["train", "m3", *TINY, *arguments]) == 0


def test_without_exploration_no_structure_is_drawn_at_random(tmp_path, monkeypatch):
    seen = []
    from den.recipes.den import sample_structures

    def spy(log_probabilities, samples, epsilon, generator):
        seen.append(epsilon)
        return sample_structures(log_probabilities, samples, epsilon, generator)

    monkeypatch.setattr("den.recipes.den.sample_structures", spy)
    arguments = ["--tasks", "digits", "--data.batch-size", "16", "--share", "0.1", "--selector.phase.steps", "2"]
    for exploration, expected in (("0", [0, 0]), ("0.5", [1, 0.5])):
        seen.clear()
        out = str(tmp_path / exploration)
        assert cli.main(["train", "m3", *TINY, *arguments, "--selector.exploration", exploration, "--out", out]) == 0
        assert seen == expected


def test_scenarios_name_sets_that_there_are():
    from den.data.sets import _parse

    for scenario in SCENARIOS.values():
        for task in expand_tasks(scenario.tasks):
            _parse(task)
