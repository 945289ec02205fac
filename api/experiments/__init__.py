"""Experiments: matrices of arms x prompt lists x seeds, run as jobs of a service. Imports no torch.

The public names are loaded on first use, since the command line needs them only for its experiment commands.

from api.client import Client
from api.experiments import Experiment, run

experiment = Experiment.load("experiments/shapes-dpo.yaml")
with Client() as client:
    run(experiment, client, Path("experiments/records"))
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from api.experiments.cells import Cell, Selection, cells_of
    from api.experiments.errors import ExperimentError, FormatError, MissingExtraError, RecordError
    from api.experiments.format import Experiment
    from api.experiments.records import Record, read_record
    from api.experiments.reporting import Report, report
    from api.experiments.runner import Failure, RunResult, State, run

__all__ = [
    "Cell",
    "Experiment",
    "ExperimentError",
    "Failure",
    "FormatError",
    "MissingExtraError",
    "Record",
    "RecordError",
    "Report",
    "RunResult",
    "Selection",
    "State",
    "cells_of",
    "read_record",
    "report",
    "run",
]

_HOME: Mapping[str, str] = MappingProxyType(
    {
        "Cell": "cells",
        "Experiment": "format",
        "ExperimentError": "errors",
        "Failure": "runner",
        "FormatError": "errors",
        "MissingExtraError": "errors",
        "Record": "records",
        "RecordError": "errors",
        "Report": "reporting",
        "RunResult": "runner",
        "Selection": "cells",
        "State": "runner",
        "cells_of": "cells",
        "read_record": "records",
        "report": "reporting",
        "run": "runner",
    }
)
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
