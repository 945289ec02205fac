"""The training of the shapes world's pipeline: its text encoder, its attention, and the grounding of words."""

import math

import numpy as np
import open_clip
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from dfusion.catalogue import SHAPES_CLIP_FOLDER
from dfusion.shapes.prompts import caption, named_parts
from dfusion.shapes.scenes import TEMPLATES, random_scene
from tools.shapes.captions import new_tokenizer
from tools.shapes.denoiser import TrainingAttention, grounding_loss, item_columns, new_text_encoder, new_unet


def test_the_text_encoder_starts_as_clips():
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{SHAPES_CLIP_FOLDER}")
    model = model.float().eval()
    encoder = new_text_encoder(model.state_dict()).eval()
    texts = ["a red and striped circle", "the red circle above the blue square"]
    tokens = new_tokenizer()(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = encoder(tokens).pooler_output @ model.text_projection
        torch.testing.assert_close(ours, model.encode_text(tokens), rtol=1e-5, atol=1e-5)


def test_attention_in_training_equals_diffusers_and_stores_the_maps():
    torch.manual_seed(0)
    unet = new_unet()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([7, 900]), torch.randn(2, 16, 128)
    unet.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        expected = unet(*inputs).sample
    attention = TrainingAttention()
    unet.set_attn_processor(attention)
    with torch.no_grad():
        torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    cross = [name for name in unet.attn_processors if "attn2" in name]

    assert len(attention.maps) == len(cross)
    for seen in attention.maps:
        torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:2]))


def test_grounding_loss_by_hand():
    # one layer of 2x2 pixels; the word in column 1 sees 0.6 in the item's pixel and 0.2 in each of the others
    seen = torch.tensor([0.6, 0.2, 0.2, 0.2])
    maps = torch.stack([1 - seen, seen], 1)[None]
    mask = torch.zeros(1, 2, 16, 16)
    mask[0, 0, :8, :8] = 1
    token = (1 - 0.6 / 1.2) ** 2
    pixel = -(math.log(0.6) + 3 * math.log(0.8)) / 4
    loss = grounding_loss([maps], mask, torch.tensor([[1, -1]]))
    assert loss.item() == pytest.approx(token + pixel, rel=1e-5)


def test_images_without_a_caption_have_no_grounding_loss():
    maps = torch.full((1, 4, 3), 1 / 3)
    assert grounding_loss([maps], torch.ones(1, 2, 16, 16), torch.tensor([[-1, -1]])).item() == 0


@pytest.mark.parametrize("template", TEMPLATES)
def test_item_columns_hold_the_items_words(template):
    tokenizer = new_tokenizer()
    rng = np.random.default_rng(1)
    for _ in range(20):
        named = named_parts(random_scene(template, rng))
        text = caption(template, named)
        ids = tokenizer(text).input_ids
        words = [tokenizer.decode([ids[column]]).strip() for column in item_columns(template, named, text)]
        names = {"behaviour": ["shape", "prop"], "attribute": ["shape"], "position": ["shape", "shape2"]}[template]
        assert words == [named[name] for name in names]
