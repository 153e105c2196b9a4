"""setup.py: where it looks for nvcc, what it does without one, and what ends up in the package."""

import importlib.util
import os
import runpy
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PATH, GXX = os.environ["PATH"], shutil.which("g++")


@pytest.fixture
def setup(monkeypatch, tmp_path) -> ModuleType:
    """setup.py as a module, on a machine where no nvcc lies anywhere."""
    spec = importlib.util.spec_from_file_location("den_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "DEN_KERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    monkeypatch.setattr(module, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path / "site")))
    real = os.access
    monkeypatch.setattr(module.os, "access", lambda path, mode: not path.startswith("/usr/local") and real(path, mode))
    return module


def executable(path: Path, text: str = "#!/bin/sh\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_nvcc_anywhere(setup):
    assert setup.find_nvcc() is None


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_the_environment_comes_first(setup, tmp_path, monkeypatch, name):
    executable(tmp_path / "bin/nvcc")
    wanted = executable(tmp_path / "toolkit/bin/nvcc")
    monkeypatch.setenv(name, str(tmp_path / "toolkit"))
    assert setup.find_nvcc() == wanted


@pytest.mark.parametrize(
    "folder",
    ["bin", "elsewhere/nvidia/cu13/bin", "site/nvidia/cu13/bin", "lib/python3.11/site-packages/nvidia/cu13/bin"],
    ids=["path", "sys-path", "sysconfig", "beside-the-python-on-path"],
)
def test_nvcc_is_found(setup, tmp_path, folder):
    wanted = executable(tmp_path / folder / "nvcc")
    assert setup.find_nvcc() == wanted


def test_nvcc_of_an_active_virtual_environment_is_found(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    wanted = executable(tmp_path / "venv/lib/python3.12/site-packages/nvidia/cu13/bin/nvcc")
    assert setup.find_nvcc() == wanted


def test_a_file_that_cannot_be_executed_is_no_nvcc(setup, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("")
    assert setup.find_nvcc() is None


def test_the_root_of_a_wrapper_script_is_the_toolkit(setup, tmp_path):
    wrapper = executable(tmp_path / "bin/nvcc", f"#!/bin/sh\necho '#$ TOP={tmp_path}/real/bin/..' >&2\n")
    assert setup.toolkit_root(wrapper) == str(tmp_path / "real")


@pytest.mark.parametrize(
    ("wanted", "said"), [(None, "no nvcc found, building without CUDA"), ("0", "DEN_KERNELS_CUDA=0")]
)
def test_without_nvcc_one_line_is_said(setup, monkeypatch, capsys, wanted, said):
    if wanted is not None:
        monkeypatch.setenv("DEN_KERNELS_CUDA", wanted)
    monkeypatch.setattr(setup.build_ext, "build_extension", lambda self, ext: None)
    monkeypatch.setattr(setup.Build, "has_openmp", lambda self: True)
    build = setup.Build.__new__(setup.Build)
    build.build_extension(SimpleNamespace(extra_compile_args=[], extra_link_args=[]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_cuda_that_was_asked_for_and_is_missing_is_an_error(setup, monkeypatch):
    monkeypatch.setenv("DEN_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="no nvcc found, but DEN_KERNELS_CUDA=1"):
        setup.Build.__new__(setup.Build).build_extension(None)


@pytest.mark.skipif(GXX is None, reason="no g++ on this machine")
@pytest.mark.parametrize("known", [True, False])
def test_without_openmp_the_compiler_builds_for_one_thread(setup, tmp_path, known):
    refuse = "" if known else 'case "$*" in *-fopenmp*) exit 1 ;; esac\n'
    compiler = executable(tmp_path / "cxx", f'#!/bin/sh\n{refuse}PATH={PATH} exec {GXX} "$@"\n')
    build = setup.Build.__new__(setup.Build)
    build.compiler = SimpleNamespace(compiler_so=["false"], compiler_so_cxx=[compiler, "-fPIC"])
    assert build.has_openmp() == known


@pytest.mark.parametrize(("platform", "count"), [("linux", 1), ("darwin", 1), ("win32", 0)])
def test_extensions_of_a_platform(monkeypatch, platform, count):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    assert len(asked["ext_modules"]) == count
    if count:
        assert ("-Wl,--exclude-libs,ALL" in asked["ext_modules"][0].extra_link_args) == (platform == "linux")


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 100


def requirement(text: str) -> SpecifierSet:
    """The versions of the one package whose requirement begins with `text` in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    (found,) = [need for need in map(Requirement, needs) if need.name == text]
    return found.specifier


def test_every_torch_that_is_tested_is_admitted_and_brings_its_own_triton():
    torch, triton = requirement("torch"), requirement("triton")
    assert {"2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"} == set(
        torch.filter(["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0", "2.16.0"])
    )
    assert all(version in triton for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0"))


def test_only_ci_is_bound_to_one_version():
    lines = [line.partition("#")[0].strip() for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()]
    pins = {pin.name: pin.specifier for pin in map(Requirement, filter(None, lines))}
    for name, pin in pins.items():
        (version,) = pin
        assert version.operator == "=="
        assert version.version in requirement(name)
    assert set(pins) == {"torch", "triton"}
    assert "PIP_CONSTRAINT" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(("versions", "status", "said"), [((), 2, "usage: "), (("9.8", "9.9"), 1, "torch 9.8: FAILED")])
def test_a_version_that_cannot_be_installed_is_one_line(tmp_path, versions, status, said):
    executable(tmp_path / "bin/python3", "#!/bin/sh\nexit 7\n")
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "tmp")}
    command = ["bash", str(ROOT / "scripts/torch_versions.sh"), *versions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == max(1, len(versions))
    assert lines[0].startswith(said)
    assert {path.suffix for path in (tmp_path / "tmp").iterdir()} <= {".log"}  # environments are removed


def test_nothing_of_torch_is_needed_to_build():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [need for need in config["build-system"]["requires"] if "torch" in need]
    sources = [path.read_text() for path in (ROOT / "csrc").iterdir()]
    assert not [line for text in sources for line in text.splitlines() if "#include" in line and "torch" in line]
