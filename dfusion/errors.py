"""All errors that dfusion raises deliberately.

DFusionError
  InvalidInputError       an argument is invalid
    ShapeMismatchError    a tensor has an unexpected shape or dtype
    ItemNotInPromptError  an item is not a word of its prompt
    PromptItemsError      the items of a prompt cannot be found in its text
    TextEncodingError     a text is not UTF-8
    ScheduleError         a trained step of the schedule has no noise, or no previous step
    LayerNotFoundError    the U-Net has no layer of the requested kind
    LoraSettingError      a LoRA setting does not fit the U-Net
  ModelNotFoundError      no model of that name, or its files are missing
    UnsupportedModelError   its files are complete, but Eq. 1 cannot run it
  NonFiniteError          a loss, score or latent became NaN or infinite
  PolicyMismatchError     log-probs of an immediate replay differ from the recorded ones
  RankLostError           another process of a training has ended
  CheckpointError         a file is damaged, or has another format
    AdapterError          a file is no adapter that can be loaded, or one for another model
  ExportError             an exported model cannot be reloaded, or renders another image
  ScorerError             a scorer returned no usable scores
    ScorerUnavailableError  a scorer cannot be reached at the moment
    InvalidScoreError       a scorer returned no number for an image
      NonFiniteScoreError   a scorer returned NaN or infinity for an image (also a NonFiniteError)
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sized


def shortened(value: object) -> str:
    """`value` for an error message: in full if it is short, otherwise its type, its length and its first elements."""
    short = reprlib.repr(value)
    if isinstance(value, Sized) and short != repr(value):
        return f"{type(value).__name__} of length {len(value)}: {short}"
    return short


class DFusionError(Exception):
    """Root of dfusion's errors."""

    retryable = False


class FieldsError(ValueError):
    """Values of a configuration that do not fit together, for validators of pydantic models.

    Attributes:
        fields: The names of the fields, relative to the model.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


class InvalidInputError(DFusionError):
    """An argument is invalid. The message names the expected and the actual value."""


class ShapeMismatchError(InvalidInputError):
    """A tensor has an unexpected shape or dtype."""

    def __init__(self, name: str, expected: object, got: object) -> None:
        super().__init__(f"{name}: expected {expected}, got {got}")


class ItemNotInPromptError(InvalidInputError):
    """An item is not a word of its prompt."""

    def __init__(self, item: str, prompt: str) -> None:
        self.item = item
        self.prompt = prompt
        super().__init__(f"item {item!r} is not in the prompt {prompt!r}")


class PromptItemsError(InvalidInputError):
    """The items of a prompt cannot be found in its text: brackets do not pair up, or no word names a thing."""


class TextEncodingError(InvalidInputError):
    """A text is not UTF-8. The message names the line and the byte."""


class ScheduleError(InvalidInputError):
    """A trained step of the schedule has no noise, or no previous step."""


class LayerNotFoundError(InvalidInputError):
    """The U-Net has no layer of the requested kind."""


class LoraSettingError(InvalidInputError):
    """A LoRA setting does not fit the U-Net. `setting` is its name in LoraConfig."""

    def __init__(self, setting: str, message: str) -> None:
        self.setting = setting
        super().__init__(f"training.lora.{setting}: {message}")


class ModelNotFoundError(DFusionError):
    """No model of that name, or its files are missing."""


class UnsupportedModelError(ModelNotFoundError):
    """The files are complete, but Eq. 1 cannot run the model. The message names the part and the cause."""


class NonFiniteError(DFusionError):
    """A loss, score or latent became NaN or infinite. The message names the step."""


class PolicyMismatchError(DFusionError):
    """Log-probs of an immediate replay differ from the recorded ones by more than the tolerance.

    `ratio_by_step` has, for each step_index, the ratio furthest from 1. The message names the worst step.
    """

    def __init__(self, what: str, step_index: int, ratio_by_step: Mapping[int, float], tolerance: float) -> None:
        self.step_index = step_index
        self.ratio_by_step = ratio_by_step
        self.tolerance = tolerance
        ratio = ratio_by_step[step_index]
        super().__init__(
            f"{what}: expected a ratio of 1 within {tolerance:g} at step_index {step_index}, got {ratio:.6g}; the"
            " network, adapter, prompts, schedule or precision differ from those used for sampling"
        )


class RankLostError(DFusionError):
    """Another process of a training has ended or does not respond. The training can resume from its last state."""

    retryable = True


class CheckpointError(DFusionError):
    """A file is damaged, or has an unexpected format."""


class AdapterError(CheckpointError):
    """A file is not an adapter that can be loaded, or one for another model. The message names its kind or its key."""


class ExportError(DFusionError):
    """An exported model cannot be reloaded, or renders another image. The export is removed."""


class ScorerError(DFusionError):
    """A scorer returned no usable scores."""


class ScorerUnavailableError(ScorerError):
    """A scorer cannot be reached at the moment. The same request may succeed later."""

    retryable = True


class InvalidScoreError(ScorerError):
    """A scorer returned no number for an image.

    Attributes:
        row: The index of the image among those that were scored together.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class NonFiniteScoreError(InvalidScoreError, NonFiniteError):
    """A scorer returned NaN or infinity for an image."""
