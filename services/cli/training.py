"""`specfleet training`: how the trainers of the served models stand; pause and resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from services.cli import options
from services.cli.client import URL, Client, query
from services.cli.screen import emit_json, moment, present, remark, show, table

app = typer.Typer(no_args_is_help=True, help="See how speculators are refreshed from what is served, pause and resume it.")

COLUMNS = [
    "model",
    "domain",
    "training",
    "phase",
    "from",
    "round",
    "step",
    "loss",
    "held out",
    "best",
    "buffer MiB",
    "requests",
    "judging",
    "waits for tokens",
]
HISTORY = ["when", "who", "from", "to", "why"]

Model = Annotated[str, typer.Argument(help="A served model.")]
Tag = Annotated[str | None, typer.Option("--tag", help="Only the domain of requests with this tag.", show_default=False)]
Models = Annotated[list[str] | None, typer.Argument(help="Served models; none: all of them.", show_default=False)]


@app.command()
def status(
    models: Models = None, tag: Tag = None, as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None
) -> None:
    """Show what every trainer does, and how its last candidate fared."""
    with Client(url, key) as client:
        names = models or [str(entry["id"]) for entry in client.models()]
        states = {name: client.get(path(name) + query({"tag": tag})) for name in names}
    if as_json:
        emit_json(states)
        return
    domains = [(name, domain) for name, state in states.items() for domain in (state, *others(state))]
    show(table("training", COLUMNS, [[name, state["tag"] or None, *row(state)] for name, state in domains]))
    for name, state in domains:
        told = (state.get("outcome"), (state.get("gate") or {}).get("reason"), state.get("reason"), state.get("problem"))
        for said in filter(None, told):
            remark(f"{name}, domain {state['tag']}: {said}" if state["tag"] else f"{name}: {said}")


@app.command()
def pause(model: Model, why: options.Why = "", as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Let training rest until it is resumed, in all domains; traces are still taken in."""
    change(Client(url, key), model, True, why, as_json)


@app.command()
def resume(model: Model, why: options.Why = "", as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Let training go on."""
    change(Client(url, key), model, False, why, as_json)


@app.command()
def history(model: Model, as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show who paused and resumed it, when and why."""
    with Client(url, key) as client:
        answer = client.get(f"{path(model)}/history")
    if as_json:
        emit_json(answer)
        return
    rows = [[moment(e["at"]), e["who"], rests(e["from"]), rests(e["to"]), e["why"]] for e in answer["history"]]
    show(table(f"{model}: training", HISTORY, rows))


def change(client: Client, model: str, paused: bool, why: str, as_json: bool) -> None:
    with client:
        answer = client.send("PATCH", path(model) + query({"why": why}), {"paused": paused})
    present(f"{model}: training", answer, as_json)


def path(model: str) -> str:
    return f"/admin/training/{quote(model, safe='')}"


def others(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The domains that a state of the common one comes with."""
    return [{"state": state["state"], **domain} for domain in state.get("domains", {}).values()]


def rests(state: Mapping[str, Any]) -> str:
    return "paused" if state["paused"] else "on"


def row(state: Mapping[str, Any]) -> list[Any]:
    """A trainer's state in one domain; dashes for a model without one."""
    traces, losses = state.get("traces", {}), state.get("losses", ())
    loss = sum(losses) / len(losses) if losses else None
    worth = [(state.get(name) or {}).get("per_step") for name in ("before", "best")]
    held = [traces["bytes"] / 2**20, traces["training"] + traces["held_out"]] if traces else [None, None]
    judging = "{requests} of {wanted}".format_map(state["judging"]) if "judging" in state else None
    told = [state.get(name) for name in ("phase", "version", "round", "step")]
    return [state["state"], *told, loss, *worth, *held, judging, state.get("waiting_for")]
