"""DAG networks and their peers on a simulated GPU: the CPU's values, nothing that waits, graphs that follow."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from den.dag import DagConfig, DagNetwork, SubNetwork, reduce
from den.dag.losses import task_loss
from den.dag.peers import CrossStitchNetwork, SeparateNetworks
from den.data import Batch
from den.nn.tasks import Task
from tests.release import always
from tests.simulated_gpu import simulated

PLAIN = (Task("a", 5, 12, 1), Task("b", 3, 8, 1), Task("c", 7, 20, 3))
ALIKE = tuple(Task(name, classes, 12, 1) for name, classes in (("a", 5), ("b", 3), ("c", 7)))
DENSE = (
    Task("segmentation", 4, 32, 3, "segmentation", 24),
    Task("depth", 1, 32, 3, "depth", 24),
    Task("normals", 3, 32, 3, "normals", 24),
)
SMALL = {"states": 5, "flow": 2, "channels": 8, "trunk_size": 8}
NETWORKS = {
    "mixed": (DagNetwork, PLAIN, {}),
    "alike": (DagNetwork, ALIKE, {}),
    "bare": (DagNetwork, PLAIN, {"gates": "bare"}),
    "groups": (DagNetwork, PLAIN, {"groups": 4}),
    "stages": (DagNetwork, PLAIN, {"stages": (3, 2)}),
    "dense": (DagNetwork, DENSE, {"trunk_size": (8, 6)}),
    "dense stages": (DagNetwork, DENSE, {"trunk_size": (8, 6), "stages": (3, 2)}),
    "separate": (SeparateNetworks, PLAIN, {}),
    "cross-stitch": (CrossStitchNetwork, ALIKE, {}),
}


@pytest.fixture(params=always(NETWORKS, "mixed", "groups", "stages", "dense stages", "cross-stitch"))
def model(request):
    """A network whose tasks keep different halves of the graph; of groups some use only the first few."""
    kind, tasks, changes = NETWORKS[request.param]
    torch.manual_seed(0)
    made = kind(DagConfig(tasks, **{**SMALL, **changes}))
    for logits in made.gates.parameters():
        nn.init.normal_(logits)
    for k in range(len(tasks)):
        kept = reduce(made.graph, made.gates.of_task(k), 0.5, ranking="random", seed=k).kept
        made.keep(k, kept)
        if made.gates.groups > 1:
            levels = [1 + (e + k) % made.gates.groups for e in range(len(kept.edges))]
            made.gates.keep(k, kept, levels)
    return made


def batch_of(tasks, seed=0, count=3):
    """Images and targets of every task; dense tasks share their images."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(count, *task.shape, generator=generator) for task in tasks]
    targets = []
    for task in tasks:
        kinds = torch.randint(task.classes, (count, *task.shape[1:]), generator=generator)
        values = torch.randn(count, task.classes, *task.shape[1:], generator=generator)
        targets.append(kinds if task.kind == "segmentation" else values if task.dense else kinds[:, 0, 0])
    if tasks[0].dense:
        images = images[:1] * len(tasks)
    return Batch(tuple(task.name for task in tasks), images, targets)


def on_gpu(batch):
    sent = {id(part): part.to("cuda:0") for part in batch.images}
    return Batch(batch.tasks, [sent[id(x)] for x in batch.images], [y.to("cuda:0") for y in batch.labels])


def close(got, expected):
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), its, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inference_waits_for_nothing_and_equals_the_cpus(model, monkeypatch):
    batch, alone = batch_of(model.tasks), batch_of(model.tasks, seed=1)
    model.eval()
    expected = model(batch.images, batch.tasks)
    expected_alone = [model(x, name) for x, name in zip(alone.images, alone.tasks, strict=True)]
    with simulated(monkeypatch):
        model.to("cuda:0")
        there, alone = on_gpu(batch), on_gpu(alone)
        model(there.images, there.tasks)  # reads once what the tasks keep
        torch.cuda.set_sync_debug_mode("error")
        again = model(there.images, there.tasks)
        got_alone = [model(x, name) for x, name in zip(alone.images, alone.tasks, strict=True)]
        torch.cuda.set_sync_debug_mode("default")
        close(again, expected)
        close(got_alone, expected_alone)


def update(model, batch, optimiser):
    loss, measured = task_loss(model, batch, (1.0, 0.5, 2.0))
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss, measured


