"""Bad input to every public function and command: which error, the words that it holds, and nothing changed on disk.

A row is (call, error, words). Words are what a user needs: the argument, what was expected of it, and what came.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import den
import den_kernels as dk
from den.cli import main
from den.commands import Command

x, weight, bias = torch.zeros(2, 8, 5, 5), torch.zeros(12, 8, 3, 3), torch.zeros(12)
levels, sizes = torch.tensor([1, 3]), (3, 5, 4)
plan = dk.RoutingPlan.from_levels(torch.tensor([[1], [2]]), 4)
plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
task = den.Task("a", 10, 32)


def conv(**changes: Any) -> Any:
    given = {"x": x, "weight": weight, "bias": bias, "selection": levels, "padding": 1, "out_groups": sizes} | changes
    return dk.dynamic_conv2d(given.pop("x"), given.pop("weight"), given.pop("bias"), given.pop("selection"), **given)


def norm(**changes: Any) -> Any:
    given = {"x": torch.zeros(2, 12, 5, 5), "route": levels, "weight": bias, "bias": bias, "running_mean": bias.clone(),
             "running_var": bias.clone(), "groups": sizes, "training": True} | changes  # fmt: skip
    return dk.dynamic_batch_norm(**given)


def elastic_pair() -> tuple[nn.Module, ...]:
    """conv1, bn1, conv2, bn2 of a residual block of 16 channels in four groups, bn1 before conv1."""
    conv1 = dk.DynamicConv2d(16, 16, 3, padding=1, bias=False, out_groups=4)
    conv2 = dk.DynamicConv2d(16, 16, 3, padding=1, bias=False, in_groups=4)
    return conv1, nn.BatchNorm2d(16), conv2, nn.BatchNorm2d(16)


def weights() -> dk.ResidualWeights:
    return dk.ResidualWeights.fold(*elastic_pair())


def residual(**changes: Any) -> Any:
    given = {"x": torch.zeros(2, 16, 5, 5), "selection": plan[0], "weights": weights()} | changes
    return dk.dynamic_residual(**given)


def bottleneck(**changes: Any) -> Any:
    sides = {1: {"out_groups": 4}, 3: {"out_groups": 4, "in_groups": 4}, 0: {"in_groups": 4}}
    layers: list[Any] = []
    for kernel, side in sides.items():
        layers += [dk.DynamicConv2d(16, 16, kernel or 1, padding=kernel // 2, bias=False, **side), nn.BatchNorm2d(16)]
    folded = dk.BottleneckWeights.fold(*layers)
    return dk.dynamic_bottleneck(**({"x": torch.zeros(2, 16, 5, 5), "selection": plan[0], "weights": folded} | changes))


def inverted(**changes: Any) -> Any:
    conv1, conv3 = dk.DynamicConv2d(16, 16, 1, out_groups=4), nn.Conv2d(16, 16, 1)
    folded = dk.InvertedResidualWeights.fold(conv1, None, nn.Conv2d(16, 16, 3, padding=1, groups=16), None, conv3, None)
    given = {"x": torch.zeros(2, 16, 5, 5), "selection": plan[0], "weights": folded} | changes
    return dk.dynamic_inverted_residual(**given)


def graph(edges: Any = ((0, 1),), count: int = 1, shape: tuple[int, ...] = (4, 4, 3, 3)) -> Any:
    return dk.GraphWeights.pack(2, edges, [torch.zeros(shape)] * count, [torch.zeros(shape[0])] * count)


def model() -> den.DeepElasticNetwork:
    return den.create_model("wrn14_1", [task])


V, T, I = ValueError, TypeError, IndexError
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # dynamic_conv2d
    "x of three axes": (lambda: conv(x=x[0]), V, "x and weight must have four axes, got [8, 5, 5]"),
    "weight of three axes": (lambda: conv(weight=weight[0]), V, "must have four axes"),
    "x is no tensor": (lambda: conv(x=[[1.0]]), T, "x must be a tensor, got list"),
    "other channels": (lambda: conv(x=x[:, :7]), V, "x must have 8 channels, got 7"),
    "short bias": (lambda: conv(bias=bias[1:]), V, "bias must be [12], got [11]"),
    "two dtypes": (lambda: conv(weight=weight.double()), T, "must be torch.float32 as x is, got torch.float64"),
    "integers": (lambda: conv(x=x.int(), weight=weight.int(), bias=None), T, "float32 or float64, got torch.int32"),
    "level too high": (lambda: conv(selection=levels + 1), V, "levels must be in 0..3, got 4 for instance 1"),
    "level below 0": (lambda: conv(selection=levels - 2), V, "levels must be in 0..3, got -1 for instance 0"),
    "levels of floats": (lambda: conv(selection=levels.float()), T, "must be an integer tensor, got torch.float32"),
    "too many levels": (lambda: conv(selection=torch.tensor([1, 2, 3])), V, "levels must be [2], got [3]"),
    "mask of other groups": (lambda: conv(selection=torch.ones(2, 4).bool()), V, "mask must be [2, 3], got [2, 4]"),
    "selection is a list": (lambda: conv(selection=[1, 2]), T, "must be an integer tensor, got list"),
    "levels elsewhere": (lambda: conv(selection=levels.to("meta")), V, "must be on cpu as x is, got meta"),
    "groups of another sum": (lambda: conv(out_groups=(3, 5, 5)), V, "add up to 12 channels, got (3, 5, 5)"),
    "negative group": (lambda: conv(out_groups=(-1, 13)), V, "must be positive and add up to 12"),
    "no groups": (lambda: conv(out_groups=None), V, "out_groups or in_groups must be set"),
    "unequal groups": (lambda: conv(out_groups=5), V, "must divide 12 channels into equal groups, got 5"),
    "sides that differ": (lambda: conv(in_groups=(4, 4)), V, "must have 3 groups as out_groups, got 2"),
    "padding in words": (lambda: conv(padding="full"), V, "padding must be integers, 'valid', or 'same'"),
    "negative padding": (lambda: conv(padding=-1), V, "padding must be one or two integers of at least 0"),
    "stride 0": (lambda: conv(stride=0), V, "stride must be one or two integers of at least 1, got 0"),
    "dilation 0": (lambda: conv(dilation=0), V, "dilation must be one or two integers of at least 1, got 0"),
    "cardinality": (lambda: conv(groups=3), V, "x must have 24 channels, got 8"),
    "small map": (lambda: conv(padding=0, x=x[..., :2, :2]), V, "must fit the padded map, got [2, 8, 2, 2]"),
    # dynamic_batch_norm
    "norm: three axes": (lambda: norm(x=x[0]), V, "x must be [B, C, H, W], got shape [8, 5, 5]"),
    "norm: channels": (lambda: norm(x=torch.zeros(2, 11, 5, 5)), V, "groups must add up to the 11 channels of x"),
    "norm: weight": (lambda: norm(weight=bias[1:]), V, "weight must be [12], got shape [11]"),
    "norm: level": (lambda: norm(route=levels * 3), V, "levels must be in 0..3, got 9"),
    "norm: eps": (lambda: norm(eps=-1.0), V, "eps must be at least 0, got -1.0"),
    "norm: integers": (lambda: norm(x=torch.zeros(2, 12, 5, 5).int()), T, "must be a floating point tensor"),
    "norm: one value": (
        lambda: norm(x=torch.zeros(1, 12, 1, 1), route=levels[1:]), V, "more than one value while training",
    ),
    # blocks
    "block: channels": (lambda: residual(x=torch.zeros(2, 15, 5, 5)), V, "x must"),
    "block: three axes": (lambda: residual(x=torch.zeros(16, 5, 5)), V, "x must"),
    "block: batch": (lambda: residual(x=torch.zeros(3, 16, 5, 5)), V, "3"),
    "block: shortcut": (lambda: residual(shortcut=torch.zeros(2, 16, 4, 5)), V, "shortcut must"),
    "block: dtype": (lambda: residual(x=torch.zeros(2, 16, 5, 5).double()), T, "x must"),
    "block: no selection": (lambda: residual(selection=None), T, "selection"),
    "block: level": (lambda: residual(selection=levels * 2), V, "levels must be in 0..4, got 6"),
    "bottleneck: channels": (lambda: bottleneck(x=torch.zeros(2, 8, 5, 5)), V, "x must"),
    "bottleneck: level": (lambda: bottleneck(selection=-levels), V, "levels must be in 0..4, got -1"),
    "inverted: channels": (lambda: inverted(x=torch.zeros(2, 8, 5, 5)), V, "x must be [B, 16, H, W]"),
    "inverted: level": (lambda: inverted(selection=levels * 2), V, "levels must be in 0..4, got 6"),
    "inverted: dtype": (lambda: inverted(x=torch.zeros(2, 16, 5, 5).double()), T, "x must be torch.float32"),
    "inverted: shortcut": (lambda: inverted(shortcut=torch.zeros(2, 16, 4, 5)), V, "shortcut must be [2, 16, 5, 5]"),
    "fold: order": (
        lambda: dk.ResidualWeights.fold(nn.BatchNorm2d(16), *elastic_pair()[1:]), T, "conv1 must be",
    ),
    "trunk: blocks": (
        lambda: dk.dynamic_trunk(
            torch.zeros(2, 16, 5, 5), dk.RoutingPlan.from_levels(torch.zeros(2, 3).long(), 4),
            dk.TrunkWeights((weights(),)),
        ),
        V, "plan must be of 2 instances and 1 blocks, got 2 and 3",
    ),
    "trunk: shortcuts": (
        lambda: dk.TrunkWeights((weights(),), shortcuts=(None, None)), V, "shortcuts must be one for each of 1 blocks",
    ),
    "trunk: none": (lambda: dk.TrunkWeights(()), V, "blocks must be at least one, got none"),
    "graph: edge ahead": (lambda: graph(((0, 5),)), V, "edges must be (i, j) with 0 <= i < j < 2"),
    "graph: edge back": (lambda: graph(((1, 0),)), V, "edges must be (i, j)"),
    "graph: weights": (lambda: graph(count=2), V, "one for each of the 1 edges"),
    "graph: kernel": (lambda: graph(shape=(4, 4, 2, 2)), V, "[C, C, R, S] with odd R and S, got [4, 4, 2, 2]"),
    "graph: states": (
        lambda: dk.dynamic_graph(torch.zeros(2, 4, 5, 5), graph(), plan, bias[:2], bias[:1], bias[:2]), V,
        "plan must hold 1 blocks of one group",
    ),
    # plans
    "plan: level": (lambda: dk.RoutingPlan.from_levels(torch.tensor([[5]]), 4), V, "must be in 0..4, got 5"),
    "plan: one axis": (lambda: dk.RoutingPlan.from_levels(levels, 4), V, "levels must be [B, N], got [2]"),
    "plan: floats": (lambda: dk.RoutingPlan.from_levels(torch.ones(1, 1), 4), T, "must be an integer tensor"),
    "plan: no groups": (lambda: dk.RoutingPlan.from_levels(levels[:, None], 0), V, "must be at least 1, got 0"),
    "plan: masks of integers": (
        lambda: dk.RoutingPlan.from_masks(levels[:, None, None]), T, "masks must be a bool tensor",
    ),
    "plan: block": (lambda: plan[3], I, "block must be in 0..0, got 3"),
    # layers
    "layer: groups": (lambda: dk.DynamicConv2d(8, 12, 3, out_groups=(5, 5)), V, "12 channels, got (5, 5)"),
    "layer: 0 groups": (lambda: dk.DynamicConv2d(8, 12, 3, out_groups=0), V, "equal groups, got 0"),
    "layer: padding mode": (lambda: dk.DynamicConv2d(8, 12, 3, out_groups=2, padding_mode="spiral"), V, "spiral"),
    "layer: of another": (lambda: dk.DynamicConv2d.from_conv(nn.Linear(3, 4), out_groups=2), T, "got Linear"),
    "norm layer: groups": (lambda: dk.DynamicBatchNorm2d(12, groups=(5, 5)), V, "add up to 12 channels"),
    "norm layer: of another": (
        lambda: dk.DynamicBatchNorm2d.from_norm(nn.LayerNorm(3), groups=3), T, "nn.BatchNorm2d, got LayerNorm",
    ),
    # models of others
    "convert: no block": (lambda: dk.convert(plain), V, "must have a sum of a shortcut and a branch"),
    "convert: groups": (lambda: dk.convert(plain, 0), V, "groups must be a number of groups or their shares"),
    "convert: order": (lambda: dk.convert(plain, order="random"), V, "order must be 'none' or 'l1'"),
    "convert: no model": (lambda: dk.convert("resnet18"), T, "model must be an nn.Module, got str"),
    "levels: not converted": (lambda: dk.levels(plain, levels).__enter__(), V, "convert has changed"),
    "extract: not converted": (lambda: dk.extract(plain, [1]), V, "convert has changed"),
    "ElasticModel: not converted": (lambda: dk.ElasticModel(plain, plain)(x), V, "convert has changed"),
    "recalibrate: not converted": (lambda: dk.recalibrate(plain, []), V, "convert has changed"),
    "latency_table: not converted": (lambda: dk.latency_table(plain, x), V, "convert has changed"),
    "WithLevels: not converted": (lambda: dk.WithLevels(plain), V, "convert has changed"),
    "masked: no program": (lambda: dk.masked(plain), T, "must be what torch.export.export returns, got Sequential"),
    "masked: nothing of ours": (lambda: dk.masked(torch.export.export(plain, (torch.zeros(1, 3, 8, 8),))), V,
                                "must hold ops of den_kernels, got one without any"),
    "for_export: frozen": (lambda: den.for_export(den.create_model("wrn8_1", [task]).freeze()), V,
                           "network must not be frozen"),
    "freeze: not converted": (lambda: dk.freeze(plain), V, "convert has changed"),
    "level_flops: not converted": (lambda: dk.level_flops(plain, x), V, "convert has changed"),
    "report_of: not converted": (lambda: dk.report_of(plain), V, "convert has changed"),
    "attach_selector: not converted": (lambda: den.attach_selector(plain, x), V, "convert has changed"),
    "train_elastic: no selector": (lambda: den.train_elastic(plain, x, levels), V, "must be of den.attach_selector"),
    "train_elastic: rounds": (lambda: den.ElasticTraining(rounds=0), V, "rounds must be at least 1, got 0"),
    "Engine: another model": (lambda: den.Engine(plain), V, "must be a DeepElasticNetwork, or one that"),
    "Engine: level": (lambda: den.Engine(model().eval(), levels=[9] * 6), V, "levels must be in 0..3, got 9..9"),
    "Engine: two budgets": (lambda: den.Engine(model().eval(), levels=[1] * 6, flops=0.5), V, "not be given together"),
    "Engine: kept": (
        lambda: den.Engine(model().eval()).save_pretrained("new", kept={"b": 1}), V, "kept must be of a, got 'b'",
    ),
    "Engine: batch": (lambda: den.Engine(model().eval(), max_batch=0), V, "max_batch must be a whole number"),
    "advise: channels": (lambda: dk.advise(0), V, "channels must be at least 1, got 0"),
    "advise: groups": (lambda: dk.advise(16, groups=(0,)), V, "groups must divide 16 channels"),
    # networks
    "create: depth": (lambda: den.create_model("wrn13_1", [task]), V, "got 13; nearest: 8 and 14"),
    "create: name": (lambda: den.create_model("alexnet", [task]), V, "wrn{l}_{r}, resnet{l}"),
    "create: no task": (lambda: den.create_model("wrn14_1", []), V, "tasks must be at least one"),
    "create: task twice": (lambda: den.create_model("wrn14_1", [task] * 2), V, "of unique names, got ['a', 'a']"),
    "create: one level": (lambda: den.create_model("wrn14_1", [task], 1), V, "levels must be at least 2"),
    "create: many levels": (lambda: den.create_model("wrn14_1", [task], 40), V, "for 40 levels, got 16"),
    "create: no map": (lambda: den.create_model("wrn14_1", [task], trunk_size=0), V, "trunk_size"),
    "task: classes": (lambda: den.Task("a", 0, 32), V, "classes of 'a' must be a whole number of at least 1"),
    "task: size": (lambda: den.Task("a", 10, 0), V, "size of 'a' must be a whole number of at least 1, got 0"),
    "task: channels": (lambda: den.Task("a", 10, 32, channels=0), V, "channels of 'a' must be"),
    "task: name": (lambda: den.Task("", 10, 32), V, "name must be a non-empty string"),
    "task: kind": (lambda: den.Task("a", 10, 32, kind="music"), V, "one of classification, segmentation"),
    "images: size": (lambda: model()(torch.zeros(1, 3, 31, 32), "a"), V, "floating, got [1, 3, 31, 32]"),
    "images: axes": (lambda: model()(torch.zeros(3, 32, 32), "a"), V, "floating, got [3, 32, 32]"),
    "images: bytes": (lambda: model()(torch.zeros(1, 3, 32, 32).byte(), "a"), V, "floating, got"),
    "images: tasks": (lambda: model()([torch.zeros(1, 3, 32, 32)], ["a", "b"]), V, "must name one task for each"),
    "task unknown": (lambda: den.image_flops(model(), "zoo"), V, "task must be one of 0 'a', got 'zoo'"),
    "flops: blocks": (lambda: den.count_flops(model(), torch.zeros(1, 5).long()), V, "[B, N] with N = 6"),
    "flops: level": (lambda: den.count_flops(model(), torch.full((1, 6), 9)), V, "must be in 0..3, got 9..9"),
    "resnext: depth": (lambda: den.resnext(30, 8, 64), V, "got 30; nearest: 29 and 38"),
    "wide_resnet: width": (lambda: den.wide_resnet(14, 0), V, "width must be at least 1, got 0"),
    "vgg: stage": (lambda: den.vgg(((0, 64),), 64), V, "stages must be (channels, blocks), each at least 1"),
    "vgg: elastic layers": (
        lambda: den.DeepElasticNetwork(den.ModelConfig((task,), "vgg19_elastic_fc", levels=14)), V,
        "channels must be at least 8192 for 14 levels, got 64",
    ),
    "graphed: on a CPU": (lambda: den.GraphedNetwork(model(), "a"), V, "model must be on a CUDA device, got cpu"),
    "load: no run": (lambda: den.load("absent"), V, "must be"),
    "named_backbone": (lambda: den.named_backbone("wrn"), V, "backbone must be"),
    "level_groups": (lambda: den.level_groups(2, 4), V, "channels must be at least 4 for 4 levels, got 2"),
    "level_widths": (lambda: den.level_widths(0, 4), V, "channels must be at least 4 for 4 levels, got 0"),
    "level_fractions": (lambda: den.level_fractions(1), V, "levels must be at least 2"),
    "selector: no channels": (lambda: den.SelectorConfig(()), V, "must be whole numbers of at least 1"),
}  # fmt: skip

COMMANDS: dict[str, str] = {
    "train --out new --data.tasks mnist": "got 'mnist'",
    "train --out new --data.tasks cifar100": "use --data-root",
    "train --out new --data.batch-size 0": "batch_size must be at least 1, got 0",
    "train --out file/run": "out must be a folder that can be written",
    "train --out new --config absent.json": "must be a readable JSON file",
    "train --out new --config file": "must be a readable JSON file",
    "train --out new --resume": "config.json must be a readable JSON file",
    "train --out new --network.backbone vgg11": "vgg11",
    "train --out new --stages 0": "stages must be at least 1, got 0",
    "train --out new --device tpu": "device must be",
    "train m1 --budget inf --out new": "budget must be finite and above 0, got inf",
    "train m9 --out new": "m9",
    "train --out new --estimator.distill 1.5": "distill must be in 0..1, got 1.5",
    "train --out new --estimator.distill-share 0": "distill_share must be above 0 and at most 1, got 0",
    "train --out new --estimator.distill-temperature 0": "distill_temperature must be in 0.1..100, got 0",
    "train --out new --estimator.teacher absent": "must come with estimator.distill above 0 and mode den or dense, got",
    "train --out new --estimator.teacher absent --estimator.distill 0.5": "config.json must be a readable JSON file",
    "train --out new --selector.auxiliary -1": "auxiliary must be at least 0, got -1",
    "train --out new --selector.late-samples 1": "late_samples must be at least 2 with a leave-one-out baseline, got 1",
    "evaluate absent": "config.json must be a readable JSON file",
    "predict absent file": "config.json must be a readable JSON file",
    "predict absent file --out new": "config.json must be a readable JSON file",
    "predict absent file --out new --json -": "out must come without json and pictures",
    "predict absent file --ray": "ray and format must come with --out FOLDER",
    "predict absent file --out new --workers 2": "ray_address and workers must come with --ray",
    "serve absent": "config.json must be a readable JSON file",
    "serve file": "config.json must be a readable JSON file",
    "serve absent --port 0": "port must be in 1..65535, got 0",
    "serve absent --batch 0": "batch must be in 1..65536, got 0",
    "serve absent --seconds 0": "seconds must be above 0",
    "serve absent --body-mb inf": "body_mb must be",
    "train --out new --start absent": "absent",
    "train --out new --data.tasks folder:absent": "folder of folder:absent must be there",
    "dag predict absent file": "config.json must be a readable JSON file",
    "dag extract absent --task a --out new.pt2": "config.json must be a readable JSON file",
    "dag extract absent --task a --out new": "out must end with .pt2 or .onnx, got new",
    "report absent --out file": "out must be a folder that can be written",
    "demo --out file": "out must be a folder that can be written",
    "fetch --data-root new": "names must be at least one image set, got none",
    "fetch digits --data-root new": "name must be one of cifar10",
    "fetch cifar10 --data-root file": "data-root must be a folder that can be written",
    "dag train --out file/run": "out must be a folder that can be written",
    "dag train dag-nyuv2 --out new": "root",
    "dag report absent": "config.json must be a readable JSON file",
    "train --out new --accumulate 0": "accumulate must be at least 1, got 0",
    "dag train --out new --accumulate 0": "accumulate must be at least 1, got 0",
    "bench": "current folder must be a checkout of the project",
    "bench --case-seconds -1": "case_seconds must be at least 0, got -1",
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder, and folders (None), by their path."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file, where the test runs."""
    (tmp_path / "file").write_text("not JSON")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CALLS)
