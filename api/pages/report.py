"""The report of a run: one page without scripts or other files, whose size has a bound."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from sqlalchemy.orm import Session

from api.converters.pairs import pair_out
from api.converters.samples import sample_out
from api.pages.images import UnreadableImageError, thumbnail
from api.pages.line_charts import LineChart, line_chart
from api.score_changes import SPLITS, Change, changes, first_of_each_prompt
from api.wire.jobs import JobDetail
from api.wire.pairs import PairOut
from api.wire.samples import SampleOut
from service.db.queries import results, verdicts
from service.db.tables import Artifact, Metric, Score
from service.errors import StorageError
from service.states import SampleRole, Split
from service.storage import Store

MOST_SHOWN = 50
"""The most pairs, and the most prompts, of a report."""
_MOST_MEASURED = 5000
"""The intervals of a larger evaluation are left out, since they need the scores of all its images."""
_PAIRS_READ = 200
_SIDE = 256
_SMALL_BYTES = 16_384
"""Smaller images are not scaled."""
_SPLIT_NAMES: Mapping[str, str] = {
    Split.HELD_OUT: "held-out prompts",
    Split.TRAIN: "training prompts",
    Split.ROLLOUT: "samples",
}
_UPDATE_CHARTS = (
    ("Loss", "loss", {"loss": "loss"}),
    (
        "Log-ratio of both sides",
        "log p / p_old",
        {"preferred": "log_ratio_preferred", "rejected": "log_ratio_rejected"},
    ),
    ("KL divergence from the policy before", "KL, per element", {"KL": "kl"}),
    ("Gradient norm", "L2 norm before clipping", {"gradient norm": "grad_norm"}),
)


@dataclass(frozen=True)
class Picture:
    """An image of the report, with its score. `source` is its path, and a data URI when it is embedded."""

    head: str
    source: str
    score: float | None = None


@dataclass(frozen=True)
class Row:
    """Images with the same prompt. `label` is what was decided about them."""

    prompt: str
    pictures: tuple[Picture, ...]
    label: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The evaluations before and after training.

    Attributes:
        round: The round of the last evaluation.
        changes: The changes of the scores.
        has_intervals: Whether the changes have intervals.
        pictures: Images of the same prompts and seeds before and after.
    """

    round: int
    changes: tuple[Change, ...]
    has_intervals: bool
    pictures: tuple[Row, ...]


def score_charts(scores: Sequence[Mapping[str, Any]]) -> list[LineChart]:
    """The charts of the scores, one for each scorer."""
    charts = []
    for scorer in sorted({row["scorer"] for row in scores}):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in scores:
            if row["scorer"] == scorer:
                name = _SPLIT_NAMES.get(row["split"], row["split"])
                series.setdefault(name, []).append((row["training_images"], row["mean"]))
        charts.append(line_chart(scorer, "images used for training", scorer, series))
    return [chart for chart in charts if chart is not None]


def update_charts(updates: Sequence[Mapping[str, Any]]) -> list[LineChart]:
    """The charts of the statistics of updates."""
    charts = []
    for title, label, keys in _UPDATE_CHARTS:
        series = {}
        for name, key in keys.items():
            series[name] = [(update["number"], update[key]) for update in updates if update[key] is not None]
        charts.append(line_chart(title, "update", label, series))
    return [chart for chart in charts if chart is not None]


@dataclass(frozen=True)
class Images:
    """The images of a report, which are read from the storage.

    Attributes:
        store: The storage of the service.
        artifacts: The rows of the images, by id.
    """

    store: Store
    artifacts: Mapping[str, Artifact]

    @classmethod
    def of(cls, store: Store, session: Session, rows: Iterable[Row]) -> Images:
        """The images of these rows."""
        pictures = chain.from_iterable(row.pictures for row in rows)
        return cls(store, results.artifacts(session, [_id_of(picture.source) for picture in pictures]))

    def embedded(self, rows: Iterable[Row]) -> list[Row]:
        """The rows with their images as data URIs."""
        return [replace(row, pictures=tuple(map(self._embedded, row.pictures))) for row in rows]

    def _embedded(self, picture: Picture) -> Picture:
        """The picture as a data URI, scaled down if it is large."""
        row = self.artifacts[_id_of(picture.source)]
        if row.size_bytes <= _SMALL_BYTES:
            content = b"".join(self.store.read(row.key, 0, row.size_bytes))
            return replace(picture, source=_data_uri(row.media_type, content))
        with self.store.borrow(row.key, row.sha256) as file:
            try:
                return replace(picture, source=_data_uri("image/webp", thumbnail(file, _SIDE)))
            except UnreadableImageError as error:
                raise StorageError(f"{row.id}: {error}") from error


