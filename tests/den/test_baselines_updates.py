"""What the compared methods update, against hand computations."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from den.data import Batch
from den.nn.model import create_model
from den.nn.tasks import Task
from den.recipes import method_of, prepare
from den.recipes.adashare import gated, gumbel_softmax, keep_logits, sharing_loss, sparsity_loss
from den.recipes.blockdrop import draw, free_blocks, policy_loss, rewards
from den.recipes.random_selector import level_chances
from den.recipes.routing import learn_policy, project_to_simplex
from den.train.config import DataConfig, EstimatorTraining, MethodConfig, NetworkConfig, PhaseConfig, TrainConfig
from den.train.engine import Engine
from tests.small_runs import cut_sets, small_config

TASKS = [Task("a", 3, 8, 1), Task("b", 4, 12)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model_and_batch(tasks=TASKS, sizes=(3, 2)):
    torch.manual_seed(0)
    model = create_model("wrn8_1", tasks, trunk_size=8)
    images = [torch.randn(n, t.channels, t.size, t.size) for t, n in zip(tasks, sizes, strict=True)]
    labels = [torch.randint(t.classes, (n,)) for t, n in zip(tasks, sizes, strict=True)]
    return model, Batch(tuple(t.name for t in tasks), images, labels)


class Bench:
    """What an objective reads of an engine."""

    device, progress = torch.device("cpu"), 0.5

    def __init__(self):
        self.generator = generator()


def test_routing_update_by_hand():
    """One image, two agents of three levels: right with R = 1, then wrong with R = -1."""
    policy, value = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([0.2, -0.4])
    levels = torch.tensor([[1, 2]])
    found = learn_policy(policy, value, levels, torch.tensor([1.0]), rate=0.1)
    gains = 0.8 * 0.7 * 0.1, 1.4 * 0.4 * 0.1  # (R - V) (1 - policy(a)) rate; the surplus leaves all levels alike
    expected = [
        [0.5 - gains[0] / 3, 0.3 + gains[0] * 2 / 3, 0.2 - gains[0] / 3],
        [0.2 - gains[1] / 3, 0.2 - gains[1] / 3, 0.6 + gains[1] * 2 / 3],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    found = learn_policy(policy, value, levels, torch.tensor([-1.0]), rate=0.1)
    losses = 1.2 * 0.3 * 0.1, 0.6 * 0.6 * 0.1  # (R - V) policy(a) rate
    expected = [
        [0.5 + losses[0] / 3, 0.3 - losses[0] * 2 / 3, 0.2 + losses[0] / 3],
        [0.2 + losses[1] / 3, 0.2 + losses[1] / 3, 0.6 - losses[1] * 2 / 3],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_routing_update_of_a_batch_is_the_mean_of_its_images():
    policy = torch.rand(4, 3, generator=generator()).softmax(-1)
    value, returns = torch.rand(4, generator=generator(1)), torch.randn(5, generator=generator(2))
    levels = torch.randint(3, (5, 4), generator=generator(3))
    step = torch.zeros(4, 3)
    for b, n in itertools.product(range(5), range(4)):
        gain, chance = returns[b] - value[n], policy[n, levels[b, n]]
        step[n, levels[b, n]] += gain * (1 - chance if gain >= 0 else chance) / 5
    expected = project_to_simplex(policy + 0.3 * step)
    torch.testing.assert_close(learn_policy(policy, value, levels, returns, 0.3), expected)


def test_routing_finds_the_level_that_answers_right():
    policy, value, draws = torch.full((2, 3), 1 / 3), torch.zeros(2), generator()
    for _ in range(300):
        levels = torch.multinomial(policy.repeat(16, 1), 1, generator=draws).view(16, 2)
        returns = (levels[:, 0] == 1).float() * 2 - 1
        policy = learn_policy(policy, value, levels, returns, 0.1)
        value = value + 0.05 * (returns.mean() - value)
    assert policy[0, 1] > 0.9
    assert policy.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_routing_keeps_tables_of_each_task(tmp_path):
    model, batch = model_and_batch()
    method = method_of(model, small_config(tmp_path, "routing"))
    method.state.policy[0, :, 1] = 1.0  # task a nearly always at level 1
    method.state.policy[0] /= method.state.policy[0].sum(-1, keepdim=True)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.objective(Bench(), method.phases()[0], Batch(batch.tasks[:1], batch.images[:1], batch.labels[:1]))
    assert not torch.equal(method.state.policy[0], before["policy"][0])
    assert torch.equal(method.state.policy[1], before["policy"][1])
    assert torch.equal(method.state.value[1], before["value"][1])
    assert method.structures(batch.images[0], "a").tolist() == [[1, 1, 1]] * 3


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6))
def test_simplex_projection_is_the_nearest_distribution(values):
    """Against bisection for the number that is taken off all entries."""
    x = torch.tensor(values, dtype=torch.float64)
    low, high = x.min() - 1, x.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (x - middle).clamp_min(0).sum() > 1 else (low, middle)
    found = project_to_simplex(x)
    torch.testing.assert_close(found, (x - high).clamp_min(0), atol=1e-9, rtol=0)
    assert found.sum().item() == pytest.approx(1)


def test_nestednet_loss_is_the_mean_over_levels(tmp_path):
    """In evaluation mode, where levels do not meet in a batch norm."""
    model, batch = model_and_batch(TASKS[:1], (5,))
    model.eval()
    method = method_of(model, small_config(tmp_path, "nestednet"))
    found = method.objective(Bench(), method.phases()[0], batch).loss
    losses = [
        F.cross_entropy(model.estimator(batch.images[0], "a", torch.full((5, 3), level)), batch.labels[0])
        for level in (1, 2, 3)
    ]
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_nestednet_tasks_learn_at_their_levels(tmp_path):
    model, batch = model_and_batch()
    model.eval()
    method = method_of(model, small_config(tmp_path, "nestednet", methods=MethodConfig(levels=(3, 1))))
    found = method.objective(Bench(), method.phases()[0], batch).loss
    losses = [
        F.cross_entropy(model.estimator(images, task, torch.full((len(images), 3), level)), labels)
        for images, task, labels, level in zip(batch.images, batch.tasks, batch.labels, (3, 1), strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(losses).mean())  # of unlike numbers of images
    assert method.structures(batch.images, batch.tasks).tolist() == [[3] * 3] * 3 + [[1] * 3] * 2


def test_levels_go_up_with_the_tasks_unless_they_are_given(tmp_path):
    for mode in ("nestednet", "packnet"):
        model, _ = model_and_batch()
        assert method_of(model, small_config(tmp_path, mode)).task_levels == (2, 3)
        given = small_config(tmp_path, mode, methods=MethodConfig(levels=(2, 1)))
        assert method_of(model, given).task_levels == (2, 1)


def hidden(estimator, name, tensor, low, high):
    """The entries of a block's parameter or statistic that belong to its hidden channels low..high - 1; else none."""
    if name.endswith("conv1.weight"):
        return tensor[low:high]
    if name.endswith("conv2.weight"):
        return tensor[:, low:high]
    return tensor[low:high] if ".bn2." in name and tensor.dim() else None


