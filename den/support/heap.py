"""The allocator's settings that make CPU times fair."""

import ctypes
import platform

# Parameters of glibc's mallopt (malloc.h) and their values. As found, malloc maps every large tensor anew and faults in
# its pages, which slows the network with the larger tensors most: the dense one.
_SETTINGS = {
    "M_MMAP_THRESHOLD": (-3, 2**30), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}  # fmt: skip


def keep_allocations_on_the_heap() -> str:
    """Keep the memory of freed tensors for reuse, in glibc; returns the settings in words, or why there are none."""
    if platform.libc_ver()[0] != "glibc":
        return "malloc as found (no glibc)"
    mallopt = ctypes.CDLL(None).mallopt
    refused = [name for name, (key, value) in _SETTINGS.items() if mallopt(key, value) != 1]
    words = " ".join(f"{name}={value}" for name, (_, value) in _SETTINGS.items() if name not in refused)
    return words + (f" (refused: {', '.join(refused)})" if refused else "")
