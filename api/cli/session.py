"""What every command is given: where the service is, and how to answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType

from api.client import ApiError, Client, UnauthorizedError, UnreachableError
from api.wire.jobs import JobDetail
from service.states import JobState

ERROR, JOB_FAILED, INTERRUPTED = 1, 3, 130
"""Exit codes beside 0, and 2 for a wrong command line."""
_RETRIES = 3
_WIDE = 160
"""Columns where no terminal says how many: a pipe or a file gets whole lines."""


@dataclass(frozen=True)
class Session:
    """A run of the command line."""

    url: str
    api_key: str | None
    as_json: bool

    @property
    def out(self) -> Console:
        """Where answers go."""
        return _console(stderr=False)

    @property
    def err(self) -> Console:
        """Where everything else goes."""
        return _console(stderr=True)

    def client(self) -> Client:
        """A client that says on standard error when it has to try again."""
        url = self.url if "://" in self.url else f"http://{self.url}"
        return Client(url, self.api_key, retries=_RETRIES, on_retry=self._retrying)

    def _retrying(self, why: str, seconds: float) -> None:
        if seconds >= 1:
            self.err.print(f"{why}; again in {seconds:.0f} s", style="dim", markup=False, highlight=False)

    def answer(self, found: Any, screen: Callable[[], RenderableType]) -> None:
        """Show what was found: as the API's JSON, or as `screen` draws it."""
        if self.as_json:
            typer.echo(json.dumps(_plain(found), indent=2, ensure_ascii=False))
        else:
            self.out.print(screen(), highlight=False)

    def ended(self, job: JobDetail) -> None:
        """Exit with 3 if a job that was followed did not succeed."""
        if job.state is not JobState.SUCCEEDED:
            raise typer.Exit(JOB_FAILED)

    def complain(self, error: ApiError) -> None:
        """Say what went wrong, on standard error."""
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
            "Start the service with `make serve` or `python -m api`, or say where it is:",
            f"--url or DFUSION_URL (now {url}). Proxies are taken from HTTP_PROXY and NO_PROXY.",
        ]
    if isinstance(error, UnauthorizedError):
        return ["Give an API key with --api-key or DFUSION_API_KEY."]
    return []


def _plain(found: Any) -> Any:
    if isinstance(found, BaseModel):
        return found.model_dump(mode="json")
    return found


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _WIDE)
