"""The check of a model by the command line, without a process of its own, which would import torch for seconds."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any
from unittest.mock import patch


@contextmanager
def run_in_this_process() -> Iterator[None]:
    """Let `api.cli.model_check` call the program's `main`."""
    from dfusion.model_report import main

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        *program, arguments = command
        assert program[1:] == ["-m", "dfusion.model_report"]
        output = io.StringIO()
        with redirect_stdout(output):
            code = main([arguments])
        return subprocess.CompletedProcess(command, code, output.getvalue(), "")

    with patch("api.cli.model_check.subprocess.run", run):
        yield
