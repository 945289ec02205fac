"""Route of the report of a run: one HTML file to send to others."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse
from pydantic import Field

from api.access import require_scope
from api.converters.models import display_name
from api.deps import Parameters, ServiceDep
from api.pages.comparison import leaves
from api.pages.render import render_text
from api.pages.report import MOST_SHOWN, Images, evaluation_of, pairs_of, score_charts, update_charts
from api.pages.routes.charts import get_charts
from api.pages.routes.runs import seconds_of, title_of
from api.routes.jobs import read_job
from api.score_changes import HEADINGS, headline
from service.db.queries import jobs, prompt_sets, results

router = APIRouter(tags=["jobs"], dependencies=[require_scope("read")])
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The report has its style and images in itself, and nothing else."""


class ReportParameters(Parameters):
    """`pairs`: the number of pairs to show. `prompts`: the number of prompts to show before and after training."""

    pairs: int = Field(12, ge=0, le=MOST_SHOWN)
    prompts: int = Field(8, ge=0, le=MOST_SHOWN)


@router.get("/jobs/{job_id}/report", response_class=HTMLResponse)
def get_report(job_id: str, service: ServiceDep, parameters: Annotated[ReportParameters, Query()]) -> HTMLResponse:
    """Return the report of a job as one HTML file, to keep or to send.

    It has the curves, the changes of the scores with 95 % intervals, images of the same prompts before and after
    training, and pairs of the last round with their masks and verdicts. It needs neither scripts nor other files.
    """
    job = read_job(service, job_id)
    charts = get_charts(job_id, service)
    with service.uow.reading() as session:
        set_ids = [set_id for set_id in (job.prompt_set, job.held_out_prompt_set) if set_id is not None]
        sets = prompt_sets.names(session, set_ids)
        model = None if job.model is None else results.models(session, [job.model]).get(job.model)
        evaluation = evaluation_of(session, job, parameters.prompts)
        before_after = () if evaluation is None else evaluation.pictures
        pairs_round = results.newest_pair_round(session, job.id) or 0
        pairs = pairs_of(session, job, pairs_round, parameters.pairs)
        images = Images.of(service.store, session, [*before_after, *pairs])
        now = jobs.now(session)

    # the images are read after the transaction, which slow storage would keep open
    text = render_text(
        "report.html",
        job=job,
        title=title_of(job),
        seconds=seconds_of(job),
        now=now,
        model=None if model is None else display_name(model),
        sets=[sets.get(set_id) or "own prompts" for set_id in set_ids],
        headline=headline(evaluation.changes[0]) if evaluation is not None and evaluation.has_intervals else "",
        headings=HEADINGS,
        evaluation=evaluation,
        before_after=images.embedded(before_after),
        charts=[*score_charts(charts["scores"]), *update_charts(charts["updates"])],
        pairs=images.embedded(pairs),
        pairs_round=pairs_round,
        settings=[(name, value) for name, value in leaves(job.spec) if name not in ("label", "prompts")],
    )
    headers = {
        "Content-Security-Policy": _POLICY,
        "Content-Disposition": f'inline; filename="report-{job.id}.html"',
    }
    return HTMLResponse(text, headers=headers)
