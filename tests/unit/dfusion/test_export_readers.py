"""Which program reads which export: the table of docs/how-to/use-an-exported-model.md.

diffusers and peft read exports of small models, and images are compared. kohya's sd-scripts and ComfyUI are lists of
names, which tests/unet_layouts.py derives for U-Nets of true size.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from dfusion import export
from dfusion._diffusers import UNet2DConditionModel, peft
from dfusion.adapter import has_lora
from dfusion.config import LoraConfig, SamplingConfig
from dfusion.export import ExportFormat, PreviewSettings, render
from dfusion.files import read_tensors
from dfusion.models import Pipeline, load_pipeline
from tests.adapters import ATTENTION, Lora, diffusers_file, random_lora
from tests.nets import sd_scheduler, tiny_pipeline, tiny_unet, tiny_xl_pipeline
from tests.pages import ROOT
from tests.unet_layouts import LAYOUTS, SD_15, SD_21, SDXL, Layout, attention_projections, weights
from tests.unit.dfusion.test_export import saved

FORMS: tuple[ExportFormat, ...] = ("diffusers", "kohya", "peft", "merged")
PREVIEW = PreviewSettings(sampling=SamplingConfig(num_steps=2))
RANK, ALPHA = 2, 3.0
SOME_LAYERS = LoraConfig(
    rank=3,
    alpha=6.0,
    targets=(*(f"mid_block.*.{name}" for name in ATTENTION), "down_blocks.*.attn1.to_q", "up_blocks.*.attn2.to_out.0"),
)
"""All projections, in all parts of the U-Net. All layers are compared by names."""
V_PREDICTION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_names_of_weights_are_those_of_diffusers(layout: Layout) -> None:
    """Both by its models and by its converter of original checkpoints."""
    names = weights(layout)
    unet = layout.unet()
    assert unet.state_dict().keys() == names.keys()

    numbered = {original: torch.tensor([number]) for number, original in enumerate(names.values())}
    checkpoint = {f"model.diffusion_model.{name}": value for name, value in numbered.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert converted == {name: numbered[original] for name, original in names.items()}


# readers by names


@dataclass(frozen=True)
class Update:
    """What a reader adds to the weight of a module: scale * up @ down."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


Updates = dict[str, Update]
"""By diffusers' name of the module."""
Tensors = Mapping[str, torch.Tensor]


def read_by_kohya(tensors: Tensors, layout: Layout) -> Updates:
    """networks/lora.py of sd-scripts: SDXL's modules have their original names, others those of diffusers."""
    names = {}
    for diffusers, original in weights(layout).items():
        module = diffusers.removesuffix(".weight")
        name = original.removesuffix(".weight") if layout is SDXL else module
        if "attentions" in module and not diffusers.endswith(".bias"):
            names["lora_unet_" + name.replace(".", "_")] = module

    updates = {}
    for name, module in names.items():
        if f"{name}.lora_down.weight" in tensors:
            down, up = (tensors[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
            alpha = tensors.get(f"{name}.alpha", torch.tensor(len(down)))
            updates[module] = Update(down, up, float(alpha) / len(down))
    return updates


COMFYUI_SIDES = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)


def read_by_comfyui(tensors: Tensors, layout: Layout) -> Updates:
    """comfy/lora.py: a module has several names, with underscores in both codes' names, and with dots."""
    updates = {}
    for diffusers, original in weights(layout).items():
        if diffusers.endswith(".bias"):
            continue
        module, source = diffusers.removesuffix(".weight"), original.removesuffix(".weight")
        processor = re.sub(r"\.to_out\.0$", ".to_out", module).replace(".to_", ".processor.to_")
        names = [f"diffusion_model.{source}", processor, f"unet.{processor}"]
        names += [f"lora_unet_{name.replace('.', '_')}" for name in (source, module)]
        names += [f"lycoris_{module.replace('.', '_')}"]

        for name in names:
            for up, down in COMFYUI_SIDES:
                if name + up in tensors:
                    rank = len(tensors[name + down])
                    alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else rank
                    updates[module] = Update(tensors[name + down], tensors[name + up], alpha / rank)
    return updates


@pytest.fixture(scope="module")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], tuple[Path, Path]]:
    """Make a model's folder without weights, and an adapter of random numbers for its U-Net of true size."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(layout: Layout) -> tuple[Path, Path]:
        if layout.name in made:
            return made[layout.name]
        folder = tmp_path_factory.mktemp("true-size")
        unet = layout.unet()
        unet.save_config(folder / "unet")
        sd_scheduler(**(V_PREDICTION if layout is SDXL else {})).save_pretrained(folder / "scheduler")
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text('{"block_out_channels": [128, 256, 512, 512]}')

        lora = random_lora(unet.state_dict(), ATTENTION, Lora(RANK, ALPHA))
        return made.setdefault(layout.name, (folder, diffusers_file(lora, folder / "adapter")))

    return make


def tensors_of(exported: Path) -> Tensors:
    """The tensors of an exported LoRA."""
    return read_tensors(exported / "adapter_model.safetensors" if exported.is_dir() else exported)[0]


def updates_of(adapter: Path) -> Updates:
    """What an adapter of rank RANK and alpha ALPHA adds."""
    stored, _ = read_tensors(adapter)
    updates = {}
    for name, down in stored.items():
        if ".lora.down." in name:
            module = name.removeprefix("unet.").removesuffix(".lora.down.weight")
            updates[module] = Update(down, stored[name.replace(".down.", ".up.")], ALPHA / RANK)
    return updates


def same(first: Updates, second: Updates) -> bool:
    """Whether two readers add the same to the same modules."""
    return first.keys() == second.keys() and all(
        torch.equal(update.down, second[name].down)
        and torch.equal(update.up, second[name].up)
        and update.scale == second[name].scale
        for name, update in first.items()
    )


def readers_by_names(
    form: ExportFormat, layout: Layout, small_export: Path, true_size: Callable[[Layout], tuple[Path, Path]]
) -> set[str]:
    """The programs that read an export by its names. One that reads another adapter, or a part, fails."""
    if form == "merged":  # its names are those of the base model, see above and test_export.py
        return set(NAMES)

    readers = {program for program, reader in NAMES.items() if reader(tensors_of(small_export), layout)}
    if not readers:
        return readers

    base, adapter = true_size(layout)
    exported = base / form
    export._WRITERS[form](base, adapter, exported)
    expected = updates_of(adapter)
    assert sorted(expected) == sorted(attention_projections(layout))

    for program in readers:
        assert same(NAMES[program](tensors_of(exported), layout), expected), program
    return readers


NAMES = {"kohya": read_by_kohya, "ComfyUI": read_by_comfyui}


# readers by images


def small(layout: Layout) -> Pipeline:
    """A small pipeline of this layout."""
    if layout is SDXL:
        return tiny_xl_pipeline()
    if layout is SD_15:
        return tiny_pipeline()

    pipeline = tiny_pipeline(prediction_type="v_prediction")
    unet = UNet2DConditionModel.from_config({**tiny_unet().config, "use_linear_projection": True})
    pipeline.register_modules(unet=unet.eval())
    return pipeline


def load_by_diffusers(form: ExportFormat, base: Pipeline, exported: Path) -> Pipeline | None:
    """The pipeline with the export; None if diffusers does not read it: it ignores unknown names with a warning."""
    if form == "merged":
        return load_pipeline(exported)
    pipeline = copy.deepcopy(base)
    pipeline.load_lora_weights(str(exported))
    return pipeline if has_lora(pipeline.unet) else None


def load_by_peft(_form: ExportFormat, base: Pipeline, exported: Path) -> Pipeline | None:
    """The pipeline with the export; None if peft does not read it. A file's weights go into a new adapter."""
    if exported.is_dir() and not (exported / "adapter_config.json").is_file():
        return None
    pipeline = copy.deepcopy(base)
    if exported.is_dir():
        peft.PeftModel.from_pretrained(pipeline.unet, str(exported))
        return pipeline

    tensors, _ = read_tensors(exported)
    adapted = peft.get_peft_model(pipeline.unet, peft.LoraConfig(r=3, target_modules=["to_q", "to_k"]))
    incompatible = peft.set_peft_model_state_dict(adapted, dict(tensors))
    assert incompatible.unexpected_keys
    return None


