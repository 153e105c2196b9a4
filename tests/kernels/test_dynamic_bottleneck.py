"""The bottleneck block in one direct call: against the composed block in float64, by selection, shape and threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den.nn.blocks import BottleneckShape
from den_kernels import RoutingPlan
from den_kernels._extension import extension
from den_kernels.testing import make_levels, make_mask
from tests.fuzz import examples
from tests.oracle import unlike_new

L = 4
HERE = [torch.float32, *([torch.bfloat16] if extension is not None and extension.bf16_isa() == "AMX" else [])]
DTYPES = st.sampled_from(HERE)
pytestmark = pytest.mark.skipif(extension is None or not extension.has_direct_float32(), reason="this CPU has no AVX2")


def make(in_channels, hidden, channels, size, stride=1, cardinality=1, first=False):
    torch.manual_seed(0)
    return unlike_new(BottleneckShape(in_channels, hidden, channels, size, stride, cardinality).build(L, first)).eval()


def route_of(kind, batch, seed=0):
    if kind == "mask":
        return RoutingPlan.from_masks(make_mask(batch, L - 1, seed)[:, None])[0]
    return RoutingPlan.from_levels(make_levels(kind, batch, L - 1, seed)[:, None], L - 1)[0]


def images(block, batch, size, seed=1):
    x = torch.randn(batch, block.conv1.in_channels, *size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def direct(block, x, route, inplace=False):
    assert block.folded().direct is not None
    return block(x, route, inplace=inplace)


def check(block, x, route):
    """No element errs more than the composed block in float64 allows; of bfloat16 twice what that errs in bfloat16."""
    dtype = x.dtype
    with torch.no_grad():
        composed = (block.shortcut(x) + block.residual(x, route)).double()
    expected = block.double()(x.double(), route).detach()  # with gradients: composed, each convolution for itself
    got, largest = direct(block.to(dtype), x, route), max(1.0, expected.abs().max().item()) if len(x) else 1.0
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * largest)
    elif len(x):
        allowed = max(2 * (composed - expected).abs().max().item(), largest * 2**-8)
        assert (got.double() - expected).abs().max().item() <= allowed
    if got.shape == x.shape:
        twin = x.clone(memory_format=torch.channels_last)
        assert direct(block, twin, route, inplace=True).data_ptr() == twin.data_ptr()
        assert torch.equal(twin, got)
        skipped = route.levels == 0
        assert torch.equal(got[skipped], x[skipped])


@given(
    dtype=DTYPES,
    in_channels=st.sampled_from([16, 48, 128]),
    hidden=st.sampled_from(
        [(64, 1), (128, 1), (64, 4), (192, 4), (192, 6), (128, 8), (64, 8), (192, 24), (128, 32), (64, 32), (64, 64)]
    ),
    grows=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(3, 15), st.integers(3, 22)),
    stride=st.sampled_from([1, 2]),
    batch=st.sampled_from([1, 2, 5, 13]),
    kind=st.sampled_from(["mask", "uniform", "top", "zero"]),
    first=st.booleans(),
    seed=st.integers(0, 99),
)
@examples(60)
def test_it_is_the_composed_block(dtype, in_channels, hidden, grows, size, stride, batch, kind, first, seed):
    if dtype == torch.bfloat16:  # with AMX: no cardinality, inputs in blocks of 32
        in_channels, hidden = -(-in_channels // 32) * 32, (hidden[0], 1)
    block = make(in_channels, hidden[0], in_channels * grows, max(size), stride, hidden[1], first).to(dtype)
    check(block, images(block, batch, size, seed).to(dtype), route_of(kind, batch, seed))


@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (14, 28), (56, 40)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3, 40])
def test_bands_and_groups_of_instances(size, batch, dtype):
    """Maps beyond the scratch memory, one instance shared by all threads, many small maps together, none."""
    if batch == 40 and size[0] > 14:
        size = (20, 20)
    block = make(128, 64, 128, max(size)).to(dtype)
    check(block, images(block, batch, size).to(dtype), route_of("uniform", batch))


@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("cardinality", [8, 32])
def test_threads_share_without_changing_a_bit(batch, threads, cardinality, dtype):
    block = make(64, 128, 64, 12, cardinality=cardinality if dtype == torch.float32 else 1).to(dtype)
    x, route, before = images(block, batch, (12, 14)).to(dtype), route_of("uniform", batch), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = direct(block, x, route)
        torch.set_num_threads(threads)
        assert torch.equal(direct(block, x, route), alone)
    finally:
        torch.set_num_threads(before)


def test_a_nan_passes_through_and_stays_in_its_image():
    block = make(64, 64, 64, 8)
    x, route = images(block, 4, (8, 8)), route_of("top", 4)
    clean = direct(block, x, route)
    x[2, 5, 3, 3] = torch.nan
    got = direct(block, x, route)
    assert got[2, :, 3, 3].isnan().all()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


def test_a_frozen_block_computes_the_same_and_refuses_the_rest():
    block = make(64, 64, 64, 8)
    x, route = images(block, 4, (8, 8)), route_of("uniform", 4)
    expected = direct(block, x, route)
    with torch.no_grad():
        block.freeze()
        assert torch.equal(block(x, route), expected)
        assert block.conv2.weight.untyped_storage().nbytes() == block.conv2.weight.element_size()
        with pytest.raises(ValueError, match="BottleneckBlock: a frozen block must run with a route"):
            block(x)
        with pytest.raises(TypeError, match=r"x must be torch.float32 as the weights are, got torch.float64"):
            block(x.double(), route)
    for use in (lambda: block(x, route), block.train, block.state_dict):
        with pytest.raises(ValueError, match="frozen"):
            use()


BAD_INPUTS = {
    "channels": ((2, 48, 4, 4), route_of("uniform", 2), r"x must be \[B, 32, H, W\]"),
    "no rows": ((2, 32, 0, 4), route_of("uniform", 2), "H and W of at least 1"),
    "no columns": ((2, 32, 4, 0), route_of("uniform", 2), "H and W of at least 1"),
    "number of levels": ((2, 32, 4, 4), route_of("uniform", 3), "instances must be 2, got 3"),
    "groups": ((2, 32, 4, 4), RoutingPlan.from_levels(torch.ones(2, 1).int(), 2)[0], "groups must be 3, got 2"),
}


@pytest.mark.parametrize("dtype", HERE)
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input(case, dtype):
    shape, route, message = BAD_INPUTS[case]
    block = make(32, 64, 32, 4).to(dtype)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        block(torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last), route)


def test_images_on_another_device_are_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="x must be on cpu as the weights are, got meta"):
        make(32, 64, 32, 4)(torch.empty(2, 32, 4, 4, device="meta"), route_of("uniform", 2))


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((24, 64, 24), torch.float32), ((32, 40, 32), torch.float32), ((48, 64, 48), torch.bfloat16)],
    ids=["24 channels", "40 hidden channels", "bfloat16, 48 channels"],
)
def test_it_is_left_out_where_it_does_not_run(sizes, dtype):
    in_channels, hidden, channels = sizes
    block = make(in_channels, hidden, channels, 8).to(dtype)
    x = images(block, 4, (8, 8)).to(dtype)
    assert block.folded().direct is None
    with torch.no_grad():
        got = block(x, route_of("uniform", 4))
    expected = block.double()(x.double(), route_of("uniform", 4)).detach()
    near = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.double(), expected, rtol=near, atol=near * expected.abs().max().item())
