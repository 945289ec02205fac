"""States and kinds of jobs and stages, roles of samples, verdicts and key scopes."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """The state of a job.

    queued       no stage has started
    running      at least one stage has started
    waiting      only a review by people is left to do
    pausing      a pause was requested and a stage is still running
    paused       no stage runs or starts until the job is resumed
    cancelling   a cancel was requested and a stage is still running
    succeeded    every stage of every round has succeeded
    failed       a stage has failed permanently; the remaining stages are cancelled
    cancelled    cancelled before it ended
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
        """Whether the job has ended."""
        return self in FINAL_JOB_STATES


FINAL_JOB_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class StageState(StrEnum):
    """The state of a stage.

    queued      can be claimed as soon as its dependencies have succeeded
    held        cannot be claimed until its job is resumed
    waiting     a review that people do; workers never claim it
    running     claimed under a lease
    succeeded   ended with its results recorded
    failed      ended after its last attempt failed
    cancelled   ended by a cancel or by the failure of its job
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
"""Name of the metric that measures how different the samples of a prompt are. Scorers cannot have this name."""
SHARE = "share:"
"""Start of the names of metrics: the share of a part in the variance of a reward that is a sum. Scorers' names cannot
start so."""


BEST = "best"
"""The alias of the model of the best round of the newest run, unless somebody has set it."""


class JobKind(StrEnum):
    """The kind of a job."""

    ROUND = "round"
    SAMPLING = "sampling"
    FUSION = "fusion"
    TRAINING = "training"
    EVALUATION = "evaluation"
    EXPORT = "export"
    PREVIEW = "preview"


CACHE_KINDS = frozenset({JobKind.PREVIEW})
"""Kinds whose results can be made again at any time. Their jobs are deleted with the jobs that they use."""


class StageKind(StrEnum):
    """The kind of a stage. `worker.stages` implements all kinds except `review`, which people do."""

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
    PREVIEW = "preview"


class QueueName(StrEnum):
    """The queue of a stage: `gpu` for stages that load a model, `cpu` for all others."""

    GPU = "gpu"
    CPU = "cpu"


_CPU_KINDS = frozenset({StageKind.SELECT, StageKind.REVIEW, StageKind.COMPARE})


def queue_of(kind: StageKind) -> QueueName:
    """The queue of a kind of stage."""
    return QueueName.CPU if kind in _CPU_KINDS else QueueName.GPU


class Verdict(StrEnum):
    """A reviewer's judgement of a pair: the target or the base is better, a tie, or neither is usable."""

    TARGET = "target"
    BASE = "base"
    TIE = "tie"
    REJECT = "reject"


MIN_COMPARED_MODELS = 2
MAX_COMPARED_MODELS = 8
"""The most images of a preference test that a rater sees side by side; each has a key."""
MAX_PREFERENCE_QUESTIONS = 1000


class SampleRole(StrEnum):
    """The role of a sample.

    plain        sampled and not in a pair
    reference    the well-aligned sample of a pair
    base         the poorly aligned sample of a pair
    target       fused from a reference and a base
    evaluation   sampled to measure a model
    """

    PLAIN = "plain"
    REFERENCE = "reference"
    BASE = "base"
    TARGET = "target"
    EVALUATION = "evaluation"


class Split(StrEnum):
    """The images that a metric covers: a round's rollout, or an evaluation on training or held-out prompts."""

    ROLLOUT = "rollout"
    TRAIN = "train"
    HELD_OUT = "held_out"


class KeyScope(StrEnum):
    """The scope of an API key.

    read      read everything
    submit    read, and create, change and cancel jobs
    review    read, and give verdicts on pairs
    admin     all of these, and manage API keys
    """

    READ = "read"
    SUBMIT = "submit"
    REVIEW = "review"
    ADMIN = "admin"

    @property
    def includes(self) -> frozenset[KeyScope]:
        """The scopes that this scope grants, itself included."""
        return frozenset(KeyScope) if self is KeyScope.ADMIN else frozenset({self, KeyScope.READ})


class WebhookEvent(StrEnum):
    """Events that webhooks report: a job has ended or waits for verdicts. The values are kinds of events."""

    SUCCEEDED = "job.succeeded"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"
    WAITING = "job.waiting"


class DeliveryState(StrEnum):
    """The state of a delivery to a webhook.

    pending      will be sent, for the first time or again
    delivered    the receiver has accepted it
    failed       the last attempt failed, or the receiver refuses further messages
    """

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
