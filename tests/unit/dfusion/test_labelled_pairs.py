"""Labelled pairs of other projects: Pick-a-Pic's parquet, D3PO's votes."""

from __future__ import annotations

import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dfusion.config import TrainingConfig
from dfusion.errors import InvalidInputError
from dfusion.labelled_pairs import LabelledPair, read_labelled_pairs
from dfusion.preference_data import PreferencePair, write_preferences
from dfusion.training_data import check_examples


def picture(grey: int, form: str = "JPEG", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(buffer, form)
    return buffer.getvalue()


def row(label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    other = None if label is None else 1 - label
    fields = {"jpg_0": picture(200), "jpg_1": picture(50, "PNG", (4, 6)), "label_0": label, "label_1": other}
    return {"ranking_id": 7, "user_id": 3, "caption": "a cat", "model_0": "sd", **fields} | changes


def parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "picks.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_pick_a_pics_layout_is_read_with_ties_and_pairs_without_a_label(tmp_path: Path) -> None:
    rows = [row(1.0), row(0.0, caption="a dog"), row(0.5), row(None), row(1.0, has_label=False)]
    path = parquet(tmp_path, *({"has_label": True, **fields} for fields in rows))
    pairs = list(read_labelled_pairs(path))
    assert [pair.label for pair in pairs] == [1, 0, 0.5, None, None]
    assert [pair.caption for pair in pairs][:2] == ["a cat", "a dog"]
    assert pairs[1].place == "picks.parquet: row 2"
    first, second = pairs[0].pixels()
    assert (first.shape, second.shape) == ((8, 8, 3), (6, 4, 3))
    assert abs(int(first.mean()) - 200) < 3 and second.mean() == 50


def test_a_folder_of_parquet_files_is_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        parquet(tmp_path, row(caption=name)).rename(tmp_path / f"{name}.parquet")
    places = [(pair.place, pair.caption) for pair in read_labelled_pairs(tmp_path)]
    assert places == [("a.parquet: row 1", "a"), ("b.parquet: row 1", "b")]


def test_images_that_hugging_face_wraps_are_read(tmp_path: Path) -> None:
    wrapped = {name: {"bytes": picture(grey), "path": None} for name, grey in (("jpg_0", 10), ("jpg_1", 90))}
    [pair] = read_labelled_pairs(parquet(tmp_path, row(**wrapped)))
    assert pair.images == (picture(10), picture(90))


def test_our_own_parquet_is_read(tmp_path: Path) -> None:
    own = PreferencePair("p", "a cat", (picture(9), picture(8)), ("target", "base"), (1, 2), (0.5, 0.25), "clip@1")
    write_preferences(tmp_path / "own.parquet", [own])
    [pair] = read_labelled_pairs(tmp_path / "own.parquet")
    assert (pair.caption, pair.images, pair.label) == ("a cat", own.images, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_1": 1.0}, r"expected label_0 and label_1 of 1 and 0, 0 and 1 or 0.5 twice, got \(1.0, 1.0\)"),
        ({"label_0": 0.0}, r"got \(0.0, 0.0\)"),
        ({"label_1": None}, r"got \(1.0, None\)"),
        ({"label_0": float("nan")}, r"got \(nan, 0.0\)"),
        ({"jpg_1": None}, "jpg_1: expected an encoded image, got None"),
        ({"jpg_0": b""}, "jpg_0: expected an encoded image"),
        ({"caption": None}, "caption: expected a text, got None"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^picks.parquet: row 2: .*{message}"):
        list(read_labelled_pairs(parquet(tmp_path, row(), row(**changes), row())))


@pytest.mark.parametrize("broken", [b"no image", picture(200, size=(64, 64))[:-40], picture(50, "PNG")[:50]])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, broken: bytes) -> None:
    _, pair = read_labelled_pairs(parquet(tmp_path, row(), row(jpg_1=broken)))
    with pytest.raises(InvalidInputError, match=r"^picks.parquet: row 2: jpg_1: expected an image that decodes"):
        pair.pixels()


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    columns = {name: value for name, value in row().items() if name not in ("label_1", "caption")}
    with pytest.raises(
        InvalidInputError, match=r"picks.parquet: expected Pick-a-Pic's columns .*got no label_1, caption"
    ):
        list(read_labelled_pairs(parquet(tmp_path, columns)))
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InvalidInputError, match=r"^broken.parquet: expected a parquet file"):
        list(read_labelled_pairs(path))


def test_a_file_without_pairs_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, row())
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(InvalidInputError, match=r"^picks.parquet: expected at least one pair, got none"):
        list(read_labelled_pairs(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.parquet", r"expected a file or folder at .*none\.parquet, got none"),
        ("folder.parquet", "folder.parquet: expected a parquet file: .*is a directory"),
        ("pairs.csv", "pairs.csv: expected parquet in Pick-a-Pic's layout, or D3PO's votes as JSON$"),
        ("sample.pkl", "a pickle is never read"),
        ("votes.json", "votes.json: D3PO's JSON has votes only, neither images nor prompts: also name the folder"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    for present in ("pairs.csv", "sample.pkl", "votes.json"):
        (tmp_path / present).touch()
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InvalidInputError, match=message):
        list(read_labelled_pairs(tmp_path / name))


def test_memory_is_bounded_by_the_row_groups_of_a_file(tmp_path: Path) -> None:
    """8 row groups of 3.2 MB; what follows the end of an image is ignored, as decoders do."""
    rows = [row(jpg_0=picture(n) + os.urandom(200_000), jpg_1=picture(n) + os.urandom(200_000)) for n in range(64)]
    path = tmp_path / "large.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, 8, compression=None, use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 8 and path.stat().st_size > 25_000_000
    del rows

    before = pyarrow.total_allocated_bytes()
    most = 0
    for pair in read_labelled_pairs(path):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        assert pair.label == 1
    assert most < 16_000_000


def votes(folder: Path, *people: Any, prompts: Any = ("a hand", "a foot")) -> tuple[Path, Path]:
    """The votes of several people on three images of each prompt, and the folder of the samples."""
    source, samples = folder / "votes", folder / "samples"
    source.mkdir()
    (samples / "images").mkdir(parents=True)
    for number, vectors in enumerate(people):
        (source / f"{number}.json").write_text(json.dumps(vectors), "utf-8")
    (samples / "prompt.json").write_text(json.dumps(prompts), "utf-8")
    for number in range(6):
        (samples / "images" / f"{number:05}.png").write_bytes(picture(number * 10, "PNG"))
    return source, samples


def test_d3pos_votes_are_read_as_the_pairs_of_each_prompts_images(tmp_path: Path) -> None:
    """The means are 1, 0.5, 0.5 and, where one person has not voted on the second prompt, that one is left out."""
    source, samples = votes(tmp_path, [[1, 0, 1], [0, 0, 1]], [[1, 1, 0]])
    pairs = list(read_labelled_pairs(source, samples))
    assert [(pair.caption, pair.label) for pair in pairs] == [("a hand", 1), ("a hand", 1), ("a hand", 0.5)]
    assert [tuple(int(image[0, 0, 0]) for image in pair.pixels()) for pair in pairs] == [(0, 10), (0, 20), (10, 20)]

    [*_, last] = read_labelled_pairs(source / "0.json", samples)
    assert (last.place, last.caption, last.label) == ("0.json: row 2, images 2 and 3", "a foot", 0)
    assert [int(image[0, 0, 0]) for image in last.pixels()] == [40, 50]


@pytest.mark.parametrize(
    ("people", "message"),
    [
        ([{"a": 1}], r"0.json: expected D3PO's votes: a list with one list of two or more numbers a prompt, got"),
        ([[1, 0, 1]], "0.json: expected D3PO's votes"),
        ([[]], "0.json: expected D3PO's votes"),
        ([[[1]]], "0.json: expected D3PO's votes"),
        ([[[1, 0, 1], [1, 0]]], r"0.json: row 2: expected 3 finite numbers, as in row 1, got \[1, 0\]"),
        ([[[1, 0, 1], [1, 0, "1"]]], "0.json: row 2: expected 3 finite numbers"),
        ([[[1, 0, 1], [1, 0, float("nan")]]], "0.json: row 2: expected 3 finite numbers"),
        ([[[1, 0, 1], [1, 0, 10**400]]], "0.json: row 2: expected 3 finite numbers"),
        ([[[1, 0, 1]], [[1, 0]]], "1.json: expected votes on 3 images a prompt, as in 0.json, got 2"),
        ([[[1, 0, 1]] * 3], "0.json: expected votes on at most 2 prompts, got 3"),
        ([[[1, 0, 1, 1]] * 2], "0.json: row 2: expected the image 00006.png: No such file"),
        ([], "expected JSON files with votes, got none"),
    ],
)
def test_bad_votes_are_named(tmp_path: Path, people: list[Any], message: str) -> None:
    source, samples = votes(tmp_path, *people)
    with pytest.raises(InvalidInputError, match=message):
        list(read_labelled_pairs(source, samples))


def test_bad_prompts_of_d3po_are_named(tmp_path: Path) -> None:
    source, samples = votes(tmp_path, [[1, 0, 1]], prompts={"a": "hand"})
    with pytest.raises(InvalidInputError, match=r"prompt.json: expected a list of texts"):
        list(read_labelled_pairs(source, samples))
    for content in (b"[", '["a"]'.encode("utf-16")):
        (samples / "prompt.json").write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"prompt.json: expected JSON"):
            list(read_labelled_pairs(source, samples))


@pytest.mark.parametrize(("algorithm", "kind"), [("dpo", "TrainingPair"), ("ddpo", "TrainingSample")])
def test_a_training_refuses_a_labelled_pair_and_says_why(algorithm: Any, kind: str) -> None:
    pair = LabelledPair("picks.parquet: row 1", "a cat", (picture(1), picture(2)), 1)
    message = (
        rf"examples\[0\]: {algorithm} learns from {kind}, got a labelled pair \(picks.parquet: row 1\): it has images"
    )
    with pytest.raises(InvalidInputError, match=message + ".*needs the denoising steps"):
        check_examples([pair], TrainingConfig(algorithm=algorithm), 4)  # type: ignore[list-item]


def script_batch(path: Path, resolution: int = 8) -> tuple[np.ndarray, list[str]]:
    """What Diffusion-DPO's training script makes of a file: pixels (N, 6, resolution, resolution), and captions.

    Its columns and steps, without torch: RGB; the shorter side scaled to the resolution, the centre cropped; [-1, 1];
    the preferred image first, in the channels. The second column is the caption if its name is not given.
    """
    table = pyarrow.parquet.read_table(path)
    stacked = []
    for example in table.to_pylist():
        sides = []
        for column in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(example[column])).convert("RGB")
            scale = resolution / min(image.size)
            width, height = (round(side * scale) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - resolution) // 2, (height - resolution) // 2
            cropped = image.crop((left, top, left + resolution, top + resolution))
            sides.append(np.asarray(cropped, np.float32).transpose(2, 0, 1) / 127.5 - 1)
        ordered = sides[::-1] if example["label_0"] == 0 else sides
        stacked.append(np.concatenate(ordered))
    return np.stack(stacked), table.column(1).to_pylist()


def test_our_parquet_has_the_layout_of_diffusion_dpos_script(tmp_path: Path) -> None:
    """The script looks neither at sizes nor at formats; label_0 is 1, so that it does not exchange the sides."""
    sizes = itertools.cycle([(8, 8), (16, 12), (9, 30)])
    own = [
        PreferencePair(
            pair_id=f"pair-{number}",
            caption=f"caption {number}",
            images=(picture(250, "PNG", next(sizes)), picture(5, "JPEG", next(sizes))),
            roles=("target", "base"),
            seeds=(number, number),
            scores=(0.5, 0.25),
            scorer="clip@1",
        )
        for number in range(4)
    ]
    write_preferences(tmp_path / "own.parquet", own)
    pixels, captions = script_batch(tmp_path / "own.parquet")
    assert pixels.shape == (4, 6, 8, 8) and captions == [pair.caption for pair in own]
    assert pixels[:, :3].min() > 0.95 and pixels[:, 3:].max() < -0.9

    exchanged = parquet(
        tmp_path, {"jpg_0": picture(5), "caption": "a", "jpg_1": picture(250), "label_0": 0.0, "label_1": 1.0}
    )
    assert script_batch(exchanged)[0][0, :3].min() > 0.95
