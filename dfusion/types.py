"""Data structures that the method's functions exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, TypeVar

import torch
from torch.nn import functional

from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError, shortened

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditioning of a U-Net for B rows. `DiffusionModel.encode_prompts` returns it.

    embeds    (B, N, C) float32: the prompt embeddings; for SDXL, those of both text encoders, concatenated along C
    pooled    (B, P) float32: the pooled embeddings of SDXL's second text encoder; None for SD 1.x and 2.x
    time_ids  (B, 6) float32: SDXL's original height and width, crop top and left, target height and width, in
              pixels; None for SD 1.x and 2.x
    texts     the B prompts; None if unknown

    Raises InvalidInputError if only one of pooled and time_ids is given, and ShapeMismatchError for shapes that do not
    fit.
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
        """`value` as a Conditioning. A plain tensor (B, N, C) is the conditioning of SD 1.x and 2.x."""
        return value if isinstance(value, Conditioning) else cls(value)

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in their order. Raises ShapeMismatchError for parts of different models."""
        shapes = {part._row_shapes for part in parts}
        if len(shapes) != 1:
            raise ShapeMismatchError("conditioning", "parts of one model", sorted(shapes))

        columns = zip(*(part.tensors for part in parts), strict=True)
        texts = _joined([part.texts for part in parts])
        return cls(*map(torch.cat, columns), texts=texts)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that are not None, in the order of the fields."""
        return tuple(part for part in (self.embeds, self.pooled, self.time_ids) if part is not None)

    @property
    def _row_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tensor.shape[1:]) for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Conditioning:
        """The given rows, in that order. An int gives a Conditioning of one row, so iteration gives single rows."""
        index = [rows] if isinstance(rows, int) else rows
        texts = self.texts
        if texts is not None:
            texts = texts[index] if isinstance(index, slice) else tuple(texts[row] for row in index)
        return Conditioning(*(part[index] for part in self.tensors), texts=texts)

    def expand(self, rows: int, *_: int) -> Conditioning:
        """Repeat a single row `rows` times. Further sizes, which tensors need, are ignored."""
        texts = self.texts * rows if self.texts is not None and len(self) == 1 else self.texts
        return Conditioning(*(part.expand(rows, *part.shape[1:]) for part in self.tensors), texts=texts)

    def equals(self, other: Conditioning) -> bool:
        """Whether both have equal tensors."""
        pairs = zip(self.tensors, other.tensors, strict=False)
        return len(self.tensors) == len(other.tensors) and all(torch.equal(a, b) for a, b in pairs)


Prompts = Conditioning | torch.Tensor
"""Prompt embeddings as an argument: a Conditioning, or for SD 1.x and 2.x its plain (B, N, C) tensor."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """B denoising trajectories of T steps, as sampled (Eq. 1).

    latents     (B, T+1, C, h, w) float32; [:, 0] is x_T, [:, T] the clean latent
    timesteps   (T,) int64, the scheduler's values in denoising order
    log_probs   (B, T) float32, mean over C*h*w of the Gaussian's log-density at each stored transition
    seeds       B sample seeds
    config      the sampling settings
    item_maps   (B, T, h_m, w_m, K) float32 in [0, 1] or None: cross-attention maps of the K item tokens at the mask
                layer, conditional half, mean over heads and blocks; samples with fewer items are padded with zeros
    items       for each sample the token indices of its items (a tuple of tokens per item), or None
    mask_source the layers that `item_maps` were recorded from (see FusionConfig), or None
    prompts     for each sample its text, or None if unknown
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
        batch = len(self.seeds)
        steps = len(self.timesteps)
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
        """The samples of all parts, in order. Item maps are padded with zeros to the largest K.

        Raises:
            InvalidInputError: No parts, or parts with different settings, timesteps or mask sources.
            ShapeMismatchError: Latents or maps of different sizes.
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

        latents = torch.cat([part.latents for part in parts])
        log_probs = torch.cat([part.log_probs for part in parts])
        seeds = tuple(chain.from_iterable(part.seeds for part in parts))
        maps = [part.item_maps for part in parts if part.item_maps is not None]
        items = _joined([part.items for part in parts])
        prompts = _joined([part.prompts for part in parts])
        return replace(
            first,
            latents=latents,
            log_probs=log_probs,
            seeds=seeds,
            item_maps=_padded(maps) if len(maps) == len(parts) else None,
            items=items,
            prompts=prompts,
        )

    def select(self, indices: Sequence[int]) -> Trajectory:
        """The samples at `indices`, in that order; an index may be repeated. Raises InvalidInputError for others."""
        rows = list(indices)
        if not all(-len(self) <= i < len(self) for i in rows):
            raise InvalidInputError(f"indices: expected samples among {len(self)}, got {shortened(rows)}")

        return replace(
            self,
            latents=self.latents[rows],
            log_probs=self.log_probs[rows],
            seeds=_at(self.seeds, rows),
            item_maps=None if self.item_maps is None else self.item_maps[rows],
            items=None if self.items is None else _at(self.items, rows),
            prompts=None if self.prompts is None else _at(self.prompts, rows),
        )


def _at(values: tuple[_Value, ...], rows: Sequence[int]) -> tuple[_Value, ...]:
    return tuple(values[row] for row in rows)


def _joined(parts: Sequence[tuple[_Value, ...] | None]) -> tuple[_Value, ...] | None:
    """The values of all parts, in order. None if a part is None."""
    known = [part for part in parts if part is not None]
    return tuple(chain.from_iterable(known)) if len(known) == len(parts) else None


def _padded(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The maps of all parts, (B, T, h_m, w_m, K), padded with zeros to the largest K."""
    num_items = max(m.shape[-1] for m in maps)
    return torch.cat([functional.pad(m, (0, num_items - m.shape[-1])) for m in maps])
