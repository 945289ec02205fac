"""What the service's front may import."""

import subprocess
import sys


def test_the_service_starts_without_torch_or_the_worker() -> None:
    code = "import sys, api.main; print(sorted({'torch', 'diffusers', 'transformers', 'worker'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
