"""Make torchvision importable with a CPU-only torch.

PyPI's torchvision is compiled against CUDA builds of torch. With a CPU-only torch its extension does not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". The cause is
`torchvision._meta_registrations`, which registers fake kernels for operators that are not defined. transformers,
diffusers and open_clip import torchvision and would fail as well. Defining the two schemas before torchvision is
imported is sufficient; the operators themselves (non-maximum suppression) are not used here. If the compiled extension
loads, nothing is done.
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
    """Whether torchvision's compiled operators can be loaded into this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True

    folder = Path(spec.origin).parent
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
    """Define `torchvision::nms` and `torchvision::qnms` if torchvision cannot define them. Idempotent.

    Returns the library that holds the definitions, which exist as long as it does. None if nothing was missing.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms") or _extension_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS.values():
        library.define(schema)
    return library


LIBRARY = define_missing_ops()
