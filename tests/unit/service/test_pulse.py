"""How a parent measures the silence of its child, with a clock that the tests set."""

import os
from tempfile import TemporaryFile

import pytest

from service import pulse as pulse_module
from service.pulse import Pulse, PulseMonitor


class Clock:
    """A monotonic clock that the tests advance."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse_module, "time", clock)
    return clock


def looks(monitor: PulseMonitor, clock: Clock, count: int, every_seconds: float = 1.0) -> list[bool]:
    results = []
    for _ in range(count):
        clock.seconds += every_seconds
        results.append(monitor.is_hung())
    return results


def test_a_child_is_hung_after_a_lease_without_a_beat(clock: Clock) -> None:
    monitor = PulseMonitor(Pulse(), lease_seconds=60)
    assert looks(monitor, clock, 61) == [False] * 60 + [True]
    assert monitor.silent_seconds == 61


def test_a_beat_starts_the_time_again(clock: Clock) -> None:
    pulse = Pulse()
    monitor = PulseMonitor(pulse, lease_seconds=60)
    looks(monitor, clock, 59)
    pulse.beat()
    assert looks(monitor, clock, 61)[-2:] == [False, False]
    assert monitor.silent_seconds == 60


def test_time_in_which_the_parent_was_stopped_does_not_count(clock: Clock) -> None:
    """A laptop that slept for an hour: both processes were stopped."""
    monitor = PulseMonitor(Pulse(), lease_seconds=60)
    looks(monitor, clock, 50)
    assert looks(monitor, clock, 1, every_seconds=3600) == [False]
    assert monitor.silent_seconds == 52


def test_a_short_lease_leaves_a_child_time_to_start(clock: Clock) -> None:
    monitor = PulseMonitor(Pulse(), lease_seconds=3)
    assert looks(monitor, clock, 31) == [False] * 30 + [True]


def test_a_new_child_starts_at_zero(clock: Clock) -> None:
    monitor = PulseMonitor(Pulse(), lease_seconds=60)
    looks(monitor, clock, 61)
    monitor.restart()
    assert monitor.silent_seconds == 0
    assert looks(monitor, clock, 1) == [False]


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_parent_sees_the_beats_of_its_child(through_a_file: bool) -> None:
    with TemporaryFile() as file:
        file.truncate(1)
        pulse = Pulse(file.fileno()) if through_a_file else Pulse()
        child = os.fork()
        if child == 0:
            (Pulse(file.fileno()) if through_a_file else pulse).beat()
            os._exit(0)
        os.waitpid(child, 0)
        assert pulse.count == 1
