"""The paper's ablations: attention control, fused layers and steps, covers of the mask."""
