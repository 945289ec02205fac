"""Rewards from local weights: small random models in the layouts of the published ones, scores from their formulas."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dfusion.catalogue import SHAPES_CLIP_FOLDER
from dfusion.errors import CheckpointError, ModelNotFoundError
from dfusion.rewards import load_scorer
from dfusion.rewards.config import AestheticConfig, ImageRewardConfig, OpenClipConfig, PickScoreConfig, VqaConfig
from dfusion.rewards.convert import convert
from dfusion.rewards.weights import load_head, weights_file, weights_folder
from tests.clip_tokenizer import clip_tokenizer

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
PROMPTS = ["a red circle", "a blue and striped square", "a star"]
WORDS = (
    '[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] does this figure show " ? please answer yes or no . a red blue star'.split()
)
SIDE = 32


def normalised_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, 3, H, W): what CLIP's and BLIP's transforms do with images of the model's size."""
    return torch.tensor((images / 255 - CLIP_MEAN) / CLIP_STD, dtype=torch.float32).permute(0, 3, 1, 2)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def head_weights(inputs: int) -> dict[str, torch.Tensor]:
    """The layers of both published heads: linear, with dropout at 1, 3 and 5."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    sizes = (inputs, 12, 8, 6, 4, 1)
    for number, rows, columns in zip((0, 2, 4, 6, 7), sizes[1:], sizes[:-1], strict=True):
        weights[f"layers.{number}.weight"] = torch.randn(rows, columns, generator=generator)
        weights[f"layers.{number}.bias"] = torch.randn(rows, generator=generator)
    return weights


def through_head(rows: np.ndarray, weights: Mapping[str, torch.Tensor]) -> np.ndarray:
    for number in (0, 2, 4, 6, 7):
        rows = rows @ weights[f"layers.{number}.weight"].numpy().T + weights[f"layers.{number}.bias"].numpy()
    return rows[:, 0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A CLIP model of transformers with CLIP's own vocabulary, and its folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    vision = layers | {"image_size": SIDE, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(np.log(20))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    transform = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(transform, clip_tokenizer()).save_pretrained(folder)
    return folder, model


def clip_embeds(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of IMAGES and PROMPTS, each prompt by itself and without padding."""
    with torch.no_grad():
        images = model.get_image_features(normalised_pixels(IMAGES)).pooler_output.numpy()
        tokens = [torch.tensor([clip_tokenizer()(prompt).input_ids]) for prompt in PROMPTS]
        texts = np.concatenate([model.get_text_features(ids).pooler_output.numpy() for ids in tokens])
    return images, texts


