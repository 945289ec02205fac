"""A text-to-image model: U-Net, scheduler, VAE, text encoders and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from dfusion._diffusers import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    scheduler_class,
)
from dfusion.config import Precision, SamplingConfig
from dfusion.ddim import PredictionType
from dfusion.errors import (
    InvalidInputError,
    ItemNotInPromptError,
    ModelNotFoundError,
    NonFiniteError,
    ShapeMismatchError,
    shortened,
)
from dfusion.facts import require_size
from dfusion.model_files import SD, SDXL, ModelFiles, check_files
from dfusion.noise_schedules import DDIM, require_ddim
from dfusion.sampling import latent_shape
from dfusion.sources import locate
from dfusion.types import Conditioning

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_IMAGES_IN = {"feature_extractor": None, "image_encoder": None}
_PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    SD: (StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False, **_NO_IMAGES_IN}),
    SDXL: (StableDiffusionXLPipeline, {"add_watermarker": False, **_NO_IMAGES_IN}),
}
"""The supported pipelines, with the arguments that leave out unused parts."""
_NETWORKS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
_LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, SafetensorError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError, ImportError, StrictDataclassError),
)
"""What diffusers and transformers raise for configs and weights that do not fit together."""
_MOST_VARIANTS = 64
"""Compiled variants of a transformer block: up to 4 levels, 4 combinations of processors, with and without gradients,
with fixed and with variable sizes."""
_BATCH_PIXELS = 8 * 512 * 512
"""Pixels of the images that are decoded at once in half precision."""


def load_pipeline(folder: Path, dtype: Precision = "float32", vae_dtype: Precision | None = None) -> Pipeline:
    """Load the stock pipeline of a folder in diffusers' layout, on the CPU, without its safety checker.

    Args:
        folder: A folder with safetensors weights. If a part has only a variant such as fp16, that one is loaded.
        dtype: Of U-Net and text encoders.
        vae_dtype: Of the VAE. None: as diffusers' pipelines do. float32 if the VAE's config says `force_upcast`, as
            SDXL's does without this setting, otherwise `dtype`.

    Raises:
        ModelNotFoundError: Missing or damaged parts.
        UnsupportedModelError: A pipeline that Eq. 1 cannot run, see `dfusion.model_files.check_files`.
        InvalidInputError: An unknown dtype.
    """
    files = check_files(folder)
    parts = _load_parts(folder, files, dtype, vae_dtype)
    kind, left_out = _PIPELINES[files.pipeline]
    settings = {"force_zeros_for_empty_prompt": files.empty_is_zero} if files.pipeline == SDXL else {}
    try:
        scheduler = scheduler_class(files.scheduler).from_pretrained(str(folder / "scheduler"))
        return kind(**parts, scheduler=scheduler, **settings, **left_out)
    except _LOAD_ERRORS as error:
        raise ModelNotFoundError(f"no usable pipeline at {folder}: {error}") from error


def _load_parts(folder: Path, files: ModelFiles, dtype: Precision, vae_dtype: Precision | None) -> dict[str, Any]:
    """The networks and tokenizers of checked files, by name."""
    for setting, value in (("dtype", dtype), ("vae_dtype", vae_dtype or dtype)):
        if value not in _DTYPES:
            raise InvalidInputError(f"{setting}: expected one of {list(_DTYPES)}, got {value!r}")

    # 1. the networks, with all of their weights
    parts: dict[str, Any] = {}
    for part, variant in files.variants.items():
        precision = "float32" if part == "vae" else dtype
        parts[part] = _load_network(folder / part, _NETWORKS[part], _DTYPES[precision], variant)

    # 2. the tokenizers
    for encoder in [part for part in parts if "encoder" in part]:
        part = encoder.replace("text_encoder", "tokenizer")
        try:
            parts[part] = CLIPTokenizer.from_pretrained(str(folder / part))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelNotFoundError(f"{folder / part}: expected CLIP's tokenizer: {error}") from error

    # 3. the VAE's precision; float16 and bfloat16 are rounded from its float32 weights
    vae = parts["vae"]
    if vae_dtype is None:
        by_default = "force_upcast" in vae.config.get("_use_default_values", ())
        upcast = files.pipeline == SDXL if by_default else vae.config.force_upcast
        vae_dtype = "float32" if upcast else dtype
    if vae_dtype != "float32":
        vae.to(_DTYPES[vae_dtype])
    return parts


def _load_network(folder: Path, kind: Any, dtype: torch.dtype, variant: str | None) -> Any:
    """A part of a pipeline. Raises ModelNotFoundError if weights are missing, which would be random otherwise."""
    try:
        network, report = kind.from_pretrained(
            str(folder), dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        raise ModelNotFoundError(f"{folder}: its weights do not fit its config.json: {error}") from error
    for problem, adjective in (("missing_keys", "missing"), ("mismatched_keys", "of another shape")):
        if report[problem]:
            names = shortened(sorted(map(str, report[problem])))
            raise ModelNotFoundError(f"{folder}: expected all weights of its config.json, got {names} {adjective}")
    return network


def require_device(device: str) -> None:
    """Raise InvalidInputError if torch has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"device: expected one that torch can use, got {device!r}: {reason}") from error


