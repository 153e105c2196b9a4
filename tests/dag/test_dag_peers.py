"""What the DAG networks are compared with: single-task and cross-stitch networks, AdaShare; and mixed precision."""

import dataclasses

import pytest
import torch

from den.dag import DagConfig, DagNetwork, Graph
from den.dag.config import DagReportConfig, PeerConfig
from den.dag.evaluate import deployed_parameters, evaluate_tasks, task_costs
from den.dag.gates import Gates
from den.dag.losses import batch_losses
from den.dag.peers import CrossStitchNetwork, SeparateNetworks
from den.nn.tasks import Task
from den.recipes.dag import recipe
from den.recipes.dag.adashare import adashare_step, draw_policies, edge_weights, keep_edges, logistic_noise
from den.recipes.dag.recipe import SearchRecipe, load_network, new_network
from den.recipes.dag.search import train
from den.report.dag.report import report
from den.train.engine import Engine
from den.train.folder import read_metrics
from tests.dag.test_dag_search import three_tasks, tiny  # noqa: F401  a fixture
from tests.small_runs import assert_same_weights, train_interrupted

TASKS = (Task("a", 3, 8, 1), Task("b", 4, 8, 1), Task("c", 3, 8, 1))
CONFIG = DagConfig(TASKS, states=4, flow=2, channels=8, trunk_size=4)


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 1, 8, 8, generator=generator) for _ in TASKS]


