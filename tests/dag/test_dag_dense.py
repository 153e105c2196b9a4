"""Dense tasks: losses and metrics against plain loops over pixels, heads, and several tasks of the same images."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from den.dag import DagConfig, DagNetwork, SubNetwork, reduce
from den.dag.dense_losses import balanced_loss, depth_loss, normals_loss, segmentation_loss
from den.dag.dense_metrics import THRESHOLDS, EdgeMetrics
from den.dag.head import DenseHead
from den.dag.kinds import KINDS, relative_gains
from den.dag.losses import task_loss
from den.data.batches import Batch
from den.nn.model_config import ModelConfig
from den.nn.task_batch import task_batch
from den.nn.tasks import IGNORE, TASK_KINDS, Task
from den.report.dag.dense import value_text

SEGMENTATION, DEPTH = Task("segmentation", 4, 18, 3, "segmentation", 26), Task("depth", 1, 18, 3, "depth", 26)
NORMALS = Task("normals", 3, 18, 3, "normals", 26)
TASKS = (SEGMENTATION, DEPTH, NORMALS)


def make(seed=0, ratio=0.5, tasks=TASKS, **changes):
    torch.manual_seed(seed)
    model = DagNetwork(DagConfig(tasks, **{"states": 5, "flow": 2, "channels": 8, "trunk_size": (5, 7), **changes}))
    for logits in (model.gates.alpha, model.gates.beta, model.gates.gamma):
        nn.init.normal_(logits)
    for k in range(len(tasks)):
        model.keep(k, reduce(model.graph, model.gates.of_task(k), ratio, ranking="random", seed=k).kept)
    return model


def measured(kind, outputs, targets, task=None, batch=1):
    """Metrics of a kind, collected `batch` images at a time."""
    metrics = KINDS[kind].metrics(task or Task("t", {"normals": 3}.get(kind, 1), 8, 3, kind))
    for part in zip(outputs.split(batch), targets.split(batch), strict=True):
        metrics.add(*part)
    return metrics


def labels(*shape, classes=4):
    found = torch.randint(classes, shape)
    return found.masked_fill(torch.rand(shape) < 0.2, IGNORE)


def test_segmentation_counts_labelled_pixels_only():
    logits, target = torch.randn(3, 4, 6, 5), labels(3, 6, 5)
    target[target == 2] = 1  # class 2 is in no target, but in predictions
    pairs, errors = [], []
    for b, r, c in torch.cartesian_prod(torch.arange(3), torch.arange(6), torch.arange(5)).tolist():
        if (t := target[b, r, c].item()) != IGNORE:
            pairs.append((t, logits[b, :, r, c].argmax().item()))
            errors.append(-logits[b, :, r, c].log_softmax(0)[t].item())
    ious = []
    for k in range(4):
        union = sum(t == k or p == k for t, p in pairs)
        if union:
            ious.append(sum(t == p == k for t, p in pairs) / union)
    found = measured("segmentation", logits, target, SEGMENTATION, batch=2)
    assert found.count == len(pairs)
    assert found.results()["miou"] == pytest.approx(sum(ious) / len(ious))
    assert found.results()["pixel_accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
    assert segmentation_loss(logits, target).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_classes_that_do_not_occur_do_not_enter_the_mean():
    logits = F.one_hot(torch.tensor([[[0, 0, 1]]]), 4).permute(0, 3, 1, 2).float()
    found = measured("segmentation", logits, torch.tensor([[[0, 1, 1]]]), SEGMENTATION).results()
    assert found["miou"] == pytest.approx(0.5)  # of classes 0 and 1: one of two each


def test_depth_counts_known_pixels_only():
    depths, target = torch.tensor([2.0, 1.0, -1.0, 9.0, 3.0]), torch.tensor([1.0, 1.2, 2.0, 0.0, 2.0])
    shape = (1, 1, 1, 5)
    found = measured("depth", depths.view(shape), target.view(shape)).results()
    assert found["abs_error"] == pytest.approx((1 + 0.2 + 3 + 1) / 4)
    assert found["rel_error"] == pytest.approx((1 + 0.2 / 1.2 + 1.5 + 0.5) / 4)
    assert [found[f"delta_{power}"] for power in (1, 2, 3)] == [0.25, 0.5, 0.5]  # ratios 2, 1.2, none, 1.5
    assert depth_loss(depths.view(shape), target.view(shape)).item() == pytest.approx((1 + 0.2 + 3 + 1) / 4)


def test_normals_are_measured_by_their_angle_whatever_their_length():
    angles = torch.tensor([0.0, 5.0, 11.0, 12.0, 23.0, 29.0, 90.0, 180.0, 77.0])
    radians = angles.deg2rad()
    normals = 3 * torch.stack([radians.sin(), torch.zeros(9), radians.cos()]).view(1, 3, 1, 9)
    target = torch.tensor([0.0, 0.0, 0.5]).view(1, 3, 1, 1).repeat(1, 1, 1, 9)
    target[..., -1] = 0  # unknown
    found = measured("normals", normals, target).results()
    known = angles[:-1]
    assert found["mean_angle"] == pytest.approx(known.mean().item(), abs=1e-3)
    assert found["median_angle"] == pytest.approx(known.median().item(), abs=0.011)
    assert [found[f"within_{limit}"] for limit in (11, 22, 30)] == [3 / 8, 4 / 8, 6 / 8]
    wanted = (1 - known.deg2rad().cos()).mean().item()
    assert normals_loss(normals, target).item() == pytest.approx(wanted, rel=1e-5)


def test_the_balanced_loss_gives_both_kinds_the_same_weight():
    target = torch.zeros(1, 1, 4, 5)
    target[..., 0, :2] = 1
    target[..., 3, :] = IGNORE
    logits = torch.randn(1, 1, 4, 5)
    errors = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction="none")
    positive, negative = errors[target == 1].sum(), errors[target == 0].sum()
    wanted = (positive * 13 / 15 + negative * 2 / 15) / 15
    assert balanced_loss(logits, target).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert balanced_loss(logits, torch.zeros_like(target)).item() == pytest.approx(
        F.softplus(logits).mean().item(), rel=1e-5
    )  # one kind only


def test_edges_take_one_threshold_for_the_set_and_saliency_one_for_the_mean_of_images():
    logits, target = torch.randn(3, 1, 5, 6) * 2, (torch.rand(3, 1, 5, 6) < 0.4).float()
    target[0, 0, 0] = IGNORE
    known, truth = target != IGNORE, target == 1
    pooled, per_image = [], []
    for threshold in THRESHOLDS:
        found = logits.sigmoid() > threshold
        pooled.append(2 * (found & truth & known).sum() / ((found & known).sum() + truth.sum()))
        counts = [[(m[b] & known[b]).sum().item() for m in (found & truth, found, truth)] for b in range(3)]
        precision = [r / f if f else 1.0 for r, f, _ in counts]
        recall = [r / t if t else 1.0 for r, _, t in counts]
        overlap = [r / (f + t - r) if f + t - r else 1.0 for r, f, t in counts]
        p, r = sum(precision) / 3, sum(recall) / 3
        per_image.append((2 * p * r / (p + r), sum(overlap) / 3))
    assert measured("edges", logits, target, batch=2).results() == {"f_exact": pytest.approx(max(pooled).item())}
    found = measured("saliency", logits, target, batch=2).results()
    assert found["max_f"] == pytest.approx(max(f for f, _ in per_image))
    assert found["miou"] == pytest.approx(max(iou for _, iou in per_image))


NOTHING = {"segmentation": torch.full((2, 4, 4), IGNORE), "depth": torch.zeros(2, 1, 4, 4),
           "normals": torch.zeros(2, 3, 4, 4), "edges": torch.full((2, 1, 4, 4), 255.0),
           "saliency": torch.full((2, 1, 4, 4), 255.0)}  # fmt: skip


@pytest.mark.parametrize("kind", NOTHING)
def test_a_batch_without_targets_costs_nothing_and_is_not_counted(kind):
    outputs = torch.randn(2, {"segmentation": 4, "normals": 3}.get(kind, 1), 4, 4, requires_grad=True)
    loss = KINDS[kind].loss(outputs, NOTHING[kind])
    loss.backward()
    assert loss.item() == 0
    assert (outputs.grad == 0).all()
    assert measured(kind, outputs.detach(), NOTHING[kind], SEGMENTATION).count == 0


RIGHT = {  # targets, and predictions that are right
    "segmentation": (
        torch.tensor([[[0, 3], [2, IGNORE]]]),
        lambda t: 40.0 * F.one_hot(t.clamp_max(4), 5).movedim(-1, 1)[:, :4],
    ),
    "depth": (torch.tensor([[[[1.0, 3.0], [0.5, 0.0]]]]), lambda t: t),
    "normals": (torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1), lambda t: 5 * t),
    "edges": (torch.tensor([[[[1.0, 0.0], [1.0, IGNORE]]]]), lambda t: 80.0 * (t - 0.5)),
    "saliency": (torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), lambda t: 80.0 * (t - 0.5)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_right_costs_nothing_and_is_measured_so(kind):
    target, right = RIGHT[kind]
    assert KINDS[kind].loss(right(target), target).item() == pytest.approx(0, abs=1e-6)
    for name, value in measured(kind, right(target), target, SEGMENTATION).results().items():
        assert value == pytest.approx(0 if name in KINDS[kind].falling else 1, abs=0.0051), name


@pytest.mark.parametrize("kind", RIGHT)
def test_targets_of_another_size_are_refused(kind):
    target, right = RIGHT[kind]
    outputs = right(target)
    for other in (target[..., :1].repeat_interleave(3, -1), target.unsqueeze(0), target[:, 0]):
        wanted = str(list(target.shape)).replace("[", r"\[")
        with pytest.raises(ValueError, match=f"_loss: target must be {wanted} as the predictions, got "):
            KINDS[kind].loss(outputs, other)


def test_every_kind_of_task_can_be_learned_and_measured():
    assert tuple(KINDS) == tuple(TASK_KINDS)


def test_gains_are_above_zero_where_it_is_better():
    gains = relative_gains(
        "depth", {"abs_error": 0.5, "rel_error": 0.3, "delta_1": 0.6}, {"abs_error": 1.0, "rel_error": 0.2}
    )
    assert gains == {"abs_error": pytest.approx(0.5), "rel_error": pytest.approx(-0.5)}
    assert relative_gains("segmentation", {"miou": 0.3}, {"miou": 0.2}) == {"miou": pytest.approx(0.5)}
    assert [value_text(n, v) for n, v in (("miou", 0.275), ("mean_angle", 17.5), ("abs_error", 0.62))] == [
        "27.50%", "17.50 deg", "0.6200",
    ]  # fmt: skip


def test_the_dense_head_reads_as_far_as_its_dilations():
    head = DenseHead(2, Task("t", 1, 4 * 61, 3, "depth"), (61, 61)).eval()
    maps = torch.zeros(1, 2, 61, 61, requires_grad=True)
    values = head(maps)
    assert values.shape == (1, 1, 244, 244)
    for branch in head.branches:
        nn.init.constant_(branch.conv.weight, 1.0)
        nn.init.constant_(branch.norm.bias, 1.0)
    nn.init.constant_(head.conv.weight, 1.0)
    branches = head.conv(torch.cat([branch(maps) for branch in head.branches], 1))
    branches[0, 0, 30, 30].backward()
    rows, columns = maps.grad[0, 0].nonzero(as_tuple=True)
    offsets = {0, *(sign * d for d in (6, 12, 18, 24) for sign in (1, -1))}
    assert {*(rows - 30).tolist()} == {*(columns - 30).tolist()} == offsets


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8])
def test_several_tasks_of_the_same_images_equal_each_tasks_extracted_network(ratio):
    model, x = make(ratio=ratio).eval(), torch.randn(3, 3, 18, 26)
    with torch.no_grad():
        outputs = model([x] * 3, ["segmentation", "depth", "normals"])
        assert [tuple(out.shape) for out in outputs] == [(3, n, 18, 26) for n in (4, 1, 3)]
        for output, task in zip(outputs, TASKS, strict=True):
            for alone in (SubNetwork(model, task.name)(x), model(x, task.name)):
                torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-5)
        batch = task_batch([x] * 3, [0, 1, 2], model.tasks, like=model.gates.gamma)
        routed = model.route(batch).plan.levels  # one plan: an instance is an image and a task
    assert routed.tolist() == [model.gates.edge_levels[k].tolist() for k in range(3) for _ in range(3)]


def test_dense_and_classification_tasks_share_a_graph():
    tasks = (Task("kind", 5, 20, 3), Task("depth", 1, 20, 3, "depth"), Task("edges", 1, 20, 3, "edges"))
    model, x = make(tasks=tasks, trunk_size=5, stages=(3, 2)).eval(), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        outputs = model([x] * 3, ["kind", "depth", "edges"])
        for output, task in zip(outputs, tasks, strict=True):
            torch.testing.assert_close(output, SubNetwork(model, task.name)(x), rtol=1e-4, atol=1e-5)
        parts = model([x, x[:0]], ["depth", "edges"])
    assert [tuple(part.shape) for part in parts] == [(2, 1, 20, 20), (0, 1, 20, 20)]
    with pytest.raises(ValueError, match="tasks per instance must be classification tasks, got depth"):
        model(x, torch.tensor([0, 1]))


def test_the_loss_of_a_batch_is_the_weighted_sum_of_its_tasks():
    model, x = make(ratio=0.3).train(), torch.randn(2, 3, 18, 26)
    targets = [labels(2, 18, 26), 1 + torch.rand(2, 1, 18, 26), torch.randn(2, 3, 18, 26)]
    batch = Batch(("segmentation", "depth", "normals"), [x] * 3, targets)
    total, found = task_loss(model, batch)
    parts = [float(found[f"loss_{task.name}"]) for task in TASKS]
    assert all(math.isfinite(part) and part > 0 for part in parts)
    assert total.item() == pytest.approx(sum(parts), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert "accuracy" not in found
    model = make(ratio=0.3).train()
    weighted, _ = task_loss(model, batch, (1.0, 3.0, 20.0))
    assert weighted.item() == pytest.approx(parts[0] + 3 * parts[1] + 20 * parts[2], rel=1e-5)
    weighted.backward()
    assert model.heads[1].conv.weight.grad.abs().sum() > 0


def test_config_survives_json():
    made = DagConfig(TASKS, trunk_size=(5, 7))
    assert DagConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    square = (Task("d", 1, 20, 3, "depth"),)
    assert DagConfig(square, trunk_size=(5, 5)) == DagConfig(square, trunk_size=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "boxes"}, "kind of 't' must be one of classification, segmentation, .*, got 'boxes'"),
        ({"kind": "depth", "classes": 2}, "classes of 't' must be 1 for depth, got 2"),
        ({"kind": "normals", "classes": 1}, "classes of 't' must be 3 for normals, got 1"),
        ({"kind": "depth", "width": 0}, "width of 't' must be a whole number of at least 1, got 0"),
        ({"width": 30}, "width of 't' must be its size 20, got 30"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "t", "classes": 1, "size": 20, **changes})


@pytest.mark.parametrize(
    ("tasks", "trunk_size", "message"),
    [
        ((DEPTH,), 16, r"trunk_size must be \(5, 7\), a quarter of the images of depth, got 16"),
        ((Task("kind", 5, 20, 3), DEPTH), (5, 7), r"trunk_size must be square for kind, got \(5, 7\)"),
        ((DEPTH,), (0, 7), r"trunk_size must be at least 1, got \(0, 7\)"),
    ],
)
def test_trunks_that_do_not_fit_are_refused(tasks, trunk_size, message):
    with pytest.raises(ValueError, match=message):
        DagConfig(tasks, trunk_size=trunk_size)


def test_images_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"images of task depth must be \[B, 3, 18, 26\] floating, got \[2, 3, 26, 18\]"
    ):
        make()(torch.randn(2, 3, 26, 18), "depth")


def test_a_deep_elastic_network_classifies():
    with pytest.raises(ValueError, match="tasks must be classification tasks, got depth"):
        ModelConfig((DEPTH,))


def test_edge_metrics_need_the_very_pixel():
    target = torch.zeros(1, 1, 4, 4)
    target[..., 1] = 1
    metrics = EdgeMetrics()
    metrics.add(80.0 * (target.roll(1, 3) - 0.5), target)
    assert metrics.results() == {"f_exact": 0.0}
