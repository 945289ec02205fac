"""Importing torch, diffusers and transformers without looking for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and the collector would go through all of it again and again.

    After them it leaves out for good what is alive then (`gc.freeze`), also when the process ends. A worker starts in
    two thirds of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
