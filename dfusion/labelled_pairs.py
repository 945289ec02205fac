"""Labelled pairs of other projects: two images of a prompt and the one that a person prefers. Does not import torch.

Two formats are read:

* parquet files in the layout of Pick-a-Pic, which are also what `dfusion.preference_data` writes,
* the votes of D3PO: JSON files with one vector a prompt, and the folder of its script `sample.py` with the images.

Such a pair has images only. It can check a reward (`dfusion.rewards.agreement`), but not train a model here: DPO, DDPO
and DPOK learn from the denoising steps of a sample, which no image file has.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dfusion.errors import InvalidInputError, TextEncodingError, shortened
from dfusion.prompts.text import decode_utf8

TIE = 0.5
_COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
_ROWS_AT_ONCE = 16
"""Rows that are converted at a time."""
_BUFFER_BYTES = 1 << 20
_WHY_NO_TRAINING = "it has images only, and a training needs the denoising steps of both sides"


@dataclass(frozen=True)
class LabelledPair:
    """Two images of one prompt with a person's label. There are no denoising steps, so it cannot be trained on.

    place    where the pair comes from, as in "pairs.parquet: row 3"
    caption  the prompt
    images   two encoded images of any format and size
    label    1 if the first image is preferred, 0 if the second is, 0.5 for a tie; None if the pair has no label
    """

    place: str
    caption: str
    images: tuple[bytes, bytes]
    label: float | None

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Both images, (H, W, 3) uint8; their sizes can differ. Raises InvalidInputError if one does not decode."""
        first, second = self.images
        return _pixels(f"{self.place}: jpg_0", first), _pixels(f"{self.place}: jpg_1", second)


def why_untrainable(pair: LabelledPair) -> str:
    """Why a training refuses the pair."""
    return f"got a labelled pair ({pair.place}): {_WHY_NO_TRAINING}"


def read_labelled_pairs(source: Path, samples: Path | None = None) -> Iterator[LabelledPair]:
    """Read labelled pairs one by one.

    Args:
        source: A parquet file in Pick-a-Pic's layout or a folder of such files, or D3PO's votes: a JSON file, or a
            folder with one JSON file for each person.
        samples: For D3PO's votes, the folder that its `sample.py` wrote, with `prompt.json` and `images`.

    Yields:
        The pairs. Images are decoded when they are used (`LabelledPair.pixels`).

    Raises:
        InvalidInputError: The file does not exist or has another format; no pairs; columns, labels or images that do
            not fit. The message names the file and the row.
    """
    if not source.exists():
        raise InvalidInputError(f"expected a file or folder at {source}, got none")
    tables = sorted(source.glob("*.parquet")) if source.is_dir() else []
    if source.suffix.lower() == ".parquet":
        tables = tables or [source]
    if tables:
        if samples is not None:
            raise InvalidInputError(f"{source.name}: expected no folder of samples for parquet, got {samples}")
        for table in tables:
            yield from _of_parquet(table)
    elif source.suffix.lower() == ".json" or source.is_dir():
        yield from _of_votes(source, samples)
    else:
        pickle = "; a pickle is never read, since it can run code" if source.suffix in (".pkl", ".pt", ".bin") else ""
        raise InvalidInputError(
            f"{source.name}: expected parquet in Pick-a-Pic's layout, or D3PO's votes as JSON{pickle}"
        )


# Pick-a-Pic


def _of_parquet(path: Path) -> Iterator[LabelledPair]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidInputError("parquet needs pyarrow: pip install pyarrow") from error

    count = 0
    try:
        # with a buffer, a column is read page by page; a page has at most a row group
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            missing = [name for name in _COLUMNS if name not in names]
            if missing:
                message = f"expected Pick-a-Pic's columns {', '.join(_COLUMNS)}, got no {', '.join(missing)}"
                raise InvalidInputError(f"{path.name}: {message}")

            columns = [*_COLUMNS, *(["has_label"] if "has_label" in names else [])]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    count += 1
                    yield _of_row(f"{path.name}: row {count}", row)
    except (OSError, pyarrow.ArrowException) as error:
        raise InvalidInputError(f"{path.name}: expected a parquet file: {error}") from error
    if count == 0:
        raise InvalidInputError(f"{path.name}: expected at least one pair, got none")


