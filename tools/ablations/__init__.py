"""The paper's ablations in pictures and numbers: attention control, fused layers and steps, covers of the mask."""
