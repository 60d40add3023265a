"""The entry point of ``hf-multimax``, which says what to install where Typer or Rich are missing."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits with 0, with 1 for an error, with 2 for a wrong option."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"hf-multimax needs {error.name}: pip install 'hf-multimax[cli]'")
    from hf_multimax.command_line.app import app

    app()
