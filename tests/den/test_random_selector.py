"""Random structures: what they cost on average, and that they come from the seed."""

import pytest
import torch

from den.recipes import method_of
from den.recipes.random_selector import level_chances
from tests.small_methods import model_and_batch
from tests.small_runs import small_config


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4375, 0.8, 1.0])
def test_random_structures_cost_what_is_asked_for(share):
    flops = torch.tensor([[0, 25, 50, 100], [0, 50, 100, 200]], dtype=torch.float64)
    chances = level_chances(flops, share)
    assert chances.sum().item() == pytest.approx(1)
    assert (chances * torch.tensor([0, 0.25, 0.5, 1])).sum().item() == pytest.approx(share, abs=2e-3)
    if share == 0.4375:
        assert chances.tolist() == pytest.approx([0.25] * 4, abs=1e-6)


def test_random_structures_cheaper_than_the_lowest_level_are_refused():
    flops = torch.tensor([[50.0, 100.0]], dtype=torch.float64)
    assert level_chances(flops, None).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"random: methods\.random_flops must be in 0\.5\.\.1 here, got 0\.3"):
        level_chances(flops, 0.3)


def test_random_structures_come_from_the_seed(tmp_path):
    model, _ = model_and_batch()
    first, second, other = (method_of(model, small_config(tmp_path, "random", seed=seed)) for seed in (1, 1, 2))
    images = torch.zeros(50, 1, 8, 8)
    assert torch.equal(first.structures(images, "a"), second.structures(images, "a"))
    assert not torch.equal(first.structures(images, "a"), other.structures(images, "a"))
    assert len(first.structures(images, "a").unique(dim=0)) > 20
