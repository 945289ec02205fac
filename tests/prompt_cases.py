"""Prompts that people bring, by the rows of the cases page, and what they should get. Expected values are by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptCase:
    """A prompt, and its items and warnings; or the words with which it is refused."""

    given: str
    text: str = ""
    items: tuple[str, ...] = ()
    warned_of: tuple[str, ...] = ()
    refused: str = ""


NFD = "a cafe\u0301"
BRACKETS = "mark them in brackets"
CASES = {
    "a_lora_tag": PromptCase("<lora:foo:1> a cat", refused="'<lora:foo:1>', which loads nothing here"),
    "weights_in_parentheses": PromptCase(
        "(red car:1.3), ((best))",
        "(red car:1.3), ((best))",
        ("car",),
        ("(red car:1.3)", "((best))"),
    ),
    "a_break": PromptCase("a cat BREAK a dog", "a cat BREAK a dog", ("cat", "dog"), ("BREAK",)),
    "a_weight_in_brackets": PromptCase("[cat:0.9]", "cat:0.9", ("cat",), ("cat:0.9",)),
    "a_zebra_underneath_a_broccoli": PromptCase(
        "a zebra underneath a broccoli", "a zebra underneath a broccoli", ("zebra", "broccoli")
    ),
    "a_cube_made_of_brick": PromptCase("a cube made of brick", "a cube made of brick", ("cube", "brick")),
    "a_portrait_with_medium_and_site": PromptCase(
        "a portrait of a woman, oil painting, trending on artstation",
        "a portrait of a woman, oil painting, trending on artstation",
        ("woman",),
    ),
    "a_sign_with_written_words": PromptCase(
        'a sign that says "Deep Learning"', 'a sign that says "Deep Learning"', ("sign",)
    ),
    "a_dog_on_a_beach": PromptCase("a dog on a beach", "a dog on a beach", ("dog",)),
    "a_sentence_in_chinese": PromptCase("一只猫坐在沙发上", refused=BRACKETS),
    "a_sentence_in_german": PromptCase("eine Katze auf einem Sofa", refused=BRACKETS),
    "decomposed_unicode": PromptCase(NFD, "a café", ("café",)),
    "a_byte_order_mark": PromptCase("\ufeffa cat", "a cat", ("cat",)),
}
MARKED_COMMENT = "\ufeff# pets\n\ufeffa [cat]\n\ufeff# more\n"
"""Lines with one prompt. Each line begins with a byte-order mark, as in files that were joined."""
ENCODED = {
    "cp1252": ("a cat\na café\n".encode("cp1252"), "got byte 0xe9 at line 2, byte 6"),
    "utf-16": ("a cat\n".encode("utf-16"), "got byte 0xff at line 1, byte 1"),
}
"""Text files in encodings other than UTF-8, and the error."""
