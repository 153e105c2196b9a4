"""The inference engines among the dense providers, and networks beside a busy process. No times."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import contention, engines, harness, losses, processes, report, results, summary, tables  # noqa: E402
from benchmarks.harness import Case, Expected, Provider, Work  # noqa: E402
from benchmarks.targets import TARGETS  # noqa: E402

TIMES = {"ours": 0.5, "dense-eager": 1.2, "dense-folded": 1.0, "masked": 1.3}
CASE = "network/wrn32_4/B64/1.88x/float32"
ENGINES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in engines.installed(), reason=f"not installed: {', '.join(engines.missing())} ({tables.PEERS})"
        ),
    )
    for name in engines.PACKAGES
]


def make_row(case: str = CASE, versions: tuple[str, ...] = (), **times: float) -> dict:
    """A row of a network with twice fewer FLOPs, whose times are TIMES and those given."""
    times = TIMES | {name.replace("_", "-"): seconds for name, seconds in times.items()}
    row = harness.account(times, Work(50.0, 100.0, 10.0), floor=0.1)
    for provider in row["providers"].values():
        provider |= {"lower_quartile": provider["median"], "upper_quartile": provider["median"]}
    known = {"torch": "2.13.0"} | dict.fromkeys(versions, "1.0")
    machine = {"machine": "box", "processor": "Box", "threads": 2, "commit": "0123456789", "modified": False}
    rest = {"case": case, "suite": case.split("/")[0], "versions": known, "measured": "2026-01-02T03:04:05"}
    return row | machine | rest


def make_contention(growth: float) -> dict:
    found = {"alone": 0.1, "beside": 0.1 * growth, "growth": growth, "mean_growth": 2.5}
    row = make_row("contention/wrn32_4/B32/1.88x/float32") | {"contention": {"ours": found, "dense-openvino": found}}
    del row["providers"]
    return row


@pytest.fixture(scope="module")
def tiny() -> tuple:
    """A dense network with its batch norms folded, as a provider, and its images."""
    from benchmarks.elastic_network import ElasticNetwork
    from benchmarks.test_bench_network import dense_side

    with torch.no_grad():
        images = ElasticNetwork.make(Case("network", "wrn8_1", 2, "full", "float32")).images
        dense = dense_side("wrn8_1", 2, "float32", "cpu", "cifar100", False, False, ())
    return next(provider for provider in dense if provider.name == "dense-folded"), images


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_gives_what_the_oracle_gives(tiny, name):
    folded, images = tiny
    [provider] = engines.providers(folded.call.func, images, folded.expected, [name])
    harness.check(name, provider.call(), provider.expected)
    first = provider.call().clone()
    assert torch.equal(provider.call(), first)
    assert (provider.name, provider.role, provider.precision) == (name, "dense", None)
    assert provider.runtime == engines.PACKAGES[name]


@pytest.mark.parametrize("name", ENGINES[:1])
def test_openvino_says_what_it_computes_in(tiny, name):
    folded, images = tiny
    [provider] = engines.providers(folded.call.func, images.bfloat16(), folded.expected, [name])
    assert provider.precision in (None, "float32", "float16")  # None: bfloat16, as it was told
    expected = Expected(folded.expected.exact, 0.05)
    harness.check(name, provider.call(), expected)


def test_engines_run_only_what_they_can():
    assert engines.providers(torch.nn.Identity(), torch.zeros(1), Expected(torch.zeros(1), 0.0), ()) == []
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert engines.providers(torch.nn.Identity(), half, Expected(torch.zeros(1), 0.0), ["dense-onnxruntime"]) == []
    meta = torch.zeros(1, device="meta")
    assert engines.providers(torch.nn.Identity(), meta, Expected(torch.zeros(1), 0.0), list(engines.PACKAGES)) == []


@pytest.mark.parametrize(
    ("absent", "names"),
    [
        ((), ("dense-openvino", "dense-onnxruntime")),
        (("openvino",), ("dense-onnxruntime",)),
        (("onnxscript",), ()),
    ],
)
def test_what_is_not_installed_is_known(monkeypatch, absent, names):
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name in absent else object())
    assert engines.missing() == list(absent)
    assert engines.installed() == names


def test_the_best_dense_is_the_best_of_all_that_ran(tmp_path):
    path = tmp_path / "box.json"
    row = make_row(versions=("openvino", "onnxruntime"), dense_onnxruntime=0.8, dense_openvino=0.6, dense_packed=0.7)
    results.store(path, [row])
    [kept] = results.load(path)
    assert (kept["best_dense"], kept["best_tuned"]) == ("dense-openvino", "dense-openvino")
    assert kept["providers"]["ours"]["realised"] == pytest.approx(0.6)
    assert "600 (openvino)" in tables.cases_table([kept])
    [target] = [target for target in TARGETS if target.case == CASE]
    assert tables.target_line(target, {CASE: kept})[2:] == ["openvino", "≥ 0.90", "0.60", "**no**"]
    assert "openvino" in summary.summary_table([kept])
    slower = make_row(dense_onnxruntime=1.4, dense_openvino=1.5)
    assert tables.target_line(target, {CASE: slower})[2] == "folded"


def test_a_loss_against_an_engine_has_its_reason():
    [loss] = losses.losses([make_row(dense_openvino=0.4)])
    assert (loss.best, loss.counts) == ("dense-openvino", True)
    assert losses.reason(loss).endswith("in one call, in 0.40 of the time of the fastest in PyTorch")


def test_the_report_says_once_what_was_not_installed(tmp_path):
    both, none = make_row(versions=tables.ENGINES), make_row("network/demo/B1/full/float32")
    other = make_row("residual/64x32x32/B32/full/float32")
    assert "not installed" not in tables.provenance([both, other])
    assert "; not installed: openvino, onnxruntime; commit" in tables.provenance([none])
    assert "; not installed: openvino (in 1 of 2 networks)" in tables.provenance([both, none])
    assert report.section("box", [none, other]).count("not installed") == 1


def test_growth_is_a_target_and_has_its_table():
    rows = [make_contention(1.5), make_row()]
    [target] = [target for target in TARGETS if target.case == rows[0]["case"]]
    assert tables.target_line(target, {rows[0]["case"]: rows[0]})[1:] == [
        "time / time alone", "-", "≤ 1.60", "1.50", "yes",
    ]  # fmt: skip
    assert not target.is_met(1.7)
    text = report.section("box", rows)
    assert "### Beside a busy process" in text
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in tables.contention_table(rows).splitlines()[2:]]
    times = ["100", "150", "1.50", "2.50"]
    assert cells == [[rows[0]["case"], "ours", *times], [rows[0]["case"], "dense-openvino", *times]]


class Recorded:
    """Providers and the busy process as a list of what happened."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def provider(self, name: str, runtime: str) -> Provider:
        return Provider(name, lambda: self.events.append(name), Expected(torch.zeros(0), 0.0), runtime=runtime)


