"""The kinds of jobs and their requests."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from dfusion.config import TrainingConfig
from dfusion.rewards.config import ScorerConfig
from service.jobs.kinds import KINDS, FusionJobSpec, RoundSpec, ScorerRef, TrainingJobSpec, kind_of, spec_of
from service.states import JobKind


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "http", "url": "http://169.254.169.254/"},
        {"kind": "open_clip", "folder": "/etc"},
        {"kind": "entry_point", "entry_point": "red"},
        {"kind": "verdicts"},
    ],
)
def test_a_request_cannot_name_an_address_file_or_code(settings: dict[str, str]) -> None:
    TypeAdapter[Any](ScorerConfig).validate_python(settings)
    with pytest.raises(ValidationError, match="kind"):
        TypeAdapter[Any](ScorerRef).validate_python(settings)


def test_every_kind_is_registered_under_its_name() -> None:
    assert set(KINDS) == set(JobKind)
    assert all(kind.name is name for name, kind in KINDS.items())


@pytest.mark.parametrize("name", KINDS)
def test_a_stored_request_is_read_as_its_kind(name: JobKind) -> None:
    for example in KINDS[name].examples.values():
        spec = spec_of(name.value, example["value"])
        assert kind_of(spec).name is name
        assert spec_of(name.value, spec.model_dump(mode="json")) == spec


def test_requests_are_built_without_sqlalchemy_torch_or_fastapi() -> None:
    code = "import sys, service.jobs.kinds; print(sorted({'sqlalchemy', 'torch', 'fastapi'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("training", "clip"),
    [
        ({}, 0.1),
        ({"ratio_clip": 0.2, "beta": 5.0}, 0.2),
        ({"ratio_clip": None}, None),
        ({"algorithm": "ddpo"}, None),
        (TrainingConfig(beta=5.0), 0.1),
    ],
)
def test_a_preset_sets_dpos_ratio_clip_unless_the_training_sets_it(training: Any, clip: float | None) -> None:
    """For round and training jobs, and only for algorithms with this clip."""
    fields = {"preset": "released_code", "training": training}
    for spec in (RoundSpec(model="tiny", prompt_set="a", **fields), TrainingJobSpec(jobs=("a",), **fields)):
        assert spec.training.ratio_clip == clip
    assert not hasattr(FusionJobSpec(sampling="a", preset="released_code"), "training")


def test_a_preset_does_not_add_fusion_to_a_naive_round() -> None:
    spec = RoundSpec(model="tiny", prompt_set="a", fusion=None, preset="released_code")
    assert spec.fusion is None and spec.pairing.dealing == "rank_order"
