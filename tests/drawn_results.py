"""Results of a round job with drawn images, as its stages write them, without running a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw
from sqlalchemy import update

from dfusion.prompts import Prompt
from service.db.clock import now_seconds
from service.db.queries import jobs, results, stages
from service.db.tables import Artifact, Job, Metric, Model, Pair, Sample, Score, Stage
from service.ids import IdKind, new_id
from service.jobs.kinds import EvaluationJobSpec, RoundSpec
from service.service import Service, create_job, save_prompt_set
from service.states import JobState, StageState
from service.storage.base import file_sha256
from tests.service import round_body
from tests.stored_pairs import Results

_COLOURS = ("crimson", "royalblue", "seagreen", "goldenrod", "rebeccapurple", "darkorange")
_PROMPT_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
_SIDE = 96
_MARGINS = (("reference", 0.2), ("base", 0.0), ("target", 0.12))


@dataclass(frozen=True)
class DrawnRun:
    """A succeeded round job with drawn results: the ids of the job, its pairs and its last model."""

    job_id: str
    pairs: list[str]
    model_id: str


def draw_run(service: Service, pairs: int = 3, rounds: int = 2, side: int = _SIDE, **changes: Any) -> DrawnRun:
    """Insert a succeeded round job.

    Args:
        service: The installation.
        pairs: The number of pairs in each round.
        rounds: The number of rounds.
        side: The width and height of the images.
        changes: Changes of its request.
    """
    spec = RoundSpec.model_validate(round_body(rounds=rounds, label="drawn", **changes))
    job_id = create_job(service, spec)
    with service.uow.reading() as session:
        stage_id = stages.of_job(session, job_id)[0].id
        base_model = results.base_model(session, "tiny")
        job = jobs.get(session, job_id)
    assert base_model is not None

    rows = Results(job_id, stage_id, base_model.id)
    images = _images(service, rows, side)
    trajectory = {"trajectory_artifact_id": images["updates"].id, "trajectory_row": 0}  # never read
    pair_rows: list[Pair] = []
    sample_rows: list[Sample] = []
    score_rows: list[Score] = []
    prompts = spec.prompts or ()
    for round_number in range(1, rounds + 1):
        for number in range(pairs):
            index = number % len(prompts)
            common = {"round": round_number, "prompt": prompts[index].text, "prompt_index": index}
            common |= {"prompt_set_id": job.prompt_set_id}
            sides: dict[str, Sample] = {}
            for role, margin in _MARGINS:
                picture = images[f"{role}-{number % len(_COLOURS)}"]
                sample = rows.sample(3 * number + len(sides), picture, role=role, **common, **trajectory)
                sides[role] = sample
                score_rows.append(Score(sample_id=sample.id, scorer="brightness", version="1", value=0.3 + margin))
            sample_rows += sides.values()
            columns = {
                **common,
                "target_id": sides["target"].id,
                "target_score": 0.42,
                "reference_score": 0.5,
                "base_score": 0.3,
                "adopted": number % 4 != 3,
                "reason": "0.42 > 0.3: the target scores more than its base",
                "statistics": _statistics(),
                "mask_artifact_id": images["mask"].id,
                "thresholds": list(prompts[index].thresholds or ()),
            }
            pair_rows.append(rows.pair(number, sides["reference"].id, sides["base"].id, **columns))

    models = _models(rows, base_model.id, rounds, images["updates"].id)
    with service.uow.writing() as session:
        results.add_all(session, images.values())
        results.add_all(session, sample_rows)
        results.add_all(session, [*pair_rows, *models, *_metrics(job_id, base_model.id, models)])
        results.add_scores(session, score_rows)
        _end(session, job_id, stage_id, rounds)
    return DrawnRun(job_id, [pair.id for pair in pair_rows], models[-1].id)


@dataclass(frozen=True)
class DrawnEvaluation:
    """A succeeded evaluation with drawn images: the ids of the job and its models."""

    job_id: str
    models: list[str]


def draw_evaluation(
    service: Service, models: int = 3, prompts: int = 2, seeds: int = 2, side: int = _SIDE
) -> DrawnEvaluation:
    """Insert a succeeded evaluation of the base model and the models of a run, on two prompt sets.

    Args:
        service: The installation.
        models: The number of models.
        prompts: The number of prompts in each prompt set, at most eight.
        seeds: The number of samples of each prompt and model.
        side: The width and height of the images.
    """
    # 1. the job
    run = draw_run(service, pairs=1, rounds=max(1, models - 1))
    with service.uow.reading() as session:
        base_model = results.base_model(session, "tiny")
        trained = results.models_of_job(session, run.job_id, range(1, models))
    assert base_model is not None
    model_ids = [base_model.id, *(model.id for model in trained)][:models]
    sets = []
    for name, shape in (("drawn-circles", "circle"), ("drawn-stars", "star")):
        texts = [Prompt(text=f"a {colour} {shape}", items=(shape,)) for colour in _PROMPT_COLOURS[:prompts]]
        sets.append(save_prompt_set(service, name, "", texts)[0])
    spec = EvaluationJobSpec(
        models=tuple(model_ids),
        prompt_sets=("drawn-circles", "drawn-stars"),
        samples_per_prompt=seeds,
        scorers=("brightness",),
        label="drawn evaluation",
    )
    job_id = create_job(service, spec)

    # 2. its images
    with service.uow.reading() as session:
        stage_id = stages.of_job(session, job_id)[0].id
    rows = Results(job_id, stage_id, base_model.id)
    images = _images(service, rows, side)
    samples = [
        rows.sample(
            seed,
            images[f"{('base', 'target', 'reference')[position % 3]}-{(index + position) % len(_COLOURS)}"],
            round=0,
            role="evaluation",
            split=row.name,
            prompt_set_id=row.id,
            prompt=row.prompts[index]["text"],
            prompt_index=index,
            seed=1000 * index + seed,
            model_id=model_id,
        )
        for position, model_id in enumerate(model_ids)
        for row in sets
        for index in range(prompts)
        for seed in range(seeds)
    ]
    with service.uow.writing() as session:
        results.add_all(session, [*images.values(), *samples])
        _end(session, job_id, stage_id, 0)
    return DrawnEvaluation(job_id, model_ids)


def _images(service: Service, rows: Results, side: int) -> dict[str, Artifact]:
    """The stored pictures of each role and colour, the mask, and the log of a training."""
    with TemporaryDirectory() as folder:
        files = {"updates": Path(folder) / "updates.json"}
        files["updates"].write_text(_updates(), "utf-8")
        for number, colour in enumerate(_COLOURS):
            for role in ("base", "target", "reference"):
                files[f"{role}-{number}"] = _draw(Path(folder) / f"{role}-{number}.png", role, colour, side)
        files["mask"] = _draw(Path(folder) / "mask.png", "mask", "white", side)

        images = {}
        for slot, path in files.items():
            stored = service.store.put(rows.job_id, rows.stage_id, slot, path)
            media_type = "application/json" if slot == "updates" else "image/png"
            images[slot] = rows.artifact(
                slot,
                key=stored.key,
                sha256=file_sha256(path),
                size_bytes=path.stat().st_size,
                media_type=media_type,
            )
        return images


def _draw(path: Path, role: str, colour: str, side: int) -> Path:
    """A circle over a square: the base lacks the square, and the reference has another background."""
    backgrounds = {"mask": "black", "reference": "lavenderblush"}
    image = Image.new("RGB", (side, side), backgrounds.get(role, "aliceblue"))
    pen = ImageDraw.Draw(image)
    unit = side / 12
    if role != "base":
        pen.rectangle((3 * unit, 7 * unit, 9 * unit, 11 * unit), fill="white" if role == "mask" else "slategray")
    left = 2 if role == "base" else 4
    pen.ellipse((left * unit, unit, (left + 4) * unit, 5 * unit), fill=colour)
    image.save(path)
    return path


def _updates() -> str:
    updates = [
        {
            "update": number,
            "loss": 0.693 - 0.01 * number,
            "kl": 0.001 * number,
            "ratio_max": 1 + 0.002 * number,
            "grad_norm": 0.5 + 0.1 * (number % 3),
            "log_ratio_preferred": 0.002 * number,
            "log_ratio_rejected": -0.003 * number,
        }
        for number in range(1, 13)
    ]
    return json.dumps({"updates": updates})


def _statistics() -> dict[str, Any]:
    def by_place(inside: float, outside: float) -> dict[str, Any]:
        return {
            "target_to_base": {"inside": inside, "outside": outside},
            "reference_to_base": {"inside": 2 * inside, "outside": 4 * outside},
        }

    return {
        "margin": {"target": 0.12, "reference": 0.2},
        "mask_cover": 0.31,
        "latent_distance": by_place(0.8, 0.1),
        "pixel_distance": by_place(0.2, 0.02),
        "psnr": by_place(12.0, 28.0),
        "ssim": by_place(0.4, 0.2),
    }


def _models(rows: Results, base_id: str, rounds: int, log_id: str) -> list[Model]:
    """The models of the rounds, each trained on the one before."""
    models: list[Model] = []
    for number in range(1, rounds + 1):
        parent_id = models[-1].id if models else base_id
        statistics = {
            "examples": 3,
            "updates": 12,
            "last_loss": 0.57,
            "last_grad_norm": 0.5,
            "log": f"/artifacts/{log_id}",
        }
        model = Model(
            id=new_id(IdKind.MODEL),
            base="tiny",
            parent_id=parent_id,
            job_id=rows.job_id,
            stage_id=rows.stage_id,
            round=number,
            statistics=statistics,
            created_at=now_seconds(),
        )
        models.append(model)
    return models


def _metrics(job_id: str, base_id: str, models: list[Model]) -> list[Metric]:
    """Rising scores of the training prompts and of the rollouts."""
    rows = []
    for number, model_id in enumerate([base_id, *(model.id for model in models)]):
        for split, mean in (("train", 0.3 + 0.04 * number), ("rollout", 0.28 + 0.05 * number)):
            if split == "rollout" and number == 0:
                continue
            row = Metric(
                job_id=job_id,
                round=number,
                split=split,
                scorer="brightness",
                model_id=model_id,
                version="1",
                count=12,
                mean=mean,
                std=0.1,
                created_at=now_seconds(),
            )
            rows.append(row)
    return rows


def _end(session: Any, job_id: str, stage_id: str, rounds: int) -> None:
    """Let the job and its first stage succeed; its other stages are removed from the queue."""
    ended = {"finished_at": now_seconds(), "started_at": now_seconds() - 90}
    session.execute(update(Stage).where(Stage.job_id == job_id).values(state=StageState.SUCCEEDED, attempt=1, **ended))
    values = {"state": JobState.SUCCEEDED, "last_round": rounds, "work_done": 1.0, **ended}
    session.execute(update(Job).where(Job.id == job_id).values(values))
    jobs.add_event(session, job_id, "stage.started", "sample of round 1 started", stage_id, attempt=1, worker="gpu-1")
    jobs.add_event(session, job_id, "stage.succeeded", "sample of round 1 succeeded", stage_id)
    jobs.add_event(session, job_id, "job.succeeded", "the job has succeeded")
