"""Routes for the agreement of reviewers and for gold pairs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.access import require_scope
from api.converters.pairs import agreement_out
from api.deps import CallerDep, Parameters, PromptSetFilter, ServiceDep
from api.wire.pairs import AgreementOut, GoldIn, GoldOut
from service.db.queries import agreement, prompt_sets, results
from service.ids import IdKind, expect
from service.service import set_gold
from service.states import KeyScope, Verdict

router = APIRouter(dependencies=[require_scope("read")])


class AgreementParameters(Parameters):
    """The pairs whose verdicts are compared."""

    job: str | None = None
    prompt_set: PromptSetFilter = None


@router.get("/verdicts/agreement", tags=["pairs"])
def get_agreement(
    service: ServiceDep, caller: CallerDep, filters: Annotated[AgreementParameters, Query()]
) -> AgreementOut:
    """Return how well reviewers agree on the pairs of a job, of a prompt set, or on all pairs.

    At most the newest 10,000 pairs with a verdict are compared. Accuracy on gold pairs needs the scope `admin`; it is
    null for others, who could otherwise find out which pairs are gold.
    """
    with service.uow.reading() as session:
        job_id = None if filters.job is None else expect(IdKind.JOB, filters.job)
        set_id = None if filters.prompt_set is None else prompt_sets.id_of(session, filters.prompt_set)
        measured = agreement.measure(session, job_id, set_id)
    return agreement_out(measured, with_gold=KeyScope.ADMIN in caller.scopes)


@router.get("/pairs/{pair_id}/gold", tags=["pairs"], dependencies=[require_scope("admin")])
def get_gold(pair_id: str, service: ServiceDep) -> GoldOut:
    """Return the expected verdict of a gold pair; null for other pairs."""
    with service.uow.reading() as session:
        row = results.get_pair(session, pair_id)
        return GoldOut(pair=row.id, expected=None if row.gold is None else Verdict(row.gold))


@router.put("/pairs/{pair_id}/gold", tags=["pairs"], dependencies=[require_scope("admin")])
def put_gold(pair_id: str, gold: GoldIn, service: ServiceDep) -> GoldOut:
    """Make a pair a gold pair, on which reviewers are measured, or with null an ordinary one.

    Gold pairs are in the queues of reviewers like all others. The expected verdict is not a verdict: it decides no
    training and no review.
    """
    set_gold(service, pair_id, gold.expected)
    return get_gold(pair_id, service)
