"""On which GPUs the CUDA kernels run and what is said where they do not, with a made-up extension and devices."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from den_kernels import RoutingPlan, _cuda, _cuda_support, plan_sort
from den_kernels._extension import extension

BUILT = {"built": (13, 0), "archs": ["80", "90", "100", "120"]}
GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """machine(status, capability, ...): a machine whose runtime answers `status` for its GPUs."""

    def make(status=(0, "no error", 13000), capability=(9, 0), gpus=1, cuda="13.0") -> SimpleNamespace:
        asked: list[int] = []
        fake = SimpleNamespace(
            with_cuda=True, cuda_version=(13, 0), cuda_archs=BUILT["archs"], plan_groups_cuda=255, asked=asked,
            plan_mask_groups_cuda=32, kernel_status_cuda=lambda index: (asked.append(index), status)[1],
        )  # fmt: skip
        for module in (_cuda, _cuda_support):
            monkeypatch.setattr(module, "extension", fake)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(_cuda_support, "_said", set())
        return fake

    forget = [_cuda_support.refusal.cache_clear, _cuda_support._runs.cache_clear]
    for clear in forget:
        clear()
    yield make
    for clear in forget:
        clear()


def test_kernels_that_run_are_asked_about_once_and_nothing_is_said(machine):
    fake = machine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(_cuda.runs_on(GPU) for _ in range(3))
    assert _cuda.plans_levels(GPU, 255)
    assert not _cuda.plans_levels(GPU, 256)
    assert fake.asked == [0]


REFUSED = {
    "driver of CUDA 12": (
        (35, "CUDA driver version is insufficient for CUDA runtime version", 12040), (9, 0),
        ["knows CUDA 12.4", "built with 13.0", "driver to one for CUDA 13", "toolkit of CUDA 12 (CUDA_HOME)"],
    ),
    "card without code and a driver too old for its PTX": (
        (222, "the provided PTX was compiled with an unsupported toolchain.", 13000), (11, 0),
        ["compute capability 11.0", "code for 8.0, 9.0, 10.0, 12.0 (CUDA 13.0)", "PTX", "unsupported toolchain",
         "update the driver"],
    ),
    "no code at all": (
        (209, "no kernel image is available for execution on the device", 12080), (10, 3),
        ["compute capability 10.3", "no kernel image is available", "build with a newer CUDA toolkit"],
    ),
    "anything else": ((2, "out of memory", 13000), (9, 0), ["the CUDA runtime says: out of memory (CUDA error 2)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_kernels_that_do_not_run_give_one_warning_with_reason_and_remedy(machine, case):
    status, capability, words = REFUSED[case]
    machine(status, capability)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for index in (0, 1, 1, 0):
            assert not _cuda.runs_on(torch.device("cuda", index))
        assert not _cuda.plans_masks(GPU, 4)
    assert [one.category for one in said] == [UserWarning]
    text = str(said[0].message)
    assert text.startswith("den_kernels: the CUDA kernels do not run on Some GPU: ")
    assert "Triton's run instead" in text
    for word in words:
        assert word in text
    assert "\n" not in text


class OnGpu(Tensor):
    """CPU memory that says it lies on a GPU."""

    is_cpu = property(lambda self: False)
    device = property(lambda self: GPU)


def test_a_plan_is_made_all_the_same(machine, monkeypatch):
    """By torch ops: it was CUDA error 209 or 35 in every plan."""
    machine(*REFUSED["no code at all"][:2])
    made = plan_sort.plan_levels_torch
    monkeypatch.setattr(plan_sort, "plan_levels_torch", lambda levels, groups: made(levels.as_subclass(Tensor), groups))
    levels = torch.tensor([[2, 0], [0, 1], [3, 3]])
    with pytest.warns(UserWarning, match="do not run"):
        got = plan_sort.plan_levels(levels.as_subclass(OnGpu), 3)
    for mine, expected in zip(got, plan_sort.plan_levels_reference(levels, 3), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("change", [{"capability": (7, 5)}, {"cuda": None}], ids=["old", "ROCm"])
def test_of_gpus_without_any_kernel_of_ours_triton_speaks(machine, change):
    fake = machine(**change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _cuda.runs_on(GPU)
    assert fake.asked == []


def test_a_build_without_cuda_asks_nothing(machine):
    machine().with_cuda = False
    assert not _cuda.runs_on(GPU)
    assert _cuda_support.refusal(0) == "the extension was built without CUDA"


def test_a_cpu_is_no_gpu(machine):
    fake = machine()
    assert not _cuda.runs_on(torch.device("cpu"))
    assert RoutingPlan.from_levels(torch.zeros(2, 1, dtype=torch.int64), 1).groups == 1
    assert fake.asked == []


def test_the_driver_is_not_asked_to_be_older_than_it_is():
    text = _cuda_support.explain(35, "", 11080, (12, 4), ["80"], (8, 0))
    assert text.endswith("CUDA 11.8 and the extension was built with 12.4; update the driver to one for CUDA 12")


@pytest.mark.skipif(extension is None or not extension.with_cuda, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_runtime_answers_where_there_is_no_gpu():
    code, text, driver = extension.kernel_status_cuda(0)
    assert code in (35, 100)  # no driver, or none for a device
    assert text
    assert driver >= 0
