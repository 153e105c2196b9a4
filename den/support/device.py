"""Devices: chosen by name, described in words, sent to and waited for."""

import torch
from torch import Tensor

CPU = torch.device("cpu")


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one, else the CPU.

    Raises ValueError for a name that torch does not know and for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"config: device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"config: device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"config: device must be there, got {name!r} with {torch.cuda.device_count()} GPUs")
    return device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of any shape to a device; the host does not wait for the work that a GPU has queued."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def machine_name(device: torch.device) -> str:
    """Describe a device in words: the GPU's name, or the CPU and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, threads: {torch.get_num_threads()}"


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its queued work, as before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
