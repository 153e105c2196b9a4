"""States in stages of resolution: the same graph, the same masks, the same sub-networks; one stage is what it was."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from den.dag import DagConfig, DagNetwork, Graph, SubGraph, SubNetwork, reduce
from den.dag.edge import reference_edge
from den.dag.evaluate import deployed_parameters, task_costs
from den.nn.task_batch import task_batch
from den.nn.tasks import Task
from den.report.dag.drawing import graph_figure
from tests.oracle import assert_steps_alike, unlike_new

TASKS = (Task("a", 5, 13, 1), Task("b", 3, 9, 1), Task("c", 7, 13, 3))


def config(**changes):
    return DagConfig(TASKS, **{"states": 6, "flow": 3, "channels": 8, "trunk_size": 9, "stages": (2, 3, 1), **changes})


def make(seed=0, ratio=0.0, **changes):
    """A network with random gates, reduced at random, and batch norms that have seen something."""
    torch.manual_seed(seed)
    model = DagNetwork(config(**changes))
    for logits in (model.gates.alpha, model.gates.beta, model.gates.gamma):
        nn.init.normal_(logits)
    unlike_new(model, 0.3)
    for k in range(len(TASKS) if ratio else 0):
        model.keep(k, reduce(model.graph, model.gates.of_task(k), ratio, ranking="random", seed=seed + k).kept)
    return model


def images(sizes=(3, 2, 4)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, *t.shape, generator=generator) for n, t in zip(sizes, TASKS, strict=True)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def plain_trunk(model, x, tasks):
    """The formulas, one state after the other, in ordinary operations over the whole batch."""
    a, g, b = (rows[tasks] for rows in model.gates.values())
    levels, edges = model.gates.block_levels()[tasks], len(model.edges)
    states, outs = [], {}
    inputs = {0: x}
    for s, ends in enumerate(model.stages, 1):
        inputs[s] = reference_edge(ends.read_in, means(x, 2**s), levels[:, edges + 2 * s - 2])
    for j, s in enumerate(model.graph.stage_of):
        v = a[:, j, None, None, None] * inputs[s]
        for e in model.graph.incoming[j]:
            y = reference_edge(model.edges[e], states[model.graph.edges[e][0]], levels[:, e])
            v = v + g[:, e, None, None, None] / len(model.graph.incoming[j]) * y
        states.append(v)
        outs[s] = outs.get(s, 0) + b[:, j, None, None, None] * v
    out = outs[0]
    for s, ends in enumerate(model.stages, 1):
        out = out + F.interpolate(F.conv2d(outs[s], ends.read_out.weight), size=x.shape[2:], mode="bilinear")
    return out


def means(x, step):
    rows = [x[:, :, r : r + step].mean(2, keepdim=True) for r in range(0, x.shape[2], step)]
    high = torch.cat(rows, 2)
    return torch.cat([high[..., c : c + step].mean(3, keepdim=True) for c in range(0, x.shape[3], step)], 3)


@st.composite
def staged_graphs(draw):
    stages = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    states = max(2, sum(stages))
    stages = stages if sum(stages) == states else (states,)
    return Graph(states, draw(st.integers(1, states - 1)), stages)


@given(staged_graphs())
def test_stages_leave_the_edges_as_they_are(graph):
    N, M = graph.states, graph.flow
    assert graph.edges == Graph(N, M).edges
    assert len(graph.edges) == M * N - M * (M + 1) // 2
    assert [graph.stage_of.count(stage) for stage in range(len(graph.stages))] == list(graph.stages)
    assert list(graph.stage_of) == sorted(graph.stage_of)


@settings(max_examples=12)
@given(staged_graphs(), st.integers(0, 5), st.sampled_from([0.3, 0.6]))
def test_extraction_equals_the_masked_network_for_any_stages(graph, seed, ratio):
    changes = {"states": graph.states, "flow": graph.flow, "stages": graph.stages}
    model, parts = make(seed, ratio, channels=4, trunk_size=5, **changes).eval(), images()
    with torch.no_grad():
        for logits, part, task in zip(model(parts, ["a", "b", "c"]), parts, TASKS, strict=True):
            close(logits, SubNetwork(model, task.name)(part))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(("sizes", "groups"), [((3, 2, 4), 1), ((1, 6, 0), 1), ((3, 2, 4), 2)])
def test_mixed_batch_equals_each_tasks_extracted_network(ratio, sizes, groups):
    model, parts = make(ratio=ratio, groups=groups).eval(), images(sizes)
    with torch.no_grad():
        for logits, part, task in zip(model(parts, ["a", "b", "c"]), parts, TASKS, strict=True):
            if len(part):
                close(logits, SubNetwork(model, task.name)(part))
                close(logits, model(part, task.name))


def test_an_all_ones_mask_is_the_unmasked_network():
    model, parts = make().eval(), images()
    with torch.no_grad():
        before = model(parts, ["a", "b", "c"])
        for k in range(3):
            model.keep(k, model.graph.whole())
        after = model(parts, ["a", "b", "c"])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_a_step_equals_the_formulas_in_ordinary_operations(ratio, training):
    model, tasks = make(seed=3, ratio=ratio).train(training), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    twin = make(seed=3, ratio=ratio).train(training)
    x = torch.randn(9, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    batch = task_batch(images(), ["a", "b", "c"], TASKS, like=model.gates.gamma)
    got, wanted = model.trunk(x, model.route(batch)), plain_trunk(twin, x, tasks)
    assert_steps_alike(model, twin, got, wanted, ("edges", "gates", "stages"))
    for ours, theirs in zip(model.stages.buffers(), twin.stages.buffers(), strict=True):
        if ours.is_floating_point():
            close(ours, theirs)


def test_one_stage_is_the_network_without_stages_to_the_bit():
    plain, staged = make(stages=(), ratio=0.4), make(stages=(6,), ratio=0.4)
    assert plain.config.graph == staged.config.graph
    assert list(plain.state_dict()) == list(staged.state_dict())
    assert not any("stages" in name for name in plain.state_dict())
    for training in (False, True):
        with torch.no_grad():
            pair = [m.train(training)(images(), ["a", "b", "c"]) for m in (plain, staged)]
        assert all(torch.equal(x, y) for x, y in zip(*pair, strict=True))


def test_what_is_not_kept_of_a_stage_is_not_run_and_not_counted():
    """Task a lives in the first stage, b is read out of the second, c is read into it too."""
    model = make().eval()
    edges = model.graph.edges

    def keep(k, chosen, ins, outs):
        flags = (
            tuple(e in chosen for e in edges),
            tuple(j in ins for j in range(6)),
            tuple(j in outs for j in range(6)),
        )
        model.keep(k, SubGraph(model.graph, *flags))

    keep(0, {(0, 1)}, {0}, {1})
    keep(1, {(0, 1), (1, 2)}, {0}, {2})
    keep(2, {(2, 3)}, {2}, {3})
    levels = model.gates.block_levels()[:, len(edges) :]
    assert levels.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
    alone = [SubNetwork(model, k) for k in range(3)]
    assert [(list(each.read_ins), list(each.read_outs)) for each in alone] == [([], []), ([], ["1"]), (["1"], ["1"])]
    parts = images()
    parts[0][:] = torch.nan  # what a drops for itself must not reach the others
    with torch.no_grad():
        together = model(parts, ["a", "b", "c"])
    assert not together[1].isnan().any()
    assert not together[2].isnan().any()
    edge = {(0, 1): 9 * 8 * 8 + 2 * 8, (1, 2): 9 * 8 * 16 + 2 * 16, (2, 3): 9 * 16 * 16 + 2 * 16}
    used = sum(edge.values()) + (8 * 16 + 2 * 16) + 16 * 8  # and the read-in and the read-out of the second stage
    ends = sum(p.numel() for part in (model.stems, model.heads) for p in part.parameters())
    items = sum(len(model.structure(k).items()) for k in range(3))
    assert deployed_parameters(model) == used + ends + items


def test_costs_are_the_multiply_adds_of_the_convolutions():
    model = make(ratio=0.5).eval()
    for k, cost in enumerate(task_costs(model)):
        alone, counted = SubNetwork(model, k), []

        def count(module, inputs, output, counted=counted):
            positions = output[0, 0].numel() if output.dim() == 4 else 1
            counted.append(2 * module.weight.numel() * positions)

        for module in alone.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        alone.train()(images()[k])  # in training mode nothing is folded, so that every convolution is called
        assert cost.flops == sum(counted)


def test_the_drawing_parts_the_stages():
    graph = config().graph
    figure = graph_figure(graph, {"a": graph.whole(), "b": graph.whole()})
    assert [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes] == [[1.5, 4.5]] * 3


def test_config_survives_json():
    made = config(trunk_size=9)
    assert DagConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("stages", [(2, 3), (2, 3, 2), (0, 6), (7, -1)])
def test_stages_that_do_not_fit_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be numbers of at least 1 that add up to states = 6"):
        config(stages=stages)
