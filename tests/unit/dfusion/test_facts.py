"""Facts from a pipeline's files agree with the loaded models."""

import json
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from dfusion.attention.layers import find_layers
from dfusion.catalogue import MODELS
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError, LayerNotFoundError
from dfusion.facts import read_facts
from dfusion.models import DiffusionModel
from tests.nets import sd_unet, tiny_pipeline, tiny_unet, tiny_xl_pipeline, tiny_xl_unet

TEXTS = [
    "a black and woolen bus",  # two tokens for "woolen"
    "A  Photo of the café's T-shirt, 4K!!",
    "the computer's 12 keys\tdon't  work …",
    "ÅNGSTRÖM 雪の上の猫 🐈‍⬛ zzyzx",
    "",
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with CLIP's vocabulary, as open_clip ships it, in the files of SD 1.5 and 2.1."""
    folder = tmp_path_factory.mktemp("pipeline") / "tokenizer"
    folder.mkdir()
    own = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): index for token, index in own.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    ranked = sorted(own.bpe_ranks, key=lambda pair: own.bpe_ranks[pair])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranked), "utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder.parent


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_a_vocabulary_are_counted_as_by_clip_itself(clip_folder: Path, text: str) -> None:
    length = read_facts(clip_folder).prompt_length
    assert length is not None
    loaded = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")
    [count] = length.of([text])
    assert count == len(SimpleTokenizer().encode(text)) == len(loaded(text, add_special_tokens=False).input_ids)
    assert length.max_tokens == 75


def test_the_longest_prompt_is_that_of_the_loaded_model() -> None:
    folder = MODELS["shapes"].folder
    length = read_facts(folder).prompt_length
    model = DiffusionModel.load(folder)

    assert length is not None

    fits = "red " * length.max_tokens
    too_long = "red " * (length.max_tokens + 1)

    assert length.of([fits, too_long]) == [14, 15]  # 16 with BOS and EOS

    # also of texts with fewer characters than tokens fit, and of characters other than ASCII
    assert length.too_long(["red", "x" * 14, "x" * 15, fits, too_long, "é" * 14]) == {2: 15, 4: 15, 5: 28}

    model.encode_prompts([fits])
    with pytest.raises(InvalidInputError, match="at most 14 tokens"):
        model.encode_prompts([too_long])


@pytest.mark.parametrize("make", [sd_unet, tiny_unet, tiny_xl_unet])
def test_layers_are_those_of_the_loaded_unet(tmp_path: Path, make: Any) -> None:
    unet = make()
    unet.save_config(tmp_path / "unet")
    assert read_facts(tmp_path).layers == tuple(layer.part for layer in find_layers(unet))


def unet_files(folder: Path, **config: object) -> Path:
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layers", [(), (-1,), (7,), (3, 7)])
def test_missing_layers_are_rejected(tmp_path: Path, layers: tuple[int, ...]) -> None:
    sd_unet().save_config(tmp_path / "unet")
    facts = read_facts(tmp_path)
    facts.require_layers(FusionConfig())
    facts.require_layers(FusionConfig(layers=(0, 6)))
    with pytest.raises(LayerNotFoundError, match="0 to 6"):
        facts.require_layers(FusionConfig(layers=layers))


def test_a_unet_without_an_up_layer_has_no_mask(tmp_path: Path) -> None:
    folder = unet_files(tmp_path, down_block_types=["CrossAttnDownBlock2D"], up_block_types=["UpBlock2D"])
    with pytest.raises(LayerNotFoundError, match="no up block"):
        read_facts(folder).require_layers(FusionConfig())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"down_block_types": ["NewDownBlock"], "up_block_types": ["CrossAttnUpBlock2D"]},
        {
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
            "transformer_layers_per_block": [0],
        },
    ],
)
def test_unknown_unets_give_no_facts(tmp_path: Path, config: dict[str, object]) -> None:
    facts = read_facts(unet_files(tmp_path, **config))
    assert facts.layers is None
    facts.require_layers(FusionConfig(layers=(99,)))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_image_sizes_are_those_of_the_loaded_model(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    model = DiffusionModel.load(tmp_path)

    assert facts.pixels_per_latent == model.pixels_per_latent == 2
    assert list(facts.sampling_problems(SamplingConfig(height=12, width=2))) == []

    problems = dict(facts.sampling_problems(SamplingConfig(height=13, width=1)))
    assert problems == {
        "height": "height: expected a multiple of 2 pixels (12 or 14), got 13",
        "width": "width: expected a multiple of 2 pixels (2), got 1",
    }
    assert list(read_facts(tmp_path / "nowhere").sampling_problems(SamplingConfig(height=13))) == []


def test_damaged_files_give_no_facts(tmp_path: Path) -> None:
    for part, name in (("unet", "config.json"), ("tokenizer", "tokenizer.json")):
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_bytes(b"\xff{")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    facts = read_facts(tmp_path)
    assert (facts.layers, facts.prompt_length) == (None, None)
    missing = read_facts(tmp_path / "nowhere")
    assert (missing.layers, missing.prompt_length) == (None, None)
