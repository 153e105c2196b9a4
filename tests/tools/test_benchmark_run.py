"""A case from its operands to its row, on the host's clock and on a device's, and den bench around it. No times."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import den.bench
from den.bench import BenchConfig
from den.cli import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import clocks, conftest, harness, parameters, peers, record_levels, test_bench_norm, training_peers  # noqa: E402, parameters
from benchmarks.elastic_network import ElasticNetwork  # noqa: E402
from benchmarks.harness import Case, Expected, Provider, Settings, Work  # noqa: E402
from benchmarks.test_bench_network import dense_providers, elastic_providers  # noqa: E402
from benchmarks.test_bench_training import estimator_providers, sampled, selector_providers  # noqa: E402

SETTINGS = Settings(seconds=0.0, least_rounds=3, most_rounds=3, compile="none")


class FakeBenchmark:
    """What `harness.run` uses of pytest-benchmark's fixture."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info, self.group, self.calls = {}, None, 0
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, call, setup, rounds):
        for _ in range(rounds):
            setup()
            call()
            self.calls += 1
            self.stats.stats.data.append(1.0)


def make_providers(wrong: str = "") -> list[Provider]:
    """x + 1 by three providers, the one of that name wrong."""
    expected = Expected(torch.full((3,), 2.0, dtype=torch.float64), 1e-6)
    return [
        Provider(name, lambda name=name: torch.ones(3) + (2 if name == wrong else 1), expected)
        for name in ("ours", "dense-eager", "bucket")
    ]


@pytest.fixture
def known_rates(monkeypatch):
    monkeypatch.setattr(harness.floors, "rates", lambda dtype, device: (1e9, 1e9))


@pytest.mark.parametrize("clock", [clocks.HostClock(), clocks.DeviceClock(torch.device("cpu"))])
def test_a_case_leaves_its_row(known_rates, monkeypatch, clock):
    monkeypatch.setattr(harness, "clock_of", lambda device: clock)
    benchmark, case = FakeBenchmark(), Case("suite", "3", 1, "uniform", "float32")
    harness.run(benchmark, case, make_providers(), Work(1e3, 2e3, 1e3), SETTINGS)
    row = benchmark.extra_info
    assert row["case"] == "suite/3/B1/uniform/float32"
    assert set(row["providers"]) == {"ours", "dense-eager", "bucket"}
    assert (row["floor"], row["flops_ratio"], row["rounds"]) == (1e-6, 2.0, 3)
    assert row["providers"]["ours"]["peak"] >= 12
    assert (row["providers"]["ours"]["median"] == 1.0) == clock.is_host  # else timed by the hook


def test_a_device_times_ours_among_the_others():
    clock = clocks.DeviceClock(torch.device("cpu"))
    ours, *others = make_providers()
    hook = harness.Interleaved(ours, others, clock)
    hook()
    assert {name: len(times) for name, times in hook.times.items()} == {"ours": 1, "dense-eager": 1, "bucket": 1}
    assert not any(timed.graph for timed in hook.ready.values())  # a CPU captures none


@pytest.mark.parametrize("wrong", ["ours", "dense-eager", "bucket"])
def test_a_wrong_result_fails_and_leaves_no_row(known_rates, wrong):
    benchmark, case = FakeBenchmark(), Case("suite", "3", 1, "uniform", "float32")
    with pytest.raises(AssertionError, match=f"{wrong}: error against float64"):
        harness.run(benchmark, case, make_providers(wrong), Work(1, 2, 1), SETTINGS)
    assert benchmark.extra_info == {}
    assert benchmark.calls == 0


def checked(providers: list[Provider]) -> list[str]:
    for provider in providers:
        harness.check(provider.name, provider.call(), provider.expected)
    return [provider.name for provider in providers]


