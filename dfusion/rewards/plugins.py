"""Scorers of other Python packages.

A package offers a scorer by an entry point in the group `dfusion.scorers`:

    [project.entry-points."dfusion.scorers"]
    aesthetic = "my_package.scorers:Aesthetic"

Calling the attribute without arguments must give an object with `name`, `version` and `score` (`Scorer`). Only code
that is installed and announced this way is loaded by name. `load_attribute` imports whatever it is told: it is for an
owner's own settings, and must never be given a string from a request.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from dfusion.errors import ModelNotFoundError, ScorerError
from dfusion.rewards import Scorer

GROUP = "dfusion.scorers"
"""The entry points that are scorers."""


class NamedScorer:
    """Somebody's scorer under the name that the installation has for it, whatever it calls itself: two that call
    themselves the same stay two."""

    def __init__(self, scorer: Scorer, name: str) -> None:
        self._scorer, self.name = scorer, name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # not made yet: a copy or an unpickled one
            raise AttributeError(attribute)
        return getattr(self._scorer, attribute)


def load_entry_point(name: str) -> Scorer:
    """The scorer of the installed entry point of that name.

    Raises ModelNotFoundError where there is not exactly one, or it cannot be imported; ScorerError if it is no scorer.
    """
    found = tuple(entry_points(group=GROUP, name=name))
    if len(found) != 1:
        known = sorted(set(entry_points(group=GROUP).names))
        raise ModelNotFoundError(f"entry point: expected one of {known} in {GROUP}, got {name!r}, {len(found)} times")
    return _made(found[0])


def load_attribute(where: str) -> Scorer:
    """The scorer of 'module:attribute', from an owner's settings. Raises ModelNotFoundError, ScorerError."""
    return _made(EntryPoint(name="settings", value=where, group=GROUP))


def _made(entry: EntryPoint) -> Scorer:
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise ModelNotFoundError(f"scorer: expected 'module:attribute', got {entry.value!r}: {error}") from error
    try:
        scorer = factory() if callable(factory) else factory
    except Exception as error:  # somebody's code
        raise ScorerError(f"scorer {entry.value!r}: could not be made: {type(error).__name__}: {error}") from error
    texts = [getattr(scorer, key, None) for key in ("name", "version")]
    if not all(isinstance(text, str) and text for text in texts) or not callable(getattr(scorer, "score", None)):
        got = type(scorer).__name__
        raise ScorerError(f"scorer {entry.value!r}: expected an object with name, version and score, got {got}")
    return cast(Scorer, scorer)
