"""The environment that torchrun, and launchers like it, give a process: the one place where variables are read."""

import os

TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def processes() -> int:
    """Number of processes that were started together, this one included; 1 where nothing is told."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shared() -> bool:
    """True where several processes were started together, and can find each other."""
    return all(name in os.environ for name in TOLD) and processes() > 1


def rank() -> int:
    """Number of this process among those started together, from 0."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0


def rank_here() -> int:
    """Number of this process among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes_here() -> int:
    """Number of processes that were started together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def run_id() -> str | None:
    """Name of the launch by torchrun, "none" where it was given none; None: not launched by it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarts() -> int:
    """Number of times that torchrun has started the processes anew, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
