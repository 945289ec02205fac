"""The command line `dfusion`; it speaks only the REST API."""

from api.cli.app import app

__all__ = ["app"]
