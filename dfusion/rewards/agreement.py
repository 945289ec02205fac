"""How often a reward agrees with people: it scores the preferred image of a labelled pair higher.

Run as a program, this module prints the agreement as JSON: `python -m dfusion.rewards.agreement pairs.parquet --scorer
shapes-clip`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dfusion.errors import DFusionError
from dfusion.labelled_pairs import TIE, LabelledPair, read_labelled_pairs
from dfusion.preference_test import Rate
from dfusion.rewards import Scorer, load_scorer
from dfusion.rewards.checks import checked_scores
from dfusion.rewards.config import ScorerConfig

_MOST_SCORES = 64
"""Scores that are kept: an image of D3PO is in several pairs, which follow each other."""


@dataclass(frozen=True)
class Agreement:
    """How often a scorer agrees with the labels of pairs.

    scorer, version  the scorer
    agrees           the pairs whose preferred image it scores higher, among those with a preferred image
    equal            the pairs among these whose images it scores the same, which is no agreement
    ties             pairs labelled as a tie, which no scorer can agree with
    unlabelled       pairs without a label
    """

    scorer: str
    version: str
    agrees: Rate
    equal: int
    ties: int
    unlabelled: int


def agreement(scorer: Scorer, pairs: Iterable[LabelledPair], confidence: float = 0.95) -> Agreement:
    """Score both images of each pair, one pair at a time.

    Args:
        scorer: The reward.
        pairs: Labelled pairs, such as those of `read_labelled_pairs`.
        confidence: The confidence of the Wilson interval, which takes the pairs as independent: it is too narrow if
            many pairs have the same prompt.

    Returns:
        The agreement.

    Raises:
        InvalidInputError: An image does not decode; the errors of `read_labelled_pairs`.
        ScorerError, NonFiniteError: From scoring.
    """
    counts = dict.fromkeys(("agrees", "disagrees", "equal", "ties", "unlabelled"), 0)
    known: dict[tuple[str, bytes], float] = {}
    for pair in pairs:
        if pair.label in (None, TIE):
            counts["ties" if pair.label == TIE else "unlabelled"] += 1
            continue

        first, second = _scores(scorer, pair, known)
        if first == second:
            counts["equal"] += 1
        else:
            counts["agrees" if (first > second) == (pair.label == 1) else "disagrees"] += 1

    total = counts["agrees"] + counts["disagrees"] + counts["equal"]
    agrees = Rate(counts["agrees"], total, confidence)
    return Agreement(scorer.name, scorer.version, agrees, counts["equal"], counts["ties"], counts["unlabelled"])


def _scores(scorer: Scorer, pair: LabelledPair, known: dict[tuple[str, bytes], float]) -> tuple[float, float]:
    """The scores of both images, which are scored together if they have one size."""
    keys = [(pair.caption, image) for image in pair.images]
    if not all(key in known for key in keys):
        if len(known) >= _MOST_SCORES:
            known.clear()
        images = pair.pixels()
        batches = [np.stack(images)] if images[0].shape == images[1].shape else [image[None] for image in images]
        scores: list[float] = []
        for batch in batches:
            prompts = [pair.caption] * len(batch)
            scores += checked_scores(scorer.name, scorer.score(batch, prompts), prompts)
        known |= zip(keys, scores, strict=True)
    return known[keys[0]], known[keys[1]]


def main(arguments: Sequence[str], installed: Mapping[str, str | ScorerConfig] = MappingProxyType({})) -> None:
    """Print the agreement of a scorer, which can be an installed one, as JSON. A problem is an exit with a message."""
    parser = argparse.ArgumentParser(prog="python -m dfusion.rewards.agreement", description=__doc__)
    parser.add_argument("source", type=Path, help="a file or folder: parquet in Pick-a-Pic's layout, or D3PO's votes")
    parser.add_argument("--samples", type=Path, help="the folder with the images that D3PO's votes are about")
    parser.add_argument("--scorer", required=True, help="a scorer's name")
    parser.add_argument("--limit", type=_at_least_one, help="maximum number of pairs to read")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)

    try:
        scorer = load_scorer(given.scorer, given.device, installed=installed)
        result = agreement(scorer, islice(read_labelled_pairs(given.source, given.samples), given.limit))
    except DFusionError as error:
        raise SystemExit(str(error)) from error
    sys.stdout.write(json.dumps(as_json(result)) + "\n")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def as_json(result: Agreement) -> dict[str, Any]:
    """The agreement as a JSON object."""
    agrees = result.agrees
    interval = agrees.interval
    return {
        "scorer": result.scorer,
        "version": result.version,
        "pairs": agrees.total,
        "agrees": agrees.count,
        "equal": result.equal,
        "rate": agrees.rate,
        "interval": None if interval is None else list(interval),
        "ties": result.ties,
        "unlabelled": result.unlabelled,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
