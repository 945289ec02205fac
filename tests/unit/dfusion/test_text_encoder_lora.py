"""Adapters with parts of text encoders: as stock diffusers loads them, and exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dfusion.adapter import attach_lora, detach, load_adapter, lora_parameters, save_adapter
from dfusion.config import SamplingConfig
from dfusion.errors import AdapterError, ExportError
from dfusion.export import PreviewSettings, export_adapter, render
from dfusion.files import read_tensors
from dfusion.models import DiffusionModel, Pipeline, load_pipeline
from dfusion.recipes import Companions, ExportFormat
from tests.adapters import ATTENTION, TEXT_LAYERS, Lora, diffusers_file, kohya_file, merged, random_lora
from tests.nets import tiny_pipeline, tiny_xl_pipeline

PROMPT = "a red circle"
PIPELINES = {"sd": tiny_pipeline, "xl": tiny_xl_pipeline}
TEXT = {
    "text_encoder": lambda: Lora(2, 3, ranks={"fc1": 4}, alphas={"q_proj": 5.0}),
    "text_encoder_2": lambda: Lora(3, 4, use_rslora=True),
}
"""The adapter of each text encoder."""


def write(pipeline: Pipeline, folder: Path, form: str) -> tuple[Path, dict[str, Lora]]:
    """A file with the U-Net and all text encoders. Returns it with the text encoders' adapters."""
    text = {}
    for name, make in TEXT.items():
        if encoder := getattr(pipeline, name, None):
            text[name] = random_lora(encoder.state_dict(), TEXT_LAYERS, make())
    unet = random_lora(pipeline.unet.state_dict(), ATTENTION, Lora(2, 2))
    if form == "diffusers":
        return diffusers_file(unet, folder, text=text), text
    return kohya_file(unet, folder, len(text) == 2, text), text


