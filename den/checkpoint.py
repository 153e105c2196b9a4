"""Checkpoints: one safetensors file each, with a JSON record in its header, replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from den.model import DeepElasticNetwork
from den.model_config import ModelConfig

FORMAT = "den-checkpoint-1"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a JSON-able record to `path`.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed, so that `path` holds
    the previous checkpoint or the new one and never a part.  Raises ValueError when it cannot be written.
    """
    kept = {name for name, t in tensors.items() if _is_channels_last(t)}
    metadata = {"format": FORMAT, "record": json.dumps(record), "channels_last": json.dumps(sorted(kept))}
    content = safetensors.torch.save({name: t.detach().contiguous() for name, t in tensors.items()}, metadata)
    temporary = path.with_name(path.name + ".partial")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"save_checkpoint: {path} must be writable (the old one is intact), got {error}") from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (in the memory format that they had) and record; ValueError when `path` is no complete checkpoint."""
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in json.loads(metadata["channels_last"]):
        tensors[name] = tensors[name].to(memory_format=torch.channels_last)
    return tensors, json.loads(metadata["record"])


def read_record(path: Path) -> dict[str, Any]:
    """The record alone, without reading the tensors; ValueError as `load_checkpoint`."""
    with _opened(path) as (_, metadata):
        return json.loads(metadata["record"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A checkpoint's file and its header."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format", "another program's safetensors file")
                raise ValueError(f"load_checkpoint: {path} must be a checkpoint of this library, got {found}")
            yield file, metadata
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"load_checkpoint: {path} must be a complete checkpoint, got {error}") from error


def load_model(path: Path) -> DeepElasticNetwork:
    """The network of a checkpoint, in evaluation mode."""
    tensors, record = load_checkpoint(path)
    model = DeepElasticNetwork(ModelConfig.from_dict(record["model"]))
    load_weights(model, tensors, path)
    return model.eval()


def load_weights(model: DeepElasticNetwork, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the weights of a checkpoint into `model`; ValueError when they are another network's."""
    try:
        model.load_state_dict(unprefixed("model", tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"load_checkpoint: {path} must hold the weights of this network, got {reason}") from error


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "{parameter index}.{name}"; SGD and Adam keep nothing but tensors."""
    state = optimiser.state_dict()["state"]
    return {f"{i}.{name}": t for i, entry in state.items() for name, t in entry.items() if isinstance(t, Tensor)}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with "{prefix}.", without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )  # fmt: skip
