"""Conversion of estimates."""

from __future__ import annotations

from api.wire.estimates import EstimateOut, ImageCounts, UnetCounts
from service.jobs.estimates import ResourceEstimate
from service.plan import WorkCounts


def estimate_out(counts: WorkCounts, estimate: ResourceEstimate) -> EstimateOut:
    return EstimateOut(
        dry_run=True,
        images=ImageCounts(
            sampled=counts.sampled,
            fused_at_most=counts.fused_at_most,
            evaluated=counts.evaluated,
            total_at_most=counts.images,
        ),
        unet_evaluations=UnetCounts(
            sampling=counts.sampling,
            fusion_at_most=counts.fusion_at_most,
            training_at_most=counts.training_at_most,
            evaluation=counts.evaluation,
            total_at_most=counts.unet_evaluations,
        ),
        seconds=estimate.seconds,
        memory_bytes=estimate.memory_bytes,
        storage_bytes=estimate.storage_bytes,
    )
