import errno
import resource
from pathlib import Path

import pytest
import torch

from dfusion.errors import InvalidInputError
from dfusion.files import read_tensors, write_tensors, write_whole

METADATA = {"format": "pt", "zebra": '{"ä": "\\n", "b": 1}', "ape": "tab\tand \x01 and \x7f", "emu": "雪"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """safetensors orders metadata by a hash with a new seed each time: with 4 keys, 20 files would differ."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(4.0)}
    written = set()
    for number in range(20):
        path = tmp_path / str(number)
        write_tensors(path, tensors, dict(sorted(METADATA.items(), reverse=number % 2 == 1)))
        written.add(path.read_bytes())
    assert len(written) == 1


def test_written_content_is_read_back(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(4.0)}
    write_tensors(tmp_path / "file", tensors, METADATA)
    read, metadata = read_tensors(tmp_path / "file")
    assert metadata == METADATA and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    write_tensors(tmp_path / "bare", tensors, {})
    assert read_tensors(tmp_path / "bare")[1] == {}


def test_a_file_that_the_disk_cannot_take_is_an_os_error(tmp_path: Path) -> None:
    """Like a full disk, with a limit on the size of files instead. safetensors raises an error of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_tensors(tmp_path / "file", {"large": torch.zeros(10_000)}, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_atomically(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "file").write_text("content")

    def break_off(folder: Path) -> None:
        make(folder)
        raise InvalidInputError("half")

    with pytest.raises(InvalidInputError, match="half"):
        write_whole(tmp_path / "folder", break_off)
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "folder", make)
    assert (tmp_path / "folder" / "inside" / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