def test_packnet_stage_trains_what_its_level_adds_and_nothing_else(tmp_path, monkeypatch):
    """Bit for bit: with momentum and weight decay, over several updates, running statistics included."""
    cut_sets(monkeypatch)
    config = small_config(
        tmp_path / "run", "packnet", data=DataConfig(tasks=("fashion", "digits"), batch_size=20),
        estimator=EstimatorTraining(first=PhaseConfig(steps=3, rate=0.1), weight_decay=0.01),
        methods=MethodConfig(levels=(3, 1)),
    )  # fmt: skip
    states, answers, images = [], [], torch.randn(4, 1, 8, 8)
    with Engine(config, prepare) as engine:
        estimator, keep = engine.model.estimator, lambda: {n: t.clone() for n, t in estimator.state_dict().items()}
        states.append(keep())
        for phase in engine.phases:
            for batch in engine.phase("estimator", phase.stage):
                engine.update(engine.recipe.objective(engine, phase, batch))
            states.append(keep())
            engine.model.eval()
            with torch.no_grad():
                answers.append(estimator(images, "digits", torch.full((4, 3), 1)))
    assert torch.equal(answers[0], answers[1])  # what the first stage learnt is left alone
    changed = [{n for n in states[0] if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(states)]
    quarter = {0: 4, 1: 8, 2: 16}
    for name in states[0]:
        kind, index, *_ = name.split(".")
        if kind in ("stems", "heads"):
            assert [name in c for c in changed] == [index == "1", index == "0"], name
        elif kind == "norm" or ".bn1." in name:
            assert [name in c for c in changed] == [True, False], name
        elif (part := hidden(estimator, name, states[0][name], 0, quarter[int(index)])) is not None:
            low, width = quarter[int(index)], 4 * quarter[int(index)]
            first = [hidden(estimator, name, state[name], 0, low) for state in states]
            rest = [hidden(estimator, name, state[name], low, width) for state in states]
            assert not torch.equal(first[0], first[1]), name
            assert torch.equal(first[1], first[2]), name
            assert torch.equal(rest[0], rest[1]), name
            assert not torch.equal(rest[1], rest[2]), name
            assert part.shape == first[2].shape


def test_packnet_leaves_fully_connected_blocks_alone_where_an_earlier_stage_trained_them(tmp_path, monkeypatch):
    """Bit for bit, of weights and biases: what the first task reads stays, the rest changes."""
    cut_sets(monkeypatch)
    config = small_config(
        tmp_path / "run", "packnet", data=DataConfig(tasks=("fashion", "digits"), batch_size=20),
        network=NetworkConfig("simpleconvnet_elastic_fc", ((8, 1),) * 2, stem=8, levels=2, trunk_size=8),
        estimator=EstimatorTraining(first=PhaseConfig(steps=3, rate=0.1), weight_decay=0.01, decay_all=True),
        methods=MethodConfig(levels=(1, 0)),
    )  # fmt: skip
    with Engine(config, prepare) as engine:
        estimator, images, answers, kept = engine.model.estimator, torch.randn(4, 1, 8, 8), [], []
        for phase in engine.phases:
            for batch in engine.phase("estimator", phase.stage):
                engine.update(engine.recipe.objective(engine, phase, batch))
            engine.model.eval()
            with torch.no_grad():
                answers.append(estimator(images, "digits", torch.zeros(4, 2).long()))
            kept.append({name: t.clone() for name, t in estimator.blocks[1].state_dict().items()})
    assert torch.equal(*answers)
    changed = {name: (kept[0][name] != kept[1][name]).squeeze() for name in kept[0]}
    for features in (changed["fc1.bias"], changed["fc1.weight"].any(1), changed["fc2.weight"].any(0)):
        assert not features[:64].any()
        assert features[64:].any()
    assert not changed["fc2.bias"].any()


def test_packnet_frozen_channels_are_normalised_by_what_they_keep(tmp_path, monkeypatch):
    """A stage's training forward, channel group by channel group, in the network's first block."""
    cut_sets(monkeypatch)
    with Engine(small_config(tmp_path / "run", "packnet"), prepare) as engine:
        for batch in engine.phase("estimator", 1):
            engine.update(engine.recipe.objective(engine, engine.phases[0], batch))
        next(iter(engine.phase("estimator", 2)))
        norm, x = engine.model.estimator.blocks[0].bn2, torch.randn(6, 16, 8, 8)
        levels = torch.full((6,), 3)
        mean, var = norm.running_mean[:8].clone(), norm.running_var[:8].clone()
        found = norm(x, levels, relu=True)
        old = F.batch_norm(x[:, :8], mean, var, norm.weight[:8], norm.bias[:8], eps=norm.eps).relu()
        new = F.batch_norm(x[:, 8:], None, None, norm.weight[8:], norm.bias[8:], training=True, eps=norm.eps).relu()
        torch.testing.assert_close(found, torch.cat([old, new], 1), atol=1e-5, rtol=1e-5)
        assert torch.equal(norm.running_mean[:8], mean)
        assert torch.equal(norm.running_var[:8], var)
        assert not torch.equal(norm.running_mean[8:], torch.zeros(8))


def test_blockdrop_reward_by_hand():
    keeps = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4, [False] * 4])
    found = rewards(keeps, torch.tensor([1.0, 1.0, 1.0, 0.0]), gamma=5.0)
    assert found.tolist() == [1 - 0.25, 0.0, 1.0, -5.0]


