"""AdaShare: draws, gates and losses against hand computations, and what each phase learns."""

import dataclasses
import math

import pytest
import torch

from den.recipes import method_of, prepare
from den.recipes.adashare import gated, gumbel_softmax, keep_logits, sharing_loss, sparsity_loss
from den.train.config import MethodConfig, TrainConfig
from den.train.engine import Engine
from tests.small_methods import Bench, generator, model_and_batch
from tests.small_runs import cut_sets, small_config


def test_adashare_temperature_falls_with_the_rounds(tmp_path, monkeypatch):
    model, batch = model_and_batch()
    config = dataclasses.replace(TrainConfig(), out=tmp_path, mode="adashare", methods=MethodConfig(share_rounds=20))
    method, seen = method_of(model, config), []

    def record(logits, temperature, draws):
        seen.append(temperature)
        return gumbel_softmax(logits, temperature, draws)

    monkeypatch.setattr("den.recipes.adashare.gumbel_softmax", record)
    for phase in method.phases()[:-1:19]:
        method.objective(Bench(), phase, batch)
    assert seen == pytest.approx([5.0, 5.0 * 0.965**9, 5.0 * 0.965**19])


def test_gumbel_softmax_draws_by_the_logits():
    logits = torch.tensor([0.0, math.log(3)]).expand(20000, 2)
    found = gumbel_softmax(logits, 0.1, generator())
    assert found.sum(1).allclose(torch.ones(()))
    assert (found[:, 1] > 0.5).float().mean().item() == pytest.approx(0.75, abs=0.01)
    soft = gumbel_softmax(logits, 50.0, generator())
    assert (soft - 0.5).abs().max() < 0.15


def test_adashare_losses_by_hand():
    keep = torch.tensor([[0.5, 0.9], [0.25, 0.9], [0.5, 0.1]])
    logits = keep_logits(torch.stack([torch.full((3, 2), 0.3), (keep / (1 - keep)).log() + 0.3], -1))
    assert sparsity_loss(logits).item() == pytest.approx(-(1 - keep).log().mean().item(), rel=1e-5)
    first = 0.25 + 0.0 + 0.25  # pairs of tasks in block 0, weight 1
    second = 0.0 + 0.8 + 0.8  # in block 1, weight 1/2
    found = sharing_loss(logits, torch.tensor([1.0, 0.5])).item()
    assert found == pytest.approx((first + second / 2) / (3 * 2), rel=1e-5)
    assert sharing_loss(logits[:1], torch.ones(2)).item() == 0


def test_gates_scale_the_residual():
    model, batch = model_and_batch()
    estimator = model.eval().estimator
    images, names, levels = (
        batch.images,
        batch.tasks,
        torch.tensor([[0, 3, 3], [3, 0, 3], [3, 3, 3], [0, 0, 0], [3] * 3]),
    )
    with gated(estimator, (levels / 3).float()):
        found = estimator(images, names)
    for ours, theirs in zip(found, estimator(images, names, levels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    block, x = estimator.blocks[1], torch.randn(2, 16, 8, 8)
    expected = block.shortcut(x) + 0.3 * block.residual(x)
    gates = torch.full((2, 3), 0.3)
    with gated(estimator, gates):
        torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x), block.shortcut(x) + block.residual(x))


def test_adashare_weights_and_gates_learn_from_different_images(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    with Engine(small_config(tmp_path / "run", "adashare"), prepare) as engine:
        streams = engine.batches
        for k, image_set in enumerate(streams["all"].sets):
            halves = [
                {image.numpy().tobytes() for image in streams[n].sets[k].images} for n in ("estimator", "selector")
            ]
            assert not halves[0] & halves[1]
            assert sum(len(streams[n].sets[k]) for n in ("estimator", "selector")) == len(image_set)
        gates = engine.recipe.state.logits.detach().clone()
        used = []
        for phase in engine.phases[:2]:
            for batch in engine.phase(phase.network, phase.stage):
                used.append(phase.stream)
                engine.update(engine.recipe.objective(engine, phase, batch))
            assert torch.equal(engine.recipe.state.logits, gates) == (phase.network == "estimator")
        assert used == ["estimator"] * 3 + ["selector"] * 3


def test_adashare_starts_anew_with_what_was_drawn(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    with Engine(small_config(tmp_path / "run", "adashare"), prepare) as engine:
        initial = {name: tensor.clone() for name, tensor in engine.model.estimator.state_dict().items()}
        *search, final = engine.phases
        for phase in search:
            for batch in engine.phase(phase.network, phase.stage):
                engine.update(engine.recipe.objective(engine, phase, batch))
        with torch.no_grad():
            engine.recipe.state.logits[:, :, 1] = torch.tensor([[50.0, -50.0, 50.0], [-50.0, -50.0, 50.0]])
        batch = next(iter(engine.phase("estimator", final.stage)))
        assert all(torch.equal(t, initial[name]) for name, t in engine.model.estimator.state_dict().items())
        found = engine.recipe.structures(batch.images, batch.tasks)
        assert found.unique(dim=0).tolist() == [[0, 0, 3], [3, 0, 3]]
        assert final.stream == "all"
