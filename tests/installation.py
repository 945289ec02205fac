"""A service without a worker, used through its API. Stages run in the test process."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient
from safetensors.torch import load

from tests.service import round_body, service_of, work_until_idle


class Installation:
    """A service without a worker."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.service = service_of(client)

    def post(self, **changes: Any) -> str:
        """Create a round job. Returns its id."""
        return self.ask("/rounds", round_body(**changes))

    def ask(self, path: str, body: dict[str, Any]) -> str:
        """Create a job. Returns its id."""
        response = self.client.post(path, json=body)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def run(self, **changes: Any) -> dict[str, Any]:
        """Create a round job and run all its stages. Returns the job."""
        return self.done("/rounds", round_body(**changes))

    def done(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create a job and run all its stages. Returns the job."""
        job_id = self.ask(path, body)
        work_until_idle(self.service)
        return dict(self.get(f"/jobs/{job_id}"))

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def all(self, path: str) -> list[dict[str, Any]]:
        return list(self.get(f"{path}{'&' if '?' in path else '?'}limit=200")["data"])

    def events(self, job: dict[str, Any]) -> list[str]:
        return [event["kind"] for event in self.all(job["links"]["events"])]

    def adapter(self, job: dict[str, Any]) -> dict[str, bytes]:
        """Return the bytes of the adapter's tensors. Files differ, since safetensors orders metadata at random."""
        path = self.get(f"/models/{job['last_model']}")["adapter"]["artifact"]
        tensors = load(self.client.get(path).content)
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
