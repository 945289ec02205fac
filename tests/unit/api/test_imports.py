"""Import time dependencies of the service and of its clients."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_service_imports_neither_torch_nor_the_worker() -> None:
    code = "import sys, api.main; print(sorted({'torch', 'diffusers', 'transformers', 'worker'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["api.client", "api.cli", "api.experiments", "api.experiments.runner", "api.local_service"]
)
def test_clients_import_neither_sqlalchemy_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'sqlalchemy', 'torch', 'fastapi', 'celery'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