@pytest.mark.slow
def test_pickscore_is_the_scaled_cosine(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    images, texts = clip_embeds(model)
    expected = 20 * (unit(images) * unit(texts)).sum(1)

    scorer = load_scorer(PickScoreConfig(source=str(folder)))
    assert scorer.score(IMAGES, PROMPTS) == pytest.approx(expected.tolist(), abs=1e-4)
    assert np.ptp(expected) > 0.1
    assert scorer.name == "pickscore" and len(scorer.version) == 12
    # one image at a time has the same score: padding does not count
    assert scorer.score(IMAGES[:1], PROMPTS[:1]) == pytest.approx(expected[:1].tolist(), abs=1e-4)


def test_a_prompt_of_more_than_77_tokens_is_cut(clip: tuple[Path, Any]) -> None:
    scorer = load_scorer(PickScoreConfig(source=str(clip[0])))
    long, longer = "red " * 75, "red " * 75 + "blue"
    shorter = "red " * 74 + "blue"
    first, second, third = scorer.score(np.stack([IMAGES[0]] * 3), [long, longer, shorter])
    assert first == second != third


def test_the_aesthetic_predictor_is_a_head_on_the_unit_embedding(clip: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = clip
    weights = head_weights(8)
    save_file(weights, tmp_path / "head.safetensors")
    expected = through_head(unit(clip_embeds(model)[0]), weights)

    scorer = load_scorer(AestheticConfig(source=str(folder), head=tmp_path / "head.safetensors"))
    assert scorer.score(IMAGES, PROMPTS) == pytest.approx(expected.tolist(), rel=1e-4)
    assert scorer.score(IMAGES, [""] * 3) == scorer.score(IMAGES, PROMPTS)
    assert np.ptp(expected) > 0.1

    save_file(head_weights(9), tmp_path / "head.safetensors")
    with pytest.raises(ModelNotFoundError, match="embeddings of 8 numbers, got one for 9"):
        load_scorer(AestheticConfig(source=str(folder), head=tmp_path / "head.safetensors"))
    save_file({"weight": torch.ones(1, 8)}, tmp_path / "head.safetensors")
    with pytest.raises(ModelNotFoundError, match="linear layers"):
        load_scorer(AestheticConfig(source=str(folder), head=tmp_path / "head.safetensors"))


def test_hpsv2_is_the_cosine_of_other_weights_of_an_open_clip_architecture(tmp_path: Path) -> None:
    """ViT-H-14 takes gigabytes, so a small architecture is used in its place."""
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 16}
    (tmp_path / "tiny-of-a-test.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-of-a-test").eval()
    # as in the published file: a checkpoint of several things, from which `convert` takes the weights
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "HPS.pt")

    def config(file: str, architecture: str = "tiny-of-a-test") -> OpenClipConfig:
        return OpenClipConfig(architecture=architecture, file=tmp_path / file)

    with pytest.raises(ModelNotFoundError, match=r"python -m dfusion\.rewards\.convert .*HPS\.pt .*HPS\.safetensors"):
        load_scorer(config("HPS.pt"))
    convert(tmp_path / "HPS.pt", tmp_path / "HPS.safetensors")

    with torch.no_grad():
        images = model.encode_image(normalised_pixels(IMAGES)).numpy()
        tokens = [[*clip_tokenizer()(prompt).input_ids] for prompt in PROMPTS]
        padded = torch.tensor([ids + [0] * (77 - len(ids)) for ids in tokens])
        texts = model.encode_text(padded).numpy()
    scorer = load_scorer(config("HPS.safetensors"))
    expected = (unit(images) * unit(texts)).sum(1)
    assert scorer.score(IMAGES, PROMPTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert scorer.name == "clip-HPS"
    with pytest.raises(ModelNotFoundError, match="no architecture 'ViT-Z'"):
        load_scorer(config("HPS.safetensors", "ViT-Z"))


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": SIDE,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}


def blip_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vision model's weights under BLIP's own names, from tables of every tensor."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "post_layernorm.weight": "norm.weight",
        "post_layernorm.bias": "norm.bias",
    }
    layer = {"self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "mlp.fc1": "mlp.fc1"}
    layer |= {"mlp.fc2": "mlp.fc2", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    for number in range(VISION["num_hidden_layers"]):
        for ours, theirs in layer.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layers.{number}.{ours}.{kind}"] = f"blocks.{number}.{theirs}.{kind}"
    return {f"blip.visual_encoder.{names[key]}": value.contiguous() for key, value in weights.items()}


def test_image_reward_is_blip_with_a_head(tmp_path: Path) -> None:
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    # 1. a folder in the layout of the published one
    torch.manual_seed(2)
    vision = BlipVisionModel(BlipVisionConfig(**VISION)).eval()
    text_config = BlipTextConfig(**TEXT, encoder_hidden_size=64, is_decoder=True)
    text = BlipTextModel(text_config, add_pooling_layer=False).eval()
    head = head_weights(16)
    weights = blip_names(vision.state_dict())
    weights |= {f"blip.text_encoder.{key}": value.contiguous() for key, value in text.state_dict().items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]  # published, and not a parameter
    weights |= {f"mlp.{key}": value for key, value in head.items()}
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(TEXT | {"encoder_width": 64, "type_vocab_size": 2}))
    bert_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"convert .*ImageReward\.pt"):
        load_scorer(ImageRewardConfig(source=str(tmp_path)))
    convert(tmp_path / "ImageReward.pt", tmp_path / "ImageReward.safetensors")

    # 2. the formula, prompt by prompt and without padding
    expected = []
    for pixels, prompt in zip(normalised_pixels(IMAGES), ("a red star", "a blue star", "red"), strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in ("[CLS]", *prompt.split(), "[SEP]")]])
        with torch.no_grad():
            embeds = vision(pixels[None]).last_hidden_state
            states = text(input_ids=ids, encoder_hidden_states=embeds).last_hidden_state
        raw = through_head(states[:, 0].numpy(), head)[0]
        expected.append((raw - 0.16717362830052426) / 1.0333394966054072)

    scorer = load_scorer(ImageRewardConfig(source=str(tmp_path)))
    assert scorer.score(IMAGES, ["a red star", "a blue star", "red"]) == pytest.approx(expected, rel=1e-4)
    assert np.ptp(expected) > 0.01

    # 3. another size: the centre of the resized image
    wide = np.asarray(Image.fromarray(IMAGES[0]).resize((3 * SIDE, SIDE)))
    same = scorer.score(np.stack([wide]), ["red"])
    assert same == scorer.score(wide[None, :, SIDE : 2 * SIDE], ["red"])

    # 4. weights that are not ImageReward's
    save_file({"x": torch.ones(1)}, tmp_path / "ImageReward.safetensors")
    with pytest.raises(ModelNotFoundError, match="weights of ImageReward"):
        load_scorer(ImageRewardConfig(source=str(tmp_path)))


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """BLIP-VQA."""
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    torch.manual_seed(3)
    special = {"bos_token_id": WORDS.index("[DEC]"), "sep_token_id": WORDS.index("[SEP]")}
    special |= {"eos_token_id": WORDS.index("[SEP]"), "pad_token_id": 0}
    text = TEXT | special | {"is_decoder": True}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=VISION | {"hidden_size": 16})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)  # by the default weights, answers would not depend on the image
    folder = tmp_path_factory.mktemp("vqa")
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), bert_tokenizer()).save_pretrained(folder)
    return folder, model


