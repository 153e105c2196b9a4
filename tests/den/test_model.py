"""The whole network: against the strict reference, in every form of batch, and with bad input."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from den import DeepElasticNetwork, ModelConfig, SelectorConfig, Task, create_model
from den.nn.reference import reference_estimator
from den_kernels import RoutingPlan

TASKS = (Task("digits", 10, 8, channels=1), Task("fashion", 5, 28, channels=1), Task("photos", 3, 40))
CONFIG = ModelConfig(TASKS, backbone="wrn", stages=((16, 2), (32, 1), (64, 1)), stem=8, trunk_size=16)
N, L = 4, 4


@pytest.fixture
def model():
    """A network whose statistics are no longer those of a new one."""
    torch.manual_seed(0)
    model = DeepElasticNetwork(CONFIG)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        for head in model.selector.heads:
            head.weight.mul_(100)  # varied structures
    return model.eval()


def images(task, count, seed=1):
    generator = torch.Generator().manual_seed(seed + task.size)
    return torch.randn(count, task.channels, task.size, task.size, generator=generator)


def structures(count, seed=2):
    return torch.randint(0, L, (count, N), generator=torch.Generator().manual_seed(seed))


def named(name):
    return lambda text: f"{name}: {text}"


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


PARTS = [images(task, count) for task, count in zip(TASKS, (4, 5, 3), strict=True)]
NAMES = [task.name for task in TASKS]


def test_blocks_that_no_image_uses_are_not_called_at_inference(model):
    called = []
    for index, block in enumerate(model.estimator.blocks):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    levels = structures(12)
    levels[:, 1:3] = 0  # block 1 keeps the shape of its input, block 2 does not
    with torch.no_grad():
        got = model.estimator(PARTS, NAMES, levels)
    assert called == [0, 2, 3]
    called.clear()
    composed = model.estimator(PARTS, NAMES, levels)
    assert called == [0, 1, 2, 3]
    for one, other in zip(got, composed, strict=True):
        close(one, other)


@pytest.mark.parametrize("grad", [False, True], ids=["folded", "composed"])
def test_inference_equals_the_reference(model, grad):
    levels = structures(12)
    with torch.set_grad_enabled(grad):
        logits = model.estimator(PARTS, NAMES, levels)
    for got, expected in zip(logits, reference_estimator(model.estimator, PARTS, [0, 1, 2], levels), strict=True):
        close(got.detach(), expected.detach())


def test_training_equals_the_reference_with_statistics_and_gradients(model):
    model = model.double().train()
    oracle = copy.deepcopy(model)
    levels, parts = structures(12), [part.double() for part in PARTS]
    labels = [torch.arange(len(part)) % task.classes for part, task in zip(parts, TASKS, strict=True)]
    losses = []
    for logits in (
        model.estimator(parts, NAMES, levels),
        reference_estimator(oracle.estimator, parts, [0, 1, 2], levels),
    ):
        losses.append(sum(F.cross_entropy(part, label) for part, label in zip(logits, labels, strict=True)))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    for (name, mine), its in zip(model.estimator.named_parameters(), oracle.estimator.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-6, atol=1e-9, msg=named(name))
    for (name, mine), its in zip(model.estimator.named_buffers(), oracle.estimator.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9, msg=named(name))


@torch.no_grad()
def test_levels_of_one_image_do_not_change_its_neighbours(model):
    x, levels = images(TASKS[0], 5), structures(5)
    before = model.estimator(x, "digits", levels)
    levels[2] = (levels[2] + 1) % L
    after = model.estimator(x, "digits", levels)
    others = [0, 1, 3, 4]
    close(after[others], before[others])
    assert not torch.allclose(after[2], before[2], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_mixed_batch_equals_the_tasks_one_by_one(model):
    levels = structures(12)
    mixed = model.estimator(PARTS, NAMES, levels)
    for got, part, name, rows in zip(mixed, PARTS, NAMES, levels.split([4, 5, 3]), strict=True):
        close(got, model.estimator(part, name, rows))
    logits, chosen = model(PARTS, NAMES, return_levels=True)
    assert torch.equal(chosen, torch.cat([model.select(part, name) for part, name in zip(PARTS, NAMES, strict=True)]))
    for got, part, name in zip(logits, PARTS, NAMES, strict=True):
        close(got, model(part, name))


@torch.no_grad()
def test_tasks_per_instance_keep_the_callers_order(model):
    x, tasks, levels = images(TASKS[0], 6), torch.tensor([1, 0, 1, 1, 0, 0]), structures(6)
    model = DeepElasticNetwork(
        ModelConfig(
            (Task("coarse", 3, 8, channels=1), Task("fine", 7, 8, channels=1), TASKS[2]),
            backbone="wrn",
            stages=CONFIG.stages,
            stem=8,
            trunk_size=16,
        )
    ).eval()
    expected = torch.full((6, 7), -torch.inf)
    for b in range(6):
        row = model.estimator(x[b : b + 1], int(tasks[b]), levels[b : b + 1])[0]
        expected[b, : len(row)] = row
    close(model.estimator(x, tasks, levels), expected)
    close(model.estimator(x, tasks, RoutingPlan.from_levels(levels, groups=L - 1)), expected)
    logits, chosen = model(x, tasks, return_levels=True)
    assert torch.equal(chosen, model.select(x, tasks))
    close(logits, model.estimator(x, tasks, chosen))
    assert model(x[:0], tasks[:0]).shape == (0, 7)


@torch.no_grad()
def test_no_levels_mean_the_full_structure(model):
    x = images(TASKS[1], 3)
    full = model.estimator(x, "fashion", torch.full((3, N), L - 1))
    close(model.estimator(x, "fashion", None), full)
    with torch.enable_grad():
        close(model.estimator(x, "fashion").detach(), full)


@torch.no_grad()
def test_a_mask_plan_may_take_any_groups(model):
    x, levels = images(TASKS[0], 4), structures(4)
    prefix = torch.arange(L - 1) < levels[:, :, None]
    by_mask = model.estimator(x, "digits", RoutingPlan.from_masks(prefix))
    close(by_mask, model.estimator(x, "digits", levels))


@torch.no_grad()
def test_forward_runs_what_select_chooses(model):
    x = images(TASKS[2], 6)
    logits, levels = model(x, TASKS[2], return_levels=True)
    assert logits.shape == (6, 3)
    assert levels.shape == (6, N)
    assert len(levels.unique(dim=0)) > 1
    assert torch.equal(levels, model.select(x, 2))
    assert torch.equal(levels, model.selector_logits(x, "photos").argmax(-1))
    close(logits, model.estimator(x, "photos", levels))


@pytest.mark.parametrize("training", [False, True])
def test_empty_batches(model, training):
    model.train(training)
    with torch.set_grad_enabled(training):
        assert model(images(TASKS[0], 0), "digits").shape == (0, 10)
        first, second = model([images(TASKS[0], 0), images(TASKS[2], 2)], ["digits", "photos"])
    assert first.shape == (0, 10)
    assert second.shape == (2, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean.isfinite().all()
            assert module.running_var.isfinite().all()


@torch.no_grad()
def test_nan_images_spoil_only_themselves(model):
    x, levels = images(TASKS[0], 4), structures(4)
    expected = model.estimator(x, "digits", levels)
    x[1] = torch.nan
    got = model.estimator(x, "digits", levels)
    assert got[1].isnan().all()
    close(got[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_few_steps_reduce_the_loss():
    torch.manual_seed(0)
    model = DeepElasticNetwork(CONFIG).train()
    labels = [torch.arange(8) % 2, torch.arange(8) % 2]
    parts = [images(task, 8) + 2 * label.view(-1, 1, 1, 1) for task, label in zip(TASKS[:2], labels, strict=True)]
    optimizer = torch.optim.SGD(model.estimator.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    losses = []
    for step in range(12):
        logits = model.estimator(parts, NAMES[:2], structures(16, seed=step))
        loss = sum(F.cross_entropy(part, label) for part, label in zip(logits, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@torch.no_grad()
def test_state_and_config_rebuild_the_network(model):
    config = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert config == model.config
    twin = DeepElasticNetwork(config).eval()
    twin(PARTS, NAMES)  # folded weights of other numbers
    twin.load_state_dict(model.state_dict())
    for got, expected in zip(twin(PARTS, NAMES), model(PARTS, NAMES), strict=True):
        assert torch.equal(got, expected)


def test_bfloat16_stays_near_float32(model):
    with torch.no_grad():
        levels = structures(12)
        expected = model.estimator(PARTS, NAMES, levels)
        got = model.bfloat16().estimator([part.bfloat16() for part in PARTS], NAMES, levels)
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), its, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_runs(model, grad):
    levels = structures(12)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        logits = model.estimator(PARTS, NAMES, levels)
    for got, expected in zip(logits, reference_estimator(model.estimator, PARTS, [0, 1, 2], levels), strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.15)


def test_names_build_networks():
    model = create_model("wrn8_1", TASKS[:1], levels=3, trunk_size=8, selector=SelectorConfig((4, 4)))
    assert (model.num_blocks, model.levels) == (3, 3)
    assert model.config.selector == SelectorConfig((4, 4))
    assert model(images(TASKS[0], 2), "digits").shape == (2, 10)


GOOD = images(TASKS[0], 2)
BAD_IMAGES = {
    "unknown task": (GOOD, "letters", r"task must be one of 0 'digits', 1 'fashion', 2 'photos', got 'letters'"),
    "task out of range": (GOOD, 3, "task must be one of .* got 3"),
    "foreign task": (GOOD, Task("letters", 26, 8), "task must be one of"),
    "rank": (GOOD[0], "digits", r"images of task digits must be \[B, 1, 8, 8\] floating, got \[1, 8, 8\]"),
    "channels": (GOOD.repeat(1, 3, 1, 1), "digits", r"must be \[B, 1, 8, 8\] floating, got \[2, 3, 8, 8\]"),
    "size": (images(TASKS[1], 2), "digits", r"got \[2, 1, 28, 28\]"),
    "not square": (GOOD[..., :7], "digits", r"got \[2, 1, 8, 7\]"),
    "integers": (GOOD.to(torch.uint8), "digits", "floating, got .* torch.uint8"),
    "dtype": (GOOD.double(), "digits", "must be the model's torch.float32, got torch.float64"),
    "device": (GOOD.to("meta"), "digits", "must be on the model's cpu, got meta"),
    "not a tensor": (GOOD.numpy(), "digits", "images must be a tensor or a list of tensors, got ndarray"),
    "list, one name": ([GOOD], "digits", "task must name one task for each of the 1"),
    "list too long": ([GOOD, GOOD], ["digits"], "task must name one task for each of the 2"),
    "empty list": ([], [], "at least 1"),
    "one tensor, many names": (GOOD, ["digits", "fashion"], "images must be a list"),
    "instances of two sizes": (GOOD, torch.tensor([0, 1]), r"images of task fashion must be \[B, 1, 28, 28\]"),
    "instances out of range": (GOOD, torch.tensor([0, 3]), r"must be in 0..2 \(digits, fashion, photos\), got 0..3"),
    "instances of wrong length": (GOOD, torch.tensor([0]), "one task per instance"),
    "fractional tasks": (GOOD, torch.tensor([0.0, 1.0]), r"tasks per instance must be integer \[B\]"),
}


@pytest.mark.parametrize(("x", "task", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_and_tasks_are_refused(model, x, task, message):
    for call in (model, model.select, model.selector_logits, model.estimator):
        with pytest.raises(ValueError, match=message):
            call(x, task)


FULL = torch.full((2, N), L - 1)
BAD_LEVELS = {
    "blocks": (FULL[:, 1:], r"estimator: levels must be integer \[B, N\] = \[2, 4\] in 0..3"),
    "instances": (FULL[:1], r"got torch.int64 \[1, 4\]"),
    "rank": (FULL[0], r"got torch.int64 \[4\]"),
    "floating": (FULL.float(), "got torch.float32"),
    "mask": (FULL.bool(), "got torch.bool"),
    "device": (FULL.to("meta"), "on meta"),
    "list": (FULL.tolist(), "got list"),
    "too high": (FULL + 1, "4"),
    "negative": (FULL - 4, "-1"),
    "plan of other groups": (RoutingPlan.from_levels(FULL, groups=5), "got a plan of 2 instances, 4 blocks, 5 groups"),
    "plan of other blocks": (RoutingPlan.from_levels(FULL[:, 1:], groups=3), "got a plan of 2 instances, 3 blocks"),
}


@pytest.mark.parametrize(("levels", "message"), BAD_LEVELS.values(), ids=BAD_LEVELS)
def test_bad_levels_are_refused(model, levels, message):
    with pytest.raises(ValueError, match=message):
        model.estimator(GOOD, "digits", levels)


BAD_CONFIGS = {
    "unknown key": ({"widht": 3}, "ModelConfig: key must be one of tasks, backbone, stages.* got 'widht'"),
    "unknown task key": (
        {"tasks": [{"name": "a", "clases": 2, "size": 8}]},
        r"ModelConfig\.tasks: key must be .* got 'clases'",
    ),
    "missing task key": ({"tasks": [{"name": "a", "size": 8}]}, r"ModelConfig\.tasks: .*classes"),
    "unknown selector key": ({"selector": {"chanels": [8]}}, r"ModelConfig\.selector: key must be .* got 'chanels'"),
    "no tasks": ({"tasks": []}, "tasks must be at least one, of unique names"),
    "twins": ({"tasks": [{"name": "a", "classes": 2, "size": 8}] * 2}, r"unique names, got \['a', 'a'\]"),
    "nameless": ({"tasks": [{"name": "", "classes": 2, "size": 8}]}, "name must be a non-empty string"),
    "no classes": ({"tasks": [{"name": "a", "classes": 0, "size": 8}]}, "classes of 'a' must be a whole number"),
    "backbone": ({"backbone": "alexnet"}, "backbone must be wrn"),
    "family without stages": ({"backbone": "wrn"}, "backbone 'wrn' needs stages"),
    "one level": ({"levels": 1}, "levels must be at least 2"),
    "shrinking stages": ({"stages": [[32, 1], [16, 1]]}, r"must not shrink .* got \[16, 32, 16\]"),
    "empty stage": ({"stages": [[32, 0]]}, "blocks of every stage must be at least 1"),
    "trunk": ({"trunk_size": 0}, "trunk_size"),
    "too thin for its levels": ({"stages": [[16, 1]], "levels": 7}, "channels must be at least 32 for 7 levels"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_are_refused(changed, message):
    data = {"tasks": [{"name": "a", "classes": 2, "size": 8}], "backbone": "wrn8_1", **changed}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(data)


@torch.no_grad()
def test_the_network_compiles_whole_and_exports(model):
    class Digits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, "digits", return_levels=True)

    x = images(TASKS[0], 3)
    logits, levels = model(x, "digits", return_levels=True)
    whole = torch.compile(Digits().eval(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Digits().eval(), (x,)).module()
    for run in (whole, exported):
        got, chosen = run(x)
        close(got, logits)
        assert torch.equal(chosen, levels)
