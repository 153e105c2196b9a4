"""The selector's other forms: residual as the paper's, one head for all tasks, on the estimator's stems; old ones."""

import dataclasses
import itertools

import pytest
import torch

from den import ModelConfig, SelectorConfig, Task
from den.evaluate.operating import flops_costs, steered
from den.nn.model import DeepElasticNetwork
from den.nn.selector import Selector, paper_selector
from den.recipes.setup import network_settings, new_model
from den.train.config import EstimatorTraining, NetworkConfig, TrainConfig

TASKS = (Task("a", 5, 16), Task("b", 3, 8))


def network(**changes):
    torch.manual_seed(0)
    config = ModelConfig(TASKS, backbone="wrn8_1", trunk_size=8, selector=SelectorConfig((8, 12), **changes))
    return DeepElasticNetwork(config).eval()


def images(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, task.channels, task.size, task.size, generator=generator) for task in TASKS]


FORMS = [
    {"residual": residual, "shared_head": shared, "reads": reads}
    for residual, shared, reads in itertools.product((False, True), (False, True), ("images", "stem"))
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_every_form_chooses_learns_counts_and_is_rebuilt(form):
    model = network(**form)
    logits = model.selector_logits(images(), ["a", "b"])
    assert logits.shape == (8, 3, 4)
    _, levels = model(images(), ["a", "b"], return_levels=True)
    assert torch.equal(levels, logits.argmax(-1))
    model.train()
    model.selector_logits(images(), ["a", "b"]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.selector.parameters())
    assert all(parameter.grad is None for parameter in model.estimator.parameters())
    assert (len(model.selector.stems), len(model.selector.heads)) == (
        0 if form["reads"] == "stem" else 2, 1 if form["shared_head"] else 2,
    )  # fmt: skip
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, _, y: seen.append(2 * m.weight.numel() * y[0, 0].numel()))
        for module in model.selector.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    model.selector_logits([images()[0]], ["a"])
    [hook.remove() for hook in hooks]
    assert model.selector.flops(0) == sum(seen) + 2 * model.selector.head(0).weight.numel()
    again = DeepElasticNetwork(ModelConfig.from_dict(model.config.to_dict()))
    again.load_state_dict(model.state_dict())
    model.eval()
    torch.testing.assert_close(
        again.eval().selector_logits(images(), ["a", "b"]), model.selector_logits(images(), [0, 1])
    )


@pytest.mark.parametrize(
    ("name", "tasks", "levels", "parameters", "flops"),
    [
        ("wrn32_4", 3, 4, 0.37e6, 0.11e9),
        ("resnet42", 3, 4, 1.49e6, 0.15e9),
        ("vgg19", 1, 3, 3.9e6, None),
        ("resnext29_8x64d_narrow", 1, 4, 3.6e6, None),
        ("simpleconvnet", 10, 2, 0.4e6, None),
    ],
)
def test_the_papers_selector_has_the_papers_size(name, tasks, levels, parameters, flops):
    made = tuple(Task(str(k), 10, size) for k, size in zip(range(tasks), (32, 64, 84, *[84] * 9), strict=False))
    config = ModelConfig(made, backbone=name, levels=levels, trunk_size=84 if name == "simpleconvnet" else 32)
    selector = Selector(made, paper_selector(name), len(config.shapes), levels, config.selector_size)
    assert sum(p.numel() for p in selector.parameters()) == pytest.approx(parameters, rel=0.05)
    if flops:
        assert selector.flops(0) == pytest.approx(flops, rel=0.07)


def test_a_shared_head_is_steered_task_by_task():
    model = network(shared_head=True)
    costs = {task.name: flops_costs(model) for task in TASKS}
    point = steered(model, costs, {"a": 100.0, "b": -100.0})
    cheap, dear = (point.select(part, task.name) for part, task in zip(images(), TASKS, strict=True))
    assert (cheap.max().item(), dear.min().item()) == (0, 3)
    assert len(model.selector.heads) == 1  # the network itself is as it was


def test_a_selector_of_before_has_the_old_form():
    config = ModelConfig(TASKS, backbone="wrn8_1", trunk_size=8).to_dict()
    config["selector"] = {"channels": config["selector"]["channels"]}
    del config["joint"]
    model = DeepElasticNetwork(ModelConfig.from_dict(config))
    assert (len(model.selector.stems), len(model.selector.heads), model.config.joint) == (2, 2, False)


def test_a_selector_that_begins_the_estimator_tells_images_apart():
    plain = TrainConfig(network=NetworkConfig("wrn8_1", trunk_size=8))
    begins = dataclasses.replace(plain, estimator=EstimatorTraining(initial="selector"))
    spread = []
    for config in (plain, begins):
        model = new_model(network_settings(config), list(TASKS), seed=0).train()
        chance = model.selector_logits(images(32), ["a", "b"]).softmax(-1)
        spread.append((chance - 0.25).abs().mean().item())
    assert spread[1] > 5 * spread[0]


def test_xavier_is_everywhere():
    model = new_model(NetworkConfig("wrn8_1", trunk_size=8, start="xavier"), list(TASKS), seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.weight.numel() > 500:
            fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(module.weight)
            assert module.weight.abs().max() <= (6 / (fan_in + fan_out)) ** 0.5 + 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": "nothing"}, "reads must be images or stem"),
        ({"heads": "large"}, "heads must be near-uniform or xavier"),
    ],
)
def test_words_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SelectorConfig((8,), **changes)


def test_a_stem_that_there_is_not_cannot_be_read():
    with pytest.raises(ValueError, match="backbone must have stems for a selector that reads them"):
        new_model(NetworkConfig("simpleconvnet", levels=2, trunk_size=16, selector_reads="stem"), [Task("a", 5, 16)], 0)
