"""`make demo`: one online D-Fusion run, through the REST API alone, as a user with curl would do it.

Starts the embedded service on a free port, posts a round, follows it live, and shows what came out: a table of before
and after, a contact sheet of fused pairs (PNG and HTML), the adapter's file, and the curl lines to look further.
"""

from __future__ import annotations

import argparse
import base64
import io
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from api.cli.live import follow_job
from api.client import ApiError, Client
from api.core.states import JobState
from api.local_service import LocalServiceError, local_service
from api.schemas import JobDetail
from dfusion.shapes.prompts import FUSION

Json = dict[str, Any]
SPLITS = {"train": "training prompts", "held_out": "held-out prompts"}
PICTURE = 128
"""Side of a picture on the contact sheet, pixels."""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def before_and_after(metrics: list[Json]) -> list[tuple[str, str, float, float]]:
    """(split, scorer, first round's mean, last round's mean) of every split and scorer."""
    rows = []
    evaluated = [m for m in metrics if m["split"] in SPLITS]
    for split, scorer in sorted({(m["split"], m["scorer"]) for m in evaluated}, reverse=True):
        by_round = {m["round"]: m["mean"] for m in evaluated if (m["split"], m["scorer"]) == (split, scorer)}
        rows.append((split, scorer, by_round[min(by_round)], by_round[max(by_round)]))
    return rows


def show_table(console: Console, rows: list[tuple[str, str, float, float]], rounds: int) -> None:
    """Before and after, as a table on the terminal."""
    table = Table(title=f"Same prompts, same seeds, before and after {rounds} rounds")
    for heading in ("prompts", "scorer", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading in ("prompts", "scorer") else "right")
    for split, scorer, before, after in rows:
        table.add_row(SPLITS.get(split, split), scorer, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    console.print(table)


def picture(client: Client, artifact_path: str) -> Image.Image:
    """An image artifact, brought to the contact sheet's size."""
    image = Image.open(io.BytesIO(client.read(artifact_path))).convert("RGB")
    return image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST)


def triptychs(client: Client, job_id: str, count: int) -> list[Json]:
    """The job's adopted pairs with the largest gain of the target over its base: pictures, prompt and scores."""
    adopted = [pair.model_dump(mode="json") for pair in client.pairs(job=job_id, adopted=True)]
    adopted.sort(key=lambda p: p["target"]["score"] - p["base"]["score"], reverse=True)
    chosen = []
    for pair in adopted[:count]:
        links = [pair[role]["image"] for role in ("base", "reference", "target")] + [pair["mask"]]
        chosen.append({"pair": pair, "pictures": [picture(client, link) for link in links]})
    return chosen


def contact_sheet(chosen: list[Json]) -> Image.Image:
    """Rows of base, reference, target and mask, each with its prompt and scores."""
    margin, caption, columns = 8, 34, 4
    width = columns * (PICTURE + margin) + margin
    sheet = Image.new("RGB", (width, caption + len(chosen) * (PICTURE + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, heading in enumerate(("base", "reference", "target", "mask")):
        draw.text((margin + x * (PICTURE + margin), 12), heading, "black")
    for y, row in enumerate(chosen):
        top = caption + y * (PICTURE + caption)
        for x, image in enumerate(row["pictures"]):
            sheet.paste(image, (margin + x * (PICTURE + margin), top))
        pair = row["pair"]
        scores = ", ".join(f"{role} {pair[role]['score']:.3f}" for role in ("base", "reference", "target"))
        draw.text((margin, top + PICTURE + 3), pair["prompt"], "black")
        draw.text((margin, top + PICTURE + 16), scores, "dimgray")
    return sheet


def html_report(rows: list[tuple[str, str, float, float]], chosen: list[Json], job: Json) -> str:
    """The same as one HTML file that needs nothing beside it."""

    def inline(image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    pages = Environment(loader=PackageLoader("api", "web"), autoescape=select_autoescape())
    shown = [{"pair": row["pair"], "pictures": [inline(image) for image in row["pictures"]]} for row in chosen]
    return pages.get_template("demo_report.html").render(rows=rows, splits=SPLITS, shown=shown, job=job)


def request_of(arguments: argparse.Namespace) -> Json:
    """The body of POST /rounds."""
    return {
        "model": "shapes",
        "prompt_set": f"shapes-{arguments.template}-train",
        "held_out_prompt_set": f"shapes-{arguments.template}-test",
        "rounds": arguments.rounds,
        "samples_per_prompt": 4,
        "seed": arguments.seed,
        "fusion": {"first_step": FUSION.first_step},
        # Few and large updates: a row's gradient is mostly noise, and many small steps of AdamW lead astray. Beta 20
        # on mean log-probs lets the loss level off (docs/decisions/015-demo.md).
        "training": {
            "learning_rate": 1e-3,
            "rows_per_update": 128,
            "inner_epochs": 1,
            "beta": 20,
            "micro_batch": 16,
            "log_gradient_norms": False,
        },
        "evaluation": {"samples_per_prompt": 1, "every_round": False},
        "label": "demo",
    }


def run(arguments: argparse.Namespace, console: Console) -> None:
    """The demo."""
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
            why = job.error.message if job.error else "it trained no model"
            raise DemoError(f"the job ended as {job.state}: {why}; the service's log is {out / 'service.log'}")
        rows = before_and_after([metric.model_dump() for metric in client.metrics(job.id).data])
        show_table(console, rows, arguments.rounds)
        chosen = triptychs(client, job.id, arguments.pairs)
        contact_sheet(chosen).save(out / "pairs.png")
        adopted = sum(1 for _ in client.pairs(job=job.id, adopted=True))
        about = {"id": job.id, "pairs": job.made["pairs"], "adopted": adopted}
        (out / "report.html").write_text(html_report(rows, chosen, about), encoding="utf-8")
        client.download_model(job.last_model, out / "adapter.safetensors")
        tell(console, job, chosen, out, data)


def tell(console: Console, job: JobDetail, chosen: list[Json], out: Path, data: Path) -> None:
    """Where things are and how to look further."""
    console.print(f"contact sheet  {out / 'pairs.png'}\nHTML report    {out / 'report.html'}", highlight=False)
    console.print(f"adapter        {out / 'adapter.safetensors'}", highlight=False)
    console.print(f"\nTo look further: DFUSION_DATA_DIR={data} make serve, and then", highlight=False)
    paths = [f"/jobs/{job.id}", f"/jobs/{job.id}/metrics", f"/pairs?job={job.id}"]
    paths += [f"/samples/{row['pair']['target']['id']}" for row in chosen[:1]]
    paths.append(f"/models/{job.last_model}")
    for path in paths:
        console.print(f"    curl -s 'http://127.0.0.1:8000{path}'", highlight=False, soft_wrap=True)


def main() -> int:
    """Command line. Exit code 0 if a table came out, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="attribute", choices=["behaviour", "attribute", "position"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8, help="pairs on the contact sheet")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the service is stopped, too
    try:
        run(parser.parse_args(), console)
    except (DemoError, LocalServiceError, ApiError) as error:
        Console(stderr=True).print(f"demo: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
