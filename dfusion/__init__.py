"""D-Fusion: online preference training of diffusion models on visually consistent pairs."""
