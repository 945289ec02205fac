"""Cross-attention capture and self-attention fusion in a stock diffusers U-Net, without patching it."""
