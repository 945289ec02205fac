import math
from typing import Any

import numpy as np
import pytest
import torch

from dfusion.config import FusionConfig
from dfusion.ddim import Schedule
from dfusion.guidance import predict
from dfusion.shapes.prompts import prompt_list
from dfusion.shapes.scenes import Backdrop, Scene, Thing, random_scene, render
from tests.nets import tiny_model
from tools.shapes.thresholds_report import encode_images, measure, noised_item_maps, report, true_masks

PROMPT = prompt_list("behaviour", "train")[0]


def test_a_cell_belongs_to_an_item_that_covers_half_of_it() -> None:
    backdrop = Backdrop("flat", (90, 90, 90), (90, 90, 90), 0.0, 0)
    scene = Scene("attribute", (Thing("circle", "red", x=32, y=24, radius=16),), backdrop)
    mask = true_masks([scene, scene], 16)
    assert mask.shape == (2, 16, 16, 1) and mask.dtype == torch.bool
    ys, xs = np.mgrid[0:16, 0:16] * 4 + 2  # middles of the cells, in pixels
    expected = (xs - 32) ** 2 + (ys - 24) ** 2 < 16**2
    assert (mask[0, ..., 0].numpy() != expected).sum() <= 0.05 * expected.sum()
    assert mask[0].sum().item() * 16 == pytest.approx(math.pi * 16**2, rel=0.05)


@torch.no_grad()
def test_encoded_images_are_the_scaled_mean_of_the_vae() -> None:
    model = tiny_model()
    images = np.stack([render(random_scene("attribute", np.random.default_rng(seed))) for seed in range(2)])
    latents = encode_images(model, images)
    pixels = torch.tensor(images / 255 * 2 - 1).float().permute(0, 3, 1, 2)
    moments = model.vae.quant_conv(model.vae.encoder(pixels))  # mean and log-variance
    expected = moments[:, :4] * model.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


def test_maps_of_an_image_do_not_depend_on_its_batch() -> None:
    model = tiny_model()
    schedule = Schedule.from_scheduler(model.scheduler, 20, 1.0)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = noised_item_maps(model, clean, PROMPT, schedule, [2, 10], seed=5)

    assert both.shape == (2, 2, 8, 8, 2)
    assert 0 < both.min() and both.max() < 1

    alone = noised_item_maps(model, clean[1:], PROMPT, schedule, [2, 10], seed=6)
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=1e-5)

    later = noised_item_maps(model, clean, PROMPT, schedule, [10], seed=5)
    assert not torch.allclose(later[:, 0], both[:, 1])  # the first draw of noise went to step 2


def test_states_are_the_noised_latents_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    seen = []

    def remember(unet: Any, x_t: torch.Tensor, timestep: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((x_t, int(timestep)))
        return predict(unet, x_t, timestep, *rest)

    monkeypatch.setattr("tools.shapes.thresholds_report.predict", remember)
    clean = torch.ones(1, 4, 8, 8)
    noised_item_maps(model, clean, PROMPT, Schedule.from_scheduler(model.scheduler, 20, 1.0), [3], seed=7)
    (x_t, timestep), noise = seen[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))
    share = model.scheduler.alphas_cumprod[timestep]  # of the picture in the variance; timesteps are 951, 901, ...
    assert timestep == 801
    torch.testing.assert_close(x_t[0], share.sqrt() + (1 - share).sqrt() * noise)


def test_a_prompt_is_measured_with_both_kinds_of_thresholds() -> None:
    config = FusionConfig(first_step=18)
    agreement = measure(tiny_model(), PROMPT, samples=1, count=1, seed=0, config=config)
    assert agreement.hand_set == PROMPT.thresholds and agreement.automatic != agreement.hand_set
    assert all(0 < threshold < 1 for threshold in agreement.automatic)
    assert all(0 <= iou <= 1 for iou in (*agreement.automatic_iou, *agreement.hand_set_iou))


def test_the_report_has_a_line_for_the_template_and_each_item() -> None:
    lines = report(tiny_model(), "behaviour", 1, 1, 1, 0, FusionConfig(first_step=18))
    assert [line.split(":")[0] for line in lines] == ["behaviour", "  item 0", "  item 1"]
