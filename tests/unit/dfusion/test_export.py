import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfusion import _torchvision_ops, export
from dfusion.adapter import attach_lora, detach, lora_parameters, read_adapter, save_adapter
from dfusion.config import LoraConfig, SamplingConfig
from dfusion.errors import CheckpointError, ExportError, InvalidInputError
from dfusion.export import TOLERANCE, PreviewSettings, export_adapter, original_name
from dfusion.files import read_tensors, write_tensors
from dfusion.models import Pipeline, load_pipeline
from dfusion.recipes import FOLDERS, Companions, ExportFormat, Recipe
from tests.nets import sd_scheduler, tiny_pipeline, tiny_xl_pipeline, tiny_xl_unet
from tests.pages import blocks

PREVIEW = PreviewSettings(sampling=SamplingConfig(num_steps=2))
FORMS: tuple[ExportFormat, ...] = ("diffusers", "kohya", "peft", "merged")
FRESH = """
import importlib.util, json, os, sys
found = importlib.util.spec_from_file_location("ops", sys.argv[1])
ops = importlib.util.module_from_spec(found)
found.loader.exec_module(ops)
for folder, code in json.load(sys.stdin):
    os.chdir(folder)
    exec(code, {})
assert not any(name.split(".")[0] == "dfusion" for name in sys.modules)
"""
Work = list[tuple[str, str]]
"""Folders, and the code to run in them."""
PAGE = "docs/how-to/use-an-exported-model.md"


