"""The command tree of `specfleet`: one file per command, gathered here."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from services.cli.bench import bench
from services.cli.chat import chat
from services.cli.demo import app as demo
from services.cli.generate import generate
from services.cli.log import app as log
from services.cli.policy import app as policy
from services.cli.problem import Problem
from services.cli.serve import serve
from services.cli.speculators import app as speculators
from services.cli.status import status
from services.cli.train import train
from services.cli.training import app as training


class Commands(TyperGroup):
    """The commands, in the order of their registration; a Problem becomes one line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Problem as problem:
            print(problem, file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="specfleet",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve language models with speculators, talk to them, tune them.",
)
app.command()(serve)
app.command()(chat)
app.command()(generate)
app.command()(status)
app.add_typer(policy, name="policy")
app.add_typer(speculators, name="speculators")
app.add_typer(training, name="training")
app.add_typer(log, name="log")
app.command()(train)
app.add_typer(demo, name="demo")
app.command()(bench)


def main() -> None:
    """Entry point of the console script."""
    app()
