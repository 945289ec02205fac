"""Encodings, line ends, normal form, languages and the syntax of other programs."""

import pytest

from dfusion.errors import PromptItemsError, TextEncodingError
from dfusion.prompts import Prompt
from dfusion.prompts.items import find_items, parse_marked
from dfusion.prompts.text import decode_utf8, prompt_lines, prompt_warnings


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_utf8_is_decoded_without_its_mark(mark: str) -> None:
    assert decode_utf8(f"{mark}a café\n".encode()) == "a café\n"


@pytest.mark.parametrize(
    ("data", "byte", "place", "hint"),
    [
        ("a cat\na café".encode("cp1252"), "0xe9", "line 2, byte 6", "'é' in Windows-1252"),
        ("a\r\nb\rc “d”".encode("cp1252"), "0x93", "line 3, byte 3", "'“' in Windows-1252"),
        ("\ufeffa cat\nfür".encode() + b"\xfc", "0xfc", "line 2, byte 5", "'ü' in Windows-1252"),
        (b"\xef\xbb\xbf\xff", "0xff", "line 1, byte 4", "Windows-1252"),
        ("a cat".encode("utf-16"), "0xff", "line 1, byte 1", "UTF-16"),
        ("\ufeffa cat".encode("utf-16-be"), "0xfe", "line 1, byte 1", "UTF-16"),
        ("a cat".encode("utf-16-le"), "0x00", "line 1, byte 2", "UTF-16"),
        ("a cat".encode("utf-32"), "0xff", "line 1, byte 1", "UTF-32"),
        (b"a cat\n\0", "0x00", "line 2, byte 1", ""),
    ],
)
def test_another_encoding_is_an_error_with_line_and_byte(data: bytes, byte: str, place: str, hint: str) -> None:
    with pytest.raises(TextEncodingError) as caught:
        decode_utf8(data)
    assert f"got byte {byte} at {place}" in str(caught.value) and hint in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_numbered_and_comments_left_out(end: str) -> None:
    lines = ["\ufeff# comment", "a cat", "", " \ufeff # comment", "\ufeffa dog\ufeff", "a\u2028b"]
    assert list(prompt_lines(end.join(lines))) == [(2, "a cat"), (5, "a dog"), (6, "a\u2028b")]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a cafe\u0301", "a café"),
        ("a man\u0303ana", "a mañana"),
        ("a A\u030angstro\u0308m", "a Ångström"),
        ("\ufeffa cat", "a cat"),
        ("a \u200bcat\ufeff", "a cat"),
        ("a cro\u00adco\u00addile", "a crocodile"),
    ],
)
def test_prompts_are_in_normal_form_c_without_invisible_characters(text: str, clean: str) -> None:
    item = clean.split()[-1]
    assert Prompt(text=text) == Prompt(text=clean, items=(item,))
    assert Prompt(text=text, items=(text.split()[-1],)) == Prompt(text=clean, items=(item,))
    assert Prompt(text=f"a [{text.split()[-1]}]").items == (item,)


@pytest.mark.parametrize(
    "text",
    [
        "一只猫坐在沙发上",
        "猫がソファに座っている",
        "고양이가 소파에 앉아 있다",
        "кошка на диване",
        "قطة على أريكة",
        "eine Katze auf einem Sofa",
        "Der Hund schläft auf dem Teppich",
        "un chat sur une table",
        "un gato y un perro",
        "uma mulher com um chapéu",
        "gatto su una sedia",
        "een kat op de bank",
        "en katt på en stol",
        "một con mèo trên ghế",
    ],
)
def test_items_of_other_languages_must_be_marked(text: str) -> None:
    with pytest.raises(PromptItemsError, match="mark them in brackets"):
        find_items(text)
    with pytest.raises(ValueError, match="mark them in brackets"):
        Prompt(text=text)
    first, *rest = text.split(" ")
    assert Prompt(text=" ".join([f"[{first}]", *rest])).items == (first,)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a café in Rio de Janeiro", ("café", "Janeiro")),
        ("a crème brûlée", ("brûlée",)),
        ("El Capitan", ("Capitan",)),
        ("a sign with 日本 on it", ("sign",)),
        ("a jalapeño and a piñata", ("jalapeño", "piñata")),
    ],
)
def test_foreign_names_and_letters_in_english_prompts_are_no_other_language(text: str, items: tuple[str, ...]) -> None:
    assert find_items(text) == items


