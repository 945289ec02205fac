"""All settings of the method, with the paper's defaults and their source. Does not import torch.

Settings are frozen, reject unknown keys, and accept finite numbers only. "Table 3" is the paper's table of
hyper-parameters (appendix C.3).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from dfusion.algorithms import ALGORITHMS, readers
from dfusion.errors import FieldsError

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
StepIndex = Annotated[int, Field(ge=0, le=999)]
Rate = Annotated[float, Field(gt=0)]
MOST_INITIAL_SIGNAL = 0.5
"""Largest alpha-bar (the share of signal in the variance) of a schedule's first timestep. x_T is pure noise: a U-Net
that treats it as a nearly clean image returns noise."""
Precision = Literal["float32", "bfloat16", "float16"]
"""Number format of a model's weights. Adapters and the arithmetic of Eq. 1 are float32 in any of them."""
AttentionControl = Literal[
    "masked_kv",
    "kv",
    "self_attention_maps",
    "cross_attention_maps",
    "self_and_cross_attention_maps",
    "kv_and_cross_attention_maps",
    "qkv_and_cross_attention_maps",
    "masactrl_maps",
    "masactrl_features",
    "masactrl",
]
"""The part of the reference's attention that a target takes: Eq. 5, and the variants of appendix B (figure 8). Defined
in `dfusion.attention.fusion.CONTROLS` and in docs/decisions/007-attention-control.md."""


def _known_algorithm(name: str) -> str:
    if name not in ALGORITHMS:
        *others, last = map(repr, ALGORITHMS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return name


AlgorithmName = Annotated[str, AfterValidator(_known_algorithm)]
"""A name in `dfusion.algorithms.ALGORITHMS`."""


@cache
def _leaves(annotation: Hashable) -> frozenset[Any]:
    """The types in an annotation, without unions and containers."""
    if annotation is ...:
        return frozenset()
    if get_origin(annotation) is Literal:
        return frozenset(type(value) for value in get_args(annotation))

    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return frozenset().union(*map(_leaves, inner)) if inner else frozenset([annotation])


class Frozen(BaseModel):
    """Immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StrictModel(Frozen):
    """Base of all settings and requests. Values that pydantic would convert to numbers, true or "7", are rejected."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_in_disguise(cls, value: Any, info: ValidationInfo) -> Any:
        leaves = _leaves(cast(Hashable, cls.model_fields[info.field_name or ""].annotation))
        for element in value if isinstance(value, (list, tuple)) else [value]:
            disguised = isinstance(element, bool) or (isinstance(element, str) and str not in leaves)
            if disguised and not leaves.isdisjoint((int, float)) and type(element) not in leaves:
                raise ValueError(f"expected a number, got {element!r}")
        return value


class SamplingConfig(StrictModel):
    """Sampling settings (Eq. 1; table 3, "Sampling")."""

    num_steps: int = Field(20, ge=1, le=1000, description="Denoising steps T (table 3)")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="Classifier-free guidance scale; 1 disables it (table 3)"
    )
    eta: float = Field(1.0, gt=0, le=1, description="Weight of the noise in DDIM, eta in Eq. 1 (table 3)")
    height: Pixels | None = Field(
        None, description="Image height, a multiple of the VAE's factor; null: the model's own"
    )
    width: Pixels | None = Field(None, description="Image width, as for height")
    negative_prompt: str = Field(
        "", max_length=500, description="What guidance leads away from; the paper's is the empty prompt"
    )

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.negative_prompt and self.guidance_scale == 1:
            message = "expected no negative_prompt at guidance_scale 1, which disables guidance"
            raise FieldsError(message, "negative_prompt")
        return self


