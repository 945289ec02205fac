"""Safetensors files of a model's parts, without torch: which ones a folder has, and whether they are complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfusion.errors import ModelNotFoundError, UnsupportedModelError

_SIZE_BYTES = 8
"""The size of the header, at the start of a safetensors file."""
_LFS_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_VARIANTS = ("fp16", "bf16")
"""Variants that have the weights of the full-precision files, in the order of preference."""


def read_header(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Data type, shape and position of each tensor of a safetensors file. The tensors are not read.

    Raises ModelNotFoundError, naming the cause, if the file is damaged, incomplete or a Git LFS pointer.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise ModelNotFoundError(f"{file}: expected weights, got a Git LFS pointer: fetch it with git lfs pull")
            length = int.from_bytes(start[:_SIZE_BYTES], "little")
            if len(start) < _SIZE_BYTES or length > size - _SIZE_BYTES:
                raise ModelNotFoundError(f"{file}: expected a safetensors file, got {size} bytes without its header")
            stream.seek(_SIZE_BYTES)
            header: dict[str, Mapping[str, Any]] = json.loads(stream.read(length))

        header.pop("__metadata__", None)
        end = max((int(about["data_offsets"][1]) for about in header.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"{file}: expected a readable safetensors file: {error}") from error

    expected = _SIZE_BYTES + length + end
    if size != expected:
        raise ModelNotFoundError(f"{file}: expected {expected} bytes as in its header, got {size}: download it again")
    return header


def find_variant(folder: Path, stem: str, pickle_advice: str) -> str | None:
    """The variant of a part's weights to load: None for full precision, if there is such a file, else the only one.

    Args:
        folder: The part's folder.
        stem: The name of the weights without variant and ending.
        pickle_advice: How to convert weights that are only there as a pickle.

    Raises:
        ModelNotFoundError: There are no weights, they are incomplete, or several variants differ.
        UnsupportedModelError: The weights are only there as a pickle.
    """
    names = sorted(path.name for path in folder.iterdir())
    variant = _choose(folder, stem, names, pickle_advice)
    for file in _files(folder, stem, variant):
        read_header(file)
    return variant


def _choose(folder: Path, stem: str, names: list[str], pickle_advice: str) -> str | None:
    """The variant to load."""
    if f"{stem}.safetensors" in names or f"{stem}.safetensors.index.json" in names:
        return None

    single_file = re.compile(rf"{re.escape(stem)}\.([\w-]+)\.safetensors")
    index = re.compile(rf"{re.escape(stem)}\.safetensors\.index\.([\w-]+)\.json")
    unsharded = [name for name in names if _SHARD.search(name) is None]
    matches = [single_file.fullmatch(name) or index.fullmatch(name) for name in unsharded]
    variants = sorted({match[1] for match in matches if match is not None})
    for preferred in _VARIANTS:
        if preferred in variants:
            return preferred
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise ModelNotFoundError(
            f"{folder}: expected {stem}.safetensors, got only the variants {', '.join(variants)}: rename the one to use"
            f" to {stem}.safetensors"
        )

    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise UnsupportedModelError(
            f"{folder}: expected {stem}.safetensors, got {pickles[0]}, a pickle, which can run code and is never"
            f" loaded. {pickle_advice}"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    present = f"only {', '.join(others)}" if others else "no weights"
    raise ModelNotFoundError(f"{folder}: expected {stem}.safetensors, got {present}")


def _files(folder: Path, stem: str, variant: str | None) -> Iterator[Path]:
    """The files of a variant: one, or the shards of an index."""
    marker = "" if variant is None else f".{variant}"
    single_file = folder / f"{stem}{marker}.safetensors"
    index = folder / f"{stem}.safetensors.index{marker}.json"
    if single_file.is_file():
        yield single_file
    if not index.is_file():
        return

    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"{index}: expected an index of shards: {error!r}") from error
    for name in shards:
        shard = folder / str(name)
        if not shard.is_file():
            raise ModelNotFoundError(f"{index}: expected the shard {name}, got no such file: download it again")
        yield shard
