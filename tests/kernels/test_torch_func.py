"""torch.func: grad, vjp, jacrev and vmap of each op give what its equation gives; the rest is refused by name."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from den_kernels import DynamicBatchNorm2d, DynamicConv2d
from tests.call_kinds import INFERENCE, LEVELS, MODULES, OTHER_LEVELS, PLANS, SAME, images, module

TRAINABLE = sorted(MODULES.keys() - PLANS - INFERENCE)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def of_autograd(name, function):
    x = images().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.parametrize("name", TRAINABLE)
def test_grad_and_vjp_of_the_input(name):
    layers = module(name)
    weights = images(1)

    def loss(x):
        return (layers(x, LEVELS) * weights).sum()

    wanted = of_autograd(name, loss)
    torch.testing.assert_close(grad(loss)(images()), wanted, **CLOSE)
    y, pull = vjp(lambda x: layers(x, LEVELS), images())
    torch.testing.assert_close(y, layers(images(), LEVELS), **CLOSE)
    torch.testing.assert_close(pull(weights)[0], wanted, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(grad(loss)(images()), wanted, **CLOSE)


@pytest.mark.parametrize("name", TRAINABLE)
def test_grad_of_the_parameters(name):
    layers = module(name)
    parameters = dict(layers.named_parameters())

    def loss(parameters):
        return (functional_call(layers, parameters, (images(), LEVELS)) * images(1)).sum()

    found = grad(loss)(parameters)
    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for (key, got), expected in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", TRAINABLE)
def test_jacrev_and_second_derivatives(name):
    layers = module(name)
    few = [0, 2, 3]

    def pixels(x):
        return layers(x, LEVELS)[few, 1, 2, 3]

    jacobian = jacrev(pixels)(images())
    for row, b in enumerate(few):
        wanted = of_autograd(name, lambda x, b=b: layers(x, LEVELS)[b, 1, 2, 3])
        torch.testing.assert_close(jacobian[row], wanted, **CLOSE)

    def penalty(x):
        return grad(lambda t: (layers(t, LEVELS) * images(1)).sum())(x).square().sum()

    x = images().requires_grad_()
    (dx,) = torch.autograd.grad((layers(x, LEVELS) * images(1)).sum(), x, create_graph=True)
    if dx.requires_grad:
        (wanted,) = torch.autograd.grad(dx.square().sum(), x, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(
            grad(penalty)(images()), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-5
        )


@pytest.mark.parametrize("name", TRAINABLE)
def test_vmap_over_batches_and_over_instances(name):
    layers = module(name)
    x, levels = torch.stack([images(), images(1)]), torch.stack([LEVELS, OTHER_LEVELS])
    with torch.no_grad():
        wanted = torch.stack([layers(*each) for each in zip(x, levels, strict=True)])
        torch.testing.assert_close(vmap(layers)(x, levels), wanted, **CLOSE)
        fixed = torch.stack([layers(each, LEVELS) for each in x])
        torch.testing.assert_close(vmap(layers, in_dims=(0, None))(x, LEVELS), fixed, **CLOSE)
        if name != "norm of the batch":
            one = vmap(lambda image, level: layers(image[None], level[None])[0])
            torch.testing.assert_close(one(x[0], LEVELS), wanted[0], **CLOSE)


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name != "norm of the batch"])
def test_gradients_of_each_instance(name):
    layers = module(name)
    parameters = dict(layers.named_parameters())

    def loss(parameters, image, level):
        return functional_call(layers, parameters, (image[None], level[None])).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images(), LEVELS)
    for b in range(4):
        wanted = torch.autograd.grad(loss(parameters, images()[b], LEVELS[b]), list(parameters.values()))
        for got, expected in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(got[b], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6)


def test_an_ensemble_of_layers():
    layers = [DynamicConv2d(16, 16, **SAME, out_groups=4) for _ in range(3)]
    parameters, _ = stack_module_state(layers)
    x = images()
    found = vmap(lambda p: functional_call(layers[0], p, (x, LEVELS)))(parameters)
    torch.testing.assert_close(found, torch.stack([layer(x, LEVELS) for layer in layers]), **CLOSE)


REFUSED = "must be without tangents|must not require a gradient|must run with a route and|must be outside torch.func"


@pytest.mark.parametrize("transform", [jvp, jacfwd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", sorted(MODULES.keys() - PLANS))
def test_forward_mode_is_refused(name, transform):
    layers, x = module(name), images()
    arguments = ((x,), (x,)) if transform is jvp else ()
    call = partial(transform, lambda x: layers(x, LEVELS), *arguments)
    with pytest.raises((RuntimeError, ValueError), match=REFUSED):
        call() if transform is jvp else call()(x)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_hessian_is_that_of_reverse_mode(name):
    """Forward mode over reverse mode: inside grad all that runs is the equation, which has tangents."""
    layers, x, weights, some = module(name), images(), images(1), images(2)[0, 0, 0, :3]

    def loss(some):
        image = torch.cat([some, x.flatten()[3:]]).view(x.shape)
        return (layers(image, LEVELS).square() * weights).sum()

    found, wanted = hessian(loss)(some), torch.autograd.functional.hessian(loss, some)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-6)


@pytest.mark.parametrize("transform", [grad, vmap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", sorted(INFERENCE))
def test_ops_for_inference_refuse_by_name(name, transform):
    layers, x = module(name), images()
    call = transform(lambda x: layers(x, LEVELS).sum())
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=REFUSED):
        call(x if transform is grad else x[None])


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, DynamicBatchNorm2d], ids=lambda kind: kind.__name__)
def test_running_statistics_are_not_updated_inside(kind):
    """As with nn.BatchNorm2d: an error, and what a module without them computes is right."""
    norm = kind(16)
    arguments = () if kind is nn.BatchNorm2d else (torch.ones(4, dtype=torch.int64),)
    with pytest.raises(RuntimeError):
        grad(lambda x: norm(x, *arguments).square().sum())(images())
    assert torch.equal(norm.running_mean, torch.zeros(16))


@pytest.mark.parametrize("masked", [False, True], ids=["levels", "masks"])
def test_a_plan_inside_vmap_is_the_plan_of_each(masked):
    plan = module("plan of masks" if masked else "plan of levels")
    levels = torch.stack([LEVELS, OTHER_LEVELS, LEVELS.flip(0)])
    x = images()
    wanted = torch.stack([plan(x, each) for each in levels])
    assert torch.equal(vmap(lambda each: plan(x, each))(levels), wanted)
    assert torch.equal(vmap(lambda each: plan(x, each), in_dims=1)(levels.t()), wanted)


def test_levels_out_of_range_are_an_error_in_grad():
    with pytest.raises(ValueError, match=r"levels must be in 0\.\.4"):
        grad(lambda x: module("conv")(x, LEVELS + 4).sum())(images())


@pytest.mark.parametrize("transform", [grad, vmap], ids=lambda f: f.__name__)
def test_compiled_transforms(transform):
    conv, x = module("conv"), images()
    calls = {
        grad: grad(lambda t: conv(t, LEVELS).square().sum()),
        vmap: lambda x: vmap(lambda image, level: conv(image[None], level[None])[0])(x, LEVELS),
    }
    compiled = torch.compile(calls[transform], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), calls[transform](x), **CLOSE)
