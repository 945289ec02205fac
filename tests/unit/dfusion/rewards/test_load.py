"""Scorers by name and by settings, and weighted sums."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dfusion.catalogue import SCORERS
from dfusion.errors import InvalidInputError, ModelNotFoundError, NonFiniteError, ScorerError, ShapeMismatchError
from dfusion.rewards import load_scorer
from dfusion.rewards.config import (
    EntryPointConfig,
    HttpScorerConfig,
    OpenClipConfig,
    ScorerConfig,
    VerdictScorerConfig,
    WeightedPart,
    WeightedScorerConfig,
)
from dfusion.rewards.plugins import load_attribute
from dfusion.rewards.weighted import WeightedScorer

PLUGIN = """
class Red:
    name, version = "red", "3"
    def score(self, images, prompts):
        return [float(image[..., 0].mean()) for image in images]

class Nameless:
    version = "1"
    def score(self, images, prompts):
        return []

made = Red()
"""
ENTRY_POINTS = """
[dfusion.scorers]
red = plugin_of_a_test:Red
object = plugin_of_a_test:made
nameless = plugin_of_a_test:Nameless
gone = plugin_of_a_test:Gone
nowhere = no_such_plugin:Red
module = plugin_of_a_test
"""


class Fixed:
    """Returns the same scores for all images."""

    version = "2"

    def __init__(self, name: str, scores: list[Any]) -> None:
        self.name = name
        self.scores = scores

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return self.scores


def images(count: int, value: int = 0) -> np.ndarray:
    return np.full((count, 4, 4, 3), value, np.uint8)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with entry points."""
    (tmp_path / "plugin_of_a_test.py").write_text(PLUGIN)
    about = tmp_path / "plugin_of_a_test-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_of_a_test", raising=False)


@pytest.mark.slow
def test_every_name_of_the_catalogue_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfusion.rewards.clip import ClipScorer

    requests: list[tuple[str, str]] = []

    def remember(architecture: str, weights: str, *, name: str, device: str) -> Fixed:  # noqa: ARG001
        requests.append((architecture, weights))
        return Fixed(name, [])

    monkeypatch.setattr(ClipScorer, "from_pretrained", remember)
    assert [load_scorer(name).name for name in SCORERS] == list(SCORERS)
    assert requests == [("ViT-H-14", "laion2b_s32b_b79k"), ("ViT-L-14", "datacomp_xl_s13b_b90k")]


def test_the_installations_scorers_override_built_in_ones() -> None:
    installed = {
        "shapes-judge": HttpScorerConfig(url="http://localhost/score", version="7"),
        "people": VerdictScorerConfig(),
    }
    scorer = load_scorer("shapes-judge", installed=installed)

    assert (scorer.name, scorer.version) == ("shapes-judge", "7")
    assert load_scorer("people", installed=installed, verdicts={}).name == "people"
    with pytest.raises(ModelNotFoundError, match=r"\['clip-vit-h-14', .*'people', .*'nobody'"):
        load_scorer("nobody", installed=installed)
    with pytest.raises(InvalidInputError, match="verdicts"):
        load_scorer("people", installed=installed)


