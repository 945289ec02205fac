"""Every error that dfusion raises on purpose.

DFusionError
  InvalidInputError       what was given cannot be worked on
    ShapeMismatchError    a tensor's shape or dtype is not what its place needs
    ItemNotInPromptError  an item is not a word of its prompt
    PromptItemsError      the items of a prompt cannot be found in its text
    ScheduleError         a trained step of the schedule has no noise, or no previous step
    LayerNotFoundError    the U-Net has no layer of the asked kind
  ModelNotFoundError      no model of that name, or its files are missing
  NonFiniteError          a loss, score or latent became NaN or infinite
  PolicyMismatchError     log-probs of an immediate replay differ from the recorded ones
  CheckpointError         a file is damaged, or was made by something else
  ExportError             an exported model, loaded again, is not what was exported
  ScorerError             a scorer gave no usable scores
    ScorerUnavailableError  a scorer cannot be reached now
"""

from __future__ import annotations

from collections.abc import Mapping


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


class PromptItemsError(InvalidInputError):
    """The items of a prompt cannot be found in its text: brackets do not pair up, or no word names a thing."""


class ScheduleError(InvalidInputError):
    """A trained step of the schedule has no noise, or no previous step."""


class LayerNotFoundError(InvalidInputError):
    """The U-Net has no layer of the asked kind."""


class ModelNotFoundError(DFusionError):
    """No model of that name, or its files are missing."""


class NonFiniteError(DFusionError):
    """A loss, score or latent became NaN or infinite; the message names the step."""


class PolicyMismatchError(DFusionError):
    """Log-probs of an immediate replay differ from the recorded ones by more than the tolerance; says at which step.

    `ratio_by_step` has for each step_index the ratio that is furthest from 1.
    """

    def __init__(self, what: str, step_index: int, ratio_by_step: Mapping[int, float], tolerance: float) -> None:
        self.step_index, self.ratio_by_step, self.tolerance = step_index, ratio_by_step, tolerance
        ratio = ratio_by_step[step_index]
        super().__init__(
            f"{what}: expected a ratio of 1 within {tolerance:g} at step_index {step_index}, got {ratio:.6g}; network,"
            " adapter, prompts, schedule or precision are not those that the trajectories were sampled with"
        )


class CheckpointError(DFusionError):
    """A file is damaged, or was made by something else than what reads it."""


class ExportError(DFusionError):
    """An exported model cannot be loaded again, or then gives another image; nothing of it stays."""


class ScorerError(DFusionError):
    """A scorer gave no usable scores."""


class ScorerUnavailableError(ScorerError):
    """A scorer cannot be reached now; the same request may succeed later."""

    retryable = True
