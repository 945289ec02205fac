import pytest
from diffusers import UNet2DConditionModel

from dfusion.attention.layers import find_layers, first_up_layer, mask_layers, resolve_layers
from dfusion.errors import LayerNotFoundError
from tests.nets import sd_unet, tiny_unet


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


def test_several_transformer_layers_in_a_block() -> None:
    middle = find_layers(sd_unet(transformer_layers=2))[3]
    assert len(middle.self_attention) == 2 and len(middle.cross_attention) == 2


def test_odd_sizes_round_up_as_strided_convolutions_do() -> None:
    assert find_layers(sd_unet())[3].size(17, 30) == (3, 4)


def test_missing_layers_are_named() -> None:
    layers = find_layers(tiny_unet())
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
