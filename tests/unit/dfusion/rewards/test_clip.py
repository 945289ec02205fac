import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from dfusion.errors import ModelNotFoundError, ShapeMismatchError
from dfusion.rewards.clip import ClipScorer
from tools.shapes.captions import new_tokenizer

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 0, "width": 16, "heads": 2, "layers": 1},
}
MEAN = 0.25
STD = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder: weights, config and tokenizer."""
    place = tmp_path_factory.mktemp("clip")
    tokenizer = new_tokenizer()
    text = CONFIG["text_cfg"] | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG | {"text_cfg": text})
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, place / "open_clip_model.safetensors")
    text |= {"hf_tokenizer_name": "in-this-folder"}
    preprocess = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": CONFIG | {"text_cfg": text}, "preprocess_cfg": preprocess}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(place)
    return place


def test_score_is_the_raw_cosine_with_the_folders_own_transform_and_tokenizer(folder: Path) -> None:
    scorer = ClipScorer.from_folder(folder, name="mine")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    prompts = ["a red circle", "a blue square", "a star"]
    torch.manual_seed(0)
    text = CONFIG["text_cfg"] | {"vocab_size": len(new_tokenizer())}
    model = open_clip.CLIP(**CONFIG | {"text_cfg": text}).eval()
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    tokens = new_tokenizer()(prompts, padding="max_length", max_length=20, return_tensors="pt").input_ids
    with torch.no_grad():
        image = model.encode_image(pixels).numpy()
        word = model.encode_text(tokens).numpy()
    expected = (image * word).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(word, axis=1)

    assert scorer.score(images, prompts) == pytest.approx(expected.tolist(), abs=1e-5)
    assert scorer.name == "mine"

    features = scorer.features(images)
    assert features == pytest.approx(image, abs=1e-5)
    assert features.dtype == np.float32


def test_other_weights_are_another_version(folder: Path, tmp_path: Path) -> None:
    version = ClipScorer.from_folder(folder).version
    assert version == hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()[:12]
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "open_clip_model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, other / "open_clip_model.safetensors")
    assert ClipScorer.from_folder(other).version != version


def test_invalid_images_are_rejected(folder: Path, tmp_path: Path) -> None:
    scorer = ClipScorer.from_folder(folder)
    with pytest.raises(ShapeMismatchError):
        scorer.score(np.zeros((1, 32, 32, 3), np.float32), ["a"])
    with pytest.raises(ShapeMismatchError):
        scorer.score(np.zeros((1, 32, 32, 3), np.uint8), ["a", "b"])
    with pytest.raises(ModelNotFoundError):
        ClipScorer.from_folder(tmp_path)
    with pytest.raises(ModelNotFoundError):
        ClipScorer.from_pretrained("ViT-H-14", "nobody")
