"""den.load and den predict on folders of engines: their operating point, converted models, jobs in parts."""

import json

import pytest
import torch
from torch import nn

import den
import den_kernels
from den import cli
from den.data.decode import squared
from den.data.images import Kept
from den.inference.pretrained import PACKAGES
from den.runs.predict import network_inputs
from tests.served import TASKS, photographs, store_run
from tests.stand_ins import PlainBasicBlock

DIGITS = TASKS[1].name
KEPT = Kept((0.5, 0.4, 0.6), (0.2, 0.3, 0.2), tuple("abcdefg"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """An engine of a run at one structure, and the folder that it was saved in."""
    home = tmp_path_factory.mktemp("engines")
    engine = den.load(store_run(home / "run"), device="cpu").engine(device="cpu", levels=[1, 2, 1])
    return engine, engine.save_pretrained(home / "engine")


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """An engine of a converted model, and the folder that it was saved in."""

    def plain(name: str = "", **settings: int) -> nn.Module:
        torch.manual_seed(0)
        blocks = [PlainBasicBlock(16, 16), PlainBasicBlock(16, 16)]
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)]
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *blocks, *tail).eval()

    monkeypatch.setitem(PACKAGES, "timm", plain)
    model, example = plain(), torch.zeros(1, 3, 12, 12)
    den_kernels.convert(model, 2, example=example)
    engine = den.Engine(model, device="cpu", levels=[1, 2], example=example)
    return engine, engine.save_pretrained(tmp_path / "converted", architecture="timm/own", kept=KEPT)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "new").mkdir()
    for k, picture in enumerate(photographs(5)):
        picture.save(tmp_path / "new" / f"{k}.png")
    (tmp_path / "new" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "new"


def test_an_engine_predicts_at_its_operating_point(engines):
    engine, folder = engines
    network, given = den.load(folder, device="cpu"), photographs(3)
    assert network.tasks == tuple(task.name for task in TASKS)
    found = network.predict(given, top=2)
    assert [each.task for each in found] == [task.name for task in TASKS] * 3
    assert {each.levels for each in found} == {(1, 2, 1)}
    inputs = network.inputs(given, list("abc"), TASKS[1])
    logits = engine(inputs, DIGITS)
    alone = [each for each in found if each.task == DIGITS]
    assert [each.confidence for each in alone] == pytest.approx(logits.softmax(-1).amax(1).tolist(), abs=1e-5)
    costs = engine.network.costs.of(torch.tensor([[1, 2, 1]]))
    assert alone[0].flops_ratio == pytest.approx(float(costs), abs=1e-3)
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'cats'"):
        network.predict(given, "cats")


def test_a_converted_model_is_the_task_images(converted):
    engine, folder = converted
    network, given = den.load(folder, device="cpu"), photographs(2)
    assert (network.tasks, network.classes("images")) == (("images",), KEPT.class_names)
    found = network.predict(given)
    inputs = network_inputs([squared(each, 12) for each in given], network.task("images"), KEPT)
    best = engine(inputs).softmax(-1).max(1)
    assert [each.label for each in found] == [KEPT.class_names[k] for k in best.indices.tolist()]
    assert [each.confidence for each in found] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert (found[0].levels, 0 < found[0].flops_ratio < 1) == ((1, 2), True)


@pytest.mark.parametrize("kind", ["engines", "converted"])
def test_the_command_takes_the_folder_of_an_engine(kind, request, pictures, tmp_path, capsys):
    _, folder = request.getfixturevalue(kind)
    out, device = tmp_path / "out", ["--device", "cpu"]
    arguments = ["predict", str(folder), str(pictures), *device]
    assert cli.main([*arguments, "--json", str(out / "found.jsonl"), "--pictures", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "found.jsonl").read_text().splitlines()]
    tasks = len(den.load(folder, device="cpu").tasks)
    assert (len(lines), len(list(out.glob("*.png")))) == (5 * tasks, 5)
    assert "left out 1 of 6 pictures" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(tmp_path / "parts")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "parts" / "part-00000.jsonl").read_text().splitlines()]
    assert rows == lines
    capsys.readouterr()
    assert cli.main([*arguments, "--out", str(tmp_path / "parts")]) == 0
    assert "0 pictures now, 6 before" in capsys.readouterr().out


def test_parts_of_another_engine_are_refused(engines, pictures, tmp_path, capsys):
    engine, folder = engines
    other = den.Engine(engine.model, device="cpu", levels=[2, 2, 2])
    other.kept = engine.kept
    other.save_pretrained(tmp_path / "other")
    for each in (folder, tmp_path / "other"):
        for name in ("model.safetensors", "config.json", "README.md"):
            (tmp_path / "served").mkdir(exist_ok=True)
            (tmp_path / "served" / name).write_bytes((each / name).read_bytes())
        status = cli.main(["predict", str(tmp_path / "served"), str(pictures), "--out", str(tmp_path / "parts")])
        assert status == (0 if each is folder else 2)
    assert "of other weights" in capsys.readouterr().err


def test_an_engine_that_does_not_know_pictures_is_refused(engines, pictures, tmp_path, capsys):
    bare = den.Engine(engines[0].model, device="cpu").save_pretrained(tmp_path / "bare")
    assert cli.main(["predict", str(bare), str(pictures)]) == 2
    assert "config.json must say how pictures become images of digits, folder:pictures/pets" in capsys.readouterr().err
