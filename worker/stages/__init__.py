"""What each kind of stage does: a function from its context to what is written when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from service.states import StageKind
from worker.context import Record, StageContext
from worker.stages import compare, evaluate, export, fuse, sample, score, select, train, verify

HANDLERS: Mapping[StageKind, Callable[[StageContext], Record]] = {
    StageKind.SAMPLE: sample.run,
    StageKind.SCORE: score.run,
    StageKind.SELECT: select.run,
    StageKind.FUSE: fuse.run,
    StageKind.VERIFY: verify.run,
    StageKind.TRAIN: train.run,
    StageKind.EVALUATE: evaluate.run,
    StageKind.COMPARE: compare.run,
    StageKind.EXPORT: export.run,
}
