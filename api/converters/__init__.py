"""Conversion of table rows to response models, by resource."""
