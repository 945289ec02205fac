"""The table of the contract test says what was run. The runs themselves are in test_contract."""

from pathlib import Path

from tests.contract.records import Run, fill, load, save
from tests.deployment import DEPLOYED, EMBEDDED


def test_the_table_has_the_last_run_of_each_database(tmp_path: Path) -> None:
    statuses = {"0": 2, "200": 1000, "202": 5, "404": 3, "503": 1}
    for mode, generated in ((DEPLOYED, 1), (EMBEDDED, 12_000), (DEPLOYED, 11_000)):
        hostile = {"access": 300, "bodies": 1700}
        run = Run(mode, generated, hostile, 48, statuses, 1, 0.26, "GET /x", 150, "a machine", "2026-01-02")
        save(tmp_path / "contract", run)

    page = fill("before\n<!-- contract -->\nold\n<!-- end of contract -->\nafter\n", load(tmp_path / "contract"))
    lines = page.splitlines()
    end = (
        "| 2,000 | 48 | 2xx: 1,005, 4xx: 3, 5xx: 1, closed without a response: 2 | 1 | 0.3 s: GET /x "
        "| 2026-01-02, 2 min |"
    )
    assert lines[4:6] == [
        f"| SQLite (embedded) | 12,000 {end}",
        f"| PostgreSQL (deployed) | 11,000 {end}",
    ]
    assert (lines[0], lines[-1], "old" in page) == ("before", "after", False)
    assert "Machine: a machine." in lines
