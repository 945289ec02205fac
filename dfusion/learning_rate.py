"""The learning rate of each update: warm-up and schedule, as pure functions of the number of updates."""

from __future__ import annotations

import math

from dfusion.config import TrainingConfig


def learning_rate(config: TrainingConfig, update: int, first: int, last: int) -> float:
    """The learning rate of an update. It is positive in each update of the schedule.

    In the warm-up, update w of W has w / W of `config.learning_rate`. After it, the factor is 1, 1 - p, or
    (1 + cos(pi p)) / 2, where p grows from 0 after the warm-up to 1 after the schedule.

    Args:
        config: The settings.
        update: The number of the update, from 1, since AdamW's moments started at 0.
        first: The number of the training's first update.
        last: The number of its last one. Without `config.schedule_updates`, the schedule is from `first` to `last`.
    """
    if update <= config.warmup_updates:
        return config.learning_rate * (update / config.warmup_updates)

    start, stop = (1, last) if config.schedule_updates else (first, last)
    start = max(start, config.warmup_updates + 1)
    stop = config.schedule_updates or stop
    progress = min(1.0, (update - start) / max(1, stop + 1 - start))
    match config.schedule:
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        case _:
            return config.learning_rate
