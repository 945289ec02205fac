"""Runs stages: the method (dfusion) over what is stored (service). Knows no web framework."""
