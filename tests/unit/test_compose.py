"""docker-compose.yml is valid, and its services have no unnecessary privileges."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from api.processes import CLOSE_SECONDS
from service.settings import Settings
from tests import compose
from tests.compose import REQUIRED, ROOT, SECRETS, MissingVariableError

RAW = compose.raw()["services"]
FILLED = compose.interpolated(REQUIRED)["services"]
ONE_SHOT = {"postgres-roles", "s3-folder", "garage-key", "minio-key", "migrate"}
WORKERS = {"worker", "worker-cpu", "worker-gpu"}
OURS = {"migrate", "api", "sweeper", *WORKERS}
S3_SERVERS = {"garage", "minio"}
SECONDS = re.compile(r"(\d+)s")

every_service = pytest.mark.parametrize("name", FILLED)


def seconds(text: str) -> int:
    match = SECONDS.fullmatch(text)
    assert match is not None, text
    return int(match[1])


def test_it_follows_the_compose_specification() -> None:
    package = importlib.util.find_spec("check_jsonschema")  # it brings the Compose Specification's schema
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(file.read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    for content in (compose.raw(), compose.interpolated(REQUIRED)):
        assert [error.message for error in validator.iter_errors(content)] == []
        content["services"]["api"]["no_such_thing"] = 1
        assert not validator.is_valid(content)


@pytest.mark.parametrize("name", REQUIRED)
def test_it_does_not_start_without_a_secret(name: str) -> None:
    with pytest.raises(MissingVariableError, match=f"{name}: set it in .env"):
        compose.interpolated({other: value for other, value in REQUIRED.items() if other != name})


def test_no_secret_is_written_in_it() -> None:
    for name, service in RAW.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|_KEY|ROOT_USER|AUTH$", key) and key != "DFUSION_AUTH" and value:
                assert re.fullmatch(r"\$\{\w+:(\?set it in \.env|-)\}", value), (name, key)
        for url in re.findall(r"://[^@\s\"]*@", json.dumps(service)):
            variable = r"\$\{\w+:(\?set it in \.env|-)\}"
            assert re.fullmatch(rf"://(\w*|{variable}):{variable}@", url), (name, url)


@every_service
def test_a_service_has_few_rights_and_bounds(name: str) -> None:
    service = FILLED[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"]["max-size"]
    assert not {"privileged", "pid", "ipc", "devices"} & set(service)
    assert not [volume for volume in service.get("volumes", ()) if volume.startswith(("/", "."))]
    if name == "s3-folder":  # gives a folder to the S3 server's user, sees no network, and ends
        assert (service["user"], service["cap_add"], service["network_mode"]) == ("0:0", ["CHOWN"], "none")
    else:
        assert "cap_add" not in service
        assert service["user"] not in ("root", "0", "0:0")


@every_service
def test_a_service_is_watched_or_ends_by_itself(name: str) -> None:
    service = FILLED[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
    else:
        assert (service["restart"], bool(service["healthcheck"]["test"])) == ("unless-stopped", True)
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert service["stop_grace_period"] if name != "redis" else True
    for needed, how in service.get("depends_on", {}).items():
        expected = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
        assert how["condition"] == expected
        profiles = set(service.get("profiles", ()))
        always_runs_too = "profiles" not in FILLED[needed] or (
            bool(profiles) and profiles <= set(FILLED[needed]["profiles"])
        )
        assert how.get("required", True) is always_runs_too


@every_service
def test_images_are_pinned(name: str) -> None:
    image = FILLED[name]["image"]
    assert re.search(r":(RELEASE\.\d{4}-\d\d-\d\dT[\d-]+Z|v?\d+\.\d+(\.\d+)?(-\w+)?)$", image), image
    assert ("build" in FILLED[name]) == (name in OURS)


def test_dockerfiles_pin_their_base_and_run_as_the_same_user() -> None:
    for file in ("api.Dockerfile", "worker.Dockerfile"):
        text = (ROOT / "docker" / file).read_text("utf-8")
        assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:3.13.16-slim-trixie"}
        assert "HF_HOME=/var/lib/dfusion/huggingface" in text
        user = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
        assert user == ["10001:10001"] == list({FILLED[name]["user"] for name in OURS})


@pytest.mark.parametrize("name", sorted(OURS))
def test_settings_are_known(name: str) -> None:
    known = {f"DFUSION_{field.upper()}" for field in Settings.model_fields}
    environment = FILLED[name]["environment"]
    withheld = {key for key, value in environment.items() if key in OTHERS_SECRETS and value == ""}
    assert withheld == OTHERS_SECRETS
    assert set(environment) - withheld <= known


OTHERS_SECRETS = {
    "POSTGRES_PASSWORD",
    "POSTGRES_OWNER_PASSWORD",
    "GARAGE_RPC_SECRET",
    "MINIO_ROOT_USER",
    "MINIO_ROOT_PASSWORD",
}
"""Variables of .env that our containers would otherwise see."""


@pytest.mark.parametrize("secret", ["POSTGRES_PASSWORD", "POSTGRES_OWNER_PASSWORD"])
def test_passwords_of_postgresql_are_given_to_few(secret: str) -> None:
    holders = {name for name, service in FILLED.items() if SECRETS[secret] in json.dumps(service)}
    own = "postgres" if secret == "POSTGRES_PASSWORD" else "migrate"
    assert holders == {own, "postgres-roles"}
    assert FILLED["migrate"]["environment"]["DFUSION_DATABASE_URL"].startswith("postgresql://dfusion_owner:")
    services = [FILLED[name]["environment"]["DFUSION_DATABASE_URL"] for name in OURS - {"migrate"}]
    assert {url.partition(SECRETS["POSTGRES_SERVICE_PASSWORD"])[0] for url in services} == {"postgresql://dfusion:"}


def test_an_s3_server_is_one_of_two_or_another_one() -> None:
    for profile in ("garage", "minio"):
        running = compose.active(FILLED, "cpu", profile)
        assert set(running) & S3_SERVERS == {profile}
        assert running[profile]["networks"] == {"default": {"aliases": ["s3"]}}
        assert f"{profile}-key" in running
    assert set(compose.active(FILLED, "cpu")) == {
        "postgres",
        "postgres-roles",
        "redis",
        "migrate",
        "api",
        "sweeper",
        "worker",
    }
    elsewhere = compose.interpolated(REQUIRED | {"DFUSION_S3_ENDPOINT": "https://s3.example.org"})["services"]
    endpoints = {name: elsewhere[name]["environment"]["DFUSION_S3_ENDPOINT"] for name in OURS}
    assert set(endpoints.values()) == {"https://s3.example.org"}


def test_garages_configuration_has_the_port_and_region_of_the_service() -> None:
    garage = tomllib.loads((ROOT / "docker" / "garage.toml").read_text("utf-8"))
    assert garage["s3_api"] == {"s3_region": Settings.model_fields["s3_region"].default, "api_bind_addr": "[::]:9000"}
    assert FILLED["api"]["environment"]["DFUSION_S3_ENDPOINT"] == "http://s3:9000"
    assert not [name for name in garage if "secret" in name or "token" in name]


def test_ports_are_published_on_localhost_by_default() -> None:
    ports = {name: service["ports"] for name, service in FILLED.items() if "ports" in service}
    s3 = ["127.0.0.1:9000:9000"]
    assert ports == {"api": ["127.0.0.1:8000:8000"], "garage": s3, "minio": s3}
    assert FILLED["api"]["environment"]["DFUSION_AUTH"] == "true"


def test_only_the_api_is_given_the_first_key() -> None:
    key = SECRETS["DFUSION_BOOTSTRAP_ADMIN_KEY"]
    holders = [name for name in OURS if FILLED[name]["environment"]["DFUSION_BOOTSTRAP_ADMIN_KEY"] == key]
    assert holders == ["api"]


def test_time_to_stop_is_longer_than_what_a_stop_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    for name in WORKERS:
        assert seconds(FILLED[name]["stop_grace_period"]) > settings.worker_stop_seconds
    assert seconds(FILLED["api"]["stop_grace_period"]) > settings.shutdown_seconds + CLOSE_SECONDS


def test_a_gpu_is_reserved_for_one_worker_alone() -> None:
    devices: list[Any] = [
        name for name, service in FILLED.items() if "reservations" in service.get("deploy", {}).get("resources", {})
    ]
    assert devices == ["worker-gpu"]
    reserved = FILLED["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_queue_is_served_and_that_of_the_gpu_by_no_cpu_beside_it(profile: str) -> None:
    served: dict[str, set[str]] = {}
    for name, service in compose.active(FILLED, profile).items():
        if name in WORKERS:
            environment = service["environment"]
            for queue in json.loads(environment["DFUSION_WORKER_QUEUES"]):
                served.setdefault(queue, set()).add(environment["DFUSION_DEVICE"])
    assert served == {"gpu": {"cuda" if profile == "gpu" else "cpu"}, "cpu": {"cpu"}}


def test_models_in_a_folder_have_one_path_in_all_containers() -> None:
    mounted = compose.interpolated(REQUIRED | {"MODELS_FOLDER": "/srv/models"})["services"]
    for name in OURS:
        assert "/srv/models:/models:ro" in mounted[name]["volumes"]
        assert "models:/models:ro" in FILLED[name]["volumes"]


def test_the_example_names_every_variable() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text("utf-8")))
    example = (ROOT / ".env.example").read_text("utf-8")
    assert {name for name in used if not re.search(rf"^(# )?{name}=", example, re.MULTILINE)} == set()


def test_images_have_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert {FILLED[name]["image"].partition(":")[2] for name in OURS} == {version}
    for file in ("api.Dockerfile", "worker.Dockerfile"):
        assert f"\nARG VERSION={version}\n" in (ROOT / "docker" / file).read_text("utf-8")
