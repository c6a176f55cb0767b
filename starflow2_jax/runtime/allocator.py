"""An allocator setting that keeps freed memory in the process, for faster steps on CPUs.

XLA allocates a program's temporaries at every call and frees them at its end. glibc returns blocks
of that size to the kernel at once, which must then provide and clear the same pages at the next
call; that takes a fifth of a small training step. Keeping them, in huge pages, removes the cost.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

# mallopt's parameters, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("nvidiactl", "accel0", "vfio/vfio", "kfd")


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, and return True if that is possible here.

    Call it before the first use of JAX, because running threads keep their heaps. It applies to
    Linux with glibc, if JAX_PLATFORMS is cpu or the machine has no accelerator. The memory of the
    process then stays at its peak.
    """
    if not sys.platform.startswith("linux") or not _computes_on_cpu():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # One heap for all threads, every block from it, and it never shrinks.
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)
    _ask_for_huge_pages(libc)
    return True


def _computes_on_cpu() -> bool:
    chosen = os.environ.get("JAX_PLATFORMS")
    return (
        chosen == "cpu" if chosen else not any((Path("/dev") / n).exists() for n in _ACCELERATORS)
    )


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserve heap addresses (not memory) for half of the machine's memory, for huge pages."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = mmap.PAGESIZE
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    start = libc.malloc(size)
    if start:  # Under a limit on address space there is none, and ordinary pages remain.
        first = -(-start // page) * page
        libc.madvise(first, size - (first - start), mmap.MADV_HUGEPAGE)
        libc.free(start)
