"""POST /rounds and the job before a worker claims it."""

from fastapi.testclient import TestClient

from service.service import Service
from tests.service import round_body
from tests.unit.api.test_bad_input import row_counts


def test_a_round_is_accepted_with_its_location(client: TestClient) -> None:
    response = client.post("/rounds", json=round_body(rounds=2, label="mine"))
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert int(response.headers["retry-after"]) > 0
    assert (job["state"], job["rounds"], job["label"]) == ("queued", 2, "mine")
    assert job["progress"] == {
        "stage": None,
        "round": None,
        "shard": None,
        "shards": 0,
        "done": 0,
        "total": 0,
        "percent": 0.0,
        "eta_seconds": None,
    }
    # 3 prompts in shards of 2: measuring before and after, 2 x sample, score, select, 2 x fuse, verify, train
    kinds = [stage["kind"] for stage in client.get(job["links"]["stages"]).json()["data"]]
    expected = "evaluate compare sample sample score select fuse fuse verify train evaluate compare".split()
    assert kinds == expected
    assert client.get(response.headers["location"]).json() == job
    assert [entry["id"] for entry in client.get("/jobs").json()["data"]] == [job["id"]]


def test_a_job_shows_its_priority_and_its_retry_keeps_it(client: TestClient) -> None:
    assert client.post("/rounds", json=round_body()).json()["priority"] == 0
    job = client.post("/rounds", json=round_body(priority=-7)).json()
    assert (job["priority"], job["spec"]["priority"]) == (-7, -7)
    client.post(f"/jobs/{job['id']}/cancel")
    retried = client.post(f"/jobs/{job['id']}/retry").json()
    assert (retried["origin"], retried["priority"]) == (job["id"], -7)


def test_dry_run_counts_equal_hand_computed_ones(client: TestClient, service: Service) -> None:
    before = row_counts(service)
    response = client.post("/rounds?dry_run=true", json=round_body(rounds=2))
    assert response.status_code == 200
    # 4 samples per prompt: 1 reference (a quarter), used twice, and 2 bases (half): 2 pairs x 3 prompts
    counts = response.json()
    assert counts["images"] == {"sampled": 24, "fused_at_most": 12, "evaluated": 9, "total_at_most": 45}
    assert counts["unet_evaluations"] == {
        "sampling": 24 * 4 * 2,  # 4 steps, with and without the prompt
        "fusion_at_most": 12 * 3 * 2 * 2,  # 3 fused steps, target and reference, with and without the prompt
        "training_at_most": 12 * 2 * 4 * 2 * 2,  # 2 trajectories, 4 steps, guidance, log pref and one epoch
        "evaluation": 9 * 4 * 2,
        "total_at_most": 192 + 144 + 384 + 72,
    }
    assert row_counts(service) == before


def test_dry_run_shows_the_prompts_with_their_items_and_warnings(client: TestClient) -> None:
    client.post("/prompt-sets", json={"name": "unseen", "text": "a hen BREAK a fox"})
    prompts = [{"text": "a (blue bird:1.2) in a tree"}, {"text": "a [red hat]"}]
    body = round_body(prompts=prompts, held_out_prompt_set="unseen")
    shown = client.post("/rounds?dry_run=true", json=body).json()
    assert shown["prompts"] == [
        {"text": "a (blue bird:1.2) in a tree", "items": ["bird", "tree"]},
        {"text": "a red hat", "items": ["red hat"]},
        {"text": "a hen BREAK a fox", "items": ["hen", "fox"]},
    ]
    assert shown["warnings"] == [
        {"prompt": prompt, "message": f"weighting syntax is read as plain text: {syntax!r}"}
        for prompt, syntax in (("a (blue bird:1.2) in a tree", "(blue bird:1.2)"), ("a hen BREAK a fox", "BREAK"))
    ]

    measured = {"models": ["tiny"], "prompt_sets": ["unseen"], "scorers": ["brightness"]}
    evaluation = client.post("/evaluations?dry_run=true", json=measured).json()
    assert [prompt["items"] for prompt in evaluation["prompts"]] == [["hen", "fox"]]