@pytest.mark.parametrize("mix", ["recorded-digits", "recorded-fashion", "random-blocks", "zero"])
def test_networks_agree_with_their_oracles(mix):
    case = Case("network", "demo", 4, mix, "float32")
    with torch.no_grad():  # as the benchmarks build them: what is shared by cases is not of inference mode
        network = ElasticNetwork.make(case)
        assert network.task.name == ("digits" if mix == "recorded-digits" else "fashion")
        names = checked([*elastic_providers(network), *dense_providers(case, network, SETTINGS)])
    assert {"ours", "masked", "bucket", "per-instance", "dense-eager", "dense-folded"} <= set(names)
    assert network.work().dense_flops > network.work().flops


def test_training_steps_agree_with_their_oracles():
    case = Case("training-estimator", "wrn8_1", 4, "tau0.25", "float32")
    network = ElasticNetwork.make(case)
    assert checked(estimator_providers(network)) == ["ours", "dense-eager", "masked"]
    network.model.estimator.eval()
    assert sampled(network).levels.shape == (4 * 8, network.model.num_blocks)
    assert checked(selector_providers(network)) == ["ours", "dense-eager", "masked", "bucket"]


@pytest.mark.parametrize("mix", ["uniform", "full", "zero"])
def test_batch_norms_agree_with_their_oracles(mix):
    operands = test_bench_norm.Operands.make(Case("norm", "8x5x5", 8, mix, "float32"))
    if mix != "zero":  # there is no gradient where nobody uses a channel
        assert checked(test_bench_norm.providers_of(operands)) == ["ours", "dense-eager", "masked", "bucket"]
    share = {"uniform": 0.4375, "full": 1.0, "zero": 0.0}[mix]
    assert operands.work().flops == pytest.approx(share * operands.work().dense_flops)


def test_masked_norm_with_every_channel_is_batch_norm():
    x, weight, bias = torch.randn(4, 3, 5, 5), torch.rand(3) + 0.5, torch.randn(3)
    expected = F.batch_norm(x, None, None, weight, bias, training=True)
    got = training_peers.masked_norm(x, torch.ones(4, 3, dtype=torch.bool), weight, bias)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_unknown_providers_are_left_out_in_one_line():
    known, lines = conftest.wanted_providers(["bucket", "magic"])
    assert known == ("bucket",)
    assert len(lines) == 1
    assert lines[0].startswith("provider magic is unknown and left out; there are ours, ")


def test_plain_copies_of_a_network_stand_where_its_images_do():
    network = ElasticNetwork.make(Case("network", "wrn8_1", 2, "full", "bfloat16"))
    assert {p.device for p in network.dense(torch.float32).parameters()} == {torch.device("cpu")}
    assert isinstance(network.masked().blocks[0], peers.MaskedBlock)
    assert dataclasses.replace(network, levels=network.levels * 0).work().flops < network.work().flops


