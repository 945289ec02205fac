"""The service's front: HTTP over `service`. Knows no torch and no worker."""
