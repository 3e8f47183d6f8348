"""Memory that a step frees is there for the next one."""

import ctypes
import subprocess
import sys

import pytest

STEP = """
import ctypes, sys, torch
from sdn.memory import keep_freed_memory

class Info(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

if sys.argv[1] == "keep":
    assert keep_freed_memory()
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
before = mallinfo2()
held = [torch.ones(2**22) for _ in range(4)]
mapped = mallinfo2().hblkhd - before.hblkhd
del held
print(mapped, mallinfo2().fordblks - before.fordblks)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's allocator")
def test_memory_that_was_freed_is_kept() -> None:
    """Large blocks come from what the process keeps, and stay with it when they are freed."""

    def taken(mode: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", STEP, mode], capture_output=True, text=True, check=True
        )
        return [int(size) for size in done.stdout.split()]

    size = 4 * 4 * 2**22  # four blocks of 16 MiB
    mapped, free = taken("leave")
    assert mapped >= size  # given back to the system when they are freed
    assert free < size / 4
    mapped, free = taken("keep")
    assert mapped < size / 4
    assert free > 0.75 * size  # what the interpreter itself takes meanwhile comes out of it
