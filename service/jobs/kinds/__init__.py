"""The kinds of jobs. Each module defines one kind: its spec, check, count and plan.

The modules do not import the tables, so that clients can build requests from them.
docs/how-to/add-a-job-kind.md describes how to add a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from service.jobs.kinds import evaluation, export, fusion, preview, rounds, sampling, training
from service.jobs.kinds.base import Kind, Name, ScorerRef, ScorerRefs, Seed
from service.jobs.kinds.evaluation import EvaluationJobSpec
from service.jobs.kinds.export import ExportJobSpec
from service.jobs.kinds.fusion import FusionJobSpec
from service.jobs.kinds.preview import PreviewJobSpec
from service.jobs.kinds.rounds import EvaluationSpec, RoundSpec
from service.jobs.kinds.sampling import SamplingJobSpec
from service.jobs.kinds.training import TrainingJobSpec
from service.states import JobKind

__all__ = [
    "KINDS",
    "EvaluationJobSpec",
    "EvaluationSpec",
    "ExportJobSpec",
    "FusionJobSpec",
    "JobSpec",
    "Kind",
    "Name",
    "PreviewJobSpec",
    "RoundSpec",
    "SamplingJobSpec",
    "ScorerRef",
    "ScorerRefs",
    "Seed",
    "TrainingJobSpec",
    "kind_of",
    "spec_of",
]

JobSpec = (
    RoundSpec | SamplingJobSpec | FusionJobSpec | TrainingJobSpec | EvaluationJobSpec | ExportJobSpec | PreviewJobSpec
)

KINDS: Mapping[JobKind, Kind[Any]] = MappingProxyType(
    {module.KIND.name: module.KIND for module in (rounds, sampling, fusion, training, evaluation, export, preview)}
)
"""Every kind of job by its name."""

_BY_SPEC = MappingProxyType({kind.spec: kind for kind in KINDS.values()})


def kind_of(spec: JobSpec) -> Kind[Any]:
    """The kind of job that this spec requests."""
    return _BY_SPEC[type(spec)]


def spec_of(kind: str, stored: Mapping[str, Any]) -> JobSpec:
    """The spec of a stored job, validated again."""
    spec: JobSpec = KINDS[JobKind(kind)].spec.model_validate(stored)
    return spec
