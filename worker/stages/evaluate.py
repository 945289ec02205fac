"""Evaluate: a shard of the images that a model is measured by, from the same seeds every round, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from dfusion.config import SamplingConfig
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.seeds import evaluation_seed
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Model, Sample, Score
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.kinds import EvaluationJobSpec, EvaluationSpec, RoundSpec, ScorerRef
from service.states import SampleRole
from worker.context import Record, StageContext, batches
from worker.scoring import score_pixels, score_rows


@dataclass(frozen=True)
class Measuring:
    """How the job's models are measured."""

    samples_per_prompt: int
    scorers: Sequence[ScorerRef]
    seed: int
    sampling: SamplingConfig

    @classmethod
    def of(cls, context: StageContext) -> Measuring:
        """As the job's spec says. Raises ConflictError for a kind of job that measures nothing."""
        match context.spec:
            case EvaluationJobSpec() as spec:
                return cls(spec.samples_per_prompt, spec.scorers or (), spec.seed, spec.sampling)
            case RoundSpec(evaluation=evaluation, reward=reward, sampling=sampling):
                own = evaluation or EvaluationSpec()
                return cls(own.samples_per_prompt, own.scorers or (reward or "",), own.seed, sampling)
            case spec:
                raise ConflictError(f"nothing is measured for a {type(spec).__name__}")


@dataclass(frozen=True)
class _Wanted:
    """An image to be made and scored."""

    prompt_index: int
    prompt: str
    number: int
    seed: int


def run(context: StageContext) -> Record:
    """Samples and scores of the shard's model (for rounds, that after the round; 0: before the first)."""
    how, params = Measuring.of(context), context.claim.params
    wanted = _wanted(context, how)
    row, adapter = (
        context.model(params["model"]) if "model" in params else context.model_before(context.claim.round + 1)
    )
    model = context.load_model(row, adapter)
    parts = list(batches(wanted, context.bench.settings.batch_size))
    context.heartbeat.plan(len(parts) * how.sampling.num_steps)
    images = np.concatenate([_draw(context, how, model, part) for part in parts])
    samples = [
        _sample_row(context, row, one, context.store_image(f"image-{place:06d}", pixels))
        for place, (one, pixels) in enumerate(zip(wanted, images, strict=True))
    ]
    scores = _scores(context, how, samples, images)

    def record(session: Session) -> None:
        context.record_artifacts(session)
        results.add_all(session, samples)
        results.add_all(session, scores)

    return record


def _wanted(context: StageContext, how: Measuring) -> list[_Wanted]:
    params, (start, stop) = context.claim.params, context.span("prompts")
    prompts = context.prompts(params["set"])
    return [
        _Wanted(i, prompts[i].text, n, evaluation_seed(how.seed, params["split"], i, prompts[i].text, n))
        for i in range(start, stop)
        for n in range(how.samples_per_prompt)
    ]


def _draw(context: StageContext, how: Measuring, model: DiffusionModel, part: Sequence[_Wanted]) -> np.ndarray:
    size = model.latent_size(how.sampling)
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([one.prompt for one in part], size),
        model.encode_prompts([""], size),
        [one.seed for one in part],
        config=how.sampling,
        on_step=context.on_step,
        latent_size=size,
    )
    return model.decode(trajectory.final)


def _sample_row(context: StageContext, model: Model, one: _Wanted, image: str) -> Sample:
    claim = context.claim
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        role=SampleRole.EVALUATION,
        split=claim.params["split"],
        prompt_set_id=claim.params["set"],
        prompt_index=one.prompt_index,
        prompt=one.prompt,
        number=one.number,
        seed=one.seed,
        model_id=model.id,
        image_artifact_id=image,
        created_at=now_seconds(),
    )


def _scores(context: StageContext, how: Measuring, samples: list[Sample], images: np.ndarray) -> list[Score]:
    found = []
    for ref in how.scorers:
        scorer = context.bench.scorer(ref)
        for part in batches(range(len(samples)), context.bench.settings.batch_size):
            context.heartbeat.check()
            values = score_pixels(scorer, images[list(part)], [samples[i].prompt for i in part])
            found += score_rows([scorer], [samples[i].id for i in part], [values])
    return found
