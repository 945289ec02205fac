"""Convert a pickle of tensors to safetensors: `python -m dfusion.rewards.convert FILE.pt FILE.safetensors`.

The pickle is read by torch's restricted unpickler, which creates tensors and runs no code. A checkpoint's "state_dict"
is unwrapped, and what is not a tensor is dropped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file

from dfusion.errors import CheckpointError


def convert(source: Path, target: Path) -> int:
    """Write the tensors of a pickle as safetensors, and return their number. Raises CheckpointError."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{source}: expected a pickle that contains tensors only: {error}") from error

    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                tensors[str(key)] = value.clone().contiguous()  # two names of one tensor become two tensors
    if not tensors:
        raise CheckpointError(f"{source}: expected tensors by name, got {type(content).__name__}")

    partial = target.with_name(f"{target.name}.partial")
    save_file(tensors, partial, {"format": "pt"})  # transformers requires this entry
    partial.rename(target)
    return len(tensors)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.target)
    except CheckpointError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
