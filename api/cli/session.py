"""The context of every command: the service's address and the output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType

from api.client import ApiError, UnauthorizedError, UnreachableError
from service.states import JobState

if TYPE_CHECKING:
    from api.client import Client
    from api.wire.jobs import JobDetail

# Exit codes; typer exits with 2 for an invalid command line.
ERROR = 1
JOB_FAILED = 3
INTERRUPTED = 130

_RETRIES = 3
_COLUMNS_WITHOUT_TERMINAL = 160
"""Width of the output to a pipe or a file."""


@dataclass(frozen=True)
class Session:
    """One invocation of the command line."""

    url: str
    api_key: str | None
    as_json: bool

    @property
    def out(self) -> Console:
        """The console for results: standard output."""
        return _console(stderr=False)

    @property
    def err(self) -> Console:
        """The console for messages: standard error."""
        return _console(stderr=True)

    def client(self) -> Client:
        """Create a client that reports retries on standard error."""
        from api.client import Client  # here, because help and completion need none

        url = self.url if "://" in self.url else f"http://{self.url}"
        return Client(url, self.api_key, retries=_RETRIES, on_retry=self._print_retry)

    def _print_retry(self, reason: str, seconds: float) -> None:
        if seconds >= 1:
            self.err.print(f"{reason}; retrying in {seconds:.0f} s", style="dim", markup=False, highlight=False)

    def show(self, result: Any, screen: Callable[[], RenderableType]) -> None:
        """Print a result: as the API's JSON with `--json`, otherwise as `screen` renders it."""
        if self.as_json:
            typer.echo(json.dumps(_json_value(result), indent=2, ensure_ascii=False))
        else:
            self.out.print(screen(), highlight=False)

    def require_success(self, job: JobDetail) -> None:
        """Exit with code 3 if the followed job did not succeed."""
        if job.state is not JobState.SUCCEEDED:
            raise typer.Exit(JOB_FAILED)

    def print_error(self, error: ApiError) -> None:
        """Print an error, its fields and hints on standard error."""
        if self.as_json:
            fields = [field.model_dump() for field in error.errors]
            problem = {"status": error.status, "code": error.code, "detail": error.detail, "errors": fields}
            typer.echo(json.dumps(problem, indent=2, ensure_ascii=False), err=True)
            return

        lines = [f"dfusion: {error.detail}"]
        if len(error.errors) > 1:
            lines += [f"  {field.pointer or '/'}: {field.message}" for field in error.errors]
        lines += [f"  {hint}" for hint in _hints(error, self.url)]
        self.err.print("\n".join(lines), style="red", markup=False, highlight=False)


def _hints(error: ApiError, url: str) -> list[str]:
    if isinstance(error, UnreachableError):
        return [
            "Start the service with `make serve` or `python -m api`, or set its address with",
            f"--url or DFUSION_URL (now {url}). HTTP_PROXY and NO_PROXY set proxies.",
        ]
    if isinstance(error, UnauthorizedError):
        return ["Set an API key with --api-key or DFUSION_API_KEY."]
    return []


def _json_value(result: Any) -> Any:
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json")
    return result


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _COLUMNS_WITHOUT_TERMINAL)
