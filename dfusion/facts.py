"""Properties of a pipeline, read from its files without torch.

They are the U-Net's layers, the maximum prompt length, the image sizes of the VAE and the minimum number of denoising
steps. A service uses them to reject early what the model would reject later. Files that cannot be interpreted give no
facts and raise no error: loading the model reports what is wrong with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from dfusion.config import MOST_INITIAL_SIGNAL, FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError, LayerNotFoundError, shortened

Part = Literal["down", "middle", "up"]
_HAS_CROSS_ATTENTION = {
    "DownBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "UNetMidBlock2D": False,
    "UNetMidBlock2DCrossAttn": True,
    "UpBlock2D": False,
    "CrossAttnUpBlock2D": True,
}
"""By diffusers' block names. With any other block the layers of a U-Net are unknown."""
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""The pattern by which CLIP's tokenizer splits text before it merges letters."""
_SPECIAL_TOKENS = 2
"""BOS and EOS."""


@dataclass(frozen=True)
class PromptLength:
    """The maximum number of tokens of a prompt, without BOS and EOS, and the tokenizer that counts them."""

    max_tokens: int
    _tokenizer: Tokenizer

    def of(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    def too_long(self, texts: Sequence[str]) -> dict[int, int]:
        """The texts with more than `max_tokens` tokens: their numbers of tokens, by their places in `texts`."""
        # an ASCII text has no more tokens than characters, so most of 10,000 prompts need not be split into tokens
        places = [place for place, text in enumerate(texts) if not (text.isascii() and len(text) <= self.max_tokens)]
        lengths = self.of([texts[place] for place in places])
        return {place: length for place, length in zip(places, lengths, strict=True) if length > self.max_tokens}


@dataclass(frozen=True)
class PipelineFacts:
    """Known properties of a pipeline. None: unknown.

    layers            positions of the layers that `dfusion.attention.layers.find_layers` finds, in its order
    prompt_length     maximum prompt length
    pixels_per_latent width of a latent pixel in image pixels
    fewest_steps      minimum number of denoising steps that `dfusion.ddim.Schedule` accepts
    """

    layers: tuple[Part, ...] | None
    prompt_length: PromptLength | None
    pixels_per_latent: int | None = None
    fewest_steps: int | None = None

    def require_layers(self, config: FusionConfig) -> None:
        """Raise LayerNotFoundError for layers that the U-Net is known not to have."""
        if self.layers is None:
            return
        if "up" not in self.layers:
            raise LayerNotFoundError("the U-Net has no up block with cross-attention")
        requested = config.layers
        if requested != "middle+up" and (not requested or not set(requested) <= set(range(len(self.layers)))):
            raise LayerNotFoundError(
                f"expected indices within 0 to {len(self.layers) - 1}, got {shortened(list(requested))}"
            )

    def sampling_problems(self, sampling: SamplingConfig) -> Iterator[tuple[str, str]]:
        """The settings of `sampling` that the pipeline is known to reject, each with the reason."""
        if self.fewest_steps is not None and sampling.num_steps < self.fewest_steps:
            yield "num_steps", f"expected at least {self.fewest_steps} with this scheduler, got {sampling.num_steps}"
        if sampling.negative_prompt and self.prompt_length is not None:
            for count in self.prompt_length.too_long([sampling.negative_prompt]).values():
                yield "negative_prompt", f"expected at most {self.prompt_length.max_tokens} tokens, got {count}"
        for side in ("height", "width"):
            if self.pixels_per_latent is None:
                return
            try:
                require_size(side, getattr(sampling, side), self.pixels_per_latent)
            except InvalidInputError as error:
                yield side, str(error)


def require_size(side: Literal["height", "width"], pixels: int | None, pixels_per_latent: int) -> None:
    """Raise InvalidInputError, naming the nearest valid sizes, if no latent decodes to this number of pixels."""
    if pixels is None or pixels % pixels_per_latent == 0:
        return
    below = pixels // pixels_per_latent * pixels_per_latent
    nearest = " or ".join(str(size) for size in (below, below + pixels_per_latent) if size > 0)
    raise InvalidInputError(f"{side}: expected a multiple of {pixels_per_latent} pixels ({nearest}), got {pixels}")


def read_facts(folder: Path) -> PipelineFacts:
    """The properties of a pipeline in diffusers' layout."""
    return PipelineFacts(
        layers=_layers(_json(folder / "unet" / "config.json")),
        prompt_length=_prompt_length(folder / "tokenizer"),
        pixels_per_latent=_pixels_per_latent(_json(folder / "vae" / "config.json")),
        fewest_steps=_fewest_steps(_json(folder / "scheduler" / "scheduler_config.json")),
    )


def _json(file: Path) -> Mapping[str, Any]:
    """The JSON object in the file. Empty if there is none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _layers(unet: Mapping[str, Any]) -> tuple[Part, ...] | None:
    down = unet.get("down_block_types")
    up = unet.get("up_block_types")
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
    """Whether every block has a transformer."""
    if isinstance(numbers, list):
        return all(_all_positive(number) for number in numbers)
    return isinstance(numbers, int) and numbers > 0


def _pixels_per_latent(vae: Mapping[str, Any]) -> int | None:
    """The VAE halves an image between two consecutive levels."""
    widths = vae.get("block_out_channels")
    return 2 ** (len(widths) - 1) if isinstance(widths, list) and widths else None


def _fewest_steps(scheduler: Mapping[str, Any]) -> int | None:
    """The smallest number of steps whose first timestep has enough noise for x_T. The defaults are diffusers'."""
    # 1. the scheduler's settings
    total = scheduler.get("num_train_timesteps")
    offset = scheduler.get("steps_offset", 0)
    start = scheduler.get("beta_start", 0.0001)
    end = scheduler.get("beta_end", 0.02)
    if not isinstance(total, int) or not isinstance(offset, int):
        return None
    if not isinstance(start, float) or not isinstance(end, float):
        return None
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        return None

    # 2. the first timestep with enough noise
    match scheduler.get("beta_schedule", "linear"):
        case "linear":
            betas = np.linspace(start, end, total)
        case "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, total) ** 2
        case _:
            return None
    noisy = np.flatnonzero(np.cumprod(1 - betas) <= MOST_INITIAL_SIGNAL)
    if len(noisy) == 0:
        return None

    # 3. the first number of steps that starts there
    match scheduler.get("timestep_spacing", "leading"):
        case "leading":
            firsts = ((steps, (steps - 1) * (total // steps) + offset) for steps in range(1, total + 1))
            return next((steps for steps, first in firsts if first >= noisy[0]), None)
        case "linspace":
            return 1 if noisy[0] == 0 else 2
        case "trailing":
            return 1
    return None


def _prompt_length(folder: Path) -> PromptLength | None:
    config = _json(folder / "tokenizer_config.json")
    length = config.get("model_max_length")
    if not isinstance(length, int) or config.get("tokenizer_class") not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        return None
    tokenizer = _tokenizer(folder)
    return None if tokenizer is None else PromptLength(length - _SPECIAL_TOKENS, tokenizer)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """CLIP's tokenizer from tokenizer.json, or from its vocabulary and merges."""
    single_file = folder / "tokenizer.json"
    vocabulary = folder / "vocab.json"
    merges = folder / "merges.txt"
    try:
        if single_file.is_file():
            tokenizer = Tokenizer.from_file(str(single_file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        if not vocabulary.is_file() or not merges.is_file():
            return None
        model = BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    except Exception:  # tokenizers raises plain Exception
        return None

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    parts = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
