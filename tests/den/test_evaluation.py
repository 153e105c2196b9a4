"""den evaluate: the record of a run, and where it is read again."""

import dataclasses
import json

import pytest
import torch

import den.runs.evaluation
from den import cli
from den.data import load_set
from den.evaluate.accuracy import evaluate, static_candidates
from den.nn.count import count_parameters
from den.runs.command import opened
from den.runs.evaluation import VERSION, Evaluation, evaluate_run, read_evaluation, write_evaluation
from den.runs.gain import cost_correlation, image_losses
from den.runs.steering import unseen_images
from den.runs.trained import open_run
from den.support.settings import to_dict
from den.train.checkpoint import load_checkpoint, save_checkpoint
from tests.small_runs import evaluations


@pytest.fixture
def few_images(monkeypatch):
    whole = {split: load_set("digits", split).subset(torch.arange(80)) for split in ("train", "test")}
    monkeypatch.setattr("den.data.load_set", lambda name, split, root: whole[split])
    return whole


@pytest.fixture
def measured(tmp_path, stored_run, few_images):
    stored_run(tmp_path / "run")
    run = open_run(tmp_path / "run")
    return run, *evaluate_run(run, [few_images["test"]])


def test_a_record_says_what_was_measured_and_of_what(measured):
    run, record, reports = measured
    result, report = record.tasks[0], reports["digits"]
    assert (record.method, record.seed, record.checkpoint, record.updates) == ("den", 0, "last", 5)
    assert (record.backbone, record.scenario) == ("wrn8_1", None)
    assert record.parameters == count_parameters(run.model)
    assert (result.accuracy, result.flops, result.structures) == (report.accuracy, report.flops, report.structures)
    assert [len(row) for row in result.histogram] == [4, 4, 4]
    assert sum(map(sum, result.histogram)) == 3 * 80
    assert sum(map(sum, result.probabilities)) == pytest.approx(3)
    assert result.common[0].levels == "".join(map(str, report.common[0][0].tolist()))
    assert sum(chosen.share for chosen in result.common) == pytest.approx(1)
    used = run.model.estimator.level_parameters.gather(1, report.levels.t()).sum(0).double().mean()
    assert result.parameters == pytest.approx(used.item())
    assert result.timing is None


def test_the_command_keeps_weights_once_and_measures_the_same(tmp_path, measured, few_images):
    run = opened(tmp_path / "run", "last", "cpu")
    assert evaluate_run(run, [few_images["test"]])[0] == measured[1]
    if any(block.folded().direct for block in measured[0].model.estimator.blocks):
        with pytest.raises(ValueError, match="frozen"):
            run.model.state_dict()


def test_a_dense_run_uses_everything(tmp_path, stored_run, few_images):
    stored_run(tmp_path / "run", "dense")
    run = open_run(tmp_path / "run")
    result = evaluate_run(run, [few_images["test"]])[0].tasks[0]
    assert (result.flops_ratio, result.structures, result.entropy) == (1, 1, pytest.approx(0))
    assert result.parameters == count_parameters(run.model).blocks


def test_a_rule_is_evaluated_at_its_structures(measured, few_images):
    run = measured[0]
    levels = torch.tensor([[1, 0, 3], [2, 3, 0]]).repeat(40, 1)
    dense = dataclasses.replace(run.config, mode="dense")
    ruled = dataclasses.replace(run, config=dense, structures=lambda images, task: levels[: len(images)])
    result = evaluate_run(ruled, [few_images["test"]])[0].tasks[0]
    assert result.histogram == ((0, 40, 40, 0), (40, 0, 0, 40), (40, 0, 0, 40))
    assert result.probabilities[0] == pytest.approx((0, 0.5, 0.5, 0))
    assert result.variety == pytest.approx(0.6931, abs=1e-4)
    assert result.entropy == pytest.approx(0, abs=1e-6)


