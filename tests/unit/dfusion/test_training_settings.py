"""Settings of trainings beside the algorithms: LoRA layers, dropout, average, learning rate and 8-bit AdamW."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler

from dfusion.adapter import attach_lora, lora_config, lora_layers, lora_parameters, shapes_of, without_effect
from dfusion.config import LoraConfig, SamplingConfig, TrainingConfig
from dfusion.errors import CheckpointError, InvalidInputError, LoraSettingError
from dfusion.learning_rate import learning_rate
from dfusion.lora_layers import adapted_layers
from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, load_optimizer, require_optimizer, save_optimizer
from dfusion.sampling import sample
from dfusion.trainer_state import TrainerState
from dfusion.training import Trainer
from dfusion.training_data import Example, TrainingPair
from tests.extras import NEEDS_BITSANDBYTES
from tests.nets import embeds, tiny_model, tiny_pipeline, tiny_unet

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def untrained() -> DiffusionModel:
    return tiny_model()


def model_with(untrained: DiffusionModel, lora: LoraConfig) -> DiffusionModel:
    """With an adapter that already changes the policy."""
    attach_lora(untrained.unet, lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(untrained.unet).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return untrained


def examples_of(model: DiffusionModel) -> list[Example]:
    prompts = ["a red circle"] * 2
    negative = model.encode_prompts([""])
    trajectory = sample(
        model.unet, model.scheduler, model.encode_prompts(prompts), negative, [1, 2], config=SamplingConfig(num_steps=3)
    )
    return [TrainingPair(trajectory.select([0]), trajectory.select([1]), prompts[0])]


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {"beta": 5.0, "examples_per_update": 1, "inner_epochs": 4, "learning_rate": 1e-2}
    return TrainingConfig(**(settings | changes))


def weights(model: DiffusionModel) -> Weights:
    return {name: value.detach().clone() for name, value in lora_parameters(model.unet).items()}


def put(model: DiffusionModel, values: Weights) -> None:
    for name, parameter in lora_parameters(model.unet).items():
        parameter.data = values[name].clone()


def trained(model: DiffusionModel, examples: Sequence[Example], settings: TrainingConfig) -> list[Weights]:
    """The weights after each update of a training, which starts with the current ones and restores them."""
    start = weights(model)
    trainer = Trainer(model, examples, settings, seed=3)
    after = []
    while trainer.updates_done < trainer.updates_total:
        trainer.step()
        after.append(weights(model))
    put(model, start)
    return after


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# the adapted layers


def test_targets_ranks_and_alphas_of_layers() -> None:
    shapes = shapes_of(tiny_unet())
    lora = LoraConfig(
        rank=2,
        alpha=4,
        targets=("attention", "feed_forward", "proj_in"),
        rank_pattern={"feed_forward": 3, "mid_block.*": 5},
        alpha_pattern={"attn2.to_k": 8.0, f"{BLOCK}.attn2.to_k": 1.0},
    )
    layers = adapted_layers(shapes, lora)
    blocks = sum(name.endswith("attn1.to_q.weight") for name in shapes)
    assert len(layers) == blocks * (8 + 2 + 1)
    assert (layers[f"{BLOCK}.attn1.to_q"].rank, layers[f"{BLOCK}.attn1.to_q"].scale) == (5, 4 / 5)
    assert (layers[f"{BLOCK}.attn2.to_k"].rank, layers[f"{BLOCK}.attn2.to_k"].scale) == (5, 1 / 5)
    up = "up_blocks.1.attentions.0.transformer_blocks.0"
    assert (layers[f"{up}.ff.net.2"].rank, layers[f"{up}.attn2.to_k"].scale) == (3, 8 / 2)

    stable = adapted_layers(shapes, LoraConfig(rank=4, alpha=16, use_rslora=True))
    assert {layer.scale for layer in stable.values()} == {8.0}


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=2, targets=("feed_forward",)),
        LoraConfig(rank=2, targets=("attention", "feed_forward"), rank_pattern={"attention": 3}, use_rslora=True),
        LoraConfig(rank=2, targets=(f"{BLOCK}.attn2.to_k", "conv_in"), alpha_pattern={"conv_in": 2.0}),
        LoraConfig(rank=2, targets=("attn2.to_v",), use_dora=True),
    ],
)
def test_a_new_adapter_has_the_layers_of_its_settings_and_no_effect(lora: LoraConfig) -> None:
    unet = tiny_unet()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = unet(x, 5, encoder_hidden_states=embeds(1)).sample
        attach_lora(unet, lora)
        torch.testing.assert_close(unet(x, 5, encoder_hidden_states=embeds(1)).sample, plain)

    expected = adapted_layers(shapes_of(unet), lora)
    assert lora_layers(unet) == expected and lora_config(unet).use_dora == lora.use_dora
    matrices = {name: value for name, value in lora_parameters(unet).items() if "lora_A" in name}
    ranks = {name.partition(".lora_A")[0]: len(value) for name, value in matrices.items()}
    assert ranks == {name: layer.rank for name, layer in expected.items()}


@pytest.mark.parametrize(
    ("settings", "setting", "message"),
    [
        ({"targets": ("attn3",)}, "targets", "attn3"),
        ({"targets": ("attention", "conv_norm_out")}, "targets", "conv_norm_out"),
        ({"rank_pattern": {"ff.net.2": 8}}, "rank_pattern", "ff.net.2"),
        ({"alpha_pattern": {"*.attn9.*": 8.0}}, "alpha_pattern", "attn9"),
    ],
)
def test_settings_that_match_no_layer_are_refused(settings: dict[str, Any], setting: str, message: str) -> None:
    with pytest.raises(LoraSettingError, match=message) as caught:
        attach_lora(tiny_unet(), LoraConfig(**settings))
    assert caught.value.setting == setting and str(caught.value).startswith(f"training.lora.{setting}: ")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_is_trained_and_compared_with_the_base(dtype: torch.dtype) -> None:
    """The KL term from the base model needs its weights, not those with a magnitude of 0."""
    model = DiffusionModel.from_pipeline(tiny_pipeline().to(dtype))
    attach_lora(model.unet, LoraConfig(rank=2, use_dora=True), seed=1)
    examples = examples_of(model)
    trainer = Trainer(model, examples, config(inner_epochs=2, ratio_tolerance=0.1), seed=0)
    before = weights(model)
    reports = [trainer.step(), trainer.step()]
    after = weights(model)
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-2)
    assert {name.partition(".lora_")[2].partition(".")[0] for name in before} == {"A", "B", "magnitude_vector"}
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)

    plain = DiffusionModel.from_pipeline(tiny_pipeline().to(dtype))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = model.encode_prompts(["a red circle"]).embeds.to(dtype)
    with torch.no_grad():
        expected = plain.unet(x, 5, encoder_hidden_states=states).sample
        with without_effect(model.unet):
            assert torch.equal(model.unet(x, 5, encoder_hidden_states=states).sample, expected)
        assert not torch.equal(model.unet(x, 5, encoder_hidden_states=states).sample, expected)
    assert all(parameter.requires_grad for parameter in lora_parameters(model.unet).values())


# updates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_diffusers(schedule: str) -> None:
    """But the first update of diffusers' warm-up has the rate 0, and ours the rate of its second."""
    settings = config(schedule=schedule, warmup_updates=3, schedule_updates=None if schedule == "constant" else 10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate(settings, update, 1, 4) for update in range(1, 11)]
    assert ours == pytest.approx([*theirs[1:4], *theirs[3:]])


