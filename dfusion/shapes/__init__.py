"""The shapes world: a renderer, prompts, a small Stable Diffusion, a small CLIP and a judge."""
