"""Checkpoints: whole or not at all, and only our own."""

import json
import os

import pytest
import safetensors.torch
import torch

from den.nn.model import create_model
from den.nn.tasks import Task
from den.recipes.dag.recipe import load_network
from den.support.files import write_whole
from den.train.checkpoint import (
    load_checkpoint,
    load_model,
    optimiser_tensors,
    prefixed,
    read_record,
    read_updates,
    reading,
    restore_optimiser,
    save_checkpoint,
)


def small_model(backbone="wrn8_1"):
    return create_model(backbone, [Task("a", 3, 8, 1)], trunk_size=8)


def save_model(path, model):
    save_checkpoint(path, prefixed("model", model.state_dict()), {"model": model.config.to_dict()})


def test_tensors_return_as_they_were(tmp_path):
    tensors = {
        "channels_last": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "contiguous": torch.randn(4, 3, 3, 3),
        "number": torch.tensor(7.0),
        "state": torch.get_rng_state(),
        "none": torch.empty(0, dtype=torch.int64),
        "transposed": torch.randn(3, 5).t(),
    }
    record = {"position": {"step": 3}, "best": float("inf"), "names": ["a", None]}
    save_checkpoint(tmp_path / "c.safetensors", tensors, record)
    found, read = load_checkpoint(tmp_path / "c.safetensors")
    assert read == record
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert found["channels_last"].stride() == tensors["channels_last"].stride()


def test_model_of_a_checkpoint_gives_the_same_answers(tmp_path):
    model = small_model()
    images = torch.randn(5, 1, 8, 8)
    model(images, "a")  # training mode: moves the running statistics
    save_model(tmp_path / "m.safetensors", model)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m.safetensors")(images, "a"), model.eval()(images, "a"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "m.safetensors"
    save_model(path, small_model())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"m\.safetensors must be a complete checkpoint"):
        load_checkpoint(path)


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.safetensors must be a complete checkpoint"):
        load_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_checkpoint_is_refused(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match="must be a checkpoint of this library"):
        load_checkpoint(path)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    other = small_model("wrn8_2")
    save_checkpoint(path, prefixed("model", other.state_dict()), {"model": small_model().config.to_dict()})
    with pytest.raises(ValueError, match=r"must hold the weights of this network, got .*size mismatch"):
        load_model(path)


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, fails):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"x": torch.ones(3)}, {"epoch": 1})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    if fails == "rename":
        monkeypatch.setattr("den.support.files.os.replace", full_disk)
    else:
        monkeypatch.setattr("den.support.files.os.fsync", full_disk)  # after part of the bytes have been written
    with pytest.raises(ValueError, match=r"must be writable .the old one is intact., got .*No space left"):
        save_checkpoint(path, {"x": torch.zeros(300)}, {"epoch": 2})
    tensors, record = load_checkpoint(path)
    assert record == {"epoch": 1}
    assert torch.equal(tensors["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"x": torch.ones(3)}, {"epoch": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("den.support.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"x": torch.zeros(3)}, {"epoch": 2})
    assert load_checkpoint(path)[1] == {"epoch": 1}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_restored_optimiser_takes_the_same_steps(tmp_path, kind):
    def build(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        return torch.optim.Adam(parameters, lr=0.01)

    def step(parameters, optimiser, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(memory_format=memory_format(p))
        optimiser.step()

    def memory_format(p):
        return torch.channels_last if p.ndim == 4 else torch.contiguous_format

    weights = [torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last), torch.randn(5)]
    first = [torch.nn.Parameter(w.clone()) for w in weights]
    optimiser = build(first)
    for seed in range(3):
        step(first, optimiser, seed)
    save_checkpoint(tmp_path / "o.safetensors", optimiser_tensors(optimiser), {})

    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    restored = build(second)
    restore_optimiser(restored, load_checkpoint(tmp_path / "o.safetensors")[0])
    for seed in range(3, 6):
        step(first, optimiser, seed)
        step(second, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_record_is_plain_json_in_the_header_of_a_safetensors_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"x": torch.ones(2)}, {"epoch": 4})
    with safetensors.safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["record"]) == {"epoch": 4}
        assert file.get_tensor("x").tolist() == [1.0, 1.0]


