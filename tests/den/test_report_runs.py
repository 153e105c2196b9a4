"""What a report makes of runs that have not finished, are there twice, are no runs, or cannot be written to."""

import csv
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch

from den import cli
from den.data import load_set
from den.recipes import METHODS
from den.recipes.den import train
from den.runs.evaluation import read_evaluation
from den.runs.state import Training, phases_of, training_of
from den.train.checkpoint import load_checkpoint, read_record, save_checkpoint
from den.train.folder import stored_config
from tests.small_runs import cut_sets, evaluations, small_config, train_interrupted


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    whole = load_set("digits", "test").subset(torch.arange(60))
    monkeypatch.setattr("den.data.load_set", lambda name, split, root=None: whole)


def come_to(folder, phase, updates):
    """Say in a stored run's checkpoints how far it has come."""
    for name in ("last", "best"):
        tensors, record = load_checkpoint(folder / f"{name}.safetensors")
        record["position"] = {"phase": phase, "total_steps": updates}
        save_checkpoint(folder / f"{name}.safetensors", tensors, record)


@pytest.fixture
def runs(tmp_path, stored_run):
    """runs(name, mode, phase, updates, seed): a stored run that has come so far; its folder."""

    def make(name, mode="den", phase=None, updates=None, seed=0):
        config = stored_run(tmp_path / name, mode, seed=seed)
        phases = phases_of(config, read_record(tmp_path / name / "last.safetensors"))
        planned = sum(each.settings.steps for each in phases)
        come_to(tmp_path / name, len(phases) if phase is None else phase, planned if updates is None else updates)
        return str(tmp_path / name)

    return make


def reported(tmp_path, capsys, *folders, status=0):
    assert cli.main(["report", *folders, "--out", str(tmp_path / "out")]) == status
    return capsys.readouterr()


