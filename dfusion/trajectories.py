"""Trajectories as safetensors files, with everything but tensors as JSON in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

from dfusion.config import SamplingConfig
from dfusion.errors import CheckpointError, ShapeMismatchError
from dfusion.files import read_tensors, write_tensors
from dfusion.types import Trajectory

FORMAT = "dfusion-trajectory-1"


def save_trajectory(path: Path, trajectory: Trajectory) -> None:
    """Write `trajectory` to `path`, atomically."""
    tensors = {
        "latents": trajectory.latents,
        "timesteps": trajectory.timesteps,
        "log_probs": trajectory.log_probs,
    }
    if trajectory.item_maps is not None:
        tensors["item_maps"] = trajectory.item_maps

    about = {
        "format": FORMAT,
        "seeds": trajectory.seeds,
        "config": trajectory.config.model_dump(),
        "items": trajectory.items,
        "mask_source": trajectory.mask_source,
        "prompts": trajectory.prompts,
    }
    write_tensors(path, tensors, {"trajectory": json.dumps(about)})


def load_trajectory(path: Path) -> Trajectory:
    """Read a trajectory that `save_trajectory` wrote, with tensors on the CPU. Raises CheckpointError otherwise."""
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata["trajectory"])
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path}: expected format {FORMAT!r}, got {about['format']!r}")

        return Trajectory(
            latents=tensors["latents"],
            timesteps=tensors["timesteps"],
            log_probs=tensors["log_probs"],
            seeds=tuple(about["seeds"]),
            config=SamplingConfig.model_validate(about["config"]),
            item_maps=tensors.get("item_maps"),
            items=_as_tuples(about["items"]),
            mask_source=about["mask_source"],
            prompts=None if about.get("prompts") is None else tuple(about["prompts"]),
        )
    except (KeyError, TypeError, ValueError, ShapeMismatchError) as error:
        raise CheckpointError(f"{path}: expected a trajectory: {error!r}") from error


def _as_tuples(items: list[list[list[int]]] | None) -> tuple[tuple[tuple[int, ...], ...], ...] | None:
    return None if items is None else tuple(tuple(map(tuple, sample)) for sample in items)
