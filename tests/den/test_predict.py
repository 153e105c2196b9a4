"""A trained run at work: den.load, den predict; runs that start from another's network."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

import den
from den import cli
from den.data import load_set
from den.recipes.den import train
from den.runs.trained import open_run
from den.train.checkpoint import load_checkpoint, save_checkpoint
from tests.small_runs import cut_sets, small_config


@pytest.fixture
def pictures(tmp_path):
    """Four test images of digits as files in a folder, and a file that is no picture."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for k, image in enumerate(load_set("digits", "test").images[:4]):
        Image.fromarray(image[0].numpy()).save(folder / "deep" / f"{k}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture
def run(tmp_path, stored_run):
    """A run whose checkpoint knows its images, as training writes it."""
    stored_run(tmp_path / "run")
    path = tmp_path / "run" / "last.safetensors"
    tensors, record = load_checkpoint(path)
    kept = dataclasses.asdict(load_set("digits", "train").kept)
    save_checkpoint(path, tensors, {**record, "data": {"digits": kept}})
    return tmp_path / "run"


def test_predictions_are_those_of_the_network_on_the_same_pixels(run, pictures):
    network = den.load(run)
    found = network.predict(sorted(pictures.glob("deep/*.png")), top=3)
    opened, digits = open_run(run), load_set("digits", "test")
    with torch.inference_mode():
        logits, levels = opened.model(digits.inputs(slice(0, 4)), "digits", return_levels=True)
    chance = logits.softmax(-1)
    assert [each.label for each in found] == [str(k) for k in logits.argmax(1).tolist()]
    assert [each.confidence for each in found] == pytest.approx(chance.amax(1).tolist(), abs=1e-4)
    assert [each.levels for each in found] == [tuple(row) for row in levels.tolist()]
    assert [each.flops for each in found] == den.count_flops(opened.model, levels).tolist()
    assert [len(each.top) for each in found] == [3] * 4
    assert network.classes("digits") == tuple("0123456789")


def test_pictures_of_pillow_and_older_runs_that_keep_nothing(tmp_path, stored_run, pictures):
    stored_run(tmp_path / "old")
    network = den.load(tmp_path / "old")
    (found,) = network.predict(Image.open(pictures / "deep" / "0.png"))
    assert (found.image, found.task) == ("0", "digits")
    with pytest.raises(ValueError, match="task must be one of digits, got 'cats'"):
        network.predict(pictures / "deep" / "0.png", "cats")


def test_the_command_writes_a_table_lines_and_drawings(run, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["predict", str(run), str(pictures), "--json", str(out / "found.jsonl"), "--pictures", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("|") and ".png" in line]
    lines = [json.loads(line) for line in (out / "found.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == len(list(out.glob("*.png"))) == 4
    assert lines[0]["label"] in rows[0]
    assert "broken.png cannot be read and is left out" in printed.err
    assert "left out 1 of 5 pictures" in printed.err


def test_lines_alone_go_to_stdout(run, pictures, capsys):
    assert cli.main(["predict", str(run), str(pictures / "deep" / "1.png"), "--json", "-"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["task"] == "digits"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["{tmp}/absent.png"], "absent.png, which is not there"),
        (["{tmp}/pictures/broken.png"], "must hold a picture that can be read, got 1 that cannot"),
        (["{tmp}/run"], "without a picture"),
    ],
)
def test_wrong_pictures_are_told_in_one_line(run, pictures, tmp_path, capsys, images, message):
    assert cli.main(["predict", str(run), *(each.format(tmp=tmp_path) for each in images)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cut_sets(patch)
        folder = tmp_path_factory.mktemp("start") / "run"
        train(small_config(folder, "den"))
    return folder


@pytest.mark.parametrize(("only", "other"), [("selector", "estimator"), ("estimator", "selector")])
def test_one_of_the_two_networks_is_trained_from_a_runs(trained, tmp_path, monkeypatch, only, other):
    cut_sets(monkeypatch)
    config = small_config(tmp_path / "new", "den", start=trained, seed=3, **{f"{only}_only": True})
    train(config)
    before, after = (load_checkpoint(folder / "last.safetensors")[0] for folder in (trained, config.out))
    parts = {name: {n for n in before if n.startswith(f"model.{name}")} for name in ("selector", "estimator")}
    assert all(torch.equal(before[name], after[name]) for name in parts[other])
    assert any(not torch.equal(before[name], after[name]) for name in parts[only])
    record = load_checkpoint(config.out / "last.safetensors")[1]
    assert record["data"]["digits"]["class_names"] == list("0123456789")


def test_the_settings_begin_with_those_of_the_run_to_start_from(trained, tmp_path, monkeypatch):
    from den.commands import parse

    options = ["--start", str(trained), "--selector-only", "--out", str(tmp_path), "--seed", "5"]
    settings = parse(["train", *options]).settings
    assert (settings.network.backbone, settings.data.tasks, settings.seed) == ("wrn8_1", ("fashion", "digits"), 5)
    assert (settings.start, settings.selector_only, settings.out) == (trained, True, tmp_path)


@pytest.mark.parametrize("changes", [{"selector_only": True}, {"start": "x", "selector_only": True, "mode": "dense"}])
def test_one_network_alone_needs_a_run_to_start_from(tmp_path, changes):
    with pytest.raises(ValueError, match="selector_only must come with the run to start from"):
        small_config(tmp_path, changes.pop("mode", "den"), **changes)
