"""Noise schedules as a pipeline's `scheduler_config.json` describes them, without torch.

Eq. 1 is a DDIM step on the alpha-bars of the folder's scheduler. This module says which schedulers have alpha-bars that
DDIM can take over, and which numbers of steps they allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dfusion.config import MOST_INITIAL_SIGNAL
from dfusion.errors import UnsupportedModelError, shortened

DDIM = "DDIMScheduler"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
_SAME_ALPHAS = frozenset(
    {
        DDIM,
        "DDIMParallelScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Schedulers that differ from DDIM only in their steps: their betas and prediction types mean the same."""
_DISTILLED = frozenset({"CMStochasticIterativeScheduler", "LCMScheduler", "TCDScheduler"})
_TURBO = frozenset({"EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"})
_NOT_A_POLICY = "a distilled few-step model is not a policy of Eq. 1. Train the model that it was distilled from"
_FLOW = "a flow-matching model has no alpha-bars for Eq. 1"
_MAX_BETA = 0.999


def require_ddim(config: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError, naming the cause, if DDIM cannot take over a scheduler's config.

    Args:
        config: The content of `scheduler_config.json`.
        names: The scheduler's class, as the files name it.
    """
    for name in names:
        _require_known_class(name)
    prediction_type = config.get("prediction_type", "epsilon")
    _require_prediction_type(config, prediction_type)

    # 1. settings that DDIM or Eq. 1 does not have
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise UnsupportedModelError(
            f"scheduler: timestep_spacing: expected one of {list(SPACINGS)}, got {shortened(spacing)}"
        )
    if config.get("thresholding"):
        raise UnsupportedModelError(
            "scheduler: thresholding: expected false (Eq. 1 has no dynamic thresholding), got true"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise UnsupportedModelError(
            f"scheduler: timestep_type: expected 'discrete', got {shortened(config['timestep_type'])}"
        )
    offset = config.get("steps_offset", 0)
    if not _is_integer(offset) or offset < 0:
        raise UnsupportedModelError(f"scheduler: steps_offset: expected an integer from 0, got {shortened(offset)}")

    # 2. its alpha-bars
    alphas = alpha_bars(config)
    zero_snr = bool(config.get("rescale_betas_zero_snr")) or alphas[-1] == 0
    if zero_snr and prediction_type == "epsilon":
        raise UnsupportedModelError(
            "scheduler: zero-terminal-SNR betas with epsilon prediction: x0 is undefined where alpha-bar is 0. Such"
            " betas work with v-prediction and trailing spacing; for an epsilon model set rescale_betas_zero_snr to"
            " false"
        )

    # 3. models that need few steps and no guidance
    turbo = [name for name in names if name in _TURBO]
    if prediction_type == "epsilon" and spacing == "trailing" and turbo:
        raise UnsupportedModelError(
            f"scheduler: {turbo[0]} with epsilon prediction and trailing spacing is the scheduler of turbo and"
            f" lightning models: {_NOT_A_POLICY}. If this model is not distilled, set {DDIM} in model_index.json and"
            " scheduler_config.json"
        )


def _require_known_class(name: str) -> None:
    if name in _SAME_ALPHAS:
        return
    if "Flow" in name:
        raise UnsupportedModelError(f"scheduler: {name}: {_FLOW}")
    if name in _DISTILLED:
        raise UnsupportedModelError(
            f"scheduler: {name}: {_NOT_A_POLICY}. If this model is not distilled, set {DDIM} in model_index.json and"
            " scheduler_config.json"
        )
    raise UnsupportedModelError(
        f"scheduler: expected one whose betas DDIM can use ({', '.join(sorted(_SAME_ALPHAS))}), got {name}"
    )


def _require_prediction_type(config: Mapping[str, Any], prediction_type: object) -> None:
    if prediction_type == "flow_prediction" or config.get("use_flow_sigmas"):
        setting = "flow_prediction" if prediction_type == "flow_prediction" else "use_flow_sigmas"
        raise UnsupportedModelError(f"scheduler: {setting}: {_FLOW}")
    if prediction_type not in PREDICTION_TYPES:
        raise UnsupportedModelError(
            f"scheduler: prediction_type: expected one of {list(PREDICTION_TYPES)}, got {shortened(prediction_type)}"
        )


def alpha_bars(config: Mapping[str, Any]) -> np.ndarray:
    """alpha-bar of each training timestep, (num_train_timesteps,) float64. The defaults are diffusers'.

    Raises UnsupportedModelError for a schedule that DDIM does not have, or betas outside (0, 1].
    """
    total = config.get("num_train_timesteps", 1000)
    if not _is_integer(total) or total < 1:
        raise UnsupportedModelError(
            f"scheduler: num_train_timesteps: expected an integer from 1, got {shortened(total)}"
        )

    betas = _betas(config, total)
    if betas.shape != (total,) or not bool(((betas > 0) & (betas <= 1)).all()):
        raise UnsupportedModelError(f"scheduler: expected {total} betas in (0, 1], got {shortened(betas.tolist())}")
    alphas: np.ndarray = np.cumprod(1 - betas)
    return _without_terminal_signal(alphas) if config.get("rescale_betas_zero_snr") else alphas


def _betas(config: Mapping[str, Any], total: int) -> np.ndarray:
    trained = config.get("trained_betas")
    if trained is not None:
        try:
            return np.asarray(trained, dtype=float)
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"scheduler: trained_betas: expected numbers, got {shortened(trained)}"
            ) from error

    ends = []
    for name, default in (("beta_start", 0.0001), ("beta_end", 0.02)):
        value = config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise UnsupportedModelError(f"scheduler: {name}: expected a number from 0 to 1, got {shortened(value)}")
        ends.append(value)
    start, end = ends

    match config.get("beta_schedule", "linear"):
        case "linear":
            return np.linspace(start, end, total)
        case "scaled_linear":
            return np.square(np.linspace(start**0.5, end**0.5, total))
        case "squaredcos_cap_v2":
            alphas = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
            betas: np.ndarray = np.clip(1 - alphas[1:] / alphas[:-1], 0, _MAX_BETA)
            return betas
        case other:
            expected = ["linear", "scaled_linear", "squaredcos_cap_v2"]
            raise UnsupportedModelError(
                f"scheduler: beta_schedule: expected one of {expected}, which DDIM has, got {shortened(other)}"
            )


def _without_terminal_signal(alphas: np.ndarray) -> np.ndarray:
    """The alpha-bars, shifted and scaled so that the last one is 0 (Lin et al. 2024, algorithm 1)."""
    roots = np.sqrt(alphas)
    shifted = roots - roots[-1]
    span = roots[0] - roots[-1]
    rescaled: np.ndarray = (shifted * (roots[0] / span)) ** 2 if span > 0 else np.zeros_like(alphas)
    return rescaled


def step_problem(config: Mapping[str, Any], num_steps: int) -> str | None:
    """Why `dfusion.ddim.Schedule` refuses this number of steps. None if it does not. The config fits DDIM."""
    total = config.get("num_train_timesteps", 1000)
    if num_steps > total:
        return f"expected at most the {total} timesteps of this scheduler, got {num_steps}"
    first = _first_timestep(config, num_steps)
    if first >= total:
        return f"expected fewer steps: the first timestep would be {first}, and the scheduler's last is {total - 1}"
    fewest = _fewest_steps(config)
    if num_steps < fewest:
        return f"expected at least {fewest} with this scheduler, got {num_steps}"
    return None


def _fewest_steps(config: Mapping[str, Any]) -> int:
    """The smallest number of steps whose first timestep has enough noise for x_T."""
    total = config.get("num_train_timesteps", 1000)
    noisy = np.flatnonzero(alpha_bars(config) <= MOST_INITIAL_SIGNAL)
    if len(noisy) == 0:
        return 1
    enough = (steps for steps in range(1, total + 1) if _first_timestep(config, steps) >= noisy[0])
    return next(enough, 1)


def _first_timestep(config: Mapping[str, Any], num_steps: int) -> int:
    """The first of DDIM's timesteps."""
    total: int = config.get("num_train_timesteps", 1000)
    match config.get("timestep_spacing", "leading"):
        case "leading":
            first: int = (num_steps - 1) * (total // num_steps) + config.get("steps_offset", 0)
            return first
        case "linspace":
            return 0 if num_steps == 1 else total - 1
        case _:
            return total - 1


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
