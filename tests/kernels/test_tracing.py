"""Each op under each way that torch has of making a graph of a call: the values of other inputs too, or an error."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from den_kernels import (
    DynamicBatchNorm2d,
    DynamicConv2d,
    RoutingPlan,
    dynamic_batch_norm,
    dynamic_bottleneck,
    dynamic_bottleneck_,
    dynamic_conv2d,
    dynamic_graph,
    dynamic_inverted_residual,
    dynamic_inverted_residual_,
    dynamic_residual,
    dynamic_residual_,
)
from tests.call_kinds import (
    INFERENCE,
    LEVELS,
    MODULES,
    OTHER_LEVELS,
    PLANS,
    SAME,
    Bottleneck,
    Graph,
    Inverted,
    Residual,
    images,
    module,
)

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def traced(function, x, levels):
    return torch.jit.trace(function, (x, levels))


def made_fx(function, x, levels):
    return make_fx(function)(x, levels)


def made_fx_of_fakes(function, x, levels):
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(x, levels)


def exported(function, x, levels):
    return torch.export.export(function, (x, levels)).module()


def compiled(function, x, levels):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


WAYS = {f.__name__: f for f in (traced, made_fx, made_fx_of_fakes, exported, compiled)}
REFUSED = {  # in our words
    (name, way): "a frozen block must run" for name in ("frozen block", "frozen bottleneck")
    for way in ("exported", "compiled")
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_a_graph_computes_what_the_module_does(name, way):
    function = module(name)
    with torch.no_grad():
        if (name, way) in REFUSED:
            with pytest.raises(Exception, match=REFUSED[name, way]):
                WAYS[way](function, images(), LEVELS)(images(), LEVELS)
            return
        graph = WAYS[way](function, images(), LEVELS)
        for seed, levels in ((0, LEVELS), (1, OTHER_LEVELS)):
            torch.testing.assert_close(graph(images(seed), levels), function(images(seed), levels), **CLOSE)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - PLANS))
def test_a_traced_module_takes_other_batches(name):
    function = module(name)
    with torch.no_grad():
        graph = traced(function, images(), LEVELS)
        x, levels = images(2).repeat(2, 1, 1, 1)[1:], OTHER_LEVELS.repeat(2)[1:]
        torch.testing.assert_close(graph(x, levels), function(x, levels), **CLOSE)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - PLANS - INFERENCE))
def test_a_traced_module_trains(name):
    """With running statistics: what a norm of the batch does with them needs Python."""
    function = module(name)
    graph = traced(function, images(), LEVELS)
    results = []
    for call in (graph, function):
        x = images(1).requires_grad_()
        results.append(torch.autograd.grad(call(x, OTHER_LEVELS).square().sum(), [x, *function.parameters()]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_traced_module_is_saved_and_loaded(tmp_path):
    with torch.no_grad():
        traced(module("block"), images(), LEVELS).save(str(tmp_path / "block.pt"))
        loaded = torch.jit.load(str(tmp_path / "block.pt"))
        torch.testing.assert_close(loaded(images(1), OTHER_LEVELS), module("block")(images(1), OTHER_LEVELS), **CLOSE)


@pytest.mark.parametrize("way", ["traced", "made_fx"])
@pytest.mark.parametrize("kind", ["residual", "bottleneck", "inverted", "graph"])
def test_weights_are_packed_before(kind, way):
    if not Residual().weights.direct:
        pytest.skip("without a direct kernel nothing is packed outside of torch's ops")
    inside = {"residual": Residual, "bottleneck": Bottleneck, "inverted": Inverted, "graph": Graph}[kind]
    with torch.no_grad(), pytest.raises(RuntimeError, match="weights must be packed before"):
        WAYS[way](lambda x, levels: inside().requires_grad_(False)(x, levels), images(), LEVELS)


def test_the_number_of_groups_must_be_given_in_a_trace():
    with pytest.raises(ValueError, match="groups must be given here"):
        torch.jit.trace(lambda levels: RoutingPlan.from_levels(levels).levels, (LEVELS[:, None],))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - PLANS - {"norm of the batch"}))
def test_the_old_onnx_exporter_refuses_and_names_the_op(name, tmp_path):
    """A frozen block refuses before: an exporter reads the state_dict."""
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=r"den_kernels::|must not be frozen"):
        torch.onnx.export(module(name), (images(), LEVELS), tmp_path / "x.onnx", dynamo=False)


@pytest.mark.parametrize("name", ["conv", "norm", "block", "bottleneck", "frozen block"])
def test_script_is_refused(name):
    with pytest.raises(RuntimeError, match=r"must be made from Python, .* got torch\.jit\.script"):
        torch.jit.script(nn.Sequential(module(name)))


FUNCTIONS = (
    *(dynamic_conv2d, dynamic_batch_norm, dynamic_residual, dynamic_residual_, dynamic_bottleneck, dynamic_bottleneck_),
    *(dynamic_graph, dynamic_inverted_residual, dynamic_inverted_residual_),
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_scripted_functions_are_refused(function):
    def caller(x: torch.Tensor) -> torch.Tensor:
        return function(x, x, x)

    for scripted in (caller, function):
        with pytest.raises(RuntimeError, match=f"{function.__name__}: the call must be made from Python"):
            torch.jit.script(scripted)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = DynamicConv2d(16, 16, **SAME, out_groups=4), DynamicBatchNorm2d(16, groups=4)

    def forward(self, x, levels=None):
        return self.norm(self.conv(x, levels), levels, relu=True)


@pytest.mark.parametrize("selects", [True, False], ids=["levels", "no selection"])
def test_layers_are_leaves_of_fx(selects):
    torch.manual_seed(0)
    layers = Layers().eval()
    arguments = {} if selects else {"concrete_args": {"levels": None}}
    graph = torch.fx.symbolic_trace(layers, **arguments)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["conv", "norm"]
    for x, levels in ((images(), LEVELS), (images(1), OTHER_LEVELS)):
        given = (x, levels) if selects else (x,)
        assert torch.equal(graph(x, levels) if selects else graph(x, None), layers(*given))


@pytest.mark.parametrize("name", ["conv", "norm", "residual", "residual in place", "graph", "plan of levels"])
def test_fx_is_refused_by_all_that_is_no_leaf(name):
    with pytest.raises((TypeError, torch.fx.proxy.TraceError), match=r"Proxy|symbolically traced"):
        torch.fx.symbolic_trace(module(name))
