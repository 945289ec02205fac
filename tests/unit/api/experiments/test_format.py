"""The format of experiments and their cells."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.experiments import Experiment, ExperimentError, FormatError, Selection, cells_of
from api.experiments.format import CellSettings, merge
from api.experiments.yaml_file import parse_yaml
from tests.unit.api.experiments.examples import CONTENT, cells_by_name, experiment

ROOT = Path(__file__).parents[4]


def keys(trial: Experiment) -> dict[str, str]:
    return {cell.name: cell.settings.key for cell in cells_of(trial)}


def changed(before: Experiment, after: Experiment) -> set[str]:
    """Return the names of the cells whose keys differ."""
    old = keys(before)
    new = keys(after)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.name)
def test_example_files_are_valid(file: Path) -> None:
    assert Experiment.load(file).name == file.stem


def test_scalars_have_their_meaning_in_json() -> None:
    text = (
        "a: 1e-3\nb: [no, on, 2024-01-01, 1_000, .inf]\nc: [1, -2.5, .5, 007]\nd: [null, ~, true, False]\ne:\nf: '1'\n"
    )
    assert parse_yaml(text, "x") == {
        "a": 0.001,
        "b": ["no", "on", "2024-01-01", "1_000", ".inf"],
        "c": [1, -2.5, 0.5, 7],
        "d": [None, None, True, "False"],
        "e": None,
        "f": "1",
    }


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "1: 2", "a: [", "a: !!python/name:os.system"])
def test_invalid_yaml_is_rejected(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(FormatError, match=r"x\.yaml is not valid YAML"):
        Experiment.load(file)


def test_experiment_has_a_cell_per_arm_list_and_seed() -> None:
    names = [cell.name for cell in cells_of(experiment())]
    assert names == [
        "shapes/base",
        *("shapes/naive/seed 1", "shapes/fused/seed 1"),
        *("shapes/naive/seed 2", "shapes/fused/seed 2"),
    ]
    assert cells_by_name(experiment())["shapes/fused/seed 2"].file_name == "shapes--fused--seed2.json"
    without_base = experiment(evaluation={"splits": ["held_out"], "include_base": False})
    assert [cell.name for cell in cells_of(without_base)] == names[1:]


def test_settings_of_an_arm_are_merged_into_common_settings() -> None:
    fused = cells_by_name(experiment())["shapes/fused/seed 2"].settings
    training = fused.round
    assert training is not None and training.fusion is not None
    assert (training.seed, training.rounds, training.prompt_set) == (2, 2, "shapes-attribute-train")
    assert (training.training.learning_rate, training.training.lora.rank) == (0.001, 2)
    assert (training.fusion.first_step, training.fusion.merge) == (10, "xor")
    assert training.evaluation is None  # a separate job evaluates
    assert (fused.rounds, fused.splits) == ((2,), {"held_out": "shapes-attribute-test"})
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": None}) == {"a": {"b": 1, "c": [2]}, "d": None}


def test_evaluation_settings_do_not_depend_on_the_sampling_of_an_arm() -> None:
    trial = experiment(arms={"long": {"sampling": {"num_steps": 50}}, "short": {}}, common={"sampling": {"eta": 0.5}})
    assert {(c.settings.measure.sampling.num_steps, c.settings.measure.sampling.eta) for c in cells_of(trial)} == {
        (20, 0.5)
    }


@pytest.mark.parametrize(
    ("change", "cells"),
    [
        ({"arms": CONTENT["arms"] | {"fused": {"fusion": {"first_step": 9}}}}, {"fused/seed 1", "fused/seed 2"}),
        ({"seeds": [1, 3]}, {"naive/seed 2", "fused/seed 2", "naive/seed 3", "fused/seed 3"}),
        ({"arms": CONTENT["arms"] | {"plain": {"fusion": {}}}}, {"plain/seed 1", "plain/seed 2"}),
        (
            {"common": {"rounds": 3, "training": CONTENT["common"]["training"]}},
            {f"{arm}/seed {seed}" for arm in ("naive", "fused") for seed in (1, 2)},
        ),
        ({"name": "other", "description": "different", "seeds": [2, 1]}, set()),
        ({"evaluation": CONTENT["evaluation"] | {"primary": "judge", "comparisons": [["fused", "naive"]]}}, set()),
        ({"common": CONTENT["common"] | {"priority": 5}}, set()),
        # an explicit default has the same key as an omitted setting
        ({"common": CONTENT["common"] | {"pairing": {"base_share": 0.5}}}, set()),
    ],
)
def test_a_change_affects_only_the_keys_of_its_cells(change: dict[str, Any], cells: set[str]) -> None:
    assert changed(experiment(), experiment(**change)) == {f"shapes/{cell}" for cell in cells}


def test_a_new_revision_changes_all_keys_and_labels() -> None:
    after = experiment(revision=1)
    assert changed(experiment(), after) == set(keys(after))
    for name, cell in cells_by_name(experiment()).items():
        other = cells_by_name(after)[name]
        assert (cell.round_label, cell.evaluation_label) != (other.round_label, other.evaluation_label)
        if cell.round_body is not None:
            assert cell.round_body == other.round_body and cell.round_label != other.round_label


def test_a_changed_evaluation_keeps_the_round_job() -> None:
    after = experiment(evaluation=CONTENT["evaluation"] | {"seed": 5})
    assert changed(experiment(), after) == set(keys(after))
    before = cells_by_name(experiment())["shapes/fused/seed 1"]
    assert before.round_body == cells_by_name(after)["shapes/fused/seed 1"].round_body
    assert before.round_label == cells_by_name(after)["shapes/fused/seed 1"].round_label


def test_key_does_not_depend_on_the_order_of_settings() -> None:
    settings = cells_by_name(experiment())["shapes/fused/seed 1"].settings
    shuffled = dict(reversed(settings.model_dump(mode="json").items()))
    assert CellSettings.model_validate(shuffled).key == settings.key
    assert len(set(keys(experiment()).values())) == 5


def test_inline_prompts_have_a_set_name_derived_from_their_content() -> None:
    lists = {
        "own": {"train": ["a red [circle]", {"text": "a blue star", "items": ["star"]}], "held_out": ["a [heart]"]}
    }
    first = experiment(prompt_lists=lists)
    renamed = experiment(prompt_lists={"other": lists["own"]})
    lists["own"]["train"][0] = "a green [circle]"
    second = experiment(prompt_lists=lists)

    def train_set(trial: Experiment, name: str) -> str:
        training = cells_by_name(trial)[f"{name}/naive/seed 1"].settings.round
        assert training is not None and training.prompt_set is not None
        return training.prompt_set

    assert train_set(first, "own") == train_set(renamed, "other") != train_set(second, "own")
    assert train_set(first, "own").startswith("prompts-")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, r"arm: Extra inputs"),
        ({"seeds": []}, r"seeds: "),
        ({"seeds": [1, 1]}, r"seeds: expected each once, got \[1, 1\]"),
        ({"seeds": [True]}, r"seeds: expected a number, got True"),
        ({"name": "a--b"}, r"name: "),
        ({"arms": {"base": {}}}, r"arms: 'base' is the name of the model before training"),
        ({"arms": {"a": {}, "b": None}}, r"arms: a and b have the same settings"),
        ({"arms": {"a": {"training": {"leaning_rate": 1}}}}, r"arms\.a\.training\.leaning_rate: Extra inputs"),
        ({"common": {"pairing": {"x": 1}}}, r"^experiment: common\.pairing\.x: Extra inputs are not permitted$"),
        ({"common": {"training": {"beta": "1"}}}, r"common\.training\.beta: expected a number, got '1'"),
        ({"common": {"seed": 3}}, r"common\.seed: use the experiment's `seeds`"),
        ({"arms": {"a": {"model": "x"}}}, r"arms\.a\.model: use the experiment's `model`"),
        ({"prompt_lists": {"a": {"train": "x"}}}, r"prompt_lists\.a\.held_out: missing"),
        (
            {"prompt_lists": {"a": {"train": "x", "held_out": "x"}}},
            r"prompt_lists\.a: expected held-out prompts that differ",
        ),
        ({"prompt_lists": {"a": {"train": [], "held_out": "x"}}}, r"prompt_lists\.a: expected at least one prompt"),
        ({"evaluation": {"rounds": [1, 3]}}, r"evaluation\.rounds: naive has 2 rounds, got 3"),
        ({"evaluation": {"rounds": [2, 1]}}, r"evaluation\.rounds: expected increasing numbers"),
        ({"common": {"rounds": 17}, "evaluation": {"rounds": "all"}}, r"evaluation\.rounds: expected at most 16"),
        (
            {"evaluation": {"comparisons": [["fused", "plain"]]}},
            r"evaluation\.comparisons: expected two of the arms \['fused', 'naive'\], got \['fused', 'plain'\]",
        ),
        ({"evaluation": {"comparisons": [["naive", "naive"]]}}, r"evaluation\.comparisons: expected two of the arms"),
    ],
)
def test_invalid_settings_are_rejected_with_their_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        experiment(**change)


def test_all_errors_are_reported_together() -> None:
    with pytest.raises(FormatError) as caught:
        experiment(common={"x": 1}, arms={"a": {"y": 2}, "b": {"z": 3}})
    assert {field.pointer for field in caught.value.errors} == {"arms.a.y", "arms.b.z", "common.x"}


def test_selection_chooses_cells() -> None:
    chosen = cells_of(experiment(), Selection(arms=("fused", "base"), seeds=(2,)))
    assert [cell.name for cell in chosen] == ["shapes/base", "shapes/fused/seed 2"]
    for unknown in (Selection(lists=("x",)), Selection(arms=("x",)), Selection(seeds=(9,))):
        with pytest.raises(ExperimentError, match="expected one of"):
            cells_of(experiment(), unknown)


@pytest.mark.slow
def test_runner_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, api.experiments; print(sorted({'torch', 'matplotlib', 'yaml', 'worker'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
