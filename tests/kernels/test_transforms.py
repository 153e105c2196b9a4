"""torch.func and forward-mode differentiation of the ops: right values or an error, never wrong values."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from den.nn.blocks import BottleneckShape, ElasticBlock
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, RoutingPlan

SIZES = (4, 4, 8)
ROUTE = RoutingPlan.from_levels(torch.tensor([[1], [3]]), 3)[0]
MODULES = {
    "convolution": lambda: DynamicConv2d(16, 16, 3, padding=1, out_groups=SIZES),
    "frozen convolution": lambda: DynamicConv2d(16, 16, 3, padding=1, in_groups=SIZES).requires_grad_(False),
    "norm": lambda: DynamicBatchNorm2d(16, groups=SIZES).eval(),
    "norm in training": lambda: DynamicBatchNorm2d(16, groups=SIZES, track_running_stats=False),
    "block": lambda: ElasticBlock(16, 16, 4).eval(),
    "bottleneck": lambda: BottleneckShape(16, 16, 16, 4, 1).build(4).eval(),
}


def images(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("name", MODULES)
def test_forward_mode_derivatives_are_refused(name, gradients):
    torch.manual_seed(0)
    module, x = MODULES[name](), images(2, 16, 4, 4)
    with torch.set_grad_enabled(gradients):
        expected = module(x, ROUTE)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            jvp(lambda t: module(t, ROUTE), (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            torch.testing.assert_close(module(x, ROUTE), expected)  # no tangent: nothing to lose
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                module(forward_ad.make_dual(x, torch.ones_like(x)), ROUTE)


@pytest.mark.parametrize("name", ["block", "bottleneck"])
def test_frozen_blocks_refuse_them_too_and_run_under_dispatch_modes(name):
    torch.manual_seed(0)
    block, x = MODULES[name](), images(2, 16, 4, 4)
    with torch.no_grad():
        expected = block(x, ROUTE)
        block.freeze()
        with FlopCounterMode(display=False):
            assert torch.equal(block(x, ROUTE), expected)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            block(forward_ad.make_dual(x, torch.ones_like(x)), ROUTE)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_convolution_is_a_loop():
    torch.manual_seed(0)
    module, x = MODULES["convolution"](), images(3 * 2, 16, 4, 4).unflatten(0, (3, 2))
    with torch.no_grad():
        found = vmap(lambda part: module(part, ROUTE))(x)
        torch.testing.assert_close(found, torch.stack([module(part, ROUTE) for part in x]), rtol=1e-4, atol=1e-5)
