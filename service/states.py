"""States of jobs and stages, the kinds of things, and what keys are good for."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is.

    queued       none of its stages has started
    running      at least one stage has started
    waiting      nothing is left to do but people's review
    pausing      a pause was asked for; a stage is still to notice
    paused       nothing of it runs, nothing will until it is resumed
    cancelling   a cancel was asked for; a stage is still to notice
    succeeded    every stage of every round has succeeded
    failed       a stage has failed for good; the rest was called off
    cancelled    it was cancelled before it ended
    """

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL_JOB_STATES


FINAL_JOB_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class StageState(StrEnum):
    """Where a stage is.

    queued    to be claimed as soon as what it needs has succeeded
    held      not to be claimed until its job is resumed
    waiting   for people; no worker does it
    running   under a lease
    """

    QUEUED = "queued"
    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_STAGE_STATES = frozenset({StageState.SUCCEEDED, StageState.FAILED, StageState.CANCELLED})


DIVERSITY = "diversity"
"""The metric that stands beside the scorers' means: how different the samples of a prompt are."""


class JobKind(StrEnum):
    """What a job does."""

    ROUND = "round"
    SAMPLING = "sampling"
    FUSION = "fusion"
    TRAINING = "training"
    EVALUATION = "evaluation"
    EXPORT = "export"


TRAJECTORY_READERS = frozenset({JobKind.FUSION, JobKind.TRAINING})
"""Kinds whose jobs may work on stored trajectories of other jobs."""


class StageKind(StrEnum):
    """What a stage does; worker.stages has a module for each but `review`, which people do."""

    SAMPLE = "sample"
    SCORE = "score"
    SELECT = "select"
    FUSE = "fuse"
    VERIFY = "verify"
    REVIEW = "review"
    TRAIN = "train"
    EVALUATE = "evaluate"
    COMPARE = "compare"
    EXPORT = "export"


class QueueName(StrEnum):
    """Which workers a stage is for: those with a model loaded, or any."""

    GPU = "gpu"
    CPU = "cpu"


_ON_CPU = frozenset({StageKind.SELECT, StageKind.REVIEW, StageKind.COMPARE})


def queue_of(kind: StageKind) -> QueueName:
    """The queue of a stage: choosing and counting need no model."""
    return QueueName.CPU if kind in _ON_CPU else QueueName.GPU


class Verdict(StrEnum):
    """What a person says of a pair: which side is better, that they tie, or that neither is good."""

    TARGET = "target"
    BASE = "base"
    TIE = "tie"
    REJECT = "reject"


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


class KeyScope(StrEnum):
    """What a key is good for.

    read      look at everything            submit   read, and make, change and call off work
    review    read, and judge pairs         admin    all of these, and the keys themselves
    """

    READ = "read"
    SUBMIT = "submit"
    REVIEW = "review"
    ADMIN = "admin"

    @property
    def includes(self) -> frozenset[KeyScope]:
        """Itself and what comes with it."""
        return frozenset(KeyScope) if self is KeyScope.ADMIN else frozenset({self, KeyScope.READ})
