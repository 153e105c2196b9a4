"""The report of `den info`."""

import json
import sys

import pytest
import torch

from den_kernels import _extension, info


def test_facts_are_json():
    facts = json.loads(json.dumps(info.describe()))
    assert facts["versions"]["torch"] == torch.__version__ or facts["versions"]["torch"] in torch.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]["threads"] == torch.get_num_threads()


def test_report_names_what_is_active():
    report = info.format_report()
    for text in (
        "den_kernels",
        "C++ rows + oneDNN",
        "Active on cpu",
        "Active on cuda",
        "residual block",
        "torch's OpenMP",
    ):
        assert text in report


def test_report_without_the_extension_says_why_and_what_it_costs(monkeypatch):
    monkeypatch.setattr(_extension, "extension", None)
    monkeypatch.setattr(_extension, "reason", "den_kernels._C was not built")
    report = info.format_report()
    assert "not loaded: den_kernels._C was not built" in report
    assert "PyTorch rows + oneDNN" in report
    assert "less of the saved arithmetic is saved time" in report
    assert "C++ rows" not in report


def test_report_without_cuda_sources_and_avx2(monkeypatch):
    class WithoutCuda:
        has_direct_float32 = has_direct_bf16 = staticmethod(lambda: False)
        float32_isa = bf16_isa = staticmethod(lambda: "")
        with_openmp, with_cuda, cuda_version, cuda_archs, compiler = True, False, None, (), "12"
        cpu_isa, omp_max_threads = staticmethod(lambda: "SSE2"), staticmethod(torch.get_num_threads)
        cuda_devices = staticmethod(lambda: ([], "this build has no CUDA sources"))

    monkeypatch.setattr(_extension, "extension", WithoutCuda)
    report = info.format_report()
    assert "built without CUDA" in report
    assert "no nvcc at build time" in report
    assert "direct kernels do not run" in report
    assert "C++ rows + oneDNN" in report
    assert "direct (" not in report


def test_the_direct_kernels_are_named_where_they_run():
    from den_kernels._extension import extension

    active = info.describe()["implementations"]["cpu"]
    assert ("in float32" in active["dynamic convolution"]) == extension.has_direct_float32()
    assert f"{extension.float32_isa()} in float32" in active["dynamic convolution"] or not extension.float32_isa()
    assert ("in bfloat16" in active["residual block, inference"]) == extension.has_direct_bf16()


def test_a_private_openmp_runtime_is_reported(monkeypatch):
    monkeypatch.setattr(info, "_shares_openmp", lambda: False)
    report = info.format_report()
    assert "an OpenMP runtime of its own" in report
    assert "spin against each other" in report


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_gpu_is_described_with_what_it_lacks(monkeypatch, capability):
    class Properties:
        name, multi_processor_count, total_memory = "Some GPU", 132, 141 * 2**30
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(info, "_refusal", lambda index, capability: "")
    report = info.format_report()
    assert f"cuda:0  Some GPU, sm_{capability[0]}{capability[1]}, 132 SMs, 141 GiB" in report
    assert ("compute capability 8.0 on cuda:0" in report) == (capability < (8, 0))


def test_a_gpu_on_which_the_cuda_kernels_do_not_run(monkeypatch):
    class Properties:
        name, multi_processor_count, total_memory, major, minor = "Some GPU", 132, 141 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(info, "_refusal", lambda index, capability: "the driver knows CUDA 12.4")
    report = info.format_report()
    assert "- the CUDA kernels on cuda:0, where they do not run: the driver knows CUDA 12.4; the plan takes" in report
    assert "CUDA C++" not in report.split("Active on cuda")[1].split("Missing")[0]
    assert "CUDA, one launch" not in report


def test_what_runs_on_a_gpu_depends_on_triton(monkeypatch):
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    report = info.format_report()
    assert "all groups computed and masked" in report
    assert "pip install triton" in report
    monkeypatch.setattr(info, "find_spec", lambda name: object())
    report = info.format_report()
    assert "Triton, one launch" in report
    assert "pip install triton" not in report


def test_the_thread_count_is_left_alone():
    before = torch.get_num_threads()
    info.describe()
    assert torch.get_num_threads() == before


def test_devices_of_the_extension_come_with_a_reason_or_a_name():
    if _extension.extension is None:
        pytest.fail(_extension.reason)
    devices, reason = _extension.extension.cuda_devices()
    assert bool(devices) != bool(reason)
    for device in devices:
        assert set(device) == {"name", "compute_capability", "multiprocessors", "memory"}
