"""docs/your-model.md: its program runs, and shows what the page says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-model.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, names = PAGE.read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    shown = capsys.readouterr().out
    [table] = re.findall(r"```\n(   block.*?)\n```", text, re.DOTALL)
    assert table in shown
    converted, trained = names["converted"], names["trained"]
    assert min(converted[4], trained[4]) > 0.85
    assert trained[1] > converted[1]
    assert trained[2] > 0.8
    x = names["images"][:8]
    with torch.no_grad(), names["den_kernels"].levels(names["model"], torch.full((8, 3), 2)):
        torch.testing.assert_close(names["half"](x), names["model"](x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "latency.json").exists()
    assert names["right"] > 0.8
    assert len(set(map(tuple, names["chosen"].tolist()))) > 1
    assert "FLOPs saved" in shown
