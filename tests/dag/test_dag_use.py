"""den dag predict and den dag extract: a trained network on pictures, and the network of one task as a file."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from den.cli import main
from den.dag import DagConfig, DagNetwork, SubNetwork, reduce
from den.dag.extract import alone
from den.dag.peers import CrossStitchNetwork, SeparateNetworks
from den.data.inputs import Inputs, as_inputs
from den.nn.tasks import Task
from den.runs.dag import import_modules, open_run
from den.runs.dag_extract import export
from den.train.checkpoint import load_checkpoint, save_checkpoint
from tests.dag.test_dag_own_tasks import write_pictures, write_scenes

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little", "ignore:.*as if there were")
QUICK = (
    "--training.steps 3 --network.states 3 --network.flow 1 --network.channels 8 --reduction.norm-batches 1"
    " --no-progress"
)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A run on a folder of pictures, dark ones and light ones, and on digits."""
    root = tmp_path_factory.mktemp("pets")
    for split in ("train", "test"):
        write_pictures(root, "animals", split, ("cat", "dog", "owl"))
    words = f"dag train --data.tasks digits,folder:animals@12 --data.batch-size 24 {QUICK}"
    assert main([*words.split(), "--data.root", str(root), "--out", str(root / "run")]) == 0
    return root


def told(capsys, *words):
    assert main(["dag", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_pictures_get_the_classes_that_the_network_gives_them(pets, capsys):
    lines = told(capsys, "predict", pets / "run", pets / "animals" / "test" / "dog")
    assert len(lines) == 2 * 6
    run = open_run(pets / "run")
    files = sorted((pets / "animals" / "test" / "dog").iterdir())
    images = as_inputs(files, run.model.tasks[1], run.inputs["animals"])
    with torch.no_grad():
        shares, labels = run.model(images, "animals").softmax(1).max(1)
    wanted = [f"{path}: animals {('cat', 'dog', 'owl')[k]} ({p:.0%})" for path, k, p in zip(files, labels, shares)]  # noqa: B905
    assert [line for line in lines if ": animals " in line] == wanted
    assert told(capsys, "predict", pets / "run", files[0], "--task", "animals") == wanted[:1]


def test_pictures_become_images_as_the_sets_did(pets, tmp_path):
    path = tmp_path / "shade.png"
    Image.fromarray(np.full((5, 9, 3), (255, 0, 51), np.uint8)).save(path)
    colour = as_inputs([path], Task("x", 2, 4, 3), Inputs((0.5, 0.5, 0.0), (0.5, 0.25, 0.1)))
    assert colour.shape == (1, 3, 4, 4)
    torch.testing.assert_close(colour[0, :, 2, 2], torch.tensor([1.0, -2.0, 2.0]))
    paper = np.full((4, 4), 250, np.uint8)
    paper[0] = 0
    Image.fromarray(paper).save(path)
    ink = as_inputs([path], Task("x", 2, 4, 1), Inputs((0.0,), (1.0,), ink=True))
    torch.testing.assert_close(ink[0, 0, :2, 0], torch.tensor([1.0, 5 / 255]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/nothing.png"], "pictures must be files or folders, got"),
        (["{root}/animals/test", "--task", "animals"], "pictures must be at least one, got none in"),
        (["{root}/run/config.json"], "config.json must be a complete picture"),
        (["{root}/animals/test/dog", "--task", "cats"], "task must be one of 0 'digits', 1 'animals', got 'cats'"),
        (["{root}/animals/test/dog", "--modules", "no_such_module"], "modules must be importable, got no_such_module"),
    ],
)
def test_what_cannot_be_predicted_is_explained(pets, capsys, words, message):
    assert main(["dag", "predict", str(pets / "run"), *(word.format(root=pets) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_that_does_not_know_its_inputs_says_so(pets, tmp_path, capsys):
    for path in (pets / "run").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors, record = load_checkpoint(tmp_path / "last.safetensors")
    save_checkpoint(tmp_path / "last.safetensors", tensors, {k: v for k, v in record.items() if k != "inputs"})
    assert main(["dag", "predict", str(tmp_path), str(pets / "animals" / "test" / "dog")]) == 2
    assert "must say how pictures become images of digits" in capsys.readouterr().err


def test_maps_of_dense_tasks_are_written(tmp_path, capsys):
    write_scenes(tmp_path / "rooms")
    words = f"dag train --data.tasks folder:rooms --data.batch-size 2 {QUICK}"
    assert main([*words.split(), "--data.root", str(tmp_path), "--out", str(tmp_path / "run")]) == 0
    picture = tmp_path / "view.png"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(picture)
    assert main(["dag", "predict", str(tmp_path / "run"), str(picture)]) == 2
    assert "out must be a folder for the maps of segmentation, depth, got none" in capsys.readouterr().err
    told(capsys, "predict", tmp_path / "run", picture, "--out", tmp_path / "maps")
    labels, depth = (np.load(tmp_path / "maps" / f"view-{task}.npy") for task in ("segmentation", "depth"))
    assert (labels.shape, labels.dtype, depth.shape, depth.dtype) == ((16, 24), np.uint8, (16, 24), np.float32)
    assert labels.max() < 5


def networks():
    tasks = (Task("a", 3, 8, 1), Task("b", 4, 8, 1))
    dense = (Task("labels", 5, 16, 3, "segmentation", 24), Task("depth", 1, 16, 3, "depth", 24))
    yield "classes", DagConfig(tasks, states=5, flow=2, channels=8, trunk_size=4)
    yield "dense", DagConfig(dense, states=4, flow=2, channels=8, trunk_size=(4, 6), stages=(2, 2))


def reduced(config):
    torch.manual_seed(0)
    model = DagNetwork(config)
    for k in range(2):
        torch.nn.init.normal_(model.gates.gamma[k].data)
        model.keep(k, reduce(model.graph, model.gates.of_task(k), 0.5).kept)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return model.eval()


@pytest.mark.parametrize(("name", "config"), [*networks()], ids=[name for name, _ in networks()])
def test_an_extracted_file_computes_what_the_network_does_for_any_number_of_images(tmp_path, name, config):
    model, path = reduced(config), tmp_path / "one.pt2"
    task = config.tasks[1]
    export(alone(model, task.name), path)
    program = torch.export.load(path)
    assert not any("den" in str(node.target) for node in program.graph.nodes)
    for count in (1, 2, 5):
        x = torch.randn(count, *task.shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x, task.name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "config"), [*networks()], ids=[name for name, _ in networks()])
def test_an_extracted_network_runs_in_onnxruntime(tmp_path, name, config):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = reduced(config), tmp_path / "one.onnx"
    export(alone(model, 0), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x = torch.randn(count, *config.tasks[0].shape)
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model(x, 0), rtol=1e-4, atol=1e-4
            )


def test_extract_from_the_command_line(pets, tmp_path, capsys, monkeypatch):
    [line] = told(capsys, "extract", pets / "run", "--task", "animals", "--out", tmp_path / "animals.pt2")
    assert line.startswith(f"{tmp_path}/animals.pt2: animals, images [B, 3, 12, 12], ")
    assert torch.export.load(tmp_path / "animals.pt2").module()(torch.zeros(3, 3, 12, 12)).shape == (3, 3)
    assert main(["dag", "extract", str(pets / "run"), "--task", "animals", "--out", str(tmp_path / "a.pt")]) == 2
    assert "out must end with .pt2 or .onnx, got" in capsys.readouterr().err
    assert main(["dag", "extract", str(pets / "run"), "--task", "cats", "--out", str(tmp_path / "a.pt2")]) == 2
    assert "task must be one of 0 'digits', 1 'animals', got 'cats'" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["dag", "extract", str(pets / "run"), "--task", "animals", "--out", str(tmp_path / "a.onnx")]) == 2
    assert "onnx and onnxscript must be installed to write .onnx" in capsys.readouterr().err


def test_a_peer_is_extracted_where_it_has_a_network_for_each_task():
    config = dict(networks())["classes"]
    separate = SeparateNetworks(config).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(alone(separate, "b")(x), separate(x, "b"), rtol=1e-4, atol=1e-4)
    assert isinstance(alone(separate, "b"), SubNetwork)
    with pytest.raises(ValueError, match="must have a network for each task, got a cross-stitch network"):
        alone(CrossStitchNetwork(config), "b")


def test_modules_of_the_current_folder_are_imported(tmp_path, monkeypatch):
    (tmp_path / "kinds_of_mine.py").write_text("answer = 42\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    import_modules(["kinds_of_mine.py"])
    assert sys.modules.pop("kinds_of_mine").answer == 42
    assert sys.path == before
