"""Properties of a pipeline, read from its files without torch.

They are the U-Net's layers, the maximum prompt length, the image sizes of the VAE and the allowed numbers of denoising
steps. `problem` says why a pipeline cannot be run at all. A service uses them to reject early what the model would
reject later. Files that cannot be interpreted give no facts and raise no error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import (
    InvalidInputError,
    LayerNotFoundError,
    ModelNotFoundError,
    shortened,
)
from dfusion.model_files import check_files
from dfusion.noise_schedules import step_problem

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
    scheduler         its noise schedule, as `dfusion.model_files.ModelFiles.schedule`
    problem           why the pipeline cannot be loaded or run; None if nothing is known against it
    """

    layers: tuple[Part, ...] | None
    prompt_length: PromptLength | None
    pixels_per_latent: int | None = None
    scheduler: Mapping[str, Any] | None = None
    problem: str | None = None

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
        if self.scheduler is not None and (problem := step_problem(self.scheduler, sampling.num_steps)):
            yield "num_steps", problem
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
    """The properties of a pipeline in diffusers' layout. `folder` may be a file, which has none, and a `problem`."""
    problem = None
    scheduler = None
    try:
        scheduler = check_files(folder).schedule
    except ModelNotFoundError as error:
        problem = str(error)

    return PipelineFacts(
        layers=_layers(_json(folder / "unet" / "config.json")),
        prompt_length=_prompt_length(folder / "tokenizer"),
        pixels_per_latent=_pixels_per_latent(_json(folder / "vae" / "config.json")),
        scheduler=scheduler,
        problem=problem,
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
