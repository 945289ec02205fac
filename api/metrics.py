"""Prometheus metrics: requests of all processes of this API; jobs and stages from the database."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPMethod
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.shared_text import SharedText
from service.db.queries import statistics, workers
from service.jobs.limits import free_disk_bytes
from service.service import Service

_METHODS = frozenset(HTTPMethod)
_REQUEST_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
_FRESH_SECONDS = 10.0
"""How long metrics of the database are returned again, at least."""
_REST_PER_READ = 10.0
"""The same in multiples of the time that reading them takes, so that it takes at most a tenth of the time."""
_OUTAGE_SECONDS = 1.0
"""How long the outage of the database is reported again."""


class HttpMetrics:
    """Counts and durations of requests, in a separate registry.

    Args:
        folder: An empty folder, if several processes count. Each has files in it, which every process sums up.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.process = 0
        """The number of this process. The replacement of a process has its number, and continues its counts."""
        self.registry = CollectorRegistry()
        self._exposed = self.registry
        if folder is not None:
            # prometheus_client names the files after `os.getpid` by default: each replacement would add files
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
            values.ValueClass = values.MultiProcessValue(lambda: self.process)
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed, str(folder))

        self._requests = Counter(
            "dfusion_http_requests", "Requests with a response", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "dfusion_http_request_seconds",
            "Time to the end of the response; long polls and event streams count with their full time",
            ("method", "route"),
            registry=self.registry,
            buckets=_REQUEST_BUCKETS,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record a response. `route` is the template; paths would create one series per id."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._exposed)


class InstallationMetrics:
    """Metrics from the database. If it is unavailable, reports only dfusion_database_up = 0 and disk space.

    Reading them scans tables. So all processes use one text for a time.
    """

    def __init__(self, service: Service, shared: SharedText) -> None:
        self._service = service
        self._shared = shared

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self._shared.get(self._read)

    def _read(self) -> tuple[bytes, float]:
        """The metrics from one view of the database, and for how many seconds they are used."""
        started_at = time.monotonic()
        try:
            with self._service.uow.reading() as session:
                families = [family for read in FAMILIES for family in read(session)]
        except SQLAlchemyError:
            families = []
        is_up = bool(families)
        rest_seconds = _REST_PER_READ * (time.monotonic() - started_at)
        used_seconds = max(_FRESH_SECONDS, rest_seconds) if is_up else _OUTAGE_SECONDS

        free = free_disk_bytes(self._service.settings.data_dir)
        about = [
            GaugeMetricFamily("dfusion_database_up", "Whether the database is available", float(is_up)),
            GaugeMetricFamily("dfusion_free_disk_bytes", "Free disk space of the data folder", free),
        ]
        return generate_latest(_Collected([*about, *families])), used_seconds


class _Collected(Collector):
    """Metric families that have been read."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """The families."""
        return self._families


def _jobs(session: Session) -> Iterator[Metric]:
    family = GaugeMetricFamily("dfusion_jobs", "Jobs by state", labels=("state",))
    for state, count in statistics.jobs_by_state(session).items():
        family.add_metric((state,), count)
    yield family


def _queue(session: Session) -> Iterator[Metric]:
    stages = GaugeMetricFamily("dfusion_stages", "Unfinished stages", labels=("state", "kind"))
    for (state, kind), count in statistics.unfinished_stages(session).items():
        stages.add_metric((state, kind), count)
    yield stages
    ready = GaugeMetricFamily("dfusion_stages_ready", "Queued stages that a worker could start", labels=("kind",))
    for kind, count in statistics.ready_stages(session).items():
        ready.add_metric((kind,), count)
    yield ready
    age = statistics.oldest_ready_seconds(session)
    yield GaugeMetricFamily("dfusion_oldest_ready_stage_seconds", "Waiting time of the oldest ready stage", age)


def _workers(session: Session) -> Iterator[Metric]:
    leases = statistics.leases(session)
    yield GaugeMetricFamily("dfusion_workers_busy", "Workers that hold a stage", leases.workers)
    yield GaugeMetricFamily("dfusion_leases_expired", "Running stages with an expired lease", leases.expired)
    failed = statistics.failed_attempts(session)
    attempts = CounterMetricFamily("dfusion_failed_attempts", "Failed attempts of stages", labels=("code",))
    for code, count in failed.items():
        attempts.add_metric((code,), count)
    yield attempts
    lost = failed.get("worker_lost", 0)
    yield CounterMetricFamily("dfusion_lease_losses", "Stages whose worker was lost", lost)


def _outputs(session: Session) -> Iterator[Metric]:
    images = CounterMetricFamily("dfusion_images", "Images by role", labels=("role",))
    for role, count in statistics.images_by_role(session).items():
        images.add_metric((role,), count)
    yield images
    answers = statistics.preference_answers(session)
    yield GaugeMetricFamily("dfusion_preference_answers", "Answers of raters in preference tests", answers)
    seconds = HistogramMetricFamily("dfusion_stage_seconds", "Duration of successful stages", labels=("kind",))
    for kind, times in statistics.stage_seconds(session).items():
        buckets = [
            (str(limit), float(count)) for limit, count in zip(statistics.STAGE_BUCKETS, times.at_most, strict=True)
        ]
        seconds.add_metric((kind,), [*buckets, ("+Inf", float(times.count))], times.total)
    yield seconds


def _memory(session: Session) -> Iterator[Metric]:
    memory = GaugeMetricFamily("dfusion_worker_gpu_memory_bytes", "GPU memory that torch holds", labels=("worker",))
    for worker in workers.all_workers(session):
        if worker.gpu_memory_bytes is not None:
            memory.add_metric((worker.name,), worker.gpu_memory_bytes)
    yield memory


FAMILIES: tuple[Callable[[Session], Iterable[Metric]], ...] = (_jobs, _queue, _workers, _memory, _outputs)
"""What is read from the database."""
