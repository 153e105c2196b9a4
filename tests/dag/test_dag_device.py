"""Where `den dag` trains and measures: on a simulated GPU as on the CPU, without waiting; resumed and told in words."""

import contextlib
import dataclasses
from functools import cache

import pytest
import torch

from den.cli import main
from den.dag.config import (
    DagDataConfig,
    DagNetworkConfig,
    DagReportConfig,
    DagTrainConfig,
    DagTraining,
    ReductionConfig,
)
from den.dag.network import DagNetwork
from den.dag.scenarios import load_tasks as load_files
from den.data import MixedTaskBatches
from den.data.images import fits
from den.recipes.dag import search
from den.recipes.dag.recipe import SearchRecipe, load_network
from den.recipes.dag.search import train
from den.report.dag.measured import measure
from den.report.dag.report import report
from den.train.checkpoint import load_checkpoint
from den.train.engine import Engine
from den.train.folder import read_metrics
from tests.dense_files import write_npy_scenes
from tests.release import always
from tests.simulated_gpu import Device, simulated
from tests.small_runs import digit_tasks, train_interrupted, use_dag_tasks

pytestmark = [
    pytest.mark.filterwarnings("ignore:the gates of some tasks differ little"),
    pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter"),  # what a simulated GPU's tensors wrap
]
MODES = always(
    ("dag", "joint", "frozen", "hard", "single", "adashare", "cross-stitch", "dense"), "dag", "adashare", "dense"
)


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Two tasks of different classes out of the digits; dense ones come from files."""
    kinds = {"low": (0, 1, 2), "high": (7, 8, 9)}

    def tasks(data, split, root=None):
        return load_files(data, split, root) if data.scenario == "nyuv2" else digit_tasks(split, kinds, 30)

    use_dag_tasks(monkeypatch, tasks)


def tiny(place, mode="dag", device="cpu", **changes):
    search = {"search": mode} if mode in ("joint", "frozen") else {}
    data = DagDataConfig(batch_size=12, validation=0.3)
    if mode == "dense":
        if not (root := place.parent / "scenes").exists():
            write_npy_scenes(root, {"train": 7, "val": 3}, classes=13)
        data = DagDataConfig("nyuv2", root, batch_size=2, classes=13, validation=0.3)
    return DagTrainConfig(
        out=place, mode="dag" if mode in ("joint", "frozen", "dense") else mode, epoch_steps=2, progress=False,
        device=device, data=data, network=DagNetworkConfig(states=4, flow=2, channels=4, trunk_size=4),
        training=DagTraining(steps=6, shares=(0.3, 0.4, 0.3), rate=0.02, fine_rate=0.02, **search),
        reduction=ReductionConfig(ranking="random", norm_batches=3), **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """on_cpu(mode): settings of a run that a CPU has trained, once; called outside of a simulated GPU."""

    @cache
    def trained(mode):
        train(config := tiny(tmp_path_factory.mktemp("cpu") / mode, mode))
        return config

    return trained


@contextlib.contextmanager
def no_waiting(monkeypatch, most=2):
    """Drawing a batch and learning from it may wait for the GPU only to read what the tasks keep, when that changed:
    of one network before and after the reduction, or of two that have none."""
    reads = []

    def in_mode(mode, function, calls=None):
        def call(*arguments, **keywords):
            before = Device.current.waiting
            torch.cuda.set_sync_debug_mode(mode)
            if calls is not None:
                calls.append(None)
            try:
                return function(*arguments, **keywords)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    def watched(function):
        return in_mode("error", function)

    with monkeypatch.context() as patch:
        patch.setattr(DagNetwork, "_read_kept", in_mode("default", DagNetwork._read_kept, reads))
        for name in ("train_step", "search_step", "adashare_step", "reestimate_norms"):
            patch.setattr(search, name, watched(getattr(search, name)))
        patch.setattr(MixedTaskBatches, "next", watched(MixedTaskBatches.next))
        patch.setattr(Engine, "update", watched(Engine.update))
        yield
    assert len(reads) <= most


def numbers(out):
    """What the metrics of a run say, in one list."""
    found = []

    def collect(value):
        if isinstance(value, dict):
            for key in sorted(value):
                collect(value[key])
        elif isinstance(value, list):
            for each in value:
                collect(each)
        elif not isinstance(value, str):
            found.append(value)

    collect(read_metrics(out))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_a_gpu_waits_for_no_update_and_equals_the_cpus(tmp_path, monkeypatch, on_cpu, mode):
    there = on_cpu(mode)
    here = dataclasses.replace(there, out=tmp_path / "gpu", device="cuda")
    with simulated(monkeypatch):
        with no_waiting(monkeypatch, most=10 if mode == "adashare" else 2):  # 8 draws, each a topology
            model = train(here)
        assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    assert numbers(here.out) == pytest.approx(numbers(there.out), rel=1e-3, abs=1e-4)


def test_auto_is_the_gpu_where_there_is_one(tmp_path, monkeypatch):
    with simulated(monkeypatch), Engine(tiny(tmp_path / "run", device="auto"), SearchRecipe) as engine:
        batch = engine.batches["gates"].next()
        assert {part.device.type for part in [*batch.images, *batch.labels]} == {"cuda"}


def test_images_that_do_not_fit_stay_on_the_host(tmp_path, monkeypatch, on_cpu):
    there = on_cpu("dag")
    monkeypatch.setattr("den.data.images.fits", lambda size, free: free is None)
    assert not fits(1, 0)
    with simulated(monkeypatch), no_waiting(monkeypatch):
        train(here := tiny(tmp_path / "gpu", device="cuda"))
    assert numbers(here.out) == pytest.approx(numbers(there.out), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("mode", ["dag", "adashare", "cross-stitch"])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_run_goes_on_on_another_device(tmp_path, monkeypatch, on_cpu, mode, first):
    whole = on_cpu(mode)
    config = tiny(tmp_path / "run", mode, first)
    other = dataclasses.replace(config, device="cpu" if first == "cuda" else "cuda")
    with simulated(monkeypatch) if first == "cuda" else contextlib.nullcontext():
        train_interrupted(config, monkeypatch, 5, train)
    with simulated(monkeypatch) if first == "cpu" else contextlib.nullcontext():
        train(other, resume=True)
    assert numbers(config.out) == pytest.approx(numbers(whole.out), rel=1e-3, abs=1e-4)


def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", device="cuda")
    with simulated(monkeypatch):
        train(config)
    tensors, _ = load_checkpoint(config.out / "last.safetensors")
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    assert next(load_network(config.out / "last.safetensors").parameters()).device.type == "cpu"


@pytest.mark.parametrize("mode", ["dag", "single", "cross-stitch", "dense"])
def test_a_report_of_a_gpu_is_that_of_a_cpu(tmp_path, monkeypatch, on_cpu, mode):
    config = on_cpu(mode)
    expected = report(DagReportConfig((config.out,), time=False, device="cpu"))
    with simulated(monkeypatch):
        got = report(DagReportConfig((config.out,), time=False, device="cuda", markdown=tmp_path / "report.md"))
        timed = measure(config.out, device="cuda")
        assert next(timed.model.parameters()).device.type == "cuda"
        assert set(timed.seconds) == set(timed.results)
    assert got == expected
    assert "On NVIDIA Simulated; python" in (tmp_path / "report.md").read_text()


def test_a_loss_that_is_not_finite_ends_a_run_on_a_gpu_too(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", "hard", "cuda")
    config = dataclasses.replace(config, training=DagTraining(steps=60, rate=1e30, fine_rate=1e30))
    with simulated(monkeypatch), pytest.raises(ValueError, match=r"loss must stay finite, got (nan|inf) at step \d+"):
        train(config)


@pytest.mark.parametrize(
    ("name", "said"),
    [("cuda:7", "config: device must be there, got 'cuda:7' with 0 GPUs"), ("gpu", "auto, cpu, cuda or cuda:N")],
)
def test_the_command_line_takes_a_device_and_tells_a_wrong_one(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = tmp_path / "run"
    options = ["--training.steps", "2", "--network.states", "3", "--network.flow", "1", "--network.channels", "4"]
    command = ["dag", "train", "dag-omniglot", "--out", str(out), "--no-progress", *options]
    assert main([*command, "--device", name]) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not out.exists()
    assert main([*command, "--device", "cpu"]) == 0
    assert main(["dag", "report", str(out), "--no-time", "--device", name]) == 2
    assert said in capsys.readouterr().err
    assert main(["dag", "report", str(out), "--no-time", "--device", "cpu"]) == 0
    assert main(["dag", "train", "--resume", "--out", str(out), "--device", name]) == 2
    assert main(["dag", "train", "--resume", "--out", str(out), "--device", "auto"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_real_gpu_trains_as_the_cpu_does(tmp_path, mode, precision):
    configs = [tiny(tmp_path / device, mode, device, precision=precision) for device in ("cpu", "cuda")]
    losses = []
    for config in configs:
        train(config)
        losses.append([line["train"]["loss"] for line in read_metrics(config.out)])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert set(measure(configs[1].out, device="cuda").results) == set(measure(configs[1].out, device="cpu").results)
