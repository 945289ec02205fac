"""The REST API of `service`. Does not import torch or worker."""
