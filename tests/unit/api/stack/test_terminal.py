from pathlib import Path

import pytest

from api.stack.terminal import PartLog, Terminal

LINES = [
    "2026-01-01T00:00:00.000Z INFO api.access: GET /jobs 200",
    "2026-01-01T00:00:00.000Z INFO worker.runner: sample of round 0",
    "2026-01-01T00:00:00.000Z ERROR api.access: GET /jobs 500",
    "Traceback (most recent call last):",
    "2026-01-01T00:00:00.000Z INFO celery.worker: Task received",
    "more of what celery says",
]


@pytest.mark.parametrize(
    ("is_ours", "verbose", "shown"), [(True, False, [1, 2, 3]), (False, False, []), (False, True, range(6))]
)
def test_terminal_shows_important_lines_and_the_file_has_all_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_ours: bool, verbose: bool, shown: list[int]
) -> None:
    log = PartLog("api", tmp_path, Terminal(5, verbose), is_ours)
    for line in LINES:
        log.write(line)
    log.close()
    assert capsys.readouterr().out.splitlines() == [f"api   | {LINES[number]}" for number in shown]
    assert log.path.read_text("utf-8").splitlines() == LINES


def test_recent_lines_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = PartLog("s3", tmp_path, Terminal(2, verbose=False), is_ours=False)
    log.write("the port is taken")
    log.show_recent()
    log.show_recent()
    log.close()
    assert capsys.readouterr().out == "s3 | the port is taken\n"
