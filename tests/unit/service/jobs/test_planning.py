from typing import Any

from service.jobs.kinds import (
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from service.jobs.kinds.work import pairs_at_most
from service.jobs.planning import count, plan_round, plan_start, total_work
from service.plan import PromptsToMeasure, Sizes
from tests.service import round_body


def spec(**changes: object) -> RoundSpec:
    return RoundSpec.model_validate(round_body(**changes))


def sizes(prompts: int, held_out: int = 0, shard_prompts: int = 4, **more: Any) -> Sizes:
    measured = [PromptsToMeasure("train", "set_1", prompts), PromptsToMeasure("held_out", "set_2", held_out)]
    return Sizes(shard_prompts, prompts, measured=tuple(one for one in measured if one.prompts), **more)


def needs(plan: list) -> list[tuple[str, list[str]]]:
    return [(f"{s.kind}{s.shard}", [f"{plan[n].kind}{plan[n].shard}" for n in s.needs]) for s in plan]


def test_a_round_waits_in_the_right_places() -> None:
    assert needs(plan_round(spec(), 1, sizes(3, 2, shard_prompts=2))) == [
        ("sample0", []),
        ("sample1", []),
        ("score0", ["sample0", "sample1"]),
        ("select0", ["score0"]),
        ("fuse0", ["select0"]),
        ("fuse1", ["select0"]),
        ("verify0", ["select0", "fuse0", "fuse1"]),
        ("train0", ["verify0"]),
        ("evaluate0", ["train0"]),
        ("evaluate1", ["train0"]),
        ("compare0", ["evaluate0", "evaluate1"]),
    ]


def test_a_review_comes_between_verifying_and_training() -> None:
    plan = plan_round(spec(review=True, evaluation=None), 1, sizes(3))
    assert needs(plan)[-3:] == [("verify0", ["select0", "fuse0"]), ("review0", ["verify0"]), ("train0", ["review0"])]


def test_measuring_the_first_model_keeps_nothing_waiting() -> None:
    plan = needs(plan_start(spec(), sizes(3)))
    assert plan[:3] == [("evaluate0", []), ("compare0", ["evaluate0"]), ("sample0", [])]


def test_naive_dpo_has_no_fusion() -> None:
    plan = plan_round(spec(fusion=None), 1, sizes(3))
    assert [s.kind for s in plan] == ["sample", "score", "select", "verify", "train", "evaluate", "compare"]
    assert count(spec(fusion=None), sizes(3)).fused_at_most == 0


def test_shards_cover_all_prompts() -> None:
    plan = plan_round(spec(), 1, sizes(5, shard_prompts=2))
    assert [s.params["prompts"] for s in plan if s.kind == "sample"] == [[0, 2], [2, 4], [4, 5]]


def test_evaluations_are_where_they_are_wanted() -> None:
    seldom = spec(rounds=3, evaluation={"every_round": False, "scorers": ["brightness"]})
    assert [s.round for s in plan_start(seldom, sizes(3)) if s.kind == "evaluate"] == [0]
    assert plan_round(seldom, 2, sizes(3))[-1].kind == "train"
    assert plan_round(seldom, 3, sizes(3))[-1].kind == "compare"
    assert all(s.kind != "evaluate" for s in plan_start(spec(evaluation=None), sizes(3)))


def test_pairs_are_bounded_as_the_released_code_makes_them() -> None:
    # quarter x 2 uses against half: 16 samples give 4 x 2 and 8; 7 give 1 x 2 and 3; 2 give 1 x 2 and 1
    assert [pairs_at_most(spec().pairing, n) for n in (16, 7, 2)] == [8, 2, 1]


def test_the_work_of_a_job_is_that_of_its_stages() -> None:
    two, size = spec(rounds=2), sizes(3, 5, 2)
    stages = plan_start(two, size) + plan_round(two, 2, size)
    assert total_work(two, size) == sum(s.work for s in stages)
    assert all(s.work > 0 for s in stages)


def test_ddpo_without_fusion_trains_on_every_sample() -> None:
    # 3 prompts x 4 samples x 4 steps x 2 for guidance, forward once for p_old and once an inner epoch
    naive = spec(fusion=None, training={"algorithm": "ddpo", "inner_epochs": 1})
    assert count(naive, sizes(3)).training_at_most == 3 * 4 * 4 * 2 * 2


def test_a_sampling_scores_what_its_shards_made() -> None:
    asked = SamplingJobSpec(model="tiny", prompt_set="x", samples_per_prompt=2)
    assert needs(plan_start(asked, sizes(5))) == [("sample0", []), ("sample1", []), ("score0", ["sample0", "sample1"])]
    assert count(asked, sizes(5)).sampling == 5 * 2 * 20 * 2


def test_a_fusion_of_pairs_is_sharded_by_pairs() -> None:
    asked = FusionJobSpec(pair="pair_x", fusion={"first_step": 2, "last_step": 19})
    plan = plan_start(asked, Sizes(1, pairs=5))
    assert [s.params["pairs"] for s in plan if s.kind == "fuse"] == [[0, 4], [4, 5]]
    assert [s.kind for s in plan] == ["score", "select", "fuse", "fuse", "verify"]
    # 18 fused steps of reference and target, with guidance
    assert count(asked, Sizes(1, pairs=5)).fusion_at_most == 5 * 18 * 2 * 2
    inverted = FusionJobSpec(pair="pair_x", fusion={"trajectory": "ddim_inversion"})
    assert count(inverted, Sizes(1, pairs=1)).fusion_at_most == (18 * 2 + 2 * 20) * 2


def test_an_evaluation_is_sharded_by_model_and_prompts() -> None:
    asked = EvaluationJobSpec(models=("a", "b"), prompt_sets=("x",), samples_per_prompt=64)
    measured = (PromptsToMeasure("x", "set_1", 3),)
    plan = plan_start(asked, Sizes(2, models=("mdl_a", "mdl_b"), measured=measured))
    assert [(s.params["model"], s.params["prompts"]) for s in plan[:-1]] == [
        ("mdl_a", [0, 2]),
        ("mdl_a", [2, 3]),
        ("mdl_b", [0, 2]),
        ("mdl_b", [2, 3]),
    ]
    assert plan[-1].kind == "compare" and plan[-1].needs == (0, 1, 2, 3)


def test_trainings_and_exports_are_one_stage() -> None:
    assert [s.kind for s in plan_start(TrainingJobSpec(jobs=("job_x",)), Sizes(4, pairs=2))] == ["train"]
    assert [s.kind for s in plan_start(ExportJobSpec(model="m", format="kohya"), Sizes(4))] == ["export"]
