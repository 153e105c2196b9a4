"""What den dag report makes of runs that have not finished, are there twice, are no runs, or cannot be written to."""

import dataclasses
import stat

import pytest

from den.cli import main
from den.dag.config import (
    DagDataConfig,
    DagNetworkConfig,
    DagReportConfig,
    DagTrainConfig,
    DagTraining,
    ReductionConfig,
)
from den.recipes.dag.search import train
from den.report.dag.comparison import comparison, reference, verdicts
from den.report.dag.dense import single_task_references
from den.report.dag.measured import measure
from den.report.dag.report import report
from den.runs.state import Training, training_of
from den.train.checkpoint import load_checkpoint, save_checkpoint
from tests.small_runs import digit_tasks, train_interrupted, use_dag_tasks

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")


@pytest.fixture(autouse=True)
def two_tasks(monkeypatch):
    """Two tasks of different classes out of the digits, 8x8."""
    kinds = {"low": (0, 1, 2), "high": (7, 8, 9)}
    use_dag_tasks(monkeypatch, lambda data, split, root=None: digit_tasks(split, kinds, 30))


def tiny(out, **changes):
    return dataclasses.replace(
        DagTrainConfig(
            out=out,
            epoch_steps=2,
            progress=False,
            data=DagDataConfig(batch_size=12),
            network=DagNetworkConfig(states=4, flow=2, channels=4, trunk_size=4),
            training=DagTraining(steps=6, shares=(0.2, 0.5, 0.3)),
        ),
        **changes,
    )


@pytest.mark.parametrize("mode", ["dag", "hard", "single", "adashare", "cross-stitch"])
def test_every_mode_is_unfinished_until_its_last_update(tmp_path, monkeypatch, mode):
    config = tiny(tmp_path / "run", mode=mode)
    train_interrupted(config, monkeypatch, 4, train)
    stopped = training_of(config.out, config)
    assert (stopped.finished, stopped.planned) == (False, 6)
    assert stopped.updates < 6
    train(config, resume=True)
    assert training_of(config.out, config) == Training(6, 6, True)


def test_unfinished_runs_are_told_and_hide_no_finished_one(tmp_path, monkeypatch):
    train_interrupted(tiny(tmp_path / "stopped"), monkeypatch, 3, train)
    train(tiny(tmp_path / "done"))
    train_interrupted(tiny(tmp_path / "hard", mode="hard"), monkeypatch, 0, train)
    runs = tuple(tmp_path / name for name in ("stopped", "done", "hard"))
    text = report(DagReportConfig(runs=runs, time=False))
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines()[2:5]]
    assert rows == [
        ["flow-based reduction, unfinished", "1 of 6", "0"],
        ["flow-based reduction", "6", "0"],
        ["hard sharing, unfinished", "0 of 6", "0"],
    ]
    assert "### flow-based reduction, unfinished: 1 of 6 updates, seed 0" in text
    assert "### flow-based reduction, 6 updates, seed 0" in text
    assert "- **no**: hard sharing, seed 0, trained to the end: 0 of 6 updates" in text
    assert "more accurate than" not in text
    found = [measure(path, time=False) for path in runs]
    assert reference(found) is found[1]
    train(tiny(tmp_path / "hard", mode="hard"), resume=True)
    both = [measure(path, time=False) for path in runs]
    assert "after 6 updates flow-based reduction more accurate than hard sharing" in verdicts(both)


def test_an_unfinished_network_of_single_tasks_is_no_reference(tmp_path, monkeypatch):
    config = tiny(tmp_path / "single", mode="single")
    train_interrupted(config, monkeypatch, 3, train)
    assert single_task_references([measure(config.out, time=False)]) == {}
    train(config, resume=True)
    assert set(single_task_references([measure(config.out, time=False)])) == {("omniglot", "low"), ("omniglot", "high")}


def test_of_two_alike_it_is_said_which_is_compared(tmp_path):
    train(tiny(tmp_path / "one"))
    train(tiny(tmp_path / "two"))
    found = [measure(tmp_path / name, time=False) for name in ("one", "two")]
    found[1].results["low"].metrics["accuracy"] = 0.123
    text = comparison(found)
    assert "`two` has the settings and the seed 0 of `one`, which was given first and is compared alone." in text
    assert f"{found[0].accuracy:.2%}" in text.splitlines()[2]


