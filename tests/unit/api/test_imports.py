"""What the service's front and its clients import."""

import subprocess
import sys

import pytest


def test_the_service_starts_without_torch_or_the_worker() -> None:
    code = "import sys, api.main; print(sorted({'torch', 'diffusers', 'transformers', 'worker'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["api.client", "api.cli", "api.experiments", "api.experiments.runner", "api.local_service"]
)
def test_clients_need_neither_a_database_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'sqlalchemy', 'torch', 'fastapi', 'celery'}} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
