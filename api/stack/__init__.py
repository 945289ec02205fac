"""The deployed mode on one machine without Docker: `python -m api.stack` or `make stack`."""
