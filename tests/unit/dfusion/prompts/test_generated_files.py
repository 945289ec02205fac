"""Generated prompt files: each is read, or refused with the file and the place in it."""

import itertools
import json
import re
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dfusion.errors import InvalidInputError
from dfusion.prompts import read_prompts

TEXTS = {
    "a [cat] on a [sofa]": ("cat", "sofa"),
    "a zebra underneath a broccoli": ("zebra", "broccoli"),
    "\ufeffa cube made of brick": ("cube", "brick"),
    "a cafe\u0301 with a lamp": ("café", "lamp"),
    "a portrait of a woman, oil painting": ("woman",),
    "a sign that says “Deep Learning”": ("sign",),
    "(red car:1.3), ((best))": ("car",),
    "a dog on a beach": ("dog",),
    "<lora:foo:1> a cat": None,
    "eine Katze auf einem Sofa": None,
    "一只猫坐在沙发上": None,
    "a [cat": None,
    "of in": None,
    "x" * 501: None,
}
"""Prompts and their items. None: refused."""
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le")
ENDS = ("\n", "\r\n", "\r")


def content(form: str, text: str, end: str) -> str:
    if form == "txt":
        return end.join(["# a comment", "", text, "a [hat]"])
    if form == "jsonl":
        return end.join([json.dumps({"prompt": text}, ensure_ascii=False), "", '{"text": "a [hat]"}'])
    return json.dumps({"prompts": [text, {"text": "a [hat]"}]}, ensure_ascii=False, indent=1).replace("\n", end)


def outcome(path: Path) -> list[tuple[str, ...]] | str:
    """The items of the file's prompts, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [prompt.items for prompt in read_prompts(str(path))]
        except InvalidInputError as error:
            assert path.name in str(error)
            return str(error)


@pytest.mark.parametrize("form", ["txt", "jsonl", "json"])
def test_texts_in_every_encoding_and_with_every_line_end(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"pets.{form}"
    count = 0
    for (text, items), encoding, end in itertools.product(TEXTS.items(), ENCODINGS, ENDS):
        data = content(form, text, end).encode(encoding, "replace")
        path.write_bytes(data)
        result = outcome(path)
        count += 1
        try:
            readable = "\0" not in data.decode("utf-8")
        except UnicodeDecodeError:
            readable = False

        if not readable:
            assert re.search(r"expected text in UTF-8, got byte 0x\w\w at line \d+, byte \d+", str(result)), result
        elif encoding.startswith("utf-8"):
            place = {"txt": "line 3", "jsonl": "line 1", "json": "prompt 1"}[form]
            assert result == [items, ("hat",)] if items else place in result, (text, result)
    assert count == len(TEXTS) * 15


def test_texts_in_tables(tmp_path: Path) -> None:
    for n, (text, items) in enumerate(TEXTS.items()):
        path = tmp_path / f"pets-{n}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"caption": ["a [hat]", text]}), path)
        result = outcome(path)
        assert result == [("hat",), items] if items else "row 2" in result, (text, result)
