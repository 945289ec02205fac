"""The denoising steps of a pair, and the form and the comparison of its other fusions."""

import html
import re
from typing import Any

from sqlalchemy import select, update

from api.pages.pair_tools import differences, fusion_fields
from api.pages.reproduction import Reproduction
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Pair, Preview, Sample
from tests.drawn_results import DrawnRun, draw_run
from tests.statements import statements
from tests.unit.api.pages.conftest import Site

SETTINGS: dict[str, Any] = {"thresholds": [0.02], "merge": "xor", "first_step": 1, "last_step": 3}
"""The masks of the first pair of a drawn run."""


def add_previews(site: Site, run: DrawnRun, settings: dict[str, Any]) -> None:
    """Insert previews of the first pair of a run, as another job makes them. Its images are those of the samples."""
    maker = draw_run(site.service, pairs=1, rounds=1)
    with site.service.uow.writing() as session:
        pair = session.scalars(select(Pair).where(Pair.id == run.pairs[0])).one()
        rows = []
        for sample_id in (pair.base_id, pair.target_id or "", pair.reference_id):
            image_id = results.get_sample(session, sample_id).image_artifact_id
            is_reference = sample_id == pair.reference_id
            row = Preview(
                sample_id=sample_id,
                job_id=maker.job_id,
                num_steps=4,
                steps=[0, 2, 4],
                strip_artifact_id=image_id,
                mask_artifact_id=pair.mask_artifact_id if is_reference else None,
                mask_settings=settings if is_reference else None,
                created_at=now_seconds(),
            )
            rows.append(row)
        results.add_all(session, rows)


def page_of(site: Site, run: DrawnRun) -> tuple[str, int]:
    """The page of the first pair, and its number of statements."""
    with statements(site.service.uow.engine) as seen:
        text = site.browser.get(f"/pairs/{run.pairs[0]}").text
    return html.unescape(text), len(seen)


def test_a_pair_with_previews_shows_its_steps_in_a_fixed_number_of_statements(site: Site) -> None:
    run = draw_run(site.service, pairs=1, rounds=1)
    draw_run(site.service, pairs=1, rounds=1)  # a next pair
    text, without = page_of(site, run)
    assert "Show denoising steps" in text and "data-steps" not in text

    add_previews(site, run, SETTINGS)
    text, once = page_of(site, run)
    assert "Show denoising steps" not in text
    assert 'data-steps="0 2 4" data-num-steps="4"' in text
    assert re.findall(r'figure data-role="(\w+)"', text) == ["base", "target", "reference"]
    assert re.findall(r'<option value="[^"]*">(none|merged|circle)</option>', text) == ["none", "merged", "circle"]

    for _ in range(3):
        add_previews(site, run, SETTINGS | {"thresholds": [0.5]})
    assert page_of(site, run)[1] == once == without


def test_masks_of_other_thresholds_are_not_those_of_the_pair(site: Site) -> None:
    run = draw_run(site.service, pairs=1, rounds=1)
    for other in ({"thresholds": [0.5]}, {"merge": "or"}, {"first_step": 2}, {"last_step": None}):
        add_previews(site, run, SETTINGS | other)
    assert "Show denoising steps" in page_of(site, run)[0]


def test_a_sample_shows_its_newest_previews(site: Site) -> None:
    run = draw_run(site.service, pairs=1, rounds=1)
    add_previews(site, run, SETTINGS)
    add_previews(site, run, SETTINGS | {"thresholds": [0.5]})
    pair = site.client.get(f"/pairs/{run.pairs[0]}").json()
    sample = site.client.get(pair["reference"]["href"]).json()
    assert sample["previews"]["mask"] == {**SETTINGS, "thresholds": [0.5], "image": pair["mask"]}
    assert (sample["previews"]["steps"], sample["links"]["previews"]) == ([0, 2, 4], "/previews")


def test_nothing_is_offered_that_needs_trajectories_which_are_gone(site: Site) -> None:
    run = draw_run(site.service, pairs=1, rounds=1)
    offers = {"Show denoising steps": True, "<fuse-again": True, '-d \'{"pair"': True}

    def offered() -> dict[str, bool]:
        text = page_of(site, run)[0]
        return {name: name in text for name in offers}

    assert offered() == offers
    for role, expected in (("target", [False, True, True]), ("base", [False, False, False])):
        with site.service.uow.writing() as session:
            gone = update(Sample).where(Sample.job_id == run.job_id, Sample.role == role)
            session.execute(gone.values(trajectory_artifact_id=None, trajectory_row=None))
        assert list(offered().values()) == expected

    add_previews(site, run, SETTINGS)
    assert 'data-steps="0 2 4"' in page_of(site, run)[0]


def test_the_form_has_the_values_of_the_pair() -> None:
    body = {"pair": "pair_x", "thresholds": [0.02, 0.125], "fusion": {"layers": [3, 4], "last_step": 7}}
    fields = fusion_fields(Reproduction("/fusions", body, ""), ["cat", "pizza"])
    assert {field.pointer: field.value for field in fields} == {
        "/thresholds/0": "0.02",
        "/thresholds/1": "0.125",
        "/fusion/layers": "3, 4",
        "/fusion/first_step": "2",  # the default
        "/fusion/last_step": "7",
        "/fusion/merge": "xor",
        "/fusion/control": "masked_kv",
        "/fusion/trajectory": "fused",
    }
    assert [field.label for field in fields[:2]] == ["Threshold of cat", "Threshold of pizza"]
    by_pointer = {field.pointer: field for field in fields}
    assert [value for value, _ in by_pointer["/fusion/merge"].options] == ["xor", "or"]
    assert by_pointer["/fusion/last_step"].is_optional and not by_pointer["/fusion/first_step"].is_optional
    assert fusion_fields(None, []) == []


def test_only_settings_that_differ_are_compared() -> None:
    before = {"fusion": {"first_step": 2, "merge": "or"}}
    after = {"fusion": {"first_step": 4, "merge": "or", "last_step": 9}}
    rows = differences(before, after, ([0.1234567], [0.5]))
    assert [(row.name, row.before, row.after) for row in rows] == [
        ("first step", "2", "4"),
        ("last step", "none", "9"),
        ("thresholds", "0.1235", "0.5"),
    ]
    assert list(differences(before, before, ([0.1], [0.1]))) == []


def test_two_fusions_are_shown_side_by_side(site: Site) -> None:
    run = draw_run(site.service, pairs=2, rounds=1)
    other = draw_run(site.service, pairs=1, rounds=1)
    with site.service.uow.writing() as session:
        old = results.get_pair(session, run.pairs[0])
        sides = {"base_id": old.base_id, "reference_id": old.reference_id}
        session.execute(update(Pair).where(Pair.id == other.pairs[0]).values(sides))

    text = html.unescape(site.browser.get(f"/pairs/{run.pairs[0]}/compare/{other.pairs[0]}").text)
    assert f'href="/pairs/{other.pairs[0]}">Open the new pair' in text
    assert re.search(r'Mask covers.*?<td class="number">0.31</td><td class="number">0.31</td>', text, re.DOTALL)
    assert site.browser.get(f"/pairs/{run.pairs[0]}/compare/pair_{26 * '0'}").status_code == 404
    assert site.browser.get(f"/pairs/{run.pairs[0]}/compare/{run.pairs[1]}").status_code == 422  # of another base
