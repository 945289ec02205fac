"""The best round of a run, its alias, and the end of a run at a warning sign; stages are ended with chosen metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from dfusion.rewards import signs
from dfusion.rewards.signs import Sign
from service.db.clock import now_seconds
from service.db.queries import jobs, results, webhooks
from service.db.tables import Event, Job, Metric, Model, WebhookDelivery
from service.errors import LeaseLostError
from service.ids import IdKind, new_id
from service.jobs import execution, watching
from service.jobs.execution import Claim
from service.jobs.kinds import RoundSpec
from service.service import Service, create_job, delete_job, pause_job, raise_rounds, resume_job, set_alias
from service.states import Split, StageKind
from tests.service import PROMPTS, round_body, settings_for

FALLS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
FLAT = [0.5] * 9
Series = Mapping[tuple[str, str], Sequence[float]]
"""The means by split and scorer: of the samples from round 1 on, of an evaluation from round 0 on."""
SATURATED: Series = {("rollout", "brightness"): FLAT, ("rollout", "diversity"): FALLS, ("train", "brightness"): FLAT}
STILL: Series = {("rollout", "brightness"): FLAT, ("train", "brightness"): FLAT}


on_both_databases = pytest.mark.parametrize("service", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    url = request.getfixturevalue("postgres_url") if getattr(request, "param", "sqlite") == "postgresql" else ""
    opened = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=url, shard_prompts=64))
    yield opened
    opened.close()


@pytest.fixture
def _early_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fall from one round to the next (a chance of 1 in 2) is a sign, which otherwise takes five (1 in 120)."""
    monkeypatch.setattr(signs, "LEVEL_ALONE", 0.5)


early_signs = pytest.mark.usefixtures("_early_signs")


def start(service: Service, **changes: Any) -> str:
    body = round_body(prompts=PROMPTS[:1], fusion=None, **changes)
    return create_job(service, RoundSpec.model_validate(body))


def job_of(service: Service, job_id: str) -> Job:
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        assert job.spec["rounds"] == job.rounds
        return job


def events_of(service: Service, job_id: str) -> list[Event]:
    with service.uow.reading() as session:
        return list(jobs.events(session, job_id, 1000, None).rows)


def kinds_of(service: Service, job_id: str) -> list[str]:
    return [event.kind for event in events_of(service, job_id)]


def record(session: Session, held: Claim, series: Series) -> None:
    """Record what the stage of a real worker does: a model, or the metrics of its round."""
    sampled = held.round + (held.kind is StageKind.COMPARE)  # an evaluation measures the model after the round
    model = results.model_before(session, jobs.get(session, held.job_id), sampled)
    if held.kind is StageKind.TRAIN:
        row = Model(
            id=new_id(IdKind.MODEL),
            base="tiny",
            parent_id=model.id,
            job_id=held.job_id,
            stage_id=held.stage_id,
            round=held.round,
            statistics={},
            created_at=now_seconds(),
        )
        return results.add_all(session, [row])

    splits = {StageKind.SELECT: [Split.ROLLOUT], StageKind.COMPARE: [Split.TRAIN, Split.HELD_OUT]}.get(held.kind, [])
    for (split, scorer), means in series.items():
        if split in splits:
            results.add_all(session, [metric(held, model.id, split, scorer, means)])
    return None


def metric(held: Claim, model_id: str, split: str, scorer: str, means: Sequence[float]) -> Metric:
    mean = means[held.round - (split == Split.ROLLOUT)]
    columns: dict[str, Any] = {"version": "1", "count": 4, "std": 0.0, "created_at": now_seconds()}
    return Metric(
        job_id=held.job_id, round=held.round, split=split, scorer=scorer, model_id=model_id, mean=mean, **columns
    )


def claimed(service: Service) -> Claim | None:
    return execution.claim(service.uow, service.settings, "w")


def finish(service: Service, held: Claim, series: Series) -> None:
    execution.finish(service.uow, service.settings, held, partial(record, held=held, series=series))


