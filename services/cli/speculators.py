"""`specfleet speculators`: the versions of a model's speculator, and which of them drafts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from services.cli import options
from services.cli.client import URL, Client, Json, query
from services.cli.screen import emit_json, moment, present, remark, show, table

app = typer.Typer(no_args_is_help=True, help="See which versions of a speculator there are, and choose which drafts, while it serves.")

VERSIONS = ["version", "state", "since", "parent", "gate, tokens/step", "why"]
REPLICAS = ["replica", "drafts with", "as it should", "loaded", "trouble"]
HISTORY = ["revision", "when", "who", "action", "version", "from", "to", "why"]

Model = Annotated[str, typer.Argument(help="A served model.")]
Version = Annotated[str, typer.Argument(help="One of its versions, as `list` shows them.")]
Listed = Annotated[str | None, typer.Option("--tag", help="Only the domain of requests with this tag.", show_default=False)]


@app.command("list")
def versions(model: Model, tag: Listed = None, as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show all versions and what every replica drafts with."""
    with Client(url, key) as client:
        state = client.get(path(model) + query({"tag": tag}))
    if as_json:
        emit_json(state)
        return
    for name, line in {tag or "": state, **state.get("domains", {})}.items():
        tell(f"{model}, domain {name}" if name else model, line)


@app.command()
def history(
    model: Model, tag: options.Domain = None, as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None
) -> None:
    """Show every change: when, who, why, and the live version before and after."""
    with Client(url, key) as client:
        answer = client.get(f"{path(model)}/history{query({'tag': tag})}")
    if as_json:
        emit_json(answer)
        return
    rows = [[moment(e["at"]) if name == "when" else e.get(name) for name in HISTORY] for e in answer["history"]]
    show(table(f"{model}, domain {tag}: changes" if tag else f"{model}: changes", HISTORY, rows))


@app.command()
def promote(
    model: Model,
    version: Version,
    tag: options.Domain = None,
    why: options.Why = "",
    expected_version: options.Revision = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Make a version the live one, everywhere."""
    change(Client(url, key), model, at(version, "promote"), as_json, tag=tag, why=why, expected_version=expected_version)


@app.command()
def pin(
    model: Model,
    version: Version,
    tag: options.Domain = None,
    why: options.Why = "",
    expected_version: options.Revision = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Make a version the live one and keep it: nothing else is tried until `unpin`."""
    change(Client(url, key), model, at(version, "pin"), as_json, tag=tag, why=why, expected_version=expected_version)


@app.command()
def unpin(
    model: Model,
    tag: options.Domain = None,
    why: options.Why = "",
    expected_version: options.Revision = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Let versions be tried and promoted again."""
    change(Client(url, key), model, "unpin", as_json, tag=tag, why=why, expected_version=expected_version)


@app.command()
def rollback(
    model: Model,
    version: Annotated[str | None, typer.Option("--version", help="Which is meant, canary or live.", show_default=False)] = None,
    tag: options.Domain = None,
    why: options.Why = "",
    expected_version: options.Revision = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """End the canary if one runs, else go back to the version that was live before."""
    change(Client(url, key), model, "rollback", as_json, version=version, tag=tag, why=why, expected_version=expected_version)


@app.command()
def canary(
    model: Model,
    version: Version,
    share: Annotated[float | None, typer.Option("--share", help="Part of the requests, above 0 and below 1.", show_default=False)] = None,
    tag: options.Domain = None,
    why: options.Why = "",
    expected_version: options.Revision = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Let a version serve part of the requests; it is promoted or rolled back by what it shows there."""
    change(Client(url, key), model, at(version, "canary"), as_json, share=share, tag=tag, why=why, expected_version=expected_version)


@app.command()
def retire(
    model: Model,
    version: Version,
    tag: options.Domain = None,
    why: options.Why = "",
    expected_version: options.Revision = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Withdraw a candidate."""
    change(Client(url, key), model, at(version, "retire"), as_json, tag=tag, why=why, expected_version=expected_version)


def change(client: Client, model: str, what: str, as_json: bool, **terms: Any) -> None:
    """Ask for a change and show what holds afterwards."""
    with client:
        answer = client.send("POST", f"{path(model)}/{what}{query(terms)}")
    present(f"{model}: speculator", answer, as_json)


def tell(name: str, line: Json) -> None:
    """Show one line of versions."""
    if line["state"] == "away":
        remark(f"{name}: the registry does not know this domain yet.")
        return
    show(table(f"{name}: versions", VERSIONS, [row(entry) for entry in line["versions"]]))
    show(table(f"{name}: replicas", REPLICAS, [replica(*entry) for entry in line["replicas"].items()]))
    remark(f"{name}: {standing(line)}")


def path(model: str) -> str:
    return f"/admin/speculators/{quote(model, safe='')}"


def at(version: str, action: str) -> str:
    return f"{quote(version, safe='')}/{action}"


def row(entry: Mapping[str, Any]) -> list[Any]:
    return [entry["version"], entry["state"], moment(entry["at"]), entry["parent"], judged(entry["gate"]), entry["why"]]


def judged(gate: Mapping[str, Any] | None) -> str | None:
    """+0.100 (0.050 to 0.150): what the gate found, with its interval."""
    return f"{gate['difference']:+.3f} ({gate['low']:.3f} to {gate['high']:.3f})" if gate else None


def replica(name: str, told: Mapping[str, Any]) -> list[Any]:
    errors = "; ".join(f"{version}: {error}" for version, error in told["errors"].items())
    return [name, told["serving"], "yes" if told["agrees"] else "no", ", ".join(told["loaded"]) or None, errors or None]


def standing(state: Json) -> str:
    """What is live, and how a canary stands, in words."""
    if state["state"] == "off":
        return "the speculator is not refreshed."
    followed = f"no version of its own is live, it is served by {state['serving']}"
    live = (
        f"revision {state['revision']}, {state['live'] + ' is live' if state['live'] else followed}{', pinned' if state['pinned'] else ''}."
    )
    canary = state["canary"]
    return f"{live} {canary['version']} is the canary of {canary['share']:.0%} of requests: {canary['reason']}" if canary else live
