"""Deep Elastic Networks: one network for several tasks, as deep and as wide as each image needs."""

from den.backbones import BACKBONES, Backbone, named_backbone, resnet, resnext, vgg, wide_resnet
from den.count import ImageFlops, ParameterCounts, count_flops, count_parameters, image_flops, parameter_fractions
from den.estimator import Estimator
from den.levels import level_fractions, level_groups, level_widths
from den.model import DeepElasticNetwork, create_model
from den.model_config import ModelConfig
from den.selector import Selector, SelectorConfig
from den.tasks import Task
from den_kernels import __version__

__all__ = [
    "BACKBONES",
    "Backbone",
    "DeepElasticNetwork",
    "Estimator",
    "ImageFlops",
    "ModelConfig",
    "ParameterCounts",
    "Selector",
    "SelectorConfig",
    "Task",
    "__version__",
    "count_flops",
    "count_parameters",
    "create_model",
    "image_flops",
    "level_fractions",
    "level_groups",
    "level_widths",
    "named_backbone",
    "parameter_fractions",
    "resnet",
    "resnext",
    "vgg",
    "wide_resnet",
]
