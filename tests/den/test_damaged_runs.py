"""Checkpoints of runs from which something is missing: continuing says so and names the file, in both engines."""

import pytest
import torch

from den.cli import main
from den.train.checkpoint import load_checkpoint, save_checkpoint
from den.train.engine import Engine
from tests.killed_run import KINDS, run

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")
TENSORS = {
    "den": ["generator", "torch", "batches.all.order.0", "batches.all.generator", "model.estimator.norm.weight"],
    "dag": ["torch", "batches.all.order.0", "batches.gates.generator", "model.gates.gamma"],
}
RECORD = {
    "den": [
        "model",
        "position",
        "position.step",
        "position.lowest_loss",
        "cursors",
        "optimisers",
        "baseline",
        "python",
        "numpy",
    ],
    "dag": ["position", "position.phase", "reduced", "cursors", "optimisers", "numpy"],
}  # fmt: skip
PLACES = [("tensor", TENSORS), ("record", RECORD)]
MISSING = [(kind, place, name) for place, names in PLACES for kind in names for name in names[kind]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> folder and last checkpoint of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("den.recipes.setup.load_set", None)  # replaced by `run`, and put back afterwards
        patch.setattr("den.recipes.dag.recipe.load_tasks", None)
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


@pytest.mark.parametrize("kind", KINDS)
def test_missing_tensors_of_an_optimiser_are_named(whole, kind):
    """Without them its momentum would begin anew."""
    folder, (tensors, record) = whole[kind]
    lost = next(name for name in tensors if name.startswith("optimiser.") and name.endswith("momentum_buffer"))
    others = {name: t for name, t in tensors.items() if name.startswith(lost.rpartition(".momentum")[0])}
    for gone in ({lost}, others):
        save_checkpoint(folder / "last.safetensors", {n: t for n, t in tensors.items() if n not in gone}, record)
        with pytest.raises(ValueError, match=rf"last.safetensors must .* got none of {lost.split('.', 2)[2]}"):
            resume(kind, folder)


def older(kind, tensors, record):
    """A checkpoint as versions without a layout's number wrote it."""
    position = {name: value for name, value in record["position"].items() if name != "updates"}
    new = ("layout", "optimisers", "reduced")
    kept = {name: value for name, value in record.items() if name not in new}
    if kind == "den":
        tensors = {name.replace("batches.all.", "batches."): tensor for name, tensor in tensors.items()}
        position["selector_steps"] = record["position"]["updates"].get("selector", 0)
        return tensors, {**kept, "position": position, "cursors": record["cursors"]["all"]}
    stage = {"stage": position["phase"], **{name: position[name] for name in ("step", "total_steps", "epoch")}}
    without = {name: tensor for name, tensor in tensors.items() if name != "generator"}
    return without, {**kept, "position": {**stage, "reduced": record["reduced"]}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3, 9])
def test_older_checkpoints_are_continued_to_the_same_end(whole, tmp_path, monkeypatch, kind, at):
    _, (tensors, record) = whole[kind]
    plain, updates = Engine.update, iter(range(100))

    def update(self, objective):
        if next(updates) == at:
            raise KeyboardInterrupt
        plain(self, objective)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", update)
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path / "run")
    last = tmp_path / "run" / "last.safetensors"
    save_checkpoint(last, *older(kind, *load_checkpoint(last)))
    resume(kind, tmp_path / "run")
    found, again = load_checkpoint(last)
    differing = {name for name, tensor in tensors.items() if not torch.equal(found[name], tensor)}
    assert differing <= ({"generator"} if kind == "dag" else set())  # a search draws nothing from it
    assert {**again["position"], "updates": None} == {**record["position"], "updates": None}


def test_the_oldest_searches_had_no_generators(whole):
    folder, (tensors, record) = whole["dag"]
    tensors, record = older("dag", tensors, record)
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
