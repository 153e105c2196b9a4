"""Counts: the paper's numbers, and the same from the modules themselves."""

import pytest
import torch

from den import ModelConfig, Task, count_flops, count_parameters, create_model, image_flops, parameter_fractions
from den.nn.backbones import named_backbone
from den.nn.levels import level_widths
from den.nn.model import DeepElasticNetwork

M1 = (Task("cifar100", 100, 32), Task("tiny_imagenet", 200, 64), Task("stl10", 10, 96))
THIN = ModelConfig(
    (Task("digits", 10, 8, channels=1), Task("fashion", 10, 28, channels=1)),
    backbone="wrn",
    stages=((32, 2), (64, 2), (128, 2)),
    trunk_size=16,
)


@pytest.fixture(scope="module", params=["wrn32_4", "resnet42"])
def named(request):
    with torch.device("meta"):
        return request.param, create_model(request.param, M1)


@pytest.fixture(scope="module")
def thin():
    return DeepElasticNetwork(THIN)


@pytest.mark.parametrize(
    ("name", "parameters", "flops"), [("wrn32_4", 7_345_152, 2_132_803_584), ("resnet42", 29_786_112, 2_906_652_672)]
)
def test_block_counts_are_the_papers(name, parameters, flops):
    model = create_model(name, M1[:1])
    assert count_parameters(model).blocks == parameters
    full = torch.full((1, model.num_blocks), model.levels - 1)
    assert count_flops(model, full).tolist() == [flops]
    assert image_flops(model, "cifar100").blocks == flops


def test_the_selector_is_never_larger_than_the_papers(named):
    name, model = named
    parameters, flops = {"wrn32_4": (0.37e6, 0.11e9), "resnet42": (1.49e6, 0.15e9)}[name]
    assert count_parameters(model).selector <= parameters
    assert max(image_flops(model, task).selector for task in M1) <= flops


def test_the_selector_of_a_thin_network_is_thin(thin):
    for task in thin.tasks:
        cost = image_flops(thin, task)
        assert cost.selector <= 0.05 * cost.blocks


def test_parameter_counts_add_up_to_all_parameters(named, thin):
    for model in (named[1], thin):
        counts = count_parameters(model)
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
        assert counts.estimator == sum(parameter.numel() for parameter in model.estimator.parameters())


def test_flops_follow_the_convolutions_that_a_full_network_runs(thin):
    seen = []

    def note(conv, _, y):
        seen.append(2 * conv.weight.numel() * y.shape[2] * y.shape[3])

    hooks = [conv.register_forward_hook(note) for block in thin.estimator.blocks for conv in (block.conv1, block.conv2)]
    thin.eval()
    thin.estimator(torch.zeros(1, 1, 8, 8), "digits", None)  # with gradients on, every convolution is a module call
    for hook in hooks:
        hook.remove()
    assert sum(seen) == image_flops(thin, "digits").blocks


def test_selector_flops_follow_its_modules(thin):
    seen = []

    def note(layer, _, y):
        seen.append(2 * layer.weight.numel() * y[0, 0].numel())

    layers = [m for m in thin.selector.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    thin.selector.eval()(torch.zeros(1, 1, 28, 28), "fashion")
    for hook in hooks:
        hook.remove()
    assert sum(seen) == image_flops(thin, "fashion").selector


def test_flops_of_any_structure_add_up_over_its_blocks(thin):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, thin.levels, (7, thin.num_blocks), generator=generator, dtype=torch.int32)
    expected = [
        sum(shape.flops(level_widths(shape.channels, 4)[level]) for shape, level in zip(THIN.shapes, row, strict=True))
        for row in levels.tolist()
    ]
    got = count_flops(thin, levels)
    assert got.dtype == torch.float64
    assert got.tolist() == expected


def test_level_zero_costs_nothing_and_an_empty_batch_is_fine(thin):
    assert count_flops(thin, torch.zeros(2, thin.num_blocks, dtype=torch.long)).tolist() == [0, 0]
    assert count_flops(thin, torch.zeros(0, thin.num_blocks, dtype=torch.long)).shape == (0,)


def test_parameter_fractions_are_those_of_the_levels(thin):
    fractions = parameter_fractions(thin)
    assert fractions.tolist() == [[0, 0.25, 0.5, 1]] * thin.num_blocks


def test_counts_survive_a_change_of_dtype(thin):
    levels = torch.full((1, thin.num_blocks), 2)
    before = count_flops(thin, levels)
    half = DeepElasticNetwork(THIN).bfloat16()
    assert torch.equal(count_flops(half, levels), before)


@pytest.mark.parametrize("levels", [torch.zeros(2, 5).long(), torch.zeros(6).long(), torch.zeros(2, 6)], ids=str)
def test_levels_that_do_not_fit_are_refused(thin, levels):
    with pytest.raises(ValueError, match=r"count_flops: levels must be integer \[B, N\] with N = 6"):
        count_flops(thin, levels)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("wrn32_4", ((64, 5), (128, 5), (256, 5))),
        ("wrn14_2", ((32, 2), (64, 2), (128, 2))),
        ("wrn8_1", ((16, 1), (32, 1), (64, 1))),
        ("resnet42", ((64, 5), (128, 5), (256, 5), (512, 5))),
        ("resnet18", ((64, 2), (128, 2), (256, 2), (512, 2))),
        ("resnet50", ((256, 3), (512, 4), (1024, 6), (2048, 3))),
    ],
)
def test_names_give_stages(name, stages):
    assert named_backbone(name).stages == stages


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn28_10", "got 28; nearest: 26 and 32"),
        ("wrn2_1", "got 2; nearest: 8"),
        ("resnet40", "got 40; nearest: 34 and 42"),
        ("vgg11", "backbone must be wrn.* simpleconvnet, .* got .vgg11."),
        ("wrn32_0", "width must be at least 1"),
    ],
)
def test_names_that_do_not_fit_say_what_would(name, message):
    with pytest.raises(ValueError, match=message):
        named_backbone(name)


def test_a_resnet50_of_before_keeps_its_basic_blocks():
    """Older checkpoints, whose configurations say their stages, had basic blocks under this name."""
    before = ((64, 6), (128, 6), (256, 6), (512, 6))
    old = ModelConfig((Task("a", 10, 32),), backbone="resnet50", stages=before, stem=64)
    assert {type(shape).__name__ for shape in old.shapes} == {"ResidualShape"}
    new = ModelConfig((Task("a", 10, 32),), backbone="resnet50")
    assert {type(shape).__name__ for shape in new.shapes} == {"BottleneckShape"}
