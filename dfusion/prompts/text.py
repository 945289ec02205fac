"""The text of prompts: encoding, lines, normal form, language, syntax of other programs. Does not import torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from dfusion.errors import TextEncodingError

_LINE_END = re.compile(r"\r\n|\r|\n")
_BYTES_LINE_END = re.compile(rb"\r\n|\r|\n")
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u2060\u00ad"))
"""Byte-order mark, zero-width space, word joiner and soft hyphen: they show nothing, and change the tokens."""
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

_ADAPTER = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>|\bembedding:[^\s,]+", re.IGNORECASE)
_MAY_BE_SYNTAX = re.compile(r"[(<{:]|\+\+|--|__|BREAK|AND|embedding:", re.IGNORECASE)
"""Most prompts have none of these, so that the slower patterns are not needed."""
_WEIGHTING = re.compile(
    r"\([^()]*:\s*\d*\.?\d+\s*\)"  # (red car:1.3)
    r"|\(\([^()]*\)+|\{\{[^{}]*\}+"  # ((best)), {{best}}
    r"|[\w-]+:\d*\.\d+\b"  # cat:0.9, once [cat:0.9]
    r"|\w+(?:\+\+|--)(?=[\s,.)]|$)|\)(?:[+-]+|\d*\.\d+)"  # cat++, (red cat)1.2
    r"|(?<!\S)(?:BREAK|AND)(?!\S)"
    r"|(?<!\S)--[a-z]\w*(?: [\w:.]+)?"  # --ar 16:9
    r"|\w*::-?\d*\.?\d*"  # cat::2
    r"|__\w+?__|\{[^{}]*\}"  # __animal__, {cat|dog}
)

_FOREIGN_WORDS = frozenset(
    # German, Dutch, Scandinavian
    "der das dem den ein eine einen einem einer und mit auf im unter über neben ist sitzt zwei drei het een naar onder "
    "naast ett på med bredvid og et ved "
    # French, Spanish, Italian, Portuguese, Romanian
    "le la les un une des du de et avec sur dans el los las una unos y con sobre en del il lo gli uno e della nel "
    "sulla os um uma com em da na sob și "
    # Polish, Czech, Turkish, Indonesian, Vietnamese
    "w z na się ve bir ile seekor sebuah di dengan một và trên của".split()
)
_IN_NAMES = frozenset("de del della la le el los las da di du der den y e et und".split())
_ENGLISH_WORDS = frozenset(
    "a an the of in on with and at to for from by under over is are its his her their that this two three no i do as "
    "it".split()
)


def decode_utf8(data: bytes) -> str:
    """The text of UTF-8 bytes, without a byte-order mark.

    Raises:
        TextEncodingError: The bytes are no UTF-8, or contain a NUL. The message names line and byte.
    """
    try:
        text = data.decode("utf-8-sig")
        position = data.find(b"\0")
        if position < 0:
            return text
    except UnicodeDecodeError as error:
        # "utf-8-sig" counts from the end of the mark
        position = error.start + 3 * data.startswith(b"\xef\xbb\xbf")
    raise TextEncodingError(_encoding_problem(data, position))


def _encoding_problem(data: bytes, position: int) -> str:
    before = _BYTES_LINE_END.split(data[:position])
    problem = (
        f"expected text in UTF-8, got byte 0x{data[position]:02x} at line {len(before)}, byte {len(before[-1]) + 1}"
    )
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and data[position] == 0:
        encoding = "UTF-16" if data[:64].count(0) > 1 else None
    if encoding is not None:
        return f"{problem}; the file is probably {encoding}: save it as UTF-8"

    windows = data[position : position + 1].decode("cp1252", "replace")
    return f"{problem}, which is {windows!r} in Windows-1252: save the file as UTF-8" if data[position] else problem


def clean(text: str) -> str:
    """The text in Unicode's normal form C, without invisible characters such as byte-order marks."""
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE))


def prompt_lines(text: str) -> Iterator[tuple[int, str]]:
    """The number and the prompt of each line. Blank lines and lines that begin with # are left out."""
    for number, line in enumerate(split_lines(text), start=1):
        prompt = clean(line).strip()
        if prompt and not prompt.startswith("#"):
            yield number, prompt


def split_lines(text: str) -> list[str]:
    r"""The lines of a text. They end at \n, \r\n or \r."""
    return _LINE_END.split(text)


def adapter_syntax(text: str) -> str | None:
    """The first part of the text that loads an adapter or an embedding in other programs, such as <lora:…>."""
    match = _ADAPTER.search(text)
    return match[0] if match else None


def prompt_warnings(text: str) -> tuple[str, ...]:
    """What a prompt contains that other programs interpret, and that the text encoder reads as plain text here."""
    if not _MAY_BE_SYNTAX.search(text):
        return ()
    warnings = [f"{match[0]!r} loads nothing here; it is read as plain text" for match in _ADAPTER.finditer(text)]
    for match in _WEIGHTING.finditer(_ADAPTER.sub(" ", text)):
        warnings.append(f"weighting syntax is read as plain text: {match[0].strip()!r}")
    return tuple(warnings)


def without_syntax(text: str) -> str:
    """The text with commas instead of weights, options and adapters of other programs, to find its items."""
    text = _ADAPTER.sub(" , ", text)
    text = re.sub(r"(?<!\S)(?:--[a-z]\w*(?: [\w:.]+)?|BREAK(?!\S))", " , ", text)
    return re.sub(r"(?<=[\w)]):[\d.]+|::-?[\d.]*", " , ", text)


def is_english(text: str) -> bool:
    """Whether the prompt is probably English: in Latin letters, without many articles and prepositions of others."""
    letters = [] if text.isascii() else [character for character in text if character.isalpha()]
    latin = sum(is_latin(letter) for letter in letters)
    if 2 * latin < len(letters):
        return False

    words = re.findall(r"[^\W\d_]+", text)
    english = sum(word.casefold() in _ENGLISH_WORDS for word in words)
    foreign = sum(_is_foreign(words, n) for n in range(len(words)))
    return foreign <= english


def is_latin(letter: str) -> bool:
    """Whether a letter belongs to the Latin script."""
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


def _is_foreign(words: list[str], n: int) -> bool:
    """Whether a word is an article, a preposition or similar of another language, and not part of a name."""
    word = words[n]
    low = word.casefold()
    if low not in _FOREIGN_WORDS or low in _ENGLISH_WORDS:
        return False

    before_name = n + 1 < len(words) and words[n + 1][0].isupper()
    in_name = low in _IN_NAMES and (word[0].isupper() or (n > 0 and words[n - 1][0].isupper()))
    return not (before_name and in_name)  # "Rio de Janeiro", "El Capitan"
