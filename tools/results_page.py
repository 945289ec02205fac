"""`make results`: the experiments' reports and the tables of README.md and docs/results.md, from their records.

The pages are written by hand, except between two marker comments:

    <!-- table: EXPERIMENT KIND [SPLIT SCORER] -->
    <!-- end of table -->

KIND is `scores`, `differences` or `changes` (differences with a column per list), each with a split and a scorer, or
`rounds`, `rollouts`, `pairs` or `training`. Two tables have other records: `demo` from the `results.json` of demos
(records/demo/), `gradient-noise` from the output of `benchmarks.gradient_noise` (records/gradient-noise/).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console

from api.experiments.errors import ExperimentError, FormatError
from api.experiments.format import SPLIT_NAMES, Experiment
from api.experiments.records import write_text
from api.experiments.reporting import (
    Report,
    change_table,
    difference_table,
    pair_table,
    rollout_table,
    round_tables,
    score_table,
    table,
    training_table,
)
from api.experiments.reporting import report as write_report

_TABLE = re.compile(r"(<!-- table: (?P<what>.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(page: str, reports: Mapping[str, Report], records: Path) -> str:
    """The page with regenerated tables.

    Args:
        page: Markdown with marker comments.
        reports: The reports by experiment name.
        records: The folder of the records.

    Raises:
        FormatError: A comment that does not name a table of these experiments.
    """

    def filled(match: re.Match[str]) -> str:
        lines = "\n".join(_table(match["what"], reports, records))
        return f"{match[1]}{lines}\n{match[3]}"

    return _TABLE.sub(filled, page)


def _table(what: str, reports: Mapping[str, Report], records: Path) -> Iterable[str]:
    match what.split():
        case ["demo"]:
            return demo_table(_json_files(records / "demo"))
        case ["gradient-noise"]:
            return gradient_noise_table(_json_files(records / "gradient-noise"))
        case [name, "scores", split, scorer] if name in reports:
            return score_table(reports[name], split, scorer)
        case [name, "differences", split, scorer] if name in reports:
            return difference_table(reports[name], split, scorer)
        case [name, "changes", split, scorer] if name in reports:
            return change_table(reports[name], split, scorer)
        case [name, "rounds"] if name in reports:
            return round_tables(reports[name])
        case [name, "rollouts"] if name in reports:
            return rollout_table(reports[name])
        case [name, "pairs"] if name in reports:
            return pair_table(reports[name])
        case [name, "training"] if name in reports:
            return training_table(reports[name])
    raise FormatError(f"<!-- table: {what} -->: expected an experiment of {sorted(reports)} and a kind of table")


def demo_table(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The changes of each demo. Intervals that exclude zero are bold."""
    rows = []
    for result in sorted(results, key=itemgetter("seed")):
        changes = [_change(change) for change in result["changes"]]
        rows.append([str(result["seed"]), f"{result['seconds'] / 60:.1f}", *changes])
        headings = [f"{change['scorer']}, {SPLIT_NAMES[change['split']]}>" for change in result["changes"]]
    return table(["seed", "minutes>", *headings], rows) if rows else iter(())


def _change(change: dict[str, Any]) -> str:
    if change["interval"] is None:
        return f"{change['difference']:+.4f}"
    low, high = change["interval"]
    text = f"{change['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def gradient_noise_table(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Similarity of the gradients of pairs, naive and fused."""
    rows = []
    for result in sorted(results, key=lambda result: result["settings"]["template"]):
        for kind in ("naive", "fused"):
            figures = result[kind]
            numbers = [f"{figures[name]:.4g}" for name in ("cosine", "cosine_others", "signal", "norm")]
            rows.append([result["settings"]["template"], kind, str(figures["pairs"]), *numbers])
    headings = ["list", "pairs", "count>", "cosine, same prompt>", "cosine, other prompts>", "signal>", "norm>"]
    return table(headings, rows)


def _json_files(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]


def write_reports(folder: Path, *, plots: bool = True) -> Iterator[Report]:
    """Write and yield the report of each experiment of a folder that has records."""
    for file in sorted(folder.glob("*.yaml")):
        experiment = Experiment.load(file)
        if (folder / "records" / experiment.name).is_dir():
            yield write_report(experiment, folder / "records", plots=plots)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.results_page", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="experiments (YAML) with their records/")
    parser.add_argument("pages", type=Path, nargs="+", help="pages whose tables are regenerated")
    arguments = parser.parse_args()
    try:
        reports = {report.experiment.name: report for report in write_reports(arguments.folder)}
        for page in arguments.pages:
            write_text(page, fill(page.read_text("utf-8"), reports, arguments.folder / "records"))
    except (ExperimentError, OSError) as error:
        Console(stderr=True).print(f"results: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
