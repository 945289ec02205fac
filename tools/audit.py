"""`python -m tools.audit`: look for known vulnerabilities of the pinned packages, with pip-audit and OSV's database.

Without a network it says so and succeeds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

_ROOT = Path(__file__).resolve().parents[1]
_QUERY_URL = "https://api.osv.dev/v1/query"
_TIMEOUT_SECONDS = 5.0


def main() -> int:
    """Command line. Returns pip-audit's exit code: 1 if a package has a known vulnerability."""
    reason = _why_unreachable()
    if reason:
        sys.stdout.write(f"pip-audit: left out, because {_QUERY_URL} cannot be reached ({reason})\n")
        return 0

    requirements = ["--requirement", "constraints.txt", "--no-deps", "--disable-pip"]
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--progress-spinner", "off"]
    return subprocess.run([*command, *requirements], cwd=_ROOT, check=False).returncode


def _why_unreachable() -> str:
    """Why the database does not answer; empty if it does."""
    query = {"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "25.0"}
    try:
        httpx.post(_QUERY_URL, json=query, timeout=_TIMEOUT_SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        return type(error).__name__
    return ""


if __name__ == "__main__":
    sys.exit(main())
