"""`python -m api`: runs the service, with its embedded worker or in several processes, until Ctrl-C."""

from __future__ import annotations

from dfusion.imports import without_garbage_collection

with without_garbage_collection():
    from api.server import main

if __name__ == "__main__":
    main()
