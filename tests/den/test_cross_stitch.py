"""Cross-stitch networks: plain copies when nothing is mixed, the mixture by hand, counts."""

import pytest
import torch

from den import create_model
from den.data import load_set
from den.evaluate.accuracy import full_flops
from den.evaluate.timing import time_per_image
from den.nn.count import count_parameters, image_flops
from den.nn.estimator import Estimator
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.nn.tasks import Task
from den.recipes import method_of
from den.recipes.cross_stitch import Stitch, StitchedEstimator, thinner
from den.recipes.setup import estimator_optimiser
from den.train.config import EstimatorTraining, MethodConfig
from tests.small_runs import small_config

TASKS = (Task("a", 3, 8, 1), Task("b", 4, 12), Task("c", 5, 8, 1))


def config_of(tasks=TASKS, **changes):
    return ModelConfig(tasks, backbone="wrn8_1", trunk_size=8, **changes)


def images_of(tasks, count=3):
    return [torch.randn(count, t.channels, t.size, t.size) for t in tasks]


def stitched(share, tasks=TASKS):
    torch.manual_seed(0)
    network = StitchedEstimator(config_of(tasks), share)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def plain_copy(network: StitchedEstimator, k: int) -> Estimator:
    """Copy k as an ordinary estimator, by its weights."""
    copy, begin = DeepElasticNetwork(thinner(config_of(network.tasks))).estimator, k * network.num_blocks
    blocks = network.blocks[begin : begin + network.num_blocks]
    copy.blocks.load_state_dict(blocks.state_dict())
    copy.norm.load_state_dict(network.tails[k].norm.state_dict())
    copy.stems.load_state_dict(torch.nn.ModuleList(stems[k] for stems in network.stems).state_dict())
    copy.heads[k].load_state_dict(network.heads[k].state_dict())
    return copy.eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_without_mixing_a_task_has_a_plain_network(training, k):
    network, images, name = stitched(0.0), images_of(TASKS)[k], TASKS[k].name
    copy = plain_copy(network, k).train(training)
    found = network.train(training)(images, name)
    torch.testing.assert_close(found, copy(images, name), atol=1e-5, rtol=1e-4)


def test_one_task_is_the_network_itself():
    network = stitched(0.1, TASKS[:1])
    assert thinner(config_of(TASKS[:1])).stages == config_of(TASKS[:1]).stages
    assert [stitch.weight.unique().tolist() for stitch in network.stitches] == [[1.0]] * 3
    images = images_of(TASKS[:1])[0]
    torch.testing.assert_close(network(images, "a"), plain_copy(network, 0)(images, "a"), atol=1e-5, rtol=1e-4)


def test_stitch_mixes_channel_by_channel():
    stitch, maps = Stitch(3, 4, 0.1), [torch.randn(2, 4, 3, 3) for _ in range(3)]
    torch.testing.assert_close(stitch(maps, 1), 0.05 * maps[0] + 0.9 * maps[1] + 0.05 * maps[2])
    with torch.no_grad():
        stitch.weight.normal_()
    for t in range(3):
        expected = torch.zeros(2, 4, 3, 3)
        for s in range(3):
            for c in range(4):
                expected[:, c] += stitch.weight[t, s, c] * maps[s][:, c]
        torch.testing.assert_close(stitch(maps, t), expected)


def test_stitched_network_by_hand():
    """Stage after stage on one task's images; the other copies read them by their own stems."""
    network, images = stitched(0.3), images_of(TASKS)[1]
    for stitch in network.stitches:
        torch.nn.init.normal_(stitch.weight, 0.4, 0.2)
    copies = [plain_copy(network, k) for k in range(3)]
    with torch.no_grad():
        maps = [copy.stems[1](images) for copy in copies]
        for i, stitch in enumerate(network.stitches):  # one block a stage
            maps = [copy.blocks[i](x) for copy, x in zip(copies, maps, strict=True)]
            maps = [
                sum(stitch.weight[t, s][:, None, None] * maps[s] for s in range(3)) for t in range(3)
            ]  # fmt: skip
        pooled = torch.relu(copies[1].norm(maps[1])).mean((2, 3))
        expected = copies[1].heads[1](pooled)
        torch.testing.assert_close(network(images, "b"), expected, atol=1e-5, rtol=1e-4)


