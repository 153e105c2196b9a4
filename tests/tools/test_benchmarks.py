"""The arithmetic of benchmarks/: accounts, floors, mixes, clocks, peers. Nothing here takes a time."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import allocations, clocks, floors, harness, mixes, peers, slicing  # noqa: E402
from benchmarks.harness import Case, Expected, Provider, Settings, Work  # noqa: E402

TIMES = {"ours": 0.5, "dense-eager": 1.2, "dense-folded": 1.0, "masked": 1.3, "bare": 0.4}


def make_block(channels: int = 8) -> peers.PreactBlock:
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
    norms = [nn.BatchNorm2d(channels) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    return peers.PreactBlock(convs[0], norms[0], convs[1], norms[1]).eval().to(memory_format=torch.channels_last)


def test_account_compares_with_the_fastest_dense_provider():
    row = harness.account(TIMES, Work(50.0, 100.0, 10.0), floor=0.25)
    assert row["best_dense"] == "dense-folded"
    assert row["flops_ratio"] == 2
    assert row["providers"]["ours"]["realised"] == pytest.approx(1.0)
    assert row["providers"]["ours"]["dense_share"] == pytest.approx(0.5)
    assert row["providers"]["masked"]["realised"] == pytest.approx(1 / 1.3 / 2)


def test_account_measures_overhead_above_the_fastest_bare_convolutions():
    row = harness.account(TIMES | {"bare-packed": 0.25}, Work(1, 2, 0), floor=0.1)
    assert row["bare"] == "bare-packed"
    assert row["providers"]["ours"]["overhead"] == pytest.approx(1.0)
    assert "overhead" not in row["providers"]["bare"]
    assert row["providers"]["ours"]["floor_share"] == pytest.approx(0.2)


def test_nothing_to_compute_has_no_ratio_but_a_share_of_dense():
    row = harness.account({"ours": 0.01, "dense-eager": 1.0}, Work(0, 8, 8), floor=0.0)
    assert row["flops_ratio"] is None
    assert row["providers"]["ours"]["realised"] is None
    assert row["providers"]["ours"]["dense_share"] == pytest.approx(0.01)


@pytest.mark.parametrize(("round_seconds", "rounds"), [(10.0, 7), (0.1, 15), (1e-6, 51), (0.0, 51)])
def test_rounds_fit_the_time_within_limits(round_seconds, rounds):
    assert harness.choose_rounds(round_seconds, Settings(seconds=1.5)) == rounds


def test_interleaved_times_each_peer_once_a_round_in_rotating_order():
    ticks, calls = iter(range(100)), []
    expected = Expected(torch.zeros(0), 0.0)
    providers = [
        Provider(name, lambda name=name: calls.append(name), expected, prepare=lambda: calls.append("prepare"))
        for name in "oab"
    ]
    hook = harness.Interleaved(providers[0], providers[1:], clocks.HostClock(lambda: next(ticks)))
    hook()
    hook()
    assert calls == ["prepare", "a", "prepare", "b", "prepare", "prepare", "b", "prepare", "a", "prepare"]
    assert hook.times == {"a": [1, 1], "b": [1, 1]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, 2.1]), "error against float64 must be at most 0.01, got 0.1"),
        (torch.tensor([1.0, float("nan")]), "got nan"),
        (torch.tensor([1.0]), "shape must be"),
        ([torch.tensor([1.0]), torch.tensor([3.0])], "got 1"),
    ],
)
def test_check_refuses_wrong_results(result, message):
    with pytest.raises(AssertionError, match=message):
        harness.check("case", result, Expected(torch.tensor([1.0, 2.0], dtype=torch.float64), 0.01))


def test_check_takes_lists_as_their_concatenation():
    parts = [torch.tensor([1.0]), torch.tensor([[2.0]])]
    harness.check("case", parts, Expected(torch.tensor([1.0, 2.0], dtype=torch.float64), 0.0))


def test_expect_allows_twice_the_error_of_the_dtype():
    expected = harness.expect(lambda dtype: torch.full((2,), 1 + 2**-8, dtype=torch.float64).to(dtype), torch.bfloat16)
    assert expected.allowed == pytest.approx(2 * 2**-8, rel=0.01)


def test_uniform_mix_has_equal_counts_and_is_shuffled():
    levels = mixes.mix_levels("uniform", 128)
    assert levels.bincount().tolist() == [32] * 4
    assert not torch.equal(levels, levels.sort().values)
    assert mixes.mix_levels("quarter", 3).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="got 'third'"):
        mixes.mix_levels("third", 3)


@pytest.mark.parametrize("ratio", [1.2, 1.9, 2.29, 5.0])
def test_drawn_structures_cost_what_was_asked(ratio):
    costs = torch.tensor([[0, 10, 20, 40], [0, 16, 32, 64], [0, 16, 32, 64]])
    levels = mixes.draw_structures(costs, 64, ratio)
    cost = costs.gather(1, levels.T.long()).sum().item()
    assert levels.shape == (64, 3)
    assert 64 * 168 / cost == pytest.approx(ratio, rel=0.003)


@pytest.mark.parametrize("groups", [[[1, 1], [0, 1], [1, 0], [0, 0], [0, 1]], [[0, 0]], [[1, 1], [1, 1]]])
def test_bucketed_block_equals_the_masked_one(groups):
    block, selection = make_block(), peers.select_channels(torch.tensor(groups, dtype=torch.bool), (3, 5))
    x = peers.channels_last(torch.randn(len(groups), 8, 5, 5))
    with torch.no_grad():
        masked, bucketed = peers.MaskedBlock(block, selection)(x), peers.BucketBlock(block, selection)(x)
    torch.testing.assert_close(bucketed, masked, atol=1e-4, rtol=1e-4)
    assert torch.equal(bucketed[~selection.any(1)], x[~selection.any(1)])


def test_folded_and_packed_blocks_equal_the_eager_one():
    block, x = make_block(16), peers.channels_last(torch.randn(3, 16, 6, 6))
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(peers.FoldedBlock(block)(x), expected, atol=1e-4, rtol=1e-4)
        if peers.can_pack(x):
            torch.testing.assert_close(peers.PackedBlock(block, x.shape)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sides", ["out", "in", "both"])
@pytest.mark.parametrize("groups", [[[1, 0, 0], [0, 0, 0], [1, 1, 1]], [[0, 1, 0], [1, 0, 1], [0, 1, 0]]])
def test_bucketed_convolution_equals_the_masked_one(sides, groups):
    selection = peers.select_channels(torch.tensor(groups, dtype=torch.bool), (2, 2, 4))
    conv, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), peers.channels_last(torch.randn(3, 8, 5, 5))
    mask, outputs, inputs = selection[:, :, None, None], sides != "in", sides != "out"
    elastic = peers.ElasticConv(conv, selection if outputs else None, selection if inputs else None)
    with torch.no_grad():
        expected = conv(x * mask if inputs else x) * (mask if outputs else 1)
        torch.testing.assert_close(peers.BucketConv(elastic)(x), expected, atol=1e-5, rtol=1e-5)


def test_small_uniform_batches_take_the_middle_first():
    assert [sorted(mixes.mix_levels("uniform", batch).tolist()) for batch in (1, 2, 4)] == [[2], [2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("mix", "counts"),
    [("skewed", [2, 26, 2, 2]), ("one-odd", [0, 31, 0, 1]), ("half", [0, 0, 32]), ("full", [0, 0, 0, 32])],
)
def test_named_mixes_have_these_counts(mix, counts):
    assert mixes.mix_levels(mix, 32).bincount().tolist() == counts


@pytest.mark.parametrize(
    "mix", ["1.88x", "random-blocks", "recorded-digits", "tau0.75", "uniform", "skewed", "one-odd", "zero"]
)
def test_structures_of_every_mix_fit_the_blocks(mix):
    costs = torch.tensor([[0, 1, 2, 4]]).expand(6, -1)
    levels = mixes.mix_structures(mix, costs, 64)
    assert levels.shape == (64, 6)
    assert levels.dtype == torch.int32
    assert 0 <= levels.min() <= levels.max() < 4
    if mix not in ("zero",):
        assert len(levels.unique(dim=0)) > 1


def test_recorded_structures_start_over_when_the_batch_is_larger():
    first = mixes.recorded("fashion", 256)
    assert torch.equal(mixes.recorded("fashion", 300)[256:], first[:44])
    with pytest.raises(ValueError, match="must be one of digits, fashion, got 'letters'"):
        mixes.recorded("letters", 1)


def test_a_case_on_a_gpu_says_so():
    case = Case("residual", "64x32x32", 32, "uniform", "float32")
    assert case.id == "residual/64x32x32/B32/uniform/float32"
    assert dataclasses.replace(case, device="cuda").id == case.id + "/cuda"


def test_each_tensor_of_a_list_has_an_error_of_its_own():
    def function(dtype: torch.dtype) -> list[torch.Tensor]:
        noise = 0 if dtype == torch.float64 else 1
        return [torch.zeros(2, dtype=dtype) + 0.001 * noise, torch.zeros(1, dtype=dtype) + noise]

    expected = harness.expect(function, torch.float32)
    harness.check("case", [torch.tensor([0.002, 0.0]), torch.tensor([1.9])], expected)
    with pytest.raises(AssertionError, match=r"at most 0\.002, got 0\.003"):
        harness.check("case", [torch.tensor([0.003, 0.0]), torch.tensor([0.0])], expected)


def test_providers_can_be_chosen_but_one_dense_one_stays():
    expected = Expected(torch.zeros(0), 0.0)
    every = ["ours", "dense-eager", "dense-folded", "bucket"]
    providers = [Provider(name, lambda: None, expected) for name in every]
    names = [[p.name for p in harness.chosen(providers, wanted)] for wanted in ((), ("bucket",), ("dense-folded",))]
    assert names == [every, ["ours", "dense-eager", "bucket"], ["ours", "dense-folded"]]


def test_peak_of_a_call_is_what_was_alive_at_once():
    def call() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 21, dtype=torch.uint8)
        del first
        return torch.cat([second, torch.empty(1 << 18, dtype=torch.uint8)])

    with torch.inference_mode():
        assert allocations.call_peak(call) == (1 << 21) + (1 << 18) + (1 << 21) + (1 << 18)


def test_cases_that_do_not_fit_are_skipped_in_one_line(monkeypatch):
    monkeypatch.setattr(allocations, "available", lambda: 1 << 30)
    allocations.require("small", 1000)
    with pytest.raises(pytest.skip.Exception, match=r"^large: needs about 8.9 GiB, 1.0 GiB are free$"):
        allocations.require("large", 10**8)
    with pytest.raises(pytest.skip.Exception, match="huge: too little memory"), allocations.skip_when_exhausted("huge"):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shape"), allocations.skip_when_exhausted("wrong"):
        raise RuntimeError("shape")


SELECTIONS = [[[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]], [[0, 0, 0]], [[1, 1, 1], [1, 1, 1]]]


@pytest.mark.parametrize("groups", SELECTIONS)
def test_image_by_image_and_grouped_blocks_equal_the_bucketed_one(groups):
    block, selection = make_block(), peers.select_channels(torch.tensor(groups, dtype=torch.bool), (2, 2, 4))
    x = peers.channels_last(torch.randn(len(groups), 8, 5, 5))
    with torch.no_grad():
        expected = peers.BucketBlock(block, selection)(x)
        for kind in (slicing.PerInstanceBlock, slicing.GroupedBlock):
            torch.testing.assert_close(kind(block, selection)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sides", ["out", "in", "both"])
@pytest.mark.parametrize("groups", SELECTIONS)
def test_image_by_image_and_grouped_convolutions_equal_the_bucketed_one(sides, groups):
    selection = peers.select_channels(torch.tensor(groups, dtype=torch.bool), (2, 2, 4))
    conv, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), peers.channels_last(torch.randn(len(groups), 8, 5, 5))
    elastic = peers.ElasticConv(conv, selection if sides != "in" else None, selection if sides != "out" else None)
    with torch.no_grad():
        expected = peers.BucketConv(elastic)(x)
        for call in (slicing.PerInstanceConv(elastic), slicing.GroupedConv(elastic, len(groups))):
            torch.testing.assert_close(call(x), expected, atol=1e-5, rtol=1e-4)


def test_block_shortcuts_and_strides_fit_all_ways():
    torch.manual_seed(1)
    block = make_block()
    block.conv1 = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
    selection = peers.select_channels(torch.tensor([[1, 0], [1, 1]], dtype=torch.bool), (3, 5))
    x = peers.channels_last(torch.randn(2, 8, 6, 6))
    with torch.no_grad():
        expected = peers.MaskedBlock(block, selection)(x)
        for kind in (peers.BucketBlock, slicing.PerInstanceBlock, slicing.GroupedBlock):
            torch.testing.assert_close(kind(block, selection)(x), expected, atol=1e-5, rtol=1e-4)


def test_the_rounding_of_the_largest_value_is_always_allowed():
    expected = harness.expect(lambda dtype: torch.tensor([1.0, 8.0], dtype=dtype), torch.float32)
    assert expected.allowed == pytest.approx(2 * 4 * torch.finfo(torch.float32).eps)
    parts = [1.0, 2.0, 4.0]  # the second is exact by chance, and allowed what the others err by
    noise = {torch.float64: 0.0, torch.float32: 1e-3}
    listed = harness.expect(
        lambda dtype: [torch.full((1,), p, dtype=dtype) * (1 + noise[dtype] * (p != 2)) for p in parts], torch.float32
    )
    assert listed.allowed.tolist() == pytest.approx([2e-3, 4e-3, 8e-3], rel=1e-3)


@pytest.mark.parametrize("field", ["cpu family", "model", "flags"])
def test_generations_of_one_processor_name_have_results_of_their_own(field):
    older = {"cpu family": "25", "model": "1", "flags": "fpu avx2 avx512f"}
    newer = older | {field: {"cpu family": "26", "model": "2", "flags": "fpu avx2 avx512f avx512_bf16"}[field]}
    names = {floors.machine_name("AMD EPYC", floors.generation(cpu), 2) for cpu in (older, newer)}
    assert len(names) == 2


def test_a_machine_that_says_nothing_of_its_processor_has_a_name():
    assert floors.generation({}) == ""
    assert floors.machine_name("aarch64", "", 4) == "aarch64-4-cores"
