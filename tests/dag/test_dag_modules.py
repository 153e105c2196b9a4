"""Other edges and stems: residual blocks, elastic edges and their levels, layers of published networks."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.packages import torchvision_models
from den.dag import DagConfig, DagNetwork, SubNetwork, reduce
from den.dag.evaluate import deployed_parameters, task_costs
from den.dag.losses import batch_losses
from den.dag.network import BatchGates
from den.dag.pretrained import make_body
from den.nn.blocks import ElasticBlock
from den.nn.reference import reference_block
from den.nn.task_batch import task_batch
from den.nn.tasks import Task
from den.recipes.dag.levels import choose_levels, random_levels
from den.recipes.dag.recipe import SearchRecipe, load_network, new_network
from den.recipes.dag.search import train
from den.train.engine import Engine
from den_kernels.plan import RoutingPlan
from tests.dag.test_dag_search import three_tasks, tiny  # noqa: F401  a fixture
from tests.small_runs import train_interrupted

TASKS = (Task("a", 3, 8, 1), Task("b", 4, 8, 1))
pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")


def network(groups=1, edge="conv", stages=(), seed=0):
    """A network whose tasks keep different halves of the graph, and of edges with groups some groups."""
    torch.manual_seed(seed)
    model = DagNetwork(DagConfig(TASKS, 5, 2, 8, 4, groups=groups, edge=edge, stages=stages))
    for k in range(2):
        torch.nn.init.normal_(model.gates.gamma[k].data)
        kept = reduce(model.graph, model.gates.of_task(k), 0.4).kept
        model.gates.keep(k, kept, [1 + (e + k) % groups for e in range(7)])
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def images(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 1, 8, 8, generator=generator) for _ in TASKS]


CASES = [(1, "residual", ()), (2, "residual", ()), (1, "residual", (3, 2)), (2, "conv", ()), (4, "conv", (3, 2))]


@pytest.mark.parametrize(("groups", "edge", "stages"), CASES)
def test_a_mixed_batch_gives_what_the_extracted_networks_give(groups, edge, stages):
    model, parts = network(groups, edge, stages), images()
    with torch.no_grad():
        together = model(parts, ["a", "b"])
        for k, (logits, part) in enumerate(zip(together, parts, strict=True)):
            alone = SubNetwork(model, k).eval()
            torch.testing.assert_close(alone(part), logits, rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        trained = model(parts, ["a", "b"])  # the way of training, in eval mode
    for logits, slow in zip(together, trained, strict=True):
        torch.testing.assert_close(slow, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edge", ["conv", "residual"])
def test_costs_are_those_of_the_groups_in_use(edge):
    model = network(2, edge)
    wide = network(2, edge)
    for k in range(2):
        wide.gates.keep(k, model.structure(k))
    for cost, other, k in zip(task_costs(model), task_costs(wide), range(2), strict=True):
        alone = SubNetwork(model, k)
        assert cost.flops < other.flops
        assert cost.parameters == sum(p.numel() for p in alone.parameters()) < other.parameters
        convs = [m for e in alone.edges.values() for m in e.modules() if isinstance(m, torch.nn.Conv2d)]
        edges = sum(2 * 16 * conv.weight.numel() for conv in convs)
        assert cost.flops == edges + alone.stem.flops() + alone.head.flops()
    assert deployed_parameters(model) < deployed_parameters(wide)


def test_a_chain_of_elastic_blocks_is_a_deep_elastic_network_with_levels_for_each_task():
    """With M = 1, read in at the first and read out at the last state only, one plan for the whole batch."""
    torch.manual_seed(0)
    model = DagNetwork(DagConfig(TASKS, 4, 1, 8, 4, groups=2, edge="residual", gates="bare")).eval()
    ends = tuple(j == 0 for j in range(4)), tuple(j == 3 for j in range(4))
    chosen = [[1, 2, 2], [2, 1, 1]]
    for k, levels in enumerate(chosen):
        model.gates.keep(k, dataclasses.replace(model.graph.whole(), read_in=ends[0], read_out=ends[1]), levels)
    assert all(isinstance(edge, ElasticBlock) for edge in model.edges)
    parts = images(2)
    with torch.no_grad():
        gates = model.route(task_batch(parts, ["a", "b"], TASKS, like=model.gates.gamma))
        assert isinstance(gates, BatchGates)
        assert isinstance(gates.plan, RoutingPlan)
        x = torch.cat([stem(part) for stem, part in zip(model.stems, parts, strict=True)])
        wanted = x
        for e, block in enumerate(model.edges):
            wanted = reference_block(block, wanted, torch.tensor([row[e] for row in chosen for _ in range(2)]), 3)
        torch.testing.assert_close(model.trunk(x, gates), wanted, rtol=1e-4, atol=1e-4)


def test_levels_are_random_while_searching_and_as_before_afterwards():
    model = network(4, "conv")
    before, generator = model.gates.edge_levels.clone(), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(20):
        with random_levels(model, generator):
            seen.append(model.gates.edge_levels.clone())
        assert torch.equal(model.gates.edge_levels, before)
    drawn = torch.stack(seen)
    assert ((drawn > 0) == (before > 0)).all()
    assert (drawn <= before).all()
    assert (drawn < before).any(0).equal(before > 1)


@pytest.mark.parametrize("edge", ["conv", "residual"])
def test_a_run_gives_up_the_share_of_groups_and_continues_to_the_same_weights(tmp_path, monkeypatch, edge):
    shape = {"states": 5, "flow": 2, "channels": 8, "trunk_size": 4, "groups": 2, "edge": edge}

    def config(name):
        made = tiny(tmp_path / name)
        changed = dataclasses.replace(made.network, **shape)
        return dataclasses.replace(made, network=changed, reduction=dataclasses.replace(made.reduction, levels=0.25))

    model = train(config("whole"))
    for k in range(3):
        levels = model.gates.edge_levels[k]
        assert (levels > 0).sum() == 4
        assert levels.sum() == 8 - 2  # a quarter of four edges of two groups
    train_interrupted(config("broken"), monkeypatch, 9, train)
    for name, tensor in train(config("broken"), resume=True).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    again = load_network(tmp_path / "whole" / "last.safetensors")
    assert again.config == model.config
    assert torch.equal(again.gates.edge_levels, model.gates.edge_levels)


def test_the_group_that_costs_least_loss_goes(tmp_path):
    config = tiny(tmp_path, network=dataclasses.replace(tiny(tmp_path).network, groups=2))
    config = dataclasses.replace(config, reduction=dataclasses.replace(config.reduction, levels=0.08))  # 1 of 14
    with Engine(config, SearchRecipe) as engine:
        engine.position.phase = 2
        model, stream = engine.model.train(), engine.batches["gates"]
        state = {n: v.clone() if torch.is_tensor(v) else v for n, v in stream.state_dict().items()}
        choose_levels(engine)
        assert model.training
        chosen = model.gates.edge_levels.clone()
        stream.load_state_dict(state)
        batches, losses = [stream.next() for _ in range(2)], []
        for e in range(7):
            model.gates.edge_levels.fill_(2)
            model.gates.edge_levels[:, e] = 1
            with torch.no_grad():
                losses.append(sum(batch_losses(model.eval(), batch)[0] for batch in batches))
    least = torch.stack(losses).argmin(0).tolist()
    assert [row.index(1) for row in chosen.tolist()] == least
    assert chosen.sum(1).tolist() == [13, 13, 13]


def test_networks_that_search_for_nothing_have_no_levels(tmp_path):
    groups = dataclasses.replace(tiny(tmp_path).network, groups=2)
    with pytest.raises(ValueError, match="groups must be 1 where no topology is searched for, got 2 for hard"):
        tiny(tmp_path, network=groups, mode="hard")
    with pytest.raises(ValueError, match="edge must be 'conv' or 'residual', got 'dense'"):
        DagConfig(TASKS, 5, 2, 8, 4, edge="dense")


def torchvision_or_skip():
    """torchvision's models; the test is skipped where these cannot be imported."""
    try:
        return torchvision_models()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")


