"""dynamic_conv2d forward: against the reference, in every layout and dtype, and its errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from den_kernels import _conv_cpu
from den_kernels._conv_masked import masked_forward
from den_kernels._conv_parts import ChannelRange, Part, part_of, parts_of, ranges_of
from den_kernels._geometry import Geometry, group_sizes, memory_format_of
from den_kernels.dynamic_conv import dynamic_conv2d, dynamic_conv2d_reference
from den_kernels.plan import RoutingPlan, as_route
from den_kernels.testing import (
    LAYOUTS,
    LEVEL_KINDS,
    ConvCase,
    assert_as_accurate,
    make_levels,
    make_mask,
    masked_conv2d,
)  # fmt: skip
from tests.fuzz import examples


def reference(case: ConvCase, x, weight, bias, selection):
    keywords = case.keywords
    keywords["out_groups"], keywords["in_groups"] = case.out_sizes, case.in_sizes
    return dynamic_conv2d_reference(x, weight, bias, selection, **keywords)


def check_against_reference(case: ConvCase, dtype: torch.dtype) -> None:
    """One op call in `dtype` against the float64 reference; PyTorch's error in that dtype sets the tolerance."""
    x, weight, bias, selection = case.tensors(dtype)
    y = dynamic_conv2d(x, weight, bias, selection, **case.keywords)
    exact, scale = (
        reference(case, f(x.double()), f(weight.double()), None if bias is None else f(bias.double()), selection)
        for f in (lambda t: t, torch.abs)
    )
    peer = masked_conv2d(x, weight, bias, selection, **case.keywords)
    assert_as_accurate(y, peer, exact, scale)
    assert y.is_contiguous(memory_format=memory_format_of(x, weight))


