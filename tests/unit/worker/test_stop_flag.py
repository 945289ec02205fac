"""The flag that a Celery worker's parent sets for its children."""

import subprocess
import sys

from tests.deployment import ROOT

_FAMILY = """
import os, sys, time
from worker.stop_flag import StopFlag
flag = StopFlag()
mine, theirs = os.pipe()
if os.fork():
    os.read(mine, 1)  # until the child has looked once
    os._exit(0)  # as a killed parent: it sets no flag
before = flag.is_set()
parent = os.getppid()
os.write(theirs, b"x")
while os.getppid() == parent:
    time.sleep(0.01)
print(before, flag.is_set())
"""


def test_a_child_without_its_parent_is_to_stop() -> None:
    done = subprocess.run([sys.executable, "-c", _FAMILY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
