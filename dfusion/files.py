"""Atomic files and folders: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dfusion.errors import CheckpointError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write `path` atomically: `write(temporary)` creates a file or folder, which is then renamed to `path`.

    An existing file at `path` is replaced once the new one is complete. A folder must not exist. If `write` raises, the
    temporary file or folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        for written in (*temporary.rglob("*"), temporary):
            _flush(written)
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
    """Write a safetensors file with metadata, atomically. Equal content gives equal bytes.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, dict(metadata))
        except SafetensorError as error:
            raise _as_os_error(error, temporary) from error
        _sort_metadata(temporary)

    write_whole(path, write)


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """The OSError that the error stands for, or the error itself: safetensors only names the number in its message."""
    match = _OS_ERROR.search(str(error))
    if match is None:
        return error
    number = int(match[1])
    return OSError(number, os.strerror(number), str(path))


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by key, in place. safetensors writes it in random order.

    The file consists of 8 bytes with the header's size, the header (JSON without spaces, padded with spaces) and the
    tensors. The same JSON in another order has the same size.
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
        raise CheckpointError(f"{path}: expected a complete safetensors file: {error}") from error