def test_updates_wait_for_nothing_and_equal_the_cpus(model, monkeypatch):
    """Every update starts from the CPU's weights: a rounding that turns a ReLU would grow from one to the next."""
    batches = [batch_of(model.tasks, seed) for seed in range(3)]
    expected = []
    for batch in batches:
        model.train()
        before = copy.deepcopy(model.state_dict())
        loss, measured = update(model, batch, torch.optim.SGD(model.parameters(), 0.05))
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        expected.append((before, loss.detach(), measured, gradients, copy.deepcopy(model.state_dict())))
    with simulated(monkeypatch):
        model.to("cuda:0")
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        batches = [on_gpu(batch) for batch in batches]
        for number, (batch, (before, loss, measured, gradients, after)) in enumerate(
            zip(batches, expected, strict=True)
        ):
            for name, mine in model.state_dict().items():
                if mine.is_floating_point() or name.endswith("num_batches_tracked"):  # not what the tasks keep
                    mine.detach().copy_(before[name])
            model.train()
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first reads what the tasks keep
            found_loss, found = update(model, batch, optimiser)
            torch.cuda.set_sync_debug_mode("default")
            close([found_loss], [loss])
            assert {name: float(value) for name, value in found.items()} == pytest.approx(
                {name: float(value) for name, value in measured.items()}, rel=1e-4
            )
            for (name, mine), its in zip(model.state_dict().items(), after.values(), strict=True):
                torch.testing.assert_close(mine.cpu(), its, rtol=1e-3, atol=1e-5, msg=name)
            for mine, its in zip(model.parameters(), gradients, strict=True):
                assert (mine.grad is None) == (its is None)
                if its is not None:
                    torch.testing.assert_close(mine.grad.cpu(), its, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_captured_graph_serves_new_images(model, monkeypatch):
    first, second = batch_of(model.tasks, 1), batch_of(model.tasks, 2)
    model.eval()
    expected = model(second.images, second.tasks)
    with simulated(monkeypatch):
        model.to("cuda:0")
        there, after = on_gpu(first), on_gpu(second)
        model(there.images, there.tasks)  # nothing is folded inside a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = model(there.images, there.tasks)
        model(after.images[:1], after.tasks[:1])  # another make-up in between takes nothing from the graph
        for old, new in zip(there.images, after.images, strict=True):
            old.copy_(new)
        graph.replay()
        close(outputs, expected)
        close(model(there.images, there.tasks), expected)


def test_a_captured_update_follows_images_and_weights(model, monkeypatch):
    batches = [batch_of(model.tasks, seed) for seed in range(3)]
    other, losses = copy.deepcopy(model).train(), []
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for batch in batches:
        losses.append(update(model.train(), batch, optimiser)[0].detach())
    with simulated(monkeypatch):
        other.to("cuda:0")
        optimiser = torch.optim.SGD(other.parameters(), 0.05)
        first, *later = (on_gpu(batch) for batch in batches)
        got = [update(other, first, optimiser)[0].cpu()]
        optimiser.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = task_loss(other, first, (1.0, 0.5, 2.0))[0]
            loss.backward()
        for batch in later:
            for old, new in zip([*first.images, *first.labels], [*batch.images, *batch.labels], strict=True):
                old.copy_(new)
            for parameter in other.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            graph.replay()
            got.append(loss.detach().cpu())
            optimiser.step()
    close(got, losses)


@torch.no_grad()
def test_nothing_is_kept_of_a_capture_that_came_first(model, monkeypatch):
    batch = batch_of(model.tasks)
    model.eval()
    expected = model(batch.images, batch.tasks)
    with simulated(monkeypatch):
        model.to("cuda:0")
        there = on_gpu(batch)
        with (
            pytest.raises(RuntimeError, match="run the network once before capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(there.images, there.tasks)
        close(model(there.images, there.tasks), expected)


@pytest.mark.parametrize("model", ["mixed"], indirect=True)
@torch.no_grad()
def test_gates_of_a_batch_belong_to_no_capture(model, monkeypatch):
    batch, seen = batch_of(model.tasks), []
    route, model = model.route, model.eval()
    monkeypatch.setattr(model, "route", lambda batch: (seen.append(weakref.ref(gates := route(batch))), gates)[1])
    expected = model(batch.images, batch.tasks)
    with simulated(monkeypatch):
        model.to("cuda:0")
        there = on_gpu(batch)
        model(there.images[:2], there.tasks[:2])
        with pytest.raises(RuntimeError, match="before a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(there.images, there.tasks)  # what it made of another batch would hold what only a replay computes
        close(model(there.images, there.tasks), expected)
        seen.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(there.images, there.tasks)
        model(there.images[:2], there.tasks[:2])
        gc.collect()
        assert seen[0]() is not None  # the graph reads them: their memory is nobody else's


@torch.no_grad()
def test_streams_wait_for_what_another_made(model, monkeypatch):
    batch = batch_of(model.tasks)
    model.eval()
    expected = model(batch.images, batch.tasks)
    with simulated(monkeypatch):
        model.to("cuda:0")
        there, side = on_gpu(batch), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        model(there.images, there.tasks)
        with torch.cuda.stream(side):
            close(model(there.images, there.tasks), expected)


@pytest.mark.parametrize("model", ["mixed", "stages", "dense stages"], indirect=True)
@torch.no_grad()
def test_an_extracted_network_stays_where_its_network_is(model, monkeypatch):
    batch = batch_of(model.tasks)
    model.eval()
    expected = [SubNetwork(model, name)(x) for x, name in zip(batch.images, batch.tasks, strict=True)]
    with simulated(monkeypatch):
        model.to("cuda:0")
        there = on_gpu(batch)
        alone = [SubNetwork(model, name) for name in there.tasks]
        torch.cuda.set_sync_debug_mode("error")
        got = [network(x) for network, x in zip(alone, there.images, strict=True)]
        torch.cuda.set_sync_debug_mode("default")
        close(got, expected)
