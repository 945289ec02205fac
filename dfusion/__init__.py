"""D-Fusion: online preference training of diffusion models on visually consistent pairs.

The public names are importable from here and are loaded on first use, so `import dfusion` does not import torch.
Everything else is in the submodules.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfusion.adapter import attach_lora as attach_lora
    from dfusion.adapter import load_adapter as load_adapter
    from dfusion.adapter import save_adapter as save_adapter
    from dfusion.advantages import RewardHistory as RewardHistory
    from dfusion.algorithms import Algorithm as Algorithm
    from dfusion.catalogue import MODELS as MODELS
    from dfusion.config import FusionConfig as FusionConfig
    from dfusion.config import LoraConfig as LoraConfig
    from dfusion.config import PairingConfig as PairingConfig
    from dfusion.config import RoundConfig as RoundConfig
    from dfusion.config import SamplingConfig as SamplingConfig
    from dfusion.config import TrainingConfig as TrainingConfig
    from dfusion.errors import DFusionError as DFusionError
    from dfusion.evaluation import compare as compare
    from dfusion.export import export_adapter as export_adapter
    from dfusion.fused_sampling import fuse as fuse
    from dfusion.inversion import invert as invert
    from dfusion.model_report import check_model as check_model
    from dfusion.models import DiffusionModel as DiffusionModel
    from dfusion.pairing import choose_pairs as choose_pairs
    from dfusion.prompts import Prompt as Prompt
    from dfusion.prompts import read_prompts as read_prompts
    from dfusion.rewards import Scorer as Scorer
    from dfusion.rewards import load_scorer as load_scorer
    from dfusion.rounds import RoundPair as RoundPair
    from dfusion.rounds import RoundResult as RoundResult
    from dfusion.rounds import make_pairs as make_pairs
    from dfusion.rounds import run_round as run_round
    from dfusion.sampling import sample as sample
    from dfusion.trainer_state import TrainerState as TrainerState
    from dfusion.training import Trainer as Trainer
    from dfusion.training_data import TrainingPair as TrainingPair
    from dfusion.training_data import TrainingSample as TrainingSample
    from dfusion.types import Trajectory as Trajectory

_HOME: Mapping[str, str] = MappingProxyType(
    {
        "Algorithm": "dfusion.algorithms",
        "DFusionError": "dfusion.errors",
        "DiffusionModel": "dfusion.models",
        "FusionConfig": "dfusion.config",
        "LoraConfig": "dfusion.config",
        "MODELS": "dfusion.catalogue",
        "PairingConfig": "dfusion.config",
        "Prompt": "dfusion.prompts",
        "RewardHistory": "dfusion.advantages",
        "RoundConfig": "dfusion.config",
        "RoundPair": "dfusion.rounds",
        "RoundResult": "dfusion.rounds",
        "SamplingConfig": "dfusion.config",
        "Scorer": "dfusion.rewards",
        "Trainer": "dfusion.training",
        "TrainerState": "dfusion.trainer_state",
        "TrainingConfig": "dfusion.config",
        "TrainingPair": "dfusion.training_data",
        "TrainingSample": "dfusion.training_data",
        "Trajectory": "dfusion.types",
        "attach_lora": "dfusion.adapter",
        "check_model": "dfusion.model_report",
        "choose_pairs": "dfusion.pairing",
        "compare": "dfusion.evaluation",
        "export_adapter": "dfusion.export",
        "fuse": "dfusion.fused_sampling",
        "invert": "dfusion.inversion",
        "load_adapter": "dfusion.adapter",
        "load_scorer": "dfusion.rewards",
        "make_pairs": "dfusion.rounds",
        "read_prompts": "dfusion.prompts",
        "run_round": "dfusion.rounds",
        "sample": "dfusion.sampling",
        "save_adapter": "dfusion.adapter",
    }
)
"""The module of each public name."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
