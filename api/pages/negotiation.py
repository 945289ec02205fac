"""Content negotiation: whether a request prefers a page to JSON."""

from __future__ import annotations

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

HTML = "text/html"
_JSON = frozenset({"application/json", "application/problem+json"})


def prefers_html(scope: Scope) -> bool:
    """Whether the request names HTML before JSON, as browsers do. Ranges such as `*/*` name neither."""
    accept = ",".join(Headers(scope=scope).getlist("accept"))
    weights = _weights(accept)
    json_weight = max((weights.get(name, 0.0) for name in _JSON), default=0.0)
    return weights.get(HTML, 0.0) > json_weight


def _weights(accept: str) -> dict[str, float]:
    """The weight (`q`) of each media type of an Accept header; 1 without one, 0 for one that is no number."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (text.strip().lower() for text in part.split(";"))
        weights[name] = next((_number(text[2:]) for text in parameters if text.startswith("q=")), 1.0)
    return weights


def _number(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


class PageRoute(APIRoute):
    """A route that exists only for requests that prefer HTML, so that all others reach the JSON route of the path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match requests for the page."""
        match, child_scope = super().matches(scope)
        if match is not Match.FULL or not prefers_html(scope):
            return Match.NONE, {}
        return match, child_scope