def test_folders_that_hold_no_such_run_are_named_before_anything_is_measured(tmp_path, stored_run, capsys, monkeypatch):
    train(tiny(tmp_path / "good"))
    stored_run(tmp_path / "den")
    train(tiny(tmp_path / "foreign"))
    tensors, record = load_checkpoint(tmp_path / "foreign" / "last.safetensors")
    record["position"]["total_steps"] = 10**6
    save_checkpoint(tmp_path / "foreign" / "last.safetensors", tensors, record)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("den.report.dag.measured.evaluate_tasks", lambda *_: pytest.fail("measured in vain"))
    expected = {
        "den": "must be a run of den dag train, got one of den train: measure it with den evaluate or den report",
        "foreign": "must be of the run that the checkpoint is of",
        "empty": "config.json must be a readable JSON file",
    }
    for name, message in expected.items():
        assert main(["dag", "report", str(tmp_path / "good"), str(tmp_path / name), "--no-time"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert f"{tmp_path}/{name}" in error
    assert main(["dag", "report"]) == 2
    assert "runs must be at least one run folder, got none" in capsys.readouterr().err


def test_a_read_only_run_is_drawn_elsewhere_or_not_measured(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    train(tiny(folder))
    (folder / "versions.json").unlink()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("den.report.dag.measured.evaluate_tasks", lambda *_: pytest.fail("measured in vain"))
            assert main(["dag", "report", str(folder), "--no-time"]) == 2
            assert "draw elsewhere with --out FOLDER" in capsys.readouterr().err
            (tmp_path / "file").write_text("")
            for option in ("--markdown", "--out"):
                given = ["--out", str(tmp_path / "out"), option, str(tmp_path / "file" / "table.md")]
                assert main(["dag", "report", str(folder), "--no-time", *given]) == 2
                assert f"dag report: {option[2:]} must be a folder that can be written" in capsys.readouterr().err
        given = ["--out", str(tmp_path / "out"), "--markdown", str(tmp_path / "tables" / "dag.md")]
        assert main(["dag", "report", str(folder), "--no-time", *given]) == 0
        assert f"den: the drawings are in {tmp_path}/out" in capsys.readouterr().out
        assert (tmp_path / "out" / "run-graph.png").stat().st_size > 1000
        assert "versions unknown" in (tmp_path / "tables" / "dag.md").read_text(encoding="utf-8")
        assert not (folder / "graph.png").exists()
    finally:
        folder.chmod(stat.S_IRWXU)


def with_accuracy(run, seed, accuracy):
    results = {name: dataclasses.replace(r, metrics={"accuracy": accuracy}) for name, r in run.results.items()}
    return dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed), results=results)


def test_verdicts_are_paired_over_seeds_and_open_without_an_interval_on_one_side(tmp_path):
    for name, ranking in (("flow", "flow"), ("gates", "gates"), ("random", "random")):
        train(
            tiny(
                tmp_path / name,
                training=DagTraining(steps=2),
                reduction=ReductionConfig(ranking=ranking, norm_batches=1),
            )
        )
    flow, gates, other = (measure(tmp_path / name, time=False) for name in ("flow", "gates", "random"))
    runs = []
    for seed, level in enumerate((0.80, 0.90, 0.85)):  # seeds differ more than the networks do
        runs += [with_accuracy(flow, seed, level), with_accuracy(gates, seed, level - 0.02 - 0.001 * seed)]
        runs.append(with_accuracy(other, seed, level + (0.03, -0.02, 0.01)[seed]))
    text = verdicts(runs)
    claim = "after 2 updates flow-based reduction more accurate than"
    assert f"- yes: {claim} raw-gate ranking: 85.00% against 82.90%" in text
    assert ": +2.10 [+1.85, +2.35], 3 seeds" in text
    assert "- open: after 2 updates flow-based reduction more accurate than random reduction" in text
    assert " +2.10 [+1.85, +2.35], 3 seeds |" in comparison(runs)
    worse = [with_accuracy(run, run.config.seed, 1 - run.accuracy) for run in runs]
    assert "- **no**: after 2 updates flow-based reduction more accurate than raw-gate ranking" in verdicts(worse)
    guessing = [with_accuracy(run, run.config.seed, 0.34 + 0.02 * (run.kind == flow.kind)) for run in runs]
    assert verdicts(guessing).count("not above chance") == 2


def test_published_results_stand_beside_runs_of_their_protocol_only(tmp_path):
    train(tiny(tmp_path / "flow", training=DagTraining(steps=2)))
    run = measure(tmp_path / "flow", time=False)
    assert "95.71" not in comparison([run])
    data = DagDataConfig(protocol="mtl20", batch_size=12)
    ours = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    assert "95.71 %" in comparison([ours])
    assert "95.71" not in comparison([ours, run])
