"""The root command: accepts its options anywhere on the line and converts errors to exit codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import typer
from typer.core import TyperGroup

from api.cli.session import ERROR, INTERRUPTED, Session
from api.client import ApiError
from api.experiments.errors import ExperimentError

_FLAGS = frozenset({"--json"})
_WITH_VALUE = frozenset({"--url", "--api-key"})


class RootGroup(TyperGroup):
    """The group of all `dfusion` commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return list(super().parse_args(ctx, hoist_root_options(args)))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ApiError as error:
            _session(ctx).print_error(error)
            raise typer.Exit(ERROR) from error
        except ExperimentError as error:
            _session(ctx).print_error(ApiError(str(error), code=error.code, errors=error.errors))
            raise typer.Exit(ERROR) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            _session(ctx).print_error(ApiError(str(error), code="file"))
            raise typer.Exit(ERROR) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def hoist_root_options(args: Sequence[str]) -> list[str]:
    """Move the root's options to the front, from anywhere before `--`."""
    root_options: list[str] = []
    others: list[str] = []
    remaining: Iterable[str] = iter(args)

    for word in remaining:
        name, equals, _ = word.partition("=")
        if word == "--":
            others += [word, *remaining]
        elif word in _FLAGS:
            root_options.append(word)
        elif name in _WITH_VALUE:
            root_options += [word, *([] if equals else islice(remaining, 1))]
        else:
            others.append(word)

    return root_options + others


def _session(ctx: Any) -> Session:
    session = ctx.obj
    return session if isinstance(session, Session) else Session("", None, False)
