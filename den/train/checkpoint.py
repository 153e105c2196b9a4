"""Checkpoints: one safetensors file each, with a JSON record in its header, replaced as a whole or not at all."""

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from den.nn.model import DeepElasticNetwork
from den.nn.model_config import ModelConfig
from den.support.files import write_whole

FORMAT = "den-checkpoint-1"
DAMAGE = (
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ValueError,
    RuntimeError,
    OverflowError,
    MemoryError,
)  # fmt: skip  (RecursionError is a RuntimeError)


def save_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors of any shapes and a JSON-able record to `path`, whole or not at all (`write_whole`).

    Raises ValueError where `path` cannot be written.
    """
    kept = {name for name, t in tensors.items() if _is_channels_last(t)}
    metadata = {"format": FORMAT, "record": json.dumps(record), "channels_last": json.dumps(sorted(kept))}
    content = safetensors.torch.save({name: t.detach().contiguous() for name, t in tensors.items()}, metadata)
    try:
        write_whole(path, content)
    except OSError as error:
        raise ValueError(f"save_checkpoint: {path} must be writable (the old one is intact), got {error}") from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (in the memory format that they had) and record; ValueError when `path` is no complete checkpoint.

    A key that the record should have and has not is a ValueError too, which names the file.
    """
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name in json.loads(metadata["channels_last"]):
            tensors[name] = tensors[name].to(memory_format=torch.channels_last)
        return tensors, _record(path, metadata)


def read_record(path: Path) -> dict[str, Any]:
    """The record alone, without reading the tensors; ValueError as `load_checkpoint`."""
    with _opened(path) as (_, metadata):
        return _record(path, metadata)


def read_updates(path: Path) -> int:
    """Updates that the network of a checkpoint has seen; ValueError as `load_checkpoint`."""
    with reading(path):
        updates = read_record(path)["position"]["total_steps"]
        if type(updates) is not int:
            raise TypeError(f"a position of {updates!r} updates")
    return updates


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context that turns errors while something is rebuilt from a checkpoint into a ValueError that names its file."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and str(path) in reason:
            raise
        reason = f"one without {reason}" if isinstance(error, KeyError) else reason
        raise ValueError(f"load_checkpoint: {path} must be a complete checkpoint that fits, got {reason}") from error


class Record(dict[str, Any]):
    """An object of a checkpoint's record, whose missing keys are ValueErrors that name the file."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"load_checkpoint: {self._path} must be a complete checkpoint, got one without {key!r}")


def _record(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    record = json.loads(metadata["record"], object_hook=lambda values: Record(path, values))
    if not isinstance(record, Record):
        raise TypeError(f"a record that is no object but {str(record)[:30]}")
    return record


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A checkpoint's file and its header."""
    with reading(path):
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
    with reading(path):
        model = DeepElasticNetwork(ModelConfig.from_dict(record["model"]))
    load_weights(model, tensors, path)
    return model.eval()


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the weights of a checkpoint into `model`; ValueError where their names or shapes are another network's."""
    try:
        model.load_state_dict(unprefixed("model", tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"load_checkpoint: {path} must hold the weights of this network, got {reason}") from error


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "{parameter index}.{name}"; SGD and Adam keep nothing but tensors."""
    state = optimiser.state_dict()["state"]
    return {f"{i}.{name}": t for i, entry in state.items() for name, t in entry.items() if isinstance(t, Tensor)}


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], expected: Collection[str] = ()
) -> None:
    """Load the state that `optimiser_tensors` returned; each tensor has its parameter's shape, or is a scalar [].

    expected: names of the tensors that were saved.  ValueError that names those which are missing: of `expected`, and
    of what the optimiser keeps for every parameter that it has updated.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    kept = {name for entry in state.values() for name in entry}
    if missing := sorted(({*expected} | {f"{i}.{name}" for i in state for name in kept}) - tensors.keys()):
        raise ValueError(f"restore_optimiser: tensors must hold all that were saved, got none of {', '.join(missing)}")
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # of any shapes
    """The tensors by names that begin with "{prefix}."."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors (of any shapes) whose names begin with "{prefix}.", by the rest of their names."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def _is_channels_last(tensor: Tensor) -> bool:  # of any shape
    return (
        tensor.ndim == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )  # fmt: skip
