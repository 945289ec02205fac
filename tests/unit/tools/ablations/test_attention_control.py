from typing import get_args

from dfusion.attention.layers import find_layers
from dfusion.config import AttentionControl, FusionConfig
from tests.nets import sd_unet, tiny_unet
from tools.ablations.attention_control import controls, layers, steps


def test_all_controls_with_the_rest_as_it_was() -> None:
    config = FusionConfig(first_step=3, merge="or")
    found = controls(config)
    assert list(found) == list(get_args(AttentionControl))
    assert found["masked_kv"] == config
    assert found["kv"] == FusionConfig(first_step=3, merge="or", control="kv")


def test_layers_of_figure_9() -> None:
    found = layers(find_layers(sd_unet(16)), FusionConfig(first_step=3))
    assert [config.layers for config in found.values()] == [
        (3,),
        (2, 3, 4),
        (3, 4, 5),
        (3, 4, 5, 6),
        (0, 1, 2, 3, 4, 5, 6),
    ]
    assert list(found)[3] == "middle and up"
    assert all(config.first_step == 3 for config in found.values())


def test_sets_of_layers_that_are_the_same_come_once() -> None:
    """One down, the middle and one up layer: the middle's neighbours are all layers."""
    found = layers(find_layers(tiny_unet()))
    assert {name: config.layers for name, config in found.items()} == {
        "middle": (1,),
        "middle and its neighbours": (0, 1, 2),
        "middle and up": (1, 2),
    }


def test_ranges_of_steps() -> None:
    found = steps(20, FusionConfig(control="kv"))
    assert list(found) == ["0-19", "2-19", "5-19", "10-19", "2-14", "2-9"]
    assert found["2-9"] == FusionConfig(control="kv", first_step=2, last_step=9)


def test_ranges_without_a_step_are_left_out() -> None:
    """Of one step, half of it rounds to none."""
    assert list(steps(1)) == ["0-0"]
