"""Import time dependencies of the service and of its clients."""

import subprocess
import sys

import pytest

_SERVICE = "import api.main, api.__main__"
_CLIENTS = "import api.cli, api.client.client, api.experiments.reporting, api.experiments.runner, api.local_service"
_HELP = """
import sys
from dfusion.__main__ import main
sys.argv = ["dfusion", "jobs", "--help"]
try:
    main()
except SystemExit:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "unused"),
    [
        (_SERVICE, "torch diffusers transformers worker huggingface_hub celery redis limits"),
        (_CLIENTS, "torch diffusers worker huggingface_hub sqlalchemy fastapi celery"),
        (_HELP, "torch diffusers worker huggingface_hub sqlalchemy fastapi celery numpy httpx pydantic_settings"),
    ],
    ids=["service", "clients", "help"],
)
def test_programs_import_no_package_that_they_do_not_use(code: str, unused: str) -> None:
    names = f"{code}\nimport sys; print(sorted(set({unused.split()}) & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
