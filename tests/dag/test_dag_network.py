"""The central network: a mixed-task batch on the kernels equals each task's extracted network, in use and training."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from den.dag import DagConfig, DagNetwork, Graph, SubGraph, SubNetwork, TaskGates, reduce
from den.dag.edge import Edge, reference_edge
from den.dag.ends import MixedEnds
from den.dag.gates import Gates, squeeze_loss
from den.dag.stem import DagStem, stem_geometry
from den.nn.task_batch import task_batch
from den.nn.tasks import Task
from den_kernels import RoutingPlan
from tests.oracle import assert_steps_alike, unlike_new

TASKS = (Task("a", 5, 12, 1), Task("b", 3, 8, 1), Task("c", 7, 20, 3))


def config(**changes):
    return DagConfig(
        changes.pop("tasks", TASKS), **{"states": 5, "flow": 2, "channels": 16, "trunk_size": 8, **changes}
    )


def make(seed=0, **changes):
    """A network with random gates and batch norms that have seen something."""
    torch.manual_seed(seed)
    model = DagNetwork(config(**changes))
    for logits in (model.gates.alpha, model.gates.beta, model.gates.gamma):
        nn.init.normal_(logits)
    unlike_new(model, 0.3)
    return model


def reduced(seed=0, ratio=0.5, **changes):
    model = make(seed, **changes)
    for k in range(len(TASKS)):
        model.keep(k, reduce(model.graph, model.gates.of_task(k), ratio, ranking="random", seed=seed + k).kept)
    return model


def images(sizes=(3, 2, 4), seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, t.channels, t.size, t.size, generator=generator, dtype=dtype)
        for n, t in zip(sizes, TASKS, strict=True)
    ]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def plain_trunk(model, x, tasks):
    """The formulas of the network, one state after the other, in ordinary operations over the whole batch."""
    a, g, b = (rows[tasks] for rows in model.gates.values())
    states, out = [], 0
    for j in range(model.graph.states):
        v = a[:, j, None, None, None] * x
        for e in model.graph.incoming[j]:
            y = reference_edge(model.edges[e], states[model.graph.edges[e][0]], model.gates.edge_levels[tasks, e])
            v = v + g[:, e, None, None, None] / len(model.graph.incoming[j]) * y
        states.append(v)
        out = out + b[:, j, None, None, None] * v
    return out


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("sizes", [(3, 2, 4), (1, 1, 1), (1, 6, 0)])
def test_mixed_batch_equals_each_tasks_extracted_network(ratio, sizes):
    model, parts = reduced(ratio=ratio).eval(), images(sizes)
    with torch.no_grad():
        together = model(parts, ["a", "b", "c"])
        for logits, part, task in zip(together, parts, TASKS, strict=True):
            if len(part):
                close(logits, SubNetwork(model, task.name)(part))
                close(logits, model(part, task.name))


def test_parts_may_come_in_any_order_and_more_than_once():
    model, (a, b, c) = reduced(seed=4).eval(), images()
    with torch.no_grad():
        first, second, third, fourth = model([c, a, b, a], ["c", "a", "b", "a"])
        one_by_one = [model(part, task) for part, task in ((c, "c"), (a, "a"), (b, "b"), (a, "a"))]
    for got, wanted in zip((first, second, third, fourth), one_by_one, strict=True):
        close(got, wanted)


ALIKE = tuple(Task(f"t{k}", classes, 20, 2) for k, classes in enumerate((3, 7, 2)))


@pytest.mark.parametrize("trunk", [5, 8, 20])
def test_tasks_that_are_alike_share_the_products_of_their_stems_and_heads(trunk, monkeypatch):
    torch.manual_seed(0)
    model = make(tasks=ALIKE, trunk_size=trunk).eval()
    folds = []
    monkeypatch.setattr(MixedEnds, "fold", lambda *ends, fold=MixedEnds.fold: folds.append(1) or fold(*ends))
    parts, names = [torch.randn(4, 2, 20, 20) for _ in ALIKE], [task.name for task in ALIKE]
    with torch.no_grad():
        for changed in (model.stems[1].conv.conv.weight, model.heads[2].norm.running_mean, model.heads[0].linear.bias):
            for logits, part, name in zip(model(parts, names), parts, names, strict=True):
                close(logits, model(part, name))
            model(parts, names)
            changed.add_(0.5)
        assert len(folds) == 3
        model([parts[0], parts[1][:1]], names[:2])  # not as many images of each
    assert len(folds) == 3


def test_gradients_through_frozen_norms_equal_those_of_the_extracted_networks():
    model, parts = reduced(seed=2).eval(), images()
    loss = sum(logits.square().sum() for logits in model(parts, ["a", "b", "c"]))
    loss.backward()
    wanted = {}
    for k, part in enumerate(parts):
        alone = SubNetwork(model, k)
        alone(part).square().sum().backward()
        for e, (i, j) in enumerate(model.graph.edges):
            if alone.kept.edges[e]:
                gradient = alone.edges[f"{i}-{j}"].conv.weight.grad
                wanted[e] = wanted[e] + gradient if e in wanted else gradient
        close(model.stems[k].conv.conv.weight.grad, alone.stem.conv.conv.weight.grad)
        close(model.heads[k].linear.weight.grad, alone.head.linear.weight.grad)
    for e, edge in enumerate(model.edges):
        if e in wanted:
            torch.testing.assert_close(edge.conv.weight.grad, wanted[e], rtol=1e-3, atol=1e-3)
        else:
            assert edge.conv.weight.grad is None
    assert wanted


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_training_step_equals_the_formulas_in_ordinary_operations(ratio):
    model, tasks = reduced(seed=3, ratio=ratio).train(), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    twin = reduced(seed=3, ratio=ratio).train()
    x = torch.randn(9, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    parts = images()
    batch = task_batch(parts, ["a", "b", "c"], TASKS, like=model.heads[0].linear.weight)
    got, wanted = model.trunk(x, model.route(batch)), plain_trunk(twin, x, tasks)
    assert_steps_alike(model, twin, got, wanted, ("edges", "gates"))
    for ours, theirs in zip(model.edges.buffers(), twin.edges.buffers(), strict=True):
        if ours.is_floating_point():
            close(ours, theirs)


def test_an_all_ones_mask_is_the_unmasked_network():
    model, parts = make().eval(), images()
    with torch.no_grad():
        before = model(parts, ["a", "b", "c"])
        for k in range(3):
            model.keep(k, model.graph.whole())
        after = model(parts, ["a", "b", "c"])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_dropped_edges_are_not_run(monkeypatch):
    """Edge by edge, as in training and on a GPU; `test_dynamic_graph` says it of the whole graph in one call."""
    model, parts = reduced(seed=1, ratio=0.6).train(), images((4, 4, 4))
    numbers, ran, forward = {edge: e for e, edge in enumerate(model.edges)}, [], Edge.forward

    def spy(edge, x, route):
        ran.append((numbers[edge], route.levels.gt(0).tolist()))
        return forward(edge, x, route)

    monkeypatch.setattr(Edge, "forward", spy)
    model(parts, ["a", "b", "c"])
    assert [e for e, _ in ran] == [e for e in range(len(model.edges)) if model.gates.edge_levels[:, e].any()]
    for e, levels in ran:
        assert levels == [bool(model.gates.edge_levels[k, e]) for k in range(3) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_by_edge_and_in_one_call_are_the_same(dtype):
    """What other devices run at inference, against the one call on a CPU."""
    model, parts = reduced(seed=6).to(dtype).eval(), images(dtype=dtype)
    with torch.no_grad():
        whole = model(parts, ["a", "b", "c"])
        batch = task_batch(parts, ["a", "b", "c"], TASKS, like=model.heads[0].linear.weight)
        x = torch.cat([stem(part) for stem, part in zip(model.stems, parts, strict=True)])
        pooled = model.run_edges(x, model.route(batch)).mean((2, 3)).split(batch.sizes)
        for logits, rows, head in zip(whole, pooled, model.heads, strict=True):
            close(logits, head(rows))


def test_dropped_instances_are_not_read():
    edge = Edge(16, 1).eval()
    x = torch.randn(3, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    x[1] = torch.nan
    with torch.no_grad():
        y = edge(x, RoutingPlan.from_levels(torch.tensor([[1], [0], [1]]), 1)[0])
    assert not y.isnan().any()
    assert (y[1] == 0).all()


def test_the_extracted_network_holds_only_what_its_task_keeps():
    model = reduced(seed=5, ratio=0.6)
    alone = SubNetwork(model, "b")
    kept = [f"{i}-{j}" for e, (i, j) in enumerate(model.graph.edges) if model.gates.edge_levels[1, e]]
    assert list(alone.edges) == kept
    per_edge = 9 * 16 * 16 + 2 * 16
    assert alone.parameters_count == len(kept) * per_edge + 9 * 16 + 2 * 16 + 2 * 16 + 3 * 16 + 3


def test_bare_gates_are_ones_where_kept():
    model = reduced(gates="bare")
    read_in, edges, read_out = model.gates.values(bare=True)
    assert {*read_in.flatten().tolist(), *edges.flatten().tolist(), *read_out.flatten().tolist()} == {0.0, 1.0}
    with torch.no_grad():
        part = images()[0]
        close(model.eval()(part, "a"), SubNetwork(model, "a")(part))


def test_with_flow_one_and_ends_only_it_is_a_chain_of_elastic_convolutions():
    """Nested groups on the edges: a task-level Deep Elastic Network (one level per block and task)."""
    model = make(states=4, flow=1, groups=4, channels=16, gates="bare").eval()
    chain = SubGraph(Graph(4, 1), (True,) * 3, (True, False, False, False), (False, False, False, True))
    levels = {0: (4, 2, 1), 1: (1, 4, 4), 2: (3, 3, 2)}
    for k, chosen in levels.items():
        model.gates.keep(k, chain, chosen)
    parts = images()
    with torch.no_grad():
        together = model(parts, ["a", "b", "c"])
        for k, part in enumerate(parts):
            x = model.stems[k](part)
            for edge, level in zip(model.edges, levels[k], strict=True):
                width, norm = 4 * level, edge.norm
                y = F.batch_norm(F.conv2d(x, edge.conv.weight, padding=1), norm.running_mean, norm.running_var,
                                 norm.weight, norm.bias).relu()  # fmt: skip
                x = F.pad(y[:, :width], (0, 0, 0, 0, 0, 16 - width))
            close(together[k], model.heads[k](x.mean((2, 3))))
            close(together[k], SubNetwork(model, k).eval()(part))


def test_inference_follows_gates_and_structure_that_change():
    model, part = make().eval(), images()[0]
    with torch.no_grad():
        first = model(part, "a")
        model.gates.gamma[0].add_(1.0)
        close(model(part, "a"), SubNetwork(model, "a")(part))
        model.keep(0, reduce(model.graph, model.gates.of_task(0), 0.5).kept)
        last = model(part, "a")
        close(last, SubNetwork(model, "a")(part))
    assert not torch.allclose(first, last)


def test_squeeze_loss_is_what_exceeds_kappa():
    gamma = torch.zeros(2, 10)
    gamma[1] = -20.0
    assert squeeze_loss(gamma, 3.0).item() == pytest.approx(2.0)
    assert squeeze_loss(gamma, 5.0).item() == 0


def test_gates_begin_at_one_half():
    gates = Gates(Graph(8, 3), 4)
    assert gates.gamma.sigmoid().sum(1).tolist() == [9.0] * 4  # |E| / 2
    assert gates.spread().tolist() == [0.0] * 4
    assert gates.structure(2) == Graph(8, 3).whole()


@pytest.mark.parametrize(("size", "out"), [(28, 14), (16, 16), (105, 28), (32, 16), (29, 14), (33, 11)])
def test_stems_reach_the_trunk_and_miss_no_pixel(size, out):
    kernel, stride, _ = stem_geometry(size, out)
    assert kernel >= stride
    assert DagStem(Task("t", 2, size, 1), 4, out)(torch.zeros(2, 1, size, size)).shape == (2, 4, out, out)


def test_config_survives_json():
    made = config(groups=2)
    assert DagConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow": 5}, r"flow must be in 1\.\.states - 1 = 4, got 5"),
        ({"flow": 0}, r"flow must be in 1\.\.states - 1"),
        ({"channels": 15, "groups": 2}, "channels must be a multiple of groups = 2, got 15"),
        ({"gates": "hard"}, "gates must be 'soft' or 'bare'"),
        ({"trunk_size": 0}, "trunk_size must be at least 1"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_structures_that_do_not_fit_are_refused():
    model = make()
    with pytest.raises(ValueError, match="kept must be part of"):
        model.keep(0, Graph(6, 2).whole())
    nothing = SubGraph(model.graph, (False,) * 7, (True,) * 5, (False,) * 5)
    with pytest.raises(ValueError, match="kept must hold a path"):
        model.keep(0, nothing)
    with pytest.raises(ValueError, match=r"levels must be 7 numbers in 0\.\.1"):
        model.gates.keep(0, model.graph.whole(), [2] * 7)


def test_reduction_of_learned_gates_follows_them():
    gates = TaskGates([0.5] * 4, [0.5] * 4, [0.9 if random.Random(e).random() > 0.5 else 0.1 for e in range(5)])
    kept = reduce(Graph(4, 2), gates, 0.4).kept
    assert sum(kept.edges) == 3
