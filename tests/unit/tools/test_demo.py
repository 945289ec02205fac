"""The demo's page, from responses of the service."""

from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO

import pytest
from PIL import Image
from rich.console import Console

from api.score_changes import HEADINGS, Change, changes, first_of_each_prompt, headline
from api.wire.samples import SampleOut
from dfusion.errors import InvalidInputError
from dfusion.evaluation import Estimate
from service.jobs.kinds import RoundSpec
from service.states import Split
from tests.service import round_body, work_until_idle
from tests.unit.api.conftest import Live
from tools.demo.__main__ import changes_table, request_of
from tools.demo.results import BeforeAfter, FusedPair, Picture, Results, as_json, gain, results_of
from tools.demo.sheets import GAP, MARGIN, before_after_sheet, contact_sheet

GREEN, RED = (30, 140, 60), (200, 50, 40)


def sample(prompt: int, seed: int, split: str = "held_out", number: int = 0, **scores: float) -> SampleOut:
    return SampleOut.model_validate(
        {
            "id": f"smp_{split}_{prompt}_{seed}",
            "job": "job_x",
            "round": 0,
            "role": "evaluation",
            "split": split,
            "prompt": f"prompt {prompt}",
            "prompt_index": prompt,
            "number": number,
            "seed": seed,
            "model": "mdl_x",
            "scores": [{"scorer": name, "version": "1", "value": value} for name, value in scores.items()],
            "image": "/artifacts/art_x",
            "trajectory": None,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
            "links": {"self": "/samples/smp_x"},
        }
    )


def change(difference: float, interval: tuple[float, float] | None, prompts: int = 40) -> Change:
    return Change(Split.HELD_OUT, "clip", prompts, 0.75, 0.75 + difference, Estimate(difference, interval, prompts))


def picture(colour: str, reward: float | None = None, accepted: bool | None = None) -> Picture:
    return Picture(Image.new("RGB", (128, 128), colour), reward, accepted)


def results(**other: object) -> Results:
    shown = BeforeAfter("a <b>red</b> star", picture("blue", 0.25, False), picture("lime", 0.5, True))
    fused = FusedPair(
        target_id="smp_t",
        prompt="a blue star",
        base=picture("navy", 0.125),
        reference=picture("white", 0.375),
        target=picture("yellow", 0.625),
        mask=picture("black"),
    )
    values = {
        "job": "job_x",
        "reward": "clip",
        "judge": "judge",
        "changes": (change(0.02, (0.01, 0.03)),),
        "shown": (shown,) * 3,
        "fused": (fused,) * 2,
        "pairs": 80,
        "adopted": 62,
    }
    return Results(**(values | other))  # type: ignore[arg-type]


def test_two_prompts_give_the_smaller_and_the_larger_change_as_interval() -> None:
    """Of the four resamples of two prompts one has twice the first and one twice the second: 25 % each, more than the
    2.5 % beyond either end of the interval, so its ends are the two prompts' own changes."""
    before = [sample(0, 10, clip=0.1), sample(1, 20, clip=0.9)]
    after = [sample(1, 20, clip=1.0), sample(0, 10, clip=0.4)]  # in another order
    (row,) = changes(before, after, "clip")
    assert (row.split, row.scorer, row.prompts) == ("held_out", "clip", 2)
    assert (row.before, row.after, row.difference.mean) == pytest.approx((0.5, 0.7, 0.2))
    assert row.difference.interval == pytest.approx((0.1, 0.3)) and row.excludes_zero
    assert row.cells == ("held-out", "clip", "0.5000", "0.7000", "+0.2000", "+0.1000 to +0.3000")


def test_differences_are_taken_image_by_image_and_averaged_by_prompt() -> None:
    """Prompts and seeds differ by far more than the change of 0.25, which is the same everywhere and so is certain."""
    before = [sample(p, 10 * p + s, number=s, clip=p + s / 2) for p in range(3) for s in range(2)]
    after = [sample(p, 10 * p + s, number=s, clip=p + s / 2 + 0.25) for p in range(3) for s in range(2)]
    (row,) = changes(before, after, "clip")
    assert row.prompts == 3 and row.difference.count == 6
    assert row.difference.interval == (0.25, 0.25)

    # two prompts whose images change by (0, 0.2) and (0.1, 0.3): 0.1 and 0.2 by prompt
    before = [sample(p, s, number=s, clip=0.5) for p in range(2) for s in range(2)]
    after = [sample(p, s, number=s, clip=0.5 + (2 * s + p) / 10) for p in range(2) for s in range(2)]
    (row,) = changes(before, after, "clip")
    assert row.difference.interval == pytest.approx((0.1, 0.2))


