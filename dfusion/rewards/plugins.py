"""Scorers of other Python packages.

A package offers a scorer by an entry point in the group `dfusion.scorers`:

    [project.entry-points."dfusion.scorers"]
    aesthetic = "my_package.scorers:Aesthetic"

Calling the attribute without arguments must return an object with `name`, `version` and `score` (`Scorer`). Only
installed code with such an entry point is loaded by name. `load_attribute` imports any module: use it for an owner's
settings only, never for a string from a request.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from dfusion.errors import ModelNotFoundError, ScorerError
from dfusion.rewards import Scorer

GROUP = "dfusion.scorers"
"""The entry point group of scorers."""


class NamedScorer:
    """A third-party scorer under the installation's name for it. Two scorers with the same own name stay distinct."""

    def __init__(self, scorer: Scorer, name: str) -> None:
        self._scorer = scorer
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # before __init__, in a copy or when unpickling
            raise AttributeError(attribute)
        return getattr(self._scorer, attribute)


def load_entry_point(name: str) -> Scorer:
    """Load the scorer of the installed entry point of that name.

    Raises:
        ModelNotFoundError: There is not exactly one such entry point, or it cannot be imported.
        ScorerError: It is not a scorer.
    """
    matches = tuple(entry_points(group=GROUP, name=name))
    if len(matches) != 1:
        known = sorted(set(entry_points(group=GROUP).names))
        raise ModelNotFoundError(f"entry point: expected one of {known} in {GROUP}, got {name!r}, {len(matches)} times")
    return _load(matches[0])


def load_attribute(where: str) -> Scorer:
    """Load the scorer of 'module:attribute', from an owner's settings. Raises ModelNotFoundError, ScorerError."""
    return _load(EntryPoint(name="settings", value=where, group=GROUP))


def _load(entry: EntryPoint) -> Scorer:
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise ModelNotFoundError(f"scorer: expected 'module:attribute', got {entry.value!r}: {error}") from error

    try:
        scorer = factory() if callable(factory) else factory
    except Exception as error:  # third-party code
        raise ScorerError(f"scorer {entry.value!r}: could not be created: {type(error).__name__}: {error}") from error

    texts = [getattr(scorer, key, None) for key in ("name", "version")]
    if not all(isinstance(text, str) and text for text in texts) or not callable(getattr(scorer, "score", None)):
        got = type(scorer).__name__
        raise ScorerError(f"scorer {entry.value!r}: expected an object with name, version and score, got {got}")
    return cast(Scorer, scorer)
