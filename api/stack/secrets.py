"""The stack's own passwords and keys, made once for a folder and kept in it."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

_BYTES = 24


def _new() -> str:
    return secrets.token_hex(_BYTES)


@dataclass(frozen=True, repr=False)
class Secrets:
    """What keeps this machine's other users out of the stack's servers."""

    postgres_password: str = field(default_factory=_new)
    redis_password: str = field(default_factory=_new)
    s3_access_key: str = field(default_factory=_new)
    s3_secret_key: str = field(default_factory=_new)

    @classmethod
    def of(cls, folder: Path) -> Secrets:
        """Those of the folder; made where there are none yet."""
        path = folder / "secrets.json"
        if path.exists():
            return cls(**json.loads(path.read_text("utf-8")))
        made, unfinished = cls(), path.with_suffix(".new")
        unfinished.unlink(missing_ok=True)
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(made), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        return made
