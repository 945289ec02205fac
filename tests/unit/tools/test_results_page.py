"""README.md and docs/results.md agree with the committed records."""

from pathlib import Path

import pytest

from api.experiments import FormatError, report
from tests.unit.api.experiments.examples import experiment, write_records
from tools.results_page import demo_table, fill, gradient_noise_table, write_reports

ROOT = Path(__file__).parents[3]
MEANS = {
    "shapes/base": {0: [0.2, 0.6]},
    "shapes/naive/seed 1": {2: [0.4, 0.6]},
    "shapes/fused/seed 1": {2: [0.6, 0.8]},
}
PAGE = """before
<!-- table: trial scores held_out judge -->
old
<!-- end of table -->
after
<!-- table: trial pairs -->
<!-- end of table -->
"""


def test_tables_are_filled_and_the_rest_stays(tmp_path: Path) -> None:
    trial = experiment(seeds=[1])
    write_records(trial, tmp_path, MEANS)
    reports = {"trial": report(trial, tmp_path, plots=False)}
    page = fill(PAGE, reports, tmp_path)
    lines = page.splitlines()
    assert lines[:3] == ["before", "<!-- table: trial scores held_out judge -->", "| model | shapes |"]
    assert [line.split(" [")[0] for line in lines[4:7]] == [
        "| base | 0.4000",  # (0.2 + 0.6) / 2
        "| naive | 0.5000",
        "| fused | 0.7000",
    ]
    assert "old" not in lines and "after" in lines
    assert fill(page, reports, tmp_path) == page


@pytest.mark.parametrize("what", ["other scores held_out judge", "trial means", "trial scores held_out", ""])
def test_an_unknown_table_is_an_error(tmp_path: Path, what: str) -> None:
    trial = experiment(seeds=[1])
    write_records(trial, tmp_path, MEANS)
    reports = {"trial": report(trial, tmp_path, plots=False)}
    with pytest.raises(FormatError, match=f"<!-- table: {what} -->"):
        fill(f"<!-- table: {what} -->\n<!-- end of table -->\n", reports, tmp_path)


def test_the_committed_pages_follow_from_the_committed_records(tmp_path: Path) -> None:
    """`make results` would change nothing. Reports are written elsewhere, the checkout stays as it is."""
    for file in (ROOT / "experiments").rglob("*"):
        if file.suffix in (".yaml", ".json") and file.name != "report.json":
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    folder = tmp_path / "experiments"
    reports = {each.experiment.name: each for each in write_reports(folder, plots=False)}
    assert reports
    for name in ("README.md", "docs/results.md"):
        page = (ROOT / name).read_text("utf-8")
        assert fill(page, reports, folder / "records") == page


def test_demos_and_gradients_are_tables_too() -> None:
    """Intervals that exclude zero are bold; seeds are in order."""
    own = {"split": "held_out", "scorer": "clip", "prompts": 40, "before": 0.7, "after": 0.73}
    clear = {**own, "difference": 0.03, "interval": [0.01, 0.05]}
    unclear = {**own, "difference": 0.01, "interval": [-0.01, 0.03]}
    demos = [{"seed": 2, "seconds": 90, "changes": [unclear]}, {"seed": 1, "seconds": 600, "changes": [clear]}]
    lines = list(demo_table(demos))
    assert lines[0] == "| seed | minutes | clip, held-out prompts |"
    assert lines[2:4] == [
        "| 1 | 10.0 | **+0.0300 [+0.0100, +0.0500]** |",
        "| 2 | 1.5 | +0.0100 [-0.0100, +0.0300] |",
    ]
    figures = {"pairs": 21, "cosine": 0.17, "cosine_others": 0.01, "signal": 0.08, "norm": 0.007}
    rows = list(gradient_noise_table([{"settings": {"template": "attribute"}, "naive": figures, "fused": figures}]))
    assert rows[2] == "| attribute | naive | 21 | 0.17 | 0.01 | 0.08 | 0.007 |"