class FusionConfig(StrictModel):
    """Fusion settings (Eq. 4 and 5; table 3, "Fusion").

    The defaults follow the paper's text. `released_code()` has the settings of the authors' code.
    """

    layers: Literal["middle+up"] | tuple[StrictInt, ...] = Field(
        "middle+up",
        description="U-Net layers with cross-attention, numbered in forward order; 3-6 of SD are middle + up (table 3)",
    )
    first_step: StepIndex = Field(2, description="First fused step_index; the paper's t = T - 2 = 18 (table 3)")
    last_step: StepIndex | None = Field(
        None, description="Last fused step_index, inclusive; the sampler's last if null, the paper's t = 1 (table 3)"
    )
    mask_source: Literal["first_up", "resolution"] = Field(
        "first_up", description="Cross-attention of the first up layer (paper), or all of that resolution (released)"
    )
    merge: Literal["xor", "or"] = Field("xor", description="Merge of item masks (Eq. 4: xor; released code: or)")
    control: AttentionControl = Field(
        "masked_kv",
        description="The part of the reference's attention that the target takes (Eq. 5; appendix B, figure 8)",
    )
    trajectory: Literal["fused", "ddim_inversion"] = Field(
        "fused",
        description="States of a target: those of the fusion, or a DDIM inversion of its clean latents (section 4.4)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_step is not None and self.last_step < self.first_step:
            message = f"last_step must be at least first_step ({self.first_step}), got {self.last_step}"
            raise FieldsError(message, "last_step")
        return self

    def steps(self, num_steps: int) -> range:
        """The fused step indices of `num_steps` steps. Empty if `first_step` is not among them."""
        last = num_steps - 1 if self.last_step is None else self.last_step
        return range(self.first_step, min(last + 1, num_steps))

    @classmethod
    def paper(cls) -> FusionConfig:
        """The settings of the paper's text."""
        return cls()

    @classmethod
    def released_code(cls) -> FusionConfig:
        """The settings of the authors' released code."""
        return cls(mask_source="resolution", merge="or")


class PairingConfig(StrictModel):
    """Settings for choosing references and bases, and for adopting targets (released code; Eq. 7)."""

    reference_share: float = Field(
        0.25, gt=0, le=0.5, description="Share of a prompt's samples, from the best, that are references"
    )
    reference_uses: Count = Field(2, description="Number of pairs per reference")
    base_share: float = Field(
        0.5, gt=0, le=0.5, description="Share of a prompt's samples, from the worst, that are bases"
    )
    dealing: Literal["worst_first", "rank_order"] = Field(
        "worst_first",
        description="Pairing of references and bases: references in turn and bases from the worst up; or both from"
        " the best down, all uses of a reference together (released code)",
    )
    adoption_threshold: float = Field(1.0, ge=0, description="lambda of Eq. 7 (table 3); 0 adopts every target")
    adoption_against: Literal["base", "reference"] = Field("base", description="Whose score lambda multiplies in Eq. 7")
    max_mask_cover: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Largest mean of the mask with which a target is adopted; 1 disables the limit (decision 003)",
    )

    @classmethod
    def paper(cls) -> PairingConfig:
        """The settings of the paper's text."""
        return cls()

    @classmethod
    def released_code(cls) -> PairingConfig:
        """The settings of the authors' released code, which keeps every target."""
        return cls(dealing="rank_order", adoption_threshold=0, max_mask_cover=1)


GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"attention": ("to_q", "to_k", "to_v", "to_out.0"), "feed_forward": ("ff.net.0.proj", "ff.net.2")}
)
"""Groups of layers that an adapter can have, by the ends of their names."""
Layer = Annotated[str, Field(min_length=1, max_length=200)]
_MOST_LAYERS = 4096


class LoraConfig(StrictModel):
    """A low-rank adapter of layers of the U-Net. It adds alpha / rank * B A to each weight.

    A layer is named by the end of its name in diffusers ("attn2.to_k"), by a pattern with * for its whole name
    ("mid_block.*"), or by a group of `GROUPS`.
    """

    rank: int = Field(4, ge=1, le=1024)
    alpha: Rate = 4.0
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian",
        description="Initialisation of A (down): N(0, 1/rank) as in ddpo-pytorch and the released code, or"
        " Kaiming-uniform as in peft. B (up) is 0 (docs/decisions/017-training-recipe.md)",
    )
    targets: tuple[Layer, ...] = Field(
        ("attention",),
        min_length=1,
        max_length=_MOST_LAYERS,
        description="Adapted layers: attention, feed_forward, or names of layers such as attn2.to_k",
    )
    rank_pattern: dict[Layer, Annotated[int, Field(ge=1, le=1024, strict=True)]] = Field(
        {}, max_length=_MOST_LAYERS, description="Ranks of some layers by name; the last name that matches counts"
    )
    alpha_pattern: dict[Layer, Annotated[float, Field(gt=0, strict=True)]] = Field(
        {}, max_length=_MOST_LAYERS, description="Alphas of some layers, as for rank_pattern"
    )
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA: alpha / sqrt(rank) instead of alpha / rank")
    use_dora: bool = Field(False, description="DoRA: the norms of the weights are trained separately")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the inputs of A that an update leaves out; never when images are sampled"
    )


