"""Settings that every run has, whatever its recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from den.support.limits import SEED, Range


@dataclass(frozen=True)
class RunConfig:
    """Base of the settings of a run."""

    out: Path = Path("runs/den")
    """Run folder: settings, versions, metrics, TensorBoard events, checkpoints."""
    seed: Annotated[int, SEED] = 0
    """Seed of initial weights, shuffling, augmentation and sampling."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training computes in it where autocast does; weights stay float32."""
    accumulate: Annotated[int, Range(1)] = 1
    """Pieces in which a batch is computed, one after the other, before an update: less memory for the same batch.
    Batch norms see a piece at a time."""
    sharding: Literal["none", "zero2"] = "none"
    """What several processes share out (torchrun).  zero2: gradients and optimiser states, each kept by one of them."""
    epoch_steps: Annotated[int | None, Range(1)] = None
    """Updates between measurements and checkpoints; None: one pass over the largest training set."""
    progress: bool = True
    """Show a progress bar per phase."""
