"""Runs stages: applies the method (dfusion) to stored samples and models (service). Imports no web framework."""
