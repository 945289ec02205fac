"""The OCR reward: how well the text in an image matches the text that its prompt quotes.

A prompt such as `a sign that says "open"` quotes the text that the image must show. The image is read by RapidOCR (the
extra `ocr`), whose package carries its models. The score is 1 minus the edit distance of the two texts, divided by the
longer one's length, as in the OCR reward of Flow-GRPO (arXiv 2505.05470). Case, spaces and the form of a character
(NFKC) do not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from dfusion.errors import InvalidInputError, ModelNotFoundError
from dfusion.rewards.checks import check_images

_QUOTED = re.compile('"([^"]+)"|\u201c([^\u201d]+)\u201d|\u00ab([^\u00bb]+)\u00bb')
_PACKAGE = "rapidocr-onnxruntime"
EXPECTED_QUOTES = 'expected text in quotes, such as a sign that says "open"'


class OcrScorer:
    """Reads images and compares the text with the quoted text of the prompt: 1.0 if they are equal, at least 0.0.

    An image without readable text has the score 0.0.
    """

    def __init__(self, *, name: str = "ocr", exact: bool = False, whole_image: bool = False) -> None:
        """Load RapidOCR.

        Args:
            name: The name of the scorer.
            exact: Whether a text that is not equal has the score 0.0.
            whole_image: Read the whole image as one line of text, without looking for text first. This is ten times
                faster, and right for small images that contain nothing else.

        Raises:
            ModelNotFoundError: RapidOCR is not installed.
        """
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ModelNotFoundError(
                f"scorer {name!r}: expected {_PACKAGE}, which is not installed: pip install 'dfusion[ocr]'"
            ) from error

        self.name = name
        self.version = f"rapidocr-{version(_PACKAGE)}"
        self._exact = exact
        self._whole_image = whole_image
        # sums of one thread have one order, so scores do not depend on the machine's number of cores
        self._engine: Any = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The match of text and prompt for each image (B, H, W, 3) uint8, in [0, 1].

        Raises ShapeMismatchError, and InvalidInputError for a prompt that quotes no text.
        """
        check_images(images, prompts)
        expected = [normalised(quoted_text(prompt)) for prompt in prompts]
        scores = []
        for image, text in zip(images, expected, strict=True):
            match = similarity(normalised(self.read(image)), text)
            scores.append(float(match == 1) if self._exact else match)
        return scores

    def read(self, image: np.ndarray) -> str:
        """The text in an image (H, W, 3) uint8, line by line; empty if there is none."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        lines, _ = self._engine(bgr, use_det=not self._whole_image, use_cls=False, use_rec=True)
        position = 0 if self._whole_image else 1
        return "\n".join(line[position] for line in lines or ())


def quoted_text(prompt: str) -> str:
    """The text that a prompt quotes; several quotes are joined by spaces. Raises InvalidInputError if there is none."""
    quotes = [next(filter(None, groups)) for groups in _QUOTED.findall(prompt)]
    if not any(normalised(quote) for quote in quotes):
        raise InvalidInputError(f"prompt: {EXPECTED_QUOTES}, got {prompt!r}")
    return " ".join(quotes)


def quotes_text(prompt: str) -> bool:
    """Whether the prompt quotes a text."""
    try:
        return bool(quoted_text(prompt))
    except InvalidInputError:
        return False


def normalised(text: str) -> str:
    """The text without spaces, in lower case and in Unicode's form NFKC."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def similarity(text: str, expected: str) -> float:
    """1 minus the edit distance divided by the longer text's length, in [0, 1]."""
    distances = list(range(len(expected) + 1))
    for row, character in enumerate(text, start=1):
        previous = distances
        distances = [row]
        for column, wanted in enumerate(expected, start=1):
            replaced = previous[column - 1] + (character != wanted)
            distances.append(min(replaced, previous[column] + 1, distances[-1] + 1))
    return 1 - distances[-1] / max(len(text), len(expected), 1)
