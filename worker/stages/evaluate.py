"""Evaluate: a model's scores on training and held-out prompts, from the same seeds every round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from api.core.clock import now_seconds
from api.core.ids import IdKind, new_id
from api.core.queries import results
from api.core.seeds import evaluation_seed
from api.core.specs import EvaluationSpec
from api.core.states import SampleRole, Split
from api.core.tables import Metric, Model, Sample, Score
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from worker.scoring import score_pixels
from worker.task import Record, Task, batches


@dataclass(frozen=True)
class _Wanted:
    """An image to be made and scored."""

    split: Split
    prompt_index: int
    prompt: str
    number: int
    seed: int


def run(task: Task) -> Record:
    """Samples, scores and metrics of the model after this round (0: before the first)."""
    spec = task.spec.evaluation or EvaluationSpec()
    wanted = _wanted(task, spec)
    row, adapter = task.model_before(task.claim.round + 1)
    model = task.load_model(row, adapter)
    parts = list(batches(wanted, task.bench.settings.batch_size))
    task.heartbeat.plan(len(parts) * task.spec.sampling.num_steps)
    images = np.concatenate([_draw(task, model, part) for part in parts])
    samples = [
        _sample_row(task, row, one, task.store_image(f"image-{place:06d}", pixels))
        for place, (one, pixels) in enumerate(zip(wanted, images, strict=True))
    ]
    scores = _scores(task, spec, samples, images)
    metrics = _metrics(task, row, samples, scores)

    def record(session: Session) -> None:
        task.record_artifacts(session)
        results.add_all(session, samples)
        results.add_all(session, [*scores, *metrics])

    return record


def _wanted(task: Task, spec: EvaluationSpec) -> list[_Wanted]:
    splits = ((Split.TRAIN, task.prompts()), (Split.HELD_OUT, task.held_out_prompts()))
    return [
        _Wanted(split, i, prompt.text, n, evaluation_seed(spec.seed, split, i, prompt.text, n))
        for split, prompts in splits
        for i, prompt in enumerate(prompts)
        for n in range(spec.samples_per_prompt)
    ]


def _draw(task: Task, model: DiffusionModel, part: Sequence[_Wanted]) -> np.ndarray:
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([one.prompt for one in part]),
        model.encode_prompts([""]),
        [one.seed for one in part],
        config=task.spec.sampling,
        on_step=task.on_step,
    )
    return model.decode(trajectory.final)


def _sample_row(task: Task, model: Model, one: _Wanted, image: str) -> Sample:
    claim = task.claim
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        role=SampleRole.EVALUATION,
        split=one.split,
        prompt_set_id=claim.prompt_set_id if one.split is Split.TRAIN else claim.held_out_prompt_set_id,
        prompt_index=one.prompt_index,
        prompt=one.prompt,
        number=one.number,
        seed=one.seed,
        model_id=model.id,
        image_artifact_id=image,
        created_at=now_seconds(),
    )


def _scores(task: Task, spec: EvaluationSpec, samples: list[Sample], images: np.ndarray) -> list[Score]:
    found = []
    for name in dict.fromkeys(spec.scorers or (task.reward,)):
        scorer = task.bench.scorer(name)
        for part in batches(range(len(samples)), task.bench.settings.batch_size):
            task.heartbeat.check()
            values = score_pixels(scorer, images[list(part)], [samples[i].prompt for i in part])
            found += [
                Score(sample_id=samples[i].id, scorer=scorer.name, version=scorer.version, value=value)
                for i, value in zip(part, values, strict=True)
            ]
    return found


def _metrics(task: Task, model: Model, samples: list[Sample], scores: list[Score]) -> list[Metric]:
    split_of = {sample.id: sample.split for sample in samples}
    groups: dict[tuple[str, str, str], list[float]] = {}
    for score in scores:
        groups.setdefault((split_of[score.sample_id], score.scorer, score.version), []).append(score.value)
    return [
        Metric(
            job_id=task.claim.job_id,
            round=task.claim.round,
            split=split,
            scorer=scorer,
            version=version,
            model_id=model.id,
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.pstdev(values),
            created_at=now_seconds(),
        )
        for (split, scorer, version), values in groups.items()
    ]
