"""All kinds of stages. Each kind has a module with its inputs, outputs and the stage."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from service.states import StageKind
from worker.stages import compare, evaluate, export, fuse, preview, sample, score, select, train, verify
from worker.stages.base import Stage

STAGES: Mapping[StageKind, Stage[Any, Any]] = MappingProxyType(
    {
        StageKind.SAMPLE: sample.STAGE,
        StageKind.SCORE: score.STAGE,
        StageKind.SELECT: select.STAGE,
        StageKind.FUSE: fuse.STAGE,
        StageKind.VERIFY: verify.STAGE,
        StageKind.TRAIN: train.STAGE,
        StageKind.EVALUATE: evaluate.STAGE,
        StageKind.COMPARE: compare.STAGE,
        StageKind.EXPORT: export.STAGE,
        StageKind.PREVIEW: preview.STAGE,
    }
)
"""The stage of each kind."""
