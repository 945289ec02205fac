"""How pages write durations, numbers and prompts."""

from datetime import UTC, datetime

import pytest

from api.pages import formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\N{EN DASH}"),
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7260, "2 h 1 min"),
        (93_600, "1 d 2 h"),
    ],
)
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (5 * 10**15, "5000.0 TB")])
def test_sizes_have_a_unit(count: int, text: str) -> None:
    assert formats.size(count) == text


def test_scores_align_and_differences_have_a_sign() -> None:
    assert (formats.score(0.5), formats.signed(0.25), formats.signed(-0.25)) == (
        "0.500",
        "+0.250",
        "\N{MINUS SIGN}0.250",
    )
    assert formats.number(12345.678) == "1.235e+04"
    assert formats.number(None) == "\N{EN DASH}"


def test_times_are_utc_for_scripts_to_localise() -> None:
    at = datetime(2026, 3, 1, 23, 59, 59, tzinfo=UTC)
    assert formats.moment(at) == '<time datetime="2026-03-01T23:59:59+00:00">2026-03-01 23:59 UTC</time>'


@pytest.mark.parametrize(
    ("prompt", "items", "marked"),
    [
        ("a cat on a mat", ["cat", "mat"], "a <mark>cat</mark> on a <mark>mat</mark>"),
        ("a Cat, two cats", ["cat"], "a <mark>Cat</mark>, two cats"),
        ("a red car seat", ["car", "car seat"], "a red <mark>car seat</mark>"),
        ("a <b>cat</b>", ["cat"], "a &lt;b&gt;<mark>cat</mark>&lt;/b&gt;"),
        ("a.b acb", ["a.b"], "<mark>a.b</mark> acb"),
        ("a <cat>", [], "a &lt;cat&gt;"),
    ],
)
def test_items_are_marked_and_all_else_is_escaped(prompt: str, items: list[str], marked: str) -> None:
    assert str(formats.marked(prompt, items)) == marked