def test_blockdrop_draws_from_bounded_chances():
    logits = torch.tensor([[-50.0, 50.0, 0.0]]).expand(20000, 3)
    drawn, greedy, chance = draw(logits, 3, 0.8, generator())
    assert chance[0].tolist() == pytest.approx([0.2, 0.8, 0.5])
    assert drawn.float().mean(0).tolist() == pytest.approx([0.2, 0.8, 0.5], abs=0.015)
    assert greedy[0].tolist() == [False, True, True]
    drawn, greedy, _ = draw(logits, 1, 0.8, generator())
    assert drawn[:, :2].all()
    assert greedy[:, :2].all()
    assert not drawn[:, 2].all()


def test_blockdrop_curriculum_frees_the_last_blocks_first():
    found = [free_blocks(15, step / 100, 0.5) for step in range(101)]
    assert found == sorted(found)
    assert (found[0], found[25], found[50], found[100]) == (1, 8, 15, 15)
    assert free_blocks(15, 0.0, 0.0) == 15


def test_blockdrop_policy_loss_by_hand():
    chance, keeps = torch.tensor([[0.9, 0.8, 0.3], [0.5, 0.5, 0.5]]), torch.tensor([[True, True, False], [False] * 3])
    advantage = torch.tensor([2.0, -1.0])
    likelihood = [math.log(0.8) + math.log(0.7), 2 * math.log(0.5)]  # the last two blocks
    found = policy_loss(chance, keeps, advantage, free=2)
    assert found.item() == pytest.approx(-(2 * likelihood[0] - likelihood[1]) / 2, rel=1e-5)


