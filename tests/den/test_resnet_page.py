"""docs/elastic-resnet18.md: its program runs on real pictures, and the network learns.

torchvision fits one torch only: the page gets a small ResNet-18 of the same form.
"""

import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from den.data import load_set
from tests.stand_ins import PlainResNet18

PAGE = Path(__file__).resolve().parents[2] / "docs" / "elastic-resnet18.md"
COUNTS = {"train": 600, "test": 300}


def write_pictures(folder: Path) -> None:
    """Fashion-MNIST's first images, a PNG each in the folder of its class."""
    for split, count in COUNTS.items():
        garments = load_set("fashion", split)
        for i in range(count):
            place = folder / split / f"class{garments.labels[i]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(garments.images[i, 0].numpy()).save(place / f"{i}.png")


def test_the_program_of_the_page_runs_and_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    models, small = ModuleType("torchvision.models"), partial(PlainResNet18, width=16)
    models.resnet18, models.get_model = small, lambda name, weights, **settings: small(**settings)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, names)
    assert len(names["report"]) == 8
    assert names["right"] > 0.5
    assert names["levels"].shape == (COUNTS["test"], 8)
    costs = names["engine"].network.costs
    assert 0.2 < float(costs.of(names["levels"]).mean()) < 0.6
    shown = capsys.readouterr().out
    assert "FLOPs saved" in shown
    with torch.inference_mode():
        again = names["den"].Engine.from_pretrained("elastic-resnet18", device="cpu")(names["test"].inputs())
    assert torch.equal(again, names["logits"])
