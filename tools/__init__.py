"""Programs of this repository that are not installed. They build the shipped models and the figures of the docs."""