def test_blockdrop_policy_phase_by_hand(tmp_path):
    """The loss of a batch of one image; the network gets no gradient, the policy does."""
    model, batch = model_and_batch(TASKS[:1], (1,))
    config = small_config(tmp_path, "blockdrop")
    method, bench = method_of(model.eval(), config), Bench()
    with torch.no_grad():
        model.selector.heads[0].bias.view(3, 4)[:, 3] = torch.tensor([1.0, -1.0, 0.5])
    objective = method.objective(bench, method.phases()[1], batch)
    objective.loss.backward()
    assert all(p.grad is None for p in model.estimator.parameters())
    assert model.selector.heads[0].bias.grad.view(3, 4)[:, 1:3].abs().sum() == 0
    drawn, greedy, chance = draw(method.logits(batch.images, batch.tasks), 3, 0.8, generator())
    gains = []
    for keeps in (drawn, greedy):
        with torch.no_grad():
            right = (model.estimator(batch.images[0], "a", keeps.long() * 3).argmax(1) == batch.labels[0]).float()
        gains.append(rewards(keeps, right, 1.0))
    expected = policy_loss(chance, drawn, gains[0] - gains[1], 3)
    assert objective.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_adashare_temperature_falls_with_the_rounds(tmp_path, monkeypatch):
    model, batch = model_and_batch()
    config = dataclasses.replace(TrainConfig(), out=tmp_path, mode="adashare", methods=MethodConfig(share_rounds=20))
    method, seen = method_of(model, config), []

    def record(logits, temperature, draws):
        seen.append(temperature)
        return gumbel_softmax(logits, temperature, draws)

    monkeypatch.setattr("den.recipes.adashare.gumbel_softmax", record)
    for phase in method.phases()[:-1:19]:
        method.objective(Bench(), phase, batch)
    assert seen == pytest.approx([5.0, 5.0 * 0.965**9, 5.0 * 0.965**19])


def test_gumbel_softmax_draws_by_the_logits():
    logits = torch.tensor([0.0, math.log(3)]).expand(20000, 2)
    found = gumbel_softmax(logits, 0.1, generator())
    assert found.sum(1).allclose(torch.ones(()))
    assert (found[:, 1] > 0.5).float().mean().item() == pytest.approx(0.75, abs=0.01)
    soft = gumbel_softmax(logits, 50.0, generator())
    assert (soft - 0.5).abs().max() < 0.15


def test_adashare_losses_by_hand():
    keep = torch.tensor([[0.5, 0.9], [0.25, 0.9], [0.5, 0.1]])
    logits = keep_logits(torch.stack([torch.full((3, 2), 0.3), (keep / (1 - keep)).log() + 0.3], -1))
    assert sparsity_loss(logits).item() == pytest.approx(-(1 - keep).log().mean().item(), rel=1e-5)
    first = 0.25 + 0.0 + 0.25  # pairs of tasks in block 0, weight 1
    second = 0.0 + 0.8 + 0.8  # in block 1, weight 1/2
    found = sharing_loss(logits, torch.tensor([1.0, 0.5])).item()
    assert found == pytest.approx((first + second / 2) / (3 * 2), rel=1e-5)
    assert sharing_loss(logits[:1], torch.ones(2)).item() == 0


