"""Programs of the repository outside the service: the demo, the tables of the docs, the makers of the shapes world."""