def test_the_score_of_questions_is_the_probability_of_yes(vqa: tuple[Path, Any]) -> None:
    folder, model = vqa
    question = ["[CLS]", *'does this figure show " a red star " ? please answer yes or no .'.split(), "[SEP]"]
    ids = torch.tensor([[WORDS.index(word) for word in question]])
    expected = []
    for pixels in normalised_pixels(IMAGES):
        with torch.no_grad():
            embeds = model.vision_model(pixels[None]).last_hidden_state
            encoded = model.text_encoder(input_ids=ids, encoder_hidden_states=embeds).last_hidden_state
            start = torch.tensor([[WORDS.index("[DEC]")]])
            logits = model.text_decoder(input_ids=start, encoder_hidden_states=encoded).logits[0, -1].numpy()
        chances = np.exp(logits - logits.max())
        expected.append(chances[WORDS.index("yes")] / chances.sum())

    scorer = load_scorer(VqaConfig(source=str(folder)))
    assert scorer.score(IMAGES, ["a red star"] * 3) == pytest.approx(expected, rel=1e-3)
    assert np.ptp(expected) > 1e-4
    other = load_scorer(VqaConfig(source=str(folder), question="{} ?"))
    assert other.score(IMAGES[:1], ["a red star"]) != scorer.score(IMAGES[:1], ["a red star"])
    with pytest.raises(ValueError, match="question"):
        VqaConfig(source=str(folder), question="is it good?")


def test_a_model_that_answers_no_questions_is_refused(clip: tuple[Path, Any]) -> None:
    with pytest.raises(ModelNotFoundError, match="answers questions, got 'CLIPModel'"):
        load_scorer(VqaConfig(source=str(clip[0])))


def test_missing_weights_are_refused_and_not_drawn_at_random(clip: tuple[Path, Any], tmp_path: Path) -> None:
    for file in clip[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"got none for 1 tensors, such as text_projection\.weight"):
        load_scorer(PickScoreConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.weight": torch.ones(1, 4)}, "a bias"),
        ({"layers.0.weight": torch.ones(4), "layers.0.bias": torch.ones(4)}, "a weight .* of each"),
        ({"layers.0.weight": torch.ones(1, 4), "layers.0.bias": torch.ones(3)}, "a weight .* of each"),
        ({"layers.0.weight": torch.ones(2, 4), "layers.0.bias": torch.ones(2)}, "end in one number"),
        ({"other": torch.ones(1)}, "end in one number"),
        (
            {
                "layers.0.weight": torch.ones(3, 4),
                "layers.0.bias": torch.ones(3),
                "layers.2.weight": torch.ones(1, 5),
                "layers.2.bias": torch.ones(1),
            },
            "end in one number",
        ),
    ],
)
def test_other_heads_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ModelNotFoundError, match=rf"head\.safetensors: expected .*{message}"):
        load_head(tmp_path / "head.safetensors")


def test_broken_safetensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no safetensors" * 9)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', "utf-8")
    (tmp_path / "med_config.json").write_text("[]", "utf-8")
    source = str(tmp_path)
    clip_folder = tmp_path / "clip"
    shutil.copytree(SHAPES_CLIP_FOLDER, clip_folder)
    for weights in clip_folder.glob("*.safetensors"):
        weights.write_bytes(b"no safetensors" * 9)
    for config in (
        PickScoreConfig(source=source),
        ImageRewardConfig(source=source),
        OpenClipConfig(folder=clip_folder),
    ):
        with pytest.raises(ModelNotFoundError):
            load_scorer(config)
    with pytest.raises(ModelNotFoundError, match="expected a file of safetensors"):
        load_head(file)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    command = rf"convert {tmp_path}/pytorch_model\.bin {tmp_path}/model\.safetensors"
    with pytest.raises(ModelNotFoundError, match=command):
        weights_folder(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="can run code"):
        weights_file(tmp_path / "head.pth")
    with pytest.raises(ModelNotFoundError, match="expected a file of safetensors"):
        weights_file(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", "owner/name@" + "0" * 39, "/no/such/folder"])
def test_a_hub_name_needs_a_commit(source: str) -> None:
    with pytest.raises(ModelNotFoundError, match="40 hex digits"):
        weights_folder(source)


class Code:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_convert_takes_tensors_and_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared.T, "step": 4}, tmp_path / "w.bin")
    assert convert(tmp_path / "w.bin", tmp_path / "w.safetensors") == 2
    weights = load_file(tmp_path / "w.safetensors")
    assert weights["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and weights["b"].tolist() == [[0, 3], [1, 4], [2, 5]]

    torch.save({"a": Code()}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("no pickle")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("code.pt", "text.pt", "list.pt", "gone.pt"):
        with pytest.raises(CheckpointError, match="expected"):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert "ran" not in capsys.readouterr().out
