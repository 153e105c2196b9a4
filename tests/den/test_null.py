"""What a selector is held against: one that was never trained, and structures given to other images."""

import pytest
import torch

from den import create_model
from den.data import load_set
from den.evaluate.accuracy import evaluate
from den.evaluate.null import shuffled_accuracy, untrained_report


@pytest.fixture(scope="module")
def images():
    return load_set("digits", "test").subset(torch.arange(90))


@pytest.fixture
def model(images):
    return create_model("wrn8_1", [images.task], trunk_size=8).eval()


def test_an_untrained_selector_is_of_the_networks_kind_and_of_the_seed(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, again, other = (untrained_report(model, images, seed) for seed in (0, 0, 1))
    assert torch.equal(one.levels, again.levels)
    assert not torch.equal(one.levels, other.levels)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_untrained_selector_varies_and_knows_nothing(model, images):
    report = untrained_report(model, images, 0)
    assert report.structures > 10  # so many "differ between images" without any training
    assert 0 <= report.mean_entropy - report.entropy < 0.02  # with heads that begin near zero


def test_structures_given_to_other_images_are_a_permutation(model, images, monkeypatch):
    torch.nn.init.normal_(model.selector.heads[0].weight)
    report = evaluate(model, [images])["digits"]
    seen = []
    plain = model.estimator.forward
    monkeypatch.setattr(
        model.estimator, "forward", lambda x, task, levels: seen.append(levels) or plain(x, task, levels)
    )
    accuracy = shuffled_accuracy(model, images, report.levels, seed=0)
    given = torch.cat(seen)
    assert 0 <= accuracy <= 1
    assert not torch.equal(given, report.levels)
    assert sorted(given.tolist()) == sorted(report.levels.tolist())