@pytest.mark.parametrize(
    ("text", "syntax", "items"),
    [
        ("(red car:1.3), ((best))", ["(red car:1.3)", "((best))"], ("car",)),
        ("a (blue bird : .8) in a tree", ["(blue bird : .8)"], ("bird", "tree")),
        ("a cat BREAK a dog", ["BREAK"], ("cat", "dog")),
        ("a cat AND a dog", ["AND"], ("cat", "dog")),
        ("{{a cat}} on a mat", ["{{a cat}}"], ("cat", "mat")),
        ("a {cat|dog}", ["{cat|dog}"], ("cat", "dog")),
        ("a cat++ and a hat--", ["cat++", "hat--"], ("cat", "hat")),
        ("a (red cat)1.5", [")1.5"], ("cat",)),
        ("a cat::2 a dog::-1", ["cat::2", "dog::-1"], ("cat", "dog")),
        ("a cat --ar 16:9 --v 5", ["--ar 16:9", "--v 5"], ("cat",)),
    ],
)
def test_weighting_syntax_is_warned_about_and_gives_no_items(
    text: str, syntax: list[str], items: tuple[str, ...]
) -> None:
    prompt = Prompt(text=text)
    assert prompt.items == items
    assert list(prompt.warnings) == [f"weighting syntax is read as plain text: {part!r}" for part in syntax]


@pytest.mark.parametrize(("marked", "plain"), [("a [cat:0.9]", "a cat:0.9"), ("a [big cat : 1.2]", "a big cat : 1.2")])
def test_a_weight_is_no_part_of_a_marked_item(marked: str, plain: str) -> None:
    [item] = parse_marked(marked)[1]
    assert item == plain.removeprefix("a ").split(":")[0].strip()
    assert Prompt(text=marked).text == plain


@pytest.mark.parametrize(
    "text", ["a clock at 10:30", "a photo (1990) of a cat", "a cat: a dog", "AC/DC", "a man-made lake"]
)
def test_ordinary_punctuation_is_not_warned_about(text: str) -> None:
    assert prompt_warnings(text) == ()


@pytest.mark.parametrize(
    "tag", ["<lora:foo:1>", "<LoRA:a b:0.5:0.2>", "<lyco:x:1>", "<hypernet:y:1>", "embedding:easy"]
)
def test_tags_that_load_files_are_refused(tag: str) -> None:
    for text in (f"{tag} a cat", f"a [cat], {tag}"):
        with pytest.raises(ValueError, match="loads nothing here: remove it") as caught:
            Prompt(text=text)
        assert repr(tag) in str(caught.value)
    given = Prompt(text=f"a cat {tag}", items=("cat",))  # items are given: the text is taken as it is
    assert [tag in warning for warning in given.warnings] == [True]


def test_a_text_that_is_too_long_is_refused_before_its_items_are_looked_for() -> None:
    with pytest.raises(ValueError, match="at most 500 characters") as caught:
        Prompt(text="a-" * 200_000)
    assert caught.value.error_count() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("cat", "a Cat"),
        ("Red  cat", "a red cat"),
        ("cat", "a wildcat and a cat"),
        ("cat", "(cat:1.2)"),
        ("dog", "a dog's bowl"),
        ("t-shirt", "a t-shirt."),
    ],
)
def test_an_item_is_whole_words_of_the_text(item: str, text: str) -> None:
    assert Prompt(text=text, items=(item,)).items == (item,)


@pytest.mark.parametrize(
    ("item", "text"),
    [("cat", "a caterpillar"), ("cat", "a wildcat"), ("cat", "my_cat"), ("red cat", "a red fat cat"), (" ", "a cat")],
)
def test_an_item_that_is_no_word_of_the_text_is_refused(item: str, text: str) -> None:
    with pytest.raises(ValueError, match="is not in the prompt"):
        Prompt(text=text, items=(item,))
