"""The speed to reach, as data: which row, which number, which bound; on a CPU with 2 threads, and on an H200."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .shapes import NETWORKS, Shape

Row = Mapping[str, Any]
AUTOTUNED = " max-autotune"  # behind the name of a case whose dense side was compiled with a search for its kernels
RELATIVE = ("realised", "speed", "dense_share", "overhead")  # measures that compare with another provider
BFLOAT16_SLACK = 0.05  # realised fractions in bfloat16 may be this much lower


@dataclass(frozen=True)
class Target:
    """Bound on one measure of one case."""

    what: str
    case: str
    measure: str  # a key of tables.MEASURES, or "against PROVIDER": how many times as fast
    bound: float
    provider: str = "ours"

    @property
    def is_lower_bound(self) -> bool:
        """True where a larger value is better."""
        return self.measure in ("realised", "speed", "throughput", "floor_share") or self.measure.startswith("against ")

    def against(self, row: Row) -> str | None:
        """The provider that ours is compared with in a row; None where the measure compares with nobody."""
        if self.measure.startswith("against "):
            return self.measure.removeprefix("against ")
        return row.get({"overhead": "bare"}.get(self.measure, "best_dense")) if self.measure in RELATIVE else None

    def measured(self, row: Row) -> float | None:
        """The number out of a row; None where the row does not have it."""
        if self.measure in ("peak_share", "frozen_share", "throughput"):
            return row.get(self.measure)
        if self.measure == "growth":
            return row.get("contention", {}).get(self.provider, {}).get("growth")
        providers = row.get("providers", {})
        provider = providers.get(self.provider, {})
        if self.measure.startswith("against "):
            other = providers.get(self.measure.removeprefix("against "))
            return other["median"] / provider["median"] if other and provider else None
        if self.measure == "speed":
            share = provider.get("dense_share")
            return None if not share else 1 / share
        return provider.get("median" if self.measure == "seconds" else self.measure)

    def value(self, rows: Mapping[str, Row]) -> float | None:
        """The number out of all rows by case; of the ways to compile the dense side the faster one counts."""
        row = self.row(rows)
        return None if row is None else self.measured(row)

    def row(self, rows: Mapping[str, Row]) -> Row | None:
        """The row that the number is out of; None where it was not measured."""
        found = [rows[case] for case in (self.case, self.case + AUTOTUNED) if case in rows]
        known = [row for row in found if self.measured(row) is not None]
        return (min if self.is_lower_bound else max)(known, key=self.measured, default=None)

    def is_met(self, value: float) -> bool:
        """True where ``value`` is on the right side of the bound."""
        return value >= self.bound if self.is_lower_bound else value <= self.bound


def _uniform_targets() -> list[Target]:
    bounds = {("64x32x32", 32): 0.95, ("64x32x32", 128): 0.95, ("128x16x16", 32): 0.95, ("128x16x16", 128): 0.95}
    bounds |= {("256x8x8", 32): 0.88, ("256x8x8", 128): 0.88, ("16x32x32", 256): 0.75, ("64x32x32", 8): 0.8}
    found = []
    for dtype, slack in (("float32", 0.0), ("bfloat16", BFLOAT16_SLACK)):
        for (shape, batch), bound in bounds.items():
            case = f"residual/{shape}/B{batch}/uniform/{dtype}"
            what = f"block {_name(shape)}, B = {batch}, uniform, {dtype}"
            found.append(Target(what, case, "realised", bound - slack))
    return found


def _overhead_targets() -> list[Target]:
    return [
        Target(
            f"block {_name(shape)}, B = {batch}, uniform, float32, in place",
            f"residual/{shape}/B{batch}/uniform/float32",
            "overhead",
            0.06,
            "ours-inplace",
        )
        for batch in (32, 128)
        for shape in ("64x32x32", "128x16x16", "256x8x8")
    ]


def _extreme_targets() -> list[Target]:
    found = []
    for batch in (32, 128):
        for shape in ("64x32x32", "128x16x16", "256x8x8"):
            what = f"block {_name(shape)}, B = {batch}, float32"
            full, zero = (f"residual/{shape}/B{batch}/{mix}/float32" for mix in ("full", "zero"))
            found.append(Target(f"{what}, all at the full level", full, "speed", 0.98))
            found.append(Target(f"{what}, all at level 0, in place", zero, "dense_share", 0.02, "ours-inplace"))
    return found


def _name(shape: str) -> str:
    channels, side, _ = shape.split("x")
    return f"{channels}x{side}²"


def _network_targets() -> list[Target]:
    found = []
    for name, batch, mix, dtype, bound in (
        ("WRN-32-4", 64, "1.88x", "float32", 0.9),
        ("WRN-32-4", 64, "1.88x", "bfloat16", 0.85),
        ("ResNet-42", 16, "1.81x", "float32", 0.9),
        ("ResNet-42", 16, "2.15x", "float32", 0.9),
    ):
        shape = {"WRN-32-4": "wrn32_4", "ResNet-42": "resnet42"}[name]
        what = f"{name}, B = {batch}, {mix} fewer FLOPs, {dtype}"
        found.append(Target(what, f"network/{shape}/B{batch}/{mix}/{dtype}", "realised", bound))
    return found


def _dag_targets() -> list[Target]:
    found = []
    for shape in ("16x7", "24x7", "32x8", "48x14"):
        channels, side = shape.split("x")
        for tasks in (8, 20):
            what, case = f"DAG {channels}x{side}², {tasks} tasks", f"dag/{shape}/B{4 * tasks}/{tasks}-tasks/float32"
            if shape == "48x14":  # one task alone is near the machine's rate already: what is left is below the floor
                found.append(Target(f"{what}, arithmetic at the machine's rate / one batch", case, "floor_share", 0.8))
            else:
                found.append(Target(f"{what}, one batch / one task after the other", case, "throughput", 3.0))
            found.append(Target(what, case, "realised", 0.85))
    dense = "dag/64x32x64/B6/3-dense-tasks/float32"
    found.append(Target("DAG 64x32x64, 3 dense tasks, arithmetic at the machine's rate / one batch", dense,
                        "floor_share", 0.8))  # fmt: skip
    found.append(Target("DAG 64x32x64, 3 dense tasks", dense, "realised", 0.85))
    return found


TARGETS: tuple[Target, ...] = (
    *_uniform_targets(),
    *_overhead_targets(),
    *_extreme_targets(),
    *_network_targets(),
    Target("WRN-32-4, B = 64, peak memory", "memory/wrn32_4/B64/1.88x/float32", "peak_share", 1.0),
    Target("WRN-32-4, B = 64, peak memory, frozen", "memory/wrn32_4/B64/1.88x/float32", "frozen_share", 1.0),
    Target("ResNet-42, B = 16, peak memory", "memory/resnet42/B16/1.81x/float32", "peak_share", 1.0),
    Target("ResNet-42, B = 16, peak memory, frozen", "memory/resnet42/B16/1.81x/float32", "frozen_share", 1.0),
    *_dag_targets(),
    Target("WRN-32-4, B = 32, beside a busy process", "contention/wrn32_4/B32/1.88x/float32", "growth", 1.6),
    Target("WRN-32-4, B = 1, beside a busy process", "contention/wrn32_4/B1/1.88x/float32", "growth", 2.2),
)


def _gpu_case(suite: str, shape: str, mix: str) -> str:
    return f"{suite}/{shape}/B256/{mix}/bfloat16/cuda"


def _gpu_convolution_targets() -> list[Target]:
    return [
        Target(
            f"convolution {shape}, {side} elastic, full level, against cuDNN",
            _gpu_case(f"conv-{side}-elastic", shape, "full"),
            "speed",
            0.85,
        )
        for side in ("out", "in")
        for shape in NETWORKS
        if side == "out" or Shape.parse(shape).keeps
    ]


def _gpu_block_targets() -> list[Target]:
    found = []
    for shape in NETWORKS[1:]:
        uniform, zero = (_gpu_case("residual", shape, mix) for mix in ("uniform", "zero"))
        ours = "ours-inplace" if Shape.parse(shape).keeps else "ours"
        found.append(Target(f"block {shape}, uniform mix", uniform, "realised", 0.9, ours))
        if Shape.parse(shape).keeps:
            found.append(Target(f"block {shape}, all at level 0", zero, "dense_share", 0.03, ours))
    for shape in ("256x8x8", "128x16x16"):
        for mix, bound in (("full", 1.25), ("quarter", 1.5)):
            what = f"block {shape}, {mix} level, fused kernel against launches of Triton"
            case = _gpu_case("residual", shape, mix)
            found.append(Target(what, case, "against ours-composed", bound, "ours-fused"))
    return found


GPU_TARGETS: tuple[Target, ...] = (
    *_gpu_convolution_targets(),
    *_gpu_block_targets(),
    Target("plan of 20 blocks for 1,024 instances", "plan/20-blocks/B1024/random-blocks/int64/cuda", "seconds", 10e-6),
    Target(
        "training step of WRN-32-4 under eq. 8",
        _gpu_case("training-estimator", "wrn32_4", "tau0.75"),
        "dense_share",
        1.05,
    ),
    Target("WRN-32-4, uniform mix", _gpu_case("network", "wrn32_4", "uniform"), "realised", 1.0),
)