def _id_of(path: str) -> str:
    return path.rpartition("/")[2]


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def evaluation_of(session: Session, job: JobDetail, shown: int) -> Evaluation | None:
    """The evaluations before training and after the last evaluated round. None if there are not two.

    Args:
        session: A view of the database.
        job: The run.
        shown: The number of prompts whose images are shown.
    """
    # 1. the last evaluated round
    last_round = results.last_measured_round(session, job.id, tuple(SPLITS))
    if not last_round:
        return None
    before, after = (results.metrics(session, job.id, range(number, number + 1)) for number in (0, last_round))
    rows = list(_changes_of_means(before, after))
    if not rows:
        return None

    # 2. the changes, with intervals from the scores of all images by the same versions of the scorers
    reward = job.spec.get("reward")
    is_small = max(row.difference.count for row in rows) * len(SPLITS) <= _MOST_MEASURED
    prompts = None if is_small else (0, shown)
    versions = set(map(_version, before)).intersection(map(_version, after))
    samples = [_evaluated(session, job.id, number, prompts, versions) for number in (0, last_round)]
    measured = changes(samples[0], samples[1], reward if isinstance(reward, str) else "") if is_small else []
    rows = measured or rows

    # 3. images of the first prompts
    pictured = first_of_each_prompt(samples[0], samples[1], rows[0].split, shown)
    return Evaluation(last_round, tuple(rows), bool(measured), tuple(_before_after(pictured, reward)))


def _changes_of_means(before: Sequence[Metric], after: Sequence[Metric]) -> Iterator[Change]:
    """The changes of the stored means, which have no intervals. Different versions of a scorer are not compared."""
    earlier = {(metric.split, *_version(metric)): metric for metric in before}
    for metric in after:
        old = earlier.get((metric.split, *_version(metric)))
        if metric.split in SPLITS and old is not None:
            yield Change.of_means(Split(metric.split), metric.scorer, old.mean, metric.mean, metric.count)


def _version(row: Metric | Score) -> tuple[str, str]:
    """The scorer and its version."""
    return row.scorer, row.version


def _evaluated(
    session: Session,
    job_id: str,
    round_number: int,
    prompts: tuple[int, int] | None,
    versions: Collection[tuple[str, str]],
) -> list[SampleOut]:
    """The evaluation images of a round, with their scores by these versions of scorers."""
    rows = results.round_samples(session, job_id, round_number, [SampleRole.EVALUATION], prompts)
    scores = results.scores(session, [row.id for row in rows])
    samples = []
    for row in rows:
        of_versions = [score for score in scores[row.id] if _version(score) in versions]
        samples.append(sample_out(row, of_versions))
    return samples


def _before_after(pictured: Iterable[tuple[SampleOut, SampleOut]], reward: object) -> Iterator[Row]:
    for two in pictured:
        pictures = []
        for head, sample in zip(("before", "after"), two, strict=True):
            scores = {score.scorer: score.value for score in sample.scores}
            score = scores.get(reward) if isinstance(reward, str) else next(iter(scores.values()), None)
            pictures.append(Picture(head, sample.image, score))
        yield Row(two[0].prompt, tuple(pictures))


def pairs_of(session: Session, job: JobDetail, round_number: int, shown: int) -> list[Row]:
    """Pairs of a round: those with a verdict first, then those whose target or reference gained most over the base."""
    page = results.pair_page(session, _PAIRS_READ, None, job.id, round_number, None)
    samples = results.samples(session, results.sides_of(page.rows))
    given = verdicts.of_pairs(session, [row.id for row in page.rows])
    pairs = sorted((pair_out(row, samples, given) for row in page.rows), key=_rank)[:shown]

    return [Row(pair.prompt, tuple(_sides(pair)), _label(pair)) for pair in pairs]


def _rank(pair: PairOut) -> tuple[bool, bool, float]:
    better = pair.target or pair.reference
    gain = (better.score or 0.0) - (pair.base.score or 0.0)
    return pair.verdict is None, not pair.adopted, -gain


def _sides(pair: PairOut) -> Iterator[Picture]:
    """The images of a pair."""
    yield Picture("base", pair.base.image, pair.base.score)
    yield Picture("reference", pair.reference.image, pair.reference.score)
    if pair.target is not None:
        yield Picture("target", pair.target.image, pair.target.score)
    if pair.mask is not None:
        yield Picture("mask", pair.mask)


def _label(pair: PairOut) -> str:
    """The decision about a pair, and its verdict."""
    adopted = {True: "adopted", False: "not adopted", None: ""}[pair.adopted]
    verdict = "" if pair.verdict is None else f"verdict: {pair.verdict.prefer}"
    by = "" if pair.verdict is None or pair.verdict.reviewer is None else f" by {pair.verdict.reviewer}"
    return ", ".join(filter(None, (adopted, verdict + by)))
