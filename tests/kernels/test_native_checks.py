"""Every tensor that a binding of the extension takes is checked: another device, dtype, size or layout is an error.

A binding that forgot one would read or write out of bounds, or end the process.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from den_kernels import RoutingPlan
from den_kernels._extension import extension

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32(),
    reason="the direct kernels need the extension and AVX2",
)
B, C, M, H = 6, 32, 32, 5


def maps(channels: int, batch: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, channels, H, H).to(dtype).contiguous(memory_format=torch.channels_last)


def route_tensors(masks: bool = False) -> list:
    levels = torch.tensor([0, 1, 2, 2, 1, 0])
    chosen = levels[:, None] > torch.arange(2)
    plan = RoutingPlan.from_masks(chosen[:, None]) if masks else RoutingPlan.from_levels(levels[:, None], 2)
    return [plan[0].order, plan[0].offsets, plan[0].mask]


def packed(O: int, I: int, taps: int) -> Tensor:
    return torch.randn(-(-O // 16), -(-I // 16), taps, 16, 16)


WINDOW = ((3, 3), (1, 1), (1, 1), (1, 1))


def conv(x, out, order, offsets, mask, weight, bias):
    window = extension.Window(*WINDOW, (), (16, 16))
    extension.dynamic_conv(x, out, (2, order, offsets, mask), window, weight, bias)


def phase(x, dx, order, offsets, mask, weight):
    window = extension.Window(*WINDOW, (), (16, 16))
    extension.dynamic_conv_phase(x, dx, (2, order, offsets, mask), window, weight, (1, 0), (2, 2))


def gradient(x, grad, dweight, order, offsets, mask):
    window = extension.Window(*WINDOW, (), (16, 16))
    extension.dynamic_conv_weight_gradient(x, grad, dweight, (2, order, offsets, mask), window)


def residual(x, shortcut, out, order, offsets, mask, *weights):
    block = extension.ResidualBlock((C, M, C, 3, 3, 1), (16, 16), weights)
    block(x, shortcut, out, (2, order, offsets, mask))


def bottleneck(x, shortcut, out, order, offsets, mask, *weights):
    block = extension.BottleneckBlock((C, M, C, 3, 3, 1, 1), (16, 16), weights)
    block(x, shortcut, out, (2, order, offsets, mask))


def inverted(x, shortcut, out, order, offsets, mask, *weights):
    block = extension.InvertedResidualBlock((C, M, C, 3, 3, 1, 16), (16, 16), weights, (2, 1, 6))
    block(x, shortcut, out, (2, order, offsets, mask))


def trunk(x, levels, wider, features, scale, shift):
    shapes, weights = ((C, M, C, 3, 3, 1), (C, M, 2 * C, 3, 3, 1)), lambda out: (
        vector(), vector(), packed(M, C, 9), vector(), vector(), packed(out, M, 9), None
    )  # fmt: skip
    blocks = [extension.ResidualBlock(shape, (16, 16), weights(shape[2])) for shape in shapes]
    extension.Trunk(blocks, scale, shift)(x, levels, [wider], features)


STEM, CONV = (3, C, 3, 3, 1, 1), (C, 16, 3, 3, 2, 1)  # C, C_out, R, S, stride, padding


def selector(images, stem, stem_bias, weight, bias, scale, shift, head, head_bias, logits, chosen):
    first, second = extension.DenseConv(STEM, stem, stem_bias), extension.DenseConv(CONV, weight, bias)
    made = extension.TaskNetwork([first], [second], [extension.Head((head, head_bias, scale, shift))])
    made([(0, images)], None, [logits], chosen)


def estimator(images, stem, stem_bias, head, head_bias, levels, logits):
    weights = vector(), vector(), packed(M, C, 9), vector(), vector(), packed(C, M, 9), None
    shared = extension.Trunk([extension.ResidualBlock((C, M, C, 3, 3, 1), (16, 16), weights)], vector(), vector())
    conv = extension.DenseConv(STEM, stem, stem_bias)
    made = extension.TaskNetwork([conv], shared, [extension.Head((head, head_bias, None, None))])
    made([(0, images)], levels, [logits], None)


def dense_packed(sizes: tuple[int, ...]) -> Tensor:
    return torch.randn(extension.dense_packed_size(sizes, False))


def graph(x, out, levels, read_in, gates, read_out, weight, bias):
    made = extension.Graph(2, [(0, 1)], C, (3, 3), [weight], [bias])
    made(x, out, levels, read_in, gates, read_out)


def norm_forward(x, selection, statistics, weight, bias, y):
    batch = extension.NormBatch(x, selection, (16, 16))
    extension.norm_apply(batch, extension.NormAffine(batch, statistics, weight, bias, 1e-5, True), x, y)


def norm_backward(dy, x, selection, statistics, sums, dx):
    batch = extension.NormBatch(x, selection, (16, 16))
    affine = extension.NormAffine(batch, statistics, None, None, 1e-5, False)
    extension.norm_reduce(batch, affine, dy, x, sums)
    extension.norm_gradient(batch, affine, dy, x, sums, dx)


def norm_statistics(x, selection, statistics):
    extension.norm_statistics(extension.NormBatch(x, selection, (16, 16)), x, statistics)


def vector(n: int = C) -> Tensor:
    return torch.rand(n) + 0.5


def selection() -> Tensor:
    return torch.ones(B, 2, dtype=torch.bool)


def order(n: int = 4) -> Tensor:
    return torch.arange(n, dtype=torch.int32)


def unpacked_residual() -> list:
    first, second = (torch.randn(C, C, 3, 3).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return [vector(), vector(), first, vector(), vector(), second, vector()]


# The call, and its tensors, in the order of its arguments. Each must fit, in the sizes above.
CALLS: dict[str, tuple[Callable, Callable[[], list]]] = {
    "plan_levels": (
        lambda *tensors: extension.plan_levels(tensors[0], 2, *tensors[1:]),
        lambda: [torch.ones(B, 3).long(), *torch.zeros(2, 3, B, dtype=torch.int32), torch.zeros(3, 4).int()],
    ),
    "plan_masks": (
        lambda *tensors: extension.plan_masks(*tensors),
        lambda: [torch.ones(3, B, 2).bool(), *torch.zeros(2, 3, B, dtype=torch.int32), torch.zeros(3, B + 1).int()],
    ),
    "gather_rows": (
        lambda x, out, order, scale, shift: extension.gather_rows(x, out, order, 0, scale, shift, True),
        lambda: [maps(C), maps(C, 4), order(), vector(), vector()],
    ),
    "scatter_rows": (
        lambda rows, out, order: extension.scatter_rows(rows, out, order, 0, True),
        lambda: [maps(C, 4), maps(C), order()],
    ),
    "pool_rows": (lambda x, out: extension.pool_rows(x, out, 1), lambda: [maps(C), maps(C)]),
    "norm_statistics": (norm_statistics, lambda: [maps(C), selection(), torch.zeros(3, C)]),
    "norm_apply": (
        norm_forward,
        lambda: [maps(C), selection(), torch.ones(3, C), vector(), vector(), maps(C)],
    ),
    "norm_gradient": (
        norm_backward,
        lambda: [maps(C), maps(C), selection(), torch.ones(3, C), torch.zeros(2, C), maps(C)],
    ),
    "pack_weights": (
        lambda weight, scale, out: extension.pack_weights(weight, scale, out, (16, 16)),
        lambda: [torch.randn(C, C, 3, 3).to(memory_format=torch.channels_last), vector(), packed(C, C, 9)],
    ),
    "pack_turned_weights": (
        lambda weight, out: extension.pack_turned_weights(weight, out, (16, 16)),
        lambda: [torch.randn(C, C, 3, 3).to(memory_format=torch.channels_last), packed(C, C, 9)],
    ),
    "dynamic_conv": (conv, lambda: [maps(C), maps(C), *route_tensors(), packed(C, C, 9), vector()]),
    "dynamic_conv, masks": (conv, lambda: [maps(C), maps(C), *route_tensors(True), packed(C, C, 9), vector()]),
    "dynamic_conv_phase": (phase, lambda: [maps(C), maps(C), *route_tensors(), packed(C, C, 9)]),
    "dynamic_conv_weight_gradient": (
        gradient,
        lambda: [maps(C), maps(C), torch.zeros(C, C, 3, 3).to(memory_format=torch.channels_last), *route_tensors()],
    ),
    "ResidualBlock": (
        residual,
        lambda: [maps(C), maps(C), maps(C), *route_tensors(), vector(), vector(), packed(M, C, 9), vector(), vector(),
                 packed(C, M, 9), vector()],
    ),
    "ResidualBlock, unpacked": (
        residual, lambda: [maps(C), maps(C), maps(C), *route_tensors(True), *unpacked_residual()]
    ),
    "BottleneckBlock": (
        bottleneck,
        lambda: [maps(C), maps(C), maps(C), *route_tensors(), vector(), vector(), packed(M, C, 1), vector(),
                 packed(M, M, 9), vector(), packed(C, M, 1), vector()],
    ),
    "InvertedResidualBlock": (
        inverted,
        lambda: [maps(C), maps(C), maps(C), *route_tensors(), packed(M, C, 1), vector(), torch.randn(2, 9, 16),
                 vector(), packed(C, M, 1), vector(), packed(16, M, 1), vector(16), packed(M, 16, 1), vector()],
    ),
    "Trunk": (
        trunk,
        lambda: [maps(C), torch.ones(2, B).int(), maps(2 * C), torch.zeros(B, 2 * C), vector(2 * C), vector(2 * C)],
    ),
    "pack_dense": (
        lambda weight, packed: extension.pack_dense(CONV, weight, packed),
        lambda: [torch.randn(16, C, 3, 3).to(memory_format=torch.channels_last), dense_packed(CONV)],
    ),
    "TaskNetwork, a selector": (
        selector,
        lambda: [maps(3), dense_packed(STEM), vector(), dense_packed(CONV), vector(16), vector(16), vector(16),
                 torch.randn(8, 16), vector(8), torch.zeros(B, 8), torch.zeros(B, 2).long()],
    ),
    "TaskNetwork, an estimator": (
        estimator,
        lambda: [maps(3), dense_packed(STEM), vector(), torch.randn(8, C), vector(8), torch.ones(1, B).int(),
                 torch.zeros(B, 8)],
    ),
    "TaskNetwork, int64 levels": (
        estimator,
        lambda: [maps(3), dense_packed(STEM), vector(), torch.randn(8, C), vector(8), torch.ones(B, 1).long(),
                 torch.zeros(B, 8)],
    ),
    "Graph": (
        graph,
        lambda: [maps(C), maps(C), torch.ones(1, B).int(), vector(2 * B).view(B, 2), vector(B).view(B, 1),
                 vector(2 * B).view(B, 2), packed(C, C, 9), vector()],
    ),
}  # fmt: skip
UNREAD = {("ResidualBlock", 9)}  # scale2, where conv1 is packed
FITS = {  # other sizes, but ones that fit the other tensors
    ("plan_masks", 0, "one column fewer"),  # fewer groups
    ("gather_rows", 0, "one row fewer"),  # a batch that still holds the instances in order
    ("scatter_rows", 1, "one row fewer"),
    ("norm_statistics", 0, "one column fewer"),  # a smaller map
    *((f"TaskNetwork, {kind}", 0, "one column fewer") for kind in ("a selector", "an estimator", "int64 levels")),
    ("TaskNetwork, a selector", 10, "one column fewer"),  # fewer blocks, of more levels
    ("dynamic_conv_phase", 0, "one column fewer"),  # what lies beside it counts as zeros
    ("dynamic_conv_phase", 1, "one column fewer"),  # a smaller map
    ("pack_turned_weights", 0, "one row fewer"),  # outputs that fill as many blocks of 16
}


def damages(tensor: Tensor) -> Iterator[tuple[str, object]]:
    """What may come in the place of a tensor by mistake."""
    yield "on another device", tensor.to("meta")
    yield "of another dtype", tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)
    yield "one row fewer", tensor[1:].contiguous(memory_format=_format(tensor))
    yield "one column fewer", tensor[..., 1:].contiguous(memory_format=_format(tensor))
    yield "another axis", tensor[None]
    yield "a view with gaps", torch.stack([tensor, tensor], -1)[..., 0]
    yield "expanded", tensor[:1].expand(tensor.shape) if tensor.shape[0] > 1 else tensor[None]
    yield "no tensor", 7
    yield "a list", tensor.tolist()
    yield "None", None


def _format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def optional(name: str, index: int) -> bool:
    """Whether None may stand there: for a bias, a scale, sums that carry no gradient."""
    wanted = {"norm_apply": {3, 4}, "norm_gradient": {4}, "pack_weights": {1}, "dynamic_conv": {6}}
    wanted |= {
        "dynamic_conv, masks": {6},
        "ResidualBlock": {12},
        "ResidualBlock, unpacked": {12},
        "BottleneckBlock": {13},
        "TaskNetwork, a selector": {10},
        "InvertedResidualBlock": {1, 6, 11},
    }
    return index in wanted.get(name, set())


CASES = [
    pytest.param(name, index, damage, id=f"{name}-{index}-{damage}")
    for name, (_, tensors) in CALLS.items()
    for index, tensor in enumerate(tensors())
    if tensor is not None and (name, index) not in UNREAD
    for damage, _ in damages(tensor)
    if (name, index, damage) not in FITS and not (damage == "None" and optional(name, index))
]


@pytest.mark.parametrize("name", CALLS, ids=str)
def test_tensors_that_fit_are_taken(name):
    call, tensors = CALLS[name]
    call(*tensors())


@pytest.mark.parametrize(("name", "index", "damage"), CASES)
def test_every_tensor_of_every_binding_is_checked(name, index, damage):
    call, tensors = CALLS[name]
    arguments = tensors()
    arguments[index] = dict(damages(arguments[index]))[damage]
    with pytest.raises((ValueError, TypeError)):
        call(*arguments)


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, 6), (0, -1), (0, 10**6), (0, -(2**31)), (1, 50), (1, -4), (1, 7)],
    ids=str,
)
@pytest.mark.parametrize(
    "name", [n for n in CALLS if n.startswith(("dynamic_conv", "Residual", "Bottleneck", "Inverted"))]
)
def test_what_a_route_holds_is_checked(name, index, value):
    call, tensors = CALLS[name]
    arguments = tensors()
    first = next(i for i, tensor in enumerate(arguments) if tensor is not None and tensor.dtype == torch.int32)
    route = arguments[first + index]
    route[index] = value  # order[0]; offsets[1]
    with pytest.raises(ValueError, match=r"route\.(order|offsets) must be"):
        call(*arguments)


@pytest.mark.parametrize("rows", ["gather_rows", "scatter_rows"])
@pytest.mark.parametrize("value", [-1, 6, 10**6])
def test_rows_outside_the_batch_are_refused(rows, value):
    call, tensors = CALLS[rows]
    arguments = tensors()
    arguments[2][1] = value
    with pytest.raises(ValueError, match="order must be instances of the batch"):
        call(*arguments)


@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1])
def test_levels_of_a_trunk_are_checked(value):
    call, tensors = CALLS["Trunk"]
    arguments = tensors()
    arguments[1][1, 2] = value
    with pytest.raises(ValueError, match="dynamic_trunk: levels must be at most the groups, got"):
        call(*arguments)


@pytest.mark.parametrize("blocks", [[], [None], ["a block"]])
def test_a_trunk_is_made_of_blocks(blocks):
    with pytest.raises(ValueError, match="dynamic_trunk: blocks must be"):
        extension.Trunk(blocks, None, None)


def test_an_error_says_what_was_expected_and_what_came():
    _, tensors = CALLS["dynamic_conv"]
    x, *others = tensors()
    with pytest.raises(ValueError, match=r"dynamic_conv2d: x must be a tensor on cpu, got meta"):
        conv(x.to("meta"), *others)
    with pytest.raises(
        TypeError, match=r"weight must be float32 \[2, 2, 9, 16, 16\] contiguous, got float64 \[2, 2, 9"
    ):
        conv(x, *others[:4], others[4].double(), others[5])


def test_pairs_are_both_or_none():
    call, tensors = CALLS["gather_rows"]
    with pytest.raises(ValueError, match="scale and shift must be both"):
        call(*tensors()[:4], None)
    make = partial(extension.ResidualBlock, (C, M, C, 3, 3, 1), (16, 16))
    with pytest.raises(ValueError, match="scale1 and shift1 must be both"):
        make((vector(), None, packed(M, C, 9), vector(), vector(), packed(C, M, 9), None))


@pytest.mark.parametrize("groups", [(16,), (16, 17), (16, -16, 32), ()], ids=str)
def test_groups_make_up_the_channels(groups):
    weights = (None, None, packed(M, C, 9), vector(), vector(), packed(C, M, 9), None)
    with pytest.raises(ValueError, match="groups must be"):
        extension.ResidualBlock((C, M, C, 3, 3, 1), groups, weights)


@pytest.mark.parametrize(("first", "step"), [((H, 0), (2, 2)), ((-1, 0), (2, 2)), ((0, 0), (0, 1))], ids=str)
def test_a_phase_begins_on_the_map(first, step):
    window, (order, offsets, mask) = extension.Window(*WINDOW, (), (16, 16)), route_tensors()
    with pytest.raises(ValueError, match="dynamic_conv2d: phase must be a pixel of dx"):
        extension.dynamic_conv_phase(maps(C), maps(C), (2, order, offsets, mask), window, packed(C, C, 9), first, step)


@pytest.mark.parametrize("damage", ["another type", "another size", "no tensor"])
def test_a_ready_convolution_needs_its_packed_weight(damage):
    weight = {"another type": packed(C, C, 9).double(), "another size": packed(C, C, 1), "no tensor": 7}[damage]
    with pytest.raises((ValueError, TypeError), match="dynamic_conv2d: weight must be"):
        extension.Convolution(extension.Window(*WINDOW, (), (16, 16)), weight, C, C)


@pytest.mark.parametrize("side", [1, 6])
def test_images_smaller_than_a_kernel_are_refused(side):
    sizes = (3, C, 7, 7, 2, 0)  # no padding
    conv = extension.DenseConv(sizes, dense_packed(sizes), vector())
    made = extension.TaskNetwork([conv], [], [extension.Head((torch.randn(8, C), vector(8), None, None))])
    images = torch.randn(B, 3, side, side).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="images must be at least as large as the stem's kernel"):
        made([(0, images)], None, [torch.zeros(B, 8)], None)


@pytest.mark.parametrize(
    ("stems", "shared", "heads", "words"),
    [
        ([], [], [C], "one of each"),
        ([C], [], [], "one of each"),
        ([C], [16], [16], "input channels must be those of the layer before"),
        ([C], [C], [C], "a head's input channels must be"),
    ],
)
def test_layers_that_do_not_follow_one_another_are_refused(stems, shared, heads, words):
    def conv(reads: int, gives: int):
        sizes = (reads, gives, 3, 3, 1, 1)
        return extension.DenseConv(sizes, dense_packed(sizes), vector(gives))

    with pytest.raises(ValueError, match=words):
        extension.TaskNetwork(
            [conv(3, gives) for gives in stems],
            [conv(reads, 16) for reads in shared],
            [extension.Head((torch.randn(8, reads), vector(8), None, None)) for reads in heads],
        )
