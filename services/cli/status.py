"""`specfleet status`: every model, what drafts for it, and what drafting is worth now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.cli import options
from services.cli.client import URL, Client, Json, Refused
from services.cli.screen import emit_json, remark, show, table

COLUMNS = ["model", "state", "drafter", "version", "policy", "depth", "tokens/step", "× off", "running", "waiting"]


def status(as_json: options.AsJson = False, url: options.Url = URL, key: options.Key = None) -> None:
    """Show the served models and how they draft."""
    with Client(url, key) as client:
        models = client.models()
        load = loads(client)
    if as_json:
        emit_json({"models": models, "load": load})
        return
    show(table(url, COLUMNS, [row(entry, load.get(str(entry["id"]), {})) for entry in models]))
    for entry in models:
        if entry.get("detail"):
            remark(f"{entry['id']}: {entry['detail']}")
    if not load:
        remark("Depth and load need the admin key: give it with --key.")


def loads(client: Client) -> Json:
    """What the policy actor knows of each model; empty where this key may not ask, or nobody can answer."""
    try:
        answer = client.get("/admin/load")
    except Refused as refused:
        if refused.status in (401, 403, 404, 503):
            return {}
        raise
    return dict(answer["models"])


def row(entry: Mapping[str, Any], load: Mapping[str, Any]) -> list[Any]:
    return [entry["id"], entry.get("state"), entry.get("drafter"), entry.get("version"), *worth(load)]


def worth(load: Mapping[str, Any]) -> list[Any]:
    """What a model's load says of its drafting; dashes for a model without load."""
    gain = load.get("expected", {}).get("gain_over_off")
    now = [load.get("policy", {}).get("kind"), depth(load), load.get("tokens_per_step"), None if gain is None else 1 + gain]
    return [*now, load.get("running"), load.get("waiting")]


def depth(load: Mapping[str, Any]) -> float | None:
    """The mean depth of the latest steps."""
    shares = load.get("depths")
    return sum(int(depth) * float(share) for depth, share in shares.items()) if shares else None
