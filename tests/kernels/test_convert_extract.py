"""What comes out of a converted model: plain modules, statistics of levels, tables of times; and advice."""

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from den_kernels import ElasticModel, advise, convert, extract, latency_table, levels, recalibrate
from den_kernels.convert import LatencyTable
from den_kernels.convert.layers import RoutedBatchNorm2d
from tests.foreign_models import FAMILIES, foreign, images

ROOT = Path(__file__).resolve().parents[2]
NAME = "torchvision_basic"


def uniform(model: nn.Module, x: Tensor, own: list[int]) -> Tensor:
    with torch.no_grad(), levels(model, torch.tensor(own).expand(len(x), len(own))):
        return model(x)


def structures(lowest: tuple[int, ...], groups: int) -> list[list[int]]:
    """The lowest levels, the highest, and some between."""
    mixed = [max(low, n % (groups + 1)) for n, low in enumerate(lowest)]
    return [list(lowest), [groups] * len(lowest), mixed, [max(1, level) for level in reversed(mixed)]]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_extracted_network_computes_what_its_levels_do(name):
    model, x = foreign(name).double(), images(name).double()
    report = convert(model, 2, example=x[:1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for structure in structures(report.lowest, 2):
        plain = extract(model, structure)
        assert not any(type(m).__module__.startswith("den_kernels") for m in plain.modules())
        torch.testing.assert_close(plain(x), uniform(model, x, structure), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_highest_structure_is_the_original_bit_for_bit():
    original = foreign(NAME)
    model = copy.deepcopy(original)
    convert(model, 4, example=images(NAME))
    plain = extract(ElasticModel(model, nn.Identity()), torch.tensor([4, 4, 4]))
    assert torch.equal(plain(images(NAME)), original(images(NAME)))
    assert list(plain.state_dict()) == list(original.state_dict())


def test_an_extracted_network_needs_fewer_operations():
    model, x = foreign(NAME), images(NAME)
    convert(model, 4, example=x)
    counts = []
    for level in range(5):
        with FlopCounterMode(display=False) as counter:
            extract(model, [level] * 3)(x)
        counts.append(counter.get_total_flops())
    assert counts == sorted(counts)
    steps = [high - low for low, high in pairwise(counts[1:])]
    assert max(steps) == min(steps)  # each channel group costs the same
    assert counts[0] - (counts[1] - steps[0]) == pytest.approx(steps[0] / 6, rel=0.4)  # one channel of 4 or 8 remains


def test_an_extracted_network_loads_and_runs_without_den_kernels(tmp_path):
    model, x = foreign("torchvision_mobilenetv2"), images("torchvision_mobilenetv2")
    convert(model, 2, example=x)
    plain = extract(model, [0, 1, 2])
    torch.save((plain, x, plain(x)), tmp_path / "plain.pt")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); sys.modules['den_kernels'] = None; import torch\n"
        f"model, x, y = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False)\n"
        "print(torch.equal(model(x), y))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_an_extracted_network_trains():
    model = foreign(NAME)
    convert(model, 2, example=images(NAME))
    plain = extract(model.train(), [1, 1, 2])
    assert all(module.training for module in plain.modules())
    plain(images(NAME)).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torchvision_basic", "pytorchcv_efficientnet", "torchvision_convnext"])
def test_an_extracted_network_runs_in_onnxruntime(name, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = foreign(name), images(name)
    report = convert(model, 2, example=x)
    plain = extract(model, structures(report.lowest, 2)[2]).eval()
    torch.onnx.export(plain, (x,), tmp_path / "plain.onnx", input_names=["x"], dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(x).detach(), rtol=1e-3, atol=1e-4)


BAD = {
    "length": ([1, 1], r"structure must have 3 levels, one for each block, got \[1, 1\]"),
    "too high": ([1, 3, 1], r"structure must be 1..2 for block 1 \(layers.1\), got 3"),
    "too low": ([1, 0, 1], r"structure must be 1..2 for block 1 \(layers.1\), got 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_structures_are_checked(what):
    model, (structure, message) = foreign("torchvision_mobilenetv2"), BAD[what]
    convert(model, 2, example=images("torchvision_mobilenetv2"))
    with pytest.raises(ValueError, match=f"extract: {message}"):
        extract(model, structure)


NEEDS_A_CONVERTED_MODEL = {
    "extract": lambda model: extract(model, [1]),
    "recalibrate": lambda model: recalibrate(model, []),
    "latency_table": lambda model: latency_table(model, images(NAME)),
}


@pytest.mark.parametrize("name", NEEDS_A_CONVERTED_MODEL)
def test_only_converted_models(name):
    with pytest.raises(ValueError, match=rf"{name}: model must be one that den_kernels\.convert has changed, got none"):
        NEEDS_A_CONVERTED_MODEL[name](foreign(NAME))


def batches(count: int = 3) -> list[tuple[Tensor, int]]:
    return [(images(NAME, 8, seed), 0) for seed in range(count)]


@pytest.fixture
def elastic() -> nn.Module:
    model = foreign(NAME)
    convert(model, 2, example=images(NAME))
    return model


def norms(model: nn.Module) -> list[RoutedBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, RoutedBatchNorm2d)]


def test_recalibrated_statistics_are_those_of_the_level(elastic):
    """The norms that stand first, whose input no other norm has changed."""
    plain = copy.deepcopy(elastic)
    recalibrate(elastic, batches(), progress=False)
    block, x = plain.layers[0], [plain.stem(x) for x, _ in batches()]
    with torch.no_grad():
        hidden = [nn.functional.conv2d(each, block.conv1.weight, padding=1) for each in x]
        torch.testing.assert_close(
            elastic.layers[0].bn1.level_mean[1], torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
        )
        variances = torch.stack([h.var((0, 2, 3)) for h in hidden]).mean(0)
        for level, width in ((0, 8), (1, 16)):
            got = elastic.layers[0].bn1.level_var[level, :width]
            torch.testing.assert_close(got, variances[:width], rtol=1e-4, atol=1e-5)
    for norm in norms(elastic):
        assert torch.equal(norm.running_mean, norm.level_mean[1])
        assert torch.equal(norm.running_var, norm.level_var[1])
        assert not norm.training
        assert norm.momentum == 0.1


def test_a_recalibrated_level_is_normalised_as_its_batch_is(elastic):
    """Its last norms give mean 0 and variance 1 before weight and bias: nothing else of a level is known for sure."""
    x = images(NAME, 8)
    recalibrate(elastic, [x], progress=False)
    last = elastic.layers[2].bn2
    with torch.no_grad():
        last.weight.fill_(1.0)
        last.bias.zero_()
    for level in (1, 2):
        seen = []
        hook = last.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.clone()))
        uniform(elastic, x, [level] * 3)
        hook.remove()
        torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(32), rtol=0, atol=1e-2)
        torch.testing.assert_close(seen[0].var((0, 2, 3)), torch.ones(32), rtol=0, atol=1e-2)


def test_mixed_levels_use_the_statistics_of_each(elastic):
    recalibrate(elastic, batches(), progress=False)
    x = images(NAME)
    own = torch.tensor([[0, 1, 2], [2, 2, 2], [1, 1, 1], [2, 0, 1], [1, 2, 0], [0, 0, 0]])
    with torch.no_grad(), levels(elastic, own):
        mixed = elastic(x)
    for b, structure in enumerate(own.tolist()):
        alone = uniform(elastic, x[b : b + 1], structure)
        torch.testing.assert_close(mixed[b : b + 1], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(extract(elastic, structure)(x[b : b + 1]), alone, rtol=1e-4, atol=1e-4)


def test_recalibrated_statistics_are_saved_and_loaded(elastic):
    other = copy.deepcopy(elastic)
    recalibrate(elastic, batches(), progress=False)
    other.load_state_dict(elastic.state_dict())
    x = images(NAME)
    assert torch.equal(uniform(other, x, [1, 2, 1]), uniform(elastic, x, [1, 2, 1]))


def test_a_loader_that_fails_changes_nothing(elastic):
    before, x = copy.deepcopy(elastic.state_dict()), images(NAME)

    def failing():
        yield x
        raise OSError("no more")

    for loader, error in ((failing(), OSError), ([], ValueError)):
        with pytest.raises(error):
            recalibrate(elastic, loader, progress=False)
        assert list(elastic.state_dict()) == list(before)
        assert all(torch.equal(before[key], value) for key, value in elastic.state_dict().items())
        assert all(norm.momentum == 0.1 and not norm.training for norm in norms(elastic))


def test_a_latency_table_has_a_time_for_each_level_and_is_kept_as_json(elastic, tmp_path):
    table = latency_table(elastic, images(NAME, 2), repeats=2, path=tmp_path / "table.json", progress=False)
    assert table.blocks == ("layers.0", "layers.1", "layers.2")
    assert [len(row) for row in table.milliseconds] == [3, 3, 3]
    assert all(time > 0 for row in table.milliseconds for time in row)
    assert (table.batch, table.device, table.dtype) == (2, "cpu", "float32")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert json.loads((tmp_path / "table.json").read_text())["torch"] == torch.__version__


def test_a_table_of_blocks_without_a_shortcut_begins_at_their_lowest_level():
    model = foreign("torchvision_mobilenetv2")
    convert(model, 2, example=images("torchvision_mobilenetv2"))
    table = latency_table(nn.Sequential(model), images("torchvision_mobilenetv2", 2), repeats=1, progress=False)
    assert table.milliseconds[1][0] == table.milliseconds[1][1]


def test_blocks_that_are_no_module_are_measured_by_whole_runs():
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(x).relu())

    model = Inline()
    convert(model, 2, example=images(NAME))
    table = latency_table(model, images(NAME, 2), repeats=1, progress=False)
    assert table.milliseconds[0][0] == 0
    assert table.rest >= 0


TABLE = LatencyTable(("a", "b"), ((0.0, 1.0, 2.0), (0.5, 0.75, 4.0)), 10.0, 1, "cpu", 1, "float32", "2.13")


def test_a_table_adds_up():
    assert TABLE.estimate([0, 0]) == 10.5
    assert torch.equal(TABLE.estimate(torch.tensor([[2, 1], [1, 2]])), torch.tensor([12.75, 15.0], dtype=torch.float64))
    for wrong, message in (([0], r"levels must be \[2\] or \[S, 2\], got \[1\]"), ([0, 3], "in 0..2, got 0..3")):
        with pytest.raises(ValueError, match=message):
            TABLE.estimate(wrong)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"blocks": ["a"], "milliseconds": [["x"]]}', '{"milliseconds": 3}'])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"latency_table: file must be one that LatencyTable\.save wrote"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_with_rows_missing_is_refused(tmp_path):
    TABLE.save(tmp_path / "table.json")
    broken = json.loads((tmp_path / "table.json").read_text()) | {"milliseconds": [[1.0, 2.0]]}
    (tmp_path / "table.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="a row of equal length for each block"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_needs_a_repeat(elastic):
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        latency_table(elastic, images(NAME), repeats=0)


def test_advice_is_measured_and_says_why():
    found = advise(32, groups=(1, 2, 4), size=4, batch=4, repeats=1)
    assert sorted(advice.groups for advice in found) == [1, 2, 4]
    assert [advice.realised for advice in found] == sorted((advice.realised for advice in found), reverse=True)
    four = next(advice for advice in found if advice.groups == 4)
    assert four.sizes == (8, 8, 8, 8)
    assert four.reason == "8 channels leave 8 of the last 16 lanes idle" or "oneDNN" in four.reason
    assert str(four).startswith("4 groups of 8+8+8+8: realised ")


def test_advice_needs_groups_that_divide_the_channels():
    with pytest.raises(ValueError, match="advise: groups must divide 30 channels into equal groups, got 4"):
        advise(30, groups=(4,))
    with pytest.raises(ValueError, match="advise: size must be at least 1, got 0"):
        advise(30, size=0)
