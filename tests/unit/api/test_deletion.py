"""DELETE /jobs/{id} over HTTP: what it answers, and that nothing of a deleted job is visible afterwards."""

from fastapi.testclient import TestClient

from service.db.queries import jobs, results
from service.service import Service
from tests.service import round_body
from tests.stored_pairs import Results


def create(client: TestClient) -> str:
    """Create a cancelled job. Returns its id."""
    job_id: str = client.post("/rounds", json=round_body()).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    return job_id


def test_a_deleted_job_and_its_results_are_gone_at_once(client: TestClient, service: Service) -> None:
    rows = Results.of_new_job(service)
    artifact = rows.artifact("file")
    samples = [rows.sample(number, artifact) for number in range(2)]
    pair = rows.pair(0, samples[0].id, samples[1].id, adopted=True)
    with service.uow.writing() as session:
        results.add_all(session, [artifact, *samples])
        results.add_all(session, [pair])
    client.post(f"/jobs/{rows.job_id}/cancel")
    assert client.get(f"/jobs/{rows.job_id}").json()["storage_bytes"] == artifact.size_bytes

    paths = [f"/samples/{samples[0].id}", f"/pairs/{pair.id}", f"/artifacts/{artifact.id}"]
    paths += [f"/jobs/{rows.job_id}{part}" for part in ("", "/stages", "/events", "/logs", "/metrics")]
    lists = ["/jobs", "/samples", "/pairs", f"/samples?job={rows.job_id}", f"/pairs?job={rows.job_id}"]
    assert [client.get(path).status_code for path in paths if "artifacts" not in path] == [200] * 7
    assert all(client.get(path).json()["data"] for path in lists)

    assert client.delete(f"/jobs/{rows.job_id}").status_code == 204
    assert [client.get(path).status_code for path in paths] == [404] * len(paths)
    assert [client.get(path).json()["data"] for path in lists] == [[]] * len(lists)
    assert client.put(f"/pairs/{pair.id}/verdict", json={"prefer": "tie"}).status_code == 404
    for action in ("cancel", "pause", "resume", "retry", "retry?from=failed"):
        assert client.post(f"/jobs/{rows.job_id}/{action}").status_code == 404
    assert client.delete(f"/jobs/{rows.job_id}").status_code == 404

    # nor can a request name them
    for path, body in (
        ("/fusions", {"pair": pair.id}),
        ("/fusions", {"pairs": [{"reference": samples[0].id, "base": samples[1].id}]}),
        ("/trainings", {"pairs": [pair.id]}),
        ("/trainings", {"jobs": [rows.job_id]}),
        ("/exports", {"job": rows.job_id, "format": "parquet"}),
    ):
        response = client.post(path, json=body)
        assert (response.status_code, response.json()["code"].partition("_")[0]) == (422, "unknown"), body


def test_a_page_with_rows_of_deleted_jobs_is_shorter_and_has_a_next_page(client: TestClient, service: Service) -> None:
    """So that the cost of a page does not depend on the number of deleted rows."""
    deleted, kept = Results.of_new_job(service), Results.of_new_job(service)
    sample_ids = []
    for rows in (deleted, kept):
        artifact = rows.artifact("file")
        samples = [rows.sample(number, artifact) for number in range(2)]
        sample_ids += [sample.id for sample in samples]
        with service.uow.writing() as session:
            results.add_all(session, [artifact, *samples])
    client.post(f"/jobs/{deleted.job_id}/cancel")
    client.delete(f"/jobs/{deleted.job_id}")
    page = client.get("/samples?limit=3").json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == (sample_ids[2:3], True)
    page = client.get(f"/samples?limit=3&cursor={page['next_cursor']}").json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == (sample_ids[3:], False)


def test_a_job_that_has_not_ended_or_is_used_is_not_deleted(client: TestClient, service: Service) -> None:
    running = client.post("/rounds", json=round_body()).json()["id"]
    refused = client.delete(f"/jobs/{running}")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "cancel it first" in refused.json()["detail"]

    used = create(client)
    users = [create(client) for _ in range(21)]
    with service.uow.writing() as session:
        for user in users:
            jobs.add_sources(session, jobs.get(session, user), {used})
    problem = client.delete(f"/jobs/{used}").json()
    assert (problem["status"], problem["code"]) == (409, "job_in_use")
    assert problem["errors"] == [{"pointer": "/job_id", "message": f"used by {user}"} for user in sorted(users)[:20]]
    assert problem["detail"].endswith(" and others: delete these first")
