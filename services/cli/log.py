"""`specfleet log`: what the request log holds, and its purge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from services.cli import options
from services.cli.client import URL, Client, query
from services.cli.problem import Problem
from services.cli.screen import emit_json, moment, remark, show, table

app = typer.Typer(no_args_is_help=True, help="See what the request log holds, and purge it.")

COLUMNS = ["model", "records", "MiB", "oldest", "newest"]
HISTORY = ["when", "who", "records", "what", "why"]
NAMES = ("model", "key", "request", "before", "tag")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # seconds


@app.command()
def status(as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show records, bytes, the oldest and the newest record."""
    with Client(url, key) as client:
        state = client.get("/admin/log")
    if as_json:
        emit_json(state)
        return
    rows = [row(model, count) for model, count in state["models"].items()]
    show(table("request log", COLUMNS, [*rows, row("all", state)]))
    kept, writer = state["retention"], state["writer"]
    bounds = f"{kept['max_records']} records, {kept['max_bytes'] / 2**20:.0f} MiB, {kept['max_age_s'] / 86400:g} days"
    remark(f"The store takes {state['store_bytes'] / 2**20:.2f} MiB; kept are at most {bounds}.")
    remark(f"Since it was started: {', '.join(f'{count} {name}' for name, count in writer.items())}.")


@app.command()
def purge(
    model: Annotated[str | None, typer.Option("--model", help="Records of this model.", show_default=False)] = None,
    of_key: Annotated[str | None, typer.Option("--of-key", help="Records of the API key of this name.", show_default=False)] = None,
    request: Annotated[str | None, typer.Option("--request", help="Records of the answer with this id.", show_default=False)] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Records of requests with this tag.", show_default=False)] = None,
    before: Annotated[
        str | None, typer.Option("--before", help="Older than this: 30m, 12h, 7d, 2w, or a date or time (ISO 8601).", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All records.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    why: options.Why = "",
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Delete records for good: those that fit all that is given."""
    what = {"model": model, "key": of_key, "request": request, "tag": tag, "before": before and moment_of(before).isoformat()}
    given = {name: value for name, value in what.items() if value is not None}
    if bool(given) == everything:
        raise Problem("Say what is to go: --model, --of-key, --request, --tag, --before, or --all for all of it.")
    if not yes:
        typer.confirm(f"Delete {named(given)} for good?", abort=True, err=True)
    with Client(url, key) as client:
        answer = client.send("DELETE", "/admin/log" + query({**given, "all": "true" if everything else None, "why": why}))
    if as_json:
        emit_json(answer)
    else:
        show(f"{answer['purged']} records were deleted.")
    if answer["readable"]:
        remark("Deleted records are not overwritten in the log's file yet, because another program reads it; purge again after that.")
    for name in answer["cleared"]:
        remark(f"What a trainer of {name} had left on the disk was deleted.")
    for name, why in answer["untold"].items():
        remark(f"Traces of {name} may still be there; purge again once that is mended: {why}")


@app.command()
def history(as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show every purge: when, who, what and how many records."""
    with Client(url, key) as client:
        answer = client.get("/admin/log/history")
    if as_json:
        emit_json(answer)
        return
    rows = [[moment(entry["at"]), entry["who"], entry["records"], purged(entry), entry["why"]] for entry in answer["history"]]
    show(table("request log: purges", HISTORY, rows))


def row(name: str, count: Mapping[str, Any]) -> list[Any]:
    times = [None if count[end] is None else moment(count[end]) for end in ("oldest", "newest")]
    return [name, count["records"], count["bytes"] / 2**20, *times]


def purged(entry: Mapping[str, Any]) -> str:
    given = {name: entry[name] for name in NAMES if entry.get(name) is not None}
    return named(given | ({"before": moment(given["before"])} if "before" in given else {}))


def named(given: Mapping[str, str]) -> str:
    """A selection in words."""
    return "records with " + ", ".join(f"{name} {value}" for name, value in given.items()) if given else "all records"


def moment_of(text: str) -> datetime:
    """A time ago, or a date or time, which is this machine's local one where it names no zone. Raises Problem."""
    if ago := re.fullmatch(r"(\d{1,6})([smhdw])", text):
        return datetime.now(UTC) - timedelta(seconds=int(ago[1]) * UNITS[ago[2]])
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Problem(f"{text!r} is no time: give 30m, 12h, 7d, 2w, or a date or time such as 2026-01-31T18:00.") from None
