"""The paper's ablations: trajectories by DDIM inversion, attention control, fused layers and steps."""
