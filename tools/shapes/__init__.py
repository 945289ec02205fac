"""Build and measure the models of the shapes world (docs/shapes-world.md)."""
