"""Work on this machine, in a subprocess: the command line starts without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

_AGREEMENT = """
import sys
from dfusion.rewards.agreement import main
from service.errors import StartError
from service.settings import Settings
try:
    main(sys.argv[1:], Settings.read().scorers)
except StartError as error:
    raise SystemExit(str(error))
"""


def reward_agreement(source: Path, options: Mapping[str, str]) -> dict[str, Any]:
    """How often a scorer of this machine agrees with labelled pairs (`dfusion.rewards.agreement`).

    Raises BadParameter with the message of the program if it fails.
    """
    words = [word for option in options.items() for word in option]
    program = [sys.executable, "-c", _AGREEMENT, str(source), *words]
    ran = subprocess.run(program, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines()
        raise typer.BadParameter(lines[-1] if lines else f"exit code {ran.returncode}")
    output: dict[str, Any] = json.loads(ran.stdout)
    return output
