# ruff: noqa: F401
"""Imports of `tests.forking`: what the programs of the service import, except modules that read the settings."""

import traceback

from dfusion.imports import without_garbage_collection

try:
    with without_garbage_collection():
        import celery.bin.worker
        import celery.concurrency.prefork
        import celery.fixups.django
        import celery.worker.worker
        import uvicorn
        import uvicorn.lifespan.on
        import uvicorn.loops.auto
        import uvicorn.protocols.http.auto
        import uvicorn.protocols.websockets.auto

        import api.server
        import service.db.migrate
        import service.maintenance
        import worker.presence
        import worker.runner
        import worker.workbench
except Exception:  # the tests that need the broken module fail
    traceback.print_exc()
