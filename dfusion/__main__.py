"""The console script `dfusion`: the command line of the service, if the service is installed.

A wheel contains only the library (docs/decisions/019-packaging.md).
"""

from __future__ import annotations

from dfusion.imports import without_garbage_collection

_INSTALL = "pip install --editable '.[service]'"


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: Always, with the command's exit code; with a message if the service or a package that it needs is
            not installed.
    """
    try:
        with without_garbage_collection():
            from api.cli.app import app
    except ModuleNotFoundError as error:
        raise SystemExit(f"dfusion: {_explanation(error)}") from error
    app()


def _explanation(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("api", "service"):
        return (
            "expected the service, got only the library. The command line and the service run from a checkout of the "
            f"repository ({_INSTALL}) or from its Docker images."
        )
    return f"the package {error.name} is missing; install it in the checkout with: {_INSTALL}"


if __name__ == "__main__":
    main()