GOOD = {"format": "den-checkpoint-1", "channels_last": "[]"}
METADATA = {
    "no record": lambda meta: meta.pop("record"),
    "no channels_last": lambda meta: meta.pop("channels_last"),
    "unknown name": lambda meta: meta.update(channels_last='["x"]'),
    "a vector": lambda meta: meta.update(channels_last='["model.estimator.norm.weight"]'),
    "a number": lambda meta: meta.update(channels_last="5"),
    "no JSON": lambda meta: meta.update(record="{"),
    "a list": lambda meta: meta.update(record="[]"),
    "null": lambda meta: meta.update(record="null"),
    "empty": lambda meta: meta.update(record="{}"),
    "deep": lambda meta: meta.update(record="[" * 100_000),
    "deep objects": lambda meta: meta.update(record='{"model":' * 50_000),
    "a huge number": lambda meta: meta.update(record='{"model": ' + "1" * 5000 + "}"),
    "a model of nothing": lambda meta: meta.update(record='{"model": {}}'),
    "a model that is a number": lambda meta: meta.update(record='{"model": 3}'),
    "tasks that are a number": lambda meta: meta.update(record='{"model": {"tasks": 3}}'),
    "a task without classes": lambda meta: meta.update(record='{"model": {"tasks": [{"name": "a"}]}}'),
    "levels that are text": lambda meta: meta.update(
        record='{"model": {"tasks": [{"name": "a", "classes": 3, "size": 8, "channels": 1}], "levels": "4"}}'
    ),
}


@pytest.mark.parametrize("damage", METADATA)
def test_damaged_headers_are_told_with_the_file(tmp_path, damage):
    path, model = tmp_path / "m.safetensors", small_model()
    tensors = {name: t.contiguous() for name, t in prefixed("model", model.state_dict()).items()}
    metadata = {**GOOD, "record": json.dumps({"model": model.config.to_dict()})}
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    load_model(path)
    METADATA[damage](metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(ValueError, match=rf"load_checkpoint: {path} must be a complete checkpoint"):
        load_model(path)


def test_of_a_long_reason_the_beginning_is_told(tmp_path):
    with pytest.raises(ValueError, match="must be a complete checkpoint") as told, reading(tmp_path / "m.safetensors"):
        raise TypeError("x" * 290 + "\n  " + "y" * 90)
    assert str(told.value).endswith("got " + "x" * 290 + " " + "y" * 9)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x00" * 100, b"\x05\0\0\0\0\0\0\0{{{{{", b"x"])
def test_what_is_no_checkpoint_at_all_is_told_with_the_file(tmp_path, content):
    (path := tmp_path / "m.safetensors").write_bytes(content)
    for read in (load_model, load_network, read_record, read_updates):
        with pytest.raises(ValueError, match=rf"load_checkpoint: {path} must be"):
            read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"load_checkpoint: {path} must be"):
        load_checkpoint(path)


@pytest.mark.parametrize("position", [None, 3, {}, {"total_steps": "4"}, {"total_steps": None}])
def test_updates_of_a_damaged_position_are_told_with_the_file(tmp_path, position):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {}, {} if position is None else {"position": position})
    with pytest.raises(ValueError, match=rf"load_checkpoint: {path} must be a complete checkpoint"):
        read_updates(path)
    save_checkpoint(path, {}, {"position": {"total_steps": 4}})
    assert read_updates(path) == 4


@pytest.mark.parametrize("record", [{"dag": 3}, {"dag": {}}, {"dag": {"tasks": [{"nme": "a"}]}}, {"dag": {"tasks": 3}}])
def test_damaged_networks_over_a_graph_are_told_with_the_file(tmp_path, record):
    save_checkpoint(path := tmp_path / "m.safetensors", {}, record)
    with pytest.raises(ValueError, match=rf"load_checkpoint: {path} must be a complete checkpoint that fits"):
        load_network(path)
    save_checkpoint(path, {}, {**record, "network": "Another"})
    with pytest.raises(ValueError, match=rf"load_checkpoint: {path} must be .* without 'Another'"):
        load_network(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, events = tmp_path / "f", []
    path.write_bytes(b"before")
    plain = {name: getattr(os, name) for name in ("fsync", "replace")}

    def seen(name):
        def call(*arguments):
            events.append((name, path.read_bytes()))
            return plain[name](*arguments)

        return call

    for name in plain:
        monkeypatch.setattr(f"den.support.files.os.{name}", seen(name))
    write_whole(path, b"after")
    assert events == [("fsync", b"before"), ("replace", b"before"), ("fsync", b"after")]  # the file, then its folder
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
