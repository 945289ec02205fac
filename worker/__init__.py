"""Runs stages: the method (dfusion) over what is stored (api.core). Knows no web framework."""
