"""Folders and files that people point at as a model: variants of a tiny pipeline, each with the expected outcome."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.nets import overflowing_pipeline, tiny_pipeline, tiny_xl_pipeline

Change = Callable[[Path], Path | None]
"""Changes a copy of a tiny pipeline. Returns the path to load, if it is not the folder."""
UNET = "diffusion_pytorch_model"
WEIGHTS = {"unet": UNET, "vae": UNET, "text_encoder": "model"}
SAME_ALPHAS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
DISTILLED = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler")
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
OTHERS = (
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
    "IPNDMScheduler",
    "ScoreSdeVeScheduler",
    "DDPMWuerstchenScheduler",
    "UnCLIPScheduler",
    "RePaintScheduler",
    "DDIMInverseScheduler",
    "MyScheduler",
)


@dataclass(frozen=True)
class Variant:
    """A change of a pipeline, and what loading and sampling it gives.

    refusal  a part of the error's message; None: it runs
    xl       a change of the tiny SDXL pipeline, otherwise of the tiny SD pipeline
    """

    name: str
    change: Change
    refusal: str | None = None
    xl: bool = False


class Templates:
    """The pipelines that variants change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tiny_pipeline().save_pretrained(folder / "sd")
        tiny_xl_pipeline().save_pretrained(folder / "xl")
        overflowing_pipeline().save_pretrained(folder / "overflowing")

    def create(self, variant: Variant, folder: Path) -> Path:
        """Create the variant in a new folder. Returns the path to load."""
        shutil.copytree(self._folder / ("xl" if variant.xl else "sd"), folder)
        return variant.change(folder) or folder

    @property
    def overflowing(self) -> Path:
        """A pipeline whose VAE overflows in float16."""
        return self._folder / "overflowing"


def edit(name: str, **changes: Any) -> Change:
    """Change keys of a JSON file. The value `...` removes a key."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text("utf-8")) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")

    return change


def both(*changes: Change) -> Change:
    """Several changes, in order."""

    def change(folder: Path) -> Path | None:
        paths = [one(folder) for one in changes]
        return paths[-1]

    return change


def scheduler(name: str, **changes: Any) -> Change:
    """Another scheduler, as diffusers saves it: in the index and in its own file."""
    return both(in_index("scheduler", name), edit("scheduler/scheduler_config.json", _class_name=name, **changes))


def schedule(**changes: Any) -> Change:
    return edit("scheduler/scheduler_config.json", **changes)


def in_index(part: str, name: str, library: str = "diffusers") -> Change:
    return edit("model_index.json", **{part: [library, name]})


def write(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return change


def rename(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return change


def weights(part: str) -> str:
    """The path of a part's weights."""
    return f"{part}/{WEIGHTS.get(part, 'model')}.safetensors"


