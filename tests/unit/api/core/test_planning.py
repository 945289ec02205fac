from api.core.planning import count, pairs_at_most, plan_round, plan_start, total_work
from api.core.specs import RoundSpec
from tests.service import round_body


def spec(**changes: object) -> RoundSpec:
    return RoundSpec.model_validate(round_body(**changes))


def needs(plan: list) -> list[tuple[str, list[str]]]:
    return [(f"{s.kind}{s.shard}", [f"{plan[n].kind}{plan[n].shard}" for n in s.needs]) for s in plan]


def test_a_round_waits_in_the_right_places() -> None:
    assert needs(plan_round(spec(), 1, 3, 0, 2)) == [
        ("sample0", []),
        ("sample1", []),
        ("score0", ["sample0", "sample1"]),
        ("select0", ["score0"]),
        ("fuse0", ["select0"]),
        ("fuse1", ["select0"]),
        ("verify0", ["select0", "fuse0", "fuse1"]),
        ("train0", ["verify0"]),
        ("evaluate0", ["train0"]),
    ]


def test_naive_dpo_has_no_fusion() -> None:
    plan = plan_round(spec(fusion=None), 1, 3, 0, 4)
    assert [s.kind for s in plan] == ["sample", "score", "select", "verify", "train", "evaluate"]
    assert count(spec(fusion=None), 3, 0).fused_at_most == 0


def test_shards_cover_all_prompts() -> None:
    plan = plan_round(spec(), 1, 5, 0, 2)
    assert [s.params["prompts"] for s in plan if s.kind == "sample"] == [[0, 2], [2, 4], [4, 5]]


def test_evaluations_are_where_they_are_wanted() -> None:
    seldom = spec(rounds=3, evaluation={"every_round": False, "scorers": ["brightness"]})
    assert [s.round for s in plan_start(seldom, 3, 0, 4) if s.kind == "evaluate"] == [0]
    assert [s.kind for s in plan_round(seldom, 2, 3, 0, 4)][-1] == "train"
    assert [s.kind for s in plan_round(seldom, 3, 3, 0, 4)][-1] == "evaluate"
    assert all(s.kind != "evaluate" for s in plan_start(spec(evaluation=None), 3, 0, 4))


def test_pairs_are_bounded_as_the_released_code_makes_them() -> None:
    # quarter x 2 uses against half: 16 samples give 4 x 2 and 8; 7 give 1 x 2 and 3; 2 give 1 x 2 and 1
    assert [pairs_at_most(spec(samples_per_prompt=n)) for n in (16, 7, 2)] == [8, 2, 1]


def test_the_work_of_a_job_is_that_of_its_stages() -> None:
    two = spec(rounds=2)
    stages = plan_start(two, 3, 5, 2) + plan_round(two, 2, 3, 5, 2)
    assert total_work(two, 3, 5, 2) == sum(s.work for s in stages)
    assert all(s.work > 0 for s in stages)