class TrainingConfig(StrictModel):
    """Training settings (Eq. 6, 8, 9; table 3, "Optimizer" and "Training").

    An example is a pair (dpo) or a sample (ddpo, dpok). A row is one denoising step of an example. If the paper gives
    no number, the default is the published one of the underlying method (docs/decisions/005-algorithms.md). A setting
    that `algorithm` does not use must have its default.
    """

    algorithm: AlgorithmName = Field(
        "dpo",
        description="Eq. 6, Eq. 8 or Eq. 9",
        json_schema_extra=lambda schema: schema.update(enum=list(ALGORITHMS)),
    )
    beta: Rate = Field(0.1, description="dpo: beta of Eq. 6, on log-probs that are means over C x h x w (D3PO)")
    ratio_clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="dpo: p / pref of each side is clamped to 1 +- this inside the loss (D3PO, released code: 0.1)",
    )
    safeguard: float | None = Field(
        None,
        ge=0,
        le=1,
        description="dpo: mu of Diffusion-SDPO (arXiv 2511.03317), which scales down the rejected side's gradient so"
        " that, to first order, the preferred side does not become less likely; null: off",
    )
    credit: Literal["all", "mask"] = Field(
        "all",
        description="dpo, experimental: log-probs of a pair are means over all latent elements, or over those inside"
        " its fusion mask; without a mask, over all elements",
    )
    clip_range: float = Field(
        1e-4,
        gt=0,
        lt=1,
        description="ddpo, dpok: epsilon, the largest distance of the ratio from 1 (ddpo-pytorch, DPOK)",
    )
    advantage_clip: Rate = Field(5.0, description="ddpo, dpok: advantages are clipped to +- this (ddpo-pytorch)")
    policy_weight: Rate = Field(10.0, description="dpok: alpha of Eq. 9, the weight of the policy term (DPOK)")
    kl_weight: float = Field(0.01, ge=0, description="dpok: beta of Eq. 9, the weight of the KL term (DPOK)")
    kl_reference: Literal["round", "base"] = Field(
        "round", description="dpok: pref of the KL term: the policy before this round's updates, or the base model"
    )
    learning_rate: Rate = Field(1e-4, description="AdamW (table 3)")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW (table 3)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW (table 3)")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW (table 3)")
    adam_epsilon: Rate = Field(1e-8, description="AdamW (table 3)")
    max_grad_norm: Rate = Field(1.0, description="Largest norm of the gradient, by clipping (table 3)")
    optimizer_start: Literal["carried", "fresh"] = Field(
        "carried",
        description="Whether AdamW continues with the moments of earlier rounds (ddpo-pytorch), or starts at 0",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit stores AdamW's moments in 8 bits; it needs the extra `bitsandbytes`"
    )
    warmup_updates: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Updates in which the learning rate rises to `learning_rate`, counted from the start of AdamW's"
        " moments: with carried moments only in the first round",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate falls after the warm-up, to 0 after `schedule_updates`"
    )
    schedule_updates: Count | None = Field(
        None,
        description="linear, cosine: length of the schedule in updates, with the warm-up, counted from the start of"
        " AdamW's moments; null: each training has its own schedule",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The trained model has an average of the adapter over the updates, with this decay (less in the"
        " first updates: (1 + n) / (10 + n)), instead of the last weights; null: off",
    )
    examples_per_update: Count = Field(
        320,
        description="Largest number of examples per update; the updates of an inner epoch have nearly equal sizes"
        ' (table 3: "Batch size 1, Grad. accum. steps 320")',
    )
    micro_batch: Count = Field(8, description="Rows per U-Net call; affects memory, not the result")
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations in the backward pass: less memory, more time, same result. null: only on a"
        " GPU whose free memory may be too small without (docs/decisions/017-training-recipe.md)",
    )
    inner_epochs: Count = Field(2, description="Passes over a round's examples (table 3)")
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of its steps that a pair or sample is trained on, sampled separately for each inner epoch",
    )
    skip_dominant_step: bool = Field(
        False, description="Leave out the step whose log-prob depends most on the U-Net (for SD at T = 20: timestep 51)"
    )
    log_gradient_norms: bool = Field(
        True, description="Log the gradient's norm for each step; a micro-batch then holds rows of one step only"
    )
    ratio_tolerance: Rate | None = Field(
        None,
        description="Largest accepted |p / pref - 1| before the first update; null: 1e-3, in bfloat16 1e-2",
    )
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _settings_of_the_algorithm(self) -> Self:
        for name, field in type(self).model_fields.items():
            algorithms = readers(name)
            unused = algorithms and self.algorithm not in algorithms
            if unused and getattr(self, name) != field.default:
                message = f"{name} is a setting of {' and '.join(algorithms)}, not of {self.algorithm}"
                raise FieldsError(message, name)
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.schedule_updates is not None and self.schedule == "constant":
            raise FieldsError("expected schedule_updates with schedule linear or cosine only", "schedule_updates")
        if self.schedule_updates is not None and self.schedule_updates <= self.warmup_updates:
            message = f"expected more than warmup_updates ({self.warmup_updates}), got {self.schedule_updates}"
            raise FieldsError(f"schedule_updates: {message}", "schedule_updates")
        return self

    @property
    def learns_from_pairs(self) -> bool:
        """Whether the examples are pairs. Otherwise they are samples with advantages."""
        return ALGORITHMS[self.algorithm].learns_from == "pairs"

    @property
    def loss_weight(self) -> float:
        """The factor to which the loss's gradient is proportional: beta of Eq. 6, alpha of Eq. 9, otherwise 1."""
        weight = ALGORITHMS[self.algorithm].weight
        return 1.0 if weight is None else float(getattr(self, weight))

    @classmethod
    def paper(cls) -> TrainingConfig:
        """The settings of the paper's text."""
        return cls()

    @classmethod
    def released_code(cls) -> TrainingConfig:
        """The settings of the authors' released configuration. The code that reads it was not released."""
        return cls(ratio_clip=0.1)