def readers_by_images(form: ExportFormat, base: Pipeline, exported: Path, expected: export._Expected) -> set[str]:
    """The programs with which an export renders the adapter's image. One that renders another image fails."""
    readers = set()
    for program, load in IMAGES.items():
        pipeline = load(form, base, exported)
        if pipeline is not None:
            assert np.abs(render(pipeline, expected.recipe) - expected.image).max() < 1e-4 < expected.effect
            readers.add(program)
    return readers


IMAGES = {"diffusers": load_by_diffusers, "peft": load_by_peft}
ABOUT = {
    "diffusers": "a LoRA file",
    "kohya": "a LoRA file",
    "peft": "a folder with a LoRA",
    "merged": "a folder with a pipeline",
}


@pytest.mark.slow
def test_the_documented_table(tmp_path: Path, true_size: Callable[[Layout], tuple[Path, Path]]) -> None:
    read: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layout in LAYOUTS:
        folder = tmp_path / layout.name
        base, adapter = saved(small(layout), folder, lora=SOME_LAYERS)
        expected = export._expected(base, adapter, "cpu", PREVIEW, "base", "kohya")
        pipeline = load_pipeline(base)
        for form in FORMS:
            export._WRITERS[form](base, adapter, folder / form)
            by_images = readers_by_images(form, pipeline, folder / form, expected)
            for program in by_images | readers_by_names(form, layout, folder / form, true_size):
                read[form, program].append(layout.name)

    programs = [*IMAGES, *NAMES]
    lines = [f"| format | what it is | {' | '.join(programs)} |", "|---" * (len(programs) + 2) + "|"]
    for form in FORMS:
        cells = (", ".join(read[form, program]) or "no" for program in programs)
        lines.append(f"| `{form}` | {ABOUT[form]} | {' | '.join(cells)} |")
    assert "\n".join(lines) in (ROOT / "docs/how-to/use-an-exported-model.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (SD_15, ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon", "False", "False", "512x512")),
        (SD_21, ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon", "False", "False", "768x768")),
        (
            SDXL,
            ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "v", "True", "True", "1024x1024"),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_metadata_of_kohya_files(
    tmp_path: Path,
    true_size: Callable[[Layout], tuple[Path, Path]],
    layout: Layout,
    expected: tuple[str, ...],
) -> None:
    """SDXL's base model predicts v, with zero terminal SNR."""
    export._WRITERS["kohya"](*true_size(layout), tmp_path / "lora.safetensors")
    _, about = read_tensors(tmp_path / "lora.safetensors")
    names = [
        "ss_base_model_version",
        "ss_v2",
        "modelspec.architecture",
        "modelspec.prediction_type",
        "ss_v_parameterization",
        "ss_zero_terminal_snr",
        "modelspec.resolution",
    ]
    assert tuple(about[name] for name in names) == expected

    assert {"modelspec.sai_model_spec", "modelspec.implementation", "modelspec.title"} <= about.keys()
    assert all(isinstance(value, str) for value in about.values())
    assert json.loads(about["dfusion"]) == {}
