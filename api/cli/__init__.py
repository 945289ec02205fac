"""The command line `dfusion`. It uses only the REST API."""

from api.cli.app import app

__all__ = ["app"]
