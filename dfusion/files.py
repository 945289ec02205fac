"""Files and folders that are either whole or not there: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dfusion.errors import CheckpointError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` makes a file or a folder, which is then renamed to `path`.

    A file that was at `path` stays until the new one is complete; a folder must not be there yet. Where `write` raises,
    nothing stays of what it made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        for made in (*temporary.rglob("*"), temporary):
            _flush(made)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with metadata, whole or not at all; equal content gives equal bytes."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, dict(metadata))
        _sort_metadata(temporary)

    write_whole(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of its keys, in place: safetensors writes it in a random one.

    The file is 8 bytes with the header's size, the header (JSON without blanks, padded with blanks), the tensors. The
    same JSON in another order has the same size.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > size:
            raise CheckpointError(f"{path}: expected a header of at most {size} bytes, got {len(ordered)}")
        file.seek(8)
        file.write(ordered.ljust(size))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file. Raises CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file: {error}") from error
