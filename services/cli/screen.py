"""Where output goes: answers and JSON to standard output, remarks to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

WIDE = 160  # columns where there is no terminal to fit


def console(error: bool = False) -> Console:
    """A console on standard output or standard error, found anew so that redirections hold."""
    terminal = (sys.stderr if error else sys.stdout).isatty()
    return Console(stderr=error, highlight=False, width=None if terminal else WIDE)


def remark(text: str) -> None:
    """A dim line on standard error, so that standard output stays the answer alone."""
    console(error=True).print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)


def emit(text: str) -> None:
    """Text as it is, without a line break, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def emit_json(value: Any) -> None:
    emit(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def show(what: RenderableType) -> None:
    console().print(what)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table with numbers to the right; None is a dash."""
    built = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 1), pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(row[index] is None or isinstance(row[index], int | float) for row in rows)
        built.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        built.add_row(*(cell(value) for value in row))
    return built


def present(title: str, answer: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(answer)
    else:
        show(table(title, ["field", "value"], [[name, value] for name, value in flat(answer)]))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) for every leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def moment(seconds: float) -> str:
    """Seconds since the epoch as this machine's local time."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else escape(str(value))
