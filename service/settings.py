"""The service's settings: the one module that reads the environment.

Each setting is an environment variable with the prefix `DFUSION_`, or a line of a file `.env`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from dfusion.config import Precision, StrictModel
from dfusion.rewards.config import ScorerConfig
from service.errors import StartError
from service.states import DIVERSITY, QueueName

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_DATABASE_URL = re.compile(r"[\w+]+://(?:[^:/]*(?::[^@]*)?@)?(?:\[[^/?]+\]|[^/:?]+)?(?::(?P<port>[^/?]*))?")
"""What SQLAlchemy takes for a URL. The command line reads settings, too, and does without SQLAlchemy."""


class ModelSetting(StrictModel):
    """A base model of this installation."""

    source: str = Field(description="A diffusers folder, a name of decision 010, or owner/name@revision")
    dtype: Precision = "float32"
    vae_dtype: Precision | None = Field(
        None, description="The VAE's; null: float32 where its config says force_upcast, else dtype"
    )
    reward: str | None = Field(None, description="The scorer that trains it unless another is asked for")
    watch: str | None = Field(None, description="The scorer that watches a training and is never trained on")
    scorers: tuple[str, ...] = Field((), description="Those that judge its images; the reward if empty")


class Settings(BaseSettings):
    """How this installation runs. What a round does is in its request, not here."""

    model_config = SettingsConfigDict(
        env_prefix="DFUSION_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    data_dir: Path = Field(Path("dfusion-data"), description="Folder of the database, artifacts and locks")
    database_url: str = Field("", repr=False, description="SQLAlchemy URL; empty: SQLite in data_dir")
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on")
    broker_url: SecretStr = Field(
        SecretStr(""), description="URL of the Redis that carries hints to Celery workers; empty: workers poll"
    )
    embedded_worker: bool = Field(
        True, description="Whether the service starts and supervises one worker process (never with a broker)"
    )
    worker_queues: tuple[QueueName, ...] = Field(
        (QueueName.GPU, QueueName.CPU), min_length=1, description="Queues of a Celery worker that is started without -Q"
    )
    worker_max_memory_mb: int = Field(
        0, ge=0, description="A Celery worker's child that has grown past it is replaced after its stage; 0: never"
    )
    worker_stop_seconds: Seconds = Field(
        60, description="How long a stopping Celery worker waits for its child before it ends it"
    )
    presence_seconds: Seconds = Field(5, description="How often a worker says that it is there")
    health_file: str = Field("", description="File that a worker or sweeper touches while it is well; empty: none")

    auth: bool = Field(False, description="Whether every request needs an API key")
    bootstrap_admin_key: SecretStr = Field(
        SecretStr(""), description="A first key, with the scope admin: dfk_ and 32 or more letters and digits"
    )
    allow_open: bool = Field(
        False, description="Serve other machines without keys: whoever reaches the port may do all"
    )
    metrics_open: bool = Field(False, description="Whether /metrics needs no key")
    requests_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0, description="Requests per second per API key, or per address without keys; 0: unlimited"
    )
    max_queued_jobs: Count = Field(1000, description="Most queued jobs; further requests get 429")
    max_queued_jobs_per_key: Count = Field(100, description="Most queued jobs per API key")
    min_free_disk_mb: Annotated[int, Field(ge=0)] = Field(
        500, description="With less free space on data_dir's disk, new jobs are refused and stages do not start"
    )
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or JSON objects")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="From which level on")

    device: str = Field("auto", description="Where the models run: cpu, cuda, cuda:1 …; auto: cuda if there is one")
    torch_threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 leaves torch's choice")
    worker_niceness: int = Field(
        15, ge=0, le=19, description="How far a worker's CPU work stands back for other programs and the service"
    )
    batch_size: Count = Field(16, description="Images that go through the U-Net at once")
    shard_prompts: Count = Field(4, description="Prompts whose samples one sampling or fusion stage makes")
    models: dict[str, str | ModelSetting] = Field(
        {}, description="Further models by name: {name: source}, or {name: {source, dtype, vae_dtype, reward, …}}"
    )
    scorers: dict[str, str | ScorerConfig] = Field(
        {}, description="Further scorers by name: {name: 'module:attribute'}, or {name: {kind, …}} of decision 009"
    )

    lease_seconds: Seconds = Field(60, description="A stage whose worker is silent for so long is queued again")
    heartbeat_seconds: Seconds = Field(1, description="How often a worker renews its lease and looks for a cancel")
    stuck_seconds: Seconds = Field(
        3600,
        description="A stage without progress for so long is queued again, though its worker renews its lease",
    )
    poll_seconds: Seconds = Field(0.2, description="How often an idle worker looks for work")
    sweep_seconds: Seconds = Field(10, description="How often expired leases and lost hints are looked for")
    rehint_seconds: Seconds = Field(
        60, description="A free stage that nobody takes is hinted again after so long; then after twice as long"
    )
    checkpoint_seconds: Seconds = Field(60, description="How often a training writes a checkpoint")
    shutdown_seconds: Seconds = Field(20, description="How long a stopping service waits for its worker")
    restart_seconds: Seconds = Field(0.5, description="First pause before a dead worker is restarted; it doubles")
    max_crashes: Count = Field(3, description="Workers that one stage may lose before it fails")
    max_attempts: Count = Field(8, description="Attempts at a stage that fails for a passing reason")
    retry_seconds: Seconds = Field(1, description="First pause before such a stage is tried again; it doubles")

    max_body_bytes: Count = Field(1 << 20, description="Largest request body")
    max_images_per_round: Count = Field(100_000, description="Largest number of samples that one round may ask for")

    s3_endpoint: str = Field("", description="S3 server, host:port or URL; empty: artifacts are files in data_dir")
    s3_region: str = Field("us-east-1", description="The S3 bucket's region; signatures name it")
    s3_bucket: str = Field("dfusion", description="S3 bucket, this installation's own; made if it is missing")
    s3_access_key: SecretStr = Field(SecretStr(""), description="Access key of the S3 server")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Secret key of the S3 server")
    s3_secure: bool = Field(True, description="Whether S3 endpoints without http:// or https:// are spoken to by TLS")
    s3_public_endpoint: str = Field("", description="S3 server as clients reach it; empty: the service hands bytes on")
    presign_seconds: int = Field(600, ge=1, le=604_800, description="How long a link to that endpoint is good")
    s3_cache_bytes: int = Field(4 << 30, ge=0, description="Size of a worker's local copies of S3 objects; 0: none")

    collect_seconds: Seconds = Field(3600, description="How often what no row names is removed from the storage")
    collect_after_seconds: Seconds = Field(86_400, description="How old it must be: nobody is writing it any more")
    keep_trajectories: Literal["all", "pairs", "none"] = Field(
        "all", description="Trajectories kept after a job has ended: all, those of samples in pairs (by file), none"
    )

    @classmethod
    def read(cls) -> Settings:
        """Those of the environment. Raises StartError naming what is wrong."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = "".join(f"DFUSION_{part}: ".upper() for part in first["loc"][:1])
            raise StartError(f"{name}{first['msg'].removeprefix('Value error, ')}; see .env.example") from error
        except SettingsError as error:  # what is not the JSON that it should be
            raise StartError(f"DFUSION settings: {error}; see .env.example") from error

    @classmethod
    def or_exit(cls) -> Settings:
        """Those of the environment; ends the program with a message where they are wrong."""
        try:
            return cls.read()
        except StartError as error:
            raise SystemExit(f"cannot start: {error}") from error

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                f"DFUSION_HEARTBEAT_SECONDS: expected at most half of DFUSION_LEASE_SECONDS ({self.lease_seconds:g}), "
                f"got {self.heartbeat_seconds:g}"
            )
        return self

    @field_validator("broker_url")
    @classmethod
    def _is_redis(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected a URL such as redis://host:6379/0")
        return url

    @field_validator("database_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        parts = _DATABASE_URL.match(url or "sqlite://")
        if parts is None or not (parts["port"] is None or parts["port"].isdecimal()):
            raise ValueError("expected a URL such as postgresql+psycopg://user:password@host/name")
        return url

    @field_validator("scorers")
    @classmethod
    def _leave_diversity(cls, scorers: dict[str, str | ScorerConfig]) -> dict[str, str | ScorerConfig]:
        if DIVERSITY in scorers:
            raise ValueError(f"expected another name than {DIVERSITY!r}, which is a metric's")
        return scorers

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'dfusion.db'}"

    @property
    def broker(self) -> str:
        """The broker's URL, empty in embedded mode. It may hold a password."""
        return self.broker_url.get_secret_value()

    def for_child(self) -> dict[str, str]:
        """The environment of a child process: this one's, with these settings, secrets included, but not the key."""
        values = _revealed(self.model_dump()) | {"bootstrap_admin_key": ""}
        return dict(os.environ) | {
            f"DFUSION_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
        }

    def secrets(self) -> list[str]:
        """All secret values, also those within other settings."""
        return list(_secrets(self.model_dump()))


def _revealed(value: Any) -> Any:
    """A dumped value as JSON takes it, secrets in plain text."""
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
