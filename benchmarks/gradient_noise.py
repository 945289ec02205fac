"""Measure whether consistent pairs reduce the noise of DPO's gradient (section 1 of the paper), on the shapes world.

`python -m benchmarks.gradient_noise` samples each prompt, pairs the samples, and computes the gradient of Eq. 6 of each
single pair, at the start of a training. It does so for the naive pair (reference over base) and for the fused one
(target over base, if Eq. 7 adopts it). All pairs of a prompt should teach the same, so more similar gradients mean less
noise. It prints, and with `--out` writes as JSON:

    cosine          mean cosine between the gradients of two pairs of a prompt
    cosine, others  the same between pairs of different prompts: what is common to all
    signal          ||mean gradient||^2 / mean ||gradient||^2 over all pairs; 1 / pairs for orthogonal gradients
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from dfusion.adapter import attach_lora, lora_parameters
from dfusion.catalogue import MODELS
from dfusion.config import FusionConfig, RoundConfig, SamplingConfig, TrainingConfig
from dfusion.models import DiffusionModel
from dfusion.prompts import Prompt
from dfusion.rewards import load_scorer
from dfusion.rounds import RoundPair, make_pairs
from dfusion.shapes.prompts import prompt_list
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair


@dataclass(frozen=True)
class Gradients:
    """The gradients of one kind of pairs, (pairs, parameters), and the prompt of each pair."""

    vectors: torch.Tensor
    prompts: Sequence[str]

    def figures(self) -> dict[str, float]:
        """The metrics above."""
        unit = self.vectors / self.vectors.norm(dim=1, keepdim=True)
        cosines = unit @ unit.T

        own: list[float] = []
        others: list[float] = []
        for i, j in combinations(range(len(unit)), 2):
            (own if self.prompts[i] == self.prompts[j] else others).append(float(cosines[i, j]))

        signal = self.vectors.mean(0).square().sum() / self.vectors.square().sum(1).mean()
        return {
            "pairs": len(unit),
            "cosine": sum(own) / len(own),
            "cosine_others": sum(others) / len(others),
            "signal": float(signal),
            "norm": float(self.vectors.norm(dim=1).mean()),
        }


def gradient(model: DiffusionModel, pair: TrainingPair, config: TrainingConfig) -> torch.Tensor:
    """The gradient of Eq. 6 of one pair over all its steps, as a vector."""
    start = [parameter.detach().clone() for parameter in lora_parameters(model.unet).values()]
    Trainer(model, [pair], config, seed=0).step()
    parameters = lora_parameters(model.unet).values()
    vector = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    for parameter, value in zip(parameters, start, strict=True):
        parameter.data.copy_(value)
    return vector


def adopted_pairs(
    model: DiffusionModel, prompts: Sequence[Prompt], config: RoundConfig, seed: int
) -> Iterator[RoundPair]:
    """The pairs with an adopted target, of prompts with at least two of them."""
    for pairs in make_pairs(model, prompts, load_scorer("shapes-clip"), config, seed=seed):
        adopted = [pair for pair in pairs if pair.adopted]
        if len(adopted) > 1:
            yield from adopted


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", choices=["behaviour", "attribute", "position"], default="attribute")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--first-step", type=int, default=3)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    model = DiffusionModel.load(MODELS["shapes"].folder)
    attach_lora(model.unet, seed=arguments.seed)
    shapes_prompts = prompt_list(arguments.template, "train")[: arguments.prompts]
    prompts = [Prompt(text=p.text, items=p.items, thresholds=p.thresholds) for p in shapes_prompts]
    config = RoundConfig(
        samples_per_prompt=arguments.samples,
        sampling=SamplingConfig(num_steps=arguments.steps),
        fusion=FusionConfig(first_step=arguments.first_step),
    )
    training = TrainingConfig(micro_batch=16, log_gradient_norms=False, max_grad_norm=1e9, learning_rate=1e-9)

    texts: list[str] = []
    vectors: dict[str, list[torch.Tensor]] = {"naive": [], "fused": []}
    for pair in adopted_pairs(model, prompts, config, arguments.seed):
        texts.append(pair.prompt)
        base = pair.base.trajectory
        sides = {"naive": pair.reference, "fused": pair.better}
        for kind, side in sides.items():
            example = TrainingPair(side.trajectory, base, pair.prompt, on_policy=kind == "naive")
            vectors[kind].append(gradient(model, example, training))

    results = {kind: Gradients(torch.stack(rows), texts).figures() for kind, rows in vectors.items()}
    write(f"{arguments.template}, {len(texts)} pairs of {len(set(texts))} prompts\n")
    write(f"{'':8}{'cosine':>10}{'cosine, others':>16}{'signal':>10}{'norm':>12}\n")
    for kind, row in results.items():
        write(f"{kind:8}{row['cosine']:10.3f}{row['cosine_others']:16.3f}{row['signal']:10.4f}{row['norm']:12.2e}\n")
    if arguments.out is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        arguments.out.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
