"""The selector: its distributions, its size, its place in the network."""

import pytest
import torch

from den import Selector, SelectorConfig, Task
from den.nn.backbones import named_backbone
from den.nn.block_lists import block_shapes
from den.nn.ends import FeatureNorm
from den.nn.selector import default_selector

TASKS = (Task("digits", 10, 8, channels=1), Task("fashion", 10, 28, channels=1), Task("photos", 3, 40))


@pytest.fixture
def selector():
    torch.manual_seed(0)
    return Selector(TASKS, SelectorConfig((8, 16, 16)), num_blocks=5, levels=4, trunk_size=16)


def images(task, count, seed=1):
    return torch.randn(count, task.channels, task.size, task.size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_logits_have_a_row_per_block_and_start_near_uniform(selector, task):
    logits = selector(images(task, 6), task.name)
    assert logits.shape == (6, 5, 4)
    probabilities = logits.softmax(-1)
    assert (probabilities - 0.25).abs().max() < 0.1


def test_folded_inference_equals_the_modules(selector):
    for _ in range(3):
        selector([images(task, 4, seed) for seed, task in enumerate(TASKS)], [task.name for task in TASKS])
    selector.eval()
    for task in TASKS:
        plain = selector(images(task, 5), task)
        with torch.no_grad():
            folded = selector(images(task, 5), task)
        assert plain.requires_grad
        assert not folded.requires_grad
        torch.testing.assert_close(folded, plain.detach(), rtol=1e-5, atol=1e-6)


def test_mixed_batch_equals_the_tasks_one_by_one(selector):
    selector.eval()
    parts = [images(task, count) for task, count in zip(TASKS, (3, 0, 2), strict=True)]
    mixed = selector(parts, [0, 1, 2])
    apart = torch.cat([selector(part, k) for k, part in enumerate(parts)])
    torch.testing.assert_close(mixed, apart, rtol=1e-5, atol=1e-6)


def test_tasks_per_instance_keep_the_callers_order(selector):
    tasks = (Task("coarse", 20, 8), Task("fine", 100, 8))
    selector = Selector(tasks, SelectorConfig((8, 8)), num_blocks=2, levels=3, trunk_size=8).eval()
    x = images(tasks[0], 5)
    chosen = torch.tensor([1, 0, 0, 1, 0])
    apart = torch.stack([selector(x[b : b + 1], int(chosen[b]))[0] for b in range(5)])
    torch.testing.assert_close(selector(x, chosen), apart, rtol=1e-5, atol=1e-6)


def test_every_parameter_of_the_tasks_in_use_learns(selector):
    parts = [images(task, 3) for task in TASKS[:2]]
    selector(parts, ["digits", "fashion"]).square().sum().backward()
    unused = {name for name, parameter in selector.named_parameters() if parameter.grad is None}
    assert unused == {name for name, _ in selector.named_parameters() if name.startswith(("stems.2.", "heads.2."))}


@pytest.mark.parametrize("affine", [False, True])
def test_features_of_one_image_are_normed_with_the_running_statistics(affine):
    norm = FeatureNorm(4, affine=affine)
    norm(torch.randn(9, 4))
    kept = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    one = torch.randn(1, 4)
    trained = norm(one)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in norm.state_dict().items())
    torch.testing.assert_close(trained, norm.eval()(one))
    assert norm.train()(one[:0]).shape == (0, 4)


@pytest.mark.parametrize("name", ["wrn32_4", "wrn14_2", "wrn8_1", "resnet42"])
@pytest.mark.parametrize("trunk_size", [8, 16, 32])
def test_the_default_keeps_to_five_percent(name, trunk_size):
    backbone = named_backbone(name)
    shapes = block_shapes(backbone.stages, backbone.stem, trunk_size)
    config = default_selector(TASKS, shapes)
    assert config.flops(3, trunk_size) <= 0.05 * sum(shape.flops(shape.channels) for shape in shapes)


@pytest.mark.parametrize("channels", [(), (0,), (8, -1), (1.5,)])
def test_bad_channels_are_refused(channels):
    with pytest.raises(ValueError, match="channels must be whole numbers of at least 1"):
        SelectorConfig(channels)
