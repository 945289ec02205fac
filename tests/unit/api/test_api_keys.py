"""API keys: creation, use, expiry and revocation."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import update

from api.main import create_app
from service.db.tables import ApiKey
from service.errors import StartError
from tests.service import service_of, settings_for

ADMIN = "dfk_" + "a1" * 20
OTHER = "dfk_" + "b2" * 20


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def app_client(folder: Path, key: str = ADMIN, auth: bool = True) -> TestClient:
    settings = settings_for(folder / "data", folder / "tiny", auth=auth, bootstrap_admin_key=SecretStr(key))
    return TestClient(create_app(settings), headers=bearer(key) if key else {})


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[TestClient]:
    """A client with the settings' key."""
    with app_client(tmp_path) as client:
        yield client


def make(client: TestClient, **changes: Any) -> Any:
    return client.post("/api-keys", json={"name": "ann", "scopes": ["submit"]} | changes)


def works(client: TestClient, key: str) -> bool:
    status = client.get("/jobs", headers=bearer(key)).status_code
    assert status in (200, 401)
    return status == 200


def test_a_key_is_shown_once_and_only_its_hash_is_kept(admin: TestClient, tmp_path: Path) -> None:
    response = make(admin)
    assert (response.status_code, response.headers["cache-control"]) == (201, "no-store")
    created = response.json()
    key = created.pop("key")
    assert key.startswith("dfk_")
    assert len(key) == 4 + 51  # 38 bytes in base64: 12 characters are shown, 43 (256 bits) are not
    assert created["prefix"] == key[:12]
    assert (created["name"], created["scopes"], created["active"], created["last_used_at"]) == (
        "ann",
        ["submit"],
        True,
        None,
    )
    assert works(admin, key)
    listed = admin.get("/api-keys").json()["data"]
    assert [key["name"] for key in listed] == ["ann", "bootstrap"]
    assert {name: value for name, value in listed[0].items() if name != "last_used_at"} == {
        name: value for name, value in created.items() if name != "last_used_at"
    }
    files = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("dfusion.db*"))
    assert key.encode() not in files
    assert key[:12].encode() in files


def test_each_key_is_unique(admin: TestClient) -> None:
    keys = [make(admin).json() for _ in range(5)]
    assert len({key["key"] for key in keys}) == 5
    assert len({key["id"] for key in keys}) == 5


def test_a_revoked_key_is_rejected_and_still_listed(admin: TestClient) -> None:
    created = make(admin).json()
    assert works(admin, created["key"])
    for _ in range(2):
        response = admin.delete(f"/api-keys/{created['id']}")
        assert (response.status_code, response.content) == (204, b"")
        assert not works(admin, created["key"])
    listed = admin.get("/api-keys").json()["data"][0]
    assert (listed["id"], listed["active"]) == (created["id"], False)
    assert listed["revoked_at"] is not None


def test_a_key_expires(admin: TestClient) -> None:
    created = make(admin, expires_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat()).json()
    assert works(admin, created["key"])
    with service_of(admin).uow.writing() as session:
        session.execute(update(ApiKey).where(ApiKey.id == created["id"]).values(expires_at=1.0))
    assert not works(admin, created["key"])
    assert admin.get("/api-keys").json()["data"][0]["active"] is False


def test_the_last_use_is_recorded_but_not_for_every_request(admin: TestClient) -> None:
    created = make(admin).json()
    works(admin, created["key"])
    recorded = admin.get("/api-keys").json()["data"][0]["last_used_at"]
    assert recorded is not None
    works(admin, created["key"])
    assert admin.get("/api-keys").json()["data"][0]["last_used_at"] == recorded
    with service_of(admin).uow.writing() as session:
        session.execute(update(ApiKey).where(ApiKey.id == created["id"]).values(last_used_at=1.0))
    works(admin, created["key"])
    assert admin.get("/api-keys").json()["data"][0]["last_used_at"] >= recorded


def test_keys_with_the_same_prefix_are_distinguished(admin: TestClient) -> None:
    created = make(admin).json()
    twin = ADMIN[:12] + "c3" * 20
    with service_of(admin).uow.writing() as session:
        session.execute(update(ApiKey).where(ApiKey.id == created["id"]).values(prefix=ADMIN[:12]))
    assert works(admin, ADMIN)
    assert works(admin, created["key"]) is False  # keys are found by prefix only
    assert works(admin, twin) is False


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": "x" * 101}, "/name"),
        ({"name": "bootstrap"}, "/name"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": ["everything"]}, "/scopes/0"),
        ({"scopes": ["read"] * 5}, "/scopes"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "/expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "/expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-23:59"}, "/expires_at"),
        ({"expires_at": "soon"}, "/expires_at"),
        ({"expires_at": -1e300}, "/expires_at"),
        ({"key": "dfk_mine"}, "/key"),
    ],
)
def test_invalid_key_requests_name_the_field(admin: TestClient, changes: dict[str, Any], pointer: str) -> None:
    response = make(admin, **changes)
    assert response.status_code == 422
    assert pointer in [error["pointer"] for error in response.json()["errors"]]
    assert len(admin.get("/api-keys").json()["data"]) == 1


def test_the_last_admin_key_cannot_be_revoked(admin: TestClient) -> None:
    first = admin.get("/api-keys").json()["data"][0]["id"]
    assert (admin.delete(f"/api-keys/{first}")).status_code == 409
    second = make(admin, scopes=["admin"]).json()
    assert admin.delete(f"/api-keys/{first}").status_code == 204
    response = admin.delete(f"/api-keys/{second['id']}", headers=bearer(second["key"]))
    assert (response.status_code, response.json()["code"]) == (409, "conflict")


def test_keys_can_be_created_before_authentication_is_enabled(tmp_path: Path) -> None:
    with app_client(tmp_path, key="", auth=False) as client:
        created = make(client, scopes=["admin"]).json()
    with app_client(tmp_path, key="") as client:
        assert not works(client, "dfk_" + "x" * 40)
        assert works(client, created["key"])


def test_a_new_bootstrap_key_replaces_the_old_one(tmp_path: Path) -> None:
    with app_client(tmp_path) as client:
        created = make(client, scopes=["admin"]).json()
    with app_client(tmp_path) as client:
        assert works(client, ADMIN)
        assert len(client.get("/api-keys").json()["data"]) == 2
    with app_client(tmp_path, OTHER) as client:
        assert (works(client, ADMIN), works(client, OTHER), works(client, created["key"])) == (False, True, True)
    with app_client(tmp_path, ADMIN) as client:  # revoked keys stay revoked
        assert (works(client, ADMIN), works(client, OTHER), works(client, created["key"])) == (False, False, True)


@pytest.mark.parametrize("key", ["", "secret", "dfk_short", ADMIN + " x", "dfk_" + "é" * 40])
def test_service_does_not_start_without_a_valid_bootstrap_key(tmp_path: Path, key: str) -> None:
    settings = settings_for(tmp_path / "data", tmp_path / "tiny", auth=True, bootstrap_admin_key=SecretStr(key))
    with pytest.raises(StartError, match="DFUSION_BOOTSTRAP_ADMIN_KEY") as raised, TestClient(create_app(settings)):
        pass
    assert not key or key not in str(raised.value)
