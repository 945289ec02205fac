"""Programs of the repository, not installed: the demo, the docs' tables and site, the shapes world's training."""
