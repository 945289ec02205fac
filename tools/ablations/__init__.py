"""The paper's ablations, as images and tables: attention control, fused layers and steps, mask coverage."""