def test_layers_of_a_published_network_are_a_stem(tmp_path):
    models = torchvision_or_skip()
    name = "torchvision:resnet18:layer1"
    shape = dataclasses.replace(tiny(tmp_path).network, stem=name, pretrained=False)
    config = tiny(tmp_path / "run", {"steps": 2}, network=shape)
    tasks = (Task("a", 3, 32, 1), Task("b", 4, 32, 3))
    model = new_network(config, tasks).eval()
    assert model.config.map_size() == (8, 8)
    whole = models.resnet18().eval()
    whole.load_state_dict(model.stems[1].body.state_dict(), strict=False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = whole.layer1(whole.maxpool(whole.relu(whole.bn1(whole.conv1(x)))))
        torch.testing.assert_close(model.stems[1].features(x), wanted)
        grey = torch.randn(2, 1, 32, 32)
        torch.testing.assert_close(model.stems[0].features(grey), model.stems[0].features(grey.expand(-1, 3, -1, -1)))
        alone = SubNetwork(model, "b").eval()
        torch.testing.assert_close(alone(x), model(x, "b"), rtol=1e-4, atol=1e-4)
    assert model.stems[1].flops() > 2 * 9 * 64 * 64 * 64 * 4
    trained = train(config)
    assert load_network(tmp_path / "run" / "last.safetensors").config == trained.config


def test_stems_that_cannot_be_had_are_explained(monkeypatch):
    with pytest.raises(ValueError, match=r"network\.stem must be conv, torchvision:NAME:LAYER or timm:NAME:STAGE, got"):
        make_body("resnet18", 3, False)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"network\.stem timm:resnet18:2 needs the package timm"):
        make_body("timm:resnet18:2", 3, False)
    torchvision_or_skip()
    with pytest.raises(ValueError, match=r"network\.stem torchvision:resnet9:layer1 must be known to torchvision"):
        make_body("torchvision:resnet9:layer1", 3, False)
