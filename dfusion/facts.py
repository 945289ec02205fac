"""What a pipeline's files say of it, read without torch: the U-Net's layers, and how many tokens a prompt may have.

It lets a service refuse early what the model would refuse when it is loaded. Files that say nothing that is understood
give no facts, and no errors: whoever loads the model names what is wrong with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from dfusion.config import FusionConfig
from dfusion.errors import LayerNotFoundError

Part = Literal["down", "middle", "up"]
_HAS_CROSS_ATTENTION = {
    "DownBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "UNetMidBlock2D": False,
    "UNetMidBlock2DCrossAttn": True,
    "UpBlock2D": False,
    "CrossAttnUpBlock2D": True,
}
"""By diffusers' names of blocks; with another one nothing is said of a U-Net's layers."""
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""How CLIP's tokenizer parts text before it merges letters."""
_BESIDE_THE_PROMPT = 2
"""BOS and EOS."""


@dataclass(frozen=True)
class PromptLength:
    """How many tokens a prompt may have beside BOS and EOS, and how they are counted."""

    most: int
    _tokenizer: Tokenizer

    def of(self, text: str) -> int:
        """The number of the text's tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class PipelineFacts:
    """What is known of a pipeline; None is not known.

    layers  where the layers are that `dfusion.attention.layers.find_layers` finds, in its order
    """

    layers: tuple[Part, ...] | None
    prompt_length: PromptLength | None

    def require_layers(self, config: FusionConfig) -> None:
        """Raises LayerNotFoundError for layers that the U-Net is known not to have."""
        if self.layers is None:
            return
        if "up" not in self.layers:
            raise LayerNotFoundError("the U-Net has no up block with cross-attention")
        wanted = config.layers
        if wanted != "middle+up" and (not wanted or not set(wanted) <= set(range(len(self.layers)))):
            raise LayerNotFoundError(f"expected indices within 0 to {len(self.layers) - 1}, got {list(wanted)}")


def read_facts(folder: Path) -> PipelineFacts:
    """What the files of a pipeline in diffusers' layout say."""
    return PipelineFacts(_layers(_json(folder / "unet" / "config.json")), _prompt_length(folder / "tokenizer"))


def _json(file: Path) -> Mapping[str, Any]:
    """The object in the file; empty where there is none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _layers(unet: Mapping[str, Any]) -> tuple[Part, ...] | None:
    down, up = unet.get("down_block_types"), unet.get("up_block_types")
    middle = unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if not isinstance(down, list) or not isinstance(up, list) or unet.get("dual_cross_attention"):
        return None
    if not _all_positive(unet.get("transformer_layers_per_block", 1)):
        return None
    blocks: list[tuple[Part, object]] = [("down", name) for name in down]
    blocks += [("middle", middle)] if middle is not None else []
    blocks += [("up", name) for name in up]
    if any(name not in _HAS_CROSS_ATTENTION for _, name in blocks):
        return None
    return tuple(part for part, name in blocks if _HAS_CROSS_ATTENTION[str(name)])


def _all_positive(numbers: object) -> bool:
    """Whether no block is without a transformer, whatever its name says."""
    if isinstance(numbers, list):
        return all(_all_positive(number) for number in numbers)
    return isinstance(numbers, int) and numbers > 0


def _prompt_length(folder: Path) -> PromptLength | None:
    config = _json(folder / "tokenizer_config.json")
    length = config.get("model_max_length")
    if not isinstance(length, int) or config.get("tokenizer_class") not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        return None
    tokenizer = _tokenizer(folder)
    return None if tokenizer is None else PromptLength(length - _BESIDE_THE_PROMPT, tokenizer)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """CLIP's tokenizer from its one file, or from its vocabulary and merges."""
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        if not vocabulary.is_file() or not merges.is_file():
            return None
        model = BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    except Exception:  # tokenizers raises nothing narrower
        return None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    parts = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
