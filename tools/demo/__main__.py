"""`make demo`: an online D-Fusion run that uses only the REST API.

Starts the embedded service on a free port, posts a round, follows it live, and shows the results: a table of scores
before and after training with confidence intervals, images of the same prompts before and after, fused pairs, the run's
report, the adapter's file, and curl commands for further inspection.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.cli.live import follow_job
from api.client import ApiError
from api.local_service import LocalServiceError, local_service
from api.score_changes import HEADINGS
from api.wire.jobs import JobDetail
from dfusion.errors import DFusionError
from service.states import JobState
from tools.demo.results import Results, as_json, results_of
from tools.demo.sheets import before_after_sheet, contact_sheet

Json = dict[str, Any]


class DemoError(Exception):
    """The demo failed."""


def changes_table(results: Results) -> Table:
    """The changes as a table for the terminal. Intervals that exclude zero are bold."""
    table = Table(title="Same prompts, same seeds, before and after training")
    for column, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if column < 2 else "right", no_wrap=True)
    for change in results.changes:
        *cells, interval = change.cells
        table.add_row(*cells, Text(interval, "bold" if change.excludes_zero else ""))
    return table


def request_of(arguments: argparse.Namespace) -> Json:
    """The body of POST /rounds."""
    return {
        "model": "shapes",
        "prompt_set": f"shapes-{arguments.template}-train",
        "held_out_prompt_set": f"shapes-{arguments.template}-test",
        "rounds": arguments.rounds,
        "samples_per_prompt": 4,
        "seed": arguments.seed,
        "sampling": {"num_steps": 10},
        "fusion": {"first_step": 3},
        # The experiments' recipe (docs/decisions/018-experiment-settings.md).
        "training": {
            "learning_rate": 7e-4,
            "beta": 50.0,
            "inner_epochs": 8,
            "timestep_fraction": 0.12,
            "micro_batch": 16,
            "log_gradient_norms": False,
        },
        "evaluation": {"samples_per_prompt": 4, "every_round": False},
        "label": "demo",
    }


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Run the demo. Raises DemoError, LocalServiceError, ApiError, DFusionError."""
    started = time.monotonic()
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = Path(tempfile.mkdtemp(prefix="data-", dir=out))
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error.strerror}") from error
    with local_service(data, out / "service.log") as client:
        body = request_of(arguments)
        console.print(f"POST {client.base_url}/rounds", body)
        job = follow_job(client, client.start_round(body).id, console)
        if job.state is not JobState.SUCCEEDED or job.last_model is None:
            why = job.error.message if job.error else "it did not train a model"
            raise DemoError(f"the job ended as {job.state}: {why}; the service's log is {out / 'service.log'}")
        results = results_of(client, job, arguments.prompts, arguments.pairs)
        console.print(changes_table(results))
        console.print(results.headline, highlight=False)
        before_after_sheet(results).save(out / "before-after.png")
        contact_sheet(results).save(out / "contact-sheet.png")
        report = client.report(job.id, prompts=arguments.prompts, pairs=arguments.pairs)
        (out / "report.html").write_text(report, encoding="utf-8")
        client.download_model(job.last_model, out / "adapter.safetensors")
        numbers = as_json(results, arguments.seed, time.monotonic() - started)
        (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        show_files(console, job, results, out, data)


def show_files(console: Console, job: JobDetail, results: Results, out: Path, data: Path) -> None:
    """Print output files and commands for further inspection."""
    files = {
        "before and after": "before-after.png",
        "contact sheet": "contact-sheet.png",
        "report": "report.html",
        "numbers": "results.json",
        "adapter": "adapter.safetensors",
    }
    console.print()
    for title, name in files.items():
        console.print(f"{title:<18}{out / name}", highlight=False, soft_wrap=True)

    serve = f"DFUSION_DATA_DIR={data} make serve"
    page = f"http://127.0.0.1:8000/jobs/{job.id}"
    console.print(f"\nRun {serve}, and open {page} in a browser, or", highlight=False, soft_wrap=True)
    paths = [f"/jobs/{job.id}", f"/jobs/{job.id}/metrics", f"/samples?job={job.id}&role=evaluation&round=0"]
    paths.append(f"/pairs?job={job.id}")
    paths += [f"/samples/{pair.target_id}" for pair in results.fused[:1]]
    paths.append(f"/models/{job.last_model}")
    for path in paths:
        console.print(f"    curl -s 'http://127.0.0.1:8000{path}'", highlight=False, soft_wrap=True)


def main() -> int:
    """Command line. Returns 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="attribute", choices=["behaviour", "attribute", "position"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8, help="prompts shown before and after")
    parser.add_argument("--pairs", type=int, default=8, help="fused pairs on the contact sheet")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the service also stops
    try:
        run(parser.parse_args(), console)
    except (DemoError, LocalServiceError, ApiError, DFusionError) as error:
        Console(stderr=True).print(f"demo: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
