"""Ranges of settings: every number has one, in every configuration, and is told in one line."""

import dataclasses
import json
import math

import pytest

from den import cli
from den.bench import BenchConfig
from den.dag.config import DagTrainConfig
from den.support.limits import Range, check_ranges, settings
from den.support.settings import from_dict, read_config
from den.train.config import DemoConfig, PhaseConfig, SelectorTraining, TrainConfig
from den.train.scenarios import ScenarioOptions, scenario_config

KINDS = {"den": TrainConfig, "dag": DagTrainConfig, "demo": DemoConfig, "bench": BenchConfig}
NUMBERS = [(kind, setting) for kind, made in KINDS.items() for setting in settings(made()) if setting.kind]


def nested(name: str, value: object) -> dict:
    """{"a": {"b": value}} for "a.b"."""
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


def filled(setting, value):
    """`value` as the setting has it: alone, or as an item of its tuples."""
    if setting.name.endswith("stages") and setting.name.startswith("network") and setting.value == ():
        return ((value, value),)
    return (value,) if isinstance(setting.value, tuple) else value


def make_with(kind: str, setting, value) -> None:
    """Make the configuration of a kind with one setting changed, in Python."""

    def changed(config, name):
        first, _, rest = name.partition(".")
        return dataclasses.replace(
            config, **{first: changed(getattr(config, first), rest) if rest else filled(setting, value)}
        )

    config = changed(KINDS[kind](), setting.name)
    check_ranges(config)  # the commands demo and bench check theirs


@pytest.mark.parametrize(("kind", "setting"), NUMBERS, ids=lambda x: getattr(x, "name", x))
def test_every_number_has_a_range_and_keeps_to_it(kind, setting):
    assert setting.range is not None
    bad = [math.nan, math.inf, -math.inf] if setting.kind is float else []
    bad += [setting.range.low - 1, -5]
    if setting.range.open_low:
        bad.append(setting.range.low)
    if not math.isinf(setting.range.high):
        bad.append(setting.range.high + 1)
    for value in map(setting.kind, bad) if setting.kind is int else bad:
        with pytest.raises(ValueError, match=rf"^\w+: {setting.name} must be .*, got .+"):
            make_with(kind, setting, value)
    with pytest.raises(TypeError, match=rf"{setting.name} must be {setting.kind.__name__}, got 'x'"):
        make_with(kind, setting, "x")


@pytest.mark.parametrize("range_", [Range(0), Range(0, 1), Range(0, 1, open_high=True), Range(0, open_low=True)])
def test_ranges(range_):
    for value in (-1, 0, 0.5, 1, 2, 2**70, math.nan, math.inf):
        low = value > 0 if range_.open_low else value >= 0
        high = value < range_.high if range_.open_high else value <= range_.high
        assert (value in range_) == (low and high and value != math.inf)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"estimator": {"finish": {"steps": -5, "rate": 1}}}, r"estimator\.finish\.steps must be at least 0, got -5"),
        ({"estimator": {"momentum": 2}}, r"estimator\.momentum must be at least 0 and below 1, got 2\.0"),
        ({"estimator": {"weight_decay": -1}}, r"estimator\.weight_decay must be at least 0, got -1\.0"),
        ({"seed": 10**20}, r"seed must be in 0\.\.4294967295, got 100000000000000000000"),
        ({"seed": 10**5000}, r"seed must be in 0\.\.4294967295, got a number of 16610 bits"),
        ({"data": {"shares": [1, 2, 3]}}, r"data\.shares must be one for each of 2 tasks, got \[1\.0, 2\.0, 3\.0\]"),
        ({"network": {"stages": [[8, 1], [0, 1]]}}, r"network\.stages must be at least 1, got \[\[8, 1\], \[0, 1\]\]"),
        (
            {"selector": {"phase": {"steps": 3, "rate": 1, "patience": 0}}},
            r"selector\.phase\.patience must be at least 1",
        ),
    ],
)
def test_what_came_from_a_file_names_it(tmp_path, values, message):
    with pytest.raises(ValueError, match="^config: .*" + message):
        from_dict(TrainConfig, values)
    if "seed" not in values or values["seed"] < 10**100:
        (path := tmp_path / "c.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"^{path}: .*" + message):
            read_config(TrainConfig, path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\x00" * 20, b"\xff", b'{"seed": ' + b"1" * 5000 + b"}"])
def test_files_that_are_no_json_are_named(tmp_path, content):
    (path := tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} must be a readable JSON file, got "):
        read_config(TrainConfig, path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--seed", "100000000000000000000"], "config: seed must be in 0..4294967295"),
        (["train", "--selector.phase.rate", "nan"], "config: selector.phase.rate must be at least 0, got nan"),
        (["dag", "train", "dag-omniglot", "--training.steps", "-5"], "training.steps must be at least 1, got -5"),
        (["dag", "train", "--training.momentum", "2"], "training.momentum must be at least 0 and below 1, got 2.0"),
        (["demo", "--seed", "-1"], "demo: seed must be in 0..4294967295, got -1"),
        (["train", "m1", "--budget", "inf"], "budget must be finite and above 0, got inf"),
    ],
)
def test_the_command_line_tells_in_one_line(capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("den: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_huge_budget_still_has_a_number_of_steps():
    assert scenario_config("m1", ScenarioOptions(budget=1e308)).estimator.first.steps == 10**15


def test_one_sample_is_enough_where_none_is_left_out():
    one = SelectorTraining(phase=PhaseConfig(1, 0.1), samples=1, baseline="none")
    assert TrainConfig(selector=one).selector.samples == 1
    with pytest.raises(ValueError, match=r"selector\.samples must be at least 2 with a leave-one-out baseline, got 1"):
        TrainConfig(selector=dataclasses.replace(one, baseline="leave-one-out"))
