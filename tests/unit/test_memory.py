"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

STEP = """
import resource, sys, torch
from sdn.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
held = [torch.ones(2**22) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
del held
held = [torch.ones(2**22) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_freed_is_not_cleared_again() -> None:
    def faults(mode: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", STEP, mode], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # Four blocks of 16 MiB, freed and taken anew: 16,384 small pages where nothing is kept.
    assert faults("keep") < 0.1 * faults("leave")
