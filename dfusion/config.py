"""Every setting of the method, with the paper's default and its source. Imports no torch.

Settings are frozen, reject unknown keys, and take finite numbers only. "Table 3" is the paper's table of
hyper-parameters (appendix C.3).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
StepIndex = Annotated[int, Field(ge=0, le=999)]
Rate = Annotated[float, Field(gt=0)]
Precision = Literal["float32", "bfloat16", "float16"]
"""Number format of a model's weights. Adapters and the arithmetic of Eq. 1 are float32 in any of them."""


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SamplingConfig(Settings):
    """How a trajectory is sampled (Eq. 1; table 3, "Sampling")."""

    num_steps: int = Field(20, ge=1, le=1000, description="Denoising steps T (table 3)")
    guidance_scale: float = Field(5.0, ge=0, le=100, description="Classifier-free guidance; 1 is without (table 3)")
    eta: float = Field(1.0, gt=0, le=1, description="Weight of the noise in DDIM, eta in Eq. 1 (table 3)")


class FusionConfig(Settings):
    """How a target is fused (Eq. 4 and 5; table 3, "Fusion").

    The defaults are the paper's text; `released_code()` gives what the authors' code does where it differs.
    """

    layers: Literal["middle+up"] | tuple[int, ...] = Field(
        "middle+up",
        description="U-Net layers with cross-attention, counted in forward order; 3-6 of SD are middle + up (table 3)",
    )
    first_step: StepIndex = Field(2, description="First fused step_index; the paper's t = T - 2 = 18 (table 3)")
    last_step: StepIndex = Field(19, description="Last fused step_index, inclusive; the paper's t = 1 (table 3)")
    mask_source: Literal["first_up", "resolution"] = Field(
        "first_up", description="Cross-attention of the first up layer (paper), or all of that resolution (released)"
    )
    merge: Literal["xor", "or"] = Field("xor", description="How item masks become one (Eq. 4: xor; released code: or)")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step must be at least first_step ({self.first_step}), got {self.last_step}")
        return self

    @classmethod
    def paper(cls) -> FusionConfig:
        """What the paper's text says."""
        return cls()

    @classmethod
    def released_code(cls) -> FusionConfig:
        """What the authors' released code does."""
        return cls(mask_source="resolution", merge="or")


class PairingConfig(Settings):
    """Who becomes a reference or a base, and which targets are adopted (released code; Eq. 7)."""

    reference_share: float = Field(0.25, gt=0, le=0.5, description="Best share of a prompt's samples: references")
    reference_uses: Count = Field(2, description="Pairs that one reference serves")
    base_share: float = Field(0.5, gt=0, le=0.5, description="Worst share of a prompt's samples: bases")
    adoption_threshold: float = Field(1.0, ge=0, description="lambda of Eq. 7 (table 3)")
    adoption_against: Literal["base", "reference"] = Field("base", description="Whose score lambda multiplies in Eq. 7")


class LoraConfig(Settings):
    """Low-rank adapter on the U-Net's attention projections."""

    rank: int = Field(4, ge=1, le=256)
    alpha: Rate = 4.0


class TrainingConfig(Settings):
    """DPO on trajectories (Eq. 6; table 3, "Optimizer" and "Training")."""

    algorithm: Literal["dpo"] = "dpo"
    beta: Rate = Field(0.1, description="beta of Eq. 6, on log-probs that are means over C x h x w")
    learning_rate: Rate = Field(1e-4, description="AdamW (table 3)")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW (table 3)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW (table 3)")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW (table 3)")
    adam_epsilon: Rate = Field(1e-8, description="AdamW (table 3)")
    max_grad_norm: Rate = Field(1.0, description="Clipping of the gradient's norm (table 3)")
    rows_per_update: Count = Field(320, description="Rows (pair x step) whose gradients one update adds up (table 3)")
    micro_batch: Count = Field(8, description="Rows that go through the U-Net at once; changes memory, not the result")
    inner_epochs: Count = Field(2, description="Passes over a round's rows (table 3)")
    lora: LoraConfig = LoraConfig()
