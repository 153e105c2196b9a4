"""A network, a batch, and what an objective reads of an engine, for updates that are computed by hand."""

import torch

from den.data import Batch
from den.nn.model import create_model
from den.nn.tasks import Task

TASKS = [Task("a", 3, 8, 1), Task("b", 4, 12)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model_and_batch(tasks=TASKS, sizes=(3, 2)):
    torch.manual_seed(0)
    model = create_model("wrn8_1", tasks, trunk_size=8)
    images = [torch.randn(n, t.channels, t.size, t.size) for t, n in zip(tasks, sizes, strict=True)]
    labels = [torch.randint(t.classes, (n,)) for t, n in zip(tasks, sizes, strict=True)]
    return model, Batch(tuple(t.name for t in tasks), images, labels)


class Bench:
    """What an objective reads of an engine."""

    device, progress = torch.device("cpu"), 0.5

    def __init__(self):
        self.generator = generator()
