"""What comes with dfusion under a name: base models and scorers. Imports no torch.

A deployment may add its own. The shapes world's need no download; the others are downloaded when they are first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dfusion.config import Precision


@dataclass(frozen=True)
class ModelEntry:
    """A base model.

    folder          a pipeline in diffusers' layout
    reward          the scorer that trains it unless another is asked for
    watch           the scorer that watches the training beside the reward and is never trained on
    scorers         the scorers that can judge its images
    """

    name: str
    folder: Path
    reward: str
    scorers: tuple[str, ...]
    description: str = ""
    watch: str | None = None
    dtype: Precision = "float32"


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that `dfusion.rewards.load_scorer` knows."""

    name: str
    description: str = ""


_SHAPES = Path(__file__).parent / "shapes" / "models"
_SHAPES_MODEL = ModelEntry(
    name="shapes",
    folder=_SHAPES / "pipeline",
    reward="shapes-clip",
    scorers=("shapes-clip", "shapes-judge"),
    description="A small world of coloured shapes, 64x64 pixels; runs on a CPU",
    watch="shapes-judge",
)

MODELS: Mapping[str, ModelEntry] = MappingProxyType(
    {
        "shapes": _SHAPES_MODEL,
        "shapes-bfloat16": replace(
            _SHAPES_MODEL,
            name="shapes-bfloat16",
            description="The same in bfloat16: faster on CPUs with AVX512-BF16 or AMX, slower on others",
            dtype="bfloat16",
        ),
    }
)

SCORERS: Mapping[str, ScorerEntry] = MappingProxyType(
    {
        "shapes-clip": ScorerEntry("shapes-clip", "Cosine similarity of the shapes world's own CLIP model"),
        "shapes-judge": ScorerEntry("shapes-judge", "1 where every part of the prompt is in the picture, else 0"),
        "clip-vit-h-14": ScorerEntry(
            "clip-vit-h-14", "The paper's reward: cosine similarity of open_clip's ViT-H-14, laion2b_s32b_b79k (4 GB)"
        ),
        "clip-vit-l-14": ScorerEntry(
            "clip-vit-l-14", "To watch the former: open_clip's ViT-L-14 on other data, datacomp_xl_s13b_b90k (2 GB)"
        ),
    }
)

SHAPES_CLIP_FOLDER = _SHAPES / "clip"
"""The shapes world's CLIP model as an open_clip folder."""
