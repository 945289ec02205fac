"""The service's front: HTTP over `api.core`. Knows no torch and no worker."""
