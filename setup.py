"""Build of den_kernels._C: C++, OpenMP where the compiler has it, CUDA when an nvcc of 12.4 or newer is found.

No torch is needed.  On Windows nothing is compiled: the sources are for GCC and Clang.

The build alone reads DEN_KERNELS_CUDA (0 leaves CUDA out, 1 makes its absence an error) and DEN_KERNELS_FLAGS, more
flags for the C++ compiler and the linker, which come after its own (scripts/sanitize.sh).
"""

import glob
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ARCHS = ("80", "90", "100", "120")  # each also runs on later ones of its major version; PTX of 80 is for all others
WHEELS = "'cuda-toolkit[nvcc,cccl]==13.0.*', for drivers from 580 on"  # PTX of newer ones needs newer drivers still
MISSING = f"den_kernels: no nvcc found, building without CUDA (set CUDA_HOME, or pip install {WHEELS})"


def find_nvcc():
    """CUDA_HOME or CUDA_PATH, PATH, /usr/local/cuda, then the PyPI toolkit in any site-packages within reach."""
    candidates = [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    # Build isolation hides the environment that runs pip from sys.path, but not from sysconfig, VIRTUAL_ENV or PATH.
    prefixes = [os.environ.get("VIRTUAL_ENV", ""), *map(os.path.dirname, os.get_exec_path())]
    sites = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    sites += [site for prefix in prefixes if prefix for site in glob.glob(f"{prefix}/lib/python3*/site-packages")]
    candidates += [nvcc for site in sites for nvcc in sorted(glob.glob(f"{site}/nvidia/cu1*/bin/nvcc"), reverse=True)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def toolkit_root(nvcc):
    """Ask nvcc itself: the one on PATH may be a wrapper script that lies elsewhere."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return next(os.path.realpath(line.split("TOP=")[1].strip()) for line in dryrun.splitlines() if "TOP=" in line)


class Build(build_ext):
    """Compiles C++ in parallel, CUDA where there is a compiler; always anew: what lies in build/ may lack CUDA."""

    def build_extension(self, ext):
        wanted = os.environ.get("DEN_KERNELS_CUDA")
        nvcc = None if wanted == "0" else find_nvcc()
        if not nvcc and wanted == "1":
            raise SystemExit(MISSING.replace("building without CUDA", "but DEN_KERNELS_CUDA=1 asks for it"))
        if not nvcc:
            print(MISSING if wanted != "0" else "den_kernels: building without CUDA (DEN_KERNELS_CUDA=0)", flush=True)
        if self.has_openmp():
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        else:
            print("den_kernels: this compiler has no OpenMP, building for one thread", flush=True)
            ext.extra_compile_args.append("-Wno-unknown-pragmas")
        with ThreadPoolExecutor(os.cpu_count()) as pool, ParallelCompile(default=max(2, os.cpu_count() or 2)):
            if nvcc:
                self.compile_cuda(nvcc, ext, pool)
            super().build_extension(ext)

    def has_openmp(self):
        """True where the compiler takes -fopenmp and finds a runtime; Apple's does not."""
        both = self.compiler.compiler_so  # for C++, too, in older setuptools
        compiler = getattr(self.compiler, "compiler_so_cxx", both)
        with tempfile.TemporaryDirectory() as folder:
            command = [*compiler, "-fopenmp", "-shared", "-x", "c++", "-", "-o", f"{folder}/openmp.so"]
            code = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
            return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0

    def compile_cuda(self, nvcc, ext, pool):
        """Compile CUDA in a pool, beside C++; the linker waits for it."""
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        archs = [arch for arch in ARCHS if f"compute_{arch}" in known]
        flags = ["-O3", "-std=c++17", "-DDEN_KERNELS_WITH_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs] + ["-t", str(len(archs))]
        flags += ["-gencode=arch=compute_80,code=compute_80"]
        os.makedirs(self.build_temp, exist_ok=True)
        sources = sorted(glob.glob("csrc/*.cu"))
        ext.extra_objects = [f"{self.build_temp}/{os.path.basename(source)}.o" for source in sources]
        pairs = zip(sources, ext.extra_objects, strict=True)
        commands = [[nvcc, "-c", source, "-o", target, *flags] for source, target in pairs]
        compiled, link = pool.map(self.spawn, commands), self.compiler.link_shared_object  # prints the commands
        self.compiler.link_shared_object = lambda *args, **named: (list(compiled), link(*args, **named))
        ext.define_macros += [("DEN_KERNELS_WITH_CUDA", None), ("DEN_KERNELS_CUDA_ARCHS", f'"{",".join(archs)}"')]
        ext.library_dirs += [path for path in glob.glob(f"{toolkit_root(nvcc)}/lib*") if os.path.isdir(path)]
        ext.libraries += ["cudart_static", "rt", "pthread", "dl"]


if __name__ == "__main__":
    flags = os.environ.get("DEN_KERNELS_FLAGS", "").split()
    sources = set(glob.glob("csrc/*.cpp")) - set(glob.glob("csrc/bind_*.cpp"))  # which others include
    extension = Pybind11Extension("den_kernels._C", sorted(sources), cxx_std=17)
    bindings = subprocess.check_output([sys.executable, "den_kernels/_interface.py"], text=True).strip()
    extension.extra_compile_args += ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", bindings, *flags]
    extension.extra_link_args += flags
    if sys.platform == "linux":
        extension.extra_link_args.append("-Wl,--exclude-libs,ALL")
    built = [] if sys.platform == "win32" else [extension]
    setup(ext_modules=built, cmdclass={"build_ext": Build}, options={"build_ext": {"force": True}})
