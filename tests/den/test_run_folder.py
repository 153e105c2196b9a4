"""Run folders: nobody's files are replaced, one process at a time, and what a crash leaves can be gone on with."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from den.dag.config import DagTrainConfig
from den.recipes import prepare
from den.recipes.den import train
from den.support.settings import read_config
from den.train.checkpoint import load_checkpoint
from den.train.engine import Engine
from den.train.folder import RunFolder, read_metrics, stored_config
from den.train.lock import NAME, RunLock
from tests.small_runs import cut_sets, small_config, train_interrupted


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    cut_sets(monkeypatch)


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path / "run", "dense")


@pytest.fixture
def interrupted(config, monkeypatch):
    """The settings of a run that was broken off after its first epoch."""
    train_interrupted(config, monkeypatch, 4)
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "versions.json", "metrics.jsonl", "events/events.out.tfevents.1", "last.safetensors",
        "best.safetensors", "searched.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["den", "dag"])
def test_a_new_run_replaces_nothing(config, kind, name):
    file = config.out / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    (config.out / "notes.txt").write_text("mine")
    before = contents(config.out)
    with pytest.raises(ValueError, match=rf"out must be a folder without .*got {config.out} "):
        RunFolder(config if kind == "den" else DagTrainConfig(out=config.out), resume=False)
    assert contents(config.out) == before


def test_a_folder_with_other_files_is_fine(config):
    config.out.mkdir()
    (config.out / "notes.txt").write_text("mine")
    train(config)
    assert (config.out / "notes.txt").read_text() == "mine"


def test_a_start_that_was_broken_off_before_its_first_checkpoint_may_be_repeated(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert (config.out / "config.json").exists()
    with pytest.raises(ValueError, match=r"must be a folder without config\.json, .*, metrics\.jsonl, which"):
        train(dataclasses.replace(config, seed=1))
    train(config)


def test_a_start_with_wrong_settings_leaves_no_folder(config):
    data = dataclasses.replace(config.data, batch_size=1)
    with pytest.raises(ValueError, match="batch_size must give every task an image"):
        train(dataclasses.replace(config, data=data))
    assert not config.out.exists()


@pytest.mark.parametrize("left", ["best.safetensors", "searched.safetensors"])
def test_other_checkpoints_are_pointed_at(interrupted, left):
    last, best = (interrupted.out / f"{name}.safetensors" for name in ("last", "best"))
    best.rename(interrupted.out / left)
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    said = rf"last\.safetensors must be a complete checkpoint, .* \({left} is whole, after 3 updates: .* copy that file"
    with pytest.raises(ValueError, match=said):
        train(interrupted, resume=True)
    last.unlink()
    for resume in (True, False):
        with pytest.raises(ValueError, match=rf"continue the run from {left}, copy that file to last\.safetensors"):
            train(interrupted, resume=resume)
    (interrupted.out / left).rename(last)
    train(interrupted, resume=True)
    assert [line["epoch"] for line in read_metrics(interrupted.out)] == [1, 2]


TORN = [
    b'{"epoch": 2, "st',
    b"\x00" * 50,
    b"\n\n\xff\xfe\n",
    b"[" * 100_000,
    b'"epoch"\n{"step": 3}\n',
    b'{"epoch": "2"}',
]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_torn_metrics_are_passed_over(interrupted, torn):
    metrics = interrupted.out / "metrics.jsonl"
    first = metrics.read_bytes()
    for content in (first + torn, torn + b"\n" + first, first.rstrip(b"\n")):
        metrics.write_bytes(content)
        assert [line["epoch"] for line in read_metrics(interrupted.out)] == [1]
    metrics.write_bytes(first + torn)
    train(interrupted, resume=True)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert metrics.read_bytes().startswith(first)


@pytest.mark.parametrize("gone", ["metrics.jsonl", "versions.json", "events"])
def test_files_that_are_not_needed_may_be_gone(interrupted, gone):
    path = interrupted.out / gone
    path.rename(path.with_name("moved"))
    train(interrupted, resume=True)
    assert path.exists()


def test_leftovers_of_a_killed_save_go(interrupted):
    for name in ("last", "best"):
        (interrupted.out / f"{name}.safetensors.partial").write_bytes(b"half")
    train(interrupted, resume=True)
    assert not list(interrupted.out.glob("*.partial"))


def test_a_continued_run_may_move_and_says_so_in_its_settings(interrupted, tmp_path):
    moved = interrupted.out.rename(tmp_path / "moved")
    data = dataclasses.replace(interrupted.data, root=tmp_path / "data")
    now = dataclasses.replace(interrupted, out=moved, data=data, device="cpu", progress=False)
    train(now, resume=True)
    assert stored_config(moved) == now
    for change in ({"seed": 1}, {"epoch_steps": 4}, {"data": dataclasses.replace(data, share=0.5)}):
        name = "data.share" if "data" in change else next(iter(change))
        with pytest.raises(ValueError, match=rf"train: {name} must stay .* to continue"):
            train(dataclasses.replace(now, **change), resume=True)
    assert stored_config(moved) == now


def test_settings_that_cannot_be_read_are_named(interrupted):
    (interrupted.out / "config.json").write_text('{"seed": 1')
    with pytest.raises(ValueError, match=r"config\.json must be a readable JSON file"):
        train(interrupted, resume=True)


def test_settings_are_written_whole(config, monkeypatch):
    """Cut off at any moment of writing, config.json is absent or complete."""
    with monkeypatch.context() as patch, RunFolder(config, resume=False) as folder:
        patch.setattr("den.support.files.os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            folder.begin()
    assert not config.out.exists()
    train(config)
    assert read_config(type(config), config.out / "config.json") == config


def kept(folder: Path) -> dict[str, bytes]:
    """All files but TensorBoard's, which a thread of the first run's writes when it finds the time."""
    return {name: content for name, content in contents(folder).items() if not name.startswith("events")}


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_same_folder_is_refused_untouched(config, resume):
    with Engine(config, prepare) as engine:
        engine.folder.log({"epoch": 1, "step": 3})
        before = kept(config.out)
        with pytest.raises(
            ValueError, match=rf"no other process trains in, got .*run, in use by process {os.getpid()} "
        ):
            train(config, resume=resume)
        assert kept(config.out) == before
        assert load_checkpoint(engine.folder.last)  # reading needs no lock
    train(config, resume=True)
    assert not (config.out / NAME).exists()


def test_a_run_that_cannot_start_gives_the_folder_back(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("den.recipes.new_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:  # keeps the frames alive
            train(config)
    train(config)
    assert caught


def test_the_lock_of_a_killed_process_is_none(tmp_path):
    program = "import sys, pathlib; from den.train.lock import RunLock; kept = RunLock(pathlib.Path(sys.argv[1])); "
    program += "print(1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on "):
            RunLock(tmp_path)
        holder.kill()
    assert (tmp_path / NAME).exists()
    RunLock(tmp_path).release()
    assert not (tmp_path / NAME).exists()


def test_a_lock_released_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
    """Between open and flock its holder removes the file: the lock must be on the file that has the name."""
    plain, calls = RunLock._is_current, []

    def removed_first(lock, file):
        if not calls:
            lock.path.unlink()
        calls.append(None)
        return plain(lock, file)

    monkeypatch.setattr(RunLock, "_is_current", removed_first)
    lock = RunLock(tmp_path)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="in use by"):
        RunLock(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("den.train.lock.fcntl.flock", none)
    with pytest.warns(UserWarning, match="cannot be locked"):
        RunLock(tmp_path).release()


@pytest.mark.parametrize("call", ["log", "rewind", "begin"])
def test_a_full_disk_is_told_in_one_line(config, monkeypatch, call):
    def full(_):
        raise OSError(28, "No space left on device")

    with RunFolder(config, resume=False) as folder:
        folder.begin()
        calls = {"log": lambda: folder.log({"epoch": 1}), "rewind": lambda: folder.rewind(1), "begin": folder.begin}
        with monkeypatch.context() as patch:
            patch.setattr("den.support.files.os.fsync", full)
            with pytest.raises(ValueError, match=rf"folder that can be written, got {config.out}: .*space"):
                calls[call]()
