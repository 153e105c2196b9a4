"""Mistakes in C++, written by hand, with the tests that must find them; and the build of the extension with one."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """Sources to build and tests to run for the mistakes in one file; {isa} is what float32 runs with here."""

    objects: tuple[str, ...]  # sources that hold the mistake: others that include the file stay as they are
    tests: tuple[str, ...]


_INVERTED = Part(("dynamic_inverted_residual_{isa}",), ("tests/kernels/test_dynamic_inverted_residual.py",))
_CONV = Part(("dynamic_conv_{isa}",), ("tests/kernels/test_conv_direct.py",))
PARTS = {
    "csrc/plan.cpp": Part(("plan",), ("tests/kernels/test_plan.py",)),
    "csrc/direct_channels.h": _CONV,
    "csrc/direct_strips.h": _CONV,
    "csrc/conv_bands.h": _CONV,
    "csrc/direct_chunks.h": Part(("dynamic_residual_{isa}",), ("tests/kernels/test_dynamic_residual.py",)),
    "csrc/dynamic_trunk.cpp": Part(("dynamic_trunk",), ("tests/kernels/test_dynamic_trunk.py",)),
    "csrc/instance_queue.h": Part(("dynamic_trunk",), ("tests/kernels/test_dynamic_trunk.py",)),
    "csrc/direct_inverted_residual.h": _INVERTED,
    "csrc/inverted_chunk.h": _INVERTED,
    "csrc/inverted_gates.h": _INVERTED,
    "csrc/parallel.h": Part((), ("tests/kernels/test_parallel.py",)),  # which builds a program of its own
    "csrc/crew.h": Part((), ("tests/kernels/test_parallel.py",)),
    "csrc/crew.cpp": Part((), ("tests/kernels/test_parallel.py",)),
}
CPP = [  # file, what stands there, the mistake
    ("csrc/plan.cpp", "level < 0 || level >", "level > 0 && level >"),
    ("csrc/plan.cpp", "level > static_cast<T>(G)) bad", "level >= static_cast<T>(G)) bad"),
    ("csrc/plan.cpp", "++offsets[G - levels[b] + 1]", "++offsets[levels[b] + 1]"),
    ("csrc/plan.cpp", "next[G - levels[b]]++", "next[G - levels[b]]"),
    ("csrc/plan.cpp", "masks[b * G + g] != 0", "masks[b * G + g] == 0"),
    ("csrc/plan.cpp", "words[b * W + g / 64] |=", "words[b * W] |="),
    ("csrc/plan.cpp", "levels[a] > levels[b] ? -1 : 1", "levels[a] < levels[b] ? -1 : 1"),
    ("csrc/plan.cpp", "x > y ? -1 : 1", "x < y ? -1 : 1"),
    ("csrc/plan.cpp", "c != 0 ? c < 0 : a < b", "c != 0 ? c < 0 : a > b"),
    ("csrc/plan.cpp", "compare(order[i - 1], order[i]) != 0", "compare(order[i - 1], order[i]) < -1"),
    ("csrc/plan.cpp", "std::min(N, first + kColumns)", "std::min(N, first + kColumns - 1)"),
    ("csrc/plan.cpp", "offsets + n * (G + 2)", "offsets + n * (G + 1)"),
    ("csrc/plan.cpp", "bad = std::min(bad, b * N + n)", "bad = b * N + n"),
    ("csrc/plan.cpp", "found < seen &&", "found > seen &&"),
    ("csrc/direct_channels.h", "mask[order[offsets[s]] * G + group]", "mask[offsets[s] * G + group]"),
    ("csrc/direct_channels.h", "group < G - s", "group <= G - s"),
    ("csrc/direct_channels.h", "ranges.back().first + ranges.back().width < first", "ranges.size() > 9999"),
    ("csrc/direct_channels.h", "((1u << piece.width) - 1) << piece.first % block", "((1u << piece.width) - 1)"),
    ("csrc/direct_channels.h", "close(channels);", "close(dead);"),
    ("csrc/direct_strips.h", "(limit + stride - 1) / stride", "(limit + stride - 1) / stride + 1"),
    ("csrc/direct_strips.h", "tiles ? count * i / tiles : 0", "tiles ? (count - 1) * i / tiles : 0"),
    ("csrc/conv_bands.h", "std::min(rows, p.Ho - row)", "rows"),
    ("csrc/direct_chunks.h", "threads, static_cast<int64_t>(rest.size()),\n             [&]", "threads, 0, [&]"),
    ("csrc/direct_chunks.h", "i < end; ++i) rest(i)", "i + 1 < end; ++i) rest(i)"),
    ("csrc/dynamic_trunk.cpp", "++offsets[G - levels[instances[i]] + 1]", "++offsets[G - levels[i] + 1]"),
    ("csrc/dynamic_trunk.cpp", "]]]++] = instances[i]", "]]]++] = i"),
    ("csrc/dynamic_trunk.cpp", "if (!sorted.users()) return;", "if (sorted.users()) return;"),
    ("csrc/dynamic_trunk.cpp", "std::min(together, count - i)", "together"),
    ("csrc/instance_queue.h", "first = i ? ends[i - 1] : 0;", "first = i ? ends[i - 1] + 1 : 0;"),
    ("csrc/instance_queue.h", "ends[i] - first);", "ends[i] - first - 1);"),
    ("csrc/instance_queue.h", "taken + costs[order[i]] <= most", "taken + costs[order[i]] > most"),
    ("csrc/direct_inverted_residual.h", "max(done, y * p.stride - p.R / 2)", "max(done, y * p.stride)"),
    ("csrc/direct_inverted_residual.h", "1) * p.stride - p.R / 2 + p.R", "1) * p.stride - p.R / 2 + p.R - 1"),
    ("csrc/direct_inverted_residual.h", "row.end = std::min(p.R, p.H - top)", "row.end = p.R"),
    ("csrc/direct_inverted_residual.h", "store.live[i] = std::min(size, count - pixel)", "store.live[i] = size"),
    ("csrc/inverted_chunk.h", "row % c.ring : 0", "row % (c.ring + 1) : 0"),
    ("csrc/inverted_chunk.h", "std::min(i * size, columns - size)", "i * size"),
    ("csrc/inverted_gates.h", "y < p.Ho; ++y) sum", "y + 1 < p.Ho; ++y) sum"),
    ("csrc/parallel.h", "if (!failed_.exchange(true)) first_", "failed_ = true, first_"),
    ("csrc/parallel.h", "    if (any()) return;\n", ""),
    ("csrc/parallel.h", "guarded.failure.rethrow();", ""),
    ("csrc/parallel.h", "~Current() { own() = before; }", ""),
    ("csrc/crew.h", "count * (thread + 1) / threads", "count * (thread + 1) / threads - 1"),
    ("csrc/crew.cpp", "seen - 1, std::memory_order_acq_rel", "seen, std::memory_order_acq_rel"),
    ("csrc/crew.cpp", "offer | static_cast<uint64_t>(end - begin)", "static_cast<uint64_t>(end - begin)"),
    ("csrc/crew.cpp", "offer | static_cast<uint64_t>(end - begin)", "offer | (end - begin > 1)"),
    ("csrc/crew.cpp", "  ++news_;\n", ""),
    ("csrc/crew.cpp", "fetch_sub(1) == 1) tell();", "fetch_sub(1) == 1) {}"),
    ("csrc/crew.cpp", "(place + i) % threads_", "place"),
    ("csrc/crew.cpp", "  ++gone_;\n", ""),
]  # fmt: skip
EQUIVALENT = {  # survivors that change no result, and why
    "csrc/direct_strips.h: (limit + stride - 1) / stride + 1": "only which rows share a tile: each tile finds its taps",
    "csrc/instance_queue.h: taken + costs[order[i]] > most": "only how instances are cut into chunks",
}


def float32_isa() -> str:
    """The instruction set of float32 on this machine, as sources are called: avx512 or avx2."""
    code = (
        "from den_kernels._extension import extension; print(extension.float32_isa())"  # tests import their own later
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return asked.stdout.strip().replace("-", "").lower()


def build_all(tree: Path, objects: Path, ready: Path) -> None:
    """Compile every source of a tree, but for objects that `setup.py build_ext` has left in `ready`; an error ends the
    program."""
    for made in ready.glob("temp*/csrc/*.o"):
        shutil.copy2(made, objects)
    own = (each for each in sorted((tree / "csrc").glob("*.cpp")) if not each.name.startswith("bind_"))
    sources = [each for each in own if not (objects / f"{each.stem}.o").exists()]
    with ThreadPoolExecutor(2) as pool:
        if not all(pool.map(lambda source: compiled(source, objects), sources)) or not linked(tree, objects, []):
            raise SystemExit("mutants: the extension must build")


def build_changed(tree: Path, objects: Path, path: str, isa: str) -> bool:
    """Compile what holds the mistakes of a file, and link the extension; True if it builds."""
    stems = [stem.format(isa=isa) for stem in PARTS[path].objects]
    if not stems:
        return True
    return all(compiled(tree / f"csrc/{stem}.cpp", objects) for stem in stems) and linked(tree, objects, stems)


def compiled(source: Path, objects: Path) -> bool:
    import pybind11

    include = subprocess.run(  # of the interpreter, as sysconfig finds it in an environment
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"], capture_output=True, text=True
    ).stdout.strip()
    flags = ["-fPIC", "-O1", "-DNDEBUG", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-w"]
    flags += [f"-I{include}", f"-I{pybind11.get_include()}", str(source), "-o", str(objects / f"{source.stem}.o")]
    compiler = ["ccache", "g++"] if shutil.which("ccache") else ["g++"]
    return subprocess.run([*compiler, "-c", *flags], cwd=source.parent, capture_output=True).returncode == 0


def linked(tree: Path, objects: Path, first: list[str]) -> bool:
    """Link the extension: of inline functions that several objects hold, the linker takes those of the `first`."""
    library = next((tree / "den_kernels").glob("_C*.so"))
    library.unlink()  # a new file: processes may have the old one open
    order = sorted(objects.glob("*.o"), key=lambda each: (each.stem not in first, each.stem))
    link = ["g++", "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", *map(str, order), "-o", str(library)]
    return subprocess.run(link, capture_output=True).returncode == 0
