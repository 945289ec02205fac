"""The service's settings: the one module that reads the environment.

Each setting is an environment variable with the prefix `DFUSION_`, or a line of a file `.env`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """How this installation runs. What a round does is in its request, not here."""

    model_config = SettingsConfigDict(
        env_prefix="DFUSION_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    data_dir: Path = Field(Path("dfusion-data"), description="Folder of the database, artifacts and locks")
    database_url: str = Field("", repr=False, description="SQLAlchemy URL; empty: SQLite in data_dir")
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on")
    embedded_worker: bool = Field(True, description="Whether the service starts and supervises one worker process")

    auth: bool = Field(False, description="Whether every request needs an API key")
    bootstrap_admin_key: SecretStr = Field(
        SecretStr(""), description="A first key, with the scope admin: dfk_ and 32 or more letters and digits"
    )
    allow_open: bool = Field(
        False, description="Serve other machines without keys: whoever reaches the port may do all"
    )
    metrics_open: bool = Field(False, description="Whether /metrics needs no key")
    requests_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0, description="Requests of one key, or of one address without a key; 0: as many as come"
    )
    max_queued_jobs: Count = Field(1000, description="Jobs that may wait for their start; more are refused for now")
    max_queued_jobs_per_key: Count = Field(100, description="Those of one key")
    min_free_disk_mb: Annotated[int, Field(ge=0)] = Field(
        500, description="With less room on data_dir's disk no work is taken on or begun"
    )
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or JSON objects")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="From which level on")

    device: str = Field("auto", description="Where the models run: cpu, cuda, cuda:1 …; auto: cuda if there is one")
    torch_threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 leaves torch's choice")
    batch_size: Count = Field(16, description="Images that go through the U-Net at once")
    shard_prompts: Count = Field(4, description="Prompts whose samples one sampling or fusion stage makes")
    models: dict[str, Path] = Field({}, description="Further models by name: {name: diffusers folder}")
    scorers: dict[str, str] = Field({}, description="Further scorers by name: {name: 'module:factory'}")

    lease_seconds: Seconds = Field(60, description="A stage whose worker is silent for so long is queued again")
    heartbeat_seconds: Seconds = Field(1, description="How often a worker renews its lease and looks for a cancel")
    poll_seconds: Seconds = Field(0.2, description="How often an idle worker looks for work")
    sweep_seconds: Seconds = Field(10, description="How often expired leases are looked for")
    checkpoint_seconds: Seconds = Field(60, description="How often a training writes a checkpoint")
    shutdown_seconds: Seconds = Field(20, description="How long a stopping service waits for its worker")
    restart_seconds: Seconds = Field(0.5, description="First pause before a dead worker is restarted; it doubles")
    max_crashes: Count = Field(3, description="Workers that one stage may lose before it fails")
    max_attempts: Count = Field(8, description="Attempts at a stage that fails for a passing reason")
    retry_seconds: Seconds = Field(1, description="First pause before such a stage is tried again; it doubles")

    max_body_bytes: Count = Field(1 << 20, description="Largest request body")
    max_images_per_round: Count = Field(100_000, description="Largest number of samples that one round may ask for")

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'dfusion.db'}"

    def for_child(self) -> dict[str, str]:
        """The environment of a child process: this one's, with these settings, but not the key."""
        secrets = {name: value.get_secret_value() for name, value in self if isinstance(value, SecretStr)}
        values = self.model_dump(mode="json") | secrets | {"bootstrap_admin_key": ""}
        return dict(os.environ) | {
            f"DFUSION_{name.upper()}": json.dumps(value) if isinstance(value, dict) else str(value)
            for name, value in values.items()
        }
