"""docker-compose.yml as Docker Compose reads it: with merged anchors and interpolated variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<word>[^}]*))?\})")
REQUIRED = {
    "COMPOSE_PROFILES": "cpu,garage",
    "POSTGRES_PASSWORD": "a-postgres-password",
    "POSTGRES_OWNER_PASSWORD": "an-owner-password",
    "POSTGRES_SERVICE_PASSWORD": "a-service-password",
    "REDIS_PASSWORD": "a-redis-password",
    "DFUSION_S3_ACCESS_KEY": "an-s3-access-key",
    "DFUSION_S3_SECRET_KEY": "an-s3-secret-key",
    "DFUSION_BOOTSTRAP_ADMIN_KEY": "dfk_" + "a1" * 20,
}
"""What .env must give."""
SECRETS = {name: value for name, value in REQUIRED.items() if name != "COMPOSE_PROFILES"}


class MissingVariableError(Exception):
    """A required variable is not set."""


def raw() -> dict[str, Any]:
    """Return the merged file without interpolation."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return loaded


def interpolated(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the file with interpolated variables. Raises MissingVariableError."""
    filled: dict[str, Any] = _fill(raw(), variables)
    return filled


def active(services: Mapping[str, Any], *profiles: str) -> dict[str, Any]:
    """Return the services that run with these profiles."""
    return {
        name: service
        for name, service in services.items()
        if not service.get("profiles") or set(service["profiles"]) & set(profiles)
    }


def _fill(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _fill(inner, variables) for name, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, variables) for inner in value]
    return _VARIABLE.sub(lambda match: _value(match, variables), value) if isinstance(value, str) else value


def _value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    if match["dollar"]:
        return "$"
    variable = variables.get(match["name"], "")
    if not variable and match["operator"] == ":?":
        raise MissingVariableError(f"{match['name']}: {match['word']}")
    return variable or (match["word"] if match["operator"] == ":-" else "")
