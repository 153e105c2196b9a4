"""Where a run trains, and in which precision."""

import dataclasses

import pytest
import torch

from den.recipes.den import train
from den.support.device import choose_device
from den.train.config import DataConfig, EstimatorTraining, NetworkConfig, PhaseConfig, SelectorTraining, TrainConfig
from den.train.folder import read_metrics


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpu", "got 'gpu'"), ("meta", "got 'meta'"), ("cuda:7", r"got 'cuda:7' with \d GPUs"), ("", "got ''")],
)
def test_other_names_are_refused(name, said):
    with pytest.raises(ValueError, match=said):
        choose_device(name)


def tiny(out) -> TrainConfig:
    return TrainConfig(
        out=out, stages=1, epoch_steps=2, progress=False,
        data=DataConfig(batch_size=16), network=NetworkConfig(backbone="wrn8_1", trunk_size=8),
        estimator=EstimatorTraining(first=PhaseConfig(2, 0.05), finish=PhaseConfig(2, 0.01)),
        selector=SelectorTraining(phase=PhaseConfig(2, 1e-3)),
    )  # fmt: skip


def test_bfloat16_trains_float32_weights_to_about_the_same_losses(tmp_path):
    whole = tiny(tmp_path / "float32")
    half = dataclasses.replace(whole, out=tmp_path / "bfloat16", precision="bfloat16")
    models = [train(whole), train(half)]
    assert all(p.dtype == torch.float32 for p in models[1].parameters())
    losses = [[line["train"]["loss"] for line in read_metrics(config.out)] for config in (whole, half)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_the_cpu_does(tmp_path, precision):
    configs = [dataclasses.replace(tiny(tmp_path / d), device=d, precision=precision) for d in ("cpu", "cuda")]
    for config in configs:
        train(config)
    losses = [[line["train"]["loss"] for line in read_metrics(config.out)] for config in configs]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
