"""Advantages: scores normalised by the history of their prompt over all rounds (appendix C.1)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dfusion.errors import CheckpointError, InvalidInputError, NonFiniteError, shortened


@dataclass(frozen=True)
class RewardHistory:
    """The scores of all on-policy samples, by prompt, in chronological order.

    All scores are stored (one number per sample), so mean and standard deviation are exact for any number of rounds.
    The history holds samples of the policy only. A fused target is compared with them but is not one of them. The
    authors' released code also keeps a history of the plain samples only.

    scorer  name and version of the scorer, for example "shapes-clip, version 1" (as `run_round` writes it); None if
            unknown
    """

    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scorer: str | None = None

    def extended(self, scores: Mapping[str, Sequence[float]], scorer: str | None = None) -> RewardHistory:
        """This history followed by a round's scores.

        Raises NonFiniteError naming the prompt, and InvalidInputError for another scorer's scores.
        """
        if self.scores and self.scorer not in (None, scorer):
            raise InvalidInputError(f"scorer: expected {self.scorer!r}, whose scores the history holds, got {scorer!r}")
        for prompt, values in scores.items():
            bad = [value for value in values if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(f"scores of {prompt!r}: expected finite numbers, got {shortened(bad)}")

        added = {prompt: self.scores.get(prompt, ()) + tuple(values) for prompt, values in scores.items()}
        return RewardHistory({**self.scores, **added}, scorer)

    def advantages(self, prompt: str, scores: Sequence[float], clip: float = 5.0) -> list[float]:
        """(r - mean) / std of each score, clipped to [-clip, clip].

        Mean and (population) standard deviation are over the prompt's whole history, which should already contain this
        round's samples. `scores` may be theirs or those of fused targets. If the standard deviation is 0 (one sample,
        or equal scores), every advantage is 0. Raises InvalidInputError for a prompt without history, and
        NonFiniteError for a score that is NaN or infinite.
        """
        history = self.scores.get(prompt)
        if not history:
            raise InvalidInputError(f"prompt: expected one with scores in the history, got {prompt!r}")
        if not all(math.isfinite(score) for score in scores):
            raise NonFiniteError(f"scores of {prompt!r}: expected finite numbers, got {shortened(list(scores))}")

        mean = statistics.fmean(history)
        std = statistics.pstdev(history)
        if std == 0:
            return [0.0] * len(scores)
        return [max(-clip, min(clip, (score - mean) / std)) for score in scores]

    def to_json(self) -> dict[str, object]:
        """This history as plain JSON values. `from_json` restores it exactly."""
        return {"scorer": self.scorer, "scores": {prompt: list(values) for prompt, values in self.scores.items()}}

    @classmethod
    def from_json(cls, value: object) -> RewardHistory:
        """The inverse of `to_json`. Raises CheckpointError for anything else."""
        fields = value if isinstance(value, dict) else {}
        by_prompt = fields.get("scores")
        scorer = fields.get("scorer")
        if not isinstance(by_prompt, dict) or not all(_is_scores(*entry) for entry in by_prompt.items()):
            raise CheckpointError("reward history: expected scores, lists of finite numbers by prompt, and scorer")
        if not isinstance(scorer, str | None):
            raise CheckpointError(f"reward history: expected a scorer's name, got {scorer!r}")
        return cls({prompt: tuple(map(float, scores)) for prompt, scores in by_prompt.items()}, scorer)


def _is_scores(prompt: object, scores: object) -> bool:
    """Whether this is a prompt and a list of finite numbers."""
    if not isinstance(prompt, str) or not isinstance(scores, list):
        return False
    numbers = (isinstance(score, int | float) and not isinstance(score, bool) for score in scores)
    return all(numbers) and all(math.isfinite(score) for score in scores)
