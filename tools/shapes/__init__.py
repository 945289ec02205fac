"""How the models of the shapes world are made and measured (docs/shapes-world.md)."""
