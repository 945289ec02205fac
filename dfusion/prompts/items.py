"""The items of a user's own prompt: marked in brackets, or detected among its words (Eq. 4). Does not import torch.

Detection needs no language model. English noun phrases end at a small closed set of words (articles, prepositions,
conjunctions, auxiliaries), at a verb or at a participle. The noun is the last word of the phrase. Colours, materials
and other adjectives precede it, so they are never items. Words that ask for no thing are left out: the medium and the
style of the image, written text, what is absent, positions and times. `python -m benchmarks.item_finding` measures how
often the result is right. To choose other words, mark them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dfusion.errors import PromptItemsError
from dfusion.prompts import lexicon
from dfusion.prompts.text import is_english, is_latin, without_syntax

Tagger: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
"""Gives the part of speech of each word of a prompt, named as in Universal Dependencies: NOUN, ADJ, VERB …"""
Role = Literal["noun", "modifier", "end"]
_ROLES: dict[str, Role] = {"NOUN": "noun", "PROPN": "noun", "ADJ": "modifier", "NUM": "modifier", "ADV": "modifier"}
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")
_NAME = r"(?:[A-Z0-9][\w'!&-]*,?(?: |$))+"
_NOT_ASKED = tuple(
    re.compile(pattern)
    for pattern in (
        # written text: 'START', "Deep Learning", a sign that says Deep Learning, graffiti spelling BE KIND
        r"\"[^\"]*\"|\u201c[^\u201d]*\u201d|\u2018[^\u2019]*\u2019(?!\w)|(?<!\w)'[^']+'(?!\w)",
        rf"\b(?:says|saying) {_NAME}",
        r"\b(?P<kept>reads|reading|spells|spelling|labelled|labeled|words?|letters?) [A-Z]+\b(?: [A-Z]+\b)*",
        # the style of the image: in the style of Hokusai; in synthwave style; in Chinese painting
        r"(?i)\b(?:in|by|after)? ?(?:the |a |an )?(?:[\w-]+ )?styles? of [^.,;]*",
        r"(?i)\bin (?:the |a |an )?(?:[\w-]+ ){1,3}style\b",
        rf"(?i)\bin (?:an? )?(?:[\w-]+ )?(?:{'|'.join(sorted(lexicon.MEDIA))})(?=\s*(?:[.,;]|$))",
        rf"(?i)\b(?:{'|'.join(sorted(lexicon.MATERIALS))})s? on (?:canvas|paper|panel|wood)\b",
        r"(?i)[.,;|]\s*(?:(?:art |painting )?by|trending on|featured on|inspired by|shot (?:on|with)) [^.,;]*",
        rf"(?i)(?<=\w)(?P<kept> (?:{'|'.join(sorted(lexicon.MEDIA))})) by [^.,;]*",
    )
)
_WEIGHT = re.compile(r"\s*:\s*\d*\.?\d+$")
"""The weight of "[cat:0.9]", which is no part of the item."""
_POSSESSIVE_SIGN = re.compile(r"(?<=s)['\u2019](?= )")
"""It would close the phrase: "the dogs' bowl"."""


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
            item = _WEIGHT.sub("", " ".join(plain[start:].split()))
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


@dataclass(frozen=True)
class _Phrase:
    """A noun phrase.

    Attributes:
        nouns: Its nouns; the last one is its head.
        opener: The word before the phrase and its article: a preposition, a verb, a punctuation mark. "" if there is
            none.
        article: The article or number that begins it, or "".
        closer: The word after the phrase.
        absent: Whether the prompt says that the thing is absent: "without students".
    """

    nouns: tuple[str, ...]
    opener: str
    article: str
    closer: str
    absent: bool

    @property
    def head(self) -> str:
        return self.nouns[-1].casefold()


def find_items(text: str, tag: Tagger | None = None) -> tuple[str, ...]:
    """The nouns of an English prompt that ask for a thing, each once, in order: the last word of every noun phrase.

    "a black and woolen bus" gives ("bus",); "a teddy bear riding a red bike" gives ("bear", "bike"). Places and times
    are items only if there is nothing else: "a dog on a beach" gives ("dog",).

    Args:
        text: The prompt.
        tag: A part-of-speech tagger to use instead of the rules for nouns, verbs and adjectives.

    Raises:
        PromptItemsError: There is no noun, or the prompt is not English.
    """
    if not is_english(text):
        raise PromptItemsError(
            f"items are found in English prompts only: mark them in brackets, as in 'a [cat]'; got {text!r}"
        )

    items: dict[str, str] = {}
    rest: dict[str, str] = {}
    for phrase in _phrases(_without_what_is_not_asked(without_syntax(text)), tag):
        kind = _kind(phrase, bool(items))
        if kind == "thing":
            items.setdefault(phrase.head, phrase.nouns[-1])
        elif kind == "setting":
            rest.setdefault(phrase.head, phrase.nouns[-1])

    found = items or rest
    if not found:
        raise PromptItemsError(f"expected a prompt that names a thing, got none; mark it, as in 'a [cat]': {text!r}")
    return tuple(found.values())


def _without_what_is_not_asked(text: str) -> str:
    """The text with commas instead of written text, style and the like."""
    for pattern in _NOT_ASKED:
        text = pattern.sub(lambda match: match.groupdict().get("kept", "") + " , ", text)
    return _POSSESSIVE_SIGN.sub("", text)


def _phrases(text: str, tag: Tagger | None) -> Iterator[_Phrase]:
    words = _WORD.findall(text)
    tags = tag(words) if tag else [None] * len(words)
    words += [".", ".", "."]  # a full stop closes the last phrase
    nouns: list[str] = []
    opener = ""
    article = ""
    absent = False
    for word, following, second, part in zip(words, words[1:], words[2:], [*tags, None], strict=False):
        low = word.casefold()
        if part is None:
            role = _role(word, following.casefold(), second.casefold(), opener, article, nouns)
        else:
            role = _tagged_role(low, part, nouns)
        if role == "noun":
            nouns.append(word)
        if role != "end":
            continue

        if nouns:
            yield _Phrase(tuple(nouns), opener, article, low, absent)
            absent = absent and low in ("of", "or", "and")
            opener = ""
        elif low in ("a", "an", "the"):
            absent = False
        absent = absent or low in lexicon.NEGATIONS
        if low in lexicon.DETERMINERS:
            article = low
        else:
            opener = low
            article = ""
        nouns = []


def _role(word: str, following: str, second: str, opener: str, article: str, nouns: list[str]) -> Role:
    """A word's role in its phrase. `following` and `second` are the next words; `nouns` are those before it."""
    low = word.casefold()
    if _closes(low) or _is_verb(low, following, opener, article, nouns):
        return "end"

    alone = not nouns and _ends_before(following, second)
    if low in lexicon.PAINTED_WITH and following in lexicon.MEDIA:
        return "modifier"  # "an oil painting"
    if low in lexicon.MEDIA and following not in lexicon.DETERMINERS:
        return "noun"  # "a painting of a dog", unlike "a dog painting a wall"
    if _is_participle(low):
        if low.endswith("ing") and ((alone and article in lexicon.ARTICLES) or following == "of"):
            return "noun"  # "the painting", "an oil painting of"
        return "end" if nouns else "modifier"  # "a cat eating fish", "a running dog"
    if low in lexicon.ADJECTIVES:
        begun = article or nouns or opener in ("of", "from")
        is_noun = low in lexicon.NOUN_ADJECTIVES and _ends_before(following, second) and begun
        return "noun" if is_noun else "modifier"  # "an orange on a plate", "scrap metal", "made of gold"

    adverb = low.endswith("ly") and not low.endswith("fly") and low not in lexicon.LY_NOUNS
    quality = low.endswith(("less", "ous", "esque", "like")) and len(low) > 5
    number = low.isdigit() or (any(character.isdigit() for character in low) and not word[0].isupper())
    return "modifier" if adverb or quality or number else "noun"


