"""Examples for the OpenAPI document: requests by operation, and what is answered by model."""

from __future__ import annotations

from typing import Any

from service.jobs.specs import RoundSpec

Example = dict[str, Any]

_JOB = "job_01m8a1pxvper1w4ygsyx0hjs4m"
_STAGE = "stg_01m8a1pxvsjq34jafdn1zyvz2r"
_SET = "set_01m8a1pxvjkc3qz66zf7y24t1d"
_BASE_MODEL = "mdl_01m8a1pxsnbr7kqk7524659k0z"
_MODEL = "mdl_01m8a1pz2njcg4jgh3z6rby2e1"
_PAIR = "pair_01m8a1pydrc1tp73rptyprcnvn"
_REFERENCE = "smp_01m8a1py9r4yx4az4f5bkcgypm"
_BASE = "smp_01m8a1py9p4nzzye7q46sc4w7e"
_TARGET = "smp_01m8a1pyg0twbkkyepg7jax9vn"
_PROMPT = "a red and striped circle"
_CREATED, _STARTED, _FINISHED = "2026-11-25T19:07:54.102Z", "2026-11-25T19:07:54.271Z", "2026-11-25T19:31:10.490Z"

PROMPT_SETS: dict[str, dict[str, Any]] = {
    "prompts": {
        "summary": "Prompts with items and thresholds",
        "value": {
            "name": "animals",
            "description": "Animals at table",
            "prompts": [
                {"text": "a cat eating a sandwich", "items": ["cat", "sandwich"], "thresholds": [0.03, 0.005]},
                {"text": "a [dog] eating a [pizza]"},
            ],
        },
    },
    "lines": {
        "summary": "One prompt a line",
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
PROMPT_SET_LINES = "# animals at table\na [cat] eating a [sandwich]\na [dog] eating a [pizza]\n"
PROMPT_SET_CSV = (
    "text,items,thresholds\na cat eating a sandwich,cat;sandwich,0.03;0.005\na dog eating a pizza,dog;pizza,\n"
)

_ROUND: Example = {
    "model": "shapes",
    "prompt_set": "shapes-attribute-train",
    "held_out_prompt_set": "shapes-attribute-test",
    "rounds": 3,
    "samples_per_prompt": 8,
    "seed": 1,
}
REQUESTS: dict[str, dict[str, Example]] = {
    "start_rounds": {
        "named": {"summary": "Three rounds on a list that is there from the start", "value": _ROUND},
        "own": {
            "summary": "One's own prompts, few steps, verdicts of people before it trains",
            "value": {
                "model": "shapes",
                "prompts": [{"text": "a red and striped [circle]"}, {"text": "a blue and dotted [star]"}],
                "samples_per_prompt": 4,
                "sampling": {"num_steps": 10},
                "fusion": {"first_step": 5, "last_step": 9},
                "training": {"learning_rate": 0.001, "examples_per_update": 2, "inner_epochs": 1},
                "review": True,
            },
        },
        "naive": {
            "summary": "DDPO without fusion, as the paper's comparison",
            "value": {
                "prompt_set": "shapes-attribute-train",
                "fusion": None,
                "training": {"algorithm": "ddpo"},
                "evaluation": None,
            },
        },
    },
    "start_sampling": {
        "named": {
            "summary": "Four images of each prompt of a list",
            "value": {"model": "shapes", "prompt_set": "shapes-attribute-test", "samples_per_prompt": 4},
        }
    },
    "start_fusion": {
        "pair": {
            "summary": "A pair again, with other thresholds",
            "value": {"pair": _PAIR, "thresholds": [0.03], "fusion": {"merge": "or"}, "reward": "shapes-clip"},
        },
        "pairs": {
            "summary": "A reference and a base of one's own choice",
            "value": {"pairs": [{"reference": _REFERENCE, "base": _BASE}], "reward": "shapes-clip"},
        },
    },
    "start_training": {
        "jobs": {
            "summary": "All pairs of a job",
            "value": {"jobs": [_JOB], "training": {"learning_rate": 0.0003}},
        },
        "pairs": {"summary": "A few pairs", "value": {"pairs": [_PAIR], "seed": 3}},
    },
    "start_evaluation": {
        "named": {
            "summary": "A base model on two lists",
            "value": {
                "models": ["shapes"],
                "prompt_sets": ["shapes-attribute-train", "shapes-attribute-test"],
                "samples_per_prompt": 2,
            },
        },
        "before_and_after": {
            "summary": "A trained model against what it was trained from",
            "value": {
                "models": [_BASE_MODEL, _MODEL],
                "prompts": [{"text": "a green [triangle]"}],
                "scorers": ["shapes-clip", "shapes-judge"],
            },
        },
    },
    "start_export": {
        "kohya": {
            "summary": "An adapter for ComfyUI and A1111",
            "value": {"model": _MODEL, "format": "kohya"},
        },
        "parquet": {"summary": "A job's pairs as a data set", "value": {"job": _JOB, "format": "parquet"}},
    },
    "create_prompt_set": PROMPT_SETS,
    "put_verdict": {
        "target": {"summary": "The fused one is better", "value": {"prefer": "target", "reviewer": "ann"}},
        "undo": {"summary": "Take the verdict back", "value": {"prefer": None}},
    },
    "put_alias": {"champion": {"summary": "Move the name to this model", "value": {"model": _MODEL}}},
    "make_key": {
        "reviewer": {
            "summary": "A key that judges pairs until the end of a year",
            "value": {"name": "ann", "scopes": ["review"], "expires_at": "2099-12-31T23:59:59Z"},
        }
    },
}

_JOB_OUT: Example = {
    "id": _JOB,
    "kind": "round",
    "state": "running",
    "label": None,
    "rounds": 3,
    "model": _BASE_MODEL,
    "prompt_set": _SET,
    "held_out_prompt_set": None,
    "origin": None,
    "progress": {"stage": "sample", "round": 2, "done": 48, "total": 96, "percent": 41.7, "eta_seconds": 812.5},
    "attempts": 1,
    "error": None,
    "created_at": _CREATED,
    "started_at": _STARTED,
    "finished_at": None,
    "links": {"self": f"/jobs/{_JOB}", "events": f"/jobs/{_JOB}/events", "cancel": f"/jobs/{_JOB}/cancel"},
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
    "started_at": _STARTED,
    "finished_at": None,
    "error": None,
}
_SCORE: Example = {"scorer": "shapes-clip", "version": "1", "value": 0.3127}
_SAMPLE: Example = {
    "id": _TARGET,
    "job": _JOB,
    "round": 1,
    "role": "target",
    "split": "train",
    "prompt": _PROMPT,
    "prompt_index": 0,
    "number": 0,
    "seed": 1321580563292643,
    "model": _BASE_MODEL,
    "scores": [_SCORE],
    "image": "/artifacts/art_01m8a1pyg0twbkkyepg7jax9vm",
    "trajectory": {"artifact": "/artifacts/art_01m8a1pyfykkcw4c77g2vvpmsm", "row": 0},
    "created_at": _STARTED,
    "links": {"self": f"/samples/{_TARGET}", "job": f"/jobs/{_JOB}", "model": f"/models/{_BASE_MODEL}"},
}


def _side(sample: str, seed: int, score: float, image: str) -> Example:
    return {"id": sample, "seed": seed, "score": score, "image": f"/artifacts/{image}", "href": f"/samples/{sample}"}


_VERDICT: Example = {"prefer": "target", "reviewer": "ann", "at": _FINISHED}
_PAIR_OUT: Example = {
    "id": _PAIR,
    "job": _JOB,
    "round": 1,
    "number": 0,
    "prompt": _PROMPT,
    "prompt_index": 0,
    "adopted": True,
    "why": None,
    "verdict": _VERDICT,
    "revision": 1,
    "scorer": "shapes-clip",
    "scorer_version": "1",
    "thresholds": [0.02],
    "reference": _side(_REFERENCE, 7271443894501871, 0.3342, "art_01m8a1py9sek71y6c00mmxs3d2"),
    "base": _side(_BASE, 1321580563292643, 0.2765, "art_01m8a1py9r4yx4az4f5bkcgypk"),
    "target": _side(_TARGET, 1321580563292643, 0.3127, "art_01m8a1pyg0twbkkyepg7jax9vm"),
    "figures": {"mask_cover": 0.21, "margin": {"target_over_base": 0.0362, "reference_over_base": 0.0577}},
    "mask": "/artifacts/art_01m8a1pyjtj47r1xhv4n4aexfq",
    "created_at": _STARTED,
    "links": {"self": f"/pairs/{_PAIR}", "job": f"/jobs/{_JOB}"},
}
_FIGURES: Example = {"pairs": 96, "adopted": 71, "updates": 12, "first_loss": 0.6931, "last_loss": 0.6187}
_MODEL_OUT: Example = {
    "id": _MODEL,
    "name": None,
    "base": "shapes",
    "parent": _BASE_MODEL,
    "job": _JOB,
    "round": 1,
    "adapter": {
        "artifact": "/artifacts/art_01m8a1pz2dy6wat4as5evzyycn",
        "sha256": "0ab49ee5a01a2117b8d63cd7b075faf18446d9715ce5569601a18130dd4c9aed",
        "size_bytes": 21280,
    },
    "aliases": ["champion"],
    "figures": _FIGURES,
    "created_at": _FINISHED,
    "links": {"self": f"/models/{_MODEL}", "lineage": f"/models/{_MODEL}/lineage", "job": f"/jobs/{_JOB}"},
}
_EXPORT: Example = {
    "id": "exp_01m8a1q1v0c9k3s8x3c1d5m7wz",
    "model": _MODEL,
    "job": None,
    "format": "kohya",
    "artifact": "/artifacts/art_01m8a1q1tz5w2dn0a5q4r7t6jx",
    "figures": {"psnr": 58.2},
    "created_at": _FINISHED,
}
_PROMPT_SET: Example = {
    "id": _SET,
    "name": "animals",
    "version": 1,
    "description": "Animals at table",
    "builtin": False,
    "size": 1,
    "created_at": _CREATED,
    "links": {"self": f"/prompt-sets/{_SET}"},
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
ANSWERS: dict[str, Example] = {
    "JobOut": _JOB_OUT,
    "JobDetail": {
        **_JOB_OUT,
        "spec": RoundSpec.model_validate(_ROUND).model_dump(mode="json"),
        "stages": [_STAGE_OUT],
        "made": {"samples": 192, "pairs": 96, "models": 1},
        "last_model": _MODEL,
        "result": None,
    },
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
    },
    "EventOut": {
        "id": 3,
        "at": _STARTED,
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
                "model": _MODEL,
                "training_images": 192,
                "count": 24,
                "mean": 0.3018,
                "std": 0.0214,
            }
        ],
        "trainings": [
            {
                "round": 1,
                "model": _MODEL,
                "examples": 80,
                "updates": 2,
                "loss": 0.6928,
                "accuracy": 0.68,
                "log_ratio_preferred": 0.0041,
                "log_ratio_rejected": -0.0032,
                "below_epsilon": 0.0001,
                "grad_norm": 0.0113,
            }
        ],
    },
    "SampleOut": _SAMPLE,
    "SampleDetail": {**_SAMPLE, "pairs": [_PAIR_OUT]},
    "PairOut": _PAIR_OUT,
    "ModelOut": _MODEL_OUT,
    "ModelDetail": {**_MODEL_OUT, "lineage": [_MODEL, _BASE_MODEL], "exports": [_EXPORT]},
    "LineageOut": {
        "data": [
            {
                "model": _MODEL,
                "name": None,
                "base": "shapes",
                "round": 1,
                "job": _JOB,
                "seed": 1,
                "prompt_set": _SET,
                "pairs": f"/pairs?job={_JOB}&round=1",
                "figures": _FIGURES,
            }
        ]
    },
    "ExportOut": _EXPORT,
    "PromptSetOut": _PROMPT_SET,
    "PromptSetDetail": {
        **_PROMPT_SET,
        "prompts": [
            {"text": "a cat eating a sandwich", "items": ["cat", "sandwich"], "thresholds": [0.03, 0.005]},
        ],
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
                "stage": {"id": _STAGE, "job": f"/jobs/{_JOB}", "kind": "sample", "round": 2},
                "started_at": _CREATED,
                "seen_at": _STARTED,
            }
        ]
    },
    "ApiKeyOut": _KEY,
    "ApiKeyMade": {**_KEY, "key": "dfk_pmnzf7Sv-an-example-that-opens-nothing-at-all-anywhere"},
    "HealthOut": {"status": "ok"},
    "ReadyOut": {
        "status": "ok",
        "database": True,
        "worker": None,
        "checks": [
            {"name": "database", "state": "ok", "detail": "postgresql answers"},
            {"name": "migrations", "state": "ok", "detail": "the schema is at 0006"},
            {"name": "worker", "state": "warning", "detail": "none is there: jobs wait until one is started"},
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
