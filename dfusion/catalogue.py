"""Base models and scorers that come with dfusion, by name. Does not import torch.

A deployment can add its own. Those of the shapes world need no download. The others are downloaded on first use.
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
    reward          the default reward, a scorer's name
    watch           the held-out scorer, which is never trained on
    scorers         the scorers for its images
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
    """A scorer of `dfusion.rewards.load_scorer`. `reads_text`: it needs prompts that quote a text."""

    name: str
    description: str = ""
    reads_text: bool = False


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
        "shapes-numbers": ModelEntry(
            name="shapes-numbers",
            folder=_SHAPES / "numbers" / "pipeline",
            reward="shapes-ocr",
            scorers=("shapes-ocr", "shapes-ocr-exact"),
            description="Numbers of two digits, 64x64 pixels, for the OCR reward (extra ocr); runs on a CPU",
        ),
    }
)

SCORERS: Mapping[str, ScorerEntry] = MappingProxyType(
    {
        "shapes-clip": ScorerEntry("shapes-clip", "Cosine similarity of the shapes world's own CLIP model"),
        "shapes-judge": ScorerEntry("shapes-judge", "1 if the image shows every part of the prompt, otherwise 0"),
        "shapes-ocr": ScorerEntry(
            "shapes-ocr", "How well the number in the image matches the prompt's (extra ocr)", reads_text=True
        ),
        "shapes-ocr-exact": ScorerEntry(
            "shapes-ocr-exact", "1 if the image shows the prompt's number, otherwise 0", reads_text=True
        ),
        "ocr": ScorerEntry(
            "ocr", "How well the text in the image matches the text in the prompt's quotes (extra ocr)", reads_text=True
        ),
        "jpeg-compressible": ScorerEntry("jpeg-compressible", "The negative size of the image as JPEG in kB"),
        "jpeg-incompressible": ScorerEntry("jpeg-incompressible", "The size of the image as JPEG in kB"),
        "clip-vit-h-14": ScorerEntry(
            "clip-vit-h-14", "The paper's reward: cosine similarity of open_clip's ViT-H-14, laion2b_s32b_b79k (4 GB)"
        ),
        "clip-vit-l-14": ScorerEntry(
            "clip-vit-l-14",
            "Held-out scorer: open_clip's ViT-L-14, trained on other data, datacomp_xl_s13b_b90k (2 GB)",
        ),
    }
)

SHAPES_CLIP_FOLDER = _SHAPES / "clip"
"""The shapes world's CLIP model as an open_clip folder."""