def saved(
    pipeline: Pipeline, folder: Path, strength: float = 0.3, lora: LoraConfig = LoraConfig(rank=3, alpha=6.0)
) -> tuple[Path, Path]:
    """The pipeline's folder, and the file of an adapter for it that changes its images."""
    pipeline.save_pretrained(folder / "base")
    attach_lora(pipeline.unet, lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(pipeline.unet).values():
        parameter.data += strength * torch.randn(parameter.shape, generator=generator)
    save_adapter(pipeline.unet, folder / "adapter.safetensors", {"round": "2"})
    detach(pipeline.unet)
    return folder / "base", folder / "adapter.safetensors"


@pytest.fixture(scope="module", params=[tiny_pipeline, tiny_xl_pipeline], ids=["sd", "sdxl"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    make: Callable[[], Pipeline] = request.param
    return saved(make(), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved(tiny_pipeline(), tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_every_form_gives_the_same_image(sd: tuple[Path, Path], tmp_path: Path, form: ExportFormat) -> None:
    require_same_image(sd, tmp_path, form)


@pytest.mark.parametrize("form", ["kohya", *(pytest.param(form, marks=pytest.mark.long) for form in FORMS[::2])])
@pytest.mark.slow
def test_forms_of_sdxl_give_the_same_image(tmp_path_factory: pytest.TempPathFactory, form: ExportFormat) -> None:
    """In all forms, images of SDXL are compared in tests/unit/dfusion/test_export_readers.py, too."""
    trained = saved(tiny_xl_pipeline(), tmp_path_factory.mktemp("trained"))
    require_same_image(trained, tmp_path_factory.mktemp("out"), form)


def require_same_image(trained: tuple[Path, Path], tmp_path: Path, form: ExportFormat) -> None:
    report = export_adapter(*trained, tmp_path / "out", form, preview=PREVIEW)
    assert report.difference <= TOLERANCE < 10 * TOLERANCE < report.effect
    beside = set() if form in FOLDERS else {"out.recipe.json", "out.preview.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"} | beside


@pytest.mark.slow
def test_layers_with_their_own_rank_and_alpha_keep_them(tmp_path: Path) -> None:
    """With rsLoRA, the scale is alpha / sqrt(rank): 6 / sqrt(2) for attn1.to_q, 5 / sqrt(3) in the middle block."""
    # 1. by images
    lora = LoraConfig(
        rank=3,
        alpha=6.0,
        targets=("attention", "feed_forward"),
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={"mid_block.*": 5.0},
        use_rslora=True,
    )
    trained = saved(tiny_xl_pipeline(), tmp_path, strength=0.1, lora=lora)  # 0.3 amplifies rounding to 1 / 255
    export_adapter(*trained, tmp_path / "kohya", "kohya", preview=PREVIEW)
    sd = saved(tiny_pipeline(), tmp_path / "sd", strength=0.1, lora=lora)
    export_adapter(*sd, tmp_path / "peft", "peft", preview=PREVIEW)

    # 2. by hand
    stored = read_adapter(trained[1]).weights
    tensors, about = read_tensors(tmp_path / "kohya")
    [alpha] = {float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    assert alpha == pytest.approx(6 * 3**0.5)  # the most frequent one; diffusers ignores others
    assert float(about["ss_network_alpha"]) == pytest.approx(alpha)

    block = "transformer_blocks.0"
    scales = {
        f"down_blocks.1.attentions.0.{block}.attn1.to_q": 6 / 2**0.5,
        f"mid_block.attentions.0.{block}.attn1.to_k": 5 / 3**0.5,
        f"up_blocks.0.attentions.0.{block}.ff.net.0.proj": 6 / 3**0.5,
    }
    originals = ("input_blocks_4_1", "middle_block_1", "output_blocks_0_1")
    for (module, scale), original in zip(scales.items(), originals, strict=True):
        down, up = (stored[f"{module}.lora_{matrix}.weight"] for matrix in "AB")
        name = f"lora_unet_{original}_transformer_blocks_0{module.partition(block)[2].replace('.', '_')}"
        lower, upper, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(alpha / len(lower) * upper @ lower, scale * up @ down)


@pytest.mark.slow
def test_layers_outside_attention_are_exported_for_stock_diffusers(tmp_path: Path) -> None:
    """Files of diffusers' scripts have peft's keys for these layers, and diffusers' for attention. Diffusers takes the
    format from the first key, and ignores the layers whose keys have the other one."""
    lora = LoraConfig(rank=2, targets=("mid_block.*.to_q", "proj_in", "conv_in"))
    base, adapter = saved(tiny_pipeline(), tmp_path, lora=lora)
    export_adapter(base, adapter, tmp_path / "ours", "diffusers", preview=PREVIEW)
    assert (tmp_path / "ours").read_bytes() == adapter.read_bytes()

    tensors, about = read_tensors(adapter)
    as_scripts_do = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up") if "to_q" in key else key: value
        for key, value in tensors.items()
    }
    assert len({".lora_A." in key for key in as_scripts_do}) == 2
    write_tensors(tmp_path / "theirs", as_scripts_do, about)
    export_adapter(base, tmp_path / "theirs", tmp_path / "rewritten", "diffusers", preview=PREVIEW)
    assert (tmp_path / "rewritten").read_bytes() == adapter.read_bytes()


@pytest.mark.slow
def test_layers_of_sdxl_that_kohya_has_no_name_for_are_named(tmp_path: Path) -> None:
    base, adapter = saved(tiny_xl_pipeline(), tmp_path, lora=LoraConfig(rank=2, targets=("conv_in",)))
    with pytest.raises(ExportError, match=r"^kohya export of .*got 'conv_in'; export it as diffusers, peft or merged$"):
        export_adapter(base, adapter, tmp_path / "out", "kohya", preview=PREVIEW)


@pytest.mark.slow
def test_a_dora_is_exported_where_readers_know_it(tmp_path: Path) -> None:
    base, adapter = saved(tiny_pipeline(), tmp_path, lora=LoraConfig(rank=2, targets=("attn2.to_v",), use_dora=True))
    for form in ("diffusers", "peft", "merged"):
        export_adapter(base, adapter, tmp_path / form, form, preview=PREVIEW)
    with pytest.raises(ExportError, match="DoRA"):
        export._WRITERS["kohya"](base, adapter, tmp_path / "kohya")


def run_here(work: Work) -> None:
    for folder, code in work:
        imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
        assert set(imported) <= {"json", "torch", "diffusers", "peft"}
        with contextlib.chdir(folder):
            exec(code, {})


def run_without_dfusion(work: Work) -> None:
    """In another process, except for dfusion's patch for torchvision with a CPU-only torch."""
    command = [sys.executable, "-c", FRESH, _torchvision_ops.__file__]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_here, pytest.param(run_without_dfusion, marks=pytest.mark.long)])
def test_the_recipe_alone_gives_the_preview_with_stock_diffusers(tmp_path: Path, run: Callable[[Work], None]) -> None:
    """By the code of the page and of the export's own text. Our sampler rendered the preview."""
    by_page = blocks(PAGE, "python")[-1]
    sampling = SamplingConfig(num_steps=3, guidance_scale=3.0, eta=0.7, height=24, negative_prompt="a blue star")
    xl = tiny_xl_pipeline()
    xl.scheduler = sd_scheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    cases = {
        "sd": (tiny_pipeline(), PreviewSettings("a green star", 7, sampling), FORMS[1:3]),
        "sdxl": (xl, PreviewSettings("a red circle", 1, SamplingConfig(num_steps=2)), FORMS[3:]),
        "unguided": (
            tiny_pipeline(),
            PreviewSettings(sampling=SamplingConfig(num_steps=2, guidance_scale=0.5)),
            FORMS[:1],
        ),
    }

    work: Work = []
    previews = []
    for kind, (pipeline, preview, forms) in cases.items():
        folder, adapter = saved(pipeline, tmp_path / kind)
        for form in forms:
            out = tmp_path / kind / f"out-{form}"
            out.mkdir()
            path = out / ("folder" if form in FOLDERS else "flowers.safetensors")
            report = export_adapter(folder, adapter, path, form, preview=preview)
            companions = Companions.of(path, form)
            assert Recipe.model_validate_json(companions.recipe.read_text()) == report.recipe

            code = by_page if companions.readme is None else python_of(companions.readme.read_text())
            work.append(
                (str(companions.recipe.parent), code.replace('"base"', f'"{folder}"').replace("BASE", str(folder)))
            )
            previews.append((companions.preview, companions.recipe.parent / "again.png"))

    run(work)
    for preview, again in previews:
        ours, theirs = (np.asarray(Image.open(file)).astype(int) for file in (preview, again))
        assert np.abs(ours - theirs).max() <= 1, again


@pytest.mark.slow
def test_the_page_exports_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny_pipeline(), tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(blocks(PAGE, "python")[0], {})

    names = {"flowers.safetensors", "flowers.recipe.json", "flowers.preview.png"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert json.loads(Path("flowers.recipe.json").read_text())["call"]["num_inference_steps"] == 20


def python_of(text: str) -> str:
    """The only Python block of a text."""
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


@pytest.mark.slow
def test_a_recipe_has_all_settings_but_no_paths(sd: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = sd
    sampling = SamplingConfig(num_steps=2, guidance_scale=2.5, eta=0.5, width=24)
    preview = PreviewSettings("a green star", 3, sampling)
    report = export_adapter(folder, adapter, tmp_path / "lora.safetensors", "kohya", preview=preview)
    stored = json.loads((tmp_path / "lora.recipe.json").read_text())

    assert stored["call"] == {
        "prompt": "a green star",
        "negative_prompt": None,
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
        "eta": 0.5,
        "height": 16,
        "width": 24,
    }
    assert (stored["seed"], stored["base"], stored["sampler"], stored["dtype"]) == (3, "base", "DDIM", "float32")
    assert (stored["scheduler"]["timestep_spacing"], stored["scheduler"]["steps_offset"]) == ("leading", 1)
    assert str(folder.parent) not in report.recipe.to_json()

    image = np.asarray(Image.open(tmp_path / "lora.preview.png"))
    assert image.shape == (16, 24, 3)


def test_a_recipe_that_gives_another_image_is_no_recipe(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preview comes from a seed that differs from the recipe's."""
    sampler = export.sample
    monkeypatch.setattr(export, "sample", lambda *a, **b: sampler(*a[:4], [a[4][0] + 1], **b))
    with pytest.raises(ExportError, match="recipe"):
        export_adapter(*sd, tmp_path / "lora.safetensors", "kohya", preview=PREVIEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_kohya_keys_become_the_same_adapter_by_diffusers_own_converter(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, adapter = trained
    export._WRITERS["kohya"](folder, adapter, tmp_path / "kohya.safetensors")
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path / "kohya.safetensors"), use_safetensors=True)
    (name,) = pipeline.unet.peft_config
    got = {key.replace(f".{name}.", "."): value for key, value in lora_parameters(pipeline.unet).items()}
    expected = read_adapter(adapter).weights

    assert got.keys() == expected.keys() and all(torch.equal(got[key], value) for key, value in expected.items())

    scalings = {m.scaling[name] for m in pipeline.unet.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")}
    assert scalings == {6 / 3}


def test_kohya_files_have_the_metadata_for_a1111(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = trained
    export._WRITERS["kohya"](folder, adapter, tmp_path / "kohya.safetensors")
    tensors, about = read_tensors(tmp_path / "kohya.safetensors")

    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("3", "6.0")

    if "sdxl" in about.get("ss_base_model_version", ""):
        name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    else:
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

    assert tensors[f"{name}.lora_down.weight"].shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == 3
    assert tensors[f"{name}.alpha"].shape == () and float(tensors[f"{name}.alpha"]) == 6

    xl = (folder / "text_encoder_2").is_dir()
    assert about.get("ss_base_model_version") == ("sdxl_base_v1-0" if xl else None)  # this small U-Net is no SD 1 or 2


@pytest.mark.parametrize(
    ("width", "prediction", "version", "v2"),
    [
        (768, "epsilon", "sd_v1", "False"),
        (1024, "epsilon", "sd_v2", "True"),
        (1024, "v_prediction", "sd_v2_v", "True"),
        ([768, 768], "epsilon", None, None),
    ],
)
def test_versions_of_sd(
    sd: tuple[Path, Path], tmp_path: Path, width: int | list[int], prediction: str, version: str | None, v2: str | None
) -> None:
    folder, adapter = sd
    shutil.copytree(folder / "vae", tmp_path / "vae")
    sd_scheduler(prediction_type=prediction).save_pretrained(tmp_path / "scheduler")
    unet = json.loads((folder / "unet" / "config.json").read_text()) | {"cross_attention_dim": width}
    about = export._kohya_metadata(tmp_path, unet, read_adapter(adapter), 6.0)
    assert (about.get("ss_base_model_version"), about.get("ss_v2")) == (version, v2)


def test_original_names_of_sdxl() -> None:
    """By hand from the original U-Net: input block 0 is conv_in, then two layers and a down-sampler per level."""
    names = {
        "down_blocks.1.attentions.0.x": "input_blocks.4.1.x",
        "down_blocks.1.attentions.1.x": "input_blocks.5.1.x",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0": (
            "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0"
        ),
        "mid_block.attentions.0.x": "middle_block.1.x",
        "up_blocks.0.attentions.0.x": "output_blocks.0.1.x",
        "up_blocks.0.attentions.2.x": "output_blocks.2.1.x",
        "up_blocks.1.attentions.2.x": "output_blocks.5.1.x",
    }

    assert {name: original_name(name, layers_per_block=2) for name in names} == names
    with pytest.raises(InvalidInputError, match="conv_in"):
        original_name("conv_in", 2)


@pytest.mark.slow
def test_merged_pipelines_have_merged_weights_and_no_paths(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = trained
    export._WRITERS["merged"](folder, adapter, tmp_path / "merged")
    base = load_pipeline(folder).unet.state_dict()
    merged = load_pipeline(tmp_path / "merged").unet.state_dict()
    weights = read_adapter(adapter).weights

    assert base.keys() == merged.keys()

    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {key.replace(".lora_A", "") for key in weights if ".lora_A" in key}

    for name in changed:
        down, up = (weights[name.replace(".weight", f".lora_{matrix}.weight")] for matrix in "AB")
        torch.testing.assert_close(merged[name], base[name] + 6 / 3 * up @ down)

    for file in (tmp_path / "merged").rglob("*.json"):
        assert str(folder) not in file.read_text()


@pytest.mark.parametrize(
    "form", ["kohya", "merged", *(pytest.param(form, marks=pytest.mark.long) for form in FORMS[::2])]
)
@pytest.mark.slow
def test_an_export_with_another_image_does_not_stay(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: ExportFormat
) -> None:
    """An export that lost its alpha: diffusers then uses the rank instead, and the adapter is half as strong."""
    folder, adapter = sd

    def without_alpha(folder: Path, adapter: Path, out: Path) -> None:
        tensors, _ = read_tensors(adapter)
        write_tensors(tmp_path / "weak", tensors, {})
        write(folder, tmp_path / "weak", out)
        (tmp_path / "weak").unlink()

    write = export._WRITERS[form]
    monkeypatch.setattr(export, "_WRITERS", {form: without_alpha})
    with pytest.raises(ExportError, match="difference"):
        export_adapter(folder, adapter, tmp_path / "out", form, preview=PREVIEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_that_lost_a_weak_adapter_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the adapter the image differs by less than 1/255, which still counts as another image."""
    trained = saved(tiny_pipeline(), tmp_path, strength=0.001)
    report = export_adapter(*trained, tmp_path / "good", "merged", preview=PREVIEW)
    assert 1e-4 < report.effect < 1 / 255 and report.difference < 1e-5

    def zeros(_folder: Path, adapter: Path, out: Path) -> None:
        tensors, metadata = read_tensors(adapter)
        write_tensors(out, {name: torch.zeros_like(value) for name, value in tensors.items()}, metadata)

    monkeypatch.setattr(export, "_WRITERS", {"diffusers": zeros})
    with pytest.raises(ExportError, match="difference"):
        export_adapter(*trained, tmp_path / "out", "diffusers", preview=PREVIEW)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_export_that_cannot_be_loaded_is_removed(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_folder: Path, adapter: Path, out: Path) -> None:
        out.write_bytes(adapter.read_bytes()[:1000])

    monkeypatch.setattr(export, "_WRITERS", {"diffusers": half})
    with pytest.raises(ExportError, match="cannot be reloaded"):
        export_adapter(*sd, tmp_path / "out", "diffusers", preview=PREVIEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bad_input_is_named(sd: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = sd
    with pytest.raises(InvalidInputError, match="'onnx'"):
        export_adapter(folder, adapter, tmp_path / "out", "onnx")  # type: ignore[arg-type]

    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InvalidInputError, match="taken"):
        export_adapter(folder, adapter, tmp_path / "taken", "kohya")

    (tmp_path / "lora.preview.png").write_text("mine")
    with pytest.raises(InvalidInputError, match=r"lora\.preview\.png"):
        export_adapter(folder, adapter, tmp_path / "lora.safetensors", "kohya")

    unet = tiny_xl_unet()
    attach_lora(unet, LoraConfig(rank=1))
    save_adapter(unet, tmp_path / "partial")
    tensors, about = read_tensors(tmp_path / "partial")
    tensors.popitem()
    write_tensors(tmp_path / "partial", tensors, about)

    with pytest.raises(CheckpointError, match="both matrices"):
        export_adapter(folder, tmp_path / "partial", tmp_path / "out", "kohya", preview=PREVIEW)
    assert (tmp_path / "taken").read_text() == "mine" and not (tmp_path / "out").exists()
