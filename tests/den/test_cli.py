"""Settings and the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from den import cli
from den.data import load_set
from den.support.settings import from_dict, read_config, to_dict
from den.train.config import DataConfig, EstimatorTraining, NetworkConfig, PhaseConfig, SelectorTraining, TrainConfig

QUICK = [
    "--no-progress", "--epoch-steps", "2", "--stages", "1",
    "--data.tasks", "digits", "--data.batch-size", "8",
    "--network.backbone", "wrn8_1", "--network.trunk-size", "8",
    "--estimator.first.steps", "3", "--selector.phase.steps", "2",
]  # fmt: skip


@pytest.fixture
def small_sets(monkeypatch):
    whole = {split: load_set("digits", split).subset(torch.arange(60)) for split in ("train", "test")}
    monkeypatch.setattr("den.recipes.setup.load_set", lambda name, split, root: whole[split])
    monkeypatch.setattr("den.data.load_set", lambda name, split, root: whole[split])


EVERYTHING_CHANGED = TrainConfig(
    out=Path("elsewhere"),
    mode="dense",
    epoch_steps=7,
    data=DataConfig(tasks=("digits",), shares=(1.0,), root=Path("/data")),
    network=NetworkConfig(stages=((16, 1), (32, 2)), selector_channels=(8, 16), stem=8),
    estimator=EstimatorTraining(finish=PhaseConfig(3, 0.5, until="converge"), structures="argmax"),
    selector=SelectorTraining(baseline="none", samples=1),
    progress=False,
)


@pytest.mark.parametrize("config", [TrainConfig(), EVERYTHING_CHANGED], ids=["defaults", "changed"])
def test_settings_survive_json(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert read_config(TrainConfig, path) == config


def test_left_out_settings_keep_their_defaults():
    config = from_dict(TrainConfig, {"selector": {"rho": 1}})
    assert config == dataclasses.replace(TrainConfig(), selector=SelectorTraining(rho=1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, r"key must be one of out, seed, device, .*, got 'sede'"),
        ({"selector": {"row": 1}}, r"config\.selector: key must be one of phase, decay, .*, got 'row'"),
        ({"seed": "one"}, r"config\.seed: value must be int, got 'one'"),
        ({"seed": True}, r"config\.seed: value must be int, got True"),
        ({"mode": "wide"}, r"config\.mode: value must be one of \['den', 'dense', .*\], got 'wide'"),
        ({"data": {"tasks": "digits"}}, r"config\.data\.tasks: value must be tuple.*, got 'digits'"),
        ({"data": []}, r"config\.data: value must be an object, got \[\]"),
        ({"estimator": {"first": {"steps": 3}}}, r"config\.estimator\.first: .*missing.*'rate'"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"data": {"validation": 1.0}}, r"data\.validation must be in 0\.\.0\.9, got 1"),
        ({"data": {"tasks": ["digits", "digits"]}}, r"data\.tasks must be different image sets"),
        ({"data": {"tasks": []}}, r"data\.tasks must be different image sets, got \[\]"),
        ({"selector": {"samples": 1}}, r"selector\.samples must be at least 2 with a leave-one-out baseline, got 1"),
        ({"estimator": {"tau": 1.5}}, r"estimator\.tau must be in 0\.\.1, got 1\.5"),
    ],
)
def test_unfit_settings_are_explained(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize("content", ["{", "\xff"])
def test_settings_file_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.json must be a readable JSON file"):
        read_config(TrainConfig, tmp_path / "c.json")


def test_train_then_resume_then_evaluate(tmp_path, small_sets, capsys):
    out = str(tmp_path / "run")
    assert cli.main(["train", "--out", out, *QUICK]) == 0
    assert cli.main(["train", "--resume", "--out", out]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", out, "--static", "3", "--time"]) == 0
    text = capsys.readouterr().out
    assert "digits: 60 images, accuracy" in text
    assert "structures in use" in text
    assert "single structures of that cost" in text
    assert "times as fast" in text


def test_options_come_before_the_settings_file(tmp_path, small_sets):
    assert cli.main(["train", "--out", str(tmp_path / "first"), *QUICK, "--seed", "3"]) == 0
    file = str(tmp_path / "first" / "config.json")
    assert cli.main(["train", "--config", file, "--out", str(tmp_path / "second"), "--mode", "dense"]) == 0
    first, second = (read_config(TrainConfig, tmp_path / name / "config.json") for name in ("first", "second"))
    assert second == dataclasses.replace(first, out=tmp_path / "second", mode="dense")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "{tmp}/run", "--data.tasks", "mnist"], "name must be one of digits, fashion"),
        (["train", "--out", "{tmp}/run", "--data.tasks", "cifar100"], "use --data-root"),
        (["train", "--out", "{tmp}/file/run", *QUICK], "out must be a folder that can be written"),
        (["train", "--out", "{tmp}/run", "--config", "{tmp}/absent.json"], "must be a readable JSON file"),
        (
            ["train", "--out", "{tmp}/run", "--config", "{tmp}/unknown.json"],
            "unknown.json: key must be one of out, seed",
        ),
        (["train", "--out", "{tmp}/run", "--resume"], "config.json must be a readable JSON file"),
        (["train", "--out", "{tmp}/run", "--network.backbone", "vgg11"], "vgg11"),
        (["train", "--out", "{tmp}/run", "--stages", "0"], "stages must be at least 1, got 0"),
        (["evaluate", "{tmp}/absent"], "config.json must be a readable JSON file"),
        (["train", "m1", "--budget", "inf"], "budget must be finite and above 0, got inf"),
        (["train", "m1", "--budget", "nan"], "budget must be above 0, got nan"),
        (["report", "{tmp}/absent", "--out", "{tmp}/file"], "report: out must be a folder that can be written"),
        (["demo", "--out", "{tmp}/file"], "demo: out must be a folder that can be written"),
        (["fetch", "--data-root", "{tmp}/new"], "fetch: names must be at least one image set, got none"),
        (["fetch", "cifar10", "digits", "--data-root", "{tmp}/new"], "name must be one of cifar10"),
        (["fetch", "cifar10", "--data-root", "{tmp}/file"], "fetch: data-root must be a folder that can be written"),
    ],
)
def test_wrong_input_is_told_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "unknown.json").write_text('{"colour": 1}')
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("den: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["train", "--colour", "red"], ["fly"], ["train", "--seed", "one"]])
def test_unknown_options_and_commands_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_interrupt_exits_with_130_and_says_how_to_go_on(tmp_path, small_sets, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("den.train.engine.Engine.update", interrupt)
        assert cli.main(["train", "--out", str(tmp_path / "run"), *QUICK]) == 130
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["train", "evaluate", "demo", "info"]),
        (["train", "--help"], ["Weight of the sparsity term", "--selector.rho", "Continue the run"]),
        (["evaluate", "--help"], ["run folder", "--static"]),
        (["demo", "--help"], ["--quick"]),
    ],
)
def test_help_explains(arguments, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(phrase in text for phrase in expected)


def test_info_prints_the_report_of_the_kernels(capsys):
    from den_kernels.info import format_report

    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip() == format_report().strip()


def test_demo_is_given_its_settings(monkeypatch):
    seen = []
    module = type(sys)("den.demo")
    module.main = seen.append
    monkeypatch.setitem(sys.modules, "den.demo", module)
    assert cli.main(["demo", "--quick", "--out", "somewhere"]) == 0
    assert (seen[0].quick, seen[0].out) == (True, Path("somewhere"))


@pytest.mark.parametrize("module", ["den", "den.cli"])
def test_version_as_a_process(module):
    found = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("den ")


def test_what_the_package_exports_is_there_when_asked_for():
    import den

    assert {name: getattr(den, name).__name__ for name in ("create_model", "Task")} == {
        "create_model": "create_model",
        "Task": "Task",
    }
    assert set(den.__all__) <= set(dir(den))
    assert all(getattr(den, name) is not None for name in den.__all__)
    assert den.nn.model.create_model is den.create_model
    with pytest.raises(AttributeError, match="module 'den' has no attribute 'resnet9000'"):
        _ = den.resnet9000
