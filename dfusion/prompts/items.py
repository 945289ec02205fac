"""The items of a user's own prompt: marked in brackets, or detected among its words (Eq. 4). Does not import torch.

Detection needs no language model. English noun phrases end at a small closed set of words (articles, prepositions,
conjunctions, auxiliaries) or at a participle. The noun is the last word of the phrase. Colours, materials and other
adjectives precede it, so they are never items. To choose other words, mark them.
"""

from __future__ import annotations

import re
from typing import Literal

from dfusion.errors import PromptItemsError

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")

_DETERMINERS = frozenset(
    "a an the this that these those my your his her its our their some any every each no another both all many "
    "several few one two three four five six seven eight nine ten".split()
)
_CONNECTIVES = frozenset(
    "and or but nor with without of in on at to from by for as into onto upon over under above below beneath behind "
    "beside besides between among near against across along around through throughout inside outside within atop off "
    "up down left right next away while when where who whose which than then there it he she they him them you i we "
    "not is are was were be been being am has have had do does did can will like".split()
)
_VERBS = frozenset(
    "sits stands lies sleeps rides drives flies runs walks jumps swims climbs dances plays eats drinks holds carries "
    "wears reads writes looks watches chases catches throws kicks cooks washes cleans makes".split()
)
_ADJECTIVES = frozenset(
    "red orange yellow green blue purple violet pink brown black white grey gray beige turquoise cyan magenta golden "
    "silver big small large little tiny huge giant tall short long wide narrow thick thin old young new ancient modern "
    "wooden woolen woollen metallic metal plastic furry fluffy shiny bright dark light colorful colourful beautiful "
    "cute happy sad angry funny round flat plain empty full open cold hot warm wet dry clean dirty heavy soft "
    "hard smooth rough fast slow realistic photorealistic cinematic dramatic very highly".split()
)
_ING_NOUNS = frozenset(
    "building ceiling clothing railing awning earring string spring swing sling stocking wedding pudding dumpling "
    "duckling sibling sapling lightning evening morning thing being viking".split()
)
_LY_NOUNS = frozenset("jelly lily belly family doily holly".split())
_NEVER_ITEMS = frozenset(
    "style background foreground quality resolution detail details lighting masterpiece hd".split()
)
_NOT_BEFORE_OF = frozenset(
    "photo photograph picture image painting drawing illustration sketch render rendering portrait view shot closeup "
    "close-up front top bottom back side middle center centre edge group pair bunch lot couple piece pieces slice kind "
    "type set series number".split()
)
"""Words that are no items before "of": "a photo of a cat", "on top of a car", "a pair of shoes"."""


def parse_marked(text: str) -> tuple[str, tuple[str, ...]]:
    """The plain text and its marked items: "a [cat] on a [red mat]" gives "a cat on a red mat", ("cat", "red mat").

    An item that is marked twice is returned once; all its occurrences count for its map. Without marks there are no
    items. White space is collapsed to single spaces. Raises PromptItemsError for nested, empty or unpaired brackets.
    """
    plain = ""
    items: dict[str, str] = {}
    start: int | None = None
    for position, character in enumerate(text):
        if character == "[":
            if start is not None:
                raise _bad_mark(text, position, "nested brackets")
            start = len(plain)
        elif character == "]":
            if start is None:
                raise _bad_mark(text, position, "an unmatched closing bracket")
            item = " ".join(plain[start:].split())
            if not item:
                raise _bad_mark(text, position, "empty brackets")
            items.setdefault(item.casefold(), item)
            start = None
        else:
            plain += character

    if start is not None:
        raise _bad_mark(text, len(text), "an unclosed bracket")
    return " ".join(plain.split()), tuple(items.values())


def _bad_mark(text: str, position: int, problem: str) -> PromptItemsError:
    return PromptItemsError(f"expected items marked as in 'a [cat]', got {problem} at character {position} of {text!r}")


def find_items(text: str) -> tuple[str, ...]:
    """The nouns of an English prompt, each once, in order: the last word of every noun phrase.

    "a black and woolen bus" gives ("bus",); "a teddy bear riding a red bike" gives ("bear", "bike"). Raises
    PromptItemsError if there is no noun.
    """
    words = [*_WORD.findall(text), ".", ".", "."]  # a full stop closes the last phrase
    items: dict[str, str] = {}
    phrase: list[str] = []
    article = False  # whether the phrase began with an article
    for word, *rest in zip(words, words[1:], words[2:], strict=False):
        low = word.casefold()
        role = _role(low, rest[0].casefold(), rest[1].casefold(), article, bool(phrase))
        if role == "noun":
            phrase.append(word)
        elif role == "end":
            if phrase and _names_a_thing(phrase[-1].casefold(), low):
                items.setdefault(phrase[-1].casefold(), phrase[-1])
            phrase = []
            article = low in _DETERMINERS

    if not items:
        raise PromptItemsError(f"expected a prompt that names a thing, got none; mark it, as in 'a [cat]': {text!r}")
    return tuple(items.values())


def _role(low: str, following: str, second: str, article: bool, has_noun: bool) -> Literal["noun", "modifier", "end"]:
    """A word's role in its phrase. `following` and `second` are the next words; `has_noun`: the phrase has one."""
    if _closes(low):
        return "end"
    alone = article and not has_noun and _ends_before(following, second)
    if _is_participle(low):
        if low.endswith("ing") and (alone or following == "of"):
            return "noun"  # "a painting on the wall", "an oil painting of"
        return "end" if has_noun else "modifier"  # "a cat eating fish", "a running dog"
    if low in _ADJECTIVES:
        return "noun" if alone else "modifier"  # "an orange on a plate", "an orange cat"
    adverb = low.endswith("ly") and not low.endswith("fly") and low not in _LY_NOUNS
    return "modifier" if adverb or any(character.isdigit() for character in low) else "noun"


def names_no_thing(word: str) -> bool:
    """Whether the word cannot be an item because it is an article, a preposition, a listed verb or similar."""
    return _closes(word.casefold())


def _closes(low: str) -> bool:
    """Whether this word ends a noun phrase."""
    return low in _DETERMINERS or low in _CONNECTIVES or low in _VERBS or not low[0].isalnum()


def _ends_before(following: str, second: str) -> bool:
    """Whether a phrase ends before these words. After "and" or a comma, adjectives may follow: "a red and wooden"."""
    if following in ("and", "or", ","):
        return second in _DETERMINERS
    return _closes(following) or _is_participle(following)


def _is_participle(low: str) -> bool:
    if len(low) <= 4 or low in _ING_NOUNS:
        return False
    return low.endswith("ing") or (low.endswith("ed") and not low.endswith("eed"))


def _names_a_thing(head: str, closed_by: str) -> bool:
    return head not in _NEVER_ITEMS and not (closed_by == "of" and head in _NOT_BEFORE_OF)