@st.composite
def cases(draw) -> ConvCase:
    cardinality = draw(st.sampled_from((1, 1, 2, 4)))
    G = draw(st.integers(1, 4))
    in_each, out_each = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def sizes(each: int) -> tuple[int, ...]:
        shares = [1] * G
        for _ in range(cardinality - G if cardinality > 1 else 2):
            shares[draw(st.integers(0, G - 1))] += 1
        return tuple(share * each for share in shares)

    assume(cardinality == 1 or cardinality >= G)
    side = draw(st.sampled_from(("out", "in", "both")))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 5)))
    dilation = draw(st.sampled_from((1, 1, 2, (1, 2))))
    stride = draw(st.sampled_from((1, 2, 3, (2, 1))))
    padding = draw(st.sampled_from((0, 1, (3, 2), "valid", "same")))
    if padding == "same":
        stride = 1
    size = draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
    reach = [k + (k - 1) * (dilation == 2 or (i == 1 and dilation == (1, 2))) for i, k in enumerate(kernel)]
    pads = {"valid": (0, 0), "same": reach}.get(padding) if isinstance(padding, str) else (
        padding if isinstance(padding, tuple) else (padding, padding)
    )  # fmt: skip
    assume(all(s + 2 * p >= r for s, p, r in zip(size, pads, reach, strict=True)))
    return ConvCase(
        batch=draw(st.sampled_from((0, 1, 2, 5, 8))), size=size, kernel=kernel, stride=stride, padding=padding,
        dilation=dilation, cardinality=cardinality, channels=(cardinality * in_each, cardinality * out_each),
        in_sizes=sizes(in_each) if side != "out" else (), out_sizes=sizes(out_each) if side != "in" else (),
        bias=draw(st.booleans()), selection=draw(st.sampled_from((*LEVEL_KINDS, "mask", "mask"))),
        layout=draw(st.sampled_from(LAYOUTS)), weight_channels_last=draw(st.booleans()), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@examples(120)
@given(cases())
def test_any_case_in_float32_is_as_accurate_as_pytorch(case):
    check_against_reference(case, torch.float32)


@examples(80)
@given(cases())
def test_segments_and_masked_composition_agree_with_the_reference_in_float64(case):
    """The two implementations themselves, in float64, where the op runs the reference."""
    assume(case.padding != "same")
    x, weight, bias, selection = case.tensors(torch.float64)
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    padding = 0 if case.padding == "valid" else case.padding
    geometry = Geometry(
        pair(case.stride), pair(padding), pair(case.dilation), case.cardinality,
        case.out_sizes, case.in_sizes,
    )  # fmt: skip
    route = as_route(selection, len(case.out_sizes) or len(case.in_sizes), case.batch)
    exact = dynamic_conv2d(x, weight, bias, route, **case.keywords)
    parts = parts_of(route, geometry, x.shape[1], weight.shape[0])
    by_segments = _conv_cpu.forward(x, weight, bias, parts, geometry)
    torch.testing.assert_close(by_segments, exact, rtol=1e-12, atol=1e-12)
    masked = masked_forward(x, weight, bias, route, geometry)
    torch.testing.assert_close(masked, exact, rtol=1e-12, atol=1e-12)


UGLY = {
    "63_channels": ConvCase(channels=(63, 1), out_sizes=(1, 63)),
    "129_channels": ConvCase(in_sizes=(1, 63, 65), out_sizes=(), channels=(1, 129)),
    "one_channel": ConvCase(channels=(1, 1), out_sizes=(1,)),
    "windows_on_padding": ConvCase(kernel=(1, 2), stride=3, padding=(3, 7), dilation=3, size=(3, 2), channels=(4, 1)),
    "7x7_stem": ConvCase(kernel=(7, 7), stride=2, padding=3, size=(33, 31), channels=(3, 1)),
    "1x1": ConvCase(kernel=(1, 1), padding=0, size=(1, 1), in_sizes=(4, 4, 8), out_sizes=()),
    "depthwise": ConvCase(cardinality=12, in_sizes=(3, 5, 4), out_sizes=(3, 5, 4)),
    "depthwise_out_only": ConvCase(cardinality=12, channels=(12, 12), selection="mask"),
    "depthwise_multiplier": ConvCase(cardinality=6, in_sizes=(2, 4), out_sizes=(6, 12), selection="mask"),
    "grouped_in_only": ConvCase(cardinality=4, channels=(8, 12), in_sizes=(2, 2, 4), out_sizes=()),
    "sides_of_different_cardinality": ConvCase(cardinality=4, in_sizes=(2, 6), out_sizes=(9, 3), selection="mask"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", UGLY)
def test_ugly_sizes(name, dtype):
    check_against_reference(UGLY[name], dtype)


@pytest.mark.parametrize("selection", [*LEVEL_KINDS, "mask"])
@pytest.mark.parametrize("batch", [0, 1, 63])
def test_every_kind_of_selection(batch, selection):
    check_against_reference(ConvCase(batch=batch, size=(4, 3), selection=selection), torch.float32)
    in_only = ConvCase(batch=batch, size=(4, 3), selection=selection, in_sizes=(3, 2, 3), out_sizes=())
    check_against_reference(in_only, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_channels_last", [True, False])
def test_memory_format_of_the_result_is_that_of_conv2d(layout, weight_channels_last):
    case = ConvCase(layout=layout, weight_channels_last=weight_channels_last, selection="top")
    x, weight, bias, selection = case.tensors(torch.float32)
    plain = F.conv2d(x, weight, bias, padding=1)
    assert dynamic_conv2d(x, weight, bias, selection, **case.keywords).stride() == plain.stride()


def test_expanded_input():
    x, weight, bias, levels = ConvCase().tensors(torch.float32)
    x = x[:1].expand(5, -1, -1, -1)
    same = dynamic_conv2d(x.contiguous(), weight, bias, levels, padding=1, out_groups=(3, 5, 4))
    assert torch.equal(dynamic_conv2d(x, weight, bias, levels, padding=1, out_groups=(3, 5, 4)), same)


def test_no_selection_is_conv2d():
    x, weight, bias, _ = ConvCase().tensors(torch.float32)
    assert torch.equal(dynamic_conv2d(x, weight, bias, stride=2, out_groups=3), F.conv2d(x, weight, bias, 2))


def test_levels_and_routes_give_the_same_bits_and_masks_the_same_numbers():
    x, weight, bias, levels = ConvCase(batch=9).tensors(torch.float32)
    call = lambda selection: dynamic_conv2d(x, weight, bias, selection, out_groups=(3, 5, 4))  # noqa: E731
    expected = call(levels)
    assert torch.equal(call(RoutingPlan.from_levels(levels[:, None].repeat(1, 2), 3)[1]), expected)
    assert torch.equal(call(levels.to(torch.uint8)), expected)
    torch.testing.assert_close(call(levels[:, None] > torch.arange(3)), expected, rtol=1e-5, atol=1e-5)


def test_active_route_selects_whole_instances():
    """Its one segment is not sorted by instance, so neighbours must be recognised whatever their order."""
    x, weight, bias, _ = ConvCase(batch=6).tensors(torch.float32)
    levels = torch.tensor([3, 0, 1, 2, 0, 1])
    y = dynamic_conv2d(x, weight, bias, as_route(levels, 3, 6).active(), padding=1, out_groups=1)
    plain = F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(y, torch.where((levels > 0)[:, None, None, None], plain, 0), rtol=1e-5, atol=1e-5)


def test_nan_images_pass_through_alone():
    x, weight, bias, _ = ConvCase().tensors(torch.float32)
    levels = torch.tensor([3, 1, 0, 2, 3])
    x[1] = float("nan")
    nan = dynamic_conv2d(x, weight, bias, levels, padding=1, out_groups=(3, 5, 4)).isnan()
    assert nan[1, :3].all()
    assert nan.sum() == nan[1, :3].numel()


@pytest.mark.usefixtures("no_extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_the_extension(dtype):
    for layout in LAYOUTS:
        check_against_reference(ConvCase(layout=layout, selection="mask"), dtype)
        check_against_reference(ConvCase(layout=layout, in_sizes=(3, 2, 3), out_sizes=()), dtype)


def test_two_runs_are_bit_equal():
    x, weight, bias, mask = ConvCase(batch=17, selection="mask").tensors(torch.float32)
    runs = [dynamic_conv2d(x, weight, bias, mask, padding=1, out_groups=(3, 5, 4)) for _ in range(2)]
    assert torch.equal(*runs)


def test_arguments_are_left_as_they_were():
    tensors = ConvCase(layout="contiguous").tensors(torch.float16)
    before = [t.clone() for t in tensors]
    dynamic_conv2d(*tensors, padding=1, out_groups=(3, 5, 4))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_conv2d_does(dtype):
    x, weight, bias, levels = ConvCase(selection="uniform").tensors(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = dynamic_conv2d(x, weight, bias, levels, padding=1, out_groups=(3, 5, 4))
        kept = dynamic_conv2d(x.double(), weight.double(), bias.double(), levels, out_groups=(3, 5, 4))
    by_hand = dynamic_conv2d(*(t.to(dtype) for t in (x, weight, bias)), levels, padding=1, out_groups=(3, 5, 4))
    assert y.dtype == dtype
    assert torch.equal(y, by_hand)
    assert kept.dtype == torch.float64


def test_runs_of_groups():
    assert ranges_of((2, 3, 4, 1), (True, True, False, True)) == (ChannelRange(0, 5), ChannelRange(9, 1))
    assert ranges_of((2, 3), (False, False)) == ()


@pytest.mark.parametrize(
    ("selected", "cardinality", "out_sizes", "in_sizes", "part"),
    [
        ((True, False), 1, (4, 4), (), Part((ChannelRange(0, 8),), (ChannelRange(0, 4),), (), 1)),
        ((False, True), 1, (), (2, 6), Part((ChannelRange(2, 6),), (ChannelRange(0, 8),), (), 1)),
        ((False, False), 1, (), (2, 6), Part((), (), (ChannelRange(0, 8),), 0)),
        ((False, False), 1, (4, 4), (2, 6), Part((), (), (), 0)),
        ((True, False), 4, (4, 4), (), Part((ChannelRange(0, 4),), (ChannelRange(0, 4),), (), 2)),
        ((True, False), 4, (), (2, 6), Part((ChannelRange(0, 2),), (ChannelRange(0, 2),), (ChannelRange(2, 6),), 1)),
        (
            (True, False),
            4,
            (6, 2),
            (2, 6),
            Part((ChannelRange(0, 2),), (ChannelRange(0, 2),), (ChannelRange(2, 4),), 1),
        ),
    ],
)
def test_part_of_a_selection(selected, cardinality, out_sizes, in_sizes, part):
    assert part_of(selected, 8, 8, cardinality, out_sizes, in_sizes) == part


def test_group_sizes():
    assert group_sizes(None, 12, "out_groups") == ()
    assert group_sizes(3, 12, "out_groups") == (4, 4, 4)
    assert group_sizes([3, 9], 12, "out_groups", cardinality=4) == (3, 9)


def arguments(**changes):
    """A call that is right, and what makes it wrong."""
    base = {
        "x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6),
        "selection": torch.tensor([1, 2]), "out_groups": (2, 4),
    }  # fmt: skip
    return {**base, **changes}


ERRORS = {
    "no_groups": (ValueError, "out_groups or in_groups must be set", {"out_groups": None}),
    "rank_of_x": (ValueError, "four axes", {"x": torch.zeros(4, 5, 5)}),
    "rank_of_weight": (ValueError, "four axes", {"weight": torch.zeros(6, 4, 3)}),
    "channels": (ValueError, "x must have 4 channels, got 3", {"x": torch.zeros(2, 3, 5, 5)}),
    "integer_x": (TypeError, "x must be float16", {"x": torch.zeros(2, 4, 5, 5, dtype=torch.int32)}),
    "dtype_of_weight": (TypeError, "weight must be torch.float32", {"weight": torch.zeros(6, 4, 3, 3).double()}),
    "dtype_of_bias": (TypeError, "bias must be torch.float32", {"bias": torch.zeros(6).half()}),
    "device_of_weight": (ValueError, "weight must be on cpu", {"weight": torch.zeros(6, 4, 3, 3, device="meta")}),
    "shape_of_bias": (ValueError, r"bias must be \[6\], got \[5\]", {"bias": torch.zeros(5)}),
    "cardinality": (ValueError, "groups must divide 6", {"groups": 4}),
    "sizes_do_not_add_up": (ValueError, "add up to 6 channels", {"out_groups": (2, 3)}),
    "size_zero": (ValueError, "positive", {"out_groups": (6, 0)}),
    "unequal_groups": (ValueError, "divide 6 channels", {"out_groups": 4}),
    "groups_of_floats": (TypeError, "out_groups must be None, an int", {"out_groups": (2.0, 4.0)}),
    "off_cardinality": (
        ValueError, "multiples of 3", {"groups": 2, "weight": torch.zeros(6, 2, 3, 3), "out_groups": (2, 4)},
    ),
    "sides_differ": (ValueError, "in_groups must have 2 groups", {"in_groups": (1, 1, 2)}),
    "level_above": (ValueError, "levels must be in 0..2, got 3", {"selection": torch.tensor([1, 3])}),
    "level_below": (ValueError, "levels must be in 0..2, got -1", {"selection": torch.tensor([-1, 0])}),
    "levels_too_short": (ValueError, r"levels must be \[2\]", {"selection": torch.tensor([1])}),
    "floating_levels": (TypeError, "selection", {"selection": torch.tensor([1.0, 2.0])}),
    "not_a_selection": (TypeError, "selection", {"selection": [1, 2]}),
    "mask_too_wide": (ValueError, r"mask must be \[2, 2\]", {"selection": torch.ones(2, 3, dtype=torch.bool)}),
    "route_of_another_batch": (ValueError, "instances must be 2", {"selection": as_route(torch.zeros(3).int(), 2, 3)}),
    "route_of_other_groups": (ValueError, "groups must be 2", {"selection": as_route(torch.zeros(2).int(), 3, 2)}),
    "device_of_selection": (
        ValueError, "selection must be on cpu", {"selection": torch.zeros(2, dtype=torch.int32, device="meta")},
    ),
    "kernel_too_large": (ValueError, "must fit the padded map", {"x": torch.zeros(2, 4, 2, 2)}),
    "stride_zero": (ValueError, "stride must be", {"stride": 0}),
    "negative_padding": (ValueError, "padding must be", {"padding": -1}),
    "same_with_stride": (ValueError, "'same' with stride 1", {"padding": "same", "stride": 2}),
    "unknown_padding": (ValueError, "'valid'", {"padding": "full"}),
    "dilation_of_three": (ValueError, "dilation must be", {"dilation": (1, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_must_hold(name):
    error, message, changes = ERRORS[name]
    dynamic_conv2d(**arguments())
    with pytest.raises(error, match=message):
        dynamic_conv2d(**arguments(**changes))


def test_make_levels_and_masks_are_in_range():
    for kind in LEVEL_KINDS:
        levels = make_levels(kind, 20, 3)
        assert levels.shape == (20,)
        assert 0 <= int(levels.min()) <= int(levels.max()) <= 3
    assert make_mask(50, 6).unique(dim=0).shape[0] <= 4


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_one_wrong_element_of_many_is_not_accurate(wrong):
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    got = exact.float()
    assert_as_accurate(got, exact.float(), exact)
    got[617] *= wrong
    with pytest.raises(AssertionError, match="element 617"):
        assert_as_accurate(got, exact.float(), exact)


def test_an_element_of_no_terms_must_be_exact():
    exact = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="element 1"):
        assert_as_accurate(torch.tensor([1.0, 1e-30]), exact.float(), exact, scale=exact)
