"""Examples of requests for the OpenAPI document."""

from __future__ import annotations

from typing import Any

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