def stock_embeds(pipeline: Pipeline) -> list[torch.Tensor]:
    """The prompt's embeddings (SDXL: and pooled) by the stock pipeline."""
    encoded = pipeline.encode_prompt(
        prompt=PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return [encoded[0], encoded[2]] if len(encoded) == 4 else [encoded[0]]


def embeds(model: DiffusionModel) -> list[torch.Tensor]:
    """The same by our model."""
    encoded = model.encode_prompts([PROMPT])
    return [encoded.embeds] if encoded.pooled is None else [encoded.embeds, encoded.pooled]


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("net", PIPELINES)
@pytest.mark.slow
def test_prompts_are_encoded_with_the_merged_weights_until_the_adapter_is_detached(
    net: str, form: str, tmp_path: Path
) -> None:
    pipeline = PIPELINES[net]()
    file, text = write(pipeline, tmp_path, form)
    model = DiffusionModel.from_pipeline(PIPELINES[net]())
    plain = embeds(model)
    originals = {name: dict(encoder.state_dict()) for name, encoder in model.text_encoders.items()}
    originals = {name: {key: value.clone() for key, value in own.items()} for name, own in originals.items()}

    load_adapter(model.unet, file, model.text_encoders)
    got = embeds(model)
    for name, encoder in model.text_encoders.items():
        torch.testing.assert_close(dict(encoder.state_dict()), merged(originals[name], text[name]))
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all((a - b).abs().max() > 0.05 for a, b in zip(got, plain, strict=True))

    save_adapter(model.unet, tmp_path / "again.safetensors")  # while it is attached
    attach_lora(model.unet)  # replaces it
    assert all(torch.equal(a, b) for a, b in zip(embeds(model), plain, strict=True))

    load_adapter(model.unet, tmp_path / "again.safetensors", model.text_encoders)
    torch.testing.assert_close(embeds(model), got)
    detach(model.unet)
    for name, encoder in model.text_encoders.items():
        assert all(torch.equal(value, originals[name][key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("net", PIPELINES)
@pytest.mark.slow
def test_stock_diffusers_encodes_prompts_the_same_by_our_file_and_by_the_original(net: str, tmp_path: Path) -> None:
    file, _ = write(PIPELINES[net](), tmp_path, "diffusers")
    model = DiffusionModel.from_pipeline(PIPELINES[net]())
    load_adapter(model.unet, file, model.text_encoders)
    save_adapter(model.unet, tmp_path / "saved.safetensors")
    for path in (file, tmp_path / "saved.safetensors"):
        stock = PIPELINES[net]()
        stock.load_lora_weights(path.parent, weight_name=path.name)
        torch.testing.assert_close(embeds(model), stock_embeds(stock), atol=1e-5, rtol=1e-5)


def test_names_of_old_versions_of_diffusers_are_read(tmp_path: Path) -> None:
    """Attention layers to_q_lora, …; without metadata, alpha is the rank."""
    pipeline = tiny_pipeline()
    file, text = write(pipeline, tmp_path, "diffusers")
    tensors, _ = read_tensors(file)
    old = {}
    for key, value in tensors.items():
        for name in ("q", "k", "v", "out"):
            key = key.replace(f"{name}_proj.lora_linear_layer", f"to_{name}_lora")
        old[key] = value
    save_file(old, tmp_path / "old.safetensors")
    model = DiffusionModel.from_pipeline(pipeline)
    weights = {key: value.clone() for key, value in model.text_encoder.state_dict().items()}
    load_adapter(model.unet, tmp_path / "old.safetensors", model.text_encoders)

    lora = text["text_encoder"]
    lora.alphas = {layer: float(len(down)) for layer, down in lora.down.items()}
    torch.testing.assert_close(dict(model.text_encoder.state_dict()), merged(weights, lora))


def test_half_precision_weights_are_rounded_once(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    file, text = write(pipeline, tmp_path, "kohya")
    encoder = pipeline.text_encoder.bfloat16()
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    load_adapter(pipeline.unet, file, {"text_encoder": encoder})
    for key, value in merged(weights, text["text_encoder"]).items():
        torch.testing.assert_close(encoder.state_dict()[key], value, rtol=2**-8, atol=0)


def test_text_encoders_must_be_given(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    file, _ = write(pipeline, tmp_path, "kohya")
    with pytest.raises(AdapterError, match=r"expected text_encoders .*lora_te_.*got none"):
        load_adapter(pipeline.unet, file)


@pytest.mark.slow
@pytest.mark.parametrize("net", PIPELINES)
def test_exports_have_the_text_encoders(net: str, tmp_path: Path) -> None:
    """Stock diffusers renders the preview with each export. A folder of PEFT is for the U-Net only."""
    make: Callable[[], Pipeline] = PIPELINES[net]
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "base")
    file, text = write(pipeline, tmp_path, "kohya")
    load_adapter(pipeline.unet, file, DiffusionModel.from_pipeline(pipeline).text_encoders)
    for parameter in lora_parameters(pipeline.unet).values():
        parameter.data *= 0.9  # a training changes the U-Net's part
    save_adapter(pipeline.unet, tmp_path / "adapter.safetensors")
    expected = stock_embeds(pipeline)

    preview = PreviewSettings(PROMPT, sampling=SamplingConfig(num_steps=2))
    forms: tuple[ExportFormat, ...] = ("diffusers", "kohya", "merged")
    for form in forms:
        path = tmp_path / form
        report = export_adapter(tmp_path / "base", tmp_path / "adapter.safetensors", path, form, preview=preview)
        stock = load_pipeline(path if form == "merged" else tmp_path / "base")
        if form != "merged":
            stock.load_lora_weights(str(path), use_safetensors=True)
        torch.testing.assert_close(stock_embeds(stock), expected, atol=1e-4, rtol=1e-4)
        image = np.asarray(Image.open(Companions.of(path, form).preview), np.float32)
        assert np.abs(render(stock, report.recipe) * 255 - image).max() <= 1, form

    with pytest.raises(ExportError, match=r"U-Net only, got one of text_encoder.* too"):
        export_adapter(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "peft", "peft", preview=preview)

    tensors, _ = read_tensors(tmp_path / "kohya")
    prefixes = {key.partition("_text_model")[0] for key in tensors if key.startswith("lora_te")}
    assert prefixes == ({"lora_te"} if net == "sd" else {"lora_te1", "lora_te2"})
    assert len([key for key in tensors if key.startswith("lora_te")]) == 3 * sum(
        len(lora.down) for lora in text.values()
    )
