"""Engines saved and loaded, of both kinds; folders that hold something else; the hub where it is installed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from pytorchcv.models import resnet_cifar
from torch import nn

import den
import den_kernels
from den.inference.pretrained import PACKAGES
from tests.oracle import unlike_new

TASKS = (den.Task("a", classes=3, size=8), den.Task("b", classes=5, size=8))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAME = {"name": "pytorchcv/resnet20_cifar10", "num_classes": 10}


def network() -> den.DeepElasticNetwork:
    torch.manual_seed(0)
    config = den.ModelConfig(TASKS, stages=((16, 2),), backbone="wrn", stem=8, levels=3, trunk_size=8)
    return unlike_new(den.DeepElasticNetwork(config)).eval()


def plain(name: str = "resnet20_cifar10", **settings: int) -> nn.Module:
    """As pytorchcv's `get_model` builds it, which imports all models there are, and torchvision."""
    return getattr(resnet_cifar, name)(num_classes=10)


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = unlike_new(plain()).eval()
    den_kernels.convert(model, (1, 1, 2), blocks=["features.stage1.unit1", "features.stage2.unit2"], example=IMAGES[:1])
    return model


def test_a_deep_elastic_network_with_its_operating_point(tmp_path):
    x = dict.fromkeys(("a", "b"), IMAGES[:, :, :8, :8])
    engine = den.Engine(network(), device="cpu", max_batch=3, flops=0.5, images=x)
    engine.save_pretrained(tmp_path / "net", images=x)
    again = den.Engine.from_pretrained(tmp_path / "net", device="cpu")
    assert again.max_batch == 3
    for name, own in x.items():
        for got, wanted in zip(
            again(own, name, return_levels=True), engine(own, name, return_levels=True), strict=True
        ):
            assert torch.equal(got, wanted)
    card = (tmp_path / "net" / "README.md").read_text()
    assert "| blocks.0" in card
    assert "## b, 3 at once, on cpu" in card


@pytest.mark.parametrize("known", [True, False])
def test_a_converted_model_with_its_selector_and_statistics_of_levels(known, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "pytorchcv", plain)
    model = converted()
    den_kernels.recalibrate(model, [IMAGES], progress=False)
    elastic = den.attach_selector(model, IMAGES)
    nn.init.normal_(elastic.selector.selector.heads[0].weight)
    engine = den.Engine(elastic, device="cpu", images=IMAGES, flops=0.9)
    engine.save_pretrained(tmp_path, architecture=NAME if known else None)
    if not known:
        with pytest.raises(ValueError, match="model must be given, as the engine was saved without an architecture"):
            den.Engine.from_pretrained(tmp_path, device="cpu")
    again = den.Engine.from_pretrained(tmp_path, model=None if known else plain(), device="cpu")
    for got, wanted in zip(again(IMAGES, return_levels=True), engine(IMAGES, return_levels=True), strict=True):
        torch.testing.assert_close(got, wanted)
    fixed = den.Engine.from_pretrained(tmp_path, model=None if known else plain(),
                                       device="cpu", levels=[1, 2])  # fmt: skip
    assert fixed(IMAGES, return_levels=True)[1].tolist() == [[1, 2]] * 4


@pytest.fixture
def folder(tmp_path):
    den.Engine(network(), device="cpu").save_pretrained(tmp_path)
    return tmp_path


def changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json and model.safetensors"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:500]),
        "must hold config",
    ),
    "another library": (lambda f: changed(f, library="other"), "must be of an engine, of format 1"),
    "another network": (lambda f: changed(f, model={}), "ModelConfig"),
    "an unknown kind": (lambda f: changed(f, kind="converted"), "must hold a whole engine"),
    "an architecture of a package that is not known": (
        lambda f: changed(f, kind="converted", architecture={"name": "os/system"}),
        "architecture must be NAME of a model",
    ),
    "an architecture with a checkpoint": (
        lambda f: changed(f, kind="converted", architecture={"name": "timm/resnet18", "checkpoint_path": "x"}),
        "settings of an architecture must be among .* got checkpoint_path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_folders_that_hold_something_else_are_told_in_words(folder, case):
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        den.Engine.from_pretrained(folder, device="cpu")


def test_the_hub_where_it_is_installed_and_words_where_not(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"'some/name' is no folder, and huggingface_hub must be installed"):
        den.Engine.from_pretrained("some/name")
    sent = {}

    class Api:
        def create_repo(self, name, **options):
            sent["created"] = name

        def upload_folder(self, repo_id, folder_path):
            sent["files"] = sorted(path.name for path in __import__("pathlib").Path(folder_path).iterdir())
            return f"hub/{repo_id}"

    hub = SimpleNamespace(HfApi=Api, snapshot_download=lambda name, allow_patterns: str(folder))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    engine = den.Engine.from_pretrained("some/name", device="cpu")
    assert engine.push_to_hub("me/net") == "hub/me/net"
    assert sent == {"created": "me/net", "files": ["README.md", "config.json", "model.safetensors"]}


def test_a_selector_that_cannot_be_made_again_is_refused(tmp_path):
    class Ones(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2, dtype=torch.int64)

    engine = den.Engine(den_kernels.ElasticModel(converted(), Ones()), device="cpu", images=IMAGES)
    assert engine(IMAGES, return_levels=True)[1].tolist() == [[1, 1]] * 4
    with pytest.raises(ValueError, match=r"selector must be one of den\.attach_selector"):
        engine.save_pretrained(tmp_path)