def run(service: Service, series: Series, until: Callable[[Claim], bool] = lambda _held: False) -> list[Claim]:
    """Finish all stages up to the first one for which `until` is true. Returns them with that one, which is claimed."""
    done = []
    while (held := claimed(service)) is not None:
        done.append(held)
        if until(held):
            break
        finish(service, held, series)
    return done


def ends_round(number: int) -> Callable[[Claim], bool]:
    return lambda held: (held.kind, held.round) == (StageKind.COMPARE, number)


def trained(done: Sequence[Claim]) -> list[int]:
    return [held.round for held in done if held.kind is StageKind.TRAIN]


@early_signs
@pytest.mark.parametrize(
    ("evaluation", "compared"),
    [({}, [0, 1, 2]), ({"every_round": False}, [0, 2]), (None, [])],
)
def test_a_run_stops_at_a_sign_as_if_it_had_only_the_rounds_before(
    service: Service, evaluation: dict[str, Any] | None, compared: list[int]
) -> None:
    with service.uow.writing() as session:
        webhooks.add(session, "https://example.org", ["job.succeeded"], "secret")
    job_id = start(service, rounds=4, evaluation=evaluation, stop_when=["saturation"])
    done = run(service, SATURATED)
    assert trained(done) == [1, 2]
    assert [held.round for held in done if held.kind is StageKind.COMPARE] == compared

    job = job_of(service, job_id)
    assert (job.state, job.rounds, job.work_done) == ("succeeded", 2, job.work_total)
    message = "the reward brightness is at its ceiling while diversity falls"
    assert job.stopped == {"round": 2, "rounds": 4, "sign": "saturation", "reason": message}
    kinds = kinds_of(service, job_id)
    assert kinds[-1] == "job.succeeded"
    assert (kinds.count("job.stopped"), kinds.count("round.saturated")) == (1, 1)
    with service.uow.reading() as session:
        [delivery] = session.scalars(select(WebhookDelivery))
    assert json.loads(delivery.body)["data"]["stopped"] == job.stopped

    short_id = start(service, rounds=2, evaluation=evaluation, stop_when=["saturation"])
    assert job_of(service, short_id).work_total == job.work_total


def test_a_sign_that_does_not_end_the_run_is_a_warning(service: Service) -> None:
    """A fall of five rounds has a chance of 1 in 120."""
    series = {**SATURATED, ("train", "brightness"): [0.1, 0.2, 0.7, 0.6, 0.5, 0.4, 0.3]}
    job_id = start(service, rounds=6, stop_when=["misleading_reward", "collapse"])
    run(service, series)
    job = job_of(service, job_id)
    assert (job.state, job.rounds, job.stopped) == ("succeeded", 6, None)
    warnings = warnings_of(service, job_id)
    assert [event.data["round"] for event in warnings] == [5, 6]
    assert warnings[0].data["best_round"] == 2
    assert warnings[0].message == (
        "the reward brightness is at its ceiling while diversity falls; best so far: round 2"
        " (brightness 0.7 on the training prompts)"
    )


@early_signs
def test_a_round_waits_for_earlier_evaluations_with_its_warning(service: Service) -> None:
    """The evaluation of round 1 ends after those of the later rounds, and that before the first round after all."""
    series = {**SATURATED, ("held_out", "constant"): FALLS}
    job_id = start(service, rounds=3, held_out_prompt_set="shapes-attribute-test")
    late = [run(service, series, until=ends_round(number))[-1] for number in (0, 1)]
    run(service, series)
    assert warnings_of(service, job_id) == []
    finish(service, late[1], series)
    [warning] = warnings_of(service, job_id)
    assert (warning.data["round"], warning.data["falling"]) == (3, ["constant on held-out prompts", "diversity"])
    finish(service, late[0], series)
    assert len(warnings_of(service, job_id)) == 1 and job_of(service, job_id).state == "succeeded"


def warnings_of(service: Service, job_id: str) -> list[Event]:
    return [event for event in events_of(service, job_id) if event.kind == "round.saturated"]


def test_a_round_that_can_end_the_run_is_evaluated_before_the_next_one(service: Service) -> None:
    order = [(held.kind, held.round) for held in _run_of(service, stop_when=["collapse"])]
    assert order.index((StageKind.COMPARE, 1)) < order.index((StageKind.SAMPLE, 2))
    first = start(service, rounds=2, stop_when=["collapse"])
    run(service, STILL, until=ends_round(1))
    assert claimed(service) is None and job_of(service, first).state == "running"


