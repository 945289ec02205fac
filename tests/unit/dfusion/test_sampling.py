import pytest
import torch

from dfusion import ddim
from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.policy import log_probs, transition_log_prob
from dfusion.sampling import sample
from tests.nets import embeds, relative_error, sd_scheduler, tiny_unet

FOUR = SamplingConfig(num_steps=4)


def test_a_sample_depends_on_its_seed_only() -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler()
    prompts = embeds(3)
    negative = embeds(1, seed=2)
    items = [[1], [2, (3, 4)], [0]]
    together = sample(unet, scheduler, prompts, negative, [5, 6, 7], items=items)
    alone = sample(unet, scheduler, prompts[1:2], negative, [6], items=items[1:2])
    assert relative_error(together.latents[1], alone.latents[0]) < 1e-5  # float32 sums in another order
    torch.testing.assert_close(together.item_maps[1], alone.item_maps[0], rtol=1e-5, atol=1e-6)


def test_seed_contract() -> None:
    """x_T is the generator's first noise, then one noise per step: x_prev minus mu, over sigma, is z."""
    unet = tiny_unet()
    scheduler = sd_scheduler()
    prompts = embeds(1)
    trajectory = sample(unet, scheduler, prompts, None, [11], config=SamplingConfig(num_steps=4, guidance_scale=1))
    generator = torch.Generator().manual_seed(11)

    assert torch.equal(trajectory.latents[0, 0], torch.randn(4, 8, 8, generator=generator))

    schedule = ddim.Schedule.from_scheduler(scheduler, 4, 1.0)
    for i in range(4):
        x_t = trajectory.latents[:, i]
        with torch.no_grad():
            predicted = unet(x_t, trajectory.timesteps[i], encoder_hidden_states=prompts).sample
        z = (trajectory.latents[:, i + 1] - ddim.mean(schedule, i, x_t, predicted)) / schedule.sigmas[i]
        torch.testing.assert_close(z[0], torch.randn(4, 8, 8, generator=generator), rtol=1e-3, atol=1e-3)


def test_recording_maps_does_not_change_the_sample() -> None:
    arguments = (tiny_unet(), sd_scheduler(), embeds(2), embeds(1, seed=2), [1, 2])
    with_maps = sample(*arguments, items=[[1], [2]], config=FOUR)
    without = sample(*arguments, config=FOUR)
    assert torch.equal(with_maps.latents, without.latents)
    assert without.item_maps is None and without.mask_source is None


