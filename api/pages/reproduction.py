"""Commands that compute a result again. Results depend only on the request, so they are identical."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from api.pages.pair_views import PairView
from service.jobs.kinds import KINDS
from service.states import JobKind

_OF_A_FUSION = ("fusion", "pairing", "reward")


@dataclass(frozen=True)
class Reproduction:
    """A request that computes a result again.

    Attributes:
        path: The path that it is posted to.
        body: Its body.
        note: What it gives.
    """

    path: str
    body: dict[str, Any]
    note: str

    @property
    def json(self) -> str:
        """The body as JSON, one field per line."""
        return json.dumps(self.body, indent=1, ensure_ascii=False)

    def curl(self, origin: str, with_key: bool) -> str:
        """The command with curl."""
        key = ' -H "Authorization: Bearer $DFUSION_API_KEY"' if with_key else ""
        body = json.dumps(self.body, ensure_ascii=False)
        return f"curl -s {origin}{self.path} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def again_of_pair(view: PairView, spec: dict[str, Any]) -> Reproduction | None:
    """The request that fuses the pair again with the settings of its job.

    None for a pair without a target, or if the trajectories of its samples are no longer stored.
    """
    pair = view.pair
    if pair.target is None or not view.can_be_fused:
        return None
    settings = {name: spec[name] for name in _OF_A_FUSION if spec.get(name) is not None}
    thresholds = {} if pair.thresholds is None else {"thresholds": pair.thresholds}
    body = {"pair": pair.id} | thresholds | settings
    return Reproduction("/fusions", body, "fuses the same pair again, from its stored trajectories")


def again_of_job(kind: str, spec: dict[str, Any]) -> Reproduction:
    """The request that runs a job again."""
    body = {name: value for name, value in spec.items() if value is not None}
    return Reproduction(KINDS[JobKind(kind)].path, body, "runs the same request as a new job")
