"""Engines in folders: model.safetensors, config.json and a model card; nothing in them is code."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import den_kernels
from den.data.images import Kept
from den.inference.points import Point
from den.nn.attached import ImageSelector
from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.support.settings import from_dict, to_dict

if TYPE_CHECKING:
    from den.inference.engine import Engine

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1
_SETTINGS = ("num_classes", "in_chans", "in_channels", "in_size", "img_size")
_POINT = ("structure", "shift")
IMAGES = "images"  # the name of what a converted model does, which has no tasks


def _torchvision(name: str, **settings: Any) -> nn.Module:
    return import_module("torchvision.models").get_model(name, weights=None, **settings)


def _timm(name: str, **settings: Any) -> nn.Module:
    return import_module("timm").create_model(name, pretrained=False, **settings)


def _pytorchcv(name: str, **settings: Any) -> nn.Module:
    return import_module("pytorchcv.model_provider").get_model(name, pretrained=False, **settings)


PACKAGES: dict[str, Callable[..., nn.Module]] = {"torchvision": _torchvision, "timm": _timm, "pytorchcv": _pytorchcv}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The model of an architecture, new: {"name": "torchvision/resnet18", "num_classes": 10}.

    Raises ValueError for a package that is none of `PACKAGES`, or is not installed, and for other settings.
    """
    settings = dict(architecture)
    package, _, name = str(settings.pop("name", "")).partition("/")
    if package not in PACKAGES or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"from_pretrained: architecture must be NAME of a model of {', '.join(PACKAGES)}, such as "
            f"torchvision/resnet18, got {architecture.get('name')!r}"
        )
    if unknown := set(settings) - set(_SETTINGS):
        raise ValueError(
            f"from_pretrained: settings of an architecture must be among {', '.join(_SETTINGS)}, got "
            f"{', '.join(sorted(unknown))}"
        )
    try:
        return PACKAGES[package](name, **settings)
    except (ImportError, RuntimeError) as why:  # RuntimeError: a package of another torch
        raise ValueError(f"from_pretrained: {package} must be installed for {architecture['name']}, got {why}") from why


def save(engine: Engine, folder: str | Path, architecture: str | Mapping[str, Any] | None, images: Any) -> Path:
    """Write an engine to a folder: see `Engine.save_pretrained`."""
    folder, model = Path(folder), engine.model
    if architecture is not None:
        architecture = {"name": architecture} if isinstance(architecture, str) else dict(architecture)
        build(architecture)  # what cannot be made again is told now
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for name in _POINT:
        if (value := getattr(engine.point, name)) is not None:
            tensors[f"point.{name}"] = value
    record = {
        "format": FORMAT,
        "library": "den",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "max_batch": engine.max_batch,
        "kept": {name: to_dict(kept) for name, kept in engine.kept.items()},
        **_kind(engine, architecture),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(engine, record, images), encoding="utf-8")
    return folder


