"""The benchmarks of converted models: their rows, what stops a row, and packages that are not there."""

import argparse

import pytest
import torch
from torch import nn

from benchmarks import convert_speed, engine_latency, engines, packages
from tests.foreign_models import foreign

NAME = "own/model"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model of two stages for images of 16 pixels, PyTorch alone, one thread."""
    monkeypatch.setattr(packages, "build", lambda name: foreign("torchvision_basic"))
    monkeypatch.setattr(convert_speed, "MODELS", {NAME: 16})
    monkeypatch.setattr(engine_latency, "MODELS", {NAME: 16})
    monkeypatch.setattr(engines, "installed", lambda: ())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_row_has_the_share_of_the_flops_and_what_follows_from_its_times():
    ticks = iter(range(1000))
    row = convert_speed.Case.of(NAME, 3).measured(2, lambda: float(next(ticks)))  # every call takes a second
    assert (row["blocks"], row["fused"], row["batch"]) == (3, 3, 3)
    assert 0.1 < row["flops"] < 1
    assert set(row["milliseconds"].values()) == {1000.0}
    assert row["realised"] == row["realised unfrozen"] == row["flops"]
    assert row["speed"] == 1
    assert "realised openvino" not in row
    assert convert_speed.numbers_of(row)[3:5] == ["", ""]


def test_an_engine_is_a_column_and_one_that_computes_something_else_stops_the_row(monkeypatch):
    def engine(answer):
        return lambda exported, x, dtype, threads: lambda: answer(exported, x)

    monkeypatch.setattr(engines, "installed", lambda: ("dense-openvino",))
    monkeypatch.setattr(engines, "exported", lambda model, x: model)
    monkeypatch.setitem(engines.ENGINES, "dense-openvino", engine(lambda model, x: model(x)))
    row = convert_speed.Case.of(NAME, 2).measured(1)
    seconds = row["milliseconds"]
    assert row["realised openvino"] == pytest.approx(seconds["openvino"] * row["flops"] / seconds["elastic"])
    monkeypatch.setitem(engines.ENGINES, "dense-openvino", engine(lambda model, x: 1.01 * model(x)))
    with pytest.raises(RuntimeError, match=r"openvino is off by 1\.0e-02 of the largest logit"):
        convert_speed.Case.of(NAME, 2)


def test_a_package_that_is_not_there_is_named_and_left_out(monkeypatch, capsys):
    def build(name: str) -> nn.Module:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(packages, "build", build)
    options = argparse.Namespace(models=[NAME], batch=[1], rounds=1, cpu_time=False)
    assert list(convert_speed.rows(options)) == []
    assert f"{NAME}, batch 1: not measured: no {NAME}" in capsys.readouterr().out


def test_an_engine_at_half_the_flops_is_timed_beside_the_model():
    name, share, *times, ratio = engine_latency.row_of(NAME, 0.5, 2)
    assert name == NAME
    assert 0.1 < float(share) <= 0.5
    assert min(map(float, times)) >= 0
    assert float(ratio) > 0
