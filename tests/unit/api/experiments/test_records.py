"""Records: to which cell they belong, and how they are written."""

import json
from pathlib import Path

import pytest

from api.experiments import RecordError, read_record
from api.experiments.records import flatten, json_text, record_of, write_record
from tests.unit.api.experiments.examples import CONTENT, cells_by_name, experiment, record


def test_a_record_belongs_to_one_cell(tmp_path: Path) -> None:
    trial = experiment()
    cell = cells_by_name(trial)["shapes/fused/seed 1"]
    written = record(trial, cell, {2: [0.25, 0.5]})
    assert record_of(tmp_path, cell) is None
    file = write_record(tmp_path, cell, written)
    assert file == tmp_path / "shapes--fused--seed1.json"
    assert record_of(tmp_path, cell) == read_record(file) == written
    for changes in ({"arms": {"fused": {"fusion": {"first_step": 9}}}}, {"evaluation": {"splits": ["train"]}}):
        changed = cells_by_name(experiment(**changes))["shapes/fused/seed 1"]
        assert changed.file_name == file.name and record_of(tmp_path, changed) is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_record_without_a_newer_setting_is_valid_for_its_default() -> None:
    trial = experiment()
    cell = cells_by_name(trial)["shapes/fused/seed 1"]
    written = record(trial, cell, {2: [0.25, 0.5]})
    settings = json.loads(json.dumps(written.settings))
    del settings["round"]["fusion"]["merge"]  # as if the setting were new in this version
    older = written.model_copy(update={"settings": settings})
    assert older.is_of(cell)
    urgent = experiment(common=CONTENT["common"] | {"priority": 5})
    assert written.is_of(cells_by_name(urgent)["shapes/fused/seed 1"])  # a priority changes no results
    united = experiment(arms={"fused": {"fusion": {"first_step": 10, "merge": "or"}}})
    assert not older.is_of(cells_by_name(united)["shapes/fused/seed 1"])
    settings["round"]["fusion"]["gone"] = 1  # a setting that this version does not know
    assert not written.model_copy(update={"settings": settings}).is_of(cell)


def test_an_invalid_record_is_rejected_with_its_file_name(tmp_path: Path) -> None:
    cell = cells_by_name(experiment())["shapes/base"]
    (tmp_path / cell.file_name).write_text('{"format": 1, "experiment": 5')
    with pytest.raises(RecordError, match=r"shapes--base\.json is not a valid record"):
        record_of(tmp_path, cell)


def test_lists_of_numbers_stay_on_one_line() -> None:
    content = {"a": [1, 2.5, None], "b": [{"c": ["x, y", "[z]", 'q"'], "d": []}], "e": {"f": [[1, 2], [3]]}}
    text = json_text(content)
    assert json.loads(text) == content
    assert ' "a": [1, 2.5, null],\n' in text and "[1, 2],\n" in text


def test_flatten_yields_numbers_by_dotted_name() -> None:
    statistics = {"a": 1, "b": {"c": {"d": 0.5, "e": None}, "f": "text"}, "g": True, "h": [1]}
    assert dict(flatten(statistics)) == {"a": 1, "b.c.d": 0.5, "b.c.e": None}
