"""Results of a demo job, read from the API: changes of scores, and images with their scores."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from api.client import Client
from api.score_changes import SPLITS, Change, changes, first_of_each_prompt, headline
from api.wire.jobs import JobDetail
from api.wire.pairs import PairOut
from api.wire.samples import SampleOut
from dfusion.errors import InvalidInputError
from service.states import SampleRole

PICTURE = 128
"""Width and height of an image as shown, in pixels."""
_ACCEPTED = 0.5
"""A judge scores accepted images 1 and others 0."""


@dataclass(frozen=True)
class Picture:
    """An image as shown.

    Attributes:
        image: The image, resized.
        reward: Its score; None for a mask.
        accepted: The judge's verdict. None if not judged.
    """

    image: Image.Image
    reward: float | None = None
    accepted: bool | None = None

    @property
    def caption(self) -> str:
        """The verdict and the reward, if present."""
        verdict = {True: "accepted", False: "rejected", None: ""}[self.accepted]
        score = "" if self.reward is None else f"{self.reward:.3f}"
        return ", ".join(filter(None, (verdict, score)))


@dataclass(frozen=True)
class BeforeAfter:
    """Images of one prompt and seed before and after training."""

    prompt: str
    before: Picture
    after: Picture


@dataclass(frozen=True)
class FusedPair:
    """A pair that was trained on. `mask` is the region in which the reference's keys and values were read."""

    target_id: str
    prompt: str
    base: Picture
    reference: Picture
    target: Picture
    mask: Picture


@dataclass(frozen=True)
class Results:
    """The results of a job.

    Attributes:
        job: The id of the job.
        reward: The scorer that was trained on.
        judge: A scorer that was not trained on; None if there is none.
        changes: The changes of the scores by split and scorer.
        shown: Images before and after training: the first held-out prompts, each with its first seed.
        fused: The adopted pairs whose targets gained most over their bases.
        pairs: The number of pairs.
        adopted: The number of pairs with an adopted target.
    """

    job: str
    reward: str
    judge: str | None
    changes: tuple[Change, ...]
    shown: tuple[BeforeAfter, ...]
    fused: tuple[FusedPair, ...]
    pairs: int
    adopted: int

    @property
    def headline(self) -> str:
        """The first change in one sentence."""
        return headline(self.changes[0])

    @property
    def shown_rule(self) -> str:
        """The prompts shown before and after training, and their captions."""
        score = f"{self.reward}'s score"
        below = score if self.judge is None else f"{self.judge}'s verdict and {score}"
        name = SPLITS[self.changes[0].split]
        return f"The first {len(self.shown)} {name} prompts of the list, first seed of each. Below each image: {below}."

    @property
    def fused_rule(self) -> str:
        """The pairs shown, and their captions."""
        chosen = (
            f"The targets of {self.adopted} of {self.pairs} pairs were adopted; these {len(self.fused)} gained most"
        )
        below = f"Below each image: {self.reward}'s score. Mask: where the reference's keys and values were read."
        return f"{chosen} over their bases. {below}"


def as_json(results: Results, seed: int, seconds: float) -> dict[str, Any]:
    """The numbers for `results.json`. `seconds` is the duration of the demo."""
    rows = []
    for change in results.changes:
        numbers = {"before": change.before, "after": change.after, "difference": change.difference.mean}
        rounded = {name: round(value, 6) for name, value in numbers.items()}
        interval = change.difference.interval
        own = {"split": str(change.split), "scorer": change.scorer, "prompts": change.prompts}
        rows.append({**own, **rounded, "interval": interval and [round(end, 6) for end in interval]})
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "reward": results.reward,
        "judge": results.judge,
        "pairs": results.pairs,
        "adopted": results.adopted,
        "changes": rows,
    }


def results_of(client: Client, job: JobDetail, shown: int, fused: int) -> Results:
    """Results of a round job with evaluations before and after.

    Args:
        client: A client of the service.
        job: The job.
        shown: The number of prompts to show before and after training.
        fused: The number of pairs to show.

    Raises:
        ApiError: The service does not respond.
        InvalidInputError: The evaluations have different prompts or seeds.
    """
    reward = job.spec["reward"]
    judge = job.spec["watch"]

    # 1. the same prompts and seeds before and after
    before = list(client.samples(job=job.id, role=SampleRole.EVALUATION, round=0))
    after = list(client.samples(job=job.id, role=SampleRole.EVALUATION, round=job.rounds))
    changed = changes(before, after, reward)
    pictured = first_of_each_prompt(before, after, changed[0].split, shown)

    # 2. the pairs of its training
    adopted = sorted(client.pairs(job=job.id, adopted=True), key=gain, reverse=True)
    return Results(
        job=job.id,
        reward=reward,
        judge=judge,
        changes=tuple(changed),
        shown=tuple(_before_after(client, old, new, reward, judge) for old, new in pictured),
        fused=tuple(_fused_pair(client, pair) for pair in adopted[:fused]),
        pairs=job.outputs["pairs"],
        adopted=len(adopted),
    )


def gain(pair: PairOut) -> float:
    """Score of the target minus score of the base."""
    if pair.target is None or pair.target.score is None or pair.base.score is None:
        return 0.0
    return pair.target.score - pair.base.score


def _fused_pair(client: Client, pair: PairOut) -> FusedPair:
    if pair.target is None or pair.mask is None:
        raise InvalidInputError(f"{pair.id}: expected an adopted pair with a target and a mask")
    return FusedPair(
        target_id=pair.target.id,
        prompt=pair.prompt,
        base=Picture(_image(client, pair.base.image), pair.base.score),
        reference=Picture(_image(client, pair.reference.image), pair.reference.score),
        target=Picture(_image(client, pair.target.image), pair.target.score),
        mask=Picture(_image(client, pair.mask)),
    )


def _before_after(client: Client, before: SampleOut, after: SampleOut, reward: str, judge: str | None) -> BeforeAfter:
    pictures = [_sample_picture(client, sample, reward, judge) for sample in (before, after)]
    return BeforeAfter(before.prompt, *pictures)


def _sample_picture(client: Client, sample: SampleOut, reward: str, judge: str | None) -> Picture:
    scores = {score.scorer: score.value for score in sample.scores}
    accepted = scores[judge] >= _ACCEPTED if judge in scores else None
    return Picture(_image(client, sample.image), scores[reward], accepted)


def _image(client: Client, artifact: str) -> Image.Image:
    image = Image.open(io.BytesIO(client.read(artifact))).convert("RGB")
    enlarged = image.width <= PICTURE
    return image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
