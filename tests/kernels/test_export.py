"""Converted models and ops as graphs: levels are an input or the selector's, batches are of any size."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from den_kernels import ElasticModel, RoutingPlan, WithLevels, convert, freeze, levels, masked
from tests.call_kinds import LEVELS, MODULES, OTHER_LEVELS, module
from tests.call_kinds import images as maps
from tests.foreign_models import foreign, images, random_levels
from tests.oracle import unlike_new
from tests.stand_ins import PlainBasicBlock

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
BATCH = {0: Dim("batch", min=1, max=4096)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
NAMES = ("pytorchcv_resnet", "pytorchcv_efficientnet")


def converted(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images [6, 3, H, W] and levels [6, N]."""
    model, x = foreign(name), images(name)
    report = convert(model, 2, example=x[:1])
    return model, x, random_levels(len(x), report.lowest, 2)


class Selector(nn.Module):
    """Levels by the sign of each image's sum."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).sum(1, keepdim=True) > 0).long().expand(-1, self.blocks) + 1


def recorded_by_export(model: nn.Module, *given: Tensor) -> nn.Module:
    return torch.export.export(model, given, dynamic_shapes=(BATCH,) * len(given)).module()


def recorded_by_strict_export(model: nn.Module, *given: Tensor) -> nn.Module:
    return torch.export.export(model, given, dynamic_shapes=(BATCH,) * len(given), strict=True).module()


def recorded_by_trace(model: nn.Module, *given: Tensor) -> nn.Module:
    return torch.jit.trace(model, given)


def recorded_by_make_fx(model: nn.Module, *given: Tensor) -> nn.Module:
    return make_fx(model)(*given)


WAYS = (recorded_by_export, recorded_by_strict_export, recorded_by_trace, recorded_by_make_fx)
ways = pytest.mark.parametrize("record", WAYS, ids=lambda way: way.__name__)


@torch.no_grad()
@pytest.mark.parametrize(("name", "frozen"), [(NAMES[0], False), (NAMES[0], True), (NAMES[1], False)])
def test_an_exported_model_takes_other_levels_and_batches(name, frozen):
    model, x, own = converted(name)
    whole = WithLevels(freeze(model, x[:1]) if frozen else model)
    graph = recorded_by_export(whole, x, own)
    for batch in (6, 4, 1):
        given = images(name, 7, seed=batch)[-batch:], own.flip(0)[:batch]
        torch.testing.assert_close(graph(*given), whole(*given), **CLOSE)


@torch.no_grad()
def test_masks_are_an_input_too():
    model, x, own = converted(NAMES[0])
    masks = torch.rand(*own.shape, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    graph = recorded_by_export(WithLevels(model), x, masks)
    torch.testing.assert_close(graph(x[:3], ~masks[:3]), WithLevels(model)(x[:3], ~masks[:3]), **CLOSE)


@torch.no_grad()
def test_an_exported_selector_chooses_for_other_images():
    model, x, own = converted(NAMES[0])
    elastic = ElasticModel(model, Selector(own.shape[1])).eval()
    graph = recorded_by_export(elastic, x)
    for given in (x[:2], images(NAMES[0], 5, seed=1)):
        torch.testing.assert_close(graph(given), elastic(given), **CLOSE)


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of one block, images [2, 16, 6, 6] and levels [2, 1]."""
    model, x = unlike_new(nn.Sequential(PlainBasicBlock(16, 16))).eval(), torch.rand(2, 16, 6, 6)
    convert(model, 2, example=x[:1])
    return model, x, torch.tensor([[1], [2]])


@ways
@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_levels_that_would_be_constants_are_refused(record, frozen):
    model, x, own = small()
    model = freeze(model, x[:1]) if frozen else model
    with levels(model, own), pytest.raises(Exception, match="levels must be set inside the call"):
        record(model, x)
    torch.testing.assert_close(record(WithLevels(model), x, own)(x, own.flip(0)), WithLevels(model)(x, own.flip(0)))


@ways
@torch.no_grad()
def test_without_levels_the_graph_is_the_model(record):
    model, x, _ = small()
    torch.testing.assert_close(record(model, x)(x + 1), model(x + 1), **CLOSE)


