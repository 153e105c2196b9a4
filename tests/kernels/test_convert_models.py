"""Other people's models, converted: the same bit for bit with everything on, and a masked float64 model else."""

import copy

import pytest
import torch

from den_kernels import convert, levels
from den_kernels.testing import assert_as_accurate
from tests.foreign_models import FAMILIES, exact, foreign, images, masked, random_levels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHARES = {"two equal groups": (1, 1), "a quarter, a quarter, a half": (1, 1, 2)}


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_groups_it_is_the_original_bit_for_bit(name):
    model = foreign(name)
    x, state, modes = images(name), model.state_dict(), [m.training for m in model.modules()]
    original = model(x)
    report = convert(model, 2, example=x[:1])
    assert len(report) == FAMILIES[name].blocks
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model(x), original)
    with levels(model, torch.full((len(x), len(report)), 2)):
        assert torch.equal(model(x), original)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", FAMILIES)
def test_at_random_levels_it_is_the_masked_model(name, shares):
    original, sizes = foreign(name), SHARES[shares]
    model, x = copy.deepcopy(original), images(name)
    report = convert(model, sizes, example=x[:1])
    chosen = random_levels(len(x), report.lowest, len(sizes))
    blocks = [block.name for block in report]
    wanted = exact(original, name, blocks, x, chosen, sizes)
    with torch.no_grad():
        with masked(original, name, blocks, chosen, sizes):
            peer = original(x)
        with levels(model, chosen):
            got = model(x)
        assert (got - original(x)).abs().max() > 1e-3  # the levels had an effect
    assert_as_accurate(got, peer, wanted, wanted.abs().amax().expand_as(wanted), factor=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_at_random_levels_its_gradients_are_those_of_the_masked_model(name):
    """With running statistics, float64; statistics of the batch are tested with the norm."""
    original = foreign(name).double()
    model, x = copy.deepcopy(original), images(name).double()
    report = convert(model, 2, example=x[:1])
    chosen = random_levels(len(x), report.lowest, 2)
    with masked(original, name, [block.name for block in report], chosen, (1, 1)):
        original(x).square().sum().backward()
    with levels(model, chosen):
        model(x).square().sum().backward()
    for (key, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        wanted = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max() + 1), msg=key)