def test_a_round_without_stop_when_does_not_wait_for_the_evaluation(service: Service) -> None:
    start(service, rounds=2)
    run(service, STILL, until=ends_round(1))
    following = claimed(service)
    assert following is not None and (following.kind, following.round) == (StageKind.SAMPLE, 2)


def _run_of(service: Service, **changes: Any) -> list[Claim]:
    start(service, rounds=2, **changes)
    return run(service, STILL)


@early_signs
@on_both_databases
def test_a_lost_worker_neither_stops_twice_nor_repeats_the_warning(service: Service) -> None:
    job_id = start(service, rounds=4, stop_when=["saturation"])
    lost = run(service, SATURATED, until=ends_round(2))[-1]
    assert execution.requeue_stages_of(service.uow, service.settings, "w") == 1
    with pytest.raises(LeaseLostError):
        finish(service, lost, SATURATED)
    assert "job.stopped" not in kinds_of(service, job_id) and job_of(service, job_id).rounds == 4

    with service.uow.writing() as session:
        execution.stages.get(session, lost.stage_id).not_before = 0.0
    again = run(service, SATURATED)
    assert [held.stage_id for held in again] == [lost.stage_id]
    kinds = kinds_of(service, job_id)
    assert (kinds.count("job.stopped"), kinds.count("round.saturated"), kinds.count("job.succeeded")) == (1, 1, 1)


@early_signs
def test_a_paused_run_stops_at_the_sign(service: Service) -> None:
    job_id = start(service, rounds=4, stop_when=["saturation"])
    held = run(service, SATURATED, until=ends_round(2))[-1]
    pause_job(service, job_id)
    finish(service, held, SATURATED)
    assert (job_of(service, job_id).state, job_of(service, job_id).rounds) == ("succeeded", 2)

    second = start(service, rounds=4, stop_when=["saturation"])
    held = run(service, SATURATED, until=ends_round(1))[-1]
    pause_job(service, second)
    finish(service, held, SATURATED)
    assert job_of(service, second).state == "paused" and claimed(service) is None
    resume_job(service, second)
    run(service, SATURATED)
    assert job_of(service, second).rounds == 2


@early_signs
def test_a_stopped_run_can_continue(service: Service) -> None:
    job_id = start(service, rounds=5, stop_when=["saturation"])
    run(service, SATURATED)
    raise_rounds(service, job_id, 3)
    assert trained(run(service, SATURATED)) == [3]
    assert job_of(service, job_id).stopped is None  # it was its last round
    raise_rounds(service, job_id, 6)
    assert trained(run(service, SATURATED)) == [4]  # the sign is still there
    assert (job_of(service, job_id).stopped or {})["round"] == 4

    raise_rounds(service, job_id, 6, ())
    assert trained(run(service, SATURATED)) == [5, 6]
    job = job_of(service, job_id)
    assert (job.rounds, job.stopped, job.spec["stop_when"], job.work_done) == (6, None, [], job.work_total)


def best_of(service: Service, job_id: str) -> tuple[Any, ...] | None:
    best = job_of(service, job_id).best
    return None if best is None else (best["round"], best["split"], best["scorer"], best["mean"])


def alias_of(service: Service, name: str = "best") -> tuple[str | None, int | None] | None:
    """The job and the round of the model that an alias refers to."""
    with service.uow.reading() as session:
        model = results.find_model(session, name)
        if model is None:
            return None
        assert name in results.aliases(session, [model.id])[model.id]
        return model.job_id, model.round


def held_out(means: Sequence[float]) -> dict[str, Any]:
    series = {("rollout", "brightness"): FLAT, ("train", "brightness"): [0.1, 0.2, 0.3, 0.4]}
    return series | {("held_out", "brightness"): [0.4, 0.3, 0.2, 0.1], ("held_out", "constant"): means}


MEASURED = {"held_out_prompt_set": "shapes-attribute-test", "watch": "constant"}


