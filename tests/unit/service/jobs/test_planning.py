from typing import Any

import pytest

from service.jobs.kinds import (
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    PreviewJobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from service.jobs.kinds.work import pairs_at_most
from service.jobs.planning import count, plan_round, plan_start, rounds_of, total_work, totals
from service.plan import PromptsToMeasure, Sizes, StageTotals
from service.states import StageKind
from tests.service import round_body


def spec(**changes: object) -> RoundSpec:
    return RoundSpec.model_validate(round_body(**changes))


def sizes(prompts: int, held_out: int = 0, shard_prompts: int = 4, **more: Any) -> Sizes:
    measured = [PromptsToMeasure("train", "set_1", prompts), PromptsToMeasure("held_out", "set_2", held_out)]
    not_empty = tuple(prompt_set for prompt_set in measured if prompt_set.prompts)
    return Sizes(shard_prompts, prompts, measured=not_empty, **more)


def needs(plan: list) -> list[tuple[str, list[str]]]:
    """The stages of a plan with their dependencies, by kind and shard."""
    names = [f"{stage.kind}{stage.shard}" for stage in plan]
    return [(name, [names[n] for n in stage.needs]) for name, stage in zip(names, plan, strict=True)]


def test_the_stages_of_a_round_have_their_dependencies() -> None:
    plan = plan_round(spec(), 1, sizes(3, 2, shard_prompts=2))

    assert needs(plan) == [
        ("sample0", []),
        ("sample1", []),
        ("score0", ["sample0", "sample1"]),
        ("select0", ["score0"]),
        ("fuse0", ["select0"]),
        ("fuse1", ["select0"]),
        ("verify0", ["fuse0", "fuse1"]),
        ("train0", ["verify0"]),
        ("evaluate0", ["train0"]),
        ("evaluate1", ["train0"]),
        ("compare0", ["evaluate0", "evaluate1"]),
    ]


def test_scoring_and_verifying_are_sharded_by_512_images() -> None:
    # 512 images are 128 prompts of 4 samples, and 256 prompts of 2 pairs; sampling shards have 48 prompts
    plan = plan_round(spec(evaluation=None), 1, sizes(300, shard_prompts=48))
    stages = dict(needs(plan))
    assert [s.params["prompts"] for s in plan if s.kind == "score"] == [[0, 128], [128, 256], [256, 300]]
    assert [s.params["prompts"] for s in plan if s.kind == "verify"] == [[0, 256], [256, 300]]

    # each waits for the shards of its own prompts
    assert stages["score0"] == ["sample0", "sample1", "sample2"]
    assert stages["score1"] == ["sample2", "sample3", "sample4", "sample5"]
    assert stages["score2"] == ["sample5", "sample6"]
    assert stages["verify1"] == ["fuse5", "fuse6"]
    assert (stages["select0"], stages["train0"]) == (["score0", "score1", "score2"], ["verify0", "verify1"])


def test_a_review_comes_between_verifying_and_training() -> None:
    plan = plan_round(spec(review=True, evaluation=None), 1, sizes(3))
    assert needs(plan)[-3:] == [("verify0", ["fuse0"]), ("review0", ["verify0"]), ("train0", ["review0"])]


def test_no_stage_depends_on_the_first_evaluation() -> None:
    plan = needs(plan_start(spec(), sizes(3)))
    assert plan[:3] == [("evaluate0", []), ("compare0", ["evaluate0"]), ("sample0", [])]


def test_naive_dpo_has_no_fusion() -> None:
    plan = plan_round(spec(fusion=None), 1, sizes(3))
    assert [s.kind for s in plan] == ["sample", "score", "select", "verify", "train", "evaluate", "compare"]
    assert count(spec(fusion=None), sizes(3)).fused_at_most == 0


def test_shards_cover_all_prompts() -> None:
    plan = plan_round(spec(), 1, sizes(5, shard_prompts=2))
    assert [s.params["prompts"] for s in plan if s.kind == "sample"] == [[0, 2], [2, 4], [4, 5]]


def test_models_are_evaluated_in_the_requested_rounds() -> None:
    first_and_last = spec(rounds=3, evaluation={"every_round": False, "scorers": ["brightness"]})
    assert [s.round for s in plan_start(first_and_last, sizes(3)) if s.kind == "evaluate"] == [0]
    assert plan_round(first_and_last, 2, sizes(3))[-1].kind == "train"
    assert plan_round(first_and_last, 3, sizes(3))[-1].kind == "compare"
    assert all(s.kind != "evaluate" for s in plan_start(spec(evaluation=None), sizes(3)))


def test_the_bound_on_pairs_follows_the_released_code() -> None:
    # quarter x 2 uses against half: 16 samples give 4 x 2 and 8; 7 give 1 x 2 and 3; 2 give 1 x 2 and 1
    assert [pairs_at_most(spec().pairing, n) for n in (16, 7, 2)] == [8, 2, 1]


MEASURED = (PromptsToMeasure("x", "set_1", 70), PromptsToMeasure("y", "set_2", 3))


@pytest.mark.parametrize(
    ("job", "size"),
    [
        (spec(rounds=2), sizes(3, 5, 2)),
        (spec(rounds=3, review=True), sizes(130, 5)),
        (spec(rounds=3, fusion=None, evaluation=None), sizes(9)),
        (spec(rounds=4, evaluation={"every_round": False, "samples_per_prompt": 2}), sizes(70, 3, 1)),
        (spec(fusion=None, training={"algorithm": "ddpo"}), sizes(5, 1)),
        (SamplingJobSpec(model="tiny", prompt_set="x"), sizes(9)),
        (SamplingJobSpec(model="tiny", prompt_set="x"), sizes(300)),
        (FusionJobSpec(sampling="job_x"), sizes(9, samples_per_prompt=4)),
        (FusionJobSpec(sampling="job_x"), sizes(700, samples_per_prompt=4)),
        (FusionJobSpec(pairs=[{"reference": "a", "base": "b"}]), Sizes(2, pairs=600)),
        (FusionJobSpec(pairs=[{"reference": "a", "base": "b"}]), Sizes(2, pairs=17)),
        (TrainingJobSpec(jobs=("job_x",)), Sizes(2, pairs=17)),
        (EvaluationJobSpec(models=("a", "b"), prompt_sets=("x", "y")), Sizes(4, models=("a", "b"), measured=MEASURED)),
        (ExportJobSpec(model="mdl_x", format="kohya"), Sizes(4)),
        (PreviewJobSpec(pair="pair_x"), Sizes(4)),
    ],
)
def test_totals_are_those_of_all_planned_stages(job: Any, size: Sizes) -> None:
    stages = plan_start(job, size)
    for number in range(2, rounds_of(job) + 1):
        stages += plan_round(job, number, size)
    assert all(stage.work > 0 for stage in stages)

    by_kind = {kind: [stage.work for stage in stages if stage.kind == kind] for kind in {s.kind for s in stages}}
    assert totals(job, size) == {kind: StageTotals(len(work), sum(work)) for kind, work in by_kind.items()}
    assert total_work(job, size) == sum(stage.work for stage in stages)


def test_the_totals_of_a_thousand_rounds_are_computed_without_planning_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.kinds.rounds.PlannedStage", None)
    # 10,000 prompts in shards of 4, sampled and fused; evaluations in shards of 64 prompts, one before the first round
    many = totals(spec(rounds=1000), sizes(10_000))
    assert (many[StageKind.SAMPLE].count, many[StageKind.FUSE].count) == (2_500_000, 2_500_000)
    assert (many[StageKind.EVALUATE].count, many[StageKind.COMPARE].count) == (157 * 1001, 1001)


def test_ddpo_without_fusion_trains_on_every_sample() -> None:
    # 3 prompts x 4 samples x 4 steps x 2 for guidance, forward once for p_old and once an inner epoch
    naive = spec(fusion=None, training={"algorithm": "ddpo", "inner_epochs": 1})
    assert count(naive, sizes(3)).training_at_most == 3 * 4 * 4 * 2 * 2


def test_a_sampling_job_scores_the_samples_of_all_shards() -> None:
    sampling = SamplingJobSpec(model="tiny", prompt_set="x", samples_per_prompt=2)
    plan = plan_start(sampling, sizes(5))
    assert needs(plan) == [
        ("sample0", []),
        ("sample1", []),
        ("score0", ["sample0", "sample1"]),
        ("compare0", ["score0"]),
    ]
    assert count(sampling, sizes(5)).sampling == 5 * 2 * 20 * 2


def test_a_fusion_of_pairs_is_sharded_by_pairs() -> None:
    fusion = FusionJobSpec(pair="pair_x", fusion={"first_step": 2, "last_step": 19})
    plan = plan_start(fusion, Sizes(1, pairs=5))
    assert [s.params["pairs"] for s in plan if s.kind == "fuse"] == [[0, 4], [4, 5]]
    assert [s.kind for s in plan] == ["score", "select", "fuse", "fuse", "verify"]

    # 18 fused steps of reference and target, with guidance
    assert count(fusion, Sizes(1, pairs=5)).fusion_at_most == 5 * 18 * 2 * 2
    inverted = FusionJobSpec(pair="pair_x", fusion={"trajectory": "ddim_inversion"})
    assert count(inverted, Sizes(1, pairs=1)).fusion_at_most == (18 * 2 + 2 * 20) * 2


def test_an_evaluation_is_sharded_by_model_and_prompts() -> None:
    evaluation = EvaluationJobSpec(models=("a", "b"), prompt_sets=("x",), samples_per_prompt=64)
    measured = (PromptsToMeasure("x", "set_1", 3),)
    plan = plan_start(evaluation, Sizes(2, models=("mdl_a", "mdl_b"), measured=measured))
    assert [(s.params["model"], s.params["prompts"]) for s in plan[:-1]] == [
        ("mdl_a", [0, 2]),
        ("mdl_a", [2, 3]),
        ("mdl_b", [0, 2]),
        ("mdl_b", [2, 3]),
    ]
    assert plan[-1].kind == "compare" and plan[-1].needs == (0, 1, 2, 3)


def test_training_and_export_jobs_have_one_stage() -> None:
    assert [s.kind for s in plan_start(TrainingJobSpec(jobs=("job_x",)), Sizes(4, pairs=2))] == ["train"]
    assert [s.kind for s in plan_start(ExportJobSpec(model="m", format="kohya"), Sizes(4))] == ["export"]
