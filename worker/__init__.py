"""Runs stages: applies the method (dfusion) to stored samples and models (service). Does not import a web framework."""
