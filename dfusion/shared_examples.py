"""Training examples with trajectories in files, for other processes of the same host."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError
from dfusion.files import read_tensors, write_tensors
from dfusion.spool import RowFile, SpooledTrajectory
from dfusion.training_data import Example, TrainingPair, TrainingSample


def share_examples(examples: Sequence[Example], file: Path) -> None:
    """Write the examples to `file`, except their trajectories, which stay in the files of their spool.

    Other processes can read them as long as this one runs. Raises InvalidInputError for trajectories in memory.
    """
    spools: list[RowFile] = []
    tensors: dict[str, torch.Tensor] = {}
    descriptions = []
    for number, example in enumerate(examples):
        sides = []
        for side in example.sides:
            if not isinstance(side, SpooledTrajectory):
                raise InvalidInputError("examples: expected trajectories of a TrajectorySpool, got one in memory")
            if side.rows not in spools:
                spools.append(side.rows)
            sides.append([spools.index(side.rows), side.number])
        if isinstance(example, TrainingPair) and example.mask is not None:
            tensors[f"mask.{number}"] = example.mask
        descriptions.append([example.prompt, example.advantage, example.sides_on_policy, sides])

    first = next(chain.from_iterable(example.sides for example in examples))
    tensors["timesteps"] = first.timesteps
    about = {
        "sampling": first.config.model_dump(mode="json"),
        "spools": [spool.shared() for spool in spools],
        "examples": descriptions,
    }
    write_tensors(file, tensors, {"about": json.dumps(about)})


def load_shared_examples(file: Path) -> list[Example]:
    """Load the examples that another process wrote with `share_examples`."""
    tensors, metadata = read_tensors(file)
    about: dict[str, Any] = json.loads(metadata["about"])
    config = SamplingConfig(**about["sampling"])
    spools = [RowFile.of(**spool) for spool in about["spools"]]

    examples: list[Example] = []
    for number, (prompt, advantage, on_policy, places) in enumerate(about["examples"]):
        sides = [SpooledTrajectory(spools[spool], row, tensors["timesteps"], config) for spool, row in places]
        if len(sides) == 2:
            mask = tensors.get(f"mask.{number}")
            examples.append(TrainingPair(sides[0], sides[1], prompt, on_policy[0], on_policy[1], mask))
        else:
            examples.append(TrainingSample(sides[0], prompt, advantage, on_policy[0]))
    return examples
