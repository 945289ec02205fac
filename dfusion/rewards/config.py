"""Settings of scorers. Does not import torch.

`ScorerConfig` names files, servers and installed code, so only an installation's owner may set it. A client of the
service names installed scorers, or weighted sums of them. A request therefore never makes the service open a file, call
an address or import code of the client's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, HttpUrl, SecretStr, model_validator

from dfusion.config import Count, Frozen, StrictModel
from dfusion.errors import FieldsError

ScorerName = Annotated[str, Field(min_length=1, max_length=100)]
WeightsSource = Annotated[str, Field(min_length=1, description='A folder, or "owner/name@commit" with 40 hex digits')]


class OpenClipConfig(Frozen):
    """The cosine of an open_clip model: pretrained weights by their open_clip tag, or an open_clip folder."""

    kind: Literal["open_clip"] = "open_clip"
    architecture: str = Field("ViT-H-14", description="open_clip's name of the model (section 4.1)")
    weights: str = Field("laion2b_s32b_b79k", description="open_clip's tag of its weights; downloaded if not cached")
    folder: Path | None = Field(None, description="An open_clip folder, instead of architecture and weights")
    file: Path | None = Field(None, description="Safetensors of that architecture, instead of weights, such as HPSv2's")


class PickScoreConfig(Frozen):
    """PickScore: a CLIP model of transformers, with its learned scale."""

    kind: Literal["pickscore"] = "pickscore"
    source: WeightsSource
    processor: WeightsSource | None = Field(None, description="Of its image transform and tokenizer, if others")


class ImageRewardConfig(Frozen):
    """ImageReward, converted to safetensors."""

    kind: Literal["image_reward"] = "image_reward"
    source: WeightsSource


class AestheticConfig(Frozen):
    """LAION's aesthetic predictor: a CLIP model of transformers and a head. The prompt does not count."""

    kind: Literal["aesthetic"] = "aesthetic"
    source: WeightsSource
    head: Path = Field(description="The head's linear layers as safetensors")


class VqaConfig(Frozen):
    """The probability that a model answers "yes" when it is asked whether the image shows the prompt."""

    kind: Literal["vqa"] = "vqa"
    source: WeightsSource
    question: str = Field(
        'Does this figure show "{}"? Please answer yes or no.',
        pattern=r"\{\}",
        max_length=1000,
        description="The question of VQAScore; {} is the prompt",
    )


class JpegConfig(Frozen):
    """The size of the image as JPEG in kB, negative if small files are preferred. Needs no model."""

    kind: Literal["jpeg"] = "jpeg"
    prefer: Literal["compressible", "incompressible"] = "compressible"
    quality: int = Field(95, ge=1, le=95)


class HttpScorerConfig(Frozen):
    """A scorer on an HTTP server; see `dfusion.rewards.http` for request and response."""

    kind: Literal["http"] = "http"
    url: HttpUrl
    version: str = Field("1", min_length=1, max_length=100, description="Recorded with every score")
    timeout_seconds: float = Field(30, gt=0, le=600, description="Timeout to connect, and between bytes of a response")
    deadline_seconds: float = Field(300, gt=0, le=3600, description="Timeout of one whole response")
    max_response_bytes: int = Field(1 << 20, ge=1, le=1 << 26, description="A longer response is an error")
    retries: int = Field(3, ge=0, le=10, description="Further attempts if the server is unavailable or overloaded")
    backoff_seconds: float = Field(1, ge=0, le=60, description="Pause before the first retry; it doubles, up to 60")
    batch_size: Count = Field(16, description="Images per request")
    bearer_token: SecretStr | None = Field(None, description="Sent as Authorization: Bearer")


class OcrConfig(Frozen):
    """How well the text in an image matches the text that its prompt quotes; needs the extra `ocr`."""

    kind: Literal["ocr"] = "ocr"
    exact: bool = Field(False, description="1 if the texts are equal, otherwise 0")
    whole_image: bool = Field(False, description="Read the image as one line of text; for small images of text only")


class EntryPointConfig(Frozen):
    """A scorer of an installed Python package, by the name of its entry point in the group `dfusion.scorers`."""

    kind: Literal["entry_point"] = "entry_point"
    entry_point: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


class VerdictScorerConfig(Frozen):
    """Reviewers' verdicts on the images. They are passed when the scorer is loaded."""

    kind: Literal["verdicts"] = "verdicts"


class WeightedPart(StrictModel):
    """One scorer of a weighted sum, by name. A negative weight makes it a penalty."""

    scorer: ScorerName
    weight: float

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if self.weight == 0:
            raise FieldsError("weight: expected a number other than 0, got 0", "weight")
        return self


def sum_name(parts: Sequence[tuple[float, str]], normalise: bool, max_length: int) -> str:
    """A name of the sum of (weight, name). A long one is its beginning and a digest: columns of names are limited."""
    term = "{!r}*z({})" if normalise else "{!r}*{}"
    text = "+".join(term.format(weight, name) for weight, name in parts)
    if len(text) <= max_length:
        return text
    return f"{text[: max_length - 13]}~{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class WeightedScorerConfig(Frozen):
    """The weighted sum of other scorers. Their scales differ: a cosine is near 0.3, a verdict in [0, 1]."""

    kind: Literal["weighted"] = "weighted"
    parts: tuple[WeightedPart, ...] = Field(min_length=1, max_length=16)
    normalise: bool = Field(
        False,
        description="Normalise each part by the mean and standard deviation of the run's scores so far, instead of "
        "adding raw scores. Only for the reward of a round",
    )

    @property
    def name(self) -> str:
        """The name of the scorer, with which its scores are stored."""
        return sum_name([(part.weight, part.scorer) for part in self.parts], self.normalise, 100)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [part.scorer for part in self.parts]
        if len(set(names)) != len(names):
            raise FieldsError(f"parts: expected each scorer once, got {names}", "parts")
        return self


ScorerConfig = Annotated[
    OpenClipConfig
    | PickScoreConfig
    | ImageRewardConfig
    | AestheticConfig
    | VqaConfig
    | JpegConfig
    | OcrConfig
    | HttpScorerConfig
    | EntryPointConfig
    | VerdictScorerConfig
    | WeightedScorerConfig,
    Field(discriminator="kind"),
]
"""Any scorer of an installation's settings."""
