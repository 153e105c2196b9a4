"""`den.Engine` on a CPU and on a simulated GPU: networks of both kinds, every rule for the levels, bad input."""

import threading

import pytest
import torch
from torch import nn

import den
import den_kernels
from den.evaluate.operating import LevelCosts
from den.inference.networks import split
from den.inference.points import Point, structure_within, within_milliseconds
from den.nn.graphs import bucket
from den.nn.task_batch import TaskBatch
from tests.oracle import unlike_new
from tests.simulated_gpu import simulated
from tests.stand_ins import PlainBasicBlock

TASKS = (den.Task("a", classes=3, size=8), den.Task("b", classes=5, size=8))


@pytest.fixture(scope="module")
def network() -> den.DeepElasticNetwork:
    torch.manual_seed(0)
    model = den.DeepElasticNetwork(
        den.ModelConfig(TASKS, stages=((16, 2), (16, 1)), backbone="wrn", stem=8, levels=3, trunk_size=8)
    )
    for head in model.selector.heads:
        nn.init.normal_(head.weight)
    return unlike_new(model).eval()


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    blocks = [PlainBasicBlock(16, 16), PlainBasicBlock(16, 16)]
    model = unlike_new(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    den_kernels.convert(model.eval(), 2, example=images()[:1])
    return model


def images(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def close(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("most", [2, 64])
def test_a_deep_elastic_network_in_all_forms_of_a_call(network, most):
    engine, x = den.Engine(network, max_batch=most, device="cpu"), images()
    own = torch.randint(3, (5, 3))
    with torch.no_grad():
        close(engine(x, "b"), network(x, "b"))
        logits, levels = engine(x, 1, return_levels=True)
        close(logits, network(x, 1))
        assert torch.equal(levels, network.select(x, 1))
        parts = [x[:3], x]
        for got, wanted in zip(engine(parts, ["b", "a"]), network(parts, ["b", "a"]), strict=True):
            close(got, wanted)
        tasks = torch.tensor([1, 0, 1, 1, 0])
        got, levels = engine(x, tasks, return_levels=True)
        close(got, network(x, tasks))
        assert torch.equal(levels, network.select(x, tasks))
        close(engine(x, tasks, levels=own), network.estimator(x, tasks, own))
        assert engine(x[:0], "a").shape == (0, 3)


@pytest.mark.parametrize("most", [2, 64])
def test_a_converted_model_at_given_fixed_and_selected_levels(converted, most):
    x, own = images(), torch.tensor([[0, 1], [2, 2], [1, 0], [2, 1], [0, 0]])
    engine = den.Engine(converted, max_batch=most, device="cpu", images=x)
    with torch.no_grad():
        close(engine(x), converted(x))
        with den_kernels.levels(converted, own):
            close(engine(x, levels=own), converted(x))
        with den_kernels.levels(converted, torch.tensor([[1, 2]]).expand(5, -1)):
            close(den.Engine(converted, levels=[1, 2], device="cpu", images=x)(x), converted(x))
        elastic = den.attach_selector(converted, x)
        nn.init.normal_(elastic.selector.selector.heads[0].weight)
        got, levels = den.Engine(elastic, device="cpu", images=x)(x, return_levels=True)
        assert torch.equal(levels, elastic.eval().selector(x))
        close(got, elastic(x))


@pytest.mark.parametrize("flops", [0.3, 0.6, 1.0])
def test_a_share_of_the_flops_is_kept_to(network, converted, flops):
    x = {"a": images(24), "b": images(24, 1)}
    engine = den.Engine(network, device="cpu", flops=flops, images=x)
    for name, own in x.items():
        _, levels = engine(own, name, return_levels=True)
        assert engine.network.costs.of(levels).mean() <= flops + 1e-6
    plain = den.Engine(converted, device="cpu", flops=max(flops, 0.4), images=images())
    assert plain.point.structure is not None
    assert plain.network.costs.of(plain.point.structure[None])[0] <= max(flops, 0.4)
    steered = den.Engine(
        den.attach_selector(converted, images()), device="cpu", flops=max(flops, 0.4), images=images(24)
    )
    _, levels = steered(images(24), return_levels=True)
    assert steered.network.costs.of(levels).mean() <= max(flops, 0.4) + 1e-6


def test_milliseconds_are_kept_to_by_a_clock():
    """A machine that takes half as long again as its blocks alone."""
    costs = LevelCosts(torch.tensor([[0.0, 1, 2]], dtype=torch.float64).expand(20, -1), 2.0)
    clock = lambda point: 1.5 * float(costs.of(point.structure[None])[0])  # noqa: E731
    fit = lambda limit: Point(structure_within(costs, [0] * 20, limit))  # noqa: E731
    assert 26 < clock(within_milliseconds(fit, clock, costs, 30.0)) <= 30.6
    assert within_milliseconds(fit, clock, costs, 1000.0).structure.tolist() == [2] * 20
    with pytest.raises(ValueError, match="budget_ms must be at least 3, the cheapest structure's, got 2"):
        within_milliseconds(fit, clock, costs, 2.0)


def test_an_engine_has_time_for_all_or_for_nothing(network, converted):
    x = {"a": images(4), "b": images(4, 1)}
    assert den.Engine(network, device="cpu", budget_ms=1e6, images=x).point.shift is not None
    assert den.Engine(converted, device="cpu", budget_ms=1e6, images=x["a"]).point.structure.tolist() == [2, 2]
    for model, own in ((network, x), (converted, x["a"])):
        with pytest.raises(ValueError, match="budget_ms must be at least"):
            den.Engine(model, device="cpu", budget_ms=1e-9, images=own)


def test_structures_within_a_budget_are_the_largest_even_ones_and_a_little_more():
    costs = LevelCosts(torch.tensor([[0.0, 1, 2], [0, 2, 4], [0, 1, 2]], dtype=torch.float64), 1.0)
    assert structure_within(costs, (0, 0, 0), 6.0).tolist() == [2, 1, 1]
    assert structure_within(costs, (0, 0, 0), 9.0).tolist() == [2, 2, 2]
    assert structure_within(costs, (0, 1, 0), 3.0).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="budget must be at least 3, the cheapest structure's, got 2"):
        structure_within(costs, (0, 1, 0), 2.0)


def test_batches_are_cut_without_losing_an_instance():
    parts = (torch.zeros(3, 1), torch.ones(0, 1), torch.full((4, 1), 2.0))
    pieces = split(TaskBatch((1, 0, 1), parts, None, "list"), 2)
    assert [piece.batch.sizes for piece in pieces] == [[2], [1, 0, 1], [2], [1]]
    assert [piece.parts for piece in pieces] == [(0,), (0, 1, 2), (2,), (2,)]
    assert [bucket(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


def test_profiles_tell_levels_flops_and_times(network, converted):
    shown = den.Engine(network, device="cpu").profile(images(), "a")
    assert len(shown.blocks) == len(shown.milliseconds) == 3
    assert shown.images == 5
    engine = den.Engine(converted, device="cpu", levels=[0, 1], images=images())
    shown = engine.profile(images())
    assert shown.level == (0, 1)
    assert shown.saved == pytest.approx((1, 0.5))
    assert all(ms is not None for ms in shown.milliseconds)
    assert "FLOPs saved" in str(shown)
    assert "100%" in str(shown)


def test_threads_share_an_engine(converted):
    engine, x = den.Engine(converted, device="cpu", images=images()), images()
    alone = [engine(x, levels=torch.full((5, 2), level)) for level in range(3)]
    wrong: list[int] = []

    def work(level: int) -> None:
        for _ in range(20):
            if not torch.equal(engine(x, levels=torch.full((5, 2), level)), alone[level]):
                wrong.append(level)

    threads = [threading.Thread(target=work, args=(level,)) for level in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_on_a_gpu_batches_are_replays_of_graphs_of_few_sizes(network, converted, monkeypatch):
    x, own = images(3), torch.tensor([[0, 1, 2], [2, 2, 2], [1, 0, 1]])
    with torch.no_grad():
        wanted, given = network(x, "b"), network.estimator(x, "b", own)
        mixed = network([x, x[:1]], ["a", "b"])
        with den_kernels.levels(converted, own[:, :2]):
            of_converted = converted(x)
    with simulated(monkeypatch):
        engine = den.Engine(network, max_batch=4, device="cuda")
        for _ in range(2):
            close(engine(x, "b").cpu(), wanted)
            close(engine(x[:3], "b", levels=own).cpu(), given)
        close(engine(images(4)[:3], "b").cpu(), wanted)
        assert len(engine._graphs) == 2
        for got, exact in zip(engine([x, x[:1]], ["a", "b"]), mixed, strict=True):
            close(got.cpu(), exact)
        again = torch.cat([x, x, x])
        close(engine(again, "b").cpu(), torch.cat([wanted] * 3))
        other = den.Engine(converted, device="cuda", images=x)
        close(other(x, levels=own[:, :2]).cpu(), of_converted)


BAD = {
    "another model": (lambda n, c: den.Engine(nn.ReLU()), "model must be a DeepElasticNetwork, or one that"),
    "another dtype": (lambda n, c: den.Engine(n, dtype=torch.int8), "dtype must be float32, bfloat16 or float16"),
    "no batch": (lambda n, c: den.Engine(n, max_batch=0), "max_batch must be a whole number of at least 1, got 0"),
    "two rules": (lambda n, c: den.Engine(n, flops=0.5, budget_ms=2), "must not be given together"),
    "flops above 1": (lambda n, c: den.Engine(c, flops=1.5), "flops must be above 0 and at most 1"),
    "no images": (lambda n, c: den.Engine(n, flops=0.5), "images must be given to meet a budget on, got None"),
    "images of one task": (lambda n, c: den.Engine(n, flops=0.5, images={"a": images()}), "got none for b"),
    "no task": (lambda n, c: den.Engine(n, device="cpu")(images()), r"task must be given .* \(a, b\)"),
    "a task of a converted model": (
        lambda n, c: den.Engine(c, device="cpu", images=images())(images(), "a"),
        "task must be None",
    ),
    "levels of another shape": (
        lambda n, c: den.Engine(n, device="cpu")(images(), "a", levels=torch.zeros(5, 2).long()),
        r"levels must be integer \[5, 3\]",
    ),
    "levels out of range": (
        lambda n, c: den.Engine(n, device="cpu")(images(), "a", levels=torch.full((5, 3), 3)),
        r"levels must be in 0..2, got 3..3",
    ),
    "no images at all": (
        lambda n, c: den.Engine(c, device="cpu", images=images())("x"),
        r"images must be a floating tensor \[B, C, H, W\]",
    ),
    "a selector of no images": (lambda n, c: den.attach_selector(c, images(0)), "images must be .* with at least one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_words(network, converted, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(network, converted)
