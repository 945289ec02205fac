"""The rows of the cases page about prompts, in the library."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from dfusion.config import FusionConfig, PairingConfig
from dfusion.errors import InvalidInputError
from dfusion.pair_metrics import Side, decide
from dfusion.prompts import Prompt, read_prompts
from tests.prompt_cases import CASES, ENCODED, MARKED_COMMENT


@pytest.mark.parametrize("row", CASES)
def test_a_prompt(row: str, tmp_path: Path) -> None:
    """By itself, and as a line, a JSON string and a JSON line of a file, which give the same prompt."""
    case = CASES[row]
    contents = {"txt": case.given, "json": json.dumps([case.given]), "jsonl": json.dumps({"prompt": case.given})}
    for suffix, content in contents.items():
        (tmp_path / f"pets.{suffix}").write_text(content, "utf-8")

    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            Prompt(text=case.given)
        for suffix in contents:
            with pytest.raises(InvalidInputError, match=case.refused):
                read_prompts(str(tmp_path / f"pets.{suffix}"))
        return

    prompt = Prompt(text=case.given)
    assert (prompt.text, prompt.items) == (case.text, case.items)
    assert prompt.warnings == tuple(f"weighting syntax is read as plain text: {part!r}" for part in case.warned_of)
    for suffix in contents:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert read_prompts(str(tmp_path / f"pets.{suffix}")) == (prompt,)
        assert len(caught) == len(case.warned_of)


def test_a_byte_order_mark_before_a_comment(tmp_path: Path) -> None:
    (tmp_path / "pets.txt").write_text(MARKED_COMMENT, "utf-8")
    assert read_prompts(str(tmp_path / "pets.txt")) == (Prompt(text="a cat", items=("cat",)),)


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_text_file_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    content, message = ENCODED[encoding]
    (tmp_path / "pets.txt").write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"pets.txt': expected text in UTF-8, {message}"):
        read_prompts(str(tmp_path / "pets.txt"))


def test_a_mask_over_most_of_the_image_is_reported_and_not_adopted() -> None:
    """As of a marked beach in "a dog on a [beach]": 3 of 4 pixels, of which at most 70 % may be fused."""
    base, target = (Side(torch.full((4, 2, 2), value), torch.zeros(2, 2, 3).numpy(), value) for value in (0.0, 1.0))
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    decision = decide(target, base, target, PairingConfig(), mask, FusionConfig())
    assert not decision.adopted
    assert decision.reason == (
        "the mask covers 0.75 of the image, max_mask_cover is 0.7: too little of the base is kept"
    )
