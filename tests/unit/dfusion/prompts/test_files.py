"""Prompt files as rows: JSON with lists and templates, JSON lines, parquet, data sets of Hugging Face on disk."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dfusion.errors import InvalidInputError
from dfusion.prompts import Prompt, read_prompts
from dfusion.prompts.files import MAX_PROMPTS, expand, prompt_rows

CAT = Prompt(text="a cat on a mat", items=("cat", "mat"))
DOG = Prompt(text="a brown dog", items=("brown dog",), thresholds=(0.02,))
ROWS: list[dict[str, Any]] = [
    {"text": CAT.text, "items": None, "thresholds": None, "tag": "x"},
    {"text": DOG.text, "items": ["brown dog"], "thresholds": [0.02], "tag": "y"},
]


def save_to_disk(folder: Path, tables: list[pyarrow.Table], **state: Any) -> Path:
    """Write the files that `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir()
    files = []
    for n, table in enumerate(tables):
        name = f"data-{n:05}-of-{len(tables):05}.arrow"
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
        files.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_the_same_prompts_from_every_format(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "pets.parquet")
    (tmp_path / "pets.jsonl").write_text("\ufeff" + "\r\n\n".join(map(json.dumps, ROWS)), "utf-8")
    (tmp_path / "pets.json").write_text(json.dumps([CAT.text, DOG.model_dump()]))
    folder = save_to_disk(tmp_path / "pets", [table.slice(0, 1), table.slice(1)])
    for source in (folder, *sorted(tmp_path.glob("pets.*"))):
        assert read_prompts(str(source)) == (CAT, DOG), source


@pytest.mark.parametrize("column", ["prompt", "Prompt", "caption", "TEXT"])
def test_the_text_can_be_named_as_in_public_sets(tmp_path: Path, column: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({column: [CAT.text], "image": [b"0"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({column: CAT.text, "seed": 3}))
    for name in ("a.parquet", "a.jsonl"):
        assert read_prompts(str(tmp_path / name)) == (CAT,)


def test_a_template_is_expanded_with_every_combination() -> None:
    lists = {"animal": ["cat", "dog"], "place": ["on a [mat]", "asleep"], "unused": ["x"]}
    assert list(expand("a [{animal}] {place}", lists)) == [
        "a [cat] on a [mat]",
        "a [cat] asleep",
        "a [dog] on a [mat]",
        "a [dog] asleep",
    ]
    assert list(expand("a {animal} and a red {animal}", lists)) == ["a cat and a red cat", "a dog and a red dog"]
    assert list(expand("a [cow]", lists)) == ["a [cow]"]


def test_templates_of_a_file(tmp_path: Path) -> None:
    content = {"description": "Pets", "templates": ["a [{pet}] in a hat", "a {pet}"], "lists": {"pet": ["cat", "dog"]}}
    (tmp_path / "pets.json").write_text(json.dumps(content))
    prompts = read_prompts(str(tmp_path / "pets.json"))
    assert [prompt.text for prompt in prompts] == ["a cat in a hat", "a dog in a hat", "a cat", "a dog"]
    assert [prompt.items for prompt in prompts] == [("cat",), ("dog",)] * 2
    assert prompt_rows(tmp_path / "pets.json").description == "Pets"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"templates": ["a {pet}"]}, "expected a list of values 'pet', got the lists none"),
        ({"templates": ["a {pet}"], "lists": {"pet": []}}, "expected a list of values 'pet', got the lists pet"),
        ({"templates": "a {pet}", "lists": {"pet": ["cat"]}}, "templates: expected a list of texts"),
        ({"templates": ["a {pet}"], "lists": {"pet": "cat"}}, "lists: expected an object of lists of texts"),
        ({"templates": ["a {a}{b}{c}"], "lists": {key: list(map(str, range(30))) for key in "abc"}}, "at most 10000"),
        ({"templates": ["a cat"], "prompts": ["a cat"]}, "or with `templates` and `lists`"),
        ({"name": "x"}, "or with `templates` and `lists`"),
        ({"prompt": ["a cat"]}, "or with `templates` and `lists`"),
        ({"prompts": "a cat"}, "or with `templates` and `lists`"),
        ([3], "got 3 in it"),
        ("a cat", "or with `templates` and `lists`"),
        ([{"text": "a cat", "item": "cat"}], "prompt 1"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    (tmp_path / "pets.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(str(tmp_path / "pets.json"))
    assert problem in str(caught.value) and "pets.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "a cat"}\n{', "line 2: expected JSON"),
        ("a.jsonl", b'{"text": "a cat"}\n\n[1]', "line 3: expected a text or an object"),
        ("a.jsonl", b'{"label": "a cat"}', "line 1: expected text or prompt or caption"),
        ("a.jsonl", b'"a cat"\n"a [dog"', "line 2: "),
        ("a.jsonl", b'{"text": "a cat", "items": "cat"}', "line 1: items: Input should be a valid tuple"),
        ("a.jsonl", b"[" * 5000, "line 1: expected JSON"),
        ("a.jsonl", b'"a cat"\n"a caf\xe9"', "byte 0xe9 at line 2, byte 7"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1", "expected a parquet file"),
        ("a.txt", b"a cat\na [dog", "line 2: "),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(str(tmp_path / name))
    assert problem in str(caught.value)


def test_tables_without_prompts_are_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": ["a cat"]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match=r"expected a column text or prompt or caption, got \['label'\]"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_the_number_of_rows_is_limited(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "many", [pyarrow.table({"text": ["a cat"] * (MAX_PROMPTS // 2)})] * 2)
    assert len(prompt_rows(folder).rows) == MAX_PROMPTS
    larger = save_to_disk(tmp_path / "more", [pyarrow.table({"text": ["a cat"] * (MAX_PROMPTS + 1)})])
    with pytest.raises(InvalidInputError, match="at most 10000 prompts"):
        prompt_rows(larger)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a cat"]})
    indexed = save_to_disk(tmp_path / "indexed", [table], _indices_data_files=[{"filename": "indices.arrow"}])
    listed = save_to_disk(tmp_path / "listed", [table], _data_files=3)
    damaged = save_to_disk(tmp_path / "damaged", [table])
    (damaged / "data-00000-of-00001.arrow").write_bytes(b"0" * 64)
    outside = save_to_disk(
        tmp_path / "outside", [table], _data_files=[{"filename": "../listed/data-00000-of-00002.arrow"}]
    )
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    problems = {
        tmp_path: "with state.json",
        indexed: "flatten_indices",
        listed: "state.json: expected _data_files",
        damaged: "expected an Arrow stream",
        outside: "No such file",
        splits: "folder of one split",
    }
    for folder, problem in problems.items():
        with pytest.raises(InvalidInputError, match=problem):
            read_prompts(str(folder))


def test_syntax_that_is_read_as_plain_text_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "pets.txt").write_text("# weights\na (red cat:1.3)\na dog\n")
    with pytest.warns(UserWarning, match=r"pets.txt: 'a \(red cat:1.3\)': weighting syntax") as caught:
        prompts = read_prompts(str(tmp_path / "pets.txt"))
    assert len(prompts) == 2 and len(caught) == 1