def test_learning_rates_by_hand() -> None:
    linear = config(schedule="linear", learning_rate=1.0)
    assert [learning_rate(linear, update, 5, 8) for update in (5, 6, 7, 8)] == [1.0, 0.75, 0.5, 0.25]
    cosine = config(schedule="cosine", learning_rate=1.0, warmup_updates=1, schedule_updates=5)
    expected = [1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0, 0.0]
    assert [learning_rate(cosine, update, 5, 8) for update in range(1, 8)] == pytest.approx(expected, abs=1e-12)
    assert [learning_rate(config(warmup_updates=2), update, 1, 4) for update in (1, 2, 3)] == [0.005, 0.01, 0.01]


def test_the_learning_rate_scales_the_updates(untrained: DiffusionModel) -> None:
    """AdamW's first update has the length of its learning rate, in each element."""
    model = model_with(untrained, LoraConfig(rank=2))
    examples = examples_of(model)
    start = weights(model)
    [full], [half] = (
        trained(model, examples, config(warmup_updates=warmup, weight_decay=0, inner_epochs=1)) for warmup in (1, 2)
    )
    for name, value in start.items():
        torch.testing.assert_close(half[name] - value, (full[name] - value) / 2, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_the_average_by_hand(untrained: DiffusionModel) -> None:
    """Its decay is 2/11, 3/12, 4/13 after the first updates, and 0.3 at most."""
    model = model_with(untrained, LoraConfig(rank=2))
    examples = examples_of(model)
    average = weights(model)
    after = trained(model, examples, config())
    averaged = trained(model, examples, config(ema_decay=0.3))
    assert all(same(left, right) for left, right in zip(after[:-1], averaged[:-1], strict=True))
    for decay, values in zip((2 / 11, 3 / 12, 0.3, 0.3), after, strict=True):
        average = {name: decay * average[name] + (1 - decay) * values[name] for name in average}
    for name, value in averaged[-1].items():
        torch.testing.assert_close(value, average[name])


@pytest.mark.slow
def test_dropout_is_seeded_and_only_in_updates(untrained: DiffusionModel) -> None:
    model = model_with(untrained, LoraConfig(rank=2))
    examples = examples_of(model)
    torch.manual_seed(9)
    random = torch.get_rng_state()
    settings = config(lora={"dropout": 0.5}, inner_epochs=2)
    first, again = (trained(model, examples, settings) for _ in range(2))
    [without] = trained(model, examples, config(inner_epochs=1))
    assert torch.equal(torch.get_rng_state(), random)
    assert same(first[-1], again[-1]) and not same(first[0], without)

    trainer = Trainer(model, examples, config(lora={"dropout": 0.5}), seed=3)
    trainer.step()
    assert trainer.self_test is not None and abs(max(trainer.self_test.ratio_by_step.values()) - 1) < 1e-5
    assert not any(module.training for module in model.unet.modules())
    assert lora_config(model.unet).dropout == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"ema_decay": 0.9, "schedule": "cosine", "warmup_updates": 2}, id="average and cosine"),
        pytest.param({"lora": {"dropout": 0.3}, "schedule": "linear"}, id="dropout and linear"),
        pytest.param({"optimizer": "adamw_8bit", "ema_decay": 0.5}, id="8 bits", marks=NEEDS_BITSANDBYTES),
    ],
)
def test_a_training_resumes_exactly(settings: dict[str, Any], untrained: DiffusionModel, tmp_path: Path) -> None:
    """From every update, and after an earlier round whose moments are carried over."""
    is_8bit = settings.get("optimizer") == "adamw_8bit"
    model = model_with(untrained, LoraConfig(rank=64 if is_8bit else 2))  # large parameters have states of 8 bits
    examples = examples_of(model)
    chosen = config(inner_epochs=3, **settings)
    earlier = Trainer(model, examples, chosen, seed=0)
    earlier.step()
    moments = earlier.optimizer_state()
    save_optimizer(moments, tmp_path / "optimizer.safetensors")
    moments = load_optimizer(tmp_path / "optimizer.safetensors")

    examples = examples_of(model)
    through = Trainer(model, examples, chosen, 1, moments)
    start = weights(model)
    after = []
    for update in range(through.updates_total):
        through.state().save(tmp_path / str(update))
        through.step()
        after.append(weights(model))

    for update in range(through.updates_total):
        put(model, start)
        resumed = Trainer(model, examples, chosen, 1)
        resumed.load_state(TrainerState.load(tmp_path / str(update)))
        for expected in after[update:]:
            resumed.step()
            assert same(weights(model), expected)
        assert resumed.optimizer_state().updates == 4


