"""Errors of the experiment runner.

ExperimentError
  FormatError         the file does not describe an experiment; `errors` names every wrong field
  RecordError         a record cannot be read, or does not fit the experiment
  MissingExtraError   an optional package is not installed
"""

from __future__ import annotations

from collections.abc import Sequence

from api.wire.common import FieldError


class ExperimentError(Exception):
    """Base class of the runner's errors. `code` is machine-readable, `errors` names the wrong fields."""

    code = "experiment"

    def __init__(self, message: str, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)


class FormatError(ExperimentError):
    """The file does not describe an experiment."""

    code = "invalid_experiment"


class RecordError(ExperimentError):
    """A record cannot be read, or does not fit the experiment."""

    code = "invalid_record"


class MissingExtraError(ExperimentError):
    """An optional package is not installed."""

    code = "missing_package"

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'dfusion[experiments]'")