@dataclass(frozen=True)
class DiffusionModel:
    """The parts of a Stable Diffusion pipeline, all on one device. The scheduler is DDIM (Eq. 1).

    SDXL has a second text encoder with its tokenizer. With `empty_is_zero` the empty (negative) prompt is embedded as
    zeros. `notes` lists what was replaced or ignored when the model was loaded, such as the folder's scheduler.
    """

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    device: str = "cpu"
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    empty_is_zero: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        model: Path | str,
        device: str = "cpu",
        dtype: Precision = "float32",
        prediction_type: PredictionType | None = None,
        vae_dtype: Precision | None = None,
    ) -> DiffusionModel:
        """Load SD 1.x, SD 2.x or SDXL, from safetensors only and without a safety checker.

        Args:
            model: A folder in diffusers' layout, a name of `dfusion.sources.HUB_MODELS`, or "owner/name@revision" on
                the hub.
            device: The device of all parts.
            dtype: Of U-Net and text encoders.
            prediction_type: The expected prediction type of the U-Net. None accepts the scheduler's setting.
            vae_dtype: Of the VAE, see `load_pipeline`.

        Raises:
            ModelNotFoundError: The model does not exist, or parts of it are missing or damaged.
            UnsupportedModelError: Eq. 1 cannot run the model. The message names the part and the cause.
            InvalidInputError: The scheduler has another prediction type; an unknown dtype; an unavailable device.

        Example:
            >>> from dfusion import MODELS, DiffusionModel
            >>> model = DiffusionModel.load(MODELS["shapes"].folder)  # or "sd-1.5", "sdxl", a folder
            >>> model.latent_shape
            (4, 16, 16)
            >>> model.item_tokens("a red and striped circle", ["circle"])
            ((4,),)
        """
        require_device(device)
        source = locate(model)
        files = check_files(source.folder)
        parts = _load_parts(source.folder, files, dtype, vae_dtype)
        loaded = cls._of(parts, files.schedule, files.scheduler, files.empty_is_zero, device)
        loaded = replace(loaded, notes=files.notes)

        configured = loaded.scheduler.config.prediction_type
        for expected in (source.prediction_type, prediction_type):
            if expected not in (None, configured):
                raise InvalidInputError(
                    f"prediction_type: expected {configured!r} as in the scheduler of {model}, got {expected!r}"
                )
        return loaded

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, device: str = "cpu") -> DiffusionModel:
        """The parts of a stock pipeline, without gradients, on `device`, with a DDIM scheduler of the same settings.

        Raises ModelNotFoundError if a required part is None, and UnsupportedModelError for a scheduler that DDIM cannot
        replace, such as one of a flow-matching or distilled model.
        """
        xl = isinstance(pipeline, StableDiffusionXLPipeline)
        names = ["unet", "vae", "text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if xl else ())]
        parts = {name: getattr(pipeline, name) for name in names}
        for name, part in parts.items():
            if part is None:
                raise ModelNotFoundError(f"{name}: expected this part in the pipeline, got None")

        scheduler = pipeline.scheduler
        require_ddim(dict(scheduler.config), (type(scheduler).__name__,))
        empty_is_zero = xl and bool(pipeline.config.force_zeros_for_empty_prompt)
        return cls._of(parts, scheduler.config, type(scheduler).__name__, empty_is_zero, device)

    @classmethod
    def _of(
        cls, parts: Mapping[str, Any], schedule: Mapping[str, Any], own_class: str, empty_is_zero: bool, device: str
    ) -> DiffusionModel:
        for name, part in parts.items():
            if not name.startswith("tokenizer"):
                part.requires_grad_(False).eval().to(device)
        for name in ("unet", "vae"):  # convolutions are faster; the other parts have none
            parts[name].to(memory_format=torch.channels_last)

        # without these, DDIM's own defaults would clip samples and leave the last step without noise
        defaults = {} if own_class == DDIM else {"clip_sample": False, "set_alpha_to_one": False}
        scheduler = DDIMScheduler.from_config({**defaults, **schedule})
        return cls(scheduler=scheduler, device=device, empty_is_zero=empty_is_zero, **parts)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the U-Net's transformer blocks with `torch.compile`, in place (docs/decisions/030-compilation.md).

        Sampling, fusion and training use the same blocks, so p / p_old stays 1 within its tolerance. Each is compiled
        on its first call and again when the batch size first changes, which can take minutes. inductor needs a C++
        compiler and, on a GPU, Triton. The recompilation limit of torch is raised globally.
        """
        # all blocks share one function: each level, attention processor and use of gradients is a variant of it
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
        self.unet.compile_repeated_blocks(backend=backend)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by their names in a pipeline: `text_encoder`, and `text_encoder_2` of SDXL."""
        encoders = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: encoder for name, encoder in encoders.items() if encoder is not None}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents at the U-Net's default size."""
        return latent_shape(self.unet)

    @property
    def pixels_per_latent(self) -> int:
        """Width of a latent pixel in image pixels: 8 for SD."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_size(self, sampling: SamplingConfig) -> tuple[int, int]:
        """(h, w) of the latents for `sampling`'s height and width. A side that is None is the model's own.

        The U-Net accepts any such size and rounds up odd sizes. Raises InvalidInputError for a side that is not a
        multiple of `pixels_per_latent`.
        """
        factor = self.pixels_per_latent
        require_size("height", sampling.height, factor)
        require_size("width", sampling.width, factor)

        own_height, own_width = self.latent_shape[1:]
        height = own_height if sampling.height is None else sampling.height // factor
        width = own_width if sampling.width is None else sampling.width // factor
        return height, width

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str], latent_size: tuple[int, int] | None = None) -> Conditioning:
        """The conditioning of B texts, padded to the tokenizer's N. The negative one of guidance is that of
        `SamplingConfig.negative_prompt`, "" by default.

        SD 1.x, 2.x  embeds are the text encoder's last hidden states
        SDXL         embeds are the penultimate hidden states of both encoders, pooled is the second's; time ids are
                     those of an uncropped image of the size of `latent_size` (h, w) (None: the U-Net's own)

        Raises InvalidInputError for a text with more than N - 2 tokens (it is never truncated), for an empty list, and
        for a plain string instead of a list.
        """
        if isinstance(texts, str) or len(texts) == 0:
            raise InvalidInputError(f"texts: expected a list of at least one text, got {shortened(texts)}")
        for text in texts:
            self._token_ids(text)

        first = self._encode(self.text_encoder, self.tokenizer, texts)
        if self.text_encoder_2 is None:
            return Conditioning(first[0].float(), texts=tuple(texts))

        # SDXL: both encoders, and zeros for the empty prompt
        second = self._encode(self.text_encoder_2, self.tokenizer_2, texts)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).float()
        pooled = second.text_embeds.float()
        if self.empty_is_zero:
            empty = torch.tensor([text == "" for text in texts], device=embeds.device)
            embeds[empty] = 0
            pooled[empty] = 0

        # SDXL: time ids
        height, width = (self.pixels_per_latent * side for side in latent_shape(self.unet, latent_size)[1:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=embeds.device)
        return Conditioning(embeds, pooled, sizes.expand(len(texts), -1), texts=tuple(texts))

    def _encode(self, encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
        """A text encoder's output for B texts, with all hidden states."""
        length = tokenizer.model_max_length
        encoded = tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt")
        uses_mask = bool(getattr(encoder.config, "use_attention_mask", False))
        mask = encoded.attention_mask.to(self.device) if uses_mask else None
        return encoder(encoded.input_ids.to(self.device), attention_mask=mask, output_hidden_states=True)

    def item_tokens(self, text: str, items: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token indices of each item of a prompt, counted after BOS (Eq. 4). An item may have several words.

        All occurrences of an item in the prompt count. Raises ItemNotInPromptError, and InvalidInputError for prompts
        that are too long.
        """
        tokens = self._token_ids(text)
        indices: list[tuple[int, ...]] = []
        for item in items:
            item_ids = self._token_ids(item)
            starts = [i for i in self._word_starts(tokens) if tokens[i : i + len(item_ids)] == item_ids]
            if not item_ids or not starts:
                raise ItemNotInPromptError(item, text)
            indices.append(tuple(chain.from_iterable(range(i, i + len(item_ids)) for i in starts)))
        return tuple(indices)

    def _word_starts(self, tokens: list[int]) -> list[int]:
        """The indices of tokens that start a word. All tokens, if the tokenizer does not mark word ends as CLIP's."""
        pieces: list[str] = self.tokenizer.convert_ids_to_tokens(tokens)
        marked = any(piece.endswith("</w>") for piece in pieces)
        return [i for i in range(len(pieces)) if i == 0 or not marked or pieces[i - 1].endswith("</w>")]

    def _token_ids(self, text: str) -> list[int]:
        """Token ids without BOS and EOS. Raises InvalidInputError for more than N - 2 tokens."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = self.tokenizer.model_max_length - 2
        if len(tokens) > room:
            raise InvalidInputError(f"prompt: expected at most {room} tokens, got {len(tokens)}: {text!r}")
        return tokens

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images (B, H, W, 3) uint8 of clean latents (B, C, h, w).

        A float32 VAE decodes them one by one, so that an image does not depend on its batch. In half precision, which
        depends on the batch anyway, several are decoded at once.

        Raises:
            ShapeMismatchError: Latents of another shape.
            NonFiniteError: The latents are NaN or infinite, or the VAE decoded finite latents to such pixels (an
                overflow in float16).
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_shape[0]:
            raise ShapeMismatchError("latents", f"(B, {self.latent_shape[0]}, h, w)", tuple(latents.shape))
        if not bool(latents.isfinite().all()):
            raise NonFiniteError("latents: expected finite numbers, got NaN or infinity")

        scaled = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        scaled = scaled + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        pixels_per_image = latents.shape[2] * latents.shape[3] * self.pixels_per_latent**2
        at_once = 1 if self.vae.dtype == torch.float32 else max(1, _BATCH_PIXELS // pixels_per_image)
        images = [self._decode_batch(part) for part in scaled.to(self.vae.dtype).split(at_once)]
        return np.concatenate(images)

    def _decode_batch(self, scaled: torch.Tensor) -> np.ndarray:
        """(b, H, W, 3) uint8 of the VAE's scaled input (b, C, h, w). Raises NonFiniteError naming the VAE."""
        decoded: torch.Tensor = self.vae.decode(scaled).sample.float()
        if bool(decoded.isfinite().all()):
            pixels = (decoded / 2 + 0.5).clamp(0, 1)
            return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        precision = str(self.vae.dtype).removeprefix("torch.")
        advice = "its weights are damaged, or the latents are far from any image"
        if precision != "float32":
            advice = 'it overflows in this precision: load the model with vae_dtype "float32"'
        raise NonFiniteError(f"VAE in {precision}: decoded finite latents to NaN or infinite pixels; {advice}")
