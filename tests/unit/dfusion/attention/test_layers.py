import pytest
from diffusers import UNet2DConditionModel

from dfusion.attention.layers import find_layers, first_up_layer, mask_layers, resolve_layers
from dfusion.errors import LayerNotFoundError
from tests.nets import sd_unet, tiny_unet
from tests.unet_layouts import SD_21_BASE, SDXL


def test_stable_diffusion_layout() -> None:
    layers = find_layers(sd_unet())
    assert [(layer.index, layer.part, layer.level) for layer in layers] == [
        (0, "down", 0),
        (1, "down", 1),
        (2, "down", 2),
        (3, "middle", 3),
        (4, "up", 2),
        (5, "up", 1),
        (6, "up", 0),
    ]
    assert [layer.index for layer in resolve_layers(layers, "middle+up")] == [3, 4, 5, 6]
    assert [layer.index for layer in resolve_layers(layers, (6, 3))] == [3, 6]

    first = first_up_layer(layers)
    assert first.index == 4 and first.name == "up_blocks.1" and first.size(64, 64) == (16, 16)
    assert first.self_attention[0] == "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert [layer.index for layer in mask_layers(layers, "resolution")] == [2, 4]
    assert [layer.index for layer in mask_layers(layers, "first_up")] == [4]


def described(unet: UNet2DConditionModel) -> list[tuple[str, str, tuple[int, int], int, int]]:
    """Part, name, map size and number of self- and cross-attentions of every layer."""
    size = unet.config.sample_size
    return [
        (layer.part, layer.name, layer.size(size, size), len(layer.self_attention), len(layer.cross_attention))
        for layer in find_layers(unet)
    ]


def test_sd_2_1_base_at_full_size() -> None:
    unet = SD_21_BASE.unet()

    assert described(unet) == [
        ("down", "down_blocks.0", (64, 64), 2, 2),
        ("down", "down_blocks.1", (32, 32), 2, 2),
        ("down", "down_blocks.2", (16, 16), 2, 2),
        ("middle", "mid_block", (8, 8), 1, 1),
        ("up", "up_blocks.1", (16, 16), 3, 3),
        ("up", "up_blocks.2", (32, 32), 3, 3),
        ("up", "up_blocks.3", (64, 64), 3, 3),
    ]

    layers = find_layers(unet)
    assert [layer.index for layer in resolve_layers(layers, "middle+up")] == [3, 4, 5, 6]  # the paper's
    assert first_up_layer(layers).index == 4


def test_sdxl_at_full_size() -> None:
    """Cross-attention starts at half the latents' resolution, with 2 and then 10 transformer layers per attention."""
    unet = SDXL.unet()

    assert described(unet) == [
        ("down", "down_blocks.1", (64, 64), 4, 4),
        ("down", "down_blocks.2", (32, 32), 20, 20),
        ("middle", "mid_block", (32, 32), 10, 10),
        ("up", "up_blocks.0", (32, 32), 30, 30),
        ("up", "up_blocks.1", (64, 64), 6, 6),
    ]

    layers = find_layers(unet)
    assert [layer.index for layer in resolve_layers(layers, "middle+up")] == [2, 3, 4]
    assert first_up_layer(layers).name == "up_blocks.0"
    assert [layer.index for layer in mask_layers(layers, "resolution")] == [1, 2, 3]

    paths = {f"{path}.processor" for layer in layers for path in layer.self_attention + layer.cross_attention}
    assert paths == set(unet.attn_processors)


def test_several_transformer_layers_in_a_block() -> None:
    middle = find_layers(sd_unet(transformer_layers=2))[3]
    assert len(middle.self_attention) == 2 and len(middle.cross_attention) == 2


def test_odd_sizes_round_up_as_strided_convolutions_do() -> None:
    assert find_layers(sd_unet())[3].size(17, 30) == (3, 4)


def test_missing_layers_are_named() -> None:
    layers = find_layers(tiny_unet(has_middle=True))
    with pytest.raises(LayerNotFoundError, match="0 to 2"):
        resolve_layers(layers, (1, 3))
    with pytest.raises(LayerNotFoundError):
        resolve_layers(layers, ())
    with pytest.raises(LayerNotFoundError, match="up block"):
        first_up_layer(layers[:2])

    plain = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        norm_num_groups=4,
    )

    with pytest.raises(LayerNotFoundError, match="no block"):
        find_layers(plain)