def test_held_out_prompts_and_the_reward_come_first() -> None:
    samples = [sample(p, p, split, judge=1.0, clip=0.5, art=0.0) for split in ("train", "held_out") for p in range(2)]
    assert [(row.split, row.scorer) for row in changes(samples, samples, "clip")] == [
        ("held_out", "clip"),
        ("held_out", "art"),
        ("held_out", "judge"),
        ("train", "clip"),
        ("train", "art"),
        ("train", "judge"),
    ]


@pytest.mark.parametrize("lost", [sample(1, 20, clip=1), sample(0, 11, clip=1), sample(0, 10, judge=1)])
def test_what_has_no_counterpart_is_refused(lost: SampleOut) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        changes([sample(0, 10, clip=0)], [lost], "clip")


@pytest.mark.parametrize(
    ("difference", "interval", "end"),
    [
        (0.02, (0.0001, 0.04), "the interval excludes zero, so the score rose."),
        (-0.02, (-0.04, -0.0001), "the interval excludes zero, so the score fell."),
        (0.02, (-0.0001, 0.04), "the interval includes zero, so this run does not show a change."),
        (0.0, (0.0, 0.0), "the interval includes zero, so this run does not show a change."),
        (0.02, (0.0, 0.04), "the interval includes zero, so this run does not show a change."),
        (0.02, None, "a single prompt has no interval, so this run does not show a change."),
    ],
)
def test_headline_claims_no_more_than_the_interval(
    difference: float, interval: tuple[float, float] | None, end: str
) -> None:
    sentence = headline(change(difference, interval))
    assert sentence.startswith(f"On 40 held-out prompts clip changed from 0.7500 to {0.75 + difference:.4f} (")
    assert f"({difference:+.4f}, 95 % interval " in sentence
    assert sentence.endswith(f"): {end}")


def test_prompts_are_shown_in_the_lists_order_whatever_their_scores() -> None:
    """Each with its first seed, before and after, though pages mix shards and splits."""
    before = [
        sample(2, 30, clip=0.9),
        sample(0, 11, number=1, clip=0.9),
        sample(0, 10, clip=0.1),
        sample(0, 10, "train", clip=0.9),
        sample(1, 20, clip=0.2),
    ]
    after = [shown.model_copy(update={"id": f"{shown.id}_after"}) for shown in reversed(before)]
    chosen = first_of_each_prompt(before, after, "held_out", 2)
    assert [(old.id, new.id) for old, new in chosen] == [
        ("smp_held_out_0_10", "smp_held_out_0_10_after"),
        ("smp_held_out_1_20", "smp_held_out_1_20_after"),
    ]


def test_captions_give_verdict_and_reward() -> None:
    pictures = [picture("red", 0.5, True), picture("red", 0.25, False), picture("red", 0.125), picture("red")]
    assert [shown.caption for shown in pictures] == ["accepted, 0.500", "rejected, 0.250", "0.125", ""]


