"""Export and import of projects with `python -m service.transfer`."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from api.main import create_app
from dfusion.prompts import Prompt
from service.db.tables import Artifact, Pair, Table
from service.errors import TransferError
from service.service import Service, give_verdict, save_prompt_set
from service.settings import Settings
from service.states import Verdict
from service.transfer import __main__ as transfer
from service.transfer.exporting import export_project
from service.transfer.importing import import_project
from service.transfer.rows import TABLES
from tests.installation import Installation
from tests.servers import S3Server
from tests.service import PROMPTS, round_body, settings_for
from tests.unit.api.test_bad_input import row_counts

STEPS = {"num_steps": 4}


@contextmanager
def opened(settings: Settings) -> Iterator[Installation]:
    with TestClient(create_app(settings)) as client:
        yield Installation(client)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Settings:
    """An installation with a round, an evaluation of its model, a preference test, a sampling, its fusion and an
    export, a prompt set, an alias, a verdict and an unfinished job."""
    settings = settings_for(tmp_path_factory.mktemp("source"), pipeline)
    with opened(settings) as installation:
        client = installation.client
        client.post("/prompt-sets", json={"name": "mine", "prompts": PROMPTS})
        first = installation.run(label="first")
        client.put("/aliases/champion", json={"model": first["last_model"]})
        evaluation = {"models": ["tiny", first["last_model"]], "prompt_sets": ["mine"], "scorers": ["brightness"]}
        evaluated = installation.done("/evaluations", evaluation | {"samples_per_prompt": 1, "sampling": STEPS})
        test = client.post("/preference-tests", json={"evaluation": evaluated["id"], "name": "figure 6"}).json()
        answer = client.put(f"/preference-tests/{test['id']}/questions/1/answer", json={"choice": 2, "rater": "ann"})
        assert answer.status_code == 200, answer.text
        sampling = {"model": "tiny", "prompts": PROMPTS, "scorers": ["brightness"], "sampling": STEPS}
        sampled = installation.done("/samplings", sampling)
        fusion = {"sampling": sampled["id"], "fusion": round_body()["fusion"], "reward": "brightness"}
        fused = installation.done("/fusions", fusion)
        installation.done("/exports", {"job": fused["id"], "format": "parquet"})
        pair = installation.all("/pairs")[0]
        assert client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": "tie"}).status_code == 200
        installation.post(label="waits")
    return settings


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, source: Settings) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    transfer.main(["export", str(folder)], source)
    return folder / "dfusion-export.tar"


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def rewritten(file: Path, to: Path, changed: dict[str, bytes | None]) -> Path:
    """Return a copy of the archive with changed members; None removes a member."""
    with tarfile.open(to, "w") as tar:
        for name, content in (members(file) | changed).items():
            if content is not None:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return to


def lists(installation: Installation) -> dict[str, Any]:
    """Return all lists of the API, by path."""
    responses: dict[str, Any] = {
        path: installation.all(path)
        for path in ("/jobs", "/samples", "/pairs", "/models", "/prompt-sets", "/preference-tests")
    }
    for test in responses["/preference-tests"]:
        responses[f"{test['id']} results"] = installation.get(test["links"]["results"])
        responses[f"{test['id']} answers"] = installation.client.get(test["links"]["answers.csv"]).text
    for job in responses["/jobs"]:
        responses[f"/jobs/{job['id']}"] = installation.get(f"/jobs/{job['id']}")
        responses[f"/exports?job={job['id']}"] = installation.get(f"/exports?job={job['id']}")
        responses[job["links"]["metrics"]] = installation.get(job["links"]["metrics"])
        events = installation.all(job["links"]["events"])  # their ids differ between installations
        responses[job["links"]["events"]] = [{n: v for n, v in event.items() if n != "id"} for event in events]
    return responses


def ids_of_installation(installation: Installation) -> dict[str, str]:
    """Return the names of base models and built-in prompt sets, whose ids differ between installations."""
    own = {m["id"]: f"model {m['name']}" for m in installation.all("/models") if m["name"]}
    return own | {s["id"]: f"set {s['name']}" for s in installation.all("/prompt-sets") if s["builtin"]}


def comparable(installation: Installation) -> dict[str, Any]:
    """Return `lists` with installation-specific ids replaced by names."""
    text = json.dumps(lists(installation), sort_keys=True)
    for own, name in ids_of_installation(installation).items():
        text = text.replace(own, name)
    responses = json.loads(text)
    for path in ("/models", "/prompt-sets"):  # base models and built-in sets are as old as the installation
        responses[path] = [{n: v for n, v in row.items() if n != "created_at"} for row in responses[path]]
        responses[path].sort(key=lambda row: str(row["id"]))
    for path in responses:
        if path.endswith("/metrics"):  # sorted by ids, which include those of base models
            responses[path]["data"].sort(key=str)
    return dict(responses)


def artifacts(installation: Installation) -> dict[str, str]:
    """Download all artifacts. Returns their SHA-256 by path."""
    with installation.service.uow.reading() as session:
        ids = session.scalars(select(Artifact.id)).all()
    paths = [f"/artifacts/{artifact_id}" for artifact_id in ids]
    return {path: hashlib.sha256(installation.client.get(path).content).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """The data folder of an empty installation. Copying it is faster than migrating a new one."""
    settings = settings_for(tmp_path_factory.mktemp("empty"), pipeline)
    Service.open(settings).close()
    return settings.data_dir


@pytest.fixture
def target(tmp_path: Path, pipeline: Path, empty: Path) -> Settings:
    """An empty installation."""
    return settings_for(shutil.copytree(empty, tmp_path / "data"), pipeline)


def test_a_round_trip_shows_the_same_and_has_the_same_bytes(
    source: Settings, exported: Path, target: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer.main(["import", str(exported)], target)
    output = capsys.readouterr().out
    with opened(source) as old, opened(target) as new:
        [waiting] = old.all("/jobs?state=queued")
        assert f"{waiting['id']} had not ended: it was imported as cancelled" in output
        cancelled = new.get(f"/jobs/{waiting['id']}")
        assert cancelled["state"] == "cancelled"
        assert {stage["state"] for stage in new.all(cancelled["links"]["stages"])} == {"cancelled"}
        assert new.events(waiting)[-1] == "job.cancelled"
        before, after = comparable(old), comparable(new)
        for shown in (before, after):
            shown["/jobs"] = [job for job in shown["/jobs"] if job["id"] != waiting["id"]]
        assert [len(before[path]) for path in ("/jobs", "/pairs")] == [5, 12] and before["/samples"]
        for path, expected in before.items():
            if waiting["id"] not in path:
                assert after[path] == expected, path
        assert artifacts(new) == artifacts(old) != {}


def test_what_was_moved_can_be_worked_on(exported: Path, target: Settings) -> None:
    transfer.main(["import", str(exported)], target)
    with opened(target) as new:
        sampling = {"model": "champion", "prompt_set": "mine", "scorers": ["brightness"], "sampling": STEPS}
        assert new.done("/samplings", sampling | {"samples_per_prompt": 1})["state"] == "succeeded"
        again = {"pair": new.all("/pairs")[-1]["id"], "fusion": round_body()["fusion"], "reward": "brightness"}
        assert new.done("/fusions", again)["state"] == "succeeded"


def test_two_exports_are_equal(tmp_path: Path, source: Settings, exported: Path) -> None:
    transfer.main(["export", str(tmp_path / "again.tar")], source)
    assert (tmp_path / "again.tar").read_bytes() == exported.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.tar"]


def test_taken_in_twice_it_is_there_once(exported: Path, target: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    transfer.main(["import", str(exported)], target)
    with service_of(target) as new:
        before = row_counts(new)
    capsys.readouterr()
    transfer.main(["import", str(exported)], target)
    assert "0 jobs, 0 rows and 0 objects are new" in capsys.readouterr().out
    with service_of(target) as new:
        assert row_counts(new) == before


@contextmanager
def service_of(settings: Settings) -> Iterator[Service]:
    service = Service.open(settings)
    try:
        yield service
    finally:
        service.close()


def test_a_prompt_set_that_means_other_prompts_here_is_named(exported: Path, target: Settings) -> None:
    with service_of(target) as new:
        save_prompt_set(new, "mine", "", [Prompt(text="a cat")])
        before = row_counts(new)
        with pytest.raises(TransferError, match="'mine', version 1, exists with other prompts"):
            import_project(new, exported)
        assert row_counts(new) == before
        assert list(new.store.objects()) == []


def test_a_row_that_is_here_with_other_content_is_named(exported: Path, target: Settings) -> None:
    with service_of(target) as new:
        import_project(new, exported)
        with new.uow.reading() as session:
            pair_id = session.scalars(select(Pair.id).where(Pair.adopted.is_not(None)).limit(1)).one()
        give_verdict(new, pair_id, Verdict.REJECT, None, None)
        before = row_counts(new), list(new.store.objects())
        with pytest.raises(TransferError, match=f"{pair_id} of pairs exists with other content: .*verdict"):
            import_project(new, exported)
        assert row_counts(new) == before[0]
        assert {stored.key for stored in new.store.objects()} == {stored.key for stored in before[1]}


def _damages(file: Path, to: Path) -> dict[str, Path]:
    """Return invalid archives, by their defect."""
    original = members(file)
    an_object = next(name for name in original if name.startswith("objects/"))
    header = json.loads(original["header.json"])
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(original[an_object]) + len(original[an_object]) // 2] ^= 1
    contents = {
        "a flipped bit": bytes(flipped),
        "cut short": whole[: len(whole) // 2],
        "cut within the first member": whole[:600],
        "no tar": b"x" * 5000,
        "empty": b"",
    }
    changes: dict[str, dict[str, bytes | None]] = {
        "without its manifest": {"manifest.json": None},
        "without an object": {an_object: None},
        "with another row": {"rows/jobs.jsonl": original["rows/jobs.jsonl"].replace(b'"first"', b'"other"')},
        "without a table": {"rows/scores.jsonl": None},
        "with a path": {"../escaped": b"x"},
        "of a newer format": {"header.json": json.dumps(header | {"format": 2}).encode()},
        "of another revision": _consistent(original, "header.json", json.dumps(header | {"revision": "0010"}).encode()),
    }
    archives = {name: rewritten(file, to / f"{name}.tar", change) for name, change in changes.items()}
    for name, content in contents.items():
        archives[name] = to / f"{name}.tar"
        archives[name].write_bytes(content)
    return archives


def _consistent(contents: dict[str, bytes], name: str, content: bytes) -> dict[str, bytes | None]:
    manifest = json.loads(contents["manifest.json"])
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    return {name: content, "manifest.json": json.dumps(manifest).encode()}


def test_damaged_archives_and_other_versions_are_rejected_completely(
    tmp_path: Path, exported: Path, target: Settings
) -> None:
    messages = {}
    with service_of(target) as new:
        before = row_counts(new)
        for name, file in _damages(exported, tmp_path).items():
            with pytest.raises(TransferError) as caught:
                import_project(new, file)
            messages[name] = str(caught.value)
        assert row_counts(new) == before
        assert list(new.store.objects()) == []
    assert "expected format 1 or older, got the newer format 2" in messages["of a newer format"]
    assert "0010" in messages["of another revision"]
    assert "rows/jobs.jsonl is damaged" in messages["with another row"]
    assert "objects" in messages["without an object"]


def test_objects_do_not_stay_where_one_does_not_fit(tmp_path: Path, exported: Path, target: Settings) -> None:
    contents = members(exported)
    rows = [json.loads(line) for line in contents["rows/artifacts.jsonl"].splitlines()]
    rows[-1]["size_bytes"] += 1
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = rewritten(exported, tmp_path / "other.tar", _consistent(contents, "rows/artifacts.jsonl", text))
    with service_of(target) as new:
        before = row_counts(new)
        with pytest.raises(TransferError, match=f"{rows[-1]['id']} does not match its object"):
            import_project(new, file)
        assert list(new.store.objects()) == []
        assert row_counts(new) == before


def test_a_job_takes_its_sources_along_and_nothing_else(tmp_path: Path, source: Settings, target: Settings) -> None:
    with opened(source) as old:
        by_kind = {job["kind"]: job["id"] for job in old.all("/jobs") if job["state"] == "succeeded"}
        export_project(old.service, tmp_path / "one.tar", [by_kind["fusion"]])
        export_project(old.service, tmp_path / "two.tar", [by_kind["evaluation"]])
    with opened(target) as new:
        import_project(new.service, tmp_path / "one.tar")
        assert {job["id"] for job in new.all("/jobs")} == {by_kind["fusion"], by_kind["sampling"]}
        assert new.client.get("/prompt-sets/mine").status_code == 404
        import_project(new.service, tmp_path / "two.tar")
        expected = {by_kind[kind] for kind in ("fusion", "sampling", "evaluation", "round")}
        assert {job["id"] for job in new.all("/jobs")} == expected
        assert new.client.get("/prompt-sets/mine").status_code == 200
        assert new.client.get("/models/champion").status_code == 200


def test_an_unknown_job_and_a_running_service_are_named(
    tmp_path: Path, source: Settings, exported: Path, target: Settings
) -> None:
    with pytest.raises(SystemExit, match="job_x"):
        transfer.main(["export", str(tmp_path / "x.tar"), "--job", "job_x"], source)
    assert not list(tmp_path.glob("*x.tar*"))
    with opened(target), pytest.raises(SystemExit, match="another process holds"):
        transfer.main(["import", str(exported)], target)


def test_from_files_to_postgresql_and_s3_and_back(
    tmp_path: Path, pipeline: Path, exported: Path, target: Settings, empty: Path, postgres_url: str, s3: S3Server
) -> None:
    deployed = settings_for(tmp_path / "deployed", pipeline, database_url=postgres_url, **s3.settings("moved"))
    transfer.main(["import", str(exported)], deployed)
    transfer.main(["export", str(tmp_path / "back.tar")], deployed)
    transfer.main(["import", str(tmp_path / "back.tar")], target)
    direct = settings_for(shutil.copytree(empty, tmp_path / "direct"), pipeline)
    transfer.main(["import", str(exported)], direct)
    with opened(direct) as expected, opened(target) as new:
        expected_lists, lists_found = comparable(expected), comparable(new)
        for path, shown in expected_lists.items():
            if not path.endswith("/events"):
                assert lists_found[path] == shown, path
        assert artifacts(new) == artifacts(expected)


def test_every_table_that_belongs_to_a_project_is_moved() -> None:
    """A new table is exported, or this test gives the reason why not."""
    stays = {
        "api_keys": "keys are an installation's own",
        "browser_sessions": "they belong to API keys",
        "idempotency_keys": "a client's request that is sent again is sent to the old installation",
        "workers": "processes",
        "webhooks": "receivers are told about the jobs of one installation",
        "webhook_deliveries": "sent by the old installation",
    }
    assert {table.name for table in TABLES} | set(stays) == set(Table.metadata.tables)
