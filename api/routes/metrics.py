"""GET /metrics: metrics for Prometheus."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from api.access import require_scope
from api.metrics import HttpMetrics

router = APIRouter(tags=["health"], dependencies=[require_scope("read")])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def get_metrics(request: Request) -> Response:
    """Return metrics of requests, queue, leases, stages and images in Prometheus' text format."""
    metrics = cast(HttpMetrics, request.app.state.metrics)
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
