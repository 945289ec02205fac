"""Recipes: how a stock pipeline of diffusers reproduces the preview of an export. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dfusion.config import Precision

ExportFormat = Literal["diffusers", "kohya", "peft", "merged"]
FOLDERS: frozenset[ExportFormat] = frozenset({"peft", "merged"})
"""The formats that are folders. The others are single safetensors files."""


class PipelineCall(BaseModel):
    """The arguments of the pipeline's call, by diffusers' names."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    negative_prompt: str | None = Field(description="null: the empty prompt")
    num_inference_steps: int
    guidance_scale: float
    eta: float = Field(description="Weight of the noise in DDIM")
    height: int
    width: int


class Recipe(BaseModel):
    """How a stock pipeline of diffusers reproduces the preview of an export."""

    model_config = ConfigDict(frozen=True)

    base: str = Field(description="The base model, or its folder's name")
    format: ExportFormat
    pipeline: Literal["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
    adapter_scale: float = Field(1.0, description="Strength of the adapter; in a merged pipeline it is fixed")
    sampler: Literal["DDIM"] = "DDIM"
    scheduler: dict[str, Any] = Field(description="The arguments of diffusers' DDIMScheduler")
    seed: int = Field(description="Seed of a torch.Generator on the CPU; the image's only source of noise")
    call: PipelineCall
    vae: str = Field("the base model's", description="The VAE that decodes the image")
    dtype: Precision = "float32"
    vae_dtype: Precision = "float32"

    def to_json(self) -> str:
        """The recipe as JSON with a line end, as in its file."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class Companions:
    """The files that belong to an export.

    recipe   JSON of a `Recipe`
    preview  PNG. A1111 and Forge show such a file with a LoRA
    readme   a text on how to use the export; None for a single file
    """

    recipe: Path
    preview: Path
    readme: Path | None

    @classmethod
    def of(cls, path: Path, form: ExportFormat) -> Companions:
        """Those of the export at `path`: inside a folder, or next to a file, with its name."""
        if form in FOLDERS:
            return cls(path / "recipe.json", path / "preview.png", path / "README.md")
        name = path.name.removesuffix(".safetensors")
        return cls(path.with_name(f"{name}.recipe.json"), path.with_name(f"{name}.preview.png"), None)


def readme_of(recipe: Recipe) -> str:
    """The text in the folder of an export: what it is, and how to render its preview again."""
    call = recipe.call
    if recipe.format == "merged":
        about = f"A complete {recipe.pipeline} for diffusers, in float32. Its weights contain the adapter."
        imports = ""
        load = 'pipeline = DiffusionPipeline.from_pretrained(".")'
    else:
        about = f"A LoRA adapter for the U-Net of a {recipe.pipeline}, as peft reads it."
        imports = "from peft import PeftModel\n"
        load = 'pipeline = DiffusionPipeline.from_pretrained("BASE")  # the base model\n'
        load += 'PeftModel.from_pretrained(pipeline.unet, ".")'

    return f"""# An adapter on {recipe.base}

{about} D-Fusion trained it.

`preview.png` shows "{call.prompt}": {recipe.sampler} with {recipe.scheduler["timestep_spacing"]} spacing and eta \
{call.eta:g}, {call.num_inference_steps} steps, guidance scale {call.guidance_scale:g}, seed {recipe.seed}, \
{call.width} x {call.height} pixels. `recipe.json` has all settings. In this folder, they give the image again:

```python
import json

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
{imports}
with open("recipe.json") as file:
    recipe = json.load(file)
{load}
pipeline.scheduler = DDIMScheduler(**recipe["scheduler"])
generator = torch.Generator().manual_seed(recipe["seed"])
pipeline(generator=generator, **recipe["call"]).images[0].save("again.png")
```
"""