@pytest.mark.parametrize("mode", ["single", "cross-stitch", "adashare"])
def test_runs_train_continue_and_are_reported(tmp_path, monkeypatch, mode):
    config = tiny(tmp_path / "whole", {"steps": 6}, mode=mode)
    whole = train(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    train_interrupted(broken, monkeypatch, 4, train)
    assert_same_weights(train(broken, resume=True), whole)
    text = report(DagReportConfig(runs=(tmp_path / "whole",)))
    title = {"single": "single-task networks", "cross-stitch": "Cross-stitch", "adashare": "AdaShare"}[mode]
    assert f"### {title}, 6 updates, seed 0" in text
    again = load_network(tmp_path / "whole" / "last.safetensors")
    assert type(again) is type(whole)


def test_single_task_networks_are_networks_of_one_task():
    torch.manual_seed(0)
    model = SeparateNetworks(CONFIG).eval()
    parts = images()
    with torch.no_grad():
        for k, (logits, part) in enumerate(zip(model(parts, ["a", "b", "c"]), parts, strict=True)):
            torch.testing.assert_close(logits, model.networks[k](part, TASKS[k].name))
    costs = task_costs(model)
    assert deployed_parameters(model) == sum(cost.parameters for cost in costs)
    logits = model.train()(parts, ["a", "b", "c"])
    logits[1].sum().backward()
    assert all(p.grad is None for k in (0, 2) for p in model.networks[k].parameters())


def columns_as_networks(model):
    """Networks of one task each that hold the columns of a cross-stitch network."""
    C, alone = CONFIG.channels, []
    for k, task in enumerate(TASKS):
        network = DagNetwork(dataclasses.replace(CONFIG, tasks=(task,), gates="bare")).eval()
        network.stems[0].load_state_dict(model.stems[k].state_dict())
        network.heads[0].load_state_dict(model.heads[k].state_dict())
        column = slice(k * C, (k + 1) * C)
        for edge, conv, norm in zip(network.edges, model.convs, model.norms, strict=True):
            edge.conv.weight.data.copy_(conv.weight[column])
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(edge.norm, name).data.copy_(getattr(norm, name)[column])
        alone.append(network)
    return alone


def cross_stitch(seed=0):
    torch.manual_seed(seed)
    model = CrossStitchNetwork(CONFIG).eval()
    for norm in model.norms:
        torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def test_columns_without_stitches_are_plain_networks():
    model, parts = cross_stitch(), images()
    model.stitches.data.copy_(torch.eye(3)[:, :, None].expand_as(model.stitches))
    with torch.no_grad():
        together = model(parts, ["a", "b", "c"])
        for logits, network, part in zip(together, columns_as_networks(model), parts, strict=True):
            torch.testing.assert_close(logits, network(part, 0), rtol=1e-4, atol=1e-5)


def test_a_stitch_mixes_the_columns_channel_by_channel():
    x = torch.randn(2, 24, 4, 4)
    model = CrossStitchNetwork(DagConfig(TASKS, states=2, flow=1, channels=8, trunk_size=4)).eval()
    torch.testing.assert_close(model.stitches[0, :, :, 5].detach(), torch.full((3, 3), 0.05).fill_diagonal_(0.9))
    with torch.no_grad():
        torch.nn.init.uniform_(model.stitches)
        model.norms[0].weight.zero_()
        model.norms[0].bias.zero_()  # the second state is then x alone
        columns = x.unflatten(1, (3, 8))
        wanted = torch.zeros_like(columns)
        for j in range(2):
            for t in range(3):
                for s in range(3):
                    wanted[:, t] += model.stitches[j, t, s][:, None, None] * columns[:, s]
        torch.testing.assert_close(model.trunk(x), wanted)


def test_stitches_learn_faster_and_without_decay(tmp_path):
    config = tiny(tmp_path, mode="cross-stitch", peers=PeerConfig(stitch_rate=7.0))
    with Engine(config, SearchRecipe) as engine:
        for name in ("warm-up", "search"):  # no steps
            list(engine.phase(name))
        next(engine.phase("fine-tuning"))
        first, second = engine.optimisers["weights"].param_groups
    assert second["lr"] == pytest.approx(7 * first["lr"])
    assert second["weight_decay"] == 0
    assert [p.shape[0] for p in second["params"]] == [5]


def test_cross_stitch_refuses_images_of_several_shapes():
    tasks = (*TASKS[:2], Task("c", 3, 10, 1))
    with pytest.raises(ValueError, match="CrossStitchNetwork: tasks must classify images of one shape"):
        CrossStitchNetwork(dataclasses.replace(CONFIG, tasks=tasks))


def test_drawn_gates_are_gumbel_softmax_samples():
    """Two logits and Gumbel noise on each, in the long form, make the same distribution: its mean and its spread."""
    gates, generator = Gates(Graph(4, 2), 400), torch.Generator().manual_seed(0)
    gates.gamma.data.fill_(0.7)
    with gates.drawn(logistic_noise(gates.gamma, generator), 0.5):
        ones, ours, _ = gates.values()
    gumbel = -torch.rand(2, 400, 5, generator=generator).log().neg().log().neg()
    both = torch.stack([gumbel[0] + 0.7, gumbel[1]]) / 0.5
    theirs = both.softmax(0)[0]
    assert ones.eq(1).all()
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.03)
    assert ours.std().item() == pytest.approx(theirs.std().item(), abs=0.03)
    assert gates.values()[1].unique().tolist() == pytest.approx([torch.tensor(0.7).sigmoid().item()])


def test_adashare_lets_tasks_part_late():
    assert edge_weights(Graph(4, 2), torch.ones(())).tolist() == [0.75, 0.5, 0.5, 0.25, 0.25]  # (0,1) (0,2) (1,2) ...


def test_adashare_learns_the_policy_from_the_other_half_and_cools(tmp_path, monkeypatch):
    seen, measured = [], []
    original = Gates.drawn

    def spy(gates, noise, temperature, first=0):
        (seen if noise.any() else measured).append(temperature)
        return original(gates, noise, temperature, first)

    monkeypatch.setattr(Gates, "drawn", spy)
    config = tiny(tmp_path, {"steps": 10, "shares": (0.0, 0.9, 0.1)}, mode="adashare")
    train(config)
    assert seen == pytest.approx([5 * 0.965**r for r in (0, 1, 2) for _ in range(6)])
    assert measured == pytest.approx([5 * 0.965**r for r in (1, 2, 3)])  # epochs are, without noise, as they train
    assert [line["stage"] for line in read_metrics(tmp_path)][-1] == "fine-tuning"
    searched = load_network(tmp_path / "searched.safetensors")
    assert searched.gates.gamma.abs().min() > 0
    assert searched.gates.alpha.abs().max() == 0


