"""Networks of every kind of block, against the strict reference and the plain network."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from den import (
    DeepElasticNetwork,
    ModelConfig,
    Task,
    count_flops,
    count_parameters,
    create_model,
    image_flops,
    parameter_fractions,
)
from den.data.batches import Batch
from den.nn.plain import PlainNetwork
from den.nn.reference import reference_estimator
from den.train.objective import initial_structures, structure_costs
from den_kernels import RoutingPlan
from tests.oracle import assert_trained_alike, unlike_new

TASKS = (Task("digits", 10, 8), Task("photos", 5, 20))

CONFIGS = {
    "resnext": ModelConfig(
        TASKS, backbone="resnext11_4x4d", stages=((16, 1), (32, 1), (32, 1)), stem=8, levels=3, trunk_size=8
    ),
    "bottleneck": ModelConfig(
        TASKS, backbone="resnet50_bottleneck", stages=((16, 1), (32, 2)), stem=8, levels=4, trunk_size=8
    ),
    "pairs behind stems": ModelConfig(
        TASKS, backbone="simpleconvnet", stages=((8, 1), (16, 2), (24, 3)), stem=8, levels=3, trunk_size=16
    ),
    "pairs on images": ModelConfig(TASKS, backbone="simpleconvnet", levels=2, trunk_size=20),
    "pairs and layers": ModelConfig(
        TASKS, backbone="simpleconvnet_elastic_fc", stages=((8, 1), (16, 2), (24, 1)), levels=3, trunk_size=20
    ),
}
NAMES = [task.name for task in TASKS]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    """A network whose statistics are no longer those of a new one."""
    torch.manual_seed(0)
    return unlike_new(DeepElasticNetwork(request.param), bias=0.3).eval()


two_kinds = pytest.mark.parametrize(
    "model", [CONFIGS["resnext"], CONFIGS["pairs and layers"]], indirect=True, ids=["resnext", "pairs"]
)


def images(task, count, seed=1):
    generator = torch.Generator().manual_seed(seed + task.size)
    return torch.randn(count, task.channels, task.size, task.size, generator=generator)


def structures(model, count, seed=2):
    return torch.randint(0, model.levels, (count, model.num_blocks), generator=torch.Generator().manual_seed(seed))


def close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


PARTS = [images(task, count) for task, count in zip(TASKS, (4, 3), strict=True)]


@pytest.mark.parametrize("grad", [False, True], ids=["folded", "composed"])
def test_inference_equals_the_reference(model, grad):
    levels = structures(model, 7)
    with torch.set_grad_enabled(grad):
        logits = model.estimator(PARTS, NAMES, levels)
    for got, expected in zip(logits, reference_estimator(model.estimator, PARTS, [0, 1], levels), strict=True):
        close(got.detach(), expected.detach())


def test_training_equals_the_reference_with_statistics_and_gradients(model):
    model = model.double().train()
    oracle = copy.deepcopy(model)
    levels, parts = structures(model, 7), [part.double() for part in PARTS]
    losses = []
    for logits in (
        model.estimator(parts, NAMES, levels),
        reference_estimator(oracle.estimator, parts, [0, 1], levels),
    ):
        losses.append(sum(F.cross_entropy(part, torch.arange(len(part))) for part in logits))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    assert_trained_alike(model.estimator, oracle.estimator, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_batches_of_every_form_agree(model):
    levels = structures(model, 7)
    for got, part, name, rows in zip(
        model.estimator(PARTS, NAMES, levels), PARTS, NAMES, levels.split([4, 3]), strict=True
    ):
        close(got, model.estimator(part, name, rows))
        plan = RoutingPlan.from_levels(rows + model.estimator.lowest, groups=model.estimator.groups)
        close(got, model.estimator(part, name, plan))
    logits, chosen = model(PARTS, NAMES, return_levels=True)
    for got, part, name, rows in zip(logits, PARTS, NAMES, chosen.split([4, 3]), strict=True):
        close(got, model.estimator(part, name, rows))
        assert torch.equal(rows, model.select(part, name))
    assert model(PARTS[0][:0], "digits").shape == (0, 10)


@torch.no_grad()
def test_tasks_per_instance_share_one_plan():
    tasks = (Task("coarse", 3, 8), Task("fine", 7, 8))
    model = create_model("simpleconvnet", tasks, levels=2, trunk_size=16).eval()
    x, task, levels = images(tasks[0], 5), torch.tensor([1, 0, 1, 1, 0]), structures(model, 5)
    got = model.estimator(x, task, levels)
    for b in range(5):
        alone = model.estimator(x[b : b + 1], int(task[b]), levels[b : b + 1])
        close(got[b : b + 1, : alone.shape[1]], alone)


@torch.no_grad()
def test_the_plain_network_is_the_full_structure(model):
    full = torch.full((3, model.num_blocks), model.levels - 1)
    expected = model.estimator(PARTS[1], "photos", full)
    close(PlainNetwork(model, "photos")(PARTS[1]), expected)
    close(model.estimator(PARTS[1], "photos"), expected)
    with torch.enable_grad():
        close(model.estimator(PARTS[1], "photos").detach(), expected)


@torch.no_grad()
def test_images_are_left_alone(model):
    x = PARTS[1].contiguous(memory_format=torch.channels_last)
    before = x.clone()
    model(x, "photos")
    PlainNetwork(model, "photos")(x)
    assert torch.equal(x, before)


@torch.no_grad()
def test_config_and_state_rebuild_the_network(model):
    config = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert config == model.config
    twin = DeepElasticNetwork(config).eval()
    twin.load_state_dict(model.state_dict())
    for got, expected in zip(twin(PARTS, NAMES), model(PARTS, NAMES), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_runs(model, grad):
    levels = structures(model, 7)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        logits = model.estimator(PARTS, NAMES, levels)
    for got, expected in zip(logits, reference_estimator(model.estimator, PARTS, [0, 1], levels), strict=True):
        scale = expected.detach().abs().max()
        assert (got.detach().float() - expected.detach()).abs().max() < 0.05 * scale + 0.02


@two_kinds
@torch.no_grad()
def test_the_network_compiles_whole_and_exports(model):
    class Photos(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, "photos", return_levels=True)

    expected = model(PARTS[1], "photos", return_levels=True)
    whole = torch.compile(Photos().eval(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Photos().eval(), (PARTS[1],)).module()
    for run in (whole, exported):
        logits, levels = run(PARTS[1])
        close(logits, expected[0])
        assert torch.equal(levels, expected[1])


def test_costs_are_those_of_the_levels(model):
    lowest, full = torch.zeros(1, model.num_blocks).long(), torch.full((1, model.num_blocks), model.levels - 1)
    shapes = model.config.shapes
    assert count_flops(model, full).item() == image_flops(model, "digits").blocks
    assert count_flops(model, lowest).item() == sum(shape.flops(shape.widths(model.levels)[0]) for shape in shapes)
    assert (count_flops(model, lowest).item() > 0) == bool(model.estimator.lowest)
    if model.config.backbone != "resnet50_bottleneck":  # there the 3x3 weights go with the square of the width
        assert parameter_fractions(model).tolist() == [list(model.config.level_fractions)] * model.num_blocks
    counts = count_parameters(model)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.blocks == sum(shape.parameters(shape.hidden) for shape in shapes)


def test_flops_follow_the_layers_that_a_full_network_runs(model):
    seen = []
    convs = [conv for block in model.estimator.blocks for conv, _ in block.layers()]
    linears = [layer for layer in model.estimator.shared if isinstance(layer, torch.nn.Linear)]
    for layer in [*convs, *linears, model.estimator.heads[0]]:
        layer.register_forward_hook(lambda layer, _, y: seen.append(2 * layer.weight.numel() * y[0, 0].numel()))
    model.estimator(PARTS[0], "digits")  # with gradients on, every layer is a module call
    cost = image_flops(model, "digits")
    assert sum(seen) == cost.blocks + cost.head
    assert cost.selector <= 0.05 * cost.blocks or model.config.selector.channels[0] == 8


def test_the_objective_takes_the_levels_as_they_are(model):
    """Equation 8's full structure is the full network, and R(z) of equation 6 counts what each level uses."""
    batch = Batch(tuple(NAMES), PARTS, [torch.zeros(4).long(), torch.zeros(3).long()])
    drawn = initial_structures(7, model.num_blocks, model.levels, 1.0, torch.Generator().manual_seed(0))
    assert (drawn == model.levels - 1).all()
    samples = torch.stack([drawn, torch.zeros_like(drawn)], 1)
    penalties = structure_costs(model, batch, samples, 2.0) - structure_costs(model, batch, samples, 1.0)
    least = parameter_fractions(model)[:, 0].mean().square().item()
    close(penalties, torch.tensor([[1.0, least]]).expand(7, 2))
    expected = [F.cross_entropy(p, y) for p, y in zip(model.estimator(PARTS, NAMES), batch.labels, strict=True)]
    close(structure_costs(model, batch, samples, 0.0)[:4, 0].mean(), expected[0].detach())


@two_kinds
def test_a_few_steps_reduce_the_loss(model):
    model.train()
    labels = [torch.arange(4) % 2, torch.arange(3) % 2]
    optimizer = torch.optim.SGD(model.estimator.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(6):
        logits = model.estimator(PARTS, NAMES, structures(model, 7, seed=2))
        loss = sum(F.cross_entropy(part, label) for part, label in zip(logits, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_vgg16_runs_whole():
    model = create_model("vgg16", (Task("cifar10", 10, 32),), levels=3).eval()
    assert model.num_blocks == 6
    with torch.no_grad():
        logits, levels = model(torch.randn(2, 3, 32, 32), "cifar10", return_levels=True)
    assert logits.shape == (2, 10)
    assert levels.shape == (2, 6)
