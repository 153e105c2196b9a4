"""What a decision about modules was made from: every change of it is seen, and nothing else."""

import gc
import weakref

import pytest
import torch
from torch import nn

from den_kernels import standing
from den_kernels.building import Standing, are_watched


@pytest.fixture(params=["extension", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(standing, "extension", None)
    elif standing.extension is None:
        pytest.skip("needs the extension")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()


def kept(model: nn.Sequential) -> Standing:
    made = Standing()
    made.keep_tree([model])
    made.keep(model[1][0], "eps")
    made.keep_plain([model[0], model[1]])
    return made


CHANGES = {
    "a module in another's place": lambda m: m[1].__setitem__(1, nn.ReLU()),
    "a module more": lambda m: m[1].append(nn.ReLU()),
    "a module less": lambda m: m[1].__delitem__(1),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach())),
    "a parameter less": lambda m: setattr(m[0], "bias", None),
    "a parameter more": lambda m: m[1].register_parameter("more", nn.Parameter(torch.zeros(1))),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "another buffer": lambda m: setattr(m[1][0], "running_mean", torch.zeros(4)),
    "another eps": lambda m: setattr(m[1][0], "eps", 1e-3),
    "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m[1].register_forward_pre_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m[0], "forward", lambda x: x),
    "training": lambda m: m.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(way, change):
    model = network()
    made = kept(model)
    assert made.holds()
    change(model)
    assert not made.holds()
    assert kept(model).holds() != are_watched([model[0], model[1]])


def test_what_was_not_kept_may_change(way):
    model = network()
    made = kept(model)
    model[1][0].momentum = 0.5
    model[1][0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert made.holds()
    hook = model[0].register_forward_hook(lambda *_: None)
    assert not made.holds()
    hook.remove()
    assert made.holds()


def test_one_of_nothing_holds(way):
    assert Standing().holds()


def test_it_is_freed_with_the_modules_that_hold_it(way):
    model = network()
    model.standing = kept(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(standing.extension is None, reason="needs the extension")
@pytest.mark.parametrize(
    ("place", "given"),
    [(0, {}), (0, ({},)), (0, ({}, [])), (1, 3), (1, ([], {})), (2, ()), (2, None)],
)
def test_what_is_no_dictionary_is_refused(place, given):
    arguments = [[], [], []]
    arguments[place] = [given]
    with pytest.raises(TypeError, match=r"stands: .* must hold"):
        standing.extension.stands(*arguments)
