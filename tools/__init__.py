"""Programs of the repository, not installed: the demo, the tables of the docs, the makers of the shapes world."""