def _tagged_role(low: str, part: str, nouns: list[str]) -> Role:
    if low in lexicon.DETERMINERS or low in lexicon.CONNECTIVES or not low[0].isalnum():
        return "end"
    return "modifier" if part == "VERB" and not nouns else _ROLES.get(part, "end")


def names_no_thing(word: str) -> bool:
    """Whether the word cannot be an item because it is an article, a preposition, a verb or similar."""
    return _closes(word.casefold())


def _closes(low: str) -> bool:
    """Whether this word always ends a noun phrase."""
    return low in lexicon.DETERMINERS or low in lexicon.CONNECTIVES or low in lexicon.VERBS or not low[0].isalnum()


def _is_verb(low: str, following: str, opener: str, article: str, nouns: list[str]) -> bool:
    """Whether a word that can be a noun is the verb of the phrase before it."""
    if not nouns:  # "who looks", "they fight"
        subject = article or opener
        return (low in lexicon.NOUN_LIKE_VERBS and subject in lexicon.SINGULAR_SUBJECTS) or (
            low in lexicon.NOUN_LIKE_BASES and subject in lexicon.PLURAL_SUBJECTS
        )
    if low in lexicon.NOUN_LIKE_VERBS:  # "a man watches the sea", unlike "two gold watches"
        return article in lexicon.SINGULAR_DETERMINERS or following in lexicon.DETERMINERS
    return low in lexicon.NOUN_LIKE_BASES and _is_plural(nouns[-1].casefold())  # "two dogs fight"


