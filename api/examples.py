"""Examples for the OpenAPI document: requests by operation and responses by model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.jobs.kinds import KINDS, RoundSpec
from service.jobs.kinds.base import (
    EXAMPLE_BASE,
    EXAMPLE_BASE_MODEL,
    EXAMPLE_JOB,
    EXAMPLE_MODEL,
    EXAMPLE_PAIR,
    EXAMPLE_REFERENCE,
    Example,
)
from service.jobs.kinds.rounds import EXAMPLE as ROUND

_TEST = "prf_01m8a1q1w5c9k3s8x3c1d5m7wz"
_STAGE = "stg_01m8a1pxvsjq34jafdn1zyvz2r"
_SET = "set_01m8a1pxvjkc3qz66zf7y24t1d"
_TARGET = "smp_01m8a1pyg0twbkkyepg7jax9vn"
_PROMPT = "a red and striped circle"
_CREATED = "2026-11-25T19:07:54.102Z"
_STARTED = "2026-11-25T19:07:54.271Z"
_FINISHED = "2026-11-25T19:31:10.490Z"

PROMPT_SETS: dict[str, dict[str, Any]] = {
    "prompts": {
        "summary": "Prompts with items and thresholds",
        "value": {
            "name": "animals",
            "description": "Animals that eat",
            "prompts": [
                {"text": "a cat eating a sandwich", "items": ["cat", "sandwich"], "thresholds": [0.03, 0.005]},
                {"text": "a [dog] eating a [pizza]"},
            ],
        },
    },
    "lines": {
        "summary": "One prompt per line",
        "value": {"name": "animals", "text": "a [cat] eating a [sandwich]\na [dog] eating a [pizza]\n"},
    },
    "released": {
        "summary": "The files of the released D-Fusion code",
        "value": {
            "name": "animals",
            "prompt_file": ["a cat eating a sandwich"],
            "item_idx_file": {"a cat eating a sandwich": [1, 4]},
            "mask_thr_file": {"a cat eating a sandwich": [0.03, 0.005]},
        },
    },
}
PROMPT_SET_LINES = "# animals that eat\na [cat] eating a [sandwich]\na [dog] eating a [pizza]\n"
PROMPT_SET_CSV = (
    "text,items,thresholds\na cat eating a sandwich,cat;sandwich,0.03;0.005\na dog eating a pizza,dog;pizza,\n"
)

REQUESTS: dict[str, Mapping[str, Example]] = {
    **{kind.operation: kind.examples for kind in KINDS.values()},
    "create_prompt_set": PROMPT_SETS,
    "change_job": {"rounds": {"summary": "Continue until round 20", "value": {"rounds": 20}}},
    "put_verdict": {
        "target": {"summary": "The target is better", "value": {"prefer": "target", "reviewer": "ann"}},
        "undo": {"summary": "Remove the verdict", "value": {"prefer": None}},
    },
    "create_preference_test": {
        "all": {"summary": "All images of an evaluation", "value": {"evaluation": EXAMPLE_JOB, "name": "figure 6"}},
        "drawn": {
            "summary": "Two models and 100 questions",
            "value": {"evaluation": EXAMPLE_JOB, "models": [EXAMPLE_BASE_MODEL, EXAMPLE_MODEL], "questions": 100},
        },
    },
    "put_preference_answer": {
        "second": {"summary": "The second image is best", "value": {"choice": 2, "rater": "ann"}},
        "none": {"summary": "None is better than all others", "value": {"choice": "none", "rater": "ann"}},
        "undo": {"summary": "Remove the answer", "value": {"choice": None, "rater": "ann"}},
    },
    "put_gold": {"target": {"summary": "The target is better", "value": {"expected": "target"}}},
    "put_alias": {"champion": {"summary": "Set the alias to this model", "value": {"model": EXAMPLE_MODEL}}},
    "create_webhook": {
        "ends": {
            "summary": "Notify this address when a job has ended",
            "value": {"url": "https://example.org/dfusion", "events": ["job.succeeded", "job.failed"]},
        }
    },
    "make_key": {
        "reviewer": {
            "summary": "A key for reviewing pairs, with an expiry date",
            "value": {"name": "ann", "scopes": ["review"], "expires_at": "2099-12-31T23:59:59Z"},
        }
    },
}

_JOB_OUT: Example = {
    "id": EXAMPLE_JOB,
    "kind": "round",
    "state": "running",
    "label": None,
    "priority": 0,
    "rounds": 3,
    "model": EXAMPLE_BASE_MODEL,
    "prompt_set": _SET,
    "held_out_prompt_set": None,
    "origin": None,
    "progress": {
        "stage": "sample",
        "round": 2,
        "shard": 0,
        "shards": 6,
        "done": 48,
        "total": 96,
        "percent": 41.7,
        "eta_seconds": 812.5,
    },
    "attempts": 1,
    "storage_bytes": 734003200,
    "error": None,
    "stopped": None,
    "created_at": _CREATED,
    "started_at": _STARTED,
    "finished_at": None,
    "links": {
        "self": f"/jobs/{EXAMPLE_JOB}",
        "stages": f"/jobs/{EXAMPLE_JOB}/stages",
        "events": f"/jobs/{EXAMPLE_JOB}/events",
        "cancel": f"/jobs/{EXAMPLE_JOB}/cancel",
    },
}
_STAGE_OUT: Example = {
    "id": _STAGE,
    "kind": "sample",
    "queue": "gpu",
    "round": 2,
    "shard": 0,
    "state": "running",
    "worker": "embedded-1.4711",
    "done": 48,
    "total": 96,
    "attempts": 1,
    "crashes": 0,
    "failures": 0,
    "started_at": _STARTED,
    "finished_at": None,
    "error": None,
}
_SCORE: Example = {"scorer": "shapes-clip", "version": "1", "value": 0.3127}
_SAMPLE: Example = {
    "id": _TARGET,
    "job": EXAMPLE_JOB,
    "round": 1,
    "role": "target",
    "split": "train",
    "prompt": _PROMPT,
    "prompt_index": 0,
    "number": 0,
    "seed": 1321580563292643,
    "model": EXAMPLE_BASE_MODEL,
    "scores": [_SCORE],
    "image": "/artifacts/art_01m8a1pyg0twbkkyepg7jax9vm",
    "trajectory": {"artifact": "/artifacts/art_01m8a1pyfykkcw4c77g2vvpmsm", "row": 0},
    "created_at": _STARTED,
    "links": {"self": f"/samples/{_TARGET}", "job": f"/jobs/{EXAMPLE_JOB}", "model": f"/models/{EXAMPLE_BASE_MODEL}"},
}


def _side(sample: str, seed: int, score: float, image: str) -> Example:
    return {"id": sample, "seed": seed, "score": score, "image": f"/artifacts/{image}", "href": f"/samples/{sample}"}


_VERDICT: Example = {"prefer": "target", "reviewer": "ann", "created_at": _FINISHED}
_PAIR_OUT: Example = {
    "id": EXAMPLE_PAIR,
    "job": EXAMPLE_JOB,
    "round": 1,
    "number": 0,
    "prompt": _PROMPT,
    "prompt_index": 0,
    "adopted": True,
    "reason": None,
    "verdict": _VERDICT,
    "verdicts": [_VERDICT],
    "revision": 1,
    "scorer": "shapes-clip",
    "scorer_version": "1",
    "thresholds": [0.02],
    "reference": _side(EXAMPLE_REFERENCE, 7271443894501871, 0.3342, "art_01m8a1py9sek71y6c00mmxs3d2"),
    "base": _side(EXAMPLE_BASE, 1321580563292643, 0.2765, "art_01m8a1py9r4yx4az4f5bkcgypk"),
    "target": _side(_TARGET, 1321580563292643, 0.3127, "art_01m8a1pyg0twbkkyepg7jax9vm"),
    "statistics": {"mask_cover": 0.21, "margin": {"target_over_base": 0.0362, "reference_over_base": 0.0577}},
    "mask": "/artifacts/art_01m8a1pyjtj47r1xhv4n4aexfq",
    "created_at": _STARTED,
    "links": {"self": f"/pairs/{EXAMPLE_PAIR}", "job": f"/jobs/{EXAMPLE_JOB}"},
}
_STATISTICS: Example = {"pairs": 96, "adopted": 71, "updates": 12, "first_loss": 0.6931, "last_loss": 0.6187}
_MODEL_OUT: Example = {
    "id": EXAMPLE_MODEL,
    "name": None,
    "base": "shapes",
    "parent": EXAMPLE_BASE_MODEL,
    "job": EXAMPLE_JOB,
    "round": 1,
    "adapter": {
        "artifact": "/artifacts/art_01m8a1pz2dy6wat4as5evzyycn",
        "sha256": "0ab49ee5a01a2117b8d63cd7b075faf18446d9715ce5569601a18130dd4c9aed",
        "size_bytes": 21280,
    },
    "aliases": ["champion"],
    "statistics": _STATISTICS,
    "created_at": _FINISHED,
    "links": {
        "self": f"/models/{EXAMPLE_MODEL}",
        "lineage": f"/models/{EXAMPLE_MODEL}/lineage",
        "job": f"/jobs/{EXAMPLE_JOB}",
    },
}
_EXPORT: Example = {
    "id": "exp_01m8a1q1v0c9k3s8x3c1d5m7wz",
    "model": EXAMPLE_MODEL,
    "job": None,
    "format": "kohya",
    "artifact": "/artifacts/art_01m8a1q1tz5w2dn0a5q4r7t6jx",
    "preview": "/artifacts/art_01m8a1q1v7g2k6j0h3s9d4f5wb",
    "recipe": {
        "base": "shapes",
        "format": "kohya",
        "pipeline": "StableDiffusionPipeline",
        "adapter_scale": 1.0,
        "sampler": "DDIM",
        "scheduler": {"num_train_timesteps": 1000, "prediction_type": "epsilon", "timestep_spacing": "leading"},
        "seed": 0,
        "call": {
            "prompt": "a red circle",
            "negative_prompt": None,
            "num_inference_steps": 20,
            "guidance_scale": 5.0,
            "eta": 1.0,
            "height": 64,
            "width": 64,
        },
        "vae": "the base model's",
        "dtype": "float32",
        "vae_dtype": "float32",
    },
    "statistics": {"difference": 0.0, "effect": 0.42},
    "created_at": _FINISHED,
}
_PROMPT_SET: Example = {
    "id": _SET,
    "name": "animals",
    "version": 1,
    "description": "Animals that eat",
    "builtin": False,
    "size": 1,
    "created_at": _CREATED,
    "links": {"self": f"/prompt-sets/{_SET}"},
}
_WEBHOOK: Example = {
    "id": "whk_01hzy3v9k2m4n6p8q0r1s3t5w7",
    "url": "https://example.org/dfusion",
    "events": ["job.succeeded", "job.failed"],
    "created_at": _CREATED,
    "disabled_at": None,
    "disabled_reason": None,
}
_PREFERENCE_QUESTION: Example = {
    "test": _TEST,
    "number": 17,
    "place": 1,
    "prompt": _PROMPT,
    "images": ["/artifacts/art_01m8a1pyg0twbkkyepg7jax9vm", "/artifacts/art_01m8a1py9r4yx4az4f5bkcgypk"],
    "choice": 2,
    "answered_at": _FINISHED,
    "links": {
        "test": f"/preference-tests/{_TEST}",
        "answer": f"/preference-tests/{_TEST}/questions/17/answer",
    },
}
_KEY: Example = {
    "id": "key_01m8a14ta47xpq00p0w1mnayb6",
    "name": "ann",
    "prefix": "dfk_pmnzf7Sv",
    "scopes": ["review"],
    "active": True,
    "created_at": _CREATED,
    "last_used_at": None,
    "expires_at": "2099-12-31T23:59:59Z",
    "revoked_at": None,
}
_PROMPT_WARNING: Example = {
    "prompt": "a (red cat:1.2) on a sofa",
    "message": "weighting syntax is read as plain text: '(red cat:1.2)'",
}
RESPONSES: dict[str, Example] = {
    "JobOut": _JOB_OUT,
    "JobDetail": {
        **_JOB_OUT,
        "spec": RoundSpec.model_validate(ROUND).model_dump(mode="json"),
        "outputs": {"samples": 192, "pairs": 96, "models": 1},
        "last_model": EXAMPLE_MODEL,
        "best": {"round": 1, "model": EXAMPLE_MODEL, "split": "train", "scorer": "shapes-judge", "mean": 0.72},
        "review": None,
        "result": None,
    },
    "StageOut": _STAGE_OUT,
    "EstimateOut": {
        "dry_run": True,
        "images": {"sampled": 192, "fused_at_most": 96, "evaluated": 48, "total_at_most": 336},
        "unet_evaluations": {
            "sampling": 7680,
            "fusion_at_most": 6912,
            "training_at_most": 23040,
            "evaluation": 1920,
            "total_at_most": 39552,
        },
        "seconds": 1312.4,
        "memory_bytes": 9_300_000_000,
        "storage_bytes": 412_000_000,
        "prompts": [{"text": "a (red cat:1.2) on a sofa", "items": ["cat", "sofa"]}],
        "warnings": [_PROMPT_WARNING],
    },
    "EventOut": {
        "id": 3,
        "created_at": _STARTED,
        "kind": "stage.started",
        "message": "sample of round 1, shard 1 of 10 started",
        "stage": _STAGE,
        "data": {"stage": "sample", "round": 1, "shard": 0, "attempt": 1, "worker": "embedded-1.4711"},
    },
    "MetricsOut": {
        "data": [
            {
                "round": 1,
                "split": "train",
                "scorer": "shapes-clip",
                "version": "1",
                "model": EXAMPLE_MODEL,
                "training_images": 192,
                "count": 24,
                "mean": 0.3018,
                "std": 0.0214,
            }
        ],
        "pairings": [{"round": 1, "pairs": 38, "samples": 160, "without_pair": 2}],
        "trainings": [
            {
                "round": 1,
                "model": EXAMPLE_MODEL,
                "examples": 80,
                "updates": 2,
                "loss": 0.6928,
                "accuracy": 0.68,
                "log_ratio_preferred": 0.0041,
                "log_ratio_rejected": -0.0032,
                "below_epsilon": 0.0001,
                "grad_norm": 0.0113,
                "rows_per_second": 13.7,
            }
        ],
        "has_more": False,
        "next_cursor": None,
    },
    "SampleOut": _SAMPLE,
    "SampleDetail": {
        **_SAMPLE,
        "links": {**_SAMPLE["links"], "previews": "/previews"},
        "pairs": [_PAIR_OUT],
        "previews": {
            "job": EXAMPLE_JOB,
            "num_steps": 4,
            "steps": [0, 1, 2, 3, 4],
            "strip": "/artifacts/art_01m8a1q1tz5w2dn0a5q4r7t6jx",
            "mask": None,
            "created_at": _FINISHED,
        },
    },
    "PairOut": _PAIR_OUT,
    "PreferenceTestOut": {
        "id": _TEST,
        "name": "figure 6",
        "evaluation": EXAMPLE_JOB,
        "models": [EXAMPLE_BASE_MODEL, EXAMPLE_MODEL],
        "questions": 100,
        "answers": 20,
        "created_at": _CREATED,
        "links": {"self": f"/preference-tests/{_TEST}", "evaluation": f"/jobs/{EXAMPLE_JOB}"},
    },
    "PreferenceQuestionOut": _PREFERENCE_QUESTION,
    "NextQuestionOut": {"question": _PREFERENCE_QUESTION, "answered": 1, "questions": 100},
    "PreferenceResultsOut": {
        "test": _TEST,
        "questions": 100,
        "answers": 20,
        "raters": 2,
        "confidence": 0.95,
        "groups": [
            {
                "prompt_set": None,
                "answers": 20,
                "models": [
                    {
                        "model": EXAMPLE_BASE_MODEL,
                        "name": "shapes",
                        "count": 5,
                        "share": 0.25,
                        "interval": [0.112, 0.469],
                    },
                    {
                        "model": EXAMPLE_MODEL,
                        "name": "shapes, round 1",
                        "count": 13,
                        "share": 0.65,
                        "interval": [0.433, 0.819],
                    },
                ],
                "none": {"count": 2, "share": 0.1, "interval": [0.028, 0.301]},
                "pairs": [
                    {
                        "model": EXAMPLE_BASE_MODEL,
                        "other": EXAMPLE_MODEL,
                        "wins": 5,
                        "losses": 13,
                        "share": 0.278,
                        "interval": [0.125, 0.509],
                        "chance": 0.096,
                    }
                ],
            }
        ],
        "positions": [
            {"position": 1, "count": 8, "share": 0.444, "interval": [0.246, 0.663]},
            {"position": 2, "count": 10, "share": 0.556, "interval": [0.337, 0.754]},
        ],
    },
    "GoldOut": {"pair": EXAMPLE_PAIR, "expected": "target"},
    "AgreementOut": {
        "pairs": 96,
        "compared": 40,
        "verdicts": 84,
        "alpha": 0.71,
        "reviewers": [{"reviewer": "ann", "judged": 96, "gold_judged": 8, "gold_right": 7}],
    },
    "ModelOut": _MODEL_OUT,
    "ModelDetail": {**_MODEL_OUT, "lineage": [EXAMPLE_MODEL, EXAMPLE_BASE_MODEL], "exports": [_EXPORT]},
    "AncestorOut": {
        "model": EXAMPLE_MODEL,
        "name": None,
        "base": "shapes",
        "round": 1,
        "job": EXAMPLE_JOB,
        "seed": 1,
        "prompt_set": _SET,
        "pairs": f"/pairs?job={EXAMPLE_JOB}&round=1",
        "statistics": _STATISTICS,
    },
    "ExportOut": _EXPORT,
    "PromptSetOut": _PROMPT_SET,
    "PromptSetDetail": {
        **_PROMPT_SET,
        "prompts": [
            {"text": "a cat eating a sandwich", "items": ["cat", "sandwich"], "thresholds": [0.03, 0.005]},
        ],
        "warnings": [],
    },
    "WorkersOut": {
        "data": [
            {
                "name": "embedded-1.4711",
                "state": "working",
                "host": "studio",
                "pid": 4711,
                "queues": ["gpu", "cpu"],
                "device": "cuda",
                "model": "shapes",
                "gpu_memory_bytes": 9663676416,
                "stage": {"id": _STAGE, "job": f"/jobs/{EXAMPLE_JOB}", "kind": "sample", "round": 2},
                "started_at": _CREATED,
                "seen_at": _STARTED,
            }
        ]
    },
    "ApiKeyOut": _KEY,
    "WebhookOut": _WEBHOOK,
    "WebhookCreated": {**_WEBHOOK, "secret": "whsec_YW4tZXhhbXBsZS1zZWNyZXQtdGhhdC1zaWducy1ub3RoaW5n"},
    "DeliveryOut": {
        "id": "dlv_01hzy3v9k2m4n6p8q0r1s3t5w0",
        "webhook": _WEBHOOK["id"],
        "job": EXAMPLE_JOB,
        "event": "job.succeeded",
        "state": "delivered",
        "attempts": 1,
        "last_status": 204,
        "last_error": None,
        "created_at": _FINISHED,
        "next_attempt_at": None,
        "delivered_at": _FINISHED,
    },
    "ApiKeyCreated": {**_KEY, "key": "dfk_pmnzf7Sv-an-example-key-that-is-not-valid-in-any-service"},
    "HealthOut": {"status": "ok"},
    "ReadyOut": {
        "status": "ok",
        "database": True,
        "worker": None,
        "checks": [
            {"name": "database", "state": "ok", "detail": "postgresql responds"},
            {"name": "migrations", "state": "ok", "detail": "the schema is at revision 0001_tables"},
            {"name": "worker", "state": "warning", "detail": "no worker runs: jobs wait until one starts"},
        ],
    },
    "Problem": {
        "type": "about:blank",
        "title": "Unprocessable Entity",
        "status": 422,
        "code": "invalid_request",
        "detail": "/rounds: Input should be greater than or equal to 1",
        "errors": [{"pointer": "/rounds", "message": "Input should be greater than or equal to 1"}],
    },
}
