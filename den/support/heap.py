"""The allocator's settings that make CPU times fair."""

import ctypes
import platform

# Parameters of glibc's mallopt (malloc.h). As found, malloc maps every large tensor anew and faults in its pages,
# which slows the network with the larger tensors most: the dense one.
_SETTINGS = {-3: 2**30, -4: 0, -1: 2**31 - 1, -2: 2**28}  # M_MMAP_THRESHOLD, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_allocations_on_the_heap() -> bool:
    """Keep the memory of freed tensors for reuse instead of returning it to the system.

    Returns True where the C library allows it (glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    refused = [key for key, value in _SETTINGS.items() if mallopt(key, value) != 1]
    return not refused
