"""Let torchvision import beside a CPU-only torch.

PyPI's torchvision is compiled against CUDA builds of torch; with a CPU-only torch its extension does not load, and
its import then fails with "operator torchvision::nms does not exist": `torchvision._meta_registrations` registers
fake kernels for operators that nobody has defined. transformers, diffusers and open_clip import torchvision, so they
would fail with it. Defining the two schemas before torchvision is imported is enough; the operators themselves
(non-maximum suppression) are not used here. Where the compiled extension loads, nothing is done.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _extension_loads() -> bool:
    """Whether torchvision's own compiled operators can be loaded into this torch."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True
    folder = Path(found.origin).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return hasattr(torch.ops.torchvision, "nms")
    return False


def define_missing_ops() -> torch.library.Library | None:
    """Define `torchvision::nms` and `torchvision::qnms` if, and only if, torchvision cannot. Idempotent.

    Returns the library that holds the definitions (they live as long as it does), None where nothing was missing.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms") or _extension_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS.values():
        library.define(schema)
    return library


LIBRARY = define_missing_ops()
