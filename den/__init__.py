"""Deep Elastic Networks: one network for several tasks, as deep and as wide as each image needs."""

from den._moved import MOVED, install

TYPE_CHECKING = False
if TYPE_CHECKING:
    from den.inference.engine import Engine
    from den.nn.attached import attach_selector
    from den.nn.backbones import BACKBONES, Backbone, named_backbone, resnet, resnext, vgg, wide_resnet
    from den.nn.count import ImageFlops, ParameterCounts, count_flops, count_parameters, image_flops
    from den.nn.estimator import Estimator
    from den.nn.graphed import GraphedNetwork
    from den.nn.levels import level_fractions, level_groups, level_widths
    from den.nn.model import DeepElasticNetwork, create_model, for_export
    from den.nn.model_config import ModelConfig
    from den.nn.selector import Selector, SelectorConfig
    from den.nn.tasks import Task
    from den.recipes.converted import ElasticTraining, train_elastic
    from den.runs.predict import Prediction, Predictor, load
    from den.train.objective import parameter_fractions
    from den_kernels import __version__

# Imported when they are asked for, so that the command line is there before torch: see `den.cli`.
_HOMES = {
    "den.inference.engine": ("Engine",),
    "den.nn.attached": ("attach_selector",),
    "den.nn.backbones": ("BACKBONES", "Backbone", "named_backbone", "resnet", "resnext", "vgg", "wide_resnet"),
    "den.nn.count": ("ImageFlops", "ParameterCounts", "count_flops", "count_parameters", "image_flops"),
    "den.nn.estimator": ("Estimator",),
    "den.nn.graphed": ("GraphedNetwork",),
    "den.nn.levels": ("level_fractions", "level_groups", "level_widths"),
    "den.nn.model": ("DeepElasticNetwork", "create_model", "for_export"),
    "den.nn.model_config": ("ModelConfig",),
    "den.nn.selector": ("Selector", "SelectorConfig"),
    "den.nn.tasks": ("Task",),
    "den.runs.predict": ("Prediction", "Predictor", "load"),
    "den.recipes.converted": ("ElasticTraining", "train_elastic"),
    "den.train.objective": ("parameter_fractions",),
    "den_kernels": ("__version__",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BACKBONES",
    "Backbone",
    "DeepElasticNetwork",
    "ElasticTraining",
    "Engine",
    "Estimator",
    "GraphedNetwork",
    "ImageFlops",
    "ModelConfig",
    "ParameterCounts",
    "Prediction",
    "Predictor",
    "Selector",
    "SelectorConfig",
    "Task",
    "__version__",
    "attach_selector",
    "count_flops",
    "count_parameters",
    "create_model",
    "for_export",
    "image_flops",
    "level_fractions",
    "level_groups",
    "level_widths",
    "load",
    "named_backbone",
    "parameter_fractions",
    "resnet",
    "resnext",
    "train_elastic",
    "vgg",
    "wide_resnet",
]

install()


def __getattr__(name: str) -> object:
    from importlib import import_module

    if (module := f"den.{name}") in MOVED:
        return import_module(MOVED[module])
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
