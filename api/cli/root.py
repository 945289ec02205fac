"""The root command: its options may stand anywhere on the line, and what the service refuses is an exit code."""

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
    """`dfusion`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return list(super().parse_args(ctx, hoisted(args)))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ApiError as error:
            _session(ctx).complain(error)
            raise typer.Exit(ERROR) from error
        except ExperimentError as error:
            _session(ctx).complain(ApiError(str(error), code=error.code, errors=error.errors))
            raise typer.Exit(ERROR) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            _session(ctx).complain(ApiError(str(error), code="file"))
            raise typer.Exit(ERROR) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def hoisted(args: Sequence[str]) -> list[str]:
    """The line with the root's options first, wherever they stood before `--`."""
    own: list[str] = []
    rest: list[str] = []
    left: Iterable[str] = iter(args)
    for word in left:
        name, given, _ = word.partition("=")
        if word == "--":
            rest += [word, *left]
        elif word in _FLAGS:
            own.append(word)
        elif name in _WITH_VALUE:
            own += [word, *([] if given else islice(left, 1))]
        else:
            rest.append(word)
    return own + rest


def _session(ctx: Any) -> Session:
    found = ctx.obj
    return found if isinstance(found, Session) else Session("", None, False)
