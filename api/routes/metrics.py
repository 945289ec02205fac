"""GET /metrics: metrics for Prometheus."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api.access import require_scope
from api.metrics import HttpMetrics, InstallationMetrics

router = APIRouter(tags=["health"], dependencies=[require_scope("read")])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def get_metrics(request: Request) -> Response:
    """Return metrics of requests, queue, leases, stages and images in Prometheus' text format."""
    requests = cast(HttpMetrics, request.app.state.metrics)
    installation = cast(InstallationMetrics, request.app.state.installation_metrics)
    return Response(requests.text() + installation.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
