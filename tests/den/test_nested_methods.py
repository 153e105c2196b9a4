"""NestedNet and PackNet: what their updates train, and what they leave alone."""

import itertools

import torch
import torch.nn.functional as F

from den.recipes import method_of, prepare
from den.train.config import DataConfig, EstimatorTraining, MethodConfig, NetworkConfig, PhaseConfig
from den.train.engine import Engine
from tests.small_methods import TASKS, Bench, model_and_batch
from tests.small_runs import cut_sets, small_config


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