def _is_plural(low: str) -> bool:
    return low in ("men", "women", "children", "people") or (low.endswith("s") and not low.endswith(("ss", "us", "is")))


def _ends_before(following: str, second: str) -> bool:
    """Whether a phrase ends before these words. After "and" or a comma, adjectives may follow: "a red and wooden"."""
    if following in ("and", "or", ","):
        return second in lexicon.DETERMINERS
    return _closes(following) or _is_participle(following)


def _is_participle(low: str) -> bool:
    if low in lexicon.PARTICIPLES:
        return True
    if len(low) <= 4 or low in lexicon.ING_NOUNS or low in lexicon.ED_NOUNS:
        return False
    return low.endswith("ing") or (low.endswith("ed") and not low.endswith("eed"))


def _kind(phrase: _Phrase, has_things: bool) -> Literal["thing", "setting", "none"]:
    """What a phrase is: a thing, a setting (an item only if there is no thing), or none of both."""
    head = phrase.head
    of = phrase.closer == "of"
    alone = len(phrase.nouns) == 1
    after_preposition = phrase.opener in lexicon.PREPOSITIONS and phrase.opener not in ("of", "with")
    if not (head.isascii() or all(map(is_latin, filter(str.isalpha, head)))):
        return "none"
    if phrase.absent or head in lexicon.NEVER_ITEMS or (of and head in lexicon.NOT_BEFORE_OF):
        return "none"
    if head in lexicon.POSITIONS and alone and after_preposition:
        return "none"

    if head in lexicon.MEDIA and _is_medium(phrase, has_things):
        return "setting"
    if head in lexicon.TIMES or head in lexicon.WRITING:
        return "setting"
    if head in lexicon.SCENERY and phrase.opener in lexicon.SURROUNDING:
        return "setting"
    return "thing"


def _is_medium(phrase: _Phrase, has_things: bool) -> bool:
    """Whether the phrase is the image itself ("a photo of a cat", "a cat, oil painting"), not a thing in it."""
    if has_things:
        return phrase.opener in (".", ",", ";", "|", "-", "\u2013", "\u2014") and not phrase.article
    return phrase.closer in ("of", "showing", "depicting", "featuring", "that", "which", "with", ",", ".")
