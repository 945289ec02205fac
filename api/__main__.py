"""`python -m api`: the service on its settings' address, with its worker, until Ctrl-C."""

from __future__ import annotations

import uvicorn

from api.core.settings import Settings
from api.main import create_app


def main() -> None:
    """Serve until stopped."""
    settings = Settings()
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port)


if __name__ == "__main__":
    main()
