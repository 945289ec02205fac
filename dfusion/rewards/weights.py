"""Weights of scorers: local folders and files, or hub repositories at one commit. Safetensors only, never a pickle.

A pickle can run code when it is loaded. `python -m dfusion.rewards.convert` converts one without running its code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dfusion import _torchvision_ops  # noqa: F401  (transformers and open_clip import torchvision)
from dfusion.errors import ModelNotFoundError

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_ALLOWED = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_HUB = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")


def weights_folder(source: str) -> Path:
    """The folder of a source with safetensors: a local folder, or "owner/name@commit" on the hub.

    Hub models are downloaded into the hub's cache once. Raises ModelNotFoundError.
    """
    folder = Path(source)
    if not folder.is_dir():
        match = _HUB.fullmatch(source)
        if match is None:
            raise ModelNotFoundError(
                f'weights: expected a folder, or "owner/name@commit" with 40 hex digits, got {source!r}'
            )
        folder = _download(match[1], match[2])

    if not list(folder.glob("*.safetensors")):
        pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
        for file in pickles:
            weights_file(file)
        raise ModelNotFoundError(f"expected safetensors in {folder}, got none")
    return folder


def weights_file(file: Path) -> Path:
    """`file` itself. Raises ModelNotFoundError if it is not an existing file of safetensors."""
    if file.suffix in PICKLES:
        target = file.with_name("model.safetensors" if file.name == "pytorch_model.bin" else f"{file.stem}.safetensors")
        raise ModelNotFoundError(
            f"{file}: expected safetensors, got a pickle, which can run code when it is loaded. Convert it once: "
            f"python -m dfusion.rewards.convert {file} {target}"
        )
    if file.suffix != ".safetensors" or not file.is_file():
        raise ModelNotFoundError(f"expected a file of safetensors at {file}, got none")
    return file


def _download(repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_ALLOWED))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{repository}@{revision}: {error}") from error


def digest(files: Sequence[Path]) -> str:
    """The first 12 hex digits of the SHA-256 of the concatenated files: the version of their scores."""
    result = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                result.update(chunk)
    return result.hexdigest()[:12]


def folder_digest(folder: Path) -> str:
    """The digest of the safetensors of a folder."""
    return digest(sorted(folder.glob("*.safetensors")))


def load_pretrained(model_class: Any, folder: Path, device: str) -> Any:
    """A model of transformers in float32, without gradients. Raises ModelNotFoundError, also if weights are missing."""
    try:
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelNotFoundError(f"{folder}: expected a {model_class.__name__}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        expected = f"{folder}: expected the weights of a {model_class.__name__}"
        raise ModelNotFoundError(f"{expected}, got none for {len(missing)} tensors, such as {missing[0]}")
    return model.eval().requires_grad_(False).to(device)


def load_processor(processor_class: Any, folder: Path) -> Any:
    """A tokenizer or processor of transformers. Raises ModelNotFoundError."""
    try:
        return processor_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelNotFoundError(f"{folder}: expected the files of a {processor_class.__name__}: {error}") from error


def load_head(file: Path) -> nn.Module:
    """The linear layers of a file of safetensors. Raises ModelNotFoundError."""
    return linear_head(load_tensors(weights_file(file)), str(file))


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of safetensors. Raises ModelNotFoundError."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"{file}: expected a file of safetensors: {error}") from error


def linear_head(weights: Mapping[str, torch.Tensor], where: str) -> nn.Module:
    """The linear layers "layers.<n>.weight" and ".bias" in the order of n, from D inputs to one number.

    Both published heads (LAION's aesthetic predictor and ImageReward) have dropout between their layers and no other
    function, so nothing else remains. Raises ModelNotFoundError.
    """
    numbers = sorted(int(match[1]) for key in weights if (match := re.fullmatch(r"layers\.(\d+)\.weight", key)))
    layers: list[nn.Linear] = []
    try:
        for number in numbers:
            weight = weights[f"layers.{number}.weight"].float()
            outputs, inputs = weight.shape
            layer = nn.Linear(inputs, outputs)
            layer.load_state_dict({"weight": weight, "bias": weights[f"layers.{number}.bias"].float()})
            layers.append(layer)
    except (KeyError, RuntimeError, ValueError) as error:
        expected = "expected a weight (outputs, inputs) and a bias (outputs) of each linear layer"
        raise ModelNotFoundError(f"{where}: {expected}, got other tensors or shapes") from error

    fit = all(layer.out_features == following.in_features for layer, following in pairwise(layers))
    if not layers or layers[-1].out_features != 1 or not fit:
        raise ModelNotFoundError(f"{where}: expected linear layers layers.<n>.weight that end in one number")
    return nn.Sequential(*layers).eval().requires_grad_(False)
