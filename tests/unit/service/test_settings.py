import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from service.logs import secrets_of
from service.settings import Settings

ROOT = Path(__file__).parents[3]


def test_the_example_lists_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    settings = [line.removeprefix("# ") for line in lines if re.match(r"# DFUSION_[A-Z0-9_]+=", line)]
    assert [line.split("=")[0] for line in settings] == [f"DFUSION_{name.upper()}" for name in Settings.model_fields]
    (tmp_path / ".env").write_text("\n".join(settings), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert Settings() == Settings(_env_file=None)  # type: ignore[call-arg]


def test_a_child_process_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, models={"tiny": str(tmp_path)}, lease_seconds=7.5, heartbeat_seconds=2, embedded_worker=False
    )
    for name, value in settings.for_child().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


class MoreSettings(Settings):
    """Settings with a further secret that workers need."""

    storage_secret: SecretStr = SecretStr("")


def test_a_child_process_gets_secrets_but_not_the_bootstrap_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFUSION_BOOTSTRAP_ADMIN_KEY", "dfk_inherited")
    settings = MoreSettings(bootstrap_admin_key=SecretStr("dfk_given"), storage_secret=SecretStr("opens the store"))
    child = settings.for_child()
    assert (child["DFUSION_STORAGE_SECRET"], child["DFUSION_BOOTSTRAP_ADMIN_KEY"]) == ("opens the store", "")


def test_an_invalid_setting_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFUSION_LEASE_SECONDS", "0")
    with pytest.raises(ValidationError, match="greater than 0"):
        Settings()


def test_secrets_reach_a_child_process_but_never_appear_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(s3_access_key="the-access-key", s3_secret_key="the-secret-key")  # type: ignore[arg-type]
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "the-access-key" not in text
        assert "the-secret-key" not in text

    for name, value in settings.for_child().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
    assert Settings().s3_secret_key.get_secret_value() == "the-secret-key"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "abc", "DFUSION_PORT: .*integer"),
        ("PORT", "99999", "DFUSION_PORT: .*65535"),
        ("MODELS", "oops", "DFUSION_MODELS: expected JSON"),
        ("MODELS", '{"a/b": "folder"}', "DFUSION_MODELS: expected names of .*, got 'a/b'"),
        ("MODELS", '{"best": "folder"}', "DFUSION_MODELS: expected a name other than 'best'"),
        ("MODELS", '{"x": {"source": "s", "dtype": "float8"}}', "DFUSION_MODELS: x: dtype: .*'float32'"),
        ("SCORERS", '{"x": {"kind": "http"}}', "DFUSION_SCORERS: x: http: url: Field required"),
        ("SCORERS", '{"x": {"kind": "magic"}}', "DFUSION_SCORERS: x: .*'magic'"),
        ("DATABASE_URL", "mysql://host/name", "DFUSION_DATABASE_URL: .*expected a URL"),
        ("DATABASE_URL", "postgresql+asyncpg://host/name", "DFUSION_DATABASE_URL: .*expected a URL"),
        ("S3_ENDPOINT", "http://host:70000", "DFUSION_S3_ENDPOINT: expected host:port"),
        ("S3_PUBLIC_ENDPOINT", "http://host/path", "DFUSION_S3_PUBLIC_ENDPOINT: expected host:port"),
        ("S3_BUCKET", "My_Bucket", "DFUSION_S3_BUCKET: expected 3 to 63 lower-case"),
        ("S3_ACCESS_KEY", "alone", "DFUSION_S3_SECRET_KEY: expected both keys"),
        ("DEVICE", "the GPU", "DFUSION_DEVICE: expected auto, cpu, cuda"),
        ("DATABASE_URL", "nonsense", "DFUSION_DATABASE_URL: .*expected a URL"),
        ("DATABASE_URL", "postgresql://u:p@host:port/name", "DFUSION_DATABASE_URL: .*expected a URL"),
        ("SCORERS", '{"diversity": "a:b"}', "DFUSION_SCORERS: .*'diversity', which is a metric"),
        ("HEARTBEAT_SECONDS", "40", r"DFUSION_HEARTBEAT_SECONDS: .*half of DFUSION_LEASE_SECONDS \(60\), got 40"),
        ("BROKER_URL", "localhost:6379", "DFUSION_BROKER_URL: expected a URL such as redis://"),
        ("BROKER_URL", "redis://host:port/0", "DFUSION_BROKER_URL: expected a URL such as redis://"),
        ("BROKER_URL", "redis://host:6379/first", "DFUSION_BROKER_URL: expected a URL such as redis://"),
        ("WORKER_QUEUES", '["gpus"]', "DFUSION_WORKER_QUEUES: .*'gpu' or 'cpu'"),
    ],
)
def test_an_invalid_setting_exits_with_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"DFUSION_{name}", value)
    with pytest.raises(SystemExit, match=f"^cannot start: .*{message}") as stopped:
        Settings.or_exit()
    assert len(str(stopped.value).splitlines()) == 1


def test_an_unreadable_env_file_exits_with_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"DFUSION_PORT=\xff")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^cannot start: \.env: expected a text file in UTF-8"):
        Settings.or_exit()


def test_nested_secrets_reach_a_child_process_but_never_appear_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = {"kind": "http", "url": "http://scorer/", "bearer_token": "the-bearer-token"}
    settings = Settings(scorers={"remote": scorer})  # type: ignore[dict-item]
    for name, value in settings.for_child().items():
        monkeypatch.setenv(name, value)

    [(name, inherited)] = Settings().scorers.items()
    assert (name, inherited) == ("remote", settings.scorers["remote"])
    assert inherited.bearer_token.get_secret_value() == "the-bearer-token"  # type: ignore[union-attr]
    assert "the-bearer-token" in secrets_of(settings) and "the-bearer-token" not in repr(settings)
