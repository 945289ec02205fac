"""What the metrics of a run say after each round: its best round, and warning signs, which can end it.

`dfusion.rewards.signs` has the definitions. Both are recorded in the transaction that ends a round, so that a repeated
attempt of a stage neither repeats a warning nor stops twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session

from dfusion.rewards.config import WeightedScorerConfig
from dfusion.rewards.signs import Measured, Sign, best_round, warning_sign
from service.db.queries import jobs, results
from service.db.tables import Job
from service.jobs.kinds import RoundSpec, ScorerRef
from service.jobs.kinds.rounds import evaluated_rounds, plan_last_evaluation, totals_after
from service.plan import PlannedStage, Sizes
from service.states import SHARE, Split

EVENT_KINDS = {
    "misleading_reward": "round.reward_misleads",
    "saturation": "round.saturated",
    "collapse": "round.collapsed",
}
"""The kind of event of each warning sign."""
_PLACES = {
    Split.HELD_OUT: "on held-out prompts",
    Split.TRAIN: "on the training prompts",
    Split.ROLLOUT: "on the samples of the rounds",
}


def watch(session: Session, job: Job, spec: RoundSpec, round_number: int, stage_id: str) -> Sign | None:
    """Update the best round of a job, and warn if there is a sign in the metrics until this round.

    Without an evaluation there is no best round, since no two models are measured on the same seeds. While the
    evaluation of an earlier round runs there is no warning: its end looks at this round, too.

    Args:
        session: The transaction that ends the round.
        job: The job, whose row is locked.
        spec: Its request.
        round_number: The round; 0 is the evaluation before the first one.
        stage_id: The stage that ends it.

    Returns:
        The sign.
    """
    # 1. the metrics
    rows = results.means(session, job.id)
    means = _watched(spec, rows)
    reward = _name_of(spec.reward) or ""

    # 2. the best round
    best = best_round(means, reward, _name_of(spec.watch))
    if best is not None and best.split != Split.ROLLOUT:
        model_id = next(row.model_id for row in rows if (row.round, row.split) == (best.round, best.split))
        value = {"round": best.round, "model": model_id, "split": best.split, "scorer": best.scorer, "mean": best.mean}
        jobs.set_best(session, job.id, value)

    # 3. the warning; the last evaluation of a run that has stopped does not repeat it
    measured = {row.round for row in rows if row.split != Split.ROLLOUT}
    newest = _newest_complete(spec, round_number, measured)
    if newest is None or job.stopped is not None:
        return None
    sign = warning_sign([mean for mean in means if mean.round <= newest], reward)
    if sign is not None:
        kind = EVENT_KINDS[sign.name]
        data = {"round": newest, "falling": list(sign.falling), "best_round": best and best.trained_rounds}
        jobs.add_event(session, job.id, kind, _message(sign, best), stage_id, **data)
    return sign


def _newest_complete(spec: RoundSpec, round_number: int, measured: set[int]) -> int | None:
    """The newest round with all its metrics and those of the rounds before it.

    Args:
        spec: The request of the job.
        round_number: The round that ends.
        measured: The rounds whose evaluation has ended.

    Returns:
        This round, or a later one that waited for its evaluation. None if an earlier evaluation has not ended, and
        for round 0, which no warning is about.
    """
    pending = min(set(evaluated_rounds(spec)) - measured - {0}, default=spec.rounds + 1)
    if round_number == 0 or pending < round_number:
        return None
    return max([round_number, *(number for number in measured if number < pending)])


def _name_of(scorer: ScorerRef | None) -> str | None:
    return scorer.name if isinstance(scorer, WeightedScorerConfig) else scorer


def _watched(spec: RoundSpec, rows: Iterable[Row[int, str, str, str, float, str]]) -> list[Measured]:
    """The means of a job without those that belong to a reward that is a sum: of its parts, and their shares."""
    parts = _parts_of_reward(spec)
    means = []
    for row in rows:
        if row.split != Split.ROLLOUT or not (row.scorer in parts or row.scorer.startswith(SHARE)):
            means.append(Measured(row.round, row.split, row.scorer, row.mean, row.version))
    return means


def _parts_of_reward(spec: RoundSpec) -> set[str]:
    """The scorers that the reward is a sum of: one of them may fall for the sum to rise, so none is a warning sign."""
    if not isinstance(spec.reward, WeightedScorerConfig):
        return set()
    return {part.scorer for part in spec.reward.parts if part.scorer != spec.watch}


def _message(sign: Sign, best: Measured | None) -> str:
    hacking = ": possible reward hacking" if sign.name == "misleading_reward" else ""
    if best is None:
        return f"{sign}{hacking}"
    number = best.trained_rounds
    name = f"round {number}" if number else "the model before the first round"
    return f"{sign}{hacking}; best so far: {name} ({best.scorer} {best.mean:.3g} {_PLACES[Split(best.split)]})"


def stop(
    session: Session, job: Job, spec: RoundSpec, sizes: Sizes, round_number: int, sign: Sign
) -> list[PlannedStage]:
    """Let a job end after a round that is not its last one. Its number of rounds becomes that of this round.

    Args:
        session: The transaction that ends the round.
        job: The job, whose row is locked.
        spec: Its request.
        sizes: The sizes of what the request names.
        round_number: The round.
        sign: The reason.

    Returns:
        The evaluation of the last model, if the plan had it after a later round.
    """
    # 1. the stages that are no longer planned
    last = plan_last_evaluation(spec, round_number, sizes)
    left_out = sum(further.work for further in totals_after(spec, round_number, sizes).values())
    work = left_out - sum(stage.work for stage in last)

    # 2. the job
    message = f"the job stops after round {round_number} of {spec.rounds}: {sign}"
    stopped: dict[str, Any] = {"round": round_number, "rounds": spec.rounds, "sign": sign.name, "reason": str(sign)}
    jobs.shorten(session, job.id, round_number, job.spec | {"rounds": round_number}, work, stopped)
    jobs.add_event(session, job.id, "job.stopped", message, **stopped)
    return last
