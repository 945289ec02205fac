"""When a worker process ends itself, and how long a stage may take between two steps."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.pulse import Pulse
from service.settings import Settings
from tests.service import settings_for
from worker import heartbeat as heartbeat_module
from worker.health import is_healthy
from worker.heartbeat import Heartbeat
from worker.watchdog import Watchdog

PATIENCE_SECONDS = 60


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The default times of a lease and of a phase."""
    defaults = Settings(_env_file=None)  # type: ignore[call-arg]
    times = {name: getattr(defaults, name) for name in ("lease_seconds", "stuck_seconds")}
    return settings_for(tmp_path, tmp_path, health_file=str(tmp_path / "alive"), **times)


class Guarded:
    """A started watchdog that sets `ended` instead of ending the process."""

    def __init__(self, settings: Settings) -> None:
        self.pulse = Pulse()
        self.ended = threading.Event()
        self.watchdog = Watchdog(settings, self.pulse, self.ended.set)
        self.watchdog.start()

    def wait_for_beats(self, count: int) -> None:
        end = self.pulse.count + count
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.pulse.count < end:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def guarded(settings: Settings) -> Iterator[Guarded]:
    created = Guarded(settings)
    yield created
    created.watchdog.stop()


def test_a_main_thread_that_is_late_ends_the_process_and_its_signs_of_life(guarded: Guarded) -> None:
    guarded.watchdog.expect("a step", 0.0)
    assert guarded.ended.wait(PATIENCE_SECONDS)
    count = guarded.pulse.count
    time.sleep(1.5)
    assert guarded.pulse.count == count


def test_an_idle_or_timely_main_thread_goes_on(guarded: Guarded, settings: Settings) -> None:
    guarded.watchdog.expect("a step", 3600.0)
    guarded.wait_for_beats(2)
    guarded.watchdog.expect("a late step", 0.0)
    guarded.watchdog.rest()
    os.utime(settings.health_file, (0, 0))
    assert not is_healthy(settings)
    guarded.wait_for_beats(2)
    assert is_healthy(settings)
    assert not guarded.ended.is_set()


class Recorder(Watchdog):
    """Records the time that each activity may take."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.seconds: list[float] = []

    def expect(self, activity: str, seconds: float) -> None:  # noqa: ARG002
        self.seconds.append(seconds)


class Clock:
    """A monotonic clock that the tests advance."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class Steps:
    """A heartbeat without a database, whose steps take as long as a test says."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.recorder = Recorder(settings)
        bench: Any = SimpleNamespace(settings=settings, watchdog=self.recorder)
        claim: Any = SimpleNamespace(stage_id="stage")
        self.heartbeat = Heartbeat(bench, claim, threading.Event())
        self._clock = clock

    def step(self, seconds: float) -> float:
        """Finish a step that has taken this long. Returns how long the next may take."""
        self._clock.seconds += seconds
        self.heartbeat.step()
        return self.recorder.seconds[-1]


@pytest.fixture
def steps(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Steps:
    clock = Clock()
    monkeypatch.setattr(heartbeat_module, "time", clock)
    return Steps(settings, clock)


def test_steps_after_the_second_have_the_time_of_a_lease(steps: Steps) -> None:
    steps.heartbeat.plan(5)
    assert [steps.step(1.0) for _ in range(5)] == [3600, 60, 60, 60, 3600]


def test_long_steps_have_twenty_times_the_longest_without_the_first(steps: Steps) -> None:
    steps.heartbeat.plan(9)
    assert [steps.step(seconds) for seconds in (900, 2, 4, 3, 5)] == [3600, 60, 80, 80, 100]


def test_a_phase_has_an_hour_and_does_not_count_as_a_step(steps: Steps) -> None:
    steps.heartbeat.plan(9)
    for _ in range(3):
        steps.step(1.0)
    with steps.heartbeat.phase("loading a model"):
        assert steps.recorder.seconds[-1] == 3600
        steps._clock.seconds += 600
    assert steps.recorder.seconds[-1] == 60
    assert steps.step(1.0) == 60


def test_steps_that_are_counted_by_their_sum_are_treated_alike(steps: Steps) -> None:
    steps.heartbeat.plan(100)
    for done in (10, 20, 30):
        steps.heartbeat.at(done)
    assert steps.recorder.seconds == [3600, 60, 60]
