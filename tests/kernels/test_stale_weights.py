"""What is packed or folded from weights follows every way of writing them, with or without a version counter."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from den import Task, create_model
from den.dag.edge import Edge
from den.nn.blocks import BottleneckBlock, ElasticBlock, LinearPair, LinearPairShape
from den.nn.blocks.bottleneck import BottleneckShape
from den.nn.blocks.pair import ConvPair, PairShape
from den.nn.ends import ConvNormReLU
from den_kernels import DynamicConv2d, RoutingPlan, fold_cache, invalidate
from den_kernels.fold_cache import FoldCache

LEVELS = torch.tensor([1, 2, 0, 2])


def images(channels: int, side: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)


def routed(module: nn.Module, channels: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable]:
    x, route = images(channels, dtype=dtype), RoutingPlan.from_levels(LEVELS[:, None], 2)[0]
    return module.to(dtype), lambda each: each(x, route)


def network() -> tuple[nn.Module, Callable]:
    model, x = create_model("wrn8_1", [Task("a", 3, 16)], levels=3, trunk_size=8), images(3, 16)
    return model, lambda each: each.estimator(x, "a", torch.tensor([[1] * 3, [2] * 3, [0] * 3, [2] * 3]))


MODULES = {
    "layer": lambda: routed(DynamicConv2d(32, 32, 3, padding=1, out_groups=2), 32),
    "layer bfloat16": lambda: routed(DynamicConv2d(32, 32, 3, padding=1, in_groups=2), 32, torch.bfloat16),
    "residual": lambda: routed(ElasticBlock(16, 16, 3), 16),
    "residual of other channels": lambda: routed(ElasticBlock(12, 12, 3), 12),
    "bottleneck": lambda: routed(BottleneckBlock(BottleneckShape(32, 32, 32, 6, 1), 3), 32),
    "pair": lambda: routed(ConvPair(PairShape(16, 16, 16, 6, (False, False)), 2), 16),
    "layers, fully connected": lambda: routed(LinearPair(LinearPairShape(4, 16, 16, 6), 2), 4),
    "convolution and norm": lambda: (ConvNormReLU(3, 16, 3, 1, 1), lambda each: each(torch.ones(4, 3, 6, 6))),
    "edge": lambda: routed(Edge(16, 2), 16),
    "network": network,
}


def by_fused(optimiser: Callable) -> Callable[[nn.Module], None]:
    def step(module: nn.Module) -> None:
        run = optimiser([p for p in module.parameters() if p.requires_grad], lr=0.1, fused=True)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.step()

    return step


def through_data(module: nn.Module) -> None:
    """As an average of weights is kept: half of the old, half of another."""
    for parameter in module.parameters():
        parameter.data.mul_(0.5).add_(torch.randn_like(parameter), alpha=0.5)


def through_numpy(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype == torch.float32:
            parameter.detach().numpy()[...] += 1
        else:
            parameter.data.add_(1)


def one_element(module: nn.Module) -> None:
    weight = max((p for p in module.parameters() if p.nbytes <= 64 << 10), key=torch.numel)
    weight.data[tuple(size // 2 for size in weight.shape)] += 3


def of_statistics(module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.data.add_(1)
    through_data(module)


def replaced(module: nn.Module) -> None:
    """By a tensor over the same memory: the second half of a buffer that began with the old values."""
    for each in module.modules():
        for name, parameter in list(each.named_parameters(recurse=False)):
            setattr(each, name, nn.Parameter(torch.randn_like(parameter), requires_grad=parameter.requires_grad))


def loaded(module: nn.Module) -> None:
    weights = {name: torch.randn_like(weight) for name, weight in module.named_parameters()}
    module.load_state_dict(weights, strict=False, assign=True)


WRITES = {
    "fused AdamW": by_fused(torch.optim.AdamW),
    "fused SGD": by_fused(torch.optim.SGD),
    "param.data": through_data,
    "NumPy": through_numpy,
    "one element through data": one_element,
    "statistics through data": of_statistics,
    "new parameters": replaced,
    "load_state_dict": loaded,
}


@torch.no_grad()
@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("layer")])
def test_another_eps_of_a_norm_is_noticed(module):
    """A setting, and no tensor, that folded weights depend on."""
    torch.manual_seed(0)
    made, run = MODULES[module]()
    before = run(made.eval())
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 3.0
    after = run(made)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, run(copy.deepcopy(made)))


@pytest.mark.parametrize("write", WRITES, ids=str)
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_write_of_any_kind_is_followed(module, write):
    if (module, write) == ("layer bfloat16", "fused SGD"):
        pytest.skip("torch 2.13's fused SGD leaves bfloat16 weights on a CPU as they are")
    module, run = MODULES[module]()
    module.eval()
    with torch.no_grad():
        before = run(module)
        run(module)
    WRITES[write](module)
    with torch.no_grad():
        after, fresh = run(module), run(copy.deepcopy(module))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("view", [
    lambda w: w.transpose(0, 1), lambda w: w[:, :16], lambda w: w[:, :, :1, :1], lambda w: w[:, :, 1:, 1:],
    lambda w: w[16:], lambda w: w.flip(2), lambda w: w.as_strided((32, 32, 1, 1), (1, 32, 1, 1)),
], ids=["transposed", "fewer inputs", "first taps", "last taps", "fewer outputs", "turned", "strides"])  # fmt: skip
def test_a_layer_follows_a_weight_that_becomes_another_view_of_its_memory(view):
    layer = DynamicConv2d(32, 32, 3, padding=1, out_groups=2, bias=False).eval()
    with torch.no_grad():
        layer(images(32), LEVELS)
        layer.weight.data = view(layer.weight.data)
        O, I, R, _ = layer.weight.shape
        layer.out_groups, layer.padding = (O // 2,) * 2, (R // 2,) * 2
        x = images(I)
        assert torch.equal(layer(x, LEVELS), copy.deepcopy(layer)(x, LEVELS))


def test_a_layer_follows_a_weight_that_grows_over_its_memory():
    whole = torch.randn(256, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    layer, x = DynamicConv2d(32, 16, 3, padding=1, out_groups=2, bias=False).eval(), images(32)
    with torch.no_grad():
        layer.weight.data = whole[:16]
        layer(x, LEVELS)
        layer.weight.data, layer.out_groups = whole, (128, 128)
        assert torch.equal(layer(x, LEVELS), copy.deepcopy(layer)(x, LEVELS))


def large() -> tuple[FoldCache, Tensor, Callable[[], float]]:
    cache, weight = FoldCache(), nn.Parameter(torch.randn(256, 256, 3, 3))
    return cache, weight, lambda: cache.get((weight,), lambda: float(weight.detach().double().sum()))


def test_one_element_of_a_large_weight_is_noticed_within_the_turns():
    cache, weight, total = large()
    before = total()
    weight.data[100, 100, 1, 1] += 1
    turns = cache._entry[1].turns
    assert 1 < turns <= 400
    assert any(total() != before for _ in range(turns))


def test_most_of_a_large_weight_is_noticed_at_once():
    _, weight, total = large()
    before = total()
    weight.data.mul_(1.0001)
    assert total() != before


def test_invalidate_forgets_at_once():
    _, weight, total = large()
    before = total()
    weight.data[100, 100, 1, 1] += 1
    invalidate()
    assert total() != before


def test_what_did_not_change_is_kept():
    cache, weight, total = large()
    total()
    made = cache._entry
    for _ in range(300):
        total()
    assert cache._entry is made
    assert cache.get((weight,), lambda: -1.0, "another setting") == -1.0


@pytest.mark.parametrize("tensor", [
    torch.zeros(0), torch.zeros(1), torch.zeros(63), torch.zeros(5, 7)[:, ::2], torch.zeros(1, 4).expand(3, 4),
    torch.zeros(30000, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int64), torch.zeros(100, 100)[:, 3:50],
], ids=lambda t: f"{t.dtype}-{list(t.shape)}-{t.stride()}")  # fmt: skip
@pytest.mark.parametrize("extension", ["extension", "torch"])
def test_tensors_of_any_layout_are_watched(tensor, extension, monkeypatch):
    if extension == "torch":
        monkeypatch.setattr(fold_cache, "extension", None)
    cache, made = FoldCache(), []
    for _ in range(3):
        cache.get((tensor,), lambda: made.append(1))
    assert len(made) == 1
    if tensor.numel():
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        last = tensor.as_strided((1,), (1,), tensor.storage_offset() + reach)
        last.data.copy_(last + 1)
        cache.get((tensor,), lambda: made.append(1))
        assert len(made) == 2


def test_on_other_devices_a_step_of_an_optimiser_drops_the_value():
    cache, made = FoldCache(), []
    weight, other = nn.Parameter(torch.zeros(3, device="meta")), nn.Parameter(torch.zeros(3))
    for _ in range(2):
        cache.get((weight,), lambda: made.append(1))
    assert len(made) == 1
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1, fused=True).step()
    cache.get((weight,), lambda: made.append(1))
    assert len(made) == 2


def test_inference_tensors_are_never_kept():
    cache, made = FoldCache(), []
    with torch.inference_mode():
        weight = torch.zeros(3)
        for _ in range(2):
            cache.get((weight,), lambda: made.append(1))
    assert len(made) == 2
