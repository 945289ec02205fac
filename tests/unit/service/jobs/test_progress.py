import pytest

from service.db.queries.stages import RunningStage
from service.db.tables import Job
from service.jobs.progress import Progress, progress_of


def job(
    state: str,
    work_total: float,
    work_done: float,
    started_at: float,
    rest_since: float | None = None,
    rest_seconds: float = 0.0,
) -> Job:
    return Job(
        state=state,
        work_total=work_total,
        work_done=work_done,
        last_round=1,
        started_at=started_at,
        rest_since=rest_since,
        rest_seconds=rest_seconds,
    )


def running(work: float, done: int, total: int) -> RunningStage:
    return RunningStage("train", 2, 3, 4, work, 1, done, total)


def test_percent_is_the_share_of_the_work() -> None:
    progress = progress_of(job("running", 200.0, 30.0, 1000.0), [running(40, 5, 20)], now=1080.0)
    # 30 + 40 / 4 of 200 in 80 seconds: 20 %, so 320 seconds are left
    assert progress == Progress("train", 2, 3, 4, 5, 20, 20.0, 320.0)


@pytest.mark.parametrize("total", [0, 5])
def test_percent_never_exceeds_100(total: int) -> None:
    unfinished = job("running", 10.0, 0.0, 0.0)
    assert progress_of(unfinished, [running(10, 9, total)], now=1.0).percent == (100.0 if total else 0.0)


def test_a_job_between_two_stages_shows_the_last_round() -> None:
    progress = progress_of(job("running", 100.0, 60.0, 0.0), [], now=6.0)
    assert progress == Progress(None, 1, None, 0, 0, 0, 60.0, 4.0)


def test_an_ended_job_has_no_eta() -> None:
    progress = progress_of(job("succeeded", 100.0, 60.0, 0.0, rest_since=9.0), [], now=50.0)
    assert (progress.percent, progress.eta_seconds, progress.stage) == (100.0, None, None)


def test_rests_do_not_count_in_the_eta() -> None:
    """A third of the work took 20 of 120 seconds: 40 seconds are left."""
    continued = job("running", 90.0, 30.0, 1000.0, rest_seconds=100.0)
    assert progress_of(continued, [], now=1120.0).eta_seconds == 40.0


def test_a_job_that_rests_has_no_eta() -> None:
    assert progress_of(job("paused", 90.0, 30.0, 1000.0, rest_since=1020.0), [], now=1120.0).eta_seconds is None