def test_the_best_round_is_updated_while_the_run_goes_on(service: Service) -> None:
    job_id = start(service, rounds=2, **MEASURED)
    series = held_out([0.2, 0.5, 0.8])
    run(service, series, until=ends_round(1))
    assert best_of(service, job_id) is None and alias_of(service) is None

    with service.uow.writing() as session:
        [held] = execution.stages.running_under(session, "w")
    assert execution.requeue_stages_of(service.uow, service.settings, "w") == 1
    with service.uow.writing() as session:
        execution.stages.get(session, held.id).not_before = 0.0
    run(service, series, until=ends_round(2))
    assert best_of(service, job_id) == (1, "held_out", "constant", 0.5)
    assert alias_of(service) == (job_id, 1)


def test_the_last_round_is_not_the_best_and_ties_go_to_the_earliest(service: Service) -> None:
    job_id = start(service, rounds=2, **MEASURED)
    run(service, held_out([0.2, 0.8, 0.8]))
    assert best_of(service, job_id) == (1, "held_out", "constant", 0.8)
    assert alias_of(service) == (job_id, 1)


def test_a_run_that_only_got_worse_has_the_model_before_it_as_its_best(service: Service) -> None:
    job_id = start(service, rounds=1, **MEASURED)
    run(service, held_out([0.8, 0.5]))
    assert best_of(service, job_id) == (0, "held_out", "constant", 0.8)
    assert alias_of(service) == (None, None)  # the base model
    assert (job_of(service, job_id).best or {})["model"] == job_of(service, job_id).model_id


def test_a_run_without_evaluation_has_no_best_round(service: Service) -> None:
    job_id = start(service, rounds=2, evaluation=None)
    run(service, STILL)
    assert job_of(service, job_id).best is None and alias_of(service) is None


@on_both_databases
def test_the_alias_best_is_of_the_newest_run_unless_somebody_sets_it(service: Service) -> None:
    rising = held_out([0.2, 0.5, 0.6, 0.7])
    first = start(service, rounds=1, **MEASURED)
    run(service, rising)
    second = start(service, rounds=1, **MEASURED)
    assert alias_of(service) == (first, 1)  # the newer run has measured nothing yet
    run(service, rising)
    assert alias_of(service) == (second, 1)
    raise_rounds(service, first, 2)
    run(service, rising)
    assert best_of(service, first) == (2, "held_out", "constant", 0.6)
    assert alias_of(service) == (second, 1)

    model = (job_of(service, first).best or {})["model"]
    set_alias(service, "best", model)
    assert alias_of(service) == (first, 2)
    with service.uow.writing() as session:
        assert results.remove_alias(session, "best")
    assert alias_of(service) == (second, 1)


def test_the_alias_best_does_not_prevent_a_deletion(service: Service) -> None:
    rising = held_out([0.2, 0.5])
    first, second = (start(service, rounds=1, **MEASURED) for _ in range(2))
    run(service, rising)
    assert alias_of(service) == (second, 1)
    delete_job(service, second)
    assert alias_of(service) == (first, 1)
    delete_job(service, first)
    assert alias_of(service) is None


def test_the_name_of_a_sum_is_that_of_its_scores(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has the parts of the sum; the scoring stages record its name."""
    named: list[str] = []

    def recorded(_means: object, reward: str) -> Sign | None:
        named.append(reward)
        return None

    monkeypatch.setattr(watching, "warning_sign", recorded)
    parts = [{"scorer": "brightness", "weight": 2.0}, {"scorer": "constant", "weight": 1.0}]
    start(service, rounds=1, reward={"kind": "weighted", "parts": parts}, evaluation=None)

    def record_with_summary(session: Session, held: Claim) -> None:
        if held.kind is StageKind.SCORE:
            scorers = [{"name": "2.0*brightness+1.0*constant", "version": "1"}]
            execution.stages.set_summary(session, held.stage_id, {"scorers": scorers})
        record(session, held, {})

    while (held := claimed(service)) is not None:
        execution.finish(service.uow, service.settings, held, partial(record_with_summary, held=held))
    assert named == ["2.0*brightness+1.0*constant"]