@torch.no_grad()
def test_a_compiled_model_still_takes_levels_that_are_set_around_it():
    model, x, own = small()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for given in (own, own.flip(0)):
        with levels(model, given):
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)


def test_with_levels_is_the_context():
    model, x, own = converted(NAMES[0])
    with levels(model, own):
        wanted = model(x)
    assert torch.equal(WithLevels(model)(x, own), wanted)
    assert torch.equal(WithLevels(ElasticModel(model, Selector(4)))(x, own), wanted)
    assert WithLevels(model.train()).training
    with pytest.raises(ValueError, match="WithLevels: model must be one that den_kernels"):
        WithLevels(nn.Conv2d(3, 3, 1))


SOON = ("conv mask", "norm", "residual in place", "bottleneck op, composed", "graph")
OPS = [
    pytest.param(name, marks=() if name in SOON else pytest.mark.release)
    for name in sorted(MODULES)
    if "frozen" not in name
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:masked")
@pytest.mark.parametrize("name", OPS)
def test_masked_programs_compute_what_the_ops_do_without_them(name):
    function = module(name)
    program = torch.export.export(function, (maps(), LEVELS), dynamic_shapes=(BATCH, BATCH))
    before = copy.deepcopy(program.graph_module.code)
    graph = masked(program)
    assert program.graph_module.code == before
    assert not [node for node in graph.graph.nodes if "den_kernels" in str(node.target)]
    x, own = maps(2).repeat(2, 1, 1, 1)[1:], OTHER_LEVELS.repeat(2)[1:]
    torch.testing.assert_close(graph.module()(x, own), function(x, own), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv mask", "norm", "residual in place", "graph"])
def test_while_onnx_is_exported_ops_are_masked_and_say_so(name, monkeypatch):
    function = module(name)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.warns(UserWarning, match="levels save no time"):
        program = torch.export.export(function, (maps(), LEVELS), dynamic_shapes=(BATCH, BATCH))
    monkeypatch.undo()
    assert not [node for node in program.graph.nodes if "den_kernels" in str(node.target)]
    x, own = maps(2)[1:], OTHER_LEVELS[1:]
    torch.testing.assert_close(program.module()(x, own), function(x, own), **CLOSE)


class Masks(nn.Module):
    """The order of masks of seven groups, and where each mask begins."""

    def forward(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        plan = RoutingPlan.from_masks(masks)
        return plan.order, plan.offsets


@pytest.mark.filterwarnings("ignore:masked")
def test_masked_plans_sort_as_the_ops_do():
    masks = torch.rand(40, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[20:] = masks[:20]
    program = masked(torch.export.export(Masks(), (masks,), dynamic_shapes=(BATCH,)))
    for given in (masks, masks[:5] & masks[5:10]):
        for got, wanted in zip(program.module()(given), Masks()(given), strict=True):
            assert torch.equal(got, wanted)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:masked")
def test_masked_models_compute_what_the_model_does_and_say_what_it_costs():
    model, x, own = converted(NAMES[0])
    program = torch.export.export(WithLevels(model), (x, own), dynamic_shapes=(BATCH, BATCH))
    with pytest.warns(UserWarning, match="levels save no time"):
        graph = masked(program).module()
    torch.testing.assert_close(graph(x[:3], own[3:]), WithLevels(model)(x[:3], own[3:]), **CLOSE)


def test_what_cannot_be_masked_is_refused():
    model, x, own = small()
    plain = torch.export.export(nn.Conv2d(16, 4, 1), (x,))
    with pytest.raises(ValueError, match="program must hold ops of den_kernels, got one without any"):
        masked(plain)
    with pytest.raises(TypeError, match=r"program must be what torch\.export\.export returns, got Sequential"):
        masked(model)
    frozen = WithLevels(freeze(model, x[:1]))
    if all(block.direct for block in frozen.modules() if hasattr(block, "direct")):
        with torch.no_grad(), pytest.raises(Exception, match="must be of a model that is not frozen"):
            masked(torch.export.export(frozen, (x, own)))
