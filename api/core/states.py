"""States of jobs and stages, and the kinds of things."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is.

    queued       none of its stages has started
    running      at least one stage has started
    cancelling   a cancel was asked for; a stage is still to notice
    succeeded    every stage of every round has succeeded
    failed       a stage has failed for good; the rest was called off
    cancelled    it was cancelled before it ended
    """

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL_JOB_STATES


FINAL_JOB_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class StageState(StrEnum):
    """Where a stage is: queued (also while it waits for others), running under a lease, or at an end."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobKind(StrEnum):
    """What a job does."""

    ROUND = "round"


class StageKind(StrEnum):
    """What a stage does; worker.stages has a module for each."""

    SAMPLE = "sample"
    SCORE = "score"
    SELECT = "select"
    FUSE = "fuse"
    VERIFY = "verify"
    TRAIN = "train"
    EVALUATE = "evaluate"


class SampleRole(StrEnum):
    """What a sample is for.

    plain        sampled, in no pair        reference   the well-aligned sample of a pair
    base         the poorly-aligned one     target      fused from the two
    evaluation   made to measure a model
    """

    PLAIN = "plain"
    REFERENCE = "reference"
    BASE = "base"
    TARGET = "target"
    EVALUATION = "evaluation"


class Split(StrEnum):
    """Which images a metric is over: the round's own samples, or a model's on training or held-out prompts."""

    ROLLOUT = "rollout"
    TRAIN = "train"
    HELD_OUT = "held_out"