class Preset(StrictModel):
    """The settings in which the paper's text and the authors' released code differ (docs/decisions/006-presets.md)."""

    fusion: FusionConfig
    pairing: PairingConfig
    training: TrainingConfig

    def settings_of(self, part: str, algorithm: str) -> dict[str, Any]:
        """The settings of `fusion`, `pairing` or `training` that `algorithm` uses, by name."""
        settings: StrictModel = getattr(self, part)
        values = settings.model_dump(exclude_defaults=part == "training")
        return {name: value for name, value in values.items() if not readers(name) or algorithm in readers(name)}


PRESETS: Mapping[Literal["paper", "released_code"], Preset] = MappingProxyType(
    {
        "paper": Preset(fusion=FusionConfig.paper(), pairing=PairingConfig.paper(), training=TrainingConfig.paper()),
        "released_code": Preset(
            fusion=FusionConfig.released_code(),
            pairing=PairingConfig.released_code(),
            training=TrainingConfig.released_code(),
        ),
    }
)


class RoundConfig(StrictModel):
    """Settings of a round: samples per prompt, pairs, fusion and training (figure 3)."""

    samples_per_prompt: int = Field(16, ge=2, le=1024, description="At least 2, since a pair needs two samples")
    sampling: SamplingConfig = SamplingConfig()
    pairing: PairingConfig = PairingConfig()
    fusion: FusionConfig | None = Field(FusionConfig(), description="None: naive, without fused targets")
    training: TrainingConfig = TrainingConfig()
