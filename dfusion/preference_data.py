"""Preference pairs as a parquet data set for Diffusion-DPO training scripts.

Those scripts (Diffusion-DPO's and diffusers' train_diffusion_dpo.py) read Pick-a-Pic's columns. `jpg_0` and `jpg_1` are
two encoded images of any format. `label_0` is 1 if the first is preferred and 0 if the second is. `caption` is the
prompt.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dfusion.errors import InvalidInputError
from dfusion.files import write_whole

ROWS_AT_ONCE = 64
"""Pairs in memory at a time, and in a row group of the file."""


@dataclass(frozen=True)
class PreferencePair:
    """Two images of one prompt. In each tuple, the first element belongs to the preferred image.

    images      encoded image files, PNG or JPEG
    roles       their roles: "target" or "reference", and "base"
    seeds       their sample seeds, 0 to 2**63 - 1
    scores      their scores by `scorer` (its name and version)
    round       their round, from 0
    adopted     whether the target was adopted (Eq. 7); None without a target
    mask_cover  share of the image inside the mask, in [0, 1]; None without fusion
    statistics  further metrics of the pair by name, such as psnr_outside; finite numbers

    Raises InvalidInputError for bytes that are not an image, and for numbers outside their range.
    """

    pair_id: str
    caption: str
    images: tuple[bytes, bytes]
    roles: tuple[str, str]
    seeds: tuple[int, int]
    scores: tuple[float, float]
    scorer: str
    round: int = 0
    adopted: bool | None = None
    mask_cover: float | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, image in enumerate(self.images):
            try:
                Image.open(io.BytesIO(image)).verify()
            except (UnidentifiedImageError, OSError, SyntaxError) as error:
                raise InvalidInputError(f"pair {self.pair_id!r}: images[{number}] is not an image: {error}") from error

        if not all(math.isfinite(number) for number in (*self.scores, *self.statistics.values())):
            raise InvalidInputError(f"pair {self.pair_id!r}: expected finite scores and statistics, got {self.scores}")
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise InvalidInputError(f"pair {self.pair_id!r}: expected seeds from 0 to 2**63 - 1, got {self.seeds}")
        if self.mask_cover is not None and not 0 <= self.mask_cover <= 1:
            raise InvalidInputError(f"pair {self.pair_id!r}: expected mask_cover in [0, 1], got {self.mask_cover}")


def write_preferences(path: Path, pairs: Iterable[PreferencePair]) -> int:
    """Write `pairs` as one parquet file, atomically. Returns their number.

    Columns, in this order (the second is the caption, which is Diffusion-DPO's default):

        jpg_0, caption, jpg_1, label_0, label_1      the preferred image is jpg_0: label_0 is 1, label_1 is 0
        pair_id, round, scorer, adopted, mask_cover  as in PreferencePair
        role_0, role_1, seed_0, seed_1, score_0, score_1
        statistics                                   JSON object

    Raises InvalidInputError if there are no pairs.
    """
    import pyarrow
    from pyarrow import parquet

    remaining = iter(pairs)
    first = next(remaining, None)
    if first is None:
        raise InvalidInputError("pairs: expected at least one, got none")

    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in _COLUMNS.items()])
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with parquet.ParquetWriter(temporary, schema) as writer:
            for rows in _batches(_row(pair) for pair in chain([first], remaining)):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
                count += len(rows)

    write_whole(path, write)
    return count


_COLUMNS = {
    "jpg_0": "binary",
    "caption": "string",
    "jpg_1": "binary",
    "label_0": "double",
    "label_1": "double",
    "pair_id": "string",
    "round": "int64",
    "scorer": "string",
    "adopted": "bool",
    "mask_cover": "double",
    "role_0": "string",
    "role_1": "string",
    "seed_0": "int64",
    "seed_1": "int64",
    "score_0": "double",
    "score_1": "double",
    "statistics": "string",
}


def _row(pair: PreferencePair) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label_0": 1.0,
        "label_1": 0.0,
        "statistics": json.dumps(dict(pair.statistics), sort_keys=True),
    }
    row |= {name: getattr(pair, name) for name in ("caption", "pair_id", "round", "scorer", "adopted", "mask_cover")}
    for name, values in {"jpg": pair.images, "role": pair.roles, "seed": pair.seeds, "score": pair.scores}.items():
        row |= {f"{name}_{side}": value for side, value in enumerate(values)}
    return row


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, ROWS_AT_ONCE)):
        yield batch
