"""The check of a model: its report, its image, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dfusion.config import SamplingConfig
from dfusion.errors import NonFiniteError, UnsupportedModelError
from dfusion.model_report import check_model, main
from tests.model_folders import both, edit, scheduler, tensors
from tests.nets import sd_unet, tiny_pipeline, tiny_xl_pipeline

FOUR = SamplingConfig(num_steps=4)


def image_size(file: Path | str) -> tuple[int, int]:
    """(width, height)."""
    with Image.open(file) as image:
        return image.size


def test_a_report_says_what_the_model_is(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler("EulerDiscreteScheduler", **changes)(tmp_path / "model")
    report = check_model(tmp_path / "model", tmp_path / "new" / "image.png", sampling=FOUR)

    assert (report.layout, report.pipeline) == ("other (text encoder of width 16)", "StableDiffusionPipeline")
    assert (report.prediction_type, report.scheduler) == ("v_prediction", "EulerDiscreteScheduler")
    assert report.betas == "1000, scaled_linear from 0.00085 to 0.012"
    assert (report.zero_terminal_snr, report.timestep_spacing) == (True, "trailing")
    assert report.fused_layers == ("1 mid_block", "2 up_blocks.1")
    assert report.notes == ("sampled by DDIM (Eq. 1) with the betas of the EulerDiscreteScheduler",)

    count = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert report.parameters["unet"] == count and set(report.parameters) == {"unet", "vae", "text_encoder"}
    assert report.weights_bytes == 4 * sum(report.parameters.values()) < report.peak_bytes
    assert report.load_seconds > 0 and report.seconds_per_image > 0
    assert (report.num_steps, report.height, report.width) == (4, 16, 16)
    assert image_size(report.image) == (16, 16)


def test_an_image_of_another_size_and_precision(tmp_path: Path) -> None:
    tiny_xl_pipeline().save_pretrained(tmp_path / "model")
    sampling = SamplingConfig(num_steps=4, height=16, width=24)
    report = check_model(tmp_path / "model", tmp_path / "image.png", sampling=sampling, dtype="bfloat16")
    assert (report.layout, report.dtype, report.vae_dtype) == ("SDXL", "bfloat16", "float32")
    assert image_size(tmp_path / "image.png") == (24, 16)


def test_stable_diffusions_layers_are_3_to_6(tmp_path: Path) -> None:
    """As table 3 counts them."""
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=sd_unet(sample_size=8))
    pipeline.save_pretrained(tmp_path / "model")
    report = check_model(tmp_path / "model", tmp_path / "image.png", sampling=FOUR)
    assert report.fused_layers == ("3 mid_block", "4 up_blocks.1", "5 up_blocks.2", "6 up_blocks.3")


def test_an_image_of_one_colour_is_not_a_check_passed(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")

    def blacken(content: dict[str, torch.Tensor]) -> None:
        content["decoder.conv_out.weight"] = torch.zeros_like(content["decoder.conv_out.weight"])
        content["decoder.conv_out.bias"] = torch.full_like(content["decoder.conv_out.bias"], -9)

    tensors("vae", blacken)(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="one colour"):
        check_model(tmp_path / "model", tmp_path / "image.png", sampling=FOUR)
    assert not (tmp_path / "image.png").exists()


def test_the_program_writes_the_report_or_the_error_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": "shapes", "device": "auto", "image": str(tmp_path / "image.png"), "sampling": {"num_steps": 2}}
    assert main([json.dumps(options)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pipeline"], report["num_steps"], report["device"]) == ("StableDiffusionPipeline", 2, "cpu")

    tiny_pipeline().save_pretrained(tmp_path / "model")
    both(scheduler("LCMScheduler"), edit("model_index.json"))(tmp_path / "model")
    assert main([json.dumps(options | {"model": str(tmp_path / "model")})]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == UnsupportedModelError.__name__ and "LCMScheduler" in error["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": {"num_steps": 0}}, "num_steps: Input should be greater than or equal to 1, got 0"),
        ({"image": "."}, "image: expected a PNG file, got the folder ."),
        ({"image": "/dev/null/image.png"}, "image: expected a writable file, got /dev/null/image.png: "),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": "shapes", "image": "image.png", "sampling": {"num_steps": 2, "height": 16, "width": 16}}
    assert main([json.dumps(given | options)]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "InvalidInputError" and error["message"].startswith(message)
