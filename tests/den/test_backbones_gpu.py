"""Networks of every kind of block on a simulated GPU: nothing waits for it, and a captured graph serves every route."""

import pytest
import torch

from den import DeepElasticNetwork
from tests.den.test_backbones import CONFIGS, NAMES, PARTS, structures
from tests.simulated_gpu import simulated


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return DeepElasticNetwork(request.param).eval()


def moved(parts):
    return [part.to("cuda:0") for part in parts]


@torch.no_grad()
def test_inference_waits_for_nothing_and_equals_the_cpus(model, monkeypatch):
    levels = structures(model, 7)
    expected = model.estimator(PARTS, NAMES, levels)
    with simulated(monkeypatch):
        model.to("cuda:0")
        parts, levels = moved(PARTS), levels.to("cuda:0")
        torch.cuda.set_sync_debug_mode("error")
        got = model.estimator(parts, NAMES, levels)
        model(parts, NAMES)
        torch.cuda.set_sync_debug_mode("default")
        got = [part.cpu() for part in got]
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_captured_graph_follows_its_plan(model, monkeypatch):
    first, second = structures(model, 4, seed=1), structures(model, 4, seed=2)
    expected = model.estimator(PARTS[0], "digits", second)
    with simulated(monkeypatch):
        model.to("cuda:0")
        x = PARTS[0].to("cuda:0")
        kept = model.estimator.level_plan(first.to("cuda:0"))
        model.estimator(x, "digits", kept)  # nothing is folded inside a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model.estimator(x, "digits", kept)
        kept.update_(second.to("cuda:0") + model.estimator.lowest)
        graph.replay()
        got = y.cpu()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_training_waits_for_nothing(model, monkeypatch):
    model.train()
    levels = structures(model, 7)
    with simulated(monkeypatch):
        model.to("cuda:0")
        parts, levels = moved(PARTS), levels.to("cuda:0")
        torch.cuda.set_sync_debug_mode("error")
        loss = sum(part.square().mean() for part in model.estimator(parts, NAMES, levels))
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        grad = model.estimator.blocks[0].conv1.weight.grad.cpu()
    assert grad.isfinite().all()
    assert grad.any()
