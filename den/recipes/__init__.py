"""The methods that Deep Elastic Networks are compared with, on the same network, data, schedule and seeds.

    separate baselines  `--mode dense` with one task each
    random              the estimator with structures drawn at random for every image
    nestednet           one width for the whole network, by hand for each task (Kim et al., CVPR 2018)
    packnet             the same, trained width by width, what was trained before kept (after Mallya et al., CVPR 2018)
    routing             a table of policies for each task and block (Rosenbaum et al., ICLR 2018)
    cross-stitch        a thin copy for each task, mixed after each stage (Misra et al., CVPR 2016)
    blockdrop           a policy network that keeps or drops each block for every image (Wu et al., CVPR 2018)
    adashare            gates for each task and block (Sun et al., NeurIPS 2020)

All of them run on the estimator's blocks by levels, so that their time is measured on the same kernels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from den.data import ImageSet
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.nn.tasks import Task
from den.recipes.adashare import AdaShare
from den.recipes.base import ComparedMethod, Method
from den.recipes.blockdrop import BlockDrop
from den.recipes.cross_stitch import CrossStitch
from den.recipes.nestednet import NestedNet
from den.recipes.packnet import PackNet
from den.recipes.random_selector import RandomSelector
from den.recipes.routing import Routing
from den.recipes.setup import load_sets, network_settings, new_model
from den.train.checkpoint import load_checkpoint, load_weights, read_record, reading
from den.train.config import TrainConfig
from den.train.folder import stored_config

M = TypeVar("M", bound=Method)
METHODS: dict[str, type[ComparedMethod]] = {
    "random": RandomSelector,
    "nestednet": NestedNet,
    "packnet": PackNet,
    "routing": Routing,
    "cross-stitch": CrossStitch,
    "blockdrop": BlockDrop,
    "adashare": AdaShare,
}
RECIPES: dict[str, type[Method]] = {"den": Method, "dense": Method, **METHODS}
"""By the mode of the settings."""


def method_of(model: DeepElasticNetwork, config: TrainConfig) -> Method:
    """The method of a run, attached to its network; ValueError where the two do not fit."""
    return RECIPES[config.mode](model, config)


def prepare(config: TrainConfig, device: torch.device) -> Method:
    """The recipe of a run for an engine: its method, network, images and optimisers on a device."""
    return _prepared(RECIPES[config.mode], config, device)


def prepare_compared(config: TrainConfig, device: torch.device) -> ComparedMethod:
    """`prepare` for a compared method; KeyError for Deep Elastic Networks and their dense baseline."""
    return _prepared(METHODS[config.mode], config, device)


def _prepared(kind: type[M], config: TrainConfig, device: torch.device) -> M:
    sets, held_out = ([each.to(device) for each in part] for part in load_sets(config))
    model = new_model(network_settings(config), [each.task for each in sets], config.seed, config.joint).to(device)
    method = kind(model, config)
    method.train_on(sets, held_out)
    if config.estimator.teacher is not None:
        method.teacher = open_teacher(config.estimator.teacher, sets, model.tasks).to(device)
    return method


def open_teacher(folder: Path, sets: Sequence[ImageSet], tasks: tuple[Task, ...]) -> DeepElasticNetwork:
    """The network of a run, ready to teach one of `tasks` whose images are those of `sets`.

    Raises ValueError where there is no such run, and for one of other tasks, or whose images were normalised otherwise.
    """
    path = folder / "last.safetensors"
    network = load_method(path, stored_config(folder)).model
    if network.tasks != tasks:
        theirs, ours = (", ".join(map(str, each)) for each in (network.tasks, tasks))
        raise ValueError(f"train: estimator.teacher must be a run of {ours}, got {folder} of {theirs}")
    known = read_record(path).get("data", {})
    for image_set in sets:
        kept = known.get(image_set.name, {})
        for name in ("mean", "std"):
            if (theirs := kept.get(name)) is not None and tuple(theirs) != (ours := getattr(image_set.kept, name)):
                raise ValueError(
                    f"train: estimator.teacher must have learnt from {image_set.name} of {name} {ours}, got {folder} of"
                    f" {tuple(theirs)}"
                )
    return network.requires_grad_(False)


def load_method(path: Path, config: TrainConfig) -> Method:
    """The method of a run's checkpoint, with what it has learnt, its network in evaluation mode, on the CPU.

    Raises:
        ValueError: a checkpoint that is missing, damaged or of another method or network.
    """
    tensors, record = load_checkpoint(path)
    with reading(path):
        model = DeepElasticNetwork(ModelConfig.from_dict(record["model"]))
    method = method_of(model, config)
    load_weights(method.model, tensors, path)
    method.model.eval()
    return method
