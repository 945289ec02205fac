"""Changes of a model's scores, from its evaluation images before and after training. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from api.wire.samples import SampleOut
from dfusion.evaluation import Bootstrap, Estimate, ScoreRow, ScoreTable, compare
from service.states import Split

SPLITS = {Split.HELD_OUT: "held-out", Split.TRAIN: "training"}
"""Names of the splits of an evaluation. Prompts that the model was not trained on come first."""
HEADINGS = ("prompts", "scorer", "before", "after", "change", "95 % interval")
"""Column headings of a table of changes. The last four columns are numbers."""
_BEFORE = "before"
_AFTER = "after"


@dataclass(frozen=True)
class Change:
    """A scorer's mean over a split's images before and after, and the paired difference with its 95 % interval."""

    split: Split
    scorer: str
    prompts: int
    before: float
    after: float
    difference: Estimate

    @classmethod
    def of_means(cls, split: Split, scorer: str, before: float, after: float, count: int) -> Change:
        """The change of a mean over `count` images, without an interval and without the number of prompts."""
        return cls(split, scorer, 0, before, after, Estimate(after - before, None, count))

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero. False without an interval."""
        if self.difference.interval is None:
            return False
        low, high = self.difference.interval
        return low > 0 or high < 0

    @property
    def interval_text(self) -> str:
        """The interval as text; "-" without one."""
        if self.difference.interval is None:
            return "-"
        low, high = self.difference.interval
        return f"{low:+.4f} to {high:+.4f}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of a table row, in the order of HEADINGS."""
        numbers = (f"{self.before:.4f}", f"{self.after:.4f}", f"{self.difference.mean:+.4f}")
        return (SPLITS[self.split], self.scorer, *numbers, self.interval_text)


def changes(before: Sequence[SampleOut], after: Sequence[SampleOut], reward: str) -> list[Change]:
    """The change for each split and scorer. Held-out prompts and the reward come first.

    Images are paired by prompt and seed, and intervals resample prompts (`dfusion.evaluation`).

    Args:
        before: Evaluation samples of the model before training.
        after: Evaluation samples of the trained model, with the same prompts, seeds and scorers.
        reward: The scorer that was trained on.

    Raises:
        InvalidInputError: An image or a score has no counterpart.
    """
    rows = []
    for split in SPLITS:
        scores = [*_scores(_BEFORE, before, split), *_scores(_AFTER, after, split)]
        if not scores:
            continue

        table = ScoreTable.from_rows(scores)
        for scorer in sorted(table.scorers, key=lambda name: (name != reward, name)):
            rows.append(_change(table, split, scorer))
    return rows


def _scores(model: str, samples: Iterable[SampleOut], split: Split) -> Iterator[ScoreRow]:
    """The scores of a split. Prompts are keyed by index and text, because a list can contain a prompt twice."""
    for sample in samples:
        if sample.split == split:
            prompt = f"{sample.prompt_index}: {sample.prompt}"
            for score in sample.scores:
                yield ScoreRow(model, prompt, sample.seed, score.scorer, score.value)


def _change(table: ScoreTable, split: Split, scorer: str) -> Change:
    return Change(
        split=split,
        scorer=scorer,
        prompts=len(table.prompts),
        before=float(table.scores(_BEFORE, scorer).mean()),
        after=float(table.scores(_AFTER, scorer).mean()),
        difference=compare(table, _AFTER, _BEFORE, scorer, Bootstrap(confidence=0.95)).difference,
    )


def headline(change: Change) -> str:
    """The change in one sentence: its size, its interval and the conclusion."""
    measured = (
        f"On {change.prompts} {SPLITS[change.split]} prompts {change.scorer} changed from {change.before:.4f} to "
        f"{change.after:.4f} ({change.difference.mean:+.4f}, 95 % interval {change.interval_text})"
    )
    if change.difference.interval is None:
        return f"{measured}: a single prompt has no interval, so this run does not show a change."
    if not change.excludes_zero:
        return f"{measured}: the interval includes zero, so this run does not show a change."
    verb = "rose" if change.difference.mean > 0 else "fell"
    return f"{measured}: the interval excludes zero, so the score {verb}."


def first_of_each_prompt(
    before: Sequence[SampleOut], after: Sequence[SampleOut], split: str, count: int
) -> list[tuple[SampleOut, SampleOut]]:
    """The first image of each of the split's first prompts, before and after. The choice does not depend on scores."""
    later = {(sample.prompt_index, sample.seed): sample for sample in after if sample.split == split}
    first = [sample for sample in before if sample.split == split and sample.number == 0]
    first.sort(key=lambda sample: sample.prompt_index)
    return [(sample, later[sample.prompt_index, sample.seed]) for sample in first[:count]]
