"""Evaluate: sample and score a shard of a model's evaluation images, with the same seeds in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sqlalchemy.orm import Session

from dfusion.config import SamplingConfig
from dfusion.models import DiffusionModel
from dfusion.prompts import Prompt
from dfusion.rewards import Scorer
from dfusion.sampling import sample
from dfusion.seeds import evaluation_seed
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Model, Sample, Score
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import EvaluationJobSpec, EvaluationSpec, JobSpec, RoundSpec, ScorerRef
from service.states import SampleRole
from worker.context import StageContext
from worker.inputs import StoredModel, load_model, load_model_before, load_prompts, shard_range
from worker.scoring import ScoringSummary, record_summary, score_pixels, score_rows
from worker.stages.base import Stage


@dataclass(frozen=True)
class Inputs:
    """Inputs of an evaluate stage.

    Attributes:
        prompts: All prompts of the split; the shard is a range of them.
        model: The model to sample from. In a round job, the model after the round (round 0: before the first).
    """

    prompts: Sequence[Prompt]
    model: StoredModel


@dataclass(frozen=True)
class Outputs:
    """Outputs of an evaluate stage.

    Attributes:
        samples: The samples of the shard, by prompt and number.
        scores: Their scores, scorer by scorer.
        summary: The summary for the stage that joins the shards.
    """

    samples: Sequence[Sample]
    scores: Sequence[Score]
    summary: ScoringSummary


@dataclass(frozen=True)
class Measurement:
    """The evaluation settings of a job.

    Attributes:
        samples_per_prompt: The number of images per prompt.
        scorers: The scorers.
        seed: The base seed.
        sampling: The sampling settings.
    """

    samples_per_prompt: int
    scorers: Sequence[ScorerRef]
    seed: int
    sampling: SamplingConfig

    @classmethod
    def of(cls, spec: JobSpec) -> Measurement:
        """Read the settings from the job's spec. Raises ConflictError if the job has no evaluation."""
        match spec:
            case EvaluationJobSpec():
                return cls(spec.samples_per_prompt, spec.scorers or (), spec.seed, spec.sampling)
            case RoundSpec():
                evaluation = spec.evaluation or EvaluationSpec()
                scorers = evaluation.scorers or (spec.reward or "",)
                return cls(evaluation.samples_per_prompt, scorers, evaluation.seed, spec.sampling)
            case _:
                raise ConflictError(f"{type(spec).__name__} jobs have no evaluation stage")


@dataclass(frozen=True)
class _PlannedImage:
    """The prompt and the seed of an image of the shard."""

    prompt_index: int
    prompt: str
    number: int
    seed: int


def load(session: Session, claim: Claim) -> Inputs:
    """Load the prompts of the shard's split, and its model."""
    prompts = load_prompts(session, claim.params["set"])
    if "model" in claim.params:
        return Inputs(prompts, load_model(session, claim.params["model"]))
    return Inputs(prompts, load_model_before(session, claim, claim.round + 1))


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Sample the shard's prompts, store the images and score them."""
    measurement = Measurement.of(context.claim.spec)
    planned = _plan(context.claim, measurement, inputs.prompts)
    model = context.load_model(inputs.model)
    sample_batch = partial(_sample, context, measurement, model)

    images = []
    with context.storing_images() as writer:
        for pixels in context.in_batches(planned, sample_batch, measurement.sampling.num_steps):
            images.append(pixels)
            writer.add_batch(pixels)
        image_ids = writer.ids()

    samples = []
    for plan, image_id in zip(planned, image_ids, strict=True):
        samples.append(_sample_row(context.claim, inputs.model.row, plan, image_id))

    scorers = [context.load_scorer(scorer_ref) for scorer_ref in measurement.scorers]
    scores = _scores(context, scorers, samples, np.concatenate(images))
    return Outputs(samples, scores, ScoringSummary.of(scorers))


def _plan(claim: Claim, measurement: Measurement, prompts: Sequence[Prompt]) -> list[_PlannedImage]:
    split = claim.params["split"]
    start, stop = shard_range(claim, "prompts")
    images = []
    for index in range(start, stop):
        text = prompts[index].text
        for number in range(measurement.samples_per_prompt):
            seed = evaluation_seed(measurement.seed, split, index, text, number)
            images.append(_PlannedImage(index, text, number, seed))
    return images


def _sample(
    context: StageContext, measurement: Measurement, model: DiffusionModel, part: Sequence[_PlannedImage]
) -> np.ndarray:
    """The images of a batch, (B, H, W, 3) uint8."""
    size = model.latent_size(measurement.sampling)
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([image.prompt for image in part], size),
        model.encode_prompts([measurement.sampling.negative_prompt], size),
        [image.seed for image in part],
        config=measurement.sampling,
        on_step=context.on_step,
        latent_size=size,
    )
    return model.decode(trajectory.final)


def _sample_row(claim: Claim, model: Model, planned: _PlannedImage, image_id: str) -> Sample:
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        role=SampleRole.EVALUATION,
        split=claim.params["split"],
        prompt_set_id=claim.params["set"],
        prompt_index=planned.prompt_index,
        prompt=planned.prompt,
        number=planned.number,
        seed=planned.seed,
        model_id=model.id,
        image_artifact_id=image_id,
        created_at=now_seconds(),
    )


def _scores(
    context: StageContext, scorers: Sequence[Scorer], samples: Sequence[Sample], images: np.ndarray
) -> list[Score]:
    ids = [sample.id for sample in samples]
    scores = []
    for scorer in scorers:
        scores += score_rows([scorer], ids, [score_pixels(context, scorer, images, samples)])
    return scores


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert the samples and their scores, and store the summary."""
    results.add_all(session, outputs.samples)
    results.add_all(session, outputs.scores)
    record_summary(session, claim, outputs.summary)


STAGE = Stage(load, compute, record)
