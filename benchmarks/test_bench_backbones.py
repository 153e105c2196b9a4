"""Networks of the other block kinds end to end: bottlenecks, cardinality, pairs of convolutions."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from den.nn.plain import PlainNetwork
from den.nn.reference import reference_estimator

from . import engines
from .allocations import require
from .elastic_network import ElasticNetwork
from .harness import Case, Provider, Settings, expect, provide, run
from .parameters import everywhere, extra

FACTOR = 4.0
CASES = [
    Case("network", "resnet50_bottleneck", 16, "random-blocks", "float32"),
    Case("network", "resnext29_4x64d", 8, "random-blocks", "float32"),
    Case("network", "vgg16", 16, "random-blocks", "float32"),
]
REST = [
    Case("network", "resnext29_8x64d", 8, "random-blocks", "float32"),
    *[replace(case, dtype="bfloat16") for case in CASES],
]


def providers_of(network: ElasticNetwork, settings: Settings) -> list[Provider]:
    """Ours, the dense network with its batch norms folded, and every channel computed and masked, as authors do it.

    The dense one also on the inference engines of the settings.
    """
    images, task = network.images, network.task

    def masked(network: ElasticNetwork) -> Tensor:
        network.select()
        return reference_estimator(network.model.estimator, [network.images], [0], network.levels)[0]

    def dense(dtype: torch.dtype) -> Tensor:
        model = copy.deepcopy(network.model).to(dtype)
        return PlainNetwork(model, task.name)(network.images.to(dtype))

    def chosen(dtype: torch.dtype) -> Tensor:
        return masked(replace(network, model=copy.deepcopy(network.model).to(dtype), images=network.images.to(dtype)))

    plain, frozen = PlainNetwork(network.model, task.name), copy.deepcopy(network.model).freeze()
    calls = {
        "ours": replace(network, model=frozen).forward,
        "dense-folded": lambda: plain(images),
        "masked": lambda: masked(network),
    }
    whole = expect(dense, images.dtype, FACTOR)
    found = provide(calls, expect(chosen, images.dtype, FACTOR), whole)
    return [*found, *engines.providers(plain, images, whole, settings.engines)]


@pytest.mark.network
@pytest.mark.parametrize("case", [*everywhere(CASES), *extra(REST)])
def test_backbone(benchmark: Any, case: Case, settings: Settings) -> None:
    require(case.id, case.batch * 256 * 32 * 32)
    with torch.no_grad():
        network = ElasticNetwork.make(case)
        providers = providers_of(network, settings)
    run(benchmark, case, providers, network.work(), settings)
