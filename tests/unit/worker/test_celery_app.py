"""What the parent of a Celery worker, and the sweeper, import."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["worker.tasks", "worker.sweeper", "worker.health"])
@pytest.mark.slow
def test_only_the_child_imports_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'fastapi'}} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
