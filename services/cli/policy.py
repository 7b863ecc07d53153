"""`specfleet policy get|set|history`: the speculation policy of a served model, while it serves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from services.cli import options
from services.cli.client import URL, Client, Json, query
from services.cli.problem import Problem
from services.cli.screen import emit_json, moment, present, remark, show, table

app = typer.Typer(no_args_is_help=True, help="See and change how deep a model drafts, while it serves.")

COLUMNS = ["version", "when", "who", "why", "change"]

Model = Annotated[str, typer.Argument(help="A served model.")]


@app.command()
def get(model: Model, as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show the policy in force."""
    with Client(url, key) as client:
        answer = client.get(path(model))
    present(f"{model}: policy", answer, as_json)


@app.command("set")
def change(
    model: Model,
    fields: Annotated[list[str], typer.Argument(help="A JSON object, or fields as NAME=VALUE.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the outcome, change nothing.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the whole policy instead of the given fields.")] = False,
    why: options.Why = "",
    expected_version: Annotated[
        int | None, typer.Option("--expected-version", min=0, help="Change this version only, and fail when the policy is at another.")
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Change the policy, or some fields of it: `specfleet policy set demo-code kind=fixed depth=4`."""
    wanted = policy_fields(fields)
    with Client(url, key) as client:
        answer = client.send("PUT" if replace else "PATCH", path(model) + terms(dry_run, why, expected_version), wanted)
    present(f"{model}: policy", answer, as_json)
    if dry_run and not as_json:
        remark("Nothing was changed.")


@app.command()
def history(model: Model, as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show every change: when, who, why, and the fields that it changed."""
    with Client(url, key) as client:
        answer = client.get(path(model) + "/history")
    if as_json:
        emit_json(answer)
        return
    show(table(f"{model}: policy changes", COLUMNS, [row(entry) for entry in answer["history"]]))


def path(model: str) -> str:
    return f"/admin/policies/{quote(model, safe='')}"


def terms(dry_run: bool, why: str, expected_version: int | None) -> str:
    """How a change is to be made, as a query; empty for a plain change."""
    return query({"dry_run": "true" if dry_run else None, "why": why, "expected_version": expected_version})


def policy_fields(arguments: Sequence[str]) -> Json:
    """One JSON object, or NAME=VALUE, where a value that is not JSON is text. Raises Problem."""
    if len(arguments) == 1 and arguments[0].lstrip().startswith("{"):
        return json_object(arguments[0])
    return dict(assignment(argument) for argument in arguments)


def json_object(text: str) -> Json:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise Problem(f"The policy is not a JSON object: {error}") from None


def assignment(argument: str) -> tuple[str, Any]:
    name, equals, value = argument.partition("=")
    if not name or not equals:
        raise Problem(f"{argument!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def row(entry: Mapping[str, Any]) -> list[Any]:
    return [entry["version"], moment(entry["at"]), entry["who"], entry.get("why"), difference(entry["from"], entry["to"])]


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """kind: goodput → fixed, depth: 3: the fields of the policy that are new or other than before."""
    changed = [name for name in after if name not in before or before[name] != after[name]]
    return ", ".join(f"{name}: {f'{before[name]} → ' if name in before else ''}{after[name]}" for name in changed)
