"""The benchmarks, on small images and few steps."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fusion, item_finding, training
from benchmarks.nets import TOKENS, random_model, random_unet


def test_fusion_counts_the_evaluations_of_both_ways() -> None:
    """Plainly 3 calls a step; fused, from the third step on, a reference and two targets a step."""
    unet = random_unet("small", "cpu", torch.float32)
    unet.register_to_config(sample_size=16)
    result = fusion.compare(unet, TOKENS["small"], steps=3)
    assert (result.plain.evaluations, result.sampled.evaluations, result.fused.evaluations) == (9, 9, 3)
    assert result.difference < 1e-5


@pytest.mark.slow
def test_an_update_is_the_same_by_any_micro_batch() -> None:
    model = random_model("small", "cpu", torch.float32)
    model.unet.register_to_config(sample_size=16)
    pairs = training.sampled_pairs(model, count=1, steps=2)
    first, second = (training.update(model, pairs, *way) for way in ((1, False), (2, True)))
    assert (second.gradient - first.gradient).norm() / first.gradient.norm() < 1e-4
    assert max(first.off, second.off) < 1e-5


@pytest.mark.parametrize("part", item_finding.PARTS)
def test_nine_of_ten_labelled_prompts_get_exactly_the_right_items(part: str) -> None:
    prompts = [prompt for prompt in item_finding.labelled_prompts() if prompt.part == part]
    assert len(prompts) >= 100
    assert item_finding.exact(prompts, item_finding.found_items) >= 0.9 * len(prompts)


def test_an_exact_result_has_all_items_and_no_others() -> None:
    prompt = item_finding.Labelled(
        "unseen", "a Cat on a mat in a field", frozenset({"cat", "mat"}), frozenset({"field"})
    )
    assert prompt.problems(["Cat", "mat"]) == prompt.problems(["Cat", "mat", "field"]) == ([], [])
    assert prompt.problems(["cat", "field", "sky"]) == (["mat"], ["sky"])
    assert item_finding.exact([prompt], lambda _: ["cat"]) == 0


def test_the_accuracy_table_has_a_row_a_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["item_finding", "--errors", "development"])
    output: list[str] = []
    item_finding.main(output.append)
    header, rules, *_ = "".join(output).splitlines()
    assert header.split()[-3:] == list(item_finding.PARTS)
    assert rules.startswith("rules") and rules.count("/") == 3
