"""The report's numbers, derived by hand from records of two seeds and two prompts."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from api.experiments import RecordError, report
from api.experiments.analysis import Difference, Mean
from api.experiments.records import folder_of, write_record
from api.experiments.reporting import Report, as_json, change_table
from dfusion.evaluation import Bootstrap
from tests.unit.api.experiments.examples import cells_by_name, experiment, record, write_records

MEANS = {
    "shapes/base": {0: [0.2, 0.6]},
    "shapes/naive/seed 1": {1: [0.2, 0.6], 2: [0.4, 0.6]},
    "shapes/naive/seed 2": {1: [0.2, 0.6], 2: [0.2, 0.8]},
    "shapes/fused/seed 1": {1: [0.4, 0.6], 2: [0.6, 0.8]},
    "shapes/fused/seed 2": {1: [0.2, 0.6], 2: [0.4, 0.8]},
}


@pytest.fixture
def reported(tmp_path: Path) -> Report:
    trial = experiment()
    write_records(trial, tmp_path, MEANS)
    return report(trial, tmp_path, plots=False)


def mean_of(result: Report, arm: str, number: int) -> Mean:
    [scores] = result.scores
    return next(mean for mean in scores.means if (mean.arm, mean.round) == (arm, number))


def difference_of(result: Report, arm: str, against: str) -> Difference:
    [scores] = result.scores
    arms = (arm, against)
    return next(difference for difference in scores.differences if (difference.arm, difference.against) == arms)


def all_resamples(values: list[list[float]]) -> tuple[float, float]:
    """Compute the 2.5 % and 97.5 % quantiles of the mean over all resamples of two rows and two columns."""
    array = np.array(values)
    means = np.sort([array[np.ix_(rows, columns)].mean() for rows in pairs() for columns in pairs()])
    return float(means[0]), float(means[-1])  # minimum and maximum of 16, each with at least 6.25 %


def pairs() -> list[tuple[int, int]]:
    return list(product((0, 1), repeat=2))


def test_means_equal_hand_computed_ones(reported: Report) -> None:
    base = mean_of(reported, "base", 0)
    naive = mean_of(reported, "naive", 2)
    fused = mean_of(reported, "fused", 2)
    assert (base.mean, base.seeds, base.prompts, base.images) == (pytest.approx(0.4), 1, 2, 0)
    assert (naive.mean, naive.seeds, naive.images) == (pytest.approx(0.5), 2, 200)  # (0.4 + 0.6 + 0.2 + 0.8) / 4
    assert fused.mean == pytest.approx(0.65)
    assert base.interval == pytest.approx((0.2, 0.6)) and base.change is None
    assert naive.interval == pytest.approx(all_resamples([[0.4, 0.6], [0.2, 0.8]]))
    assert naive.records == ("shapes--naive--seed1.json", "shapes--naive--seed2.json")


def test_differences_are_paired_by_seed_and_prompt(reported: Report) -> None:
    fused = difference_of(reported, "fused", "base")
    assert fused.mean == pytest.approx(0.25)  # 0.4, 0.2; 0.2, 0.2
    assert fused.interval == pytest.approx(all_resamples([[0.4, 0.2], [0.2, 0.2]]))
    assert (fused.better, fused.worse, fused.equal, fused.chance) == (2, 0, 0, 0.5)
    assert mean_of(reported, "fused", 2).change == pytest.approx(0.25)
    assert mean_of(reported, "fused", 1).change == pytest.approx(0.05)

    naive = difference_of(reported, "fused", "naive")
    assert naive.mean == pytest.approx(0.15)  # 0.2, 0.2; 0.2, 0.0
    assert naive.interval == pytest.approx(all_resamples([[0.2, 0.2], [0.2, 0.0]]))
    assert len(reported.scores[0].differences) == 3


def test_seeds_of_only_one_arm_are_not_paired(tmp_path: Path) -> None:
    trial = experiment()
    write_records(trial, tmp_path, {name: MEANS[name] for name in MEANS if name != "shapes/naive/seed 2"})
    result = report(trial, tmp_path, plots=False)
    assert [cell.name for cell in result.missing] == ["shapes/naive/seed 2"]
    assert difference_of(result, "fused", "naive").seeds == 1
    assert difference_of(result, "fused", "naive").mean == pytest.approx(0.2)
    assert difference_of(result, "fused", "base").seeds == 2
    assert "**Missing:** shapes/naive/seed 2." in result.files[1].read_text("utf-8")


def test_statistics_of_pairs_and_updates_equal_hand_computed_ones(reported: Report) -> None:
    fused = next(facts for facts in reported.arms if facts.arm == "fused")
    # two seeds of: round 1 with two targets, two adopted; round 2 with four targets, one adopted
    assert (fused.seeds, fused.rounds, fused.pairs, fused.targets, fused.adopted) == (2, 4, 16, 12, 6)
    assert fused.adopted_share == 0.5
    assert fused.pair_means["mask_cover"] == pytest.approx((2 * 0.1 + 4 * 0.2) / 6)
    assert fused.update_means["loss"] == pytest.approx((0.75 + 0.5 + 0.75 + 0.25) / 4)
    assert fused.last_update_means["loss"] == pytest.approx((0.5 + 0.25) / 2)
    assert fused.seconds == 60
    second = next(facts for facts in reported.arms_by_round if (facts.arm, facts.round) == ("fused", 2))
    assert (second.targets, second.adopted, second.adopted_share, second.seconds) == (8, 2, 0.25, None)


def test_rollouts_are_reported_by_round_and_images_used_before(reported: Report) -> None:
    rounds = [arm for arm in reported.arms_by_round if arm.arm == "fused"]
    assert [arm.images_before for arm in rounds] == [0, 100]  # 100 images a round; the diversity counts two prompts
    assert [arm.rollout_means["judge"] for arm in rounds] == pytest.approx([0.6, 0.7])
    page = reported.files[1].read_text("utf-8")
    assert "| list | arm | round | images used before | seeds | diversity | judge |" in page
    assert "| shapes | fused | 2 | 100 | 2 | 0.25 | 0.7 |" in page


def test_change_table_has_a_column_per_list(reported: Report) -> None:
    lines = list(change_table(reported, "held_out", "judge"))
    assert lines[0] == "|  | shapes |"
    assert [line.split(" [")[0].rstrip("|").rstrip() for line in lines[2:6]] == [
        "| base, score | 0.4",
        "| naive - base | +0.1000",  # +0.2, +0.0; +0.0, +0.2
        "| fused - base | **+0.2500",
        "| fused - naive | +0.1500",  # from 0: a resample of prompt 2 and seed 2 alone is 0
    ]


def test_page_and_json_have_the_same_numbers(reported: Report) -> None:
    page = reported.files[1].read_text("utf-8")
    assert "## judge on held-out prompts (primary)" in page
    assert "| fused | 0.6500 [0.4000, 0.8000] |" in page
    assert "| shapes | fused | base | **+0.2500 [+0.2000, +0.4000]** | 2 | 2 / 0 / 0 | 0.500 |" in page
    assert "[shapes--fused--seed2.json](shapes--fused--seed2.json)" in page
    content = json.loads(reported.files[0].read_text("utf-8"))
    assert content == json.loads(json.dumps(as_json(reported)))
    assert content["records"]["shapes--base.json"]["key"] == cells_by_name(experiment())["shapes/base"].settings.key
    means = [mean for scores in content["scores"] for mean in scores["means"]]
    files = {file for mean in means for file in mean["records"]}
    assert files == set(content["records"]) == {cell.file_name for cell in cells_by_name(experiment()).values()}


@pytest.mark.slow
def test_equal_records_give_equal_files(reported: Report, tmp_path: Path) -> None:
    first = {file.name: file.read_bytes() for file in report(reported.experiment, tmp_path).files}
    second = {file.name: file.read_bytes() for file in report(reported.experiment, tmp_path).files}
    assert first == second
    assert {"figure-6--held_out--judge.png", "figure-7--held_out--judge.png"} <= first.keys()
    assert all(first[name][:4] == b"\x89PNG" for name in first if name.endswith(".png"))
    assert "![figure-6: judge on held-out prompts](figure-6--held_out--judge.png)" in first["report.md"].decode()


def test_plots_show_the_numbers(reported: Report) -> None:
    from api.experiments.plots import changes_by_arm, score_against_images

    scores = reported.of("held_out", "judge")
    [curves] = score_against_images(reported.experiment, scores, "judge", "95% interval").axes
    lines = {str(line.get_label()): line for line in curves.lines}
    assert list(lines["fused"].get_xdata()) == [0, 100, 200]
    assert list(lines["fused"].get_ydata()) == pytest.approx([0.4, 0.45, 0.65])
    bars = changes_by_arm(reported.experiment, scores, "judge", "95% interval")
    assert bars is not None
    [panel] = bars.axes
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([0.1, 0.25])  # type: ignore[attr-defined]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["naive", "fused"]


def test_the_file_chooses_which_arms_are_compared(tmp_path: Path) -> None:
    """Besides each arm with the model before training; the first of a pair is the one whose gain is shown."""
    write_records(experiment(), tmp_path, MEANS)

    def compared(comparisons: list[list[str]] | None) -> list[tuple[str, str, float]]:
        evaluation = {"splits": ["held_out"], "rounds": "last", "comparisons": comparisons}
        [scores] = report(experiment(evaluation=evaluation), tmp_path, plots=False).scores
        return [(each.arm, each.against, pytest.approx(each.mean)) for each in scores.differences]

    with_base = [("naive", "base", 0.1), ("fused", "base", 0.25)]
    assert compared([]) == with_base
    assert compared([["naive", "fused"]]) == [*with_base, ("naive", "fused", -0.15)]
    assert compared(None) == [*with_base, ("fused", "naive", 0.15)]


@pytest.mark.slow
def test_report_without_base_model_has_no_changes(tmp_path: Path) -> None:
    trial = experiment(evaluation={"splits": ["held_out"], "rounds": "last", "include_base": False})
    write_records(trial, tmp_path, {name: MEANS[name] for name in MEANS if "base" not in name})
    result = report(trial, tmp_path)
    assert mean_of(result, "fused", 2).change is None
    assert [(difference.arm, difference.against) for difference in result.scores[0].differences] == [("fused", "naive")]
    assert "figure-7--held_out--judge.png" not in {file.name for file in result.files}


def test_records_that_do_not_compare_are_rejected(tmp_path: Path) -> None:
    trial = experiment()
    with pytest.raises(RecordError, match="has no record"):
        report(trial, tmp_path, plots=False)
    write_records(trial, tmp_path, MEANS)
    cell = cells_by_name(trial)["shapes/naive/seed 2"]
    newer = record(trial, cell, MEANS[cell.name], version="2")
    write_record(folder_of(tmp_path, trial.name), cell, newer)
    with pytest.raises(RecordError, match=r"one version of judge, got 1 \(shapes--base\.json\) and 2 \(shapes--naive"):
        report(trial, tmp_path, plots=False)
    other = newer.model_copy(update={"prompts": {"held_out": ("a star", "a moon")}, "scores": newer.scores})
    same_version = record(trial, cell, MEANS[cell.name]).model_copy(update={"prompts": other.prompts})
    write_record(folder_of(tmp_path, trial.name), cell, same_version)
    with pytest.raises(RecordError, match="equal held_out prompts in shapes--base"):
        report(trial, tmp_path, plots=False)
    unknown = experiment(evaluation={"splits": ["held_out"], "rounds": "last", "primary": "taste"})
    write_records(trial, tmp_path, MEANS)
    with pytest.raises(RecordError, match=r"evaluation\.primary: expected one of judge, got taste"):
        report(unknown, tmp_path, plots=False)


def test_report_uses_the_given_bootstrap(tmp_path: Path) -> None:
    write_records(experiment(), tmp_path, MEANS)
    result = report(experiment(), tmp_path, plots=False, bootstrap=Bootstrap(0.5, 1000, 3))
    interval = mean_of(result, "fused", 2).interval
    assert interval is not None and 0.4 < interval[0] < interval[1] < 0.8
    assert "Intervals: 50%" in result.files[1].read_text("utf-8")