def tensors(part: str, edit_tensors: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the weights of a part."""

    def change(folder: Path) -> None:
        content = load_file(folder / weights(part))
        edit_tensors(content)
        save_file(content, folder / weights(part), {"format": "pt"})

    return change


def as_variant(part: str, variant: str, dtype: torch.dtype = torch.float16) -> Change:
    """Only the variant's file of a part."""

    def change(folder: Path) -> None:
        file = folder / weights(part)
        content = {name: value.to(dtype) for name, value in load_file(file).items()}
        save_file(content, file.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
        file.unlink()

    return change


def sharded(part: str, variant: str = "") -> Change:
    """The weights of a part in two files with an index, as diffusers and transformers name them."""

    def change(folder: Path) -> None:
        file = folder / weights(part)
        content = load_file(file)
        names = sorted(content)
        mark = f".{variant}" if variant else ""
        placed = {}
        for number, half in enumerate((names[::2], names[1::2]), 1):
            shard = f"{file.stem}{mark}-{number:05d}-of-00002.safetensors"
            save_file({name: content[name] for name in half}, file.with_name(shard), {"format": "pt"})
            placed |= dict.fromkeys(half, shard)

        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        file.with_name(f"{file.stem}.safetensors.index{mark}.json").write_text(json.dumps(index))
        file.unlink()

    return change


def shorten(name: str, keep: float) -> Change:
    """Only the first part of a file."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def file_of(name: str, keys: tuple[str, ...] = ()) -> Callable[[Path], Path]:
    """Another path: a file with these tensors, or with other bytes."""

    def change(folder: Path) -> Path:
        file = folder.with_name(f"{folder.name}-{name}")
        if keys:
            save_file({key: torch.zeros(1) for key in keys}, file)
        else:
            file.write_bytes(b"\x80\x02}q\x00.")
        return file

    return change


def folder_of(change: Change) -> Change:
    """Another path: an empty folder after the change."""

    def changed(folder: Path) -> Path:
        other = folder.with_name(f"{folder.name}-other")
        other.mkdir()
        return change(other) or other

    return changed


def within(change: Change, name: str) -> Change:
    """The pipeline moves into a subfolder of the path."""

    def changed(folder: Path) -> Path | None:
        inner = folder.with_name("inner")
        folder.rename(inner)
        folder.mkdir()
        inner.rename(folder / name)
        return change(folder)

    return changed


def nothing(_folder: Path) -> None:
    """The pipeline as it is."""


def _poison(content: dict[str, torch.Tensor]) -> None:
    first = sorted(content)[0]
    content[first] = torch.full_like(content[first], torch.nan)


def _drop(content: dict[str, torch.Tensor]) -> None:
    content.pop(sorted(content)[0])


def _reshape(content: dict[str, torch.Tensor]) -> None:
    content[sorted(content)[0]] = torch.zeros(3, 5, 7)


def _extend(content: dict[str, torch.Tensor]) -> None:
    content["unused"] = torch.zeros(2)


def _as_before_transformers_5(content: dict[str, torch.Tensor]) -> None:
    for name in list(content):
        if not name.startswith("text_projection"):
            content[f"text_model.{name.removeprefix('text_model.')}"] = content.pop(name)
    content["text_model.embeddings.position_ids"] = torch.arange(16)[None]


def _as_in_sd_1(content: dict[str, torch.Tensor]) -> None:
    """The names of the VAE's attention in SD 1.x, as 2D weights."""
    for name in list(content):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".attentions.0.{new}." in name:
                content[name.replace(new, old)] = content.pop(name)


def _as_vocabulary_and_merges(folder: Path) -> None:
    """The tokenizer's files in SD 1.x, 2.x and SDXL."""
    for files in folder.glob("tokenizer*"):
        model = json.loads((files / "tokenizer.json").read_text("utf-8"))
        vocabulary = model["model"]["vocab"] | {token["content"]: token["id"] for token in model["added_tokens"]}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
        (files / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        (files / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
        (files / "tokenizer.json").unlink()


def _schedulers() -> Iterator[Variant]:
    for name in SAME_ALPHAS:
        for kind in ("epsilon", "v_prediction"):
            yield Variant(f"{name} {kind}", scheduler(name, prediction_type=kind))
    for names, cause in ((DISTILLED, "distilled"), (FLOWS, "flow-matching"), (OTHERS, "whose betas DDIM can use")):
        for name in names:
            yield Variant(name, scheduler(name), cause)
            yield Variant(f"{name} in the index only", in_index("scheduler", name), name)
            yield Variant(f"{name} in its own file only", schedule(_class_name=name), name)
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"):
        yield Variant(f"{name} flow_prediction", scheduler(name, prediction_type="flow_prediction"), "flow_prediction")
        yield Variant(f"{name} use_flow_sigmas", scheduler(name, use_flow_sigmas=True), "use_flow_sigmas")
        yield Variant(f"{name} zero-SNR", scheduler(name, rescale_betas_zero_snr=True), "v-prediction and trailing")
    for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        turbo = {"timestep_spacing": "trailing", "steps_offset": 1}
        yield Variant(f"{name} turbo", scheduler(name, prediction_type="epsilon", **turbo), "turbo and lightning")
        yield Variant(f"{name} v trailing", scheduler(name, prediction_type="v_prediction", **turbo))
    for spacing in ("leading", "linspace", "trailing"):
        changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
        yield Variant(f"zero-SNR v {spacing}", schedule(**changes))
        yield Variant(f"epsilon {spacing}", schedule(timestep_spacing=spacing))
    yield Variant("predicts the sample", schedule(prediction_type="sample"))
    yield Variant("squared cosine", schedule(beta_schedule="squaredcos_cap_v2"))
    yield Variant("linear betas", schedule(beta_schedule="linear"))
    yield Variant("only its class", schedule(**dict.fromkeys(_SCHEDULE_KEYS, ...)))
    yield Variant("trained betas", schedule(trained_betas=[0.01] * 1000))
    yield Variant("100 timesteps", schedule(num_train_timesteps=100, beta_end=0.12))
    yield Variant("clips", schedule(clip_sample=True, clip_sample_range=2.0))


_SCHEDULE_KEYS = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing", "trained_betas")
_BAD_SCHEDULES: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("velocity", None, 3, ["epsilon"]),
    "timestep_spacing": ("new", None, 1),
    "beta_schedule": ("sigmoid", "exp", None, 4),
    "beta_start": (-0.1, "0.1", None, 2, [0.1]),
    "beta_end": (1.5, "x", True),
    "num_train_timesteps": (0, -5, "1000", None, 10.5),
    "steps_offset": (-1, "1", None),
    "trained_betas": ("many", [0.1], [[0.1]], [1.0] * 1000, [0.0] * 1000),
    "thresholding": (True,),
    "timestep_type": ("continuous",),
}


def _bad_schedules() -> Iterator[Variant]:
    causes = {"trained_betas": "betas", "thresholding": "thresholding"}
    for key, values in _BAD_SCHEDULES.items():
        for n, value in enumerate(values):
            yield Variant(f"{key} {n}", schedule(**{key: value}), causes.get(key, key))


def _indexes() -> Iterator[Variant]:
    index = "model_index.json"
    yield Variant("no index", remove(index), "no model_index.json")
    yield Variant("damaged index", write(index, b"{"), "expected JSON")
    yield Variant("binary index", write(index, b"\xff\xfe\x00"), "expected JSON")
    yield Variant("a list as index", write(index, b"[]"), "expected a JSON object")
    yield Variant("empty index", write(index, b"{}"), "got a None")
    names = ("FluxPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline", "KandinskyV22Pipeline")
    tasks = ("StableDiffusionInpaintPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionControlNetPipeline")
    for name in (*names, *tasks, "DDPMPipeline"):
        yield Variant(name, edit(index, _class_name=name), name)
    yield Variant("LCM pipeline", edit(index, _class_name="LatentConsistencyModelPipeline"), "distilled")
    yield Variant("class is a list", edit(index, _class_name=["StableDiffusionPipeline"]), "expected a StableDiffusion")
    yield Variant("SD named SDXL", edit(index, _class_name="StableDiffusionXLPipeline"), "text_encoder_2")
    yield Variant("SDXL named SD", edit(index, _class_name="StableDiffusionPipeline"), "addition_embed_type", xl=True)


def _parts() -> Iterator[Variant]:
    index = "model_index.json"
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    for part in parts:
        yield Variant(f"{part} not in the index", edit(index, **{part: ...}), f"{part}: expected its library")
        yield Variant(f"{part} is null", edit(index, **{part: [None, None]}), f"{part}: expected its library")
        yield Variant(f"{part} without a folder", remove(part), f"{part}: expected a folder")
    for part in ("text_encoder_2", "tokenizer_2"):
        yield Variant(f"SDXL {part} is null", edit(index, **{part: [None, None]}), f"{part}: expected", xl=True)
        yield Variant(f"SDXL {part} without a folder", remove(part), f"{part}: expected a folder", xl=True)
    for part in ("unet", "vae", "text_encoder"):
        yield Variant(f"{part} without config", remove(f"{part}/config.json"), f"{part}/config.json")
        yield Variant(f"{part} with a damaged config", write(f"{part}/config.json", b"{"), f"{part}/config.json")
    yield Variant("no scheduler config", remove("scheduler/scheduler_config.json"), "scheduler_config.json")
    foreign = {
        "text_encoder": ("T5EncoderModel", "UMT5EncoderModel", "RobertaSeriesModelWithTransformation", "CLIPModel"),
        "tokenizer": ("T5TokenizerFast", "XLMRobertaTokenizerFast", "LlamaTokenizer"),
        "vae": ("AutoencoderTiny", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE", "VQModel"),
        "unet": ("SD3Transformer2DModel", "UNet3DConditionModel", "Kandinsky3UNet", "UNetMotionModel"),
    }
    for part, names in foreign.items():
        for name in names:
            yield Variant(f"{part} {name}", in_index(part, name), f"{part}: expected a .*got a {name}")
    yield Variant(
        "unet of its own code", in_index("unet", "MyUNet", "my_unet"), "unet: expected a UNet2DConditionModel"
    )
    yield Variant("extra parts", both(*(in_index(part, "Any") for part in ("safety_checker", "feature_extractor"))))
    yield Variant("image encoder", in_index("image_encoder", "CLIPVisionModelWithProjection", "transformers"))
    yield Variant("controlnet", in_index("controlnet", "ControlNetModel"))


_BAD_CONFIGS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "unet": {
        "in_channels": (9, 8, 5, 16, [4], None),
        "out_channels": (8, None),
        "sample_size": (None, 0, "64", [8], [8, None]),
        "time_cond_proj_dim": (256,),
        "class_embed_type": ("timestep",),
        "num_class_embeds": (10,),
        "encoder_hid_dim": (32,),
        "attention_type": ("gated",),
        "dual_cross_attention": (True,),
        "addition_embed_type": ("text", "text_time", "image"),
    },
    "vae": {"scaling_factor": (0, -1, "x", None, 1e400), "latents_mean": ([0.0] * 4,)},
}


def _configs() -> Iterator[Variant]:
    for part, settings in _BAD_CONFIGS.items():
        for key, values in settings.items():
            for n, value in enumerate(values):
                yield Variant(f"{part} {key} {n}", edit(f"{part}/config.json", **{key: value}), key)

    # settings that do not fit the weights or the other parts
    unfit: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
        "unet": {
            "block_out_channels": ([8, 24], [8], "x", None),
            "layers_per_block": (2, "x"),
            "norm_num_groups": (3,),
            "down_block_types": (["NewBlock2D", "DownBlock2D"], ["DownBlock2D"], 5),
            "cross_attention_dim": (12, [16, 12], "x", None),
            "attention_head_dim": (3, None),
            "act_fn": ("new",),
        },
        "vae": {
            "latent_channels": (16, 3, "x"),
            "block_out_channels": ([8], [8, 12], None),
            "up_block_types": (["NewBlock", "UpDecoderBlock2D"],),
        },
        "text_encoder": {
            "hidden_size": (24, "x", None),
            "num_hidden_layers": (3, "x"),
            "num_attention_heads": (3, 0),
            "vocab_size": (5, "x"),
            "max_position_embeddings": (4, None),
            "hidden_act": ("new",),
        },
    }
    for part, settings in unfit.items():
        for key, values in settings.items():
            for n, value in enumerate(values):
                yield Variant(f"{part} {key} {n}", edit(f"{part}/config.json", **{key: value}), ".")
    yield Variant("refiner", edit("unet/config.json", projection_class_embeddings_input_dim=32), "refiner", xl=True)
    yield Variant("SDXL other width", edit("unet/config.json", cross_attention_dim=16), "text encoders:", xl=True)
    yield Variant("SDXL other pooled", edit("text_encoder_2/config.json", projection_dim=20), "refiner", xl=True)
    yield Variant("SDXL without time ids", edit("unet/config.json", addition_embed_type=None), "text_time", xl=True)


def _tokenizers() -> Iterator[Variant]:
    config = "tokenizer/tokenizer_config.json"
    for n, value in enumerate((..., 10**30, 2, "77", None, 78)):
        yield Variant(f"model_max_length {n}", edit(config, model_max_length=value), "tokenizer: model_max_length")
    yield Variant("no tokenizer config", remove(config), "tokenizer_config.json")
    yield Variant("no vocabulary", remove("tokenizer/tokenizer.json"), "vocab.json")
    yield Variant("damaged vocabulary", write("tokenizer/tokenizer.json", b"{"), "tokenizer.json")
    yield Variant("empty vocabulary", write("tokenizer/tokenizer.json", b"{}"), "vocabulary of a CLIP tokenizer")
    longer = edit("tokenizer_2/tokenizer_config.json", model_max_length=8)
    yield Variant("SDXL tokenizers of two lengths", longer, "one model_max_length", xl=True)


def _weights() -> Iterator[Variant]:
    for part in ("unet", "vae", "text_encoder"):
        path = weights(part)
        stem = Path(path).stem
        yield Variant(f"{part} without weights", remove(path), f"{part}: expected {stem}.safetensors, got no weights")
        yield Variant(f"{part} as a pickle", rename(path, f"{part}/pytorch_model.bin"), "a pickle.*python -c")
        yield Variant(f"{part} cut off", shorten(path, 0.9), "download it again")
        yield Variant(f"{part} without its header", shorten(path, 0.001), "without its header")
        yield Variant(f"{part} empty", write(path, b""), "without its header")
        yield Variant(f"{part} of other bytes", write(path, bytes(range(256)) * 9), "safetensors file")
        yield Variant(
            f"{part} LFS pointer", write(path, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"
        )
        yield Variant(f"{part} with an odd header", write(path, struct.pack("<Q", 2) + b"[]"), "readable safetensors")
        for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("ema", torch.float32)):
            yield Variant(f"{part} {variant} only", as_variant(part, variant, dtype))
        two = both(as_variant(part, "a"), write(f"{part}/{stem}.b.safetensors", b""))
        yield Variant(f"{part} of two variants", two, "only the variants a, b")
        yield Variant(
            f"{part} of another name", rename(path, f"{part}/other.safetensors"), "got only other.safetensors"
        )
        yield Variant(f"{part} sharded", sharded(part))
        yield Variant(f"{part} sharded fp16", sharded(part, "fp16"))
        lost = both(sharded(part), remove(f"{part}/{stem}-00002-of-00002.safetensors"))
        yield Variant(f"{part} without a shard", lost, "expected the shard")
        bad_index = both(sharded(part), write(f"{part}/{stem}.safetensors.index.json", b"{}"))
        yield Variant(f"{part} with a bad index", bad_index, "expected an index of shards")
        yield Variant(f"{part} without a tensor", tensors(part, _drop), "missing")
        yield Variant(f"{part} with another shape", tensors(part, _reshape), "config.json")
        yield Variant(f"{part} with NaN", tensors(part, _poison), "NaN or infinite")
        yield Variant(f"{part} with a tensor too many", tensors(part, _extend))
    yield Variant("all fp16", both(*(as_variant(part, "fp16") for part in WEIGHTS)))
    yield Variant("SDXL fp16", both(*(as_variant(part, "fp16") for part in (*WEIGHTS, "text_encoder_2"))), xl=True)
    yield Variant("SDXL sharded", sharded("unet"), xl=True)


SD_KEYS = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x", "cond_stage_model.transformer.x")
XL_KEYS = ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.x")


def _other_paths() -> Iterator[Variant]:
    files: Mapping[str, tuple[tuple[str, ...], str]] = {
        "sd.safetensors": (SD_KEYS, "single-file checkpoint.*StableDiffusionPipeline as P"),
        "xl.safetensors": (XL_KEYS, "single-file checkpoint.*StableDiffusionXLPipeline as P"),
        "unet.safetensors": (SD_KEYS[:1], "U-Net without its text encoder"),
        "refiner.safetensors": ((SD_KEYS[0], "conditioner.embedders.0.model.x"), "SDXL's refiner"),
        "flux.safetensors": (("model.diffusion_model.double_blocks.0.x",), "Flux transformer"),
        "flux2.safetensors": (("double_blocks.0.img_attn.qkv.weight",), "Flux transformer"),
        "sd3.safetensors": (("model.diffusion_model.joint_blocks.0.x",), "Stable Diffusion 3"),
        "lora.safetensors": (("lora_unet_down.lora_down.weight",), "an adapter"),
        "other.safetensors": (("weight",), "weights of another kind"),
        "broken.safetensors": ((), "safetensors file"),
        "model.ckpt": ((), "a pickle.*python -c"),
        "model.pt": ((), "a pickle"),
        "model.gguf": ((), "got a file"),
    }
    for name, (keys, cause) in files.items():
        yield Variant(f"file {name}", file_of(name, keys), cause)
        in_folder = folder_of(write(name, b"\x80\x02.")) if not keys else None
        if in_folder is not None and not name.endswith("gguf"):
            yield Variant(f"folder with {name}", in_folder, "no model_index.json; .*" + cause)
    yield Variant("empty folder", folder_of(nothing), "no model_index.json")
    yield Variant("PEFT folder", folder_of(write("adapter_config.json", b"{}")), "adapter of PEFT")
    bare = folder_of(write("config.json", b'{"_class_name": "UNet2DConditionModel"}'))
    yield Variant("folder of a U-Net", bare, "a UNet2DConditionModel: name the folder of the whole pipeline")
    yield Variant("pipeline one level down", within(nothing, "v1"), "there is one in .*v1")


def _plain() -> Iterator[Variant]:
    yield Variant("SD", nothing)
    yield Variant("SDXL", nothing, xl=True)
    yield Variant("text encoder of an old transformers", tensors("text_encoder", _as_before_transformers_5))
    old = both(*(tensors(part, _as_before_transformers_5) for part in ("text_encoder", "text_encoder_2")))
    yield Variant("SDXL text encoders of an old transformers", old, xl=True)
    yield Variant("VAE of SD 1.x", tensors("vae", _as_in_sd_1))
    yield Variant("vocabulary and merges", _as_vocabulary_and_merges)
    yield Variant("SDXL vocabulary and merges", _as_vocabulary_and_merges, xl=True)


VARIANTS: tuple[Variant, ...] = tuple(
    variant
    for variants in (
        *(_plain, _schedulers, _bad_schedules, _indexes, _parts, _configs),
        *(_tokenizers, _weights, _other_paths),
    )
    for variant in variants()
)