def test_beside_another_runtime_all_are_woken_before_they_are_timed(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(harness.time, "sleep", lambda seconds: recorded.events.append("rest"))
    kinds = {"ours": "torch", "dense-eager": "torch", "dense-openvino": "openvino"}
    ours, *peers = [recorded.provider(name, runtime) for name, runtime in kinds.items()]
    hook = harness.Interleaved(ours, peers, harness.clock_of("cpu"))
    recorded.events.clear()
    hook()
    eager, openvino = ["dense-eager"] * 2, ["rest", "dense-openvino", "dense-openvino"]
    assert recorded.events == [*eager, *openvino, "rest", "ours"]  # ours is timed behind the hook
    recorded.events.clear()
    hook()
    assert recorded.events == [*openvino, "rest", *eager, "ours"]
    assert {name: len(times) for name, times in hook.times.items()} == {"dense-eager": 2, "dense-openvino": 2}


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor times are read from /proc")
def test_the_busy_process_is_busy_from_start_to_stop():
    with contention.busy_process() as busy:
        for _ in range(2):
            busy.start()
            before = processor_seconds(busy.child.pid)
            while processor_seconds(busy.child.pid) < before + 0.03:
                time.sleep(0.005)
            busy.stop()
            while Path(f"/proc/{busy.child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "S":
                time.sleep(0.005)


def fail_beside_a_busy_process(found: list) -> None:
    with contention.busy_process() as busy:
        found.append(busy)
        busy.start()
        raise KeyError


def test_the_busy_process_is_always_ended():
    found: list[contention.Busy] = []
    with pytest.raises(KeyError):
        fail_beside_a_busy_process(found)
    assert found[0].child.poll() is not None


def test_a_busy_process_that_is_gone_is_an_error():
    with contention.busy_process() as busy:
        busy.child.kill()
        busy.child.wait()
        with pytest.raises((RuntimeError, BrokenPipeError)):
            busy.start()


def test_the_busy_process_ends_with_whoever_started_it():
    with contention.busy_process() as busy:
        busy.start()
        busy.child.stdin.close()  # as the system does when we are killed
        assert busy.child.wait(timeout=60) == 0


def test_contention_measures_every_provider_alone_and_beside(monkeypatch):
    kept_to = []
    monkeypatch.setattr(contention, "keep_to", kept_to.append)
    monkeypatch.setattr(engines, "installed", lambda: ())
    monkeypatch.setattr(contention, "keep_allocations_on_the_heap", lambda: "malloc as found")
    case = Case("contention", "wrn8_1", 2, "uniform", "float32")
    found = contention.main([json.dumps(vars(case)), "0", "2"])
    assert kept_to == [2]
    assert list(found) == ["ours", "dense-folded"]
    for times in found.values():
        assert times["growth"] == pytest.approx(times["beside"] / times["alone"])
        assert min(times.values()) > 0


def test_contention_refuses_a_wrong_provider():
    wrong = Provider("ours", lambda: torch.ones(1), Expected(torch.zeros(1), 0.0))
    with pytest.raises(AssertionError, match="ours: error against float64"):
        contention.measured([wrong], seconds=0.0)


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"benchmarks\.absent: exit status 1"):
        processes.answer_of("benchmarks.absent")