def test_gates_scale_the_residual():
    model, batch = model_and_batch()
    estimator = model.eval().estimator
    images, names, levels = (
        batch.images,
        batch.tasks,
        torch.tensor([[0, 3, 3], [3, 0, 3], [3, 3, 3], [0, 0, 0], [3] * 3]),
    )
    with gated(estimator, (levels / 3).float()):
        found = estimator(images, names)
    for ours, theirs in zip(found, estimator(images, names, levels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    block, x = estimator.blocks[1], torch.randn(2, 16, 8, 8)
    expected = block.shortcut(x) + 0.3 * block.residual(x)
    gates = torch.full((2, 3), 0.3)
    with gated(estimator, gates):
        torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x), block.shortcut(x) + block.residual(x))


def test_adashare_weights_and_gates_learn_from_different_images(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    with Engine(small_config(tmp_path / "run", "adashare"), prepare) as engine:
        streams = engine.batches
        for k, image_set in enumerate(streams["all"].sets):
            halves = [
                {image.numpy().tobytes() for image in streams[n].sets[k].images} for n in ("estimator", "selector")
            ]
            assert not halves[0] & halves[1]
            assert sum(len(streams[n].sets[k]) for n in ("estimator", "selector")) == len(image_set)
        gates = engine.recipe.state.logits.detach().clone()
        used = []
        for phase in engine.phases[:2]:
            for batch in engine.phase(phase.network, phase.stage):
                used.append(phase.stream)
                engine.update(engine.recipe.objective(engine, phase, batch))
            assert torch.equal(engine.recipe.state.logits, gates) == (phase.network == "estimator")
        assert used == ["estimator"] * 3 + ["selector"] * 3


def test_adashare_starts_anew_with_what_was_drawn(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    with Engine(small_config(tmp_path / "run", "adashare"), prepare) as engine:
        initial = {name: tensor.clone() for name, tensor in engine.model.estimator.state_dict().items()}
        *search, final = engine.phases
        for phase in search:
            for batch in engine.phase(phase.network, phase.stage):
                engine.update(engine.recipe.objective(engine, phase, batch))
        with torch.no_grad():
            engine.recipe.state.logits[:, :, 1] = torch.tensor([[50.0, -50.0, 50.0], [-50.0, -50.0, 50.0]])
        batch = next(iter(engine.phase("estimator", final.stage)))
        assert all(torch.equal(t, initial[name]) for name, t in engine.model.estimator.state_dict().items())
        found = engine.recipe.structures(batch.images, batch.tasks)
        assert found.unique(dim=0).tolist() == [[0, 0, 3], [3, 0, 3]]
        assert final.stream == "all"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4375, 0.8, 1.0])
def test_random_structures_cost_what_is_asked_for(share):
    flops = torch.tensor([[0, 25, 50, 100], [0, 50, 100, 200]], dtype=torch.float64)
    chances = level_chances(flops, share)
    assert chances.sum().item() == pytest.approx(1)
    assert (chances * torch.tensor([0, 0.25, 0.5, 1])).sum().item() == pytest.approx(share, abs=2e-3)
    if share == 0.4375:
        assert chances.tolist() == pytest.approx([0.25] * 4, abs=1e-6)


def test_random_structures_cheaper_than_the_lowest_level_are_refused():
    flops = torch.tensor([[50.0, 100.0]], dtype=torch.float64)
    assert level_chances(flops, None).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"random: methods\.random_flops must be in 0\.5\.\.1 here, got 0\.3"):
        level_chances(flops, 0.3)


def test_random_structures_come_from_the_seed(tmp_path):
    model, _ = model_and_batch()
    first, second, other = (method_of(model, small_config(tmp_path, "random", seed=seed)) for seed in (1, 1, 2))
    images = torch.zeros(50, 1, 8, 8)
    assert torch.equal(first.structures(images, "a"), second.structures(images, "a"))
    assert not torch.equal(first.structures(images, "a"), other.structures(images, "a"))
    assert len(first.structures(images, "a").unique(dim=0)) > 20