def _kind(engine: Engine, architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    model = engine.model
    if isinstance(model, DeepElasticNetwork):
        return {"kind": "deep elastic network", "model": model.config.to_dict()}
    report = den_kernels.report_of(model)
    found: dict[str, Any] = {
        "kind": "converted",
        "architecture": architecture,
        "shares": list(report.shares),
        "blocks": [block.name for block in report],
        "example": engine.example,
        "recalibrated": any(key.endswith("level_mean") for key in model.state_dict()),
    }
    if isinstance(model, den_kernels.ElasticModel):
        if not isinstance(model.selector, ImageSelector):
            raise ValueError(
                "save_pretrained: the selector must be one of den.attach_selector, which can be made again, got "
                f"{type(model.selector).__name__}"
            )
        own = model.selector
        found["selector"] = {
            "channels": list(own.config.channels),
            "image_channels": own.image_channels,
            "size": own.size,
        }
    return found


def checked_kept(kept: Kept | Mapping[str, Kept], tasks: tuple[str, ...]) -> dict[str, Kept]:
    """Facts of the pictures of each task, of a converted model under `IMAGES`; ValueError for what is none."""
    given = {IMAGES: kept} if isinstance(kept, Kept) else dict(kept)
    known = tasks or (IMAGES,)
    if unknown := set(given) - set(known):
        raise ValueError(f"Engine: kept must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    for name, own in given.items():
        if not isinstance(own, Kept) or len(own.mean) != len(own.std) or 0 in own.std:
            raise ValueError(f"Engine: kept must hold a den.data.images.Kept of mean and std for {name}, got {own!r}")
    return given


def load(folder: str | Path, model: nn.Module | None) -> tuple[nn.Module, Point, dict[str, Kept], dict[str, Any]]:
    """The model, the rule for levels, facts of the pictures, and the settings of the engine that a folder holds: see
    `from_pretrained`."""
    folder = Path(folder)
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as why:
        raise ValueError(f"from_pretrained: {folder} must hold {CONFIG} and {WEIGHTS}, got: {why}") from why
    if not isinstance(record, dict) or record.get("library") != "den" or record.get("format") != FORMAT:
        raise ValueError(f"from_pretrained: {folder / CONFIG} must be of an engine, of format {FORMAT}")
    try:
        made = _made(record, model)
        state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        made.load_state_dict(state)
        point = Point(**{name: tensors.get(f"point.{name}") for name in _POINT})
        kept = {name: from_dict(Kept, own, "kept") for name, own in record.get("kept", {}).items()}
        options = {"dtype": getattr(torch, record["dtype"]), "max_batch": record["max_batch"]}
    except (KeyError, TypeError, RuntimeError, AttributeError) as why:
        raise ValueError(f"from_pretrained: {folder} must hold a whole engine, got: {why}") from why
    return made.eval(), point, kept, options | {"example": _example(record)}


def _made(record: dict[str, Any], model: nn.Module | None) -> nn.Module:
    if record["kind"] == "deep elastic network":
        return DeepElasticNetwork(ModelConfig.from_dict(record["model"]))
    if model is None:
        if record["architecture"] is None:
            raise ValueError("from_pretrained: model must be given, as the engine was saved without an architecture")
        model = build(record["architecture"])
    report = den_kernels.convert(model.eval(), record["shares"], blocks=record["blocks"], example=_example(record))
    if (selector := record.get("selector")) is None:
        return model
    return den_kernels.ElasticModel(model, ImageSelector(**selector, lowest=report.lowest, levels=report.groups + 1))


def _example(record: dict[str, Any]) -> Tensor | None:
    shape = record.get("example")
    return None if shape is None else torch.zeros(shape)


def _card(engine: Engine, record: dict[str, Any], images: Any) -> str:
    name = record.get("architecture") or {"name": record["kind"]}
    lines = [
        "---",
        "library_name: den",
        "tags: [dynamic-neural-network, conditional-computation]",
        "---",
        "",
        f"# {name['name']}",
        "",
        f"A network whose {len(engine.blocks)} blocks run at {engine.network.levels} levels, for each image its own.",
        "",
        "```python",
        "import den",
        "",
        'engine = den.Engine.from_pretrained("FOLDER")',
        "```",
        "",
        f"The full structure takes {engine.network.full_flops / 1e6:.1f} million FLOPs an image.",
    ]
    measured = images if isinstance(images, Mapping) else {} if images is None else {None: images}
    for task, own in measured.items():
        shown = engine.profile(own, task)
        where = f"{task or 'Images'}, {shown.images} at once, on {engine.device}, {torch.get_num_threads()} threads"
        lines += ["", f"## {where}", "", str(shown)]
    return "\n".join(lines) + "\n"


def downloaded(name: str) -> Path:
    """The folder of a name on the Hugging Face hub. ValueError where huggingface_hub is not installed."""
    return Path(_hub(f"{name!r} is no folder, and").snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG, CARD]))


def push(engine: Engine, name: str, architecture: Any, images: Any, **options: Any) -> str:
    """Save an engine and upload it to the Hugging Face hub; its address."""
    api = _hub("to push,").HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save(engine, folder, architecture, images)
        api.create_repo(name, exist_ok=True, **options)
        return str(api.upload_folder(repo_id=name, folder_path=folder))


def _hub(why: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ValueError(f"Engine: {why} huggingface_hub must be installed (pip install 'den-kernels[hub]')") from error
