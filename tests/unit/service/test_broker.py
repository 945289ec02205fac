import logging
from pathlib import Path
from typing import Any

import pytest

from service.broker import CeleryQueue, make_celery, open_queue
from service.queue import SilentQueue
from service.settings import Settings
from tests.servers import free_port
from tests.service import settings_for


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return settings_for(tmp_path, tmp_path, **changes)


def test_celery_neither_stores_results_nor_redelivers_messages(tmp_path: Path) -> None:
    conf = make_celery(settings(tmp_path, broker_url="redis://127.0.0.1:1/0", worker_max_memory_mb=3)).conf
    expected = {
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "worker_concurrency": 1,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "broker_connection_max_retries": None,
        "worker_soft_shutdown_timeout": 60,
        "worker_max_memory_per_child": 3072,
        "broker_transport_options": {
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "health_check_interval": 25,
        },
    }

    assert {name: conf[name] for name in expected} == expected


def test_without_a_broker_the_queue_is_silent(tmp_path: Path) -> None:
    assert isinstance(open_queue(settings(tmp_path)), SilentQueue)


def test_an_unreachable_broker_only_logs_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = open_queue(settings(tmp_path, broker_url=f"redis://:open-sesame@127.0.0.1:{free_port()}/0"))
    assert isinstance(queue, CeleryQueue)
    with caplog.at_level(logging.WARNING):
        queue.hint([("stg_1", "gpu"), ("stg_2", "cpu")])
        queue._pending.put(None)
        queue._thread.join(60)
    assert ["stg_1" in caplog.messages[0], "stg_2" in caplog.messages[1], len(caplog.messages)] == [True, True, 2]
    assert "open-sesame" not in caplog.text


def test_the_brokers_password_reaches_a_child_process_but_never_appears_in_text(tmp_path: Path) -> None:
    configured = settings(tmp_path, broker_url="redis://:open-sesame@127.0.0.1:1/0")
    assert "open-sesame" not in repr(configured)
    assert configured.for_child()["DFUSION_BROKER_URL"] == "redis://:open-sesame@127.0.0.1:1/0"
