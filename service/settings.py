"""The settings of the service. This is the only module that reads the environment.

Each setting is an environment variable with the prefix `DFUSION_`, or a line of the file `.env`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from dfusion.config import Precision, StrictModel
from dfusion.rewards.config import ScorerConfig, WeightedScorerConfig
from service.errors import StartError
from service.states import BEST, DIVERSITY, SHARE, QueueName

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Days = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_DATABASE_URL = re.compile(
    r"(?:sqlite(?:\+pysqlite)?|postgres(?:ql)?|postgresql\+psycopg)://"
    r"(?:[^:/]*(?::[^@]*)?@)?(?:\[[^/?]+\]|[^/:?]+)?(?::(?P<port>[^/?]*))?"
)
"""URLs as SQLAlchemy parses them. The command line also reads settings and must not import SQLAlchemy."""
_S3_ENDPOINT = re.compile(r"(?:https?://)?(?:\[[0-9a-fA-F:]+\]|[\w.-]+)(?::(?P<port>\d+))?/?", re.ASCII)
_S3_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_DEVICE = re.compile(r"auto|cpu|[a-z]+(?::\d{1,3})?")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names that requests and paths can contain."""
_MAX_PORT = 65535
_OF_CLIENTS = frozenset({"url", "api_key"})
"""Variables of clients, which may run in the same environment."""
_SIMILARITY = 0.8
_UNION_PART = re.compile(r"str|.*[\[(A-Z-].*")
"""The parts of an error's location that name an alternative of a field, not a field."""


class ModelSetting(StrictModel):
    """A base model of this installation."""

    source: str = Field(description="A diffusers folder, a name of decision 010, or owner/name@revision")
    adapter: Path | None = Field(
        None, description="File or folder of a LoRA of diffusers, PEFT or kohya to start from, on all machines"
    )
    dtype: Precision = "float32"
    vae_dtype: Precision | None = Field(
        None, description="Precision of the VAE. null = float32 if its config sets force_upcast, else dtype"
    )
    reward: str | None = Field(None, description="Default reward of trainings")
    watch: str | None = Field(None, description="Default held-out scorer of trainings; never trained on")
    scorers: tuple[str, ...] = Field((), description="Default scorers of its images. Empty = the reward")


