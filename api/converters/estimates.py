"""Conversion of estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.converters.prompt_sets import prompt_warnings_out
from api.wire.estimates import EstimateOut, ImageCounts, PromptItems, UnetCounts
from service.jobs.estimates import ResourceEstimate
from service.jobs.kinds import EvaluationJobSpec, JobSpec
from service.jobs.kinds.base import SamplesSpec
from service.plan import WorkCounts

_MAX_PROMPTS = 100


def estimate_out(
    counts: WorkCounts, estimate: ResourceEstimate, prompts: Sequence[Mapping[str, Any]], spec: JobSpec
) -> EstimateOut:
    negative = spec.sampling.negative_prompt if isinstance(spec, SamplesSpec | EvaluationJobSpec) else ""
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
        prompts=[PromptItems(text=prompt["text"], items=prompt["items"]) for prompt in prompts[:_MAX_PROMPTS]],
        warnings=prompt_warnings_out([{"text": negative}, *prompts]),
    )