def test_recording_a_run_keeps_what_its_selector_chose(tmp_path, capsys):
    from den.demo import schedule
    from den.recipes.den import train
    from den.train.config import DemoConfig

    run = schedule(DemoConfig(quick=True, out=tmp_path))["2. Deep Elastic Network (Algorithm 1)"]
    one = dataclasses.replace(run.selector.phase, steps=1)
    estimator = dataclasses.replace(
        run.estimator,
        first=dataclasses.replace(run.estimator.first, steps=1),
        finish=dataclasses.replace(run.estimator.finish, steps=0),
    )
    data = dataclasses.replace(run.data, tasks=("digits",), shares=(1.0,), batch_size=4)
    selector = dataclasses.replace(run.selector, phase=one, budget=None, samples=2)
    model = train(dataclasses.replace(run, estimator=estimator, selector=selector, data=data, progress=False))
    file = tmp_path / "levels.json"
    assert record_levels.main([str(run.out), "--images", "5", "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["steps"] == {"first": 1, "selector": 1, "finish": 0}
    assert [len(word) for word in found["tasks"]["digits"]] == [model.num_blocks] * 5
    assert record_levels.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("record_levels: ")


def test_den_bench_outside_a_checkout_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("den: error: bench: current folder must be a checkout of the project")
    assert error.count("\n") == 1


def test_den_bench_names_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(den.bench, "find_spec", lambda name: None if name == "pytest_benchmark" else object())
    assert main(["bench"]) == 2
    assert "pytest-benchmark must be installed; pip install pytest-benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case-seconds", "nan"], "case_seconds must be at least 0, got nan"),
        (["--case-seconds", "inf"], "case_seconds must be finite and at least 0, got inf"),
        (["--case-seconds", "-1"], "case_seconds must be at least 0, got -1"),
        (["--read", "absent.json"], "read must be a JSON file of an earlier run, got absent.json"),
        (["--out", "pyproject.toml/bench"], "out must be a folder that can be written, got pyproject.toml/bench"),
    ],
)
def test_den_bench_measures_nothing_that_it_could_not_report(monkeypatch, capsys, options, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(den.bench, "_python", lambda arguments: pytest.fail("measured in vain"))
    assert main(["bench", *options]) == 2
    assert capsys.readouterr().err.startswith(f"den: error: bench: {message}")


def test_den_bench_passes_its_options_on():
    config = BenchConfig(select="conv", marker="op", provider=("bucket",), all_cases=True, case_seconds=0.1, keep=True)
    arguments = den.bench.measure_arguments(config, Path("run.json"))
    assert arguments[:4] == ["pytest", "benchmarks", "--benchmark-only", "--benchmark-json=run.json"]
    rest = ["-k", "conv", "-m", "op", "--provider=bucket", "--all-cases", "--case-seconds=0.1"]
    assert arguments[-len(rest) :] == rest
    report = ["benchmarks.report", "run.json", "--out=runs/bench", "--keep"]
    assert den.bench.report_arguments(config, Path("run.json")) == report


def test_den_bench_only_reads_when_asked(monkeypatch):
    monkeypatch.chdir(ROOT)
    ran = []
    monkeypatch.setattr(den.bench, "_python", lambda arguments: ran.append(arguments) or 0)
    run = ROOT / "pyproject.toml"  # any file that is there
    assert main(["bench", "--read", str(run), "--out", "somewhere"]) == 0
    assert ran == [["benchmarks.report", str(run), "--out=somewhere"]]


def test_den_bench_measures_and_reports(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # else pytest-benchmark, in a process of its own, takes itself for a worker of xdist
    arguments = ["--select", "plan and B1/", "--case-seconds", "0", "--provider", "magic", "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    printed = capfd.readouterr().out
    assert "provider magic is unknown and left out" in printed
    [row] = [bench["extra_info"] for bench in json.loads((tmp_path / "run.json").read_text())["benchmarks"]]
    assert row["case"] == "plan/15-blocks/B1/random-blocks/int32"
    assert row["case"] in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "has_gpu", "wanted"),
    [
        ({}, False, "plain"),
        ({"--all-cases": True}, False, "plain more"),
        ({}, True, "plain plain/cuda large/cuda"),
        ({"rehearse": True}, False, "tiny/cuda"),
    ],
)
def test_a_run_has_the_cases_that_it_can_run(options, has_gpu, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    plain, more, large, tiny = (Case(name, "3", 1, "uniform", "float32") for name in ["plain", "more", "large", "tiny"])
    made = [*parameters.everywhere([plain]), *parameters.extra([more]), *parameters.checked([large], [tiny])]
    config = SimpleNamespace(getoption=lambda name, default=False: options.get(name, default))
    path = ROOT / "benchmarks" / "test_bench.py"
    items = [SimpleNamespace(iter_markers=lambda one=one: one.marks, name=one.id, path=path) for one in made]
    names = [item.name.replace("/3/B1/uniform/float32", "") for item in items if conftest.is_wanted(item, config)]
    assert names == wanted.split()


@pytest.mark.parametrize("names", [(), ("bucket",)])
def test_only_providers_that_were_asked_for_are_timed(known_rates, names):
    benchmark, case = FakeBenchmark(), Case("suite", "3", 1, "uniform", "float32")
    settings = dataclasses.replace(SETTINGS, providers=names)
    harness.run(benchmark, case, make_providers(), Work(1, 2, 1), settings)
    assert set(benchmark.extra_info["providers"]) == {"ours", "dense-eager", "bucket"}
