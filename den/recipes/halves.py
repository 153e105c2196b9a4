"""Batches of one half of the training images, of the other, or of all of them."""

from __future__ import annotations

from typing import Any

from den.data import Batch, ImageSet, MixedTaskBatches
from den.data.images import stratified_split
from den.train.config import DataConfig


class HalvedBatches:
    """Stands in for `MixedTaskBatches`: three of them, one of which is in use; all are in `state_dict`.

    The streams are "estimator" and "selector", a half of every set each, and "all".
    """

    def __init__(self, sets: list[ImageSet], data: DataConfig, seed: int) -> None:
        halves = [stratified_split(image_set.labels, 0.5, seed) for image_set in sets]
        parts = {"all": sets}
        for i, name in enumerate(("estimator", "selector")):
            parts[name] = [s.subset(half[i]) for s, half in zip(sets, halves, strict=True)]
        shares = data.shares or None
        self.streams = {n: MixedTaskBatches(part, data.batch_size, shares, seed) for n, part in parts.items()}
        self.sets = self.streams["all"].sets
        self.used = "all"

    @property
    def epoch_steps(self) -> int:
        return self.streams[self.used].epoch_steps

    def use(self, stream: str) -> None:
        """Take the batches from `stream` from now on."""
        self.used = stream

    def next(self) -> Batch:
        return self.streams[self.used].next()

    def state_dict(self) -> dict[str, Any]:
        """As that of `MixedTaskBatches`, with the name of the stream before every key but "cursors"."""
        states = {name: stream.state_dict() for name, stream in self.streams.items()}
        tensors = {f"{n}.{k}": v for n, state in states.items() for k, v in state.items() if k != "cursors"}
        return {**tensors, "cursors": {name: state["cursors"] for name, state in states.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, stream in self.streams.items():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            stream.load_state_dict({**own, "cursors": state["cursors"][name]})
