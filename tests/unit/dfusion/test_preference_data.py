import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dfusion import preference_data
from dfusion.errors import InvalidInputError
from dfusion.preference_data import PreferencePair, write_preferences

parquet = pytest.importorskip("pyarrow.parquet")


def picture(colour: str, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, form)
    return buffer.getvalue()


def pair(number: int = 0, **changes: Any) -> PreferencePair:
    arguments: dict[str, Any] = {
        "pair_id": f"pair-{number}",
        "caption": "a red circle",
        "images": (picture("red"), picture("blue", "JPEG")),
        "roles": ("target", "base"),
        "seeds": (2**53 - 1, number),
        "scores": (0.5, 0.25),
        "scorer": "shapes-clip@1",
        "round": 3,
        "adopted": True,
        "mask_cover": 0.25,
        "statistics": {"psnr_outside": 31.5},
    }
    return PreferencePair(**(arguments | changes))


def as_training_scripts_read(row: dict[str, Any]) -> list[Any]:
    """The colours of the preferred and of the rejected image, as train_diffusion_dpo.py orders them."""
    images = [Image.open(io.BytesIO(row[column])).convert("RGB") for column in ("jpg_0", "jpg_1")]
    if row["label_0"] == 0:
        images = images[::-1]
    return [image.getpixel((0, 0)) for image in images]


def test_training_scripts_find_the_preferred_image(tmp_path: Path) -> None:
    assert write_preferences(tmp_path / "pairs.parquet", [pair(1), pair(2)]) == 2

    table = parquet.read_table(tmp_path / "pairs.parquet")
    assert table.column_names[1] == "caption"  # where Diffusion-DPO looks for it

    for number, row in enumerate(table.to_pylist(), 1):
        preferred, rejected = as_training_scripts_read(row)
        assert preferred == (255, 0, 0) and rejected[2] > 200
        assert (row["label_0"], row["label_1"], row["caption"]) == (1, 0, "a red circle")
        assert (row["pair_id"], row["round"], row["scorer"]) == (f"pair-{number}", 3, "shapes-clip@1")
        assert (row["role_0"], row["role_1"]) == ("target", "base")
        assert (row["seed_0"], row["seed_1"]) == (2**53 - 1, number)
        assert (row["score_0"], row["score_1"], row["adopted"], row["mask_cover"]) == (0.5, 0.25, True, 0.25)
        assert json.loads(row["statistics"]) == {"psnr_outside": 31.5}
        assert (row["jpg_0"], row["jpg_1"]) == pair().images


def test_pairs_without_fusion_have_nulls(tmp_path: Path) -> None:
    write_preferences(tmp_path / "p", [pair(adopted=None, mask_cover=None, statistics={})])
    (row,) = parquet.read_table(tmp_path / "p").to_pylist()
    assert row["adopted"] is None and row["mask_cover"] is None and row["statistics"] == "{}"


def test_many_pairs_are_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference_data, "ROWS_AT_ONCE", 2)
    assert write_preferences(tmp_path / "p", (pair(number) for number in range(5))) == 5
    file = parquet.ParquetFile(tmp_path / "p")
    assert file.num_row_groups == 3
    assert [row["seed_1"] for row in file.read().to_pylist()] == [0, 1, 2, 3, 4]


def test_invalid_pairs_are_named_and_leave_no_file(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"images": (picture("red"), b"no image")}, r"images\[1\]"),
        ({"images": (picture("red")[:60], picture("red"))}, r"images\[0\]"),
        ({"scores": (0.5, float("nan"))}, "finite"),
        ({"statistics": {"psnr": float("inf")}}, "finite"),
        ({"seeds": (-1, 0)}, "seeds"),
        ({"seeds": (0, 2**63)}, "seeds"),
        ({"mask_cover": 1.5}, "mask_cover"),
    ]

    for changes, message in bad:
        with pytest.raises(InvalidInputError, match=f"pair-7.*{message}"):
            write_preferences(tmp_path / "p", (pair(number, **(changes if number == 7 else {})) for number in range(8)))
    with pytest.raises(InvalidInputError, match="at least one"):
        write_preferences(tmp_path / "p", [])
    assert list(tmp_path.iterdir()) == []