def test_adashare_learns_the_last_states_edges_first(tmp_path):
    config = tiny(tmp_path, {"steps": 12, "shares": (0.0, 1.0, 0.0)}, mode="adashare")
    with Engine(config, SearchRecipe) as engine:
        list(engine.phase("warm-up"))
        edges, learned = engine.model.graph.edges, []
        for batch in engine.phase("search"):
            before = engine.model.gates.gamma.detach().clone()
            adashare_step(engine, batch)
            moved = (engine.model.gates.gamma != before).all(0)
            assert torch.equal(moved, (engine.model.gates.gamma != before).any(0))
            learned.append({edges[e][1] for e in moved.nonzero().flatten().tolist()})
    assert learned[:6:2] == [{4}, {3, 4}, {2, 3, 4}]  # of five states, the first of which no edge leads to
    assert learned[5:] == [{1, 2, 3, 4}] * 7


def test_of_several_draws_each_task_keeps_the_one_of_lowest_loss(tmp_path):
    config = tiny(tmp_path, mode="adashare", peers=PeerConfig(draws=5))
    with Engine(config, SearchRecipe) as engine:
        engine.position.phase = 1
        engine.model.train()
        adashare_step(engine, engine.batches["weights"].next())
        trained = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
        generator, run = torch.Generator().manual_seed(config.seed), engine.model.gates.gamma.sigmoid()
        draws, losses = [torch.rand(run.shape, generator=generator) < run for _ in range(5)], []
        for kept in draws:
            keep_edges(engine.model, kept)
            results = evaluate_tasks(engine.model, engine.batches["gates"].sets)
            losses.append([results[task.name].loss for task in engine.model.tasks])
        engine.model.load_state_dict(trained)
        draw_policies(engine)
        for k, of_task in enumerate(zip(*losses, strict=True)):
            assert len(set(of_task)) > 1
            best = draws[of_task.index(min(of_task))][k]
            assert engine.model.gates.structure(k).edges == tuple(best.tolist())


def test_drawn_policies_begin_the_weights_anew_and_keep_a_path(tmp_path):
    config = tiny(tmp_path, mode="adashare")
    with Engine(config, SearchRecipe) as engine:
        engine.position.phase = 1
        engine.model.train()
        adashare_step(engine, engine.batches["weights"].next())
        engine.model.gates.gamma.data[0] = -30.0  # this task runs no edge
        draw_policies(engine)
        fresh = new_network(config, engine.model.tasks)
        for (name, a), b in zip(engine.model.named_parameters(), fresh.parameters(), strict=True):
            assert name.startswith("gates.") or torch.equal(a, b), name
        assert sum(engine.model.structure(0).edges) == 0
        assert engine.model.structure(0).has_path()
        assert engine.model.config.gates == "bare"


@pytest.mark.parametrize("mode", ["dag", "cross-stitch"])
def test_bfloat16_trains_float32_weights(tmp_path, monkeypatch, mode):
    dtypes = []

    def watched(model, batch):
        dtypes.append(model(batch.images, batch.tasks)[0].dtype)
        return batch_losses(model, batch)

    monkeypatch.setattr(recipe, "batch_losses", watched)
    model = train(tiny(tmp_path, {"steps": 4, "shares": (0.25, 0.5, 0.25)}, mode=mode, precision="bfloat16"))
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["temperature", "cooling", "sparsity", "sharing", "stitch_rate"])
def test_settings_of_peers_are_checked(tmp_path, name):
    with pytest.raises(ValueError, match=f"config: peers.{name} must be"):
        tiny(tmp_path, peers=PeerConfig(**{name: -1.0}))


def test_single_task_networks_of_dense_tasks_and_no_stitches_for_them():
    tasks = (Task("labels", 5, 16, 3, "segmentation", 24), Task("depth", 1, 16, 3, "depth", 24))
    config = DagConfig(tasks, states=3, flow=1, channels=8, trunk_size=(4, 6))
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        outputs = SeparateNetworks(config).eval()([x, x], ["labels", "depth"])
    assert [tuple(output.shape) for output in outputs] == [(2, 5, 16, 24), (2, 1, 16, 24)]
    with pytest.raises(ValueError, match="tasks must classify images of one shape"):
        CrossStitchNetwork(config)
