"""The seed fixes a run whatever it draws from, and a run leaves the caller's generators alone."""

import dataclasses
import random
import types

import numpy as np
import pytest
import torch

from den.dag.config import DagDataConfig, DagNetworkConfig, DagTrainConfig, DagTraining
from den.nn.backbones import BACKBONES
from den.nn.block_lists import pair_shapes, with_linear_pair
from den.recipes import prepare
from den.recipes.dag.search import train as train_dag
from den.recipes.den import train
from den.recipes.setup import new_model
from den.support.randomness import random_state, seeded, set_random_state
from den.train.checkpoint import load_checkpoint
from den.train.config import NetworkConfig
from den.train.engine import Engine
from den.train.folder import read_metrics
from tests.killed_run import two_tasks
from tests.small_runs import cut_sets, small_config, train_interrupted


def draws() -> list[float]:
    """A number of every global generator, which moves them."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def stir(seed: int) -> None:
    """Another state of every global generator, as another process has."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@pytest.fixture
def vgg(tmp_path, monkeypatch):
    """vgg_run(name, **changes): settings of a VGG with dropout, its elastic layers of 4096 made small."""
    cut_sets(monkeypatch)
    small = dataclasses.replace(BACKBONES["vgg16_elastic_fc"], shapes=with_linear_pair(pair_shapes, 32, 32, 0.5))
    monkeypatch.setitem(BACKBONES, "vgg16_elastic_fc", small)
    network = NetworkConfig("vgg16_elastic_fc", stages=((8, 1), (8, 1)), levels=2, trunk_size=8)
    return lambda name, **changes: small_config(tmp_path / name, changes.pop("mode", "den"), network=network, **changes)


@pytest.mark.parametrize("mode", ["den", "dense", "nestednet", "routing", "packnet"])
def test_the_seed_fixes_runs_with_dropout(vgg, mode):
    tasks = {"data": dataclasses.replace(vgg("x").data, tasks=("digits",))}
    found = []
    for k, seed in enumerate((0, 0, 1)):
        stir(k)
        config = vgg(f"{mode}{k}", mode=mode, seed=seed, **tasks)
        assert any(isinstance(m, torch.nn.Dropout) and m.p for m in train(config).modules())
        found.append(read_metrics(config.out))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("at", [1, 4, 7, 12])
def test_continued_run_with_dropout_is_the_uninterrupted_one_bit_for_bit(vgg, monkeypatch, at):
    whole, broken = vgg("whole"), vgg("broken")
    expected = train(whole).state_dict()
    stir(1)
    train_interrupted(broken, monkeypatch, at)
    stir(2)
    found = train(broken, resume=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_metrics(broken.out) == read_metrics(whole.out)
    (tensors, record), (again, record_again) = (load_checkpoint(c.out / "last.safetensors") for c in (whole, broken))
    assert record == record_again
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("way", ["whole", "interrupted", "resumed", "refused"])
def test_the_callers_generators_stay_as_they_were(vgg, monkeypatch, way):
    config = vgg("run")
    if way in ("resumed", "refused"):
        train_interrupted(config, monkeypatch, 4)
    stir(5)
    expected = draws()
    stir(5)
    if way == "whole":
        train(config)
    elif way == "interrupted":
        train_interrupted(config, monkeypatch, 4)
    elif way == "resumed":
        train(config, resume=True)
    else:
        (config.out / "last.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="must be a complete checkpoint"):
            train(config, resume=True)
    assert draws() == expected


def dag(out):
    return DagTrainConfig(
        out=out, epoch_steps=2, progress=False, data=DagDataConfig(batch_size=12),
        network=DagNetworkConfig(states=4, flow=2, channels=8, trunk_size=4),
        training=DagTraining(steps=6, shares=(0.0, 0.5, 0.5)),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")
def test_dag_runs_with_code_that_draws_from_the_global_generators(tmp_path, monkeypatch):
    """As a layer with dropout would: seeded, continued exactly, and none of the caller's business."""
    monkeypatch.setattr("den.recipes.dag.recipe.load_tasks", two_tasks)
    plain, calls = Engine.update, []

    def noisy(engine, objective):
        calls.append(None)
        if len(calls) == stop:
            raise KeyboardInterrupt
        plain(engine, dataclasses.replace(objective, loss=objective.loss * (1 + sum(draws()))))

    monkeypatch.setattr(Engine, "update", noisy)
    stop = 0
    whole = train_dag(dag(tmp_path / "whole")).state_dict()
    stir(3)
    expected = draws()
    stir(3)
    calls, stop = [], 7
    with pytest.raises(KeyboardInterrupt):
        train_dag(dag(tmp_path / "broken"))
    stop = 0
    found = train_dag(dag(tmp_path / "broken"), resume=True).state_dict()
    assert draws() == expected
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


class Device(types.SimpleNamespace):
    """Two generators of a GPU that is not there."""

    def __init__(self) -> None:
        super().__init__(generators=[torch.Generator().manual_seed(7 + i) for i in range(2)])

    def device_count(self) -> int:
        return len(self.generators)

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.generators:
            generator.manual_seed(seed)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self.generators]

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.generators[device].set_state(state)

    def draws(self) -> list[float]:
        return [torch.rand((), generator=generator).item() for generator in self.generators]


def test_generators_of_a_device_are_seeded_stored_and_put_back(monkeypatch):
    gpu, cuda = Device(), torch.device("cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    expected = Device().draws()
    with seeded(3, cuda):
        first = gpu.draws()
        state = random_state(cuda)
        second = gpu.draws()
        set_random_state(*state, cuda)
        assert gpu.draws() == second
    assert gpu.draws() == expected
    with seeded(3, cuda):
        assert gpu.draws() == first
        gpu.generators.pop()  # continued on a machine with fewer
        set_random_state(*state, cuda)
        assert gpu.draws() == second[:1]
        set_random_state(*random_state(), cuda)  # the run was on a CPU before


def test_a_run_on_a_cpu_leaves_devices_alone(vgg, monkeypatch):
    def touched(*_):
        raise AssertionError

    monkeypatch.setattr(torch, "get_device_module", touched)
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, touched)
    with Engine(vgg("run"), prepare):
        pass
    new_model(NetworkConfig("wrn8_1", trunk_size=8), [two_tasks(None, "train")[0].task], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_on_a_gpu_continues_where_it_was(vgg):
    config = vgg("run", device="cuda")
    with Engine(config, prepare) as engine:
        expected = torch.nn.functional.dropout(torch.ones(1000, device="cuda"))
        assert engine.position.total_steps == 0
    with Engine(config, prepare, resume=True):
        assert torch.equal(torch.nn.functional.dropout(torch.ones(1000, device="cuda")), expected)