def _of_row(place: str, row: Mapping[str, Any]) -> LabelledPair:
    caption = row["caption"]
    if not isinstance(caption, str):
        raise InvalidInputError(f"{place}: caption: expected a text, got {shortened(caption)}")
    first, second = (_bytes_of(f"{place}: {name}", row[name]) for name in ("jpg_0", "jpg_1"))
    return LabelledPair(place, caption, (first, second), _label(place, row))


def _bytes_of(place: str, value: Any) -> bytes:
    """The bytes of an image, which data sets of Hugging Face wrap: {"bytes", "path"}."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise InvalidInputError(f"{place}: expected an encoded image, got {shortened(content)}")
    return content


def _label(place: str, row: Mapping[str, Any]) -> float | None:
    labels = (row["label_0"], row["label_1"])
    if row.get("has_label") is False or labels == (None, None):
        return None
    if labels not in ((1, 0), (0, 1), (TIE, TIE)):
        raise InvalidInputError(f"{place}: expected label_0 and label_1 of 1 and 0, 0 and 1 or 0.5 twice, got {labels}")
    return float(labels[0])


# D3PO


def _of_votes(source: Path, samples: Path | None) -> Iterator[LabelledPair]:
    """The pairs of each prompt's images whose mean votes differ or tie."""
    # 1. the files
    if samples is None:
        raise InvalidInputError(
            f"{source}: D3PO's JSON has votes only, neither images nor prompts: also name the folder that its "
            "sample.py wrote, with prompt.json and images"
        )
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not files:
        raise InvalidInputError(f"{source}: expected JSON files with votes, got none")
    votes = [_vectors(file) for file in files]
    images = len(votes[0][0])
    for file, vectors in zip(files, votes, strict=True):
        if len(vectors[0]) != images:
            raise InvalidInputError(
                f"{file.name}: expected votes on {images} images a prompt, as in {files[0].name}, got {len(vectors[0])}"
            )

    # 2. the prompts, of which D3PO uses those that everybody has voted on
    prompts = _prompts(samples / "prompt.json")
    rows = min(map(len, votes))
    if rows > len(prompts):
        raise InvalidInputError(f"{files[0].name}: expected votes on at most {len(prompts)} prompts, got {rows}")

    # 3. the pairs
    for row in range(rows):
        means = [fmean(vectors[row][image] for vectors in votes) for image in range(images)]
        paths = [samples / "images" / f"{images * row + image:05}.png" for image in range(images)]
        contents = [_content(f"{files[0].name}: row {row + 1}", path) for path in paths]
        for first, second in combinations(range(images), 2):
            place = f"{files[0].name}: row {row + 1}, images {first + 1} and {second + 1}"
            label = TIE if means[first] == means[second] else float(means[first] > means[second])
            yield LabelledPair(place, prompts[row], (contents[first], contents[second]), label)


def _vectors(file: Path) -> list[list[float]]:
    """The vectors of a file: one a prompt, all of the same length, of finite numbers."""
    vectors = _json(file)
    if not isinstance(vectors, list) or not vectors or not isinstance(vectors[0], list) or len(vectors[0]) < 2:
        expected = "expected D3PO's votes: a list with one list of two or more numbers a prompt"
        raise InvalidInputError(f"{file.name}: {expected}, got {shortened(vectors)}")
    for number, vector in enumerate(vectors, start=1):
        if not isinstance(vector, list) or len(vector) != len(vectors[0]) or not all(map(_is_number, vector)):
            message = f"expected {len(vectors[0])} finite numbers, as in row 1, got {shortened(vector)}"
            raise InvalidInputError(f"{file.name}: row {number}: {message}")
    return vectors


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def _prompts(file: Path) -> Sequence[str]:
    prompts = _json(file)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidInputError(f"{file.name}: expected a list of texts, got {shortened(prompts)}")
    return prompts


def _json(file: Path) -> Any:
    try:
        return json.loads(decode_utf8(file.read_bytes()))
    except (OSError, ValueError, RecursionError, TextEncodingError) as error:
        raise InvalidInputError(f"{file.name}: expected JSON: {error}") from error


def _content(place: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{place}: expected the image {path.name}: {error.strerror}") from error


def _pixels(place: str, content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise InvalidInputError(f"{place}: expected an image that decodes, got a file of an unknown format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"{place}: expected an image that decodes: {error}") from error
