"""The `specfleet` command. Talks to a running service over HTTP, or starts one; holds no model code of its own."""

from services.cli.main import main

__all__ = ["main"]
