"""Checkpoints of runs from which something is missing: continuing says so and names the file, in both engines."""

import pytest
import torch

from den.cli import main
from den.train.checkpoint import load_checkpoint, save_checkpoint
from tests.killed_run import KINDS, run

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")
TENSORS = {
    "den": ["generator", "torch", "batches.order.0", "batches.generator", "model.estimator.norm.weight"],
    "dag": ["torch", "batches.all.order.0", "batches.gates.generator", "model.gates.gamma"],
}
RECORD = {
    "den": ["model", "position", "position.step", "position.lowest_loss", "cursors", "baseline", "python", "numpy"],
    "dag": ["position", "position.reduced", "cursors", "numpy"],
}
PLACES = [("tensor", TENSORS), ("record", RECORD)]
MISSING = [(kind, place, name) for place, names in PLACES for kind in names for name in names[kind]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> folder and last checkpoint of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("den.train.engine.load_set", None)  # replaced by `run`, and put back afterwards
        patch.setattr("den.dag.engine.load_tasks", None)
        found = {}
        for kind in KINDS:
            folder = tmp_path_factory.mktemp("runs") / kind
            run(kind, folder)
            found[kind] = folder, load_checkpoint(folder / "last.safetensors")
        yield found


def resume(kind, folder):
    trains, config = KINDS[kind]
    return trains(config(folder), resume=True)


@pytest.mark.parametrize(("kind", "place", "name"), MISSING)
def test_what_is_missing_is_told_with_the_file(whole, kind, place, name):
    folder, (tensors, record) = whole[kind]
    last = folder / "last.safetensors"
    first, _, rest = name.partition(".")
    if place == "tensor":
        tensors = {key: t for key, t in tensors.items() if key != name}
    elif rest:
        record = {**record, first: {k: v for k, v in record[first].items() if k != rest}}
    else:
        record = {k: v for k, v in record.items() if k != first}
    save_checkpoint(last, tensors, record)
    before = (folder / "metrics.jsonl").read_bytes()
    if name == "model":  # continuing does not need it
        resume(kind, folder)
        return
    with pytest.raises(ValueError, match=rf"load_checkpoint: {last} must "):
        resume(kind, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / "den.lock").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"position": {"step": "x"}}, {"position": [1, 2]}, {"cursors": 3}, {"python": [3, [1], None]},
        {"numpy": ["MT19937", [1, 2], 3, 0, 0.0]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_damaged_is_told_with_the_file(whole, kind, change):
    folder, (tensors, record) = whole[kind]
    last = folder / "last.safetensors"
    if change == {"position": {"step": "x"}}:
        change = {"position": {**record["position"], "step": "x"}}
    save_checkpoint(last, tensors, {**record, **change})
    with pytest.raises(ValueError, match=rf"load_checkpoint: {last} must "):
        resume(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tensors_are_told_with_the_file(whole, kind):
    folder, (tensors, record) = whole[kind]
    last = folder / "last.safetensors"
    orders = [name for name in tensors if ".order.0" in name]
    optimiser = next(name for name in tensors if name.startswith("optimiser."))
    for damaged in (
        {orders[0]: torch.arange(3)},
        {"torch": torch.zeros(3)},
        {optimiser.replace(".0.", ".x."): torch.ones(1)},
    ):
        save_checkpoint(last, {**tensors, **damaged}, record)
        with pytest.raises(ValueError, match=rf"load_checkpoint: {last} must "):
            resume(kind, folder)
    save_checkpoint(last, tensors, record)
    resume(kind, folder)


def test_older_dag_checkpoints_without_generators_are_continued(whole):
    folder, (tensors, record) = whole["dag"]
    without = {k: v for k, v in record.items() if k not in ("python", "numpy")}
    save_checkpoint(folder / "last.safetensors", {k: t for k, t in tensors.items() if k != "torch"}, without)
    resume("dag", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_tells_in_one_line(whole, kind, capsys):
    folder, (tensors, record) = whole[kind]
    save_checkpoint(folder / "last.safetensors", tensors, {k: v for k, v in record.items() if k != "cursors"})
    command = ["train"] if kind == "den" else ["dag", "train"]
    assert main([*command, "--resume", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"den: error: load_checkpoint: {folder / 'last.safetensors'} must be")
    assert error.count("\n") == 1