def test_a_call_raises_the_error_in_words_and_changes_nothing(name: str, place: Path) -> None:
    call, error, words = CALLS[name]
    before = contents(place)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert contents(place) == before


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_says_in_one_line_what_is_wrong_and_changes_nothing(
    line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    assert main(line.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("den: error: ")
    assert told.count("\n") == 1
    assert COMMANDS[line] in told
    assert contents(place) == before


def test_every_command_has_a_row() -> None:
    begun = {" ".join(line.split()[: 1 + line.startswith("dag ")]) for line in COMMANDS}
    assert len(begun) == len(get_args(Command)) - 1, begun  # `den info` takes nothing


def test_every_public_name_has_a_row() -> None:
    rows = Path(__file__).read_text()
    right = {
        "__version__",
        "invalidate",
        "BACKBONES",
        "ImageFlops",
        "ParameterCounts",
        "Prediction",
    }  # take nothing, or are results
    alike = {"dynamic_residual_", "dynamic_bottleneck_", "dynamic_inverted_residual_", "Route", "DeepElasticNetwork",
             "ModelConfig", "Estimator", "Selector", "Backbone", "Predictor", "count_parameters", "parameter_fractions",
             "resnet"}  # fmt: skip
    names = {name: f"{short}.{name}" for module, short in ((dk, "dk"), (den, "den")) for name in module.__all__}
    assert [name for name, used in names.items() if name not in right | alike and used not in rows] == []
