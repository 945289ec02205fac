import pytest

from service.db.tables import Job, Stage
from service.jobs.progress import Progress, progress_of


def stage(state: str, work: float, done: int = 0, total: int = 0) -> Stage:
    started = None if state == "queued" else 1.0
    return Stage(
        kind="train", round=2, state=state, work=work, progress_done=done, progress_total=total, started_at=started
    )


def test_percent_is_the_share_of_the_work() -> None:
    job = Job(state="running", work_total=200.0, started_at=1000.0, finished_at=None)
    progress = progress_of(job, [stage("succeeded", 30), stage("running", 40, 5, 20), stage("queued", 50)], now=1080.0)
    # 30 + 40 / 4 of 200 in 80 seconds: 20 %, so 320 seconds are left
    assert progress == Progress("train", 2, 5, 20, 20.0, 320.0)


@pytest.mark.parametrize("total", [0, 5])
def test_percent_never_exceeds_100(total: int) -> None:
    job = Job(state="running", work_total=10.0, started_at=0.0, finished_at=None)
    assert progress_of(job, [stage("running", 10, 9, total)], now=1.0).percent == (100.0 if total else 0.0)


def test_an_ended_job_has_no_eta() -> None:
    job = Job(state="succeeded", work_total=100.0, started_at=0.0, finished_at=9.0)
    progress = progress_of(job, [stage("succeeded", 60)], now=50.0)
    assert (progress.percent, progress.eta_seconds, progress.stage) == (100.0, None, None)
