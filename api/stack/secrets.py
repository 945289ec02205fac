"""The stack's passwords and keys, created once per folder and stored in it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex

_BYTES = 24


def _new() -> str:
    return token_hex(_BYTES)


@dataclass(frozen=True, repr=False)
class Secrets:
    """Credentials of the stack's servers, which other users of the machine cannot read."""

    postgres_password: str = field(default_factory=_new)
    redis_password: str = field(default_factory=_new)
    s3_access_key: str = field(default_factory=_new)
    s3_secret_key: str = field(default_factory=_new)

    @classmethod
    def of(cls, folder: Path) -> Secrets:
        """Read the secrets of a folder. The first call creates them."""
        path = folder / "secrets.json"
        if path.exists():
            return cls(**json.loads(path.read_text("utf-8")))

        secrets = cls()
        unfinished = path.with_suffix(".new")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(secrets), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        return secrets