def test_records_survive_json(tmp_path, measured):
    path = tmp_path / "evaluation.json"
    write_evaluation(path, measured[1])
    assert read_evaluation(path) == measured[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": VERSION + 1},
            rf"version of .*evaluation\.json must be {VERSION}, got {VERSION + 1} .*den evaluate",
        ),
        ({"version": None}, rf"version of .* must be {VERSION}, got None"),
        ({"colour": 1}, r"evaluation\.json: key must be one of settings, .*, got 'colour'"),
        ({"updates": "many"}, r"evaluation\.json\.updates: value must be int, got 'many'"),
    ],
)
def test_records_that_do_not_fit_are_explained(tmp_path, measured, change, message):
    path = tmp_path / "evaluation.json"
    write_evaluation(path, measured[1])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_evaluation(path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_no_record_is_explained(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluation: .*(readable JSON|version)"):
        read_evaluation(tmp_path / "evaluation.json")


def test_a_run_is_measured_once_and_again_after_more_updates(tmp_path, stored_run, few_images, monkeypatch):
    folder = tmp_path / "run"
    stored_run(folder)
    first, points = evaluations(folder)
    assert isinstance(first, Evaluation)
    assert points == []
    with monkeypatch.context() as patch:
        patch.setattr("den.runs.command.evaluate_run", lambda *a, **k: pytest.fail("measured again"))
        assert evaluations(folder)[0] == first
    tensors, record = load_checkpoint(folder / "last.safetensors")
    save_checkpoint(folder / "last.safetensors", tensors, {**record, "position": {"total_steps": 9}})
    assert evaluations(folder)[0].updates == 9


def test_the_command_writes_the_record_and_times_when_asked(tmp_path, stored_run, few_images, capsys):
    stored_run(tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--checkpoint", "best", "--time"]) == 0
    assert "digits: 80 images, accuracy" in capsys.readouterr().out
    record = read_evaluation(tmp_path / "run" / "evaluation.json")
    assert record.checkpoint == "best"
    assert record.tasks[0].timing.selected > 0


def test_operating_points_are_kept_beside_the_record(tmp_path, stored_run, few_images, capsys):
    folder = tmp_path / "run"
    stored_run(folder)
    assert cli.main(["evaluate", str(folder), "--budget-flops", "0.4"]) == 0
    printed = capsys.readouterr().out
    assert "lambda of the cost at run time: digits" in printed
    assert "of the full structure's FLOPs against a budget of 0.4 (" in printed
    record, points = evaluations(folder)
    assert record.budget is None
    assert [(p.budget.unit, p.budget.limit, list(p.budget.weights)) for p in points] == [("flops", 0.4, ["digits"])]
    assert points[0].tasks[0].flops_ratio == pytest.approx(0.4, abs=0.1)


def test_the_best_run_on_held_out_images_is_chosen(tmp_path, stored_run, few_images, monkeypatch, capsys):
    for seed in (0, 1):
        stored_run(tmp_path / str(seed), seed=seed)
    folders = [str(tmp_path / str(seed)) for seed in (0, 1)]
    assert cli.main(["evaluate", *folders, "--budget-flops", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = [float(line.split("accuracy ")[1].split(" %")[0]) for line in lines[:2]]
    assert lines[2].startswith(folders[0] if accuracy[0] >= accuracy[1] else folders[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs must be at least one run folder, got none"),
        (["{tmp}/den", "--budget-flops", "0.5", "--budget-ms", "1"], "budget must be in FLOPs or in milliseconds"),
        (["{tmp}/den", "--budget-flops", "1.5"], "budget_flops must be above 0 and at most 1, got 1.5"),
        (["{tmp}/den", "--budget-flops", "-1"], "budget_flops must be above 0 and at most 1, got -1"),
        (["{tmp}/den", "--budget-flops", "0"], "budget_flops must be above 0 and at most 1, got 0"),
        (["{tmp}/den", "--budget-flops", "nan"], "budget_flops must be above 0 and at most 1, got nan"),
        (["{tmp}/den", "--budget-flops", "inf"], "budget_flops must be finite and above 0 and at most 1, got inf"),
        (["{tmp}/den", "--budget-ms", "nan"], "budget_ms must be above 0, got nan"),
        (["{tmp}/den", "--budget-ms", "inf"], "budget_ms must be finite and above 0, got inf"),
        (["{tmp}/den", "--budget-ms", "0"], "budget_ms must be above 0, got 0"),
        (["{tmp}/den", "--static", "-5"], "static must be in 0..20000, got -5"),
        (
            ["{tmp}/den", "--static", "1000000000000000000000"],
            "static must be in 0..20000, got 1000000000000000000000",
        ),
        (["{tmp}/den", "--dense", "{tmp}/none"], "config.json must be a readable JSON file"),
        (["{tmp}/den", "--dense", "{tmp}/den"], "dense must be a dense run of digits, got mode 'den', tasks digits"),
        (["{tmp}/others", "--dense", "{tmp}/dense"], "dense must be a dense run of fashion, got mode 'dense', tasks"),
        (["{tmp}/den", "--budget-ms", "-1"], "budget_ms must be above 0, got -1"),
        (["{tmp}/dense", "--budget-flops", "0.5"], "must have a selector to meet a budget, got mode 'dense'"),
        (["{tmp}/den", "{tmp}/none-held-out", "--budget-flops", "0.5"], "must hold images out, got validation 0"),
        (["{tmp}/den", "{tmp}/others", "--budget-flops", "0.5"], "must be of the same tasks, got fashion"),
        (["{tmp}/den", "--checkpoint", "best"], "must be a complete checkpoint"),
    ],
)
def test_wrong_input_is_told_in_one_line(tmp_path, stored_run, few_images, capsys, arguments, message):
    stored_run(tmp_path / "den")
    stored_run(tmp_path / "dense", "dense")
    (tmp_path / "den" / "best.safetensors").unlink()
    for name, key, value in (("none-held-out", "validation", 0), ("others", "tasks", ["fashion"])):
        stored_run(tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        settings["data"][key] = value
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    assert cli.main(["evaluate", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("den: error: ")
    assert message in error[-1]
    assert not list(tmp_path.rglob("evaluation*"))


def test_a_random_selector_and_single_levels_are_records_of_their_own(tmp_path, stored_run, few_images, capsys):
    folder = tmp_path / "run"
    stored_run(folder)
    assert cli.main(["evaluate", str(folder), "--selector", "random", "--random-flops", "0.5"]) == 0
    assert cli.main(["evaluate", str(folder), "--levels", "1", "3"]) == 0
    own, others = evaluations(folder)
    found = {record.variant: record for record in others}
    assert sorted(found) == ["level-1", "level-3", "random"]
    assert found["random"].tasks[0].flops_ratio == pytest.approx(0.5, abs=0.05)
    assert (found["level-1"].tasks[0].flops_ratio, found["level-3"].tasks[0].flops_ratio) == (0.25, 1)
    assert [found[name].method for name in ("random", "level-1")] == ["random", "level"]
    assert all((record.settings, record.training) == (own.settings, own.training) for record in others)
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--levels", "4"]) == 2
    assert "levels must be in 0..3, got 4" in capsys.readouterr().err
    assert cli.main(["evaluate", str(folder), "--levels", "1", "--budget-flops", "0.5"]) == 2
    assert "must come one at a time" in capsys.readouterr().err


def test_a_variant_is_as_far_trained_as_its_run(tmp_path, stored_run, few_images, monkeypatch):
    stored_run(tmp_path / "run")
    modes = []
    monkeypatch.setattr(
        den.runs.evaluation, "training_of", lambda folder, config, checkpoint: modes.append(config.mode)
    )
    assert cli.main(["evaluate", str(tmp_path / "run"), "--selector", "random"]) == 0
    assert set(modes) == {"den"}  # a random selector's run has other phases than the checkpoint


def test_the_gain_over_a_single_structure_is_of_one_chosen_on_held_out_images(tmp_path, stored_run, few_images, capsys):
    folder, dense = tmp_path / "run", tmp_path / "dense"
    stored_run(folder)
    stored_run(dense, "dense", seed=1)
    assert cli.main(["evaluate", str(folder), "--static", "7", "--dense", str(dense)]) == 0
    printed = capsys.readouterr().out
    (result,) = read_evaluation(folder / "evaluation.json").tasks
    static, model = result.static, open_run(folder).model
    held_out = unseen_images(open_run(folder), None)[1]
    assert static.held_out
    structure = torch.tensor([int(level) for level in static.levels])
    assert static.accuracy == evaluate(model, [few_images["test"]], structure)["digits"].accuracy
    tried = static_candidates(model, result.flops, 7, 0.03, 0)
    assert len(tried) <= static.candidates <= len(tried) + result.structures
    best = max(evaluate(model, held_out, each)["digits"].accuracy for each in tried)
    assert evaluate(model, held_out, structure)["digits"].accuracy >= best
    assert f"choosing per image gains {100 * (result.accuracy - static.accuracy):+.2f} points" in printed
    assert -1 <= result.cost_correlation <= 1
    assert f"the dense network's loss: {result.cost_correlation:+.3f}" in printed


def test_a_run_that_held_nothing_out_says_that_the_test_images_chose(tmp_path, stored_run, few_images, capsys):
    config = stored_run(tmp_path / "run")
    nothing = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=0.0))
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(nothing)))
    assert cli.main(["evaluate", str(tmp_path / "run"), "--static", "3"]) == 0
    assert "chosen on the test images" in capsys.readouterr().out
    assert not read_evaluation(tmp_path / "run" / "evaluation.json").tasks[0].static.held_out


def test_the_correlation_of_costs_goes_by_ranks(measured):
    model = measured[0].model
    levels = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [3, 3, 3]])
    assert cost_correlation(model, levels, torch.tensor([0.1, 0.2, 5.0, 6.0])) == pytest.approx(1)
    assert cost_correlation(model, levels, torch.tensor([4.0, 3.0, 2.0, 1.0])) == pytest.approx(-1)
    assert cost_correlation(model, levels[:1].expand(4, 3), torch.rand(4)) is None


def test_losses_of_images_average_to_the_loss(measured):
    run, _, _ = measured
    images = load_set("digits", "test").subset(torch.arange(80))
    losses = image_losses(run.model, images)
    assert losses.shape == (80,)
    assert losses.mean().item() == pytest.approx(evaluate(run.model, [images], "full")["digits"].loss, rel=1e-5)
