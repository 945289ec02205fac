"""The golden copy of the OpenAPI document. `make openapi` updates it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from api.main import create_app
from tests.service import settings_for

GOLDEN = Path(__file__).parent / "unit" / "api" / "openapi.json"
COMMAND = "make openapi"


def document() -> dict[str, Any]:
    """Return the document of a service that requires API keys, which is the most complete."""
    nowhere = Path("nowhere")
    return create_app(settings_for(nowhere, nowhere, auth=True, bootstrap_admin_key=SecretStr("dfk_none"))).openapi()


def text() -> str:
    """Return the document as the text of the golden copy."""
    return json.dumps(document(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(text(), "utf-8")
