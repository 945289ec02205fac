"""The fault suite resumes, and its table says what was run. The rounds themselves are in test_faults."""

import random
from pathlib import Path

import pytest

from tests.deployment import DEPLOYED, EMBEDDED
from tests.faults.__main__ import plan
from tests.faults.families import FAMILIES, Family
from tests.faults.records import Records, Round, fill
from tests.faults.site import Setup, Site


def nothing(_site: Site, _dice: random.Random) -> int:
    return 0


FAMILY = Family("cancels", "", nothing, {DEPLOYED: 2, EMBEDDED: 1})
OTHER = Family("full-disk", "", nothing, {DEPLOYED: 1}, Setup(small_disk=True))
THIRD = Family("storage", "", nothing, {DEPLOYED: 1})


def finished(mode: str, number: int, seed: int, error: str = "", seconds: float = 2.0) -> Round:
    return Round("cancels", mode, number, seed, 0 if error else 3, seconds, error, "a machine", "2026-01-02", "abc")


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "faults")


def test_finished_rounds_are_left_out_and_failed_ones_keep_their_seed(records: Records) -> None:
    records.add(finished(DEPLOYED, 0, 11))
    records.add(finished(DEPLOYED, 1, 12, error="lost"))
    planned = [(each.mode, each.number, each.seed) for each in plan([FAMILY], records, None, None)]
    assert planned[0] == (DEPLOYED, 1, 12)
    assert [each[:2] for each in planned[1:]] == [(EMBEDDED, 0)]
    records.add(finished(DEPLOYED, 1, 12))
    assert [each.mode for each in plan([FAMILY], records, None, None)] == [EMBEDDED]


def test_a_seed_repeats_rounds_that_are_recorded(records: Records) -> None:
    records.add(finished(DEPLOYED, 0, 11))
    planned = plan([FAMILY], records, 1, 40)
    assert [(each.mode, each.number, each.seed) for each in planned] == [(DEPLOYED, 0, 40), (EMBEDDED, 0, 40)]


def test_rounds_on_the_same_installation_follow_each_other(records: Records) -> None:
    planned = plan([FAMILY, OTHER, THIRD], records, None, None)
    places = [(each.family.name, each.mode) for each in planned]
    assert places == [
        ("cancels", DEPLOYED),
        ("cancels", DEPLOYED),
        ("storage", DEPLOYED),
        ("cancels", EMBEDDED),
        ("full-disk", DEPLOYED),
    ]


def test_a_line_that_a_crash_has_cut_is_skipped(records: Records) -> None:
    records.add(finished(DEPLOYED, 0, 11))
    with (records.folder / "cancels.jsonl").open("a") as file:
        file.write('{"family": "canc')
    records.add(finished(DEPLOYED, 1, 12))
    assert sorted(records.latest("cancels")) == [(DEPLOYED, 0), (DEPLOYED, 1)]


def test_the_table_says_what_was_run(records: Records) -> None:
    records.add(finished(DEPLOYED, 0, 11))
    records.add(finished(DEPLOYED, 1, 12, error="lost"))
    records.add(finished(DEPLOYED, 1, 12, seconds=4.0))
    records.add(finished(EMBEDDED, 0, 13, error="lost", seconds=6.0))
    page = fill("before\n<!-- faults -->\nold\n<!-- end of faults -->\nafter\n", records)
    lines = page.splitlines()
    [row] = [line for line in lines if "`cancels`" in line]
    assert row.endswith("| 200 | 2 of 3; 197 not run yet | 2 | 6 | 4.0 | 2026-01-02 |")
    assert sum("| not run yet |" in line for line in lines) == len(FAMILIES) - 1
    assert (lines[0], lines[-1], "old" in page) == ("before", "after", False)
    assert "Machine: a machine." in lines
    with pytest.raises(ValueError, match="expected the markers"):
        fill("no table", records)
