import os
import time
from collections.abc import Callable
from pathlib import Path

from service.db.queries import workers
from service.service import Service
from tests.service import settings_for
from worker.presence import Presence


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_is_listed_until_it_ends_and_can_start_before_its_database(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, tmp_path, presence_seconds=0.01)
    service = Service.open(settings)
    failures = iter([OSError("not yet")])

    def uow() -> object:
        for error in failures:
            raise error
        return service.uow

    presence = Presence(settings, "one", ("gpu",), uow, lambda: ("cpu", "tiny", None))  # type: ignore[arg-type]

    def rows() -> list[tuple[str, int, str | None]]:
        with service.uow.reading() as session:
            return [(row.name, row.pid, row.model) for row in workers.all_workers(session)]

    presence.start()
    until(lambda: rows() == [("one", os.getpid(), "tiny")])
    presence.stop()
    assert rows() == []
    service.close()
