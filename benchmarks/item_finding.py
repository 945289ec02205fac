"""How often the items found in a prompt are the right ones: `python -m benchmarks.item_finding [--errors PART]`.

`item_labels.jsonl` has 340 prompts of PartiPrompts (https://github.com/google-research/parti, Apache-2.0), labelled by
hand. They were drawn by the hash of their text, from those of 2 to 30 words that are not in the category Abstract
(single words such as "life"). Three parts:

* development: errors in this part were looked at while the rules were written.
* held-out: labelled together with the development part; errors were not looked at. A prompt is in the part of the
  prompts with the same first three words.
* unseen: longer prompts (four words or more), drawn and labelled after the rules were written.

A prompt is right if all of `items` are found, and nothing but `items` and `optional`. The labels follow these rules:

* An item is the last word of a noun phrase that names a visible thing: what has parts and what is a part ("a cat with
  black ears": cat, ears), materials after "made of", games and instruments that are played.
* No items: the medium of the image ("a photo of"), its style, viewpoints, positions ("on the left"), colours, times of
  day, written text, words that count ("a pair of"), abstract nouns, and what the prompt says is absent.
* Optional: places and weather around the things ("in a field"), owners ("an owl's eyes"), further words of names
  ("Statue of Liberty"), collective nouns ("a crowd of people"), and things that the prompt only compares with.

With spaCy and one of its English pipelines installed, the table has a row with the pipeline's part-of-speech tags in
place of the rules (`find_items(text, tag=…)`), and one with its noun chunks as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dfusion.errors import PromptItemsError
from dfusion.prompts.items import find_items

PARTS = ("development", "held-out", "unseen")
Finder = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Labelled:
    """A prompt and its right items, in lower case."""

    part: str
    text: str
    items: frozenset[str]
    optional: frozenset[str]

    def problems(self, found: Sequence[str]) -> tuple[list[str], list[str]]:
        """The missing items, and the found words that are no items."""
        words = {word.casefold() for word in found}
        return sorted(self.items - words), sorted(words - self.items - self.optional)


def labelled_prompts() -> list[Labelled]:
    """The labelled prompts of all parts."""
    prompts = []
    for line in Path(__file__).with_name("item_labels.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        items, optional = (frozenset(word.casefold() for word in row[name]) for name in ("items", "optional"))
        prompts.append(Labelled(row["part"], row["text"], items, optional))
    return prompts


def found_items(text: str) -> Sequence[str]:
    """The items that dfusion finds; none if it refuses the prompt."""
    try:
        return find_items(text)
    except PromptItemsError:
        return ()


def exact(prompts: Sequence[Labelled], finder: Finder) -> int:
    """The number of prompts with exactly the right items."""
    return sum(prompt.problems(finder(prompt.text)) == ([], []) for prompt in prompts)


def spacy_finders() -> dict[str, Finder]:
    """Finders with the installed English pipelines of spaCy, by name."""
    if importlib.util.find_spec("spacy") is None:
        return {}
    finders: dict[str, Finder] = {}
    for pipeline in entry_points(group="spacy_models"):
        if pipeline.name.startswith("en_"):
            finders |= _finders_of(pipeline.name, pipeline.load().load())
    return finders


def _finders_of(name: str, pipeline: Any) -> dict[str, Finder]:
    from spacy.tokens import Doc

    def tag(words: Sequence[str]) -> list[str]:
        document = Doc(pipeline.vocab, words=list(words))
        return [token.pos_ for token in pipeline(document)]

    def with_tags(text: str) -> Sequence[str]:
        try:
            return find_items(text, tag)
        except PromptItemsError:
            return ()

    def chunks(text: str) -> list[str]:
        roots = [chunk.root for chunk in pipeline(text).noun_chunks]
        return [root.text for root in roots if root.pos_ in ("NOUN", "PROPN")]

    return {f"tags of {name}": with_tags, f"noun chunks of {name}": chunks}


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", choices=PARTS, help="also list the prompts of this part with wrong items")
    arguments = parser.parse_args()

    by_part: dict[str, list[Labelled]] = {part: [] for part in PARTS}
    for prompt in labelled_prompts():
        by_part[prompt.part].append(prompt)
    header = "".join(f"{part:>20}" for part in PARTS)
    write(f"{'exactly the right items':40}{header}\n")
    for name, finder in {"rules": found_items, **spacy_finders()}.items():
        cells = ""
        for prompts in by_part.values():
            count = exact(prompts, finder)
            cells += f"{f'{count}/{len(prompts)} {count / len(prompts):.1%}':>20}"
        write(f"{name:40}{cells}\n")

    for prompt in by_part.get(arguments.errors, []):
        missing, wrong = prompt.problems(found_items(prompt.text))
        if missing or wrong:
            write(f"missing {missing}, wrong {wrong}: {prompt.text}\n")


if __name__ == "__main__":
    main()
