"""Advantages: scores normalised by the history of their prompt over all rounds (appendix C.1)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dfusion.errors import CheckpointError, InvalidInputError, NonFiniteError


@dataclass(frozen=True)
class RewardHistory:
    """Every score that the policy's own samples got, by prompt, in the order in which they came.

    All scores are kept (a number a sample), so mean and standard deviation are exact however many rounds there were.
    Only samples that the policy drew belong here: a fused target is compared with them, it is not one of them. (The
    authors' released code keeps its history of the plain samples alone, too.)

    scorer  whose scores they are, for example "shapes-clip, version 1" (`run_round` writes it so); None where nobody
            said
    """

    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scorer: str | None = None

    def extended(self, scores: Mapping[str, Sequence[float]], scorer: str | None = None) -> RewardHistory:
        """This history followed by a round's scores. Raises NonFiniteError naming the prompt, and InvalidInputError
        where they are another scorer's."""
        if self.scores and self.scorer not in (None, scorer):
            raise InvalidInputError(f"scorer: expected {self.scorer!r}, whose scores the history holds, got {scorer!r}")
        for prompt, values in scores.items():
            bad = [value for value in values if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(f"scores of {prompt!r}: expected finite numbers, got {bad}")
        added = {prompt: self.scores.get(prompt, ()) + tuple(values) for prompt, values in scores.items()}
        return RewardHistory({**self.scores, **added}, scorer)

    def advantages(self, prompt: str, scores: Sequence[float], clip: float = 5.0) -> list[float]:
        """(r - mean) / std of each score, clipped to [-clip, clip].

        Mean and standard deviation (the population's) are over the prompt's whole history, which should hold this
        round's samples already; `scores` may be theirs or those of fused targets. Where the standard deviation is 0
        (one sample, or equal scores) there is no scale to measure with, and every advantage is 0. Raises
        InvalidInputError for a prompt without history, NonFiniteError for a score that is NaN or infinite.
        """
        history = self.scores.get(prompt)
        if not history:
            raise InvalidInputError(f"prompt: expected one with scores in the history, got {prompt!r}")
        if not all(math.isfinite(score) for score in scores):
            raise NonFiniteError(f"scores of {prompt!r}: expected finite numbers, got {list(scores)}")
        mean, std = statistics.fmean(history), statistics.pstdev(history)
        if std == 0:
            return [0.0] * len(scores)
        return [max(-clip, min(clip, (score - mean) / std)) for score in scores]

    def to_json(self) -> dict[str, object]:
        """Plain values; `from_json` of them, or of their JSON text read again, is this history exactly."""
        return {"scorer": self.scorer, "scores": {prompt: list(values) for prompt, values in self.scores.items()}}

    @classmethod
    def from_json(cls, value: object) -> RewardHistory:
        """What `to_json` gave. Raises CheckpointError for anything else."""
        known = value if isinstance(value, dict) else {}
        found, scorer = known.get("scores"), known.get("scorer")
        if not isinstance(found, dict) or not all(_is_scores(prompt, scores) for prompt, scores in found.items()):
            raise CheckpointError("reward history: expected scores, lists of finite numbers by prompt, and scorer")
        if not isinstance(scorer, str | None):
            raise CheckpointError(f"reward history: expected a scorer's name, got {scorer!r}")
        return cls({prompt: tuple(float(score) for score in scores) for prompt, scores in found.items()}, scorer)


def _is_scores(prompt: object, scores: object) -> bool:
    if not isinstance(prompt, str) or not isinstance(scores, list):
        return False
    numbers = (isinstance(score, int | float) and not isinstance(score, bool) for score in scores)
    return all(numbers) and all(math.isfinite(score) for score in scores)
