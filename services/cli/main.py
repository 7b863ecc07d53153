"""The command tree of `specfleet`: one file per command, gathered here."""

import typer

app = typer.Typer(name="specfleet", no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the console script."""
    app()
