"""Installations for the test of the contract, and the attacks of `tests.contract.hostile` on them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.tables import ApiKey, Event, Job, Model, PromptSet, Stage, Webhook
from service.ids import ids_in
from service.service import Service
from tests.contract import hostile
from tests.contract.hostile import Attack, Attacker, Target, operations
from tests.contract.wire import CLOSED, read_reply
from tests.deployment import ADMIN_KEY, FINAL, Deployment, deployment
from tests.service import PROMPTS, round_body, row_counts, work_until_idle

MANY = 1_000_000
REQUEST_SECONDS = 3.0
"""The service's time limit for receiving a request, which the slow attackers wait for."""
SLOW_CONNECTIONS = 30
"""Of each kind; all together are more than the threads that serve requests."""


@contextmanager
def contract_site(mode: str, folder: Path, pipeline: Path) -> Iterator[Deployment]:
    """A service with API keys and without a worker, with a finished round, a preference test and a queued job."""
    settings = {"embedded_worker": False, "auth": True, "max_queued_jobs": MANY, "max_queued_jobs_per_key": MANY}
    settings |= {"request_seconds": REQUEST_SECONDS, "webhooks_allow_loopback": True}
    with deployment(mode, folder, pipeline, has_workers=False, **settings) as started:
        job = started.post("/rounds", round_body())
        work_until_idle(started.service)
        assert started.get(f"/jobs/{job}")["state"] == "succeeded"
        with started.client() as client:  # protects the round from deletion
            model = ids(started, "/models")[0]
            client.put("/aliases/champion", json={"model": model}).raise_for_status()
            evaluation = _evaluated(started, model)
            client.post("/preference-tests", json={"evaluation": evaluation}).raise_for_status()
        started.post("/samplings", {"model": "tiny", "prompt_set": "shapes-attribute-train", "scorers": ["brightness"]})
        yield started


def _evaluated(installation: Deployment, model: str) -> str:
    """Run an evaluation of the base model and this one. Returns its id."""
    job = installation.post("/evaluations", _evaluation(model))
    work_until_idle(installation.service)
    assert installation.get(f"/jobs/{job}")["state"] == "succeeded"
    return job


def _evaluation(model: str) -> dict[str, Any]:
    one_image = {"samples_per_prompt": 1, "sampling": {"num_steps": 4}}
    return {"models": ["tiny", model], "prompts": PROMPTS[:1], "scorers": ["brightness"], **one_image}


def ids(installation: Deployment, path: str) -> list[str]:
    """The ids of the first entries of a list."""
    return [entry["id"] for entry in installation.get(f"{path}?limit=5")["data"]]