@NEEDS_BITSANDBYTES
def test_adamw_in_8_bits_moves_like_adamw(untrained: DiffusionModel, tmp_path: Path) -> None:
    model = model_with(untrained, LoraConfig(rank=256))
    examples = examples_of(model)
    start = weights(model)
    ours, eight = (trained(model, examples, config(optimizer=name))[-1] for name in ("adamw", "adamw_8bit"))
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in start])
    moved_8bit = torch.cat([(eight[name] - start[name]).flatten() for name in start])
    assert (moved - moved_8bit).norm() < 0.1 * moved.norm()

    trainer = Trainer(model, examples, config(optimizer="adamw_8bit"), seed=3)
    trainer.step()
    state = trainer.optimizer_state()
    assert {values["state1"].dtype for values in state.moments.values()} >= {torch.uint8}
    save_optimizer(state, tmp_path / "a")
    broken = {name: {k: v for k, v in values.items() if k != "absmax1"} for name, values in state.moments.items()}
    save_optimizer(OptimizerState(broken), tmp_path / "b")
    assert load_optimizer(tmp_path / "a").updates == 1
    with pytest.raises(CheckpointError, match="moments of each parameter"):
        load_optimizer(tmp_path / "b")

    put(model, start)
    with pytest.raises(InvalidInputError, match=r"training\.optimizer: expected adamw_8bit, whose moments are carried"):
        Trainer(model, examples, config(), 3, state)
    Trainer(model, examples, config(optimizer_start="fresh"), 3, state)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_bitsandbytes(name: str) -> object:
        return None if name == "bitsandbytes" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_bitsandbytes)
    require_optimizer(config())
    with pytest.raises(InvalidInputError, match=r"training\.optimizer: .*dfusion\[bitsandbytes\]"):
        require_optimizer(config(optimizer="adamw_8bit"))
