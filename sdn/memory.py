"""How this process gets its memory from the system: seldom, and in large pages."""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # as malloc.h of glibc numbers them
_LARGEST_BLOCK = 32 * 2**20  # what glibc takes at most for the first


def keep_freed_memory() -> bool:
    """Let a training keep the memory that a step frees for the next step, in large pages.

    As it stands, glibc gives large blocks back when they are freed; the next step gets them anew,
    and the system clears every page of them again: 10 to 20% of a step on a CPU. Large pages are
    torch's own setting, read when it first takes memory. Other systems' allocators are left alone.

    Returns:
        Whether the allocator took the setting.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
