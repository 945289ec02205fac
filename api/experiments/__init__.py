"""Experiments: matrices of arms x prompt lists x seeds, run as jobs of a service. Imports no torch.

from api.client import Client
from api.experiments import Experiment, run

experiment = Experiment.load("experiments/shapes-dpo.yaml")
with Client() as client:
    run(experiment, client, Path("experiments/records"))
"""

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
