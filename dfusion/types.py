"""What the method's functions hand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch.nn import functional

from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a U-Net is conditioned on, for B rows; `DiffusionModel.encode_prompts` makes it.

    embeds    (B, N, C) float32: the prompt embeddings; of SDXL those of both text encoders, side by side
    pooled    (B, P) float32: the pooled embeddings of SDXL's second text encoder; None for SD 1.x and 2.x
    time_ids  (B, 6) float32: SDXL's original height and width, crop top and left, target height and width, in
              pixels; None for SD 1.x and 2.x
    texts     the B prompts; None where nobody said

    Raises InvalidInputError with only one of pooled and time_ids, ShapeMismatchError where shapes do not fit.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    texts: tuple[str, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3:
            raise ShapeMismatchError("prompt_embeds", "(B, N, C)", tuple(self.embeds.shape))
        if (self.pooled is None) != (self.time_ids is None):
            raise InvalidInputError("conditioning: expected both pooled and time_ids, or neither, got one of them")
        for name, part in (("pooled", self.pooled), ("time_ids", self.time_ids)):
            if part is not None and (part.ndim != 2 or len(part) != len(self.embeds)):
                raise ShapeMismatchError(name, f"({len(self.embeds)}, ...)", tuple(part.shape))
        if self.texts is not None and len(self.texts) != len(self.embeds):
            raise ShapeMismatchError("texts", f"({len(self.embeds)},)", (len(self.texts),))

    @classmethod
    def of(cls, value: Prompts) -> Conditioning:
        """`value` itself; a plain tensor (B, N, C) is the conditioning of SD 1.x and 2.x."""
        return value if isinstance(value, Conditioning) else cls(value)

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in their order. Raises ShapeMismatchError where parts are of different models."""
        shapes = {tuple(tensor.shape[1:] for tensor in part.tensors) for part in parts}
        if len(shapes) != 1:
            raise ShapeMismatchError("conditioning", "parts of one model", sorted(shapes))
        columns = zip(*(part.tensors for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns), texts=_joined([part.texts for part in parts]))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The parts that are there, in the order of the fields."""
        return tuple(part for part in (self.embeds, self.pooled, self.time_ids) if part is not None)

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Conditioning:
        """The rows asked for, in that order; an int gives one row. So iterating gives the rows one by one."""
        chosen = [rows] if isinstance(rows, int) else rows
        texts = self.texts
        if texts is not None:
            texts = texts[chosen] if isinstance(chosen, slice) else tuple(texts[row] for row in chosen)
        return Conditioning(*(part[chosen] for part in self.tensors), texts=texts)

    def expand(self, rows: int, *_: int) -> Conditioning:
        """A single row `rows` times; `rows` rows stay as they are. Further sizes, as tensors take, do nothing."""
        texts = self.texts * rows if self.texts is not None and len(self) == 1 else self.texts
        return Conditioning(*(part.expand(rows, *part.shape[1:]) for part in self.tensors), texts=texts)

    def equals(self, other: Conditioning) -> bool:
        """Whether both hold the same numbers."""
        pairs = zip(self.tensors, other.tensors, strict=False)
        return len(self.tensors) == len(other.tensors) and all(torch.equal(a, b) for a, b in pairs)


Prompts = Conditioning | torch.Tensor
"""What functions take as prompt embeddings: a Conditioning, or for SD 1.x and 2.x also its plain (B, N, C) tensor."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """B denoising trajectories of T steps, as they were sampled (Eq. 1).

    latents     (B, T+1, C, h, w) float32; [:, 0] is x_T, [:, T] the clean latent
    timesteps   (T,) int64, the scheduler's values in denoising order
    log_probs   (B, T) float32, mean over C*h*w of the Gaussian's log-density at each stored transition
    seeds       B sample seeds
    config      the settings that it was sampled with
    item_maps   (B, T, h_m, w_m, K) float32 in [0, 1] or None: cross-attention maps of the K item tokens at the mask
                layer, conditional half, mean over heads and blocks; samples with fewer items are padded with zeros
    items       for each sample the token indices of its items (a tuple of tokens an item), or None
    mask_source whose cross-attention `item_maps` are (see FusionConfig), or None
    prompts     for each sample its text, or None where its embeddings came without
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    log_probs: torch.Tensor
    seeds: tuple[int, ...]
    config: SamplingConfig
    item_maps: torch.Tensor | None = None
    items: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    mask_source: Literal["first_up", "resolution"] | None = None
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        batch, steps = len(self.seeds), len(self.timesteps)
        if self.latents.ndim != 5 or self.latents.shape[:2] != (batch, steps + 1):
            raise ShapeMismatchError("latents", f"({batch}, {steps + 1}, C, h, w)", tuple(self.latents.shape))
        if self.log_probs.shape != (batch, steps):
            raise ShapeMismatchError("log_probs", (batch, steps), tuple(self.log_probs.shape))

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        height, width = self.latents.shape[-2:]
        return height, width

    @property
    def final(self) -> torch.Tensor:
        """The clean latents, (B, C, h, w)."""
        return self.latents[:, -1]

    @classmethod
    def cat(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """The samples of all parts, in order. Item maps get the largest K (zeros).

        Raises InvalidInputError without parts, or where they were sampled with other settings, timesteps or mask
        sources; ShapeMismatchError where latents or maps differ in size.
        """
        if not parts:
            raise InvalidInputError("parts: expected at least one trajectory, got none")
        first = parts[0]
        for part in parts:
            if (part.config, part.mask_source) != (first.config, first.mask_source):
                got = [(first.config, first.mask_source), (part.config, part.mask_source)]
                raise InvalidInputError(f"parts: expected one config and mask_source, got {got}")
            if not torch.equal(part.timesteps, first.timesteps):
                raise InvalidInputError("parts: expected the same timesteps in all")
            if part.latents.shape[1:] != first.latents.shape[1:]:
                raise ShapeMismatchError("parts.latents", tuple(first.latents.shape[1:]), tuple(part.latents.shape[1:]))
        maps = [part.item_maps for part in parts if part.item_maps is not None]
        items = [part.items for part in parts if part.items is not None]
        return replace(
            first,
            latents=torch.cat([part.latents for part in parts]),
            log_probs=torch.cat([part.log_probs for part in parts]),
            seeds=tuple(seed for part in parts for seed in part.seeds),
            item_maps=_padded(maps) if len(maps) == len(parts) else None,
            items=tuple(sample for part in items for sample in part) if len(items) == len(parts) else None,
            prompts=_joined([part.prompts for part in parts]),
        )

    def select(self, indices: Sequence[int]) -> Trajectory:
        """The samples at `indices`, in that order; an index may come twice. Raises InvalidInputError for others."""
        chosen = list(indices)
        if not all(-len(self) <= i < len(self) for i in chosen):
            raise InvalidInputError(f"indices: expected samples among {len(self)}, got {chosen}")
        return replace(
            self,
            latents=self.latents[chosen],
            log_probs=self.log_probs[chosen],
            seeds=tuple(self.seeds[i] for i in chosen),
            item_maps=None if self.item_maps is None else self.item_maps[chosen],
            items=None if self.items is None else tuple(self.items[i] for i in chosen),
            prompts=None if self.prompts is None else tuple(self.prompts[i] for i in chosen),
        )


def _joined(texts: Sequence[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    known = [part for part in texts if part is not None]
    return tuple(text for part in known for text in part) if len(known) == len(texts) else None


def _padded(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    most = max(m.shape[-1] for m in maps)
    return torch.cat([functional.pad(m, (0, most - m.shape[-1])) for m in maps])
