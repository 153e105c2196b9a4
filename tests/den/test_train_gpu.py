"""Runs of Deep Elastic Networks and of every compared method on a simulated GPU: no update waits for it."""

import contextlib
import dataclasses

import pytest
import torch

from den.data import MixedTaskBatches
from den.recipes import METHODS, den
from den.recipes.base import Method
from den.recipes.den import train
from den.train.config import EstimatorTraining, PhaseConfig, SelectorTraining
from den.train.engine import Engine
from den.train.folder import read_metrics
from den_kernels.fold_cache import FoldCache
from tests.release import always
from tests.simulated_gpu import Device, simulated
from tests.small_runs import cut_sets, small_config

pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
LATER = EstimatorTraining(first=PhaseConfig(2, 0.05), later=PhaseConfig(2, 0.05), finish=PhaseConfig(2, 0.01))
SELECTORS = {
    "leave-one-out": SelectorTraining(phase=PhaseConfig(2, 1e-2)),
    "budget": SelectorTraining(phase=PhaseConfig(2, 1e-2), budget=0.5, baseline="running-mean"),
}


@contextlib.contextmanager
def no_waiting(monkeypatch):
    """Drawing a batch, its objective, and the update raise where they wait for the GPU; folding resting weights may."""

    def watched(function, mode="error"):
        def call(*arguments, **keywords):
            before = Device.current.waiting
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return function(*arguments, **keywords)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    with monkeypatch.context() as patch:
        for name in ("derive_structures", "selector_loss"):
            patch.setattr(den, name, watched(getattr(den, name)))
        for kind in METHODS.values():
            patch.setattr(kind, "objective", watched(kind.objective))
        patch.setattr(Method, "estimator_loss", watched(Method.estimator_loss))
        patch.setattr(MixedTaskBatches, "next", watched(MixedTaskBatches.next))
        patch.setattr(Engine, "update", watched(Engine.update))
        patch.setattr(FoldCache, "get", watched(FoldCache.get, "default"))
        yield


@pytest.mark.parametrize("mode", always(("den", "budget", "dense", *METHODS), "den", "budget", "blockdrop"))
def test_no_update_waits_and_losses_are_the_cpus(tmp_path, monkeypatch, mode):
    cut_sets(monkeypatch, 30)
    changes = {"estimator": LATER, "selector": SELECTORS.get(mode, SELECTORS["leave-one-out"])}
    there = small_config(tmp_path / "cpu", "den" if mode == "budget" else mode, device="cpu", **changes)
    train(there)
    here = dataclasses.replace(there, out=tmp_path / "gpu", device="cuda")
    with simulated(monkeypatch), no_waiting(monkeypatch):
        model = train(here)
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    losses = [[line["train"]["loss"] for line in read_metrics(config.out)] for config in (there, here)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