def rows(tmp_path):
    with open(tmp_path / "out" / "digits-wrn8-1.csv", encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_an_unfinished_run_is_told_and_hides_no_finished_one(tmp_path, runs, capsys):
    stopped, done, dense = runs("stopped", updates=40, phase=0), runs("done"), runs("dense", "dense")
    text = reported(tmp_path, capsys, stopped, done, dense).out
    planned = training_of(Path(done), stored_config(done)).planned
    words = f"unfinished: 40 of {planned:,} updates"
    assert list(rows(tmp_path)) == [f"DEN (rho = 0.3), {words}", "DEN (rho = 0.3)", "dense"]
    accuracy = 100 * read_evaluation(tmp_path / "done" / "evaluation.json").accuracy
    assert rows(tmp_path)["DEN (rho = 0.3)"]["accuracy %"] == f"{accuracy:.2f}"
    assert f"NO    DEN (rho = 0.3), digits: trained to the end: {words}" in text
    claims = [line for line in text.splitlines() if line.startswith(("  yes", "  NO", "  open"))]
    assert sum("unfinished" in line for line in claims) == 1  # nothing else is claimed of it
    assert read_evaluation(tmp_path / "stopped" / "evaluation.json").training == Training(40, planned, False)
    drawn = {path.name for path in (tmp_path / "out").glob("*-levels.png")}
    assert drawn == {"digits-wrn8-1-den-rho-0.3-levels.png"}


def test_an_unfinished_baseline_is_held_against_nobody(tmp_path, runs, capsys):
    text = reported(tmp_path, capsys, runs("den"), runs("dense", "dense", 0, 7), runs("nested", "nestednet", 0, 7)).out
    assert rows(tmp_path)["DEN (rho = 0.3)"]["Δ dense"] == ""
    assert "within 1 point of dense" not in text
    assert "more accurate than nestednet" not in text
    assert "NO    dense, digits: trained to the end: unfinished: 7 of 1,500 updates" in text


def test_of_two_alike_it_is_said_which_is_shown(tmp_path, runs, capsys):
    text = reported(tmp_path, capsys, runs("one"), runs("two"), runs("other", seed=1)).out
    assert "`two` has the settings and the seed 0 of `one`, which was given first and is shown alone." in text
    assert rows(tmp_path)["DEN (rho = 0.3)"]["seeds"] == "2"


def test_a_folder_given_twice_is_one_run(tmp_path, runs, capsys, monkeypatch):
    one = runs("one")
    (tmp_path / "link").symlink_to(one)
    monkeypatch.chdir(tmp_path)
    assert "has the settings" not in reported(tmp_path, capsys, one, "one", "./one/", "link").out


def test_a_record_of_before_the_run_went_on_is_not_believed(tmp_path, runs):
    folder = Path(runs("run", phase=0, updates=40))
    assert evaluations(folder)[0].unfinished
    come_to(folder, 4, 2800)
    assert evaluations(folder)[0].updates == 2800
    settings = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    settings["settings"]["seed"] = 5  # of another run
    (folder / "evaluation.json").write_text(json.dumps(settings), encoding="utf-8")
    assert evaluations(folder)[0].seed == 0


@pytest.mark.parametrize("mode", ["den", "dense", *METHODS])
def test_every_method_is_unfinished_until_its_last_update(tmp_path, monkeypatch, mode):
    cut_sets(monkeypatch)
    config = small_config(tmp_path / "run", mode)
    train_interrupted(config, monkeypatch, 4)
    stopped = training_of(config.out, config)
    assert not stopped.finished
    assert 0 < stopped.updates < stopped.planned
    assert stopped.words == f"unfinished: {stopped.updates} of {stopped.planned} updates"
    train(config, resume=True)
    assert training_of(config.out, config) == Training(stopped.planned, stopped.planned, True)


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_folders_that_hold_no_such_run_are_named_before_anything_is_measured(tmp_path, runs, capsys, command):
    good = runs("good")
    (tmp_path / "empty").mkdir()
    shutil.copytree(good, tmp_path / "half")
    content = (tmp_path / "half" / "last.safetensors").read_bytes()
    (tmp_path / "half" / "last.safetensors").write_bytes(content[: len(content) // 2])
    runs("foreign")
    come_to(tmp_path / "foreign", 99, 10**6)
    runs("dag")
    tensors, record = load_checkpoint(tmp_path / "dag" / "last.safetensors")
    save_checkpoint(tmp_path / "dag" / "last.safetensors", tensors, {"dag": {}, "position": record["position"]})
    expected = {
        "empty": "config.json must be a readable JSON file",
        "half": "must be a complete checkpoint",
        "foreign": "must be of the run that the checkpoint is of",
        "dag": "must be a run of den train, got one of den dag train: measure it with den dag report",
    }
    out = ["--out", str(tmp_path / "out")]
    for name, message in expected.items():
        assert cli.main([command, good, str(tmp_path / name), *out]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("den: error: ")
        assert message in error
        assert f"{tmp_path}/{name}" in error
    assert not list(tmp_path.rglob("evaluation.json"))


@pytest.fixture
def read_only(tmp_path, runs):
    folder = Path(runs("kept"))
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    yield folder
    folder.chmod(stat.S_IRWXU)


def test_a_read_only_run_is_reported_from_elsewhere(tmp_path, read_only, capsys, monkeypatch):
    text = reported(tmp_path, capsys, str(read_only)).out
    (record,) = (tmp_path / "out" / "measured").rglob("evaluation.json")
    assert f"den: {read_only} cannot be written to; what was measured of it is in {record.parent}" in text
    assert not (read_only / "evaluation.json").exists()
    monkeypatch.setattr("den.runs.command.evaluate_run", lambda *a, **k: pytest.fail("measured again"))
    reported(tmp_path, capsys, str(read_only))


def test_a_read_only_run_is_evaluated_elsewhere_or_not_at_all(tmp_path, read_only, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("den.runs.command.evaluate_run", lambda *a, **k: pytest.fail("measured in vain"))
        assert cli.main(["evaluate", str(read_only)]) == 2
    assert "must be writable" in (error := capsys.readouterr().err)
    assert "write elsewhere with --out FOLDER" in error
    assert cli.main(["evaluate", str(read_only), "--out", str(tmp_path / "numbers")]) == 0
    assert f"the numbers are in {tmp_path}/numbers/evaluation.json" in capsys.readouterr().out
    assert read_evaluation(tmp_path / "numbers" / "evaluation.json").checkpoint == "last"


def test_records_of_several_runs_go_to_folders_of_their_names(tmp_path, runs, capsys):
    one, two = runs("one"), runs("two", seed=1)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(one, tmp_path / "elsewhere" / "one")
    out = tmp_path / "numbers"
    assert cli.main(["evaluate", one, two, "--out", str(out)]) == 0
    assert [read_evaluation(out / name / "evaluation.json").seed for name in ("one", "two")] == [0, 1]
    assert cli.main(["evaluate", one, str(tmp_path / "elsewhere" / "one"), "--out", str(out)]) == 2
    assert "runs must have different names" in capsys.readouterr().err


def test_what_was_measured_is_kept_when_nobody_reads_the_output(tmp_path, runs, monkeypatch):
    folder = runs("run")

    def unread(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", unread)
    assert cli.main(["evaluate", folder]) == 141
    assert read_evaluation(Path(folder) / "evaluation.json").updates > 0
    assert cli.main(["report", folder, "--out", str(tmp_path / "out"), "--no-figures"]) == 141
    assert (tmp_path / "out" / "report.md").exists()


def test_images_that_are_missing_are_told_before_anything_is_measured(tmp_path, runs, capsys, monkeypatch):
    monkeypatch.undo()
    first, second = runs("first"), runs("second", seed=1)
    settings = json.loads((Path(second) / "config.json").read_text(encoding="utf-8"))
    settings["data"] |= {"tasks": ["cifar100"], "root": str(tmp_path)}
    (Path(second) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for command in (["evaluate"], ["report", "--out", str(tmp_path / "out")]):
        assert cli.main([*command[:1], first, second, *command[1:]]) == 2
        assert "data root of 'cifar100' must hold" in capsys.readouterr().err
    assert not list(tmp_path.rglob("evaluation.json"))