def test_dry_run_shows_100_prompts(client: TestClient) -> None:
    body = round_body(prompts=[{"text": f"a [cat] and {n} dogs"} for n in range(101)])
    shown = client.post("/rounds?dry_run=true", json=body).json()
    assert (len(shown["prompts"]), shown["warnings"]) == (100, [])


def test_repeating_a_request_with_its_key_returns_the_same_job(client: TestClient, service: Service) -> None:
    key = {"Idempotency-Key": "one"}
    first = client.post("/rounds", json=round_body(), headers=key)
    before = row_counts(service)
    repeated = client.post("/rounds", json=round_body(), headers=key)
    assert (repeated.status_code, repeated.json()["id"]) == (202, first.json()["id"])
    other = client.post("/rounds", json=round_body(seed=8), headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert row_counts(service) == before
    assert client.post("/rounds", json=round_body()).json()["id"] != first.json()["id"]


def test_repeating_a_request_returns_the_current_state_of_the_job(client: TestClient) -> None:
    key = {"Idempotency-Key": "one"}
    job = client.post("/rounds", json=round_body(), headers=key).json()["id"]
    cancelled = client.post(f"/jobs/{job}/cancel").json()
    repeated = client.post("/rounds", json=round_body(), headers=key)
    assert (repeated.headers["Location"], repeated.json()) == (f"/jobs/{job}", cancelled)


def test_an_invalid_idempotency_key_is_rejected(client: TestClient) -> None:
    response = client.post("/rounds", json=round_body(), headers={"Idempotency-Key": "a b"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_parameter")


def test_a_queued_job_is_cancelled_immediately(client: TestClient) -> None:
    job = client.post("/rounds", json=round_body()).json()["id"]
    response = client.post(f"/jobs/{job}/cancel")
    assert (response.status_code, response.json()["state"]) == (202, "cancelled")
    assert {stage["state"] for stage in client.get(f"/jobs/{job}/stages").json()["data"]} == {"cancelled"}
    assert client.post(f"/jobs/{job}/cancel").json()["state"] == "cancelled"
    kinds = [event["kind"] for event in client.get(f"/jobs/{job}/events").json()["data"]]
    assert kinds == ["job.created", "job.cancel_requested", "job.cancelled"]


def test_wait_ends_at_the_timeout(client: TestClient) -> None:
    job = client.post("/rounds", json=round_body()).json()["id"]
    response = client.get(f"/jobs/{job}?wait=0.3")
    assert (response.status_code, response.json()["state"]) == (200, "queued")


def test_built_in_models_and_prompt_sets_exist_after_startup(client: TestClient) -> None:
    assert {model["name"] for model in client.get("/models").json()["data"]} >= {"shapes", "tiny"}
    named = client.get("/prompt-sets/shapes-attribute-train").json()
    assert (named["builtin"], named["size"], len(named["prompts"])) == (True, 40, 40)
    assert client.get(named["links"]["self"]).json() == named


def test_pagination_returns_every_job_once(client: TestClient) -> None:
    created = [client.post("/rounds", json=round_body(seed=seed)).json()["id"] for seed in range(5)]
    seen = []
    cursor = None
    while True:
        page = client.get("/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] is (cursor is not None)
        if cursor is None:
            break
    assert seen == created[::-1]


def test_inline_prompts_create_no_named_set(client: TestClient) -> None:
    before = len(client.get("/prompt-sets").json()["data"])
    job = client.post("/rounds", json=round_body()).json()
    assert len(client.get("/prompt-sets").json()["data"]) == before
    assert client.get(f"/prompt-sets/{job['prompt_set']}").json()["size"] == 3


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert ready == {"status": "ok", "database": True, "worker": None, "checks": ready["checks"]}
    states = {check["name"]: check["state"] for check in ready["checks"]}
    assert states == dict.fromkeys(("database", "migrations", "storage", "disk"), "ok") | {"worker": "warning"}
    assert "/rounds" in client.get("/openapi.json").json()["paths"]