def places_of(sheet: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """The left upper corners of the 128 x 128 squares of that colour, from top to bottom."""
    column = range(MARGIN, sheet.width, 128 + GAP)
    starts = [(x, y) for y in range(1, sheet.height) for x in column if sheet.getpixel((x, y)) == colour]
    return [(x, y) for x, y in starts if sheet.getpixel((x, y - 1)) != colour]


def test_before_after_sheet_has_two_prompts_in_a_row() -> None:
    sheet = before_after_sheet(results())
    before, after = places_of(sheet, (0, 0, 255)), places_of(sheet, (0, 255, 0))
    first, second = sorted({y for _, y in before})
    assert before == [(MARGIN, first), (MARGIN + 288, first), (MARGIN, second)]
    assert after == [(x + 144, y) for x, y in before]

    # the judge's verdict frames them
    x, y = before[0]
    assert sheet.getpixel((x - 2, y + 64)) == RED and sheet.getpixel((x + 144 + 129, y + 64)) == GREEN


def test_contact_sheet_leads_with_the_result_and_ends_with_fused_pairs() -> None:
    short, sheet = before_after_sheet(results()), contact_sheet(results())
    assert sheet.crop((0, 0, *short.size)).tobytes() == short.tobytes()
    colours = [(0, 0, 128), (255, 255, 255), (255, 255, 0), (0, 0, 0)]
    targets = places_of(sheet, colours[2])
    assert len(targets) == 2 and all(y > short.height for _, y in targets)
    for x, y in targets:
        centres = [sheet.getpixel((MARGIN + column * 144 + 64, y + 64)) for column in range(4)]
        assert x == MARGIN + 2 * 144 and centres == colours


def test_a_run_without_adopted_pairs_has_sheets_all_the_same() -> None:
    bare = results(fused=(), shown=(), judge=None)
    assert contact_sheet(bare).width == before_after_sheet(bare).width


def test_the_table_is_whole_in_80_columns() -> None:
    rows = (change(-0.02, (-0.1234, 0.0005)), Change(Split.TRAIN, "shapes-judge", 40, 1, 1, Estimate(0, None, 40)))
    console = Console(width=80, record=True, file=StringIO())
    console.print(changes_table(results(changes=rows)))
    text = console.export_text()
    assert all(heading in text for heading in HEADINGS)
    assert all(cell in text for row in rows for cell in row.cells)


def test_the_demo_asks_for_a_valid_round() -> None:
    spec = RoundSpec.model_validate(request_of(Namespace(template="position", rounds=2, seed=3)))
    assert (spec.prompt_set, spec.held_out_prompt_set) == ("shapes-position-train", "shapes-position-test")
    assert spec.evaluation is not None and not spec.evaluation.every_round


def score_of(measured: SampleOut, scorer: str) -> float:
    (value,) = [score.value for score in measured.scores if score.scorer == scorer]
    return value


@pytest.mark.slow
def test_results_of_a_job(live: Live) -> None:
    every_target = {"adoption_threshold": 0, "max_mask_cover": 1}  # the tiny model's masks cover the whole image
    with live.client() as client:
        measured = {"samples_per_prompt": 1, "scorers": ["constant", "brightness"]}
        started = client.start_round(round_body(pairing=every_target, watch="constant", evaluation=measured))
        work_until_idle(live.service)
        job = client.job(started.id)
        adopted = list(client.pairs(job=job.id, adopted=True))
        old, new = (list(client.samples(job=job.id, role="evaluation", round=number)) for number in (0, 1))
        metrics = client.metrics(job.id).data
        results_ = results_of(client, job, 2, 2)

    means = {m.round: m.mean for m in metrics if (m.split, m.scorer) == ("train", "brightness")}
    rewards = [[score_of(row_, "brightness") for row_ in samples] for samples in (old, new)]
    differences = [after - before for before, after in zip(*rewards, strict=True)]

    assert (results_.job, results_.reward, results_.judge, results_.pairs) == (
        job.id,
        "brightness",
        "constant",
        job.outputs["pairs"],
    )
    row, judged = results_.changes
    assert (row.split, row.scorer, row.prompts) == ("train", "brightness", 3)
    assert (row.before, row.after) == pytest.approx((means[0], means[1]))
    # a resample of three prompts is three times the same one in 1 of 27 cases: more than 2.5 %
    assert row.difference.interval == pytest.approx((min(differences), max(differences)))
    assert judged.cells[1:] == ("constant", "0.5000", "0.5000", "+0.0000", "+0.0000 to +0.0000")

    assert [row_.prompt for row_ in results_.shown] == [row_.prompt for row_ in old[:2]]
    assert [[row_.before.reward, row_.after.reward] for row_ in results_.shown] == [
        list(two) for two in zip(*rewards, strict=True)
    ][:2]
    assert {row_.after.accepted for row_ in results_.shown} == {True}

    gains = sorted(map(gain, adopted), reverse=True)
    assert [(row_.target.reward or 0) - (row_.base.reward or 0) for row_ in results_.fused] == gains[:2] != []
    assert results_.adopted == len(adopted)
    assert all(row_.mask.image.size == (128, 128) and row_.mask.reward is None for row_ in results_.fused)
    assert contact_sheet(results_).height > before_after_sheet(results_).height


def test_the_numbers_are_written_as_json() -> None:
    """Rounded; a change without an interval has null."""
    shown = replace(results(), changes=(change(0.0312345678, (0.01, 0.05)), change(0.02, None)))
    numbers = as_json(shown, seed=3, seconds=12.34)
    assert (numbers["seed"], numbers["seconds"]) == (3, 12.3)
    assert numbers["changes"][0] == {
        "split": "held_out",
        "scorer": "clip",
        "prompts": 40,
        "before": 0.75,
        "after": 0.781235,
        "difference": 0.031235,
        "interval": [0.01, 0.05],
    }
    assert numbers["changes"][1]["interval"] is None