class Siege:
    """All attacks on one installation, with what must hold after them.

    Args:
        installation: The installation.
        every: Send only each n-th attack of a group.
    """

    def __init__(self, installation: Deployment, every: int = 1) -> None:
        self._installation = installation
        self._every = every
        with installation.client() as client:
            self.target = _target(installation, client)
        with self._service.uow.reading() as session:
            self._ids_before = _created(session)
        secrets = [*installation.secrets, *self.target.scoped_keys.values()]
        self.attacker = Attacker(installation.settings.port, secrets)
        self.watcher = Attacker(installation.settings.port, secrets)
        """The client that reads /healthz during the attack."""

    @property
    def failures(self) -> list[str]:
        return self.attacker.failures + self.watcher.failures

    def attack(self) -> None:
        """Send all attacks but the use of what was deleted, while another client reads /healthz."""
        with self._watched():
            before = row_counts(self._service)
            for group in (hostile.access, hostile.bodies, hostile.protocol):
                self._send(group.__name__, group(self.target))
            if (after := row_counts(self._service)) != before:
                self._fail(f"refused requests have changed the database from {before} to {after}")

            for group in (hostile.headers, hostile.parameters, hostile.values, hostile.texts):
                self._send(group.__name__, group(self.target))
            self._check_created()
            self._send_slowly()
        self.check_logs()

    @property
    def _service(self) -> Service:
        return self._installation.service

    def _send(self, group: str, attacks: Iterable[Attack]) -> None:
        self.attacker.send(group, (attack for n, attack in enumerate(attacks) if n % self._every == 0))

    def _fail(self, failure: str) -> None:
        self.attacker.failures.append(failure)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """During the block, another client reads /healthz again and again."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                self.watcher.send("GET /healthz", [Attack("during the attack", _HEALTH, frozenset({200}))])

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _check_created(self) -> None:
        """What was accepted is there as a whole, and nothing else."""
        known = ids_in("".join(self.attacker.accepted)) | ids_in(str(self.target))
        with self._service.uow.reading() as session:
            for table, ids_after in _created(session).items():
                unknown = ids_after - known - self._ids_before[table]
                if unknown:
                    self._fail(f"{table.__tablename__} has rows that no response has named: {sorted(unknown)[:5]}")
            jobs = set(session.scalars(select(Job.id)))
            for part in (Stage, Event):
                incomplete = jobs - set(session.scalars(select(part.job_id)))
                if incomplete:
                    self._fail(f"jobs without {part.__tablename__}: {sorted(incomplete)[:5]}")

    def _send_slowly(self) -> None:
        """Connections that never send a whole request are closed. Other clients get their responses."""
        port = self._installation.settings.port
        started = time.monotonic()
        with ExitStack() as stack:
            connections = []
            for name, start in _slow_requests(self.target.key).items():
                for _ in range(SLOW_CONNECTIONS):
                    connection = socket.create_connection(("127.0.0.1", port), timeout=hostile.LIMIT_SECONDS)
                    stack.enter_context(connection)
                    connection.sendall(start)
                    connections.append((name, connection))

            self._send("beside slow clients", self._ordinary_requests())
            for name, connection in connections:
                try:
                    reply = read_reply(connection, started)
                    while connection.recv(1 << 16):
                        pass
                except TimeoutError:
                    self._fail(f"slow: {name}: not closed after {hostile.LIMIT_SECONDS:g} s")
                    continue
                except ConnectionError:
                    pass
                self.attacker.record("slow", Attack(name, b"GET ", _SLOW_STATUSES), reply)

    def _ordinary_requests(self) -> Iterator[Attack]:
        for operation in self.target.operations:
            if operation.method == "GET":
                path = operation.target(self.target.ids)
                if operation.id == "list_exports":
                    path += f"?job={self.target.ids['job_id']}"
                yield Attack(operation.id, self.target.request(operation, target=path), frozenset({200, 307}))

    def use_after_delete(self) -> None:
        """Delete everything, then use it."""
        with self._installation.client() as client:
            for alias in client.get(f"/models/{self.target.ids['model']}").json()["aliases"]:
                client.delete(f"/aliases/{alias}")
            for test in client.get("/preference-tests?limit=200").json()["data"]:
                client.delete(f"/preference-tests/{test['id']}")
            page = {"data": [], "next_cursor": None}
            jobs: list[dict[str, Any]] = []
            while page["next_cursor"] or not jobs:
                page = client.get("/jobs", params={"limit": 200, "cursor": page["next_cursor"]} if jobs else {}).json()
                jobs += page["data"]
            for job in jobs:  # the newest first, because older ones may be in use by them
                if job["state"] not in FINAL:
                    client.post(f"/jobs/{job['id']}/cancel")
                response = client.delete(f"/jobs/{job['id']}")
                if response.status_code != 204:
                    self._fail(f"delete {job['id']}: {response.status_code} {response.text}")
            for path in ("webhooks/{webhook_id}", "api-keys/{key_id}"):
                response = client.delete("/" + path.format_map(self.target.ids))
                if response.status_code != 204:
                    self._fail(f"delete {path}: {response.status_code} {response.text}")
        self.attacker.send("use after delete", self._uses())

    def _uses(self) -> Iterator[Attack]:
        deleted = {"job_id", "sample_id", "pair_id", "model", "artifact_id", "name", "test_id"}
        named = set(self.target.ids.values())
        for operation in self.target.operations:
            path = operation.target(self.target.ids)
            request = self.target.request(operation, target=path)
            if deleted & set(operation.path_parameters) and operation.id != "put_alias":
                yield Attack(f"{operation.id} of what was deleted", request, frozenset({404}))
            elif operation.path_parameters and operation.method != "GET":
                yield Attack(f"{operation.id} again", request, frozenset({204, 404, 409, 422}))
            elif operation.has_body and ids_in(str(self.target.bodies[operation.id])) & named:
                yield Attack(f"{operation.id} with what was deleted", request, frozenset({404, 422}))
            for name in ("job", "parent", "webhook"):
                if name in operation.query_parameters:
                    known = self.target.ids["webhook_id" if name == "webhook" else "job_id"]
                    request = self.target.request(operation, target=f"{path}?{name}={known}")
                    yield Attack(f"{operation.id} of {name}", request, frozenset({200, 404}))
            if operation.scopes == {"read"}:
                request = self.target.request(operation, target=path, key=self.target.scoped_keys["read"])
                yield Attack(f"{operation.id} with a revoked key", request, frozenset({401}))

    def check_logs(self) -> None:
        """No log contains a secret or a stack trace."""
        logs = self._installation.logs()
        if "Traceback" in logs:
            self._fail(f"stack trace in a log: {logs[logs.index('Traceback') - 500 :][:3000]}")
        for secret in self.attacker.secrets:
            if secret in logs:
                self._fail(f"secret in a log: {logs[max(0, logs.index(secret) - 200) :][:400]}")


def _created(session: Session) -> dict[Any, set[str]]:
    """The ids of all rows that a request creates, by table. Prompt sets without a name belong to a job."""
    named_sets = select(PromptSet.id).where(PromptSet.name.is_not(None))
    queries = {table: select(table.id) for table in (Job, ApiKey, Webhook, Model)} | {PromptSet: named_sets}
    return {table: set(session.scalars(query)) for table, query in queries.items()}


_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_SLOW_STATUSES = frozenset({CLOSED, 401, 408})


def _slow_requests(key: str) -> dict[str, bytes]:
    """The beginnings of requests that never end."""
    head = b"POST /rounds HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    authorized = head + f"Authorization: Bearer {key}\r\n".encode()
    return {
        "nothing": b"",
        "half a line": b"POST /rou",
        "half a head": authorized,
        "half a body": authorized + b'Content-Length: 1000\r\n\r\n{"model": ',
        "half a chunk": authorized + b'Transfer-Encoding: chunked\r\n\r\n64\r\n{"model": ',
        "a body that waits for 100": authorized + b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n",
        "half a body without a key": head + b"Content-Length: 1000\r\n\r\n{",
    }


def _target(installation: Deployment, client: httpx.Client) -> Target:
    """Create keys, a webhook with a delivery and an alias, and find an id of everything."""
    keys: dict[str, str] = {}
    revoked = ""
    key_id = ""
    for scope in ("submit", "review", "revoked", "read"):
        body = {"name": f"hostile-{scope}", "scopes": ["admin" if scope == "revoked" else scope]}
        created = client.post("/api-keys", json=body).json()
        if scope == "revoked":
            client.delete(f"/api-keys/{created['id']}")
            revoked = created["key"]
        else:
            keys[scope] = created["key"]
            key_id = created["id"]

    webhook = client.post("/webhooks", json={"url": "http://127.0.0.1:9/x", "events": ["job.cancelled"]}).json()
    cancelled = client.post("/samplings", json=_sampling()).json()["id"]
    client.post(f"/jobs/{cancelled}/cancel")
    model = client.get("/models/champion").json()
    job = model["job"]
    samples = installation.get(f"/samples?job={job}")["data"]
    known = {
        "job_id": job,
        "sample_id": samples[0]["id"],
        "pair_id": ids(installation, "/pairs")[0],
        "model": model["id"],
        "artifact_id": samples[0]["image"].removeprefix("/artifacts/"),
        "name_or_id": "shapes-attribute-train",
        "name": "champion",
        "key_id": key_id,
        "webhook_id": webhook["id"],
        "delivery_id": ids(installation, "/webhook-deliveries")[0],
        "test_id": ids(installation, "/preference-tests")[0],
        "number": "1",
    }
    evaluation = installation.get("/jobs?kind=evaluation&state=succeeded")["data"][0]["id"]
    bodies = _bodies({**known, "evaluation": evaluation})
    document = client.get("/openapi.json").json()
    return Target(
        installation.settings.port,
        operations(document),
        known,
        bodies,
        ADMIN_KEY,
        {
            "no key": None,
            "a wrong key": "dfk_" + "0" * 43,
            "a malformed key": "../../etc/passwd",
            "a long key": "dfk_" + "a" * 30_000,
            "a revoked key": revoked,
        },
        keys,
    )


def _sampling() -> dict[str, Any]:
    return {"model": "tiny", "prompts": PROMPTS[:1], "scorers": ["brightness"], "samples_per_prompt": 2, "label": "a"}


def _bodies(known: Mapping[str, str]) -> dict[str, Any]:
    """A valid body for each operation that has one."""
    return {
        "start_rounds": round_body(label="a", priority=1, review=False),
        "start_sampling": {**_sampling(), "seed": 1, "sampling": {"num_steps": 4, "height": 32, "width": 32}},
        "start_fusion": {"pair": known["pair_id"], "thresholds": [0.03], "reward": "brightness", "label": "a"},
        "start_training": {"pairs": [known["pair_id"]], "seed": 3, "label": "a", "training": {"learning_rate": 1e-4}},
        "start_evaluation": {**_evaluation(known["model"]), "confidence": 0.9},
        "start_export": {"model": known["model"], "format": "kohya", "label": "a"},
        "start_preview": {"pair": known["pair_id"], "label": "a"},
        "create_prompt_set": {
            "name": "hostile",
            "description": "a",
            "prompts": [{"text": "a [dog] eating a [pizza]"}, *PROMPTS],
        },
        "change_job": {"rounds": 1},
        "put_verdict": {"prefer": "target", "reviewer": "bootstrap"},
        "put_gold": {"expected": "target"},
        "create_preference_test": {"evaluation": known["evaluation"], "name": "a", "questions": 1},
        "put_preference_answer": {"choice": 1, "rater": "bootstrap"},
        "put_alias": {"model": known["model"]},
        "create_webhook": {"url": "http://127.0.0.1:9/x", "events": ["job.succeeded"]},
        "make_key": {"name": "ann", "scopes": ["read"], "expires_at": "2099-12-31T23:59:59Z"},
    }
