"""How many kernels a network launches on a GPU at inference, counted on the simulated one."""

import contextlib
from collections import Counter

import pytest
import torch

from den import DeepElasticNetwork, GraphedNetwork, ModelConfig, Task

pytest.importorskip("triton", reason="triton is not installed")

from tests.gpu_launches import Launches, counted, on_gpu
from tests.simulated_gpu import simulated

TASK = Task("photos", 10, 32)


def network(backbone: str, **changes) -> DeepElasticNetwork:
    torch.manual_seed(0)
    config = ModelConfig((TASK,), backbone=backbone, levels=4, trunk_size=32, **changes)
    return DeepElasticNetwork(config).to(torch.bfloat16).eval()


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["wrn14_4", "wrn32_4"])
def test_a_block_is_two_launches_and_no_pass_activates(backbone, monkeypatch):
    """On a Hopper GPU, also where the stride is 2: the second launch pools the shortcut."""
    model = network(backbone)
    x, levels = torch.randn(3, *TASK.shape).bfloat16(), torch.randint(4, (3, model.num_blocks))
    with counted(monkeypatch) as launches:
        model.to("cuda:0")
        x, levels = on_gpu(x, levels)
        model.estimator(x, TASK, levels)  # folds
        names = Counter(launches.of(lambda: model.estimator(x, TASK, levels)))
    assert "activate_kernel" not in names
    assert sum(names[f"{kind}_kernel"] for kind in ("convolve", "box", "strip")) == 2 * model.num_blocks
    assert names["pool_kernel"] == 1
    assert names.total() <= 2 * model.num_blocks + 6


@torch.no_grad()
def test_a_replay_is_the_selector_and_two_launches_a_block(monkeypatch):
    """At most two a block and six for plan, stem, last norm and head; before them the selector's convolutions, and one
    that has what fills up the batch at level 0."""
    model = network("wrn14_4")
    images = torch.randn(3, *TASK.shape).bfloat16()
    with counted(monkeypatch) as launches:
        model.to("cuda:0")
        (images,) = on_gpu(images)
        graphed = GraphedNetwork(model, TASK, buckets=(4,))
        graphed(images)
        selector = len(launches.of(lambda: model.select(images, TASK)))
        inside = Launches()
        capture = torch.cuda.graph

        @contextlib.contextmanager
        def watched(graph):
            with capture(graph):
                before = len(launches)
                yield
                inside.extend(launches[before:])

        monkeypatch.setattr(torch.cuda, "graph", watched)
        model.estimator.heads[0].weight.mul_(1)  # a change: captured anew
        graphed(images)
    assert 0 < len(inside) <= 2 * model.num_blocks + 6 + selector + 1
    assert inside.count("plan_levels") == 1


@torch.no_grad()
def test_graphs_follow_images_batches_and_weights(monkeypatch):
    model = network("wrn14_1").float()
    batches = [torch.randn(count, *TASK.shape) for count in (3, 2, 4, 7)]
    expected = [model(x, TASK, return_levels=True) for x in batches]
    with simulated(monkeypatch):
        model.to("cuda:0")
        graphed = GraphedNetwork(model, "photos", buckets=(2, 4))
        there, planned, plan = on_gpu(*batches), [], model.estimator.level_plan
        monkeypatch.setattr(model.estimator, "level_plan", lambda levels: planned.append(levels) or plan(levels))
        for x, (logits, levels) in zip(there, expected, strict=True):
            got, chosen = graphed(x, return_levels=True)
            torch.testing.assert_close(got.cpu(), logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(chosen.cpu(), levels)
        assert planned[0].shape == (4, model.num_blocks)
        assert not planned[0][3:].cpu().any()  # what fills up the first batch costs as little as it can
        model.estimator.heads[0].weight.mul_(2)
        torch.testing.assert_close(graphed(there[0]).cpu(), model(there[0], TASK).cpu(), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"images .* must be the model's torch.float32, got torch.float64"):
            graphed(there[0].double())
        with pytest.raises(ValueError, match="must be in eval mode"):
            GraphedNetwork(model.train(), TASK)(there[0])
        with pytest.raises(ValueError, match="buckets must be batch sizes of at least 1"):
            GraphedNetwork(model, TASK, buckets=(0, 4))
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        GraphedNetwork(network("wrn14_1"), TASK)
