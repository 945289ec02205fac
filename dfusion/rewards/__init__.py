"""Scorers: rate how well an image matches its prompt. Imports neither numpy nor torch before a scorer needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from dfusion.catalogue import SCORERS, SHAPES_CLIP_FOLDER
from dfusion.errors import InvalidInputError, ModelNotFoundError
from dfusion.rewards.config import (
    AestheticConfig,
    EntryPointConfig,
    HttpScorerConfig,
    ImageRewardConfig,
    JpegConfig,
    OcrConfig,
    OpenClipConfig,
    PickScoreConfig,
    ScorerConfig,
    VerdictScorerConfig,
    VqaConfig,
    WeightedScorerConfig,
)

if TYPE_CHECKING:
    import numpy as np


class Scorer(Protocol):
    """Scores images against their prompts; higher is better.

    `name` and `version` are recorded with every score. Scores of different names or versions are not comparable.
    """

    name: str
    version: str

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """A finite score per image, for images (B, H, W, 3) uint8 with one prompt each.

        Raises ShapeMismatchError for other images, NonFiniteError, and ScorerError if scoring failed.
        """
        ...


def load_scorer(
    scorer: str | ScorerConfig,
    device: str = "cpu",
    *,
    installed: Mapping[str, ScorerConfig | str] = MappingProxyType({}),
    verdicts: Mapping[str, float] | None = None,
) -> Scorer:
    """Load a scorer.

    Args:
        scorer: A name of `dfusion.catalogue.SCORERS` or of `installed`, or a scorer's settings.
        device: The device of the scorer's model.
        installed: The installation's own scorers by name, as settings or as 'module:attribute'. They override built-in
            scorers of the same name.
        verdicts: Reviewers' verdicts for a verdict scorer, by `dfusion.rewards.verdicts.image_key`.

    Returns:
        The scorer.

    Raises:
        ModelNotFoundError: The scorer does not exist, or its files are missing.
        InvalidInputError: A weighted sum contains itself, or a verdict scorer has no verdicts.
        ScorerError: An installed scorer cannot be created, or has no name, version or score.

    Example:
        >>> import numpy as np
        >>> from dfusion import load_scorer
        >>> scorer = load_scorer("shapes-judge")  # 1 if the image shows every part of the prompt, else 0
        >>> grey_images = np.full((2, 64, 64, 3), 128, np.uint8)
        >>> scorer.score(grey_images, ["a red and striped circle", "a star wearing a blue hat"])
        [0.0, 0.0]
    """
    return _Loader(device, installed, verdicts).load(scorer, ())


class _Loader:
    """Loads scorers by name or settings. `within` holds the names of the weighted sums that contain the scorer."""

    def __init__(
        self, device: str, installed: Mapping[str, ScorerConfig | str], verdicts: Mapping[str, float] | None
    ) -> None:
        self._device = device
        self._installed = installed
        self._verdicts = verdicts

    def load(self, scorer: str | ScorerConfig, within: tuple[str, ...]) -> Scorer:
        """The scorer with this name or these settings."""
        return self._load_name(scorer, within) if isinstance(scorer, str) else self._load_config(scorer, None, within)

    def _load_name(self, name: str, within: tuple[str, ...]) -> Scorer:
        if name in within:
            raise InvalidInputError(f"scorer {name!r}: expected a sum without itself, got {(*within, name)}")
        if name in self._installed:
            config = self._installed[name]
            if isinstance(config, str):
                from dfusion.rewards.plugins import NamedScorer, load_attribute

                return cast(Scorer, NamedScorer(load_attribute(config), name))
            return self._load_config(config, name, (*within, name))
        if name not in _BUILT_IN:
            raise ModelNotFoundError(f"scorer: expected one of {sorted({*SCORERS, *self._installed})}, got {name!r}")
        return _BUILT_IN[name](name, self._device)

    def _load_config(self, config: ScorerConfig, name: str | None, within: tuple[str, ...]) -> Scorer:
        match config:
            case OpenClipConfig():
                return _open_clip(config, name, self._device)
            case PickScoreConfig() | ImageRewardConfig() | AestheticConfig() | VqaConfig():
                return _local_model(config, name or config.kind, self._device)
            case JpegConfig():
                return _jpeg(config, name or "jpeg")
            case OcrConfig():
                return _ocr(config, name or "ocr")
            case HttpScorerConfig():
                from dfusion.rewards.http import HttpScorer

                return HttpScorer(config, name=name or f"http-{config.url.host}")
            case EntryPointConfig():
                from dfusion.rewards.plugins import NamedScorer, load_entry_point

                scorer = load_entry_point(config.entry_point)
                return scorer if name is None else cast(Scorer, NamedScorer(scorer, name))
            case VerdictScorerConfig():
                from dfusion.rewards.verdicts import VerdictScorer

                if self._verdicts is None:
                    raise InvalidInputError("verdicts: expected reviewers' verdicts for a verdict scorer, got None")
                return VerdictScorer(self._verdicts, name=name or "verdicts")
            case WeightedScorerConfig():
                from dfusion.rewards.weighted import WeightedScorer

                parts = [(part.weight, self.load(part.scorer, within)) for part in config.parts]
                return WeightedScorer(parts, name=name, normalise=config.normalise)


def _open_clip(config: OpenClipConfig, name: str | None, device: str) -> Scorer:
    from dfusion.rewards.clip import ClipScorer

    if config.folder is not None:
        return ClipScorer.from_folder(config.folder, name=name or f"clip-{config.folder.name}", device=device)
    if config.file is not None:
        name = name or f"clip-{config.file.stem}"
        return ClipScorer.from_file(config.file, config.architecture, name=name, device=device)
    return ClipScorer.from_pretrained(config.architecture, config.weights, name=name, device=device)


def _local_model(
    config: PickScoreConfig | ImageRewardConfig | AestheticConfig | VqaConfig, name: str, device: str
) -> Scorer:
    match config:
        case PickScoreConfig():
            from dfusion.rewards.pickscore import PickScorer

            return PickScorer(config.source, processor=config.processor, name=name, device=device)
        case ImageRewardConfig():
            from dfusion.rewards.image_reward import ImageRewardScorer

            return ImageRewardScorer(config.source, name=name, device=device)
        case AestheticConfig():
            from dfusion.rewards.aesthetic import AestheticScorer

            return AestheticScorer(config.source, config.head, name=name, device=device)
        case VqaConfig():
            from dfusion.rewards.vqa import VqaScorer

            return VqaScorer(config.source, question=config.question, name=name, device=device)


def _jpeg(config: JpegConfig, name: str) -> Scorer:
    from dfusion.rewards.jpeg import JpegScorer

    return JpegScorer(name=name, prefer=config.prefer, quality=config.quality)


def _ocr(config: OcrConfig, name: str) -> Scorer:
    from dfusion.rewards.ocr import OcrScorer

    return OcrScorer(name=name, exact=config.exact, whole_image=config.whole_image)


def _shapes_judge(_: str, __: str) -> Scorer:
    from dfusion.shapes.judge import JudgeScorer

    return JudgeScorer.load()


_BUILT_IN: Mapping[str, Callable[[str, str], Scorer]] = MappingProxyType(
    {
        "shapes-clip": lambda name, device: _open_clip(OpenClipConfig(folder=SHAPES_CLIP_FOLDER), name, device),
        "shapes-judge": _shapes_judge,
        "shapes-ocr": lambda name, _: _ocr(OcrConfig(whole_image=True), name),
        "shapes-ocr-exact": lambda name, _: _ocr(OcrConfig(whole_image=True, exact=True), name),
        "ocr": lambda name, _: _ocr(OcrConfig(), name),
        "jpeg-compressible": lambda name, _: _jpeg(JpegConfig(), name),
        "jpeg-incompressible": lambda name, _: _jpeg(JpegConfig(prefer="incompressible"), name),
        "clip-vit-h-14": lambda name, device: _open_clip(OpenClipConfig(), name, device),
        "clip-vit-l-14": lambda name, device: _open_clip(
            OpenClipConfig(architecture="ViT-L-14", weights="datacomp_xl_s13b_b90k"), name, device
        ),
    }
)
