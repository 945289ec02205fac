"""Every error that dfusion raises on purpose.

DFusionError
  InvalidInputError       what was given cannot be worked on
    ShapeMismatchError    a tensor's shape or dtype is not what its place needs
    ItemNotInPromptError  an item is not a word of its prompt
    ScheduleError         a trained step of the schedule has no noise, or no previous step
    LayerNotFoundError    the U-Net has no layer of the asked kind
  ModelNotFoundError      no model of that name, or its files are missing
  NonFiniteError          a loss, score or latent became NaN or infinite
  PolicyMismatchError     log-probs of an immediate replay differ from the recorded ones
  CheckpointError         a file is damaged, or was made by something else
"""

from __future__ import annotations


class DFusionError(Exception):
    """Root of dfusion's errors."""

    retryable = False


class InvalidInputError(DFusionError):
    """What was given cannot be worked on; the message says what was expected and what came."""


class ShapeMismatchError(InvalidInputError):
    """A tensor's shape or dtype is not what its place needs."""

    def __init__(self, name: str, expected: object, got: object) -> None:
        super().__init__(f"{name}: expected {expected}, got {got}")


class ItemNotInPromptError(InvalidInputError):
    """An item is not a word of its prompt."""

    def __init__(self, item: str, prompt: str) -> None:
        self.item, self.prompt = item, prompt
        super().__init__(f"item {item!r} is not in the prompt {prompt!r}")


class ScheduleError(InvalidInputError):
    """A trained step of the schedule has no noise, or no previous step."""


class LayerNotFoundError(InvalidInputError):
    """The U-Net has no layer of the asked kind."""


class ModelNotFoundError(DFusionError):
    """No model of that name, or its files are missing."""


class NonFiniteError(DFusionError):
    """A loss, score or latent became NaN or infinite; the message names the step."""


class PolicyMismatchError(DFusionError):
    """Log-probs of an immediate replay differ from the recorded ones by more than the tolerance."""


class CheckpointError(DFusionError):
    """A file is damaged, or was made by something else than what reads it."""
