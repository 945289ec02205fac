"""Programs of this repository that are not installed: they make what the package ships, and pictures for docs."""
