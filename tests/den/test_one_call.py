"""Estimator and selector as one call of the library of kernels: the values of their layers, whatever the batch."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from den import SelectorConfig, Task, create_model
from den.nn.task_batch import task_batch
from den_kernels._extension import extension
from den_kernels.testing import float32_limited_to

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32(), reason="needs the extension on a CPU with AVX2"
)
TASKS = [Task("small", 5, 8, channels=1), Task("large", 7, 20), Task("third", 3, 16)]
DTYPES = (
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            extension is None or not extension.has_direct_bf16(), reason="needs a CPU with AVX-512 BF16"
        ),
    ),
)


def network(dtype: torch.dtype = torch.float32, backbone: str = "wrn14_1", **settings):
    torch.manual_seed(0)
    model = create_model(backbone, TASKS, trunk_size=16, **settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for head in model.selector.heads:
        nn.init.normal_(head.weight, std=0.5)  # logits that differ
    return model.eval().to(dtype)


def images(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Of each task so many images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, t.channels, t.size, t.size, generator=generator).to(dtype) for t in TASKS]


def layer_by_layer(model):
    """A copy whose layers are called one by one: the library does not run layers that a hook watches."""
    own = copy.deepcopy(model)
    for layer in (own.selector.stems[0], own.estimator.stems[0]):
        layer.register_forward_hook(lambda *_: None)
    return own


def batch_of(model, parts: list[Tensor]):
    return task_batch(parts, [task.name for task in TASKS], model.tasks, like=model.estimator.heads[0].weight)


def test_what_is_one_call():
    """Neither a watched network nor one that is trained, and no other selector than the plain one."""
    model, parts = network(), images(2)
    batch = batch_of(model, parts)
    with torch.no_grad():
        assert model.selector.one_call(batch) is not None
        assert model.estimator.one_call(batch) is not None
        watched = layer_by_layer(model)
        assert watched.selector.one_call(batch) is None
        assert watched.estimator.one_call(batch) is None
        assert network(selector=SelectorConfig((8, 16), residual=True)).selector.one_call(batch) is None
        assert network(selector=SelectorConfig((8, 16), shared_head=True)).selector.one_call(batch) is not None
        assert model.train().estimator.one_call(batch) is None
    assert model.eval().selector.one_call(batch) is None


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_of_the_layers_one_by_one(dtype, count):
    """At most twice the error that the layers make against float64."""
    model, parts = network(dtype), images(count, dtype)
    plain, exact = layer_by_layer(model), layer_by_layer(copy.deepcopy(model).double())
    batch = batch_of(model, parts)
    levels = torch.randint(4, (3 * count, model.num_blocks), generator=torch.Generator().manual_seed(2))

    def runs(own, dtype):
        batch = batch_of(own, [part.to(dtype) for part in parts])
        return [own.selector.run(batch), *own.estimator.part_logits(batch, own.estimator.level_plan(levels))]

    assert model.selector.one_call(batch) is not None
    for got, wanted, truth in zip(runs(model, dtype), runs(plain, dtype), runs(exact, torch.float64), strict=True):
        assert got.dtype == dtype
        assert got.shape == truth.shape
        if count:
            allowed = 2 * (wanted.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
            assert (got.double() - truth).abs().max() <= allowed


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_the_batch_and_the_threads(dtype):
    """Permuted, one by one, with other tasks beside it; with one thread and with several."""
    model = network(dtype, "wrn8_4")
    own = torch.cat([images(12, dtype)[1]])
    order, threads = torch.randperm(12, generator=torch.Generator().manual_seed(3)), torch.get_num_threads()

    def run(batch: Tensor) -> tuple[Tensor, Tensor]:
        return model(batch, "large", return_levels=True)

    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(own))
            results.append(tuple(rows[order.argsort()] for rows in run(own[order])))
            results.append(tuple(map(torch.cat, zip(*map(run, own.split(1)), strict=True))))
            results.append(tuple(map(torch.cat, zip(*map(run, own.split(3)), strict=True))))
            small, large = images(2, dtype)[0], own
            mixed, levels = model([small, large], ["small", "large"], return_levels=True)
            results.append((mixed[1], levels[2:]))
    finally:
        torch.set_num_threads(threads)
    for logits, levels in results:
        assert torch.equal(levels, results[0][1])
        assert torch.equal(logits, results[0][0])
    assert len(results[0][1].unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_network_has_the_same_bits(dtype):
    model, parts = network(dtype), images(5, dtype)
    names = [task.name for task in TASKS]
    wanted, levels = model(parts, names, return_levels=True)
    got, frozen = copy.deepcopy(model).freeze()(parts, names, return_levels=True)
    assert torch.equal(levels, frozen)
    assert all(map(torch.equal, got, wanted))


@torch.no_grad()
def test_levels_are_the_largest_logits_and_what_select_gives():
    model, parts = network(), images(6)
    names = [task.name for task in TASKS]
    chosen = model.select(parts, names)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, model.selector_logits(parts, names).argmax(-1))
    assert torch.equal(chosen, model(parts, names, return_levels=True)[1])


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, 0.0], ids=str)
def test_ties_and_nan_are_chosen_as_argmax_does(value):
    model = network()
    for head in model.selector.heads:
        head.weight.zero_()
        head.bias.view(-1, 4)[:, 2:] = value if value != value else 1.0
    [part] = images(3)[1:2]
    chosen = model.select(part, "large")
    assert torch.equal(chosen, model.selector_logits(part, "large").argmax(-1))
    assert (chosen == 2).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "place",
    [
        "estimator.stems.1.conv.conv.weight", "estimator.stems.1.conv.norm.running_mean", "estimator.norm.bias",
        "estimator.heads.1.weight", "estimator.heads.1.bias", "selector.stems.1.conv.conv.weight",
        "selector.convs.1.norm.weight", "selector.norms.1.running_var", "selector.heads.1.bias",
    ],
)  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True])
def test_a_changed_weight_is_noticed(place, frozen):
    model, [part] = network(), images(4)[1:2]
    model = model.freeze() if frozen else model
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def run(own) -> list[Tensor]:
        return [own.selector_logits(part, "large"), own.estimator(part, "large", torch.full((4, own.num_blocks), 2))]

    before = run(model)
    tensors[place].add_(torch.rand(tensors[place].shape, generator=torch.Generator().manual_seed(4)))
    after = run(model)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for got, wanted in zip(after, run(layer_by_layer(model)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def _freeze_a_block(model) -> None:
    model.estimator.blocks[1].freeze()


def _replace_a_head(model) -> None:
    model.estimator.heads[1] = copy.deepcopy(model.estimator.heads[1])
    model.estimator.heads[1].weight.mul_(-1)


def _replace_a_convolution(model) -> None:
    model.selector.stems[1].conv.conv = copy.deepcopy(model.selector.stems[1].conv.conv)
    model.selector.stems[1].conv.conv.weight.mul_(-1)


def _drop_a_block(model) -> None:
    del model.estimator.blocks[3]
    model.estimator.num_blocks -= 1


def _set_an_eps(model) -> None:
    model.estimator.norm.eps = model.selector.norms[1].eps = 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [_freeze_a_block, _replace_a_head, _replace_a_convolution, _drop_a_block, _set_an_eps],
    ids=lambda change: change.__name__.strip("_"),
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_changed_layer_is_noticed(change, frozen):
    """The values of a copy that has never run before."""
    model, [part] = network(), images(4)[1:2]
    model = model.freeze() if frozen else model
    model(part, "large")
    change(model)
    fresh = copy.deepcopy(model)
    assert torch.equal(model.selector_logits(part, "large"), fresh.selector_logits(part, "large"))
    levels = torch.full((4, model.estimator.num_blocks), 2)
    assert torch.equal(model.estimator(part, "large", levels), fresh.estimator(part, "large", levels))


@torch.no_grad()
def test_a_hook_sees_its_layer():
    model, [part] = network(), images(2)[1:2]
    model(part, "large")
    seen = []
    for layer in (
        model.estimator.stems[1], model.estimator.heads[1], model.estimator.blocks[2], model.selector.convs[0]
    ):  # fmt: skip
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    model(part, "large")
    assert len(seen) == 4


@torch.no_grad()
def test_the_same_bits_with_avx2():
    model, [part] = network(), images(5)[1:2]
    wanted, levels = model(part, "large", return_levels=True)
    with float32_limited_to("AVX2"):
        got, again = copy.deepcopy(model)(part, "large", return_levels=True)
    assert torch.equal(levels, again)
    assert torch.equal(got, wanted)


def test_a_frozen_network_holds_its_weights_once():
    model = create_model("wrn14_1", [Task("a", 10, 32)]).eval()
    images, levels = torch.randn(3, 3, 32, 32), torch.full((3, 6), 2)
    with torch.no_grad():
        model.freeze()
        model(images, "a")
        model.estimator(images, "a", model.estimator.level_plan(levels))
        model.estimator(images, "a", levels)
    for block in model.estimator.blocks:
        assert block.folded() is block._frozen
        assert block._folded._entry is None  # nothing was folded beside it, from weights that are gone


@torch.no_grad()
def test_a_network_that_nobody_uses_is_freed_at_once():
    """What is kept between calls refers to no owner: its weights would stay until Python looks for cycles."""
    model = network()
    model(images(2), [task.name for task in TASKS])
    assert model.estimator.one_call(batch_of(model, images(2))) is not None
    modules = [weakref.ref(module) for module in model.modules()]
    gc.disable()
    try:
        del model
        alive = [type(module).__name__ for ref in modules if (module := ref()) is not None]
    finally:
        gc.enable()
    assert not alive
