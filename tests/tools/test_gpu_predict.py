"""What is predicted of a GPU, against floors that were worked out by hand."""

import sys
from pathlib import Path

import pytest

from benchmarks import gpu_predict
from den.nn.backbones import BACKBONES, block_shapes
from den.nn.blocks import ResidualShape


@pytest.mark.parametrize(
    ("network", "mix", "matrix", "maps"),
    [
        ("wrn32_4", "full", 691, 205), ("wrn32_4", "uniform", 302, 154), ("wrn32_4", "quarter", 173, 205),
        ("resnet42", "full", 942, 226), ("resnet42", "uniform", 412, 170), ("resnet42", "quarter", 235, 226),
    ],
)  # fmt: skip
def test_the_traffic_of_whole_networks_is_their_floor(network, mix, matrix, maps):
    """Microseconds of 256 images at 790 TFLOP/s and 4.3 TB/s, every map read twice, written once."""
    backbone = BACKBONES[network]
    blocks = block_shapes(backbone.stages, backbone.stem, 32)
    made = [gpu_predict.predict(block, mix, 790e12, 4.3e12) for block in blocks]
    assert round(sum(one.matrix for one in made) * 1e6) == matrix
    assert round(sum(one.fused_bytes for one in made) * 1e6) == maps


def test_a_block_that_the_kernel_does_not_take_has_no_traffic():
    problem = gpu_predict.problem_of(ResidualShape(64, 64, 64, 32, 1), 8, 132)
    with pytest.raises(ValueError, match="must be one that the fused kernel takes"):
        gpu_predict.fused_traffic(problem, (0, 0, 0, 8))


def test_fewer_levels_never_cost_more_and_small_maps_are_bound_by_their_weights():
    wide, small = ResidualShape(128, 128, 128, 16, 1), ResidualShape(512, 512, 512, 4, 1)
    for block in (wide, small):
        full, uniform = (gpu_predict.predict(block, mix, 790e12, 4.3e12) for mix in ("full", "uniform"))
        assert uniform.fused < full.fused
        assert uniform.composition < full.composition
        assert uniform.flops_ratio == pytest.approx(16 / 7)
    assert full.fused > full.composition


def test_the_table_has_a_line_for_each_block_and_mix(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_predict"])
    gpu_predict.main()
    out = capsys.readouterr().out
    assert out.count("512-512x4x4/1") == 3
    assert out.count("all 15") == out.count("all 20") == 3


def test_the_notes_say_what_is_predicted():
    text = (Path(__file__).parents[2] / "benchmarks" / "GPU_SESSION.md").read_text()
    backbone = BACKBONES["wrn32_4"]
    blocks = block_shapes(backbone.stages, backbone.stem, 32)
    for mix, name in (("full", "full level"), ("uniform", "uniform mix"), ("quarter", "level ¼")):
        made = [gpu_predict.predict(block, mix, 790e12, 4.3e12) for block in blocks]
        sums = [round(sum(one[i] for one in made) * 1e6) for i in range(5)]
        assert f"| all blocks, {name} | " + " | ".join(map(str, sums)) in text
    for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        made = gpu_predict.predict(ResidualShape(channels, channels, channels, size, 1), "full", 790e12, 4.3e12)
        assert f"| {channels}\N{MULTIPLICATION SIGN}{size}² | " + " | ".join(f"{s * 1e6:.0f}" for s in made[:5]) in text
