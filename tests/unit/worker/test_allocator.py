"""Page faults are counted in a separate process, because the setting cannot be undone."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from worker.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
b"x" * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ran = subprocess.run([sys.executable, "-c", SCRIPT, way], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is for glibc")
def test_a_block_that_was_freed_is_not_faulted_in_again() -> None:
    """Five times 64 MiB are 81,920 pages of 4 KiB, or 160 of 2 MiB."""
    assert faults("kept") < 80 <= faults("given back")