class Settings(BaseSettings):
    """How this installation runs. Settings of a round are part of its request."""

    model_config = SettingsConfigDict(
        env_prefix="DFUSION_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    data_dir: Path = Field(Path("dfusion-data"), description="Folder of the database, artifacts and locks")
    database_url: str = Field("", repr=False, description="SQLAlchemy URL. Empty = SQLite in data_dir")
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on")
    api_processes: int = Field(
        1, ge=1, le=10, description="Processes of the API. More than 1 needs PostgreSQL, and a broker for rate limits"
    )
    broker_url: SecretStr = Field(
        SecretStr(""), description="URL of the Redis that carries hints to Celery workers. Empty = workers poll"
    )
    embedded_worker: bool = Field(
        True, description="Start and supervise one worker process in the service; ignored with a broker"
    )
    worker_queues: tuple[QueueName, ...] = Field(
        (QueueName.GPU, QueueName.CPU), min_length=1, description="Queues of a Celery worker started without -Q"
    )
    worker_max_memory_mb: int = Field(
        0, ge=0, description="Replace a Celery worker's child above this memory after its stage. 0 = never"
    )
    worker_stop_seconds: Seconds = Field(
        60, description="How long a stopping Celery worker waits before it kills its child"
    )
    presence_seconds: Seconds = Field(5, description="How often a worker reports its presence")
    health_file: str = Field("", description="File that a healthy worker or sweeper touches. Empty = none")

    auth: bool = Field(False, description="Require an API key for every request")
    bootstrap_admin_key: SecretStr = Field(
        SecretStr(""), description="First API key, with the scope admin: dfk_ and 32 or more letters and digits"
    )
    allow_open: bool = Field(
        False, description="Allow listening on addresses other than loopback without API keys: full access for everyone"
    )
    metrics_open: bool = Field(False, description="Serve /metrics without an API key")
    requests_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0, description="Requests per second per API key, or per address without keys. 0 = unlimited"
    )
    max_queued_jobs: Count = Field(1000, description="Maximum number of queued jobs; further requests get 429")
    max_queued_jobs_per_key: Count = Field(100, description="Maximum number of queued jobs per API key")
    min_free_disk_mb: Annotated[int, Field(ge=0)] = Field(
        500, description="Free space on the disk of data_dir below which new jobs are refused and no stage starts"
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text, or as JSON objects")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Minimum level of log lines")

    device: str = Field("auto", description="Device of the models: cpu, cuda, cuda:1 … auto = cuda if available")
    training_devices: tuple[str, ...] = Field(
        (),
        description='Additional devices for training, with one process each: ["cuda:1", "cuda:2"]. '
        "Empty = only the worker's own device",
    )
    torch_threads: int = Field(0, ge=0, description="CPU threads of a worker. 0 = torch's default")
    worker_niceness: int = Field(
        15, ge=0, le=19, description="CPU priority of workers (nice); higher values keep the API responsive"
    )
    batch_size: Count = Field(
        16, description="Images in one batch. A worker halves batches that do not fit into the GPU's memory"
    )
    compile_models: bool = Field(
        False,
        description="Compile the U-Net's transformer blocks in workers; the first steps then take minutes "
        "(decision 030)",
    )
    shard_prompts: Count = Field(4, description="Prompts of one sampling or fusion stage")
    models: dict[str, str | ModelSetting] = Field(
        {}, description="Additional models by name: {name: source}, or {name: {source, adapter, dtype, reward, …}}"
    )
    scorers: dict[str, str | ScorerConfig] = Field(
        {}, description="Additional scorers by name: {name: 'module:attribute'}, or {name: {kind, …}} of decision 009"
    )

    lease_seconds: Seconds = Field(
        60, description="How long a lease lasts without a heartbeat; its stage is then requeued"
    )
    heartbeat_seconds: Seconds = Field(15, description="How often a worker renews its lease and records its progress")
    stop_check_seconds: Seconds = Field(
        2, description="How often a worker checks for a cancel or pause request between heartbeats, without a write"
    )
    stuck_seconds: Seconds = Field(
        3600, description="How long a worker may load a model or compile a first step before it is replaced as hung"
    )
    poll_seconds: Seconds = Field(0.2, description="How often an idle worker polls for stages")
    sweep_seconds: Seconds = Field(10, description="How often the sweeper checks for expired leases and lost hints")
    rehint_seconds: Seconds = Field(
        60, description="First pause before the hint for an unclaimed stage is repeated; doubles each time"
    )
    checkpoint_seconds: Seconds = Field(60, description="How often a training writes a checkpoint")
    shutdown_seconds: Seconds = Field(20, description="How long a stopping service waits for its worker")
    restart_seconds: Seconds = Field(
        0.5, description="First pause before a dead worker or API process is restarted; doubles each time"
    )
    max_crashes: Count = Field(3, description="Lost workers after which a stage fails")
    max_attempts: Count = Field(8, description="Attempts of a stage that fails with a transient error")
    retry_seconds: Seconds = Field(1, description="First pause before such a stage is retried; doubles each time")

    max_body_bytes: Count = Field(1 << 20, description="Maximum size of a request body")
    request_seconds: Seconds = Field(60, description="How long a client may take to send a request, with its body")
    max_prompts_per_job: Count = Field(20_000, description="Maximum number of prompts of a job, all its sets together")
    max_stages_per_job: Count = Field(1_000_000, description="Maximum number of stages of a job, in all its rounds")
    max_images_per_job: Count = Field(10_000_000, description="Maximum number of images of a job, in all its rounds")
    max_pairs_per_training: Count = Field(20_000, description="Maximum number of pairs of a training on stored pairs")
    max_images_per_round: Count = Field(100_000, description="Maximum number of samples of one round")

    s3_endpoint: str = Field("", description="S3 server, host:port or URL. Empty = artifacts are files in data_dir")
    s3_region: str = Field("us-east-1", description="Region of the S3 bucket, for signatures")
    s3_bucket: str = Field("dfusion", description="S3 bucket that only this installation uses; created if missing")
    s3_access_key: SecretStr = Field(SecretStr(""), description="Access key of the S3 server")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Secret key of the S3 server")
    s3_secure: bool = Field(True, description="Use TLS for S3 endpoints without http:// or https://")
    s3_public_endpoint: str = Field(
        "", description="S3 server for clients' downloads. Empty = the service sends the bytes"
    )
    presign_seconds: int = Field(600, ge=1, le=604_800, description="How long links to that endpoint are valid")
    s3_cache_bytes: int = Field(4 << 30, ge=0, description="Size of a worker's cache of S3 objects. 0 = no cache")

    collect_seconds: Seconds = Field(3600, description="How often unreferenced objects are removed from the storage")
    collect_after_seconds: Seconds = Field(
        86_400, description="Minimum age of such objects, and time since the end of their stage"
    )
    keep_trajectories: Literal["all", "pairs", "none"] = Field(
        "all", description="Trajectories kept after a job has ended: all, those of samples in pairs (by file), none"
    )
    webhooks_allow_loopback: bool = Field(
        False, description="For tests: allow webhooks on this machine, also without TLS"
    )
    retain_succeeded_days: Days = Field(
        0, description="Days after which a succeeded job that nothing uses is deleted, with its results. 0 = never"
    )
    retain_failed_days: Days = Field(0, description="The same for failed jobs")
    retain_cancelled_days: Days = Field(0, description="The same for cancelled jobs")
    retain_events_days: Days = Field(
        0, description="Days after the end of a job when its events, which are its log, are removed. 0 = never"
    )
    retain_idempotency_keys_days: Days = Field(
        90, description="Days after which a request with the same Idempotency-Key creates another job. 0 = never"
    )

    @classmethod
    def read(cls) -> Settings:
        """The settings of the environment. Raises StartError that names the first invalid or misspelled variable."""
        try:
            settings = cls()
            _refuse_misspelled(set(cls.model_fields))
            return settings
        except ValidationError as error:
            raise StartError(f"{_first_problem(error)}; see .env.example") from error
        except SettingsError as error:
            name = re.search(r'field "(\w+)"', str(error))
            variable = f"DFUSION_{name[1].upper()}" if name else "DFUSION settings"
            raise StartError(f"{variable}: expected JSON: {error.__cause__ or error}; see .env.example") from error
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f".env: expected a text file in UTF-8: {error}") from error

    @classmethod
    def or_exit(cls) -> Settings:
        """The settings of the environment. Exits with a message if they are invalid."""
        try:
            return cls.read()
        except StartError as error:
            raise SystemExit(f"cannot start: {error}") from error

    @model_validator(mode="after")
    def _heartbeat_within_lease(self) -> Self:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                f"DFUSION_HEARTBEAT_SECONDS: expected at most half of DFUSION_LEASE_SECONDS ({self.lease_seconds:g}), "
                f"got {self.heartbeat_seconds:g}"
            )
        return self

    @field_validator("broker_url")
    @classmethod
    def _is_redis(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and not _is_redis_url(url.get_secret_value()):
            raise ValueError("expected a URL such as redis://host:6379/0")
        return url

    @field_validator("s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _is_an_endpoint(cls, endpoint: str) -> str:
        parts = _S3_ENDPOINT.fullmatch(endpoint or "localhost")
        if parts is None or int(parts["port"] or 0) > _MAX_PORT:
            raise ValueError(f"expected host:port, or a URL such as https://host, without a path; got {endpoint!r}")
        return endpoint

    @field_validator("s3_bucket")
    @classmethod
    def _is_a_bucket(cls, name: str) -> str:
        if not _S3_BUCKET.fullmatch(name):
            raise ValueError(f"expected 3 to 63 lower-case letters, digits, '.' and '-', got {name!r}")
        return name

    @model_validator(mode="after")
    def _complete_credentials(self) -> Self:
        if bool(self.s3_access_key.get_secret_value()) != bool(self.s3_secret_key.get_secret_value()):
            missing = "ACCESS" if self.s3_secret_key.get_secret_value() else "SECRET"
            raise ValueError(
                f"DFUSION_S3_{missing}_KEY: expected both keys of the S3 server or none, got only the other"
            )
        return self

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not _DEVICE.fullmatch(device):
            raise ValueError(f"expected auto, cpu, cuda, or a device such as cuda:1, got {device!r}")
        return device

    @field_validator("training_devices")
    @classmethod
    def _are_devices(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        for device in devices:
            if device == "auto" or not _DEVICE.fullmatch(device):
                raise ValueError(f"expected devices such as cuda:1, got {device!r}")
        return devices

    @field_validator("models")
    @classmethod
    def _can_be_named(cls, models: dict[str, str | ModelSetting]) -> dict[str, str | ModelSetting]:
        for name in models:
            if not _MODEL_NAME.fullmatch(name):
                raise ValueError(f"expected names of at most 100 letters, digits, '.', '_' and '-', got {name!r}")
        if BEST in models:
            raise ValueError(f"expected a name other than {BEST!r}, which is the alias of the best round's model")
        return models

    @field_validator("database_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        parts = _DATABASE_URL.match(url or "sqlite://")
        if parts is None or not (parts["port"] is None or parts["port"].isdecimal()):
            raise ValueError("expected a URL such as postgresql+psycopg://user:password@host/name")
        return url

    @field_validator("scorers")
    @classmethod
    def _reserve_names_of_metrics(cls, scorers: dict[str, str | ScorerConfig]) -> dict[str, str | ScorerConfig]:
        if DIVERSITY in scorers:
            raise ValueError(f"expected a name other than {DIVERSITY!r}, which is a metric")
        for name, scorer in scorers.items():
            if name.startswith(SHARE):
                raise ValueError(f"expected names that do not start with {SHARE!r}, as metrics do, got {name!r}")
            if isinstance(scorer, WeightedScorerConfig) and scorer.normalise:
                raise ValueError(f"{name}: expected a sum of raw scores: only a round's request can normalise one")
        return scorers

    @property
    def database(self) -> str:
        """The URL of the database."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'dfusion.db'}"

    @property
    def silent_seconds(self) -> float:
        """A worker that has not reported for longer counts as silent."""
        return 3 * self.presence_seconds

    @property
    def broker(self) -> str:
        """The URL of the broker, empty in embedded mode. It may contain a password."""
        return self.broker_url.get_secret_value()

    def for_child(self) -> dict[str, str]:
        """The environment of a child process: the current one and these settings.

        It includes all secrets except the bootstrap key, which only the service needs.
        """
        values = _revealed(self.model_dump()) | {"bootstrap_admin_key": ""}
        return dict(os.environ) | {
            f"DFUSION_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
        }

    def secrets(self) -> list[str]:
        """All secret values, including those nested in other settings."""
        return list(_secrets(self.model_dump()))


def _refuse_misspelled(fields: set[str]) -> None:
    """Raise StartError for a variable that no setting has, but one with a similar name.

    Other variables may have the prefix, such as those that Kubernetes sets for a service named dfusion.
    """
    prefix = "dfusion_"
    for variable in sorted({*os.environ, *dotenv_values(".env")}):
        name = variable.lower().removeprefix(prefix)
        if not variable.lower().startswith(prefix) or name in fields or name in _OF_CLIENTS:
            continue
        similar = get_close_matches(name, fields, 1, _SIMILARITY)
        if similar:
            raise StartError(f"{variable}: unknown setting; did you mean DFUSION_{similar[0].upper()}?")


def _first_problem(error: ValidationError) -> str:
    """The most specific problem of the first invalid variable, with the name of the variable."""
    problems = error.errors()
    variable = problems[0]["loc"][:1]
    of_variable = [problem for problem in problems if problem["loc"][:1] == variable]
    worst = max(reversed(of_variable), key=lambda problem: len(problem["loc"]))

    message = worst["msg"].removeprefix("Value error, ")
    names = [f"DFUSION_{part}".upper() for part in variable]
    names += [str(part) for part in worst["loc"][1:2]]
    names += [str(part) for part in worst["loc"][2:] if not _UNION_PART.fullmatch(str(part))]
    return ": ".join([*names, message])


def _is_redis_url(url: str) -> bool:
    """Whether the URL has a form that the clients of Redis can parse."""
    try:
        parts = urlsplit(url)
        port = parts.port  # raises ValueError for what is no port
    except ValueError:
        return False
    if parts.scheme == "unix":
        return bool(parts.path)
    database = parts.path.strip("/")
    return parts.scheme in ("redis", "rediss") and port != 0 and (not database or database.isdecimal())


def _revealed(value: Any) -> Any:
    """A dumped value as JSON types, secrets in plain text."""
    match value:
        case SecretStr():
            return value.get_secret_value()
        case dict():
            return {str(key): _revealed(part) for key, part in value.items()}
        case list() | tuple():
            return [_revealed(part) for part in value]
        case None | bool() | int() | float():
            return value
    return str(value)


def _secrets(value: Any) -> Iterator[str]:
    match value:
        case SecretStr():
            yield value.get_secret_value()
        case dict():
            for part in value.values():
                yield from _secrets(part)
        case list() | tuple():
            for part in value:
                yield from _secrets(part)