def test_mixed_batch_is_its_tasks_one_by_one():
    network, images = stitched(0.2), images_of(TASKS)
    with torch.no_grad():
        together = network(images, ["a", "b", "c"])
        for part, task, logits in zip(images, "abc", together, strict=True):
            torch.testing.assert_close(network(part, task), logits, atol=1e-5, rtol=1e-4)
        same = torch.cat([images[0], images[2]])
        rows = network(same, torch.tensor([2, 0, 2, 0, 0, 2]))
        torch.testing.assert_close(rows[0], network(same[:1], "c")[0], atol=1e-5, rtol=1e-4)
        assert rows[1, 3:].eq(-torch.inf).all()


def test_levels_work_as_in_every_estimator():
    network, images = stitched(0.2), images_of(TASKS)[0]
    with torch.no_grad():
        torch.testing.assert_close(network(images, "a"), network(images, "a", torch.full((3, 3), 3)))
        assert not torch.allclose(network(images, "a"), network(images, "a", torch.full((3, 3), 1)))
    with pytest.raises(ValueError, match=r"levels must be integer \[B, N\] = \[3, 3\]"):
        network(images, "a", torch.zeros(3, 2, dtype=torch.int64))


def test_stitches_learn_faster_than_weights(tmp_path):
    model = create_model("wrn8_1", TASKS, trunk_size=8)
    method = method_of(model, small_config(tmp_path, "cross-stitch", methods=MethodConfig(stitch_factor=7.0)))
    optimiser = estimator_optimiser(model.estimator, EstimatorTraining(), **method.faster())
    groups = {group.get("factor", 1.0): group for group in optimiser.param_groups}
    assert {id(p) for p in groups[7.0]["params"]} == {id(s.weight) for s in model.estimator.stitches}
    assert groups[7.0]["weight_decay"] == 0
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.estimator.parameters()))


def test_parameters_and_flops_are_about_those_of_one_network(tmp_path):
    whole = create_model("wrn32_4", TASKS)
    plain = count_parameters(whole)
    flops = full_flops(whole)
    model = create_model("wrn32_4", TASKS)
    method_of(model, small_config(tmp_path, "cross-stitch"))
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.blocks == pytest.approx(plain.blocks, rel=0.02)
    assert full_flops(model) == pytest.approx(flops, rel=0.04)
    stages, size, by_hand = (36, 72, 148), 32, 0
    for stage, channels in enumerate(stages):
        size //= 2 if stage else 1
        before = (8, *stages)[stage]
        by_hand += 2 * 9 * size**2 * (channels * (before + channels) + 4 * 2 * channels**2)
    assert full_flops(model) == 3 * by_hand
    assert image_flops(model, "b").stem == sum(stem.flops() for stem in model.estimator.stems[1])


def test_initial_weights_come_from_the_seed(tmp_path):
    states = []
    for seed in (4, 4, 5):
        torch.manual_seed(len(states))
        model = create_model("wrn8_1", TASKS, trunk_size=8)
        method_of(model, small_config(tmp_path, "cross-stitch", seed=seed))
        states.append(model.estimator.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["blocks.0.conv1.weight"], states[2]["blocks.0.conv1.weight"])
    first, second = (states[0][f"blocks.{i}.conv1.weight"] for i in (0, 3))
    assert not torch.equal(first, second)  # copies differ


def test_time_is_measured_against_itself(tmp_path):
    """Thin copies have no dense form of their own."""
    image_set = load_set("digits", "test").subset(torch.arange(32))
    model = create_model("wrn8_1", [image_set.task, TASKS[0]], trunk_size=8)
    rule = method_of(model, small_config(tmp_path, "cross-stitch")).structures
    timing = time_per_image(model, image_set, batch_size=16, rounds=2, structures=rule)
    assert all(0 < seconds < 10 for seconds in (timing.plain, timing.full, timing.selected))
