from typing import get_args

from dfusion.attention.layers import find_layers
from dfusion.config import AttentionControl, FusionConfig
from tests.nets import sd_unet, tiny_unet
from tools.ablations.attention_control import controls, layers, steps


def test_all_controls_change_no_other_setting() -> None:
    config = FusionConfig(first_step=3, merge="or")
    variants = controls(config)
    assert list(variants) == list(get_args(AttentionControl))
    assert variants["masked_kv"] == config
    assert variants["kv"] == FusionConfig(first_step=3, merge="or", control="kv")


def test_layers_of_figure_9() -> None:
    variants = layers(find_layers(sd_unet(16)), FusionConfig(first_step=3))
    assert [config.layers for config in variants.values()] == [
        (3,),
        (2, 3, 4),
        (3, 4, 5),
        (3, 4, 5, 6),
        (0, 1, 2, 3, 4, 5, 6),
    ]
    assert list(variants)[3] == "middle and up"
    assert all(config.first_step == 3 for config in variants.values())


def test_duplicate_sets_of_layers_are_left_out() -> None:
    """One down, the middle and one up layer: the middle's neighbours are all layers."""
    variants = layers(find_layers(tiny_unet()))
    assert {name: config.layers for name, config in variants.items()} == {
        "middle": (1,),
        "middle and its neighbours": (0, 1, 2),
        "middle and up": (1, 2),
    }


def test_ranges_of_steps() -> None:
    variants = steps(20, FusionConfig(control="kv"))
    assert list(variants) == ["0-19", "2-19", "5-19", "10-19", "2-14", "2-9"]
    assert variants["2-9"] == FusionConfig(control="kv", first_step=2, last_step=9)


def test_ranges_without_a_step_are_left_out() -> None:
    """Half of one step is rounded to no step."""
    assert list(steps(1)) == ["0-0"]
