"""Choices that have learnt nothing, against which a network that chooses is held.

Structures of an untrained selector differ between images too, since its random features do; and structures that were
chosen well are worth less to another image than to the one that they were chosen for.
"""

import torch
from torch import Tensor, nn

from den.data import ImageSet
from den.evaluate.accuracy import BATCH, TaskReport, evaluate, task_report
from den.nn.model import DeepElasticNetwork
from den.nn.selector import Selector
from den.support.randomness import seeded


@torch.no_grad()
def untrained_report(model: DeepElasticNetwork, image_set: ImageSet, seed: int) -> TaskReport:
    """The report of a selector of the network's kind before any training; accuracy and loss are NaN.

    Its batch norms have the statistics of these images, as the first updates of a training would give them.
    """
    device = next(model.parameters()).device
    selector = untrained_selector(model, seed).to(device)
    parts = [slice(start, start + BATCH) for start in range(0, len(image_set), BATCH)]
    name, logits = image_set.name, []
    for part in parts:
        model.choose(selector.train(), image_set.inputs(part).to(device), name)
    selector.eval()
    for part in parts:
        logits.append(model.choose(selector, image_set.inputs(part).to(device), name).cpu())
    chance = torch.cat(logits).log_softmax(-1)
    return task_report(model, image_set, chance.argmax(-1), chance, float("nan"), float("nan"))


def untrained_selector(model: DeepElasticNetwork, seed: int) -> Selector:
    """A selector as the network's was before training, its weights drawn with `seed`, on the CPU.

    Its batch norms average over all batches that they see while training.
    """
    with seeded(seed):
        selector = model.new_selector()
    for norm in selector.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None
    return selector


def shuffled_accuracy(model: DeepElasticNetwork, image_set: ImageSet, levels: Tensor, seed: int) -> float:
    """Accuracy where every image runs at the structure that was chosen for another one of the set.

    levels: int64 [images, N], the chosen ones. Cost and variety are those of the choice; what it knew of each image is
    gone.
    """
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))
    given, device = iter(levels[order].split(BATCH)), next(model.parameters()).device
    return evaluate(model, [image_set], lambda *_: next(given).to(device))[image_set.name].accuracy