def test_a_weighted_sum_by_hand() -> None:
    scorer = WeightedScorer([(0.5, Fixed("a", [1.0, 2])), (-2.0, Fixed("b", [0.25, 0.0]))])
    assert scorer.score(images(2), ["x", "y"]) == [0.0, 1.0]
    assert scorer.name == "0.5*a+-2.0*b"
    assert scorer.version == "0.5*a@2+-2.0*b@2"
    assert WeightedScorer([(1.0, Fixed("a", []))], name="mix").name == "mix"
    with pytest.raises(ShapeMismatchError):
        scorer.score(images(2).astype(np.float32), ["x", "y"])
    with pytest.raises(InvalidInputError):
        WeightedScorer([])


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        ([1.0], ScorerError),
        ([1.0, "2"], ScorerError),
        ([1.0, True], ScorerError),
        ([1.0, None], ScorerError),
        ((1.0, 2.0), ScorerError),
        ([1.0, float("nan")], NonFiniteError),
        ([1.0, float("-inf")], NonFiniteError),
    ],
)
def test_invalid_scores_are_rejected(scores: list[Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="wrong"):
        WeightedScorer([(1.0, Fixed("wrong", scores))]).score(images(2), ["x", "y"])


def test_a_sum_names_its_parts_and_never_contains_itself() -> None:
    def total(*names: str) -> WeightedScorerConfig:
        return WeightedScorerConfig(parts=tuple(WeightedPart(scorer=name, weight=1) for name in names))

    installed = {"a": total("people", "b"), "b": total("people"), "people": VerdictScorerConfig()}
    assert load_scorer("a", installed=installed, verdicts={}).version.startswith("1.0*people@")
    assert load_scorer(total("a", "b"), installed=installed, verdicts={}).name == "1.0*a+1.0*b"
    installed["b"] = total("a")
    with pytest.raises(InvalidInputError, match=r"sum without itself, got \('a', 'b', 'a'\)"):
        load_scorer("a", installed=installed, verdicts={})


@pytest.mark.usefixtures("plugins")
def test_scorers_of_installed_packages() -> None:
    scorer = load_scorer(EntryPointConfig(entry_point="red"))
    assert (scorer.name, scorer.version) == ("red", "3")
    assert scorer.score(images(2, value=7), ["x", "y"]) == [7.0, 7.0]
    assert load_scorer(EntryPointConfig(entry_point="object")).name == "red"
    assert load_attribute("plugin_of_a_test:Red").name == "red"

    installed = {"mine": "plugin_of_a_test:Red", "ours": EntryPointConfig(entry_point="red")}
    named = [load_scorer(name, installed=installed) for name in ("mine", "ours")]

    assert [(loaded.name, loaded.version) for loaded in named] == [("mine", "3"), ("ours", "3")]
    assert named[0].score(images(2, value=7), ["x", "y"]) == [7.0, 7.0]
    assert not hasattr(named[0], "features")
    assert copy.copy(named[0]).name == "mine"


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("entry_point", "error", "message"),
    [
        ("nobody", ModelNotFoundError, r"\['gone', .*'red'\].* got 'nobody', 0 times"),
        ("gone", ModelNotFoundError, "Gone"),
        ("nowhere", ModelNotFoundError, "no_such_plugin"),
        ("nameless", ScorerError, "Nameless"),
        ("module", ScorerError, "module"),
    ],
)
def test_entry_points_without_a_scorer_are_errors(entry_point: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_scorer(EntryPointConfig(entry_point=entry_point))


@pytest.mark.parametrize("where", ["", "no_such_module:Red", "json:Red", ":Red", "json:"])
def test_missing_attributes_are_errors(where: str) -> None:
    with pytest.raises((ModelNotFoundError, ScorerError)):
        load_attribute(where)


def test_two_packages_with_the_same_name_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one", "two"):
        about = tmp_path / f"{package}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[dfusion.scorers]\ntwice = json:loads\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelNotFoundError, match="2 times"):
        load_scorer(EntryPointConfig(entry_point="twice"))


def test_settings_are_discriminated_by_kind() -> None:
    read = TypeAdapter[Any](ScorerConfig).validate_python
    assert read({"kind": "open_clip"}) == OpenClipConfig(architecture="ViT-H-14", weights="laion2b_s32b_b79k")
    assert isinstance(read({"kind": "http", "url": "http://host:1/x"}), HttpScorerConfig)
    for invalid in (
        {"kind": "pickle"},
        {"architecture": "ViT-H-14"},
        {"kind": "http", "url": "file:///etc/passwd"},
        {"kind": "entry_point", "entry_point": "os:system"},
        {"kind": "weighted", "parts": []},
        {"kind": "weighted", "parts": [{"scorer": "a", "weight": 0}]},
        {"kind": "weighted", "parts": [{"scorer": "a", "weight": float("nan")}]},
        {"kind": "weighted", "parts": [{"scorer": "a", "weight": 1}] * 2},
    ):
        with pytest.raises(ValidationError):
            read(invalid)


def test_a_token_is_not_shown() -> None:
    config = HttpScorerConfig(url="http://host/", bearer_token="secret")
    assert "secret" not in repr(config) + config.model_dump_json()