def test_item_maps_are_the_mean_attention_of_the_items_tokens() -> None:
    """Compared with attention matrices computed by hand from the inputs of the first up layer's cross-attention."""
    unet = tiny_unet()
    prompts = embeds(2)
    negative = embeds(1, seed=2)
    modules = [unet.get_submodule(f"up_blocks.1.attentions.{k}.transformer_blocks.0.attn2") for k in (0, 1)]
    seen: list[torch.Tensor] = []

    def record(module: torch.nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        q = module.to_q(args[0][2:]).view(2, 64, module.heads, -1)
        k = module.to_k(prompts).view(2, prompts.shape[1], module.heads, -1)
        scores = torch.einsum("blhd,bnhd->bhln", q, k) / q.shape[-1] ** 0.5
        seen.append(scores.softmax(-1).mean(1))

    hooks = [module.register_forward_hook(record) for module in modules]
    config = SamplingConfig(num_steps=1)
    scheduler = sd_scheduler(timestep_spacing="trailing", steps_offset=0)
    maps = sample(unet, scheduler, prompts, negative, [1, 2], items=[[2], [0, (3, 5)]], config=config).item_maps
    for hook in hooks:
        hook.remove()
    mean = (seen[0] + seen[1]) / 2
    assert maps is not None and maps.shape == (2, 1, 8, 8, 2)
    torch.testing.assert_close(maps[0, 0, ..., 0].flatten(), mean[0, :, 3])
    assert maps[0, 0, ..., 1].abs().max() == 0
    torch.testing.assert_close(maps[1, 0, ..., 0].flatten(), mean[1, :, 1])
    torch.testing.assert_close(maps[1, 0, ..., 1].flatten(), (mean[1, :, 4] + mean[1, :, 6]) / 2)


def test_guidance_one_is_a_single_conditional_pass() -> None:
    unet = tiny_unet()
    rows = []
    unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    unguided = sample(unet, sd_scheduler(), embeds(1), None, [3], config=SamplingConfig(num_steps=2, guidance_scale=1))
    assert rows == [1, 1]
    assert unguided.latents.isfinite().all()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_replay_ratio_is_one(guidance: float) -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler()
    prompts = embeds(2)
    negative = embeds(1, seed=2)
    trajectory = sample(unet, scheduler, prompts, negative, [1, 2], config=SamplingConfig(guidance_scale=guidance))
    with torch.no_grad():
        replayed = log_probs(unet, scheduler, trajectory, prompts, negative)
    assert ((replayed - trajectory.log_probs).exp() - 1).abs().max() < 1e-5


def test_rows_of_mixed_steps_replay_and_carry_gradients() -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler()
    prompts = embeds(2)
    negative = embeds(1, seed=2)
    trajectory = sample(unet, scheduler, prompts, negative, [1, 2], config=FOUR)
    schedule = ddim.Schedule.from_scheduler(scheduler, 4, 1.0)
    steps = torch.tensor([3, 1])
    rows = torch.arange(2)
    x_t = trajectory.latents[rows, steps]
    x_prev = trajectory.latents[rows, steps + 1]
    replayed = transition_log_prob(unet, schedule, x_t, x_prev, steps, prompts, negative, 5.0)

    torch.testing.assert_close(replayed, trajectory.log_probs[rows, steps], rtol=0, atol=1e-5)

    replayed.sum().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_steps_without_noise_are_recorded_as_zero() -> None:
    scheduler = sd_scheduler(set_alpha_to_one=True)
    arguments = (tiny_unet(), scheduler, embeds(1), embeds(1, seed=2))
    trajectory = sample(*arguments, [1], config=FOUR)
    assert trajectory.log_probs[0, 3] == 0 and trajectory.log_probs.isfinite().all()
    assert log_probs(*arguments[:2], trajectory, *arguments[2:]).shape == (1, 3)


def test_on_step_is_called_before_each_step_and_may_cancel() -> None:
    seen = []

    def stop(step_index: int, num_steps: int) -> None:
        seen.append((step_index, num_steps))
        if step_index == 2:
            raise KeyboardInterrupt

    unet = tiny_unet()
    before = unet.attn_processors
    with pytest.raises(KeyboardInterrupt):
        sample(unet, sd_scheduler(), embeds(1), embeds(1), [1], items=[[1]], config=FOUR, on_step=stop)
    assert seen == [(0, 4), (1, 4), (2, 4)]
    assert unet.attn_processors == before


def test_bad_input_is_named() -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler()

    with pytest.raises(ShapeMismatchError, match="prompt_embeds"):
        sample(unet, scheduler, embeds(2), embeds(1), [1])
    with pytest.raises(InvalidInputError, match="negative"):
        sample(unet, scheduler, embeds(1), None, [1])
    with pytest.raises(InvalidInputError, match="token indices"):
        sample(unet, scheduler, embeds(1), embeds(1), [1], items=[[6]])
    with pytest.raises(InvalidInputError, match=r"token indices .* got 'circle'"):
        sample(unet, scheduler, embeds(1), embeds(1), [1], items=[["circle"]])  # type: ignore[list-item]
    for seed in (-1, 2**64, 1.5):
        with pytest.raises(InvalidInputError, match="seeds"):
            sample(unet, scheduler, embeds(1), embeds(1), [seed])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="latent_size"):
        sample(unet, scheduler, embeds(1), embeds(1), [1], latent_size=(0, 8))
    with pytest.raises(InvalidInputError, match=r"latent_size: .* height None and width 24"):
        sample(unet, scheduler, embeds(1), embeds(1), [1], config=SamplingConfig(width=24))
