"""What refreshing is worth when traffic changes: `python benchmarks/drift.py --out benchmarks/results/drift.json`.

A real service holds one base under three names, all with the same policy of fixed depth: `static` and `refreshed` begin with the same
speculator, which was trained on one kind of text alone, and only the second is refreshed; `ceiling` holds one that was trained on the
other kind beforehand, offline, until it stopped gaining: from random weights, or from those of the others, whichever is better. Users put
every request to all of them at once, first of the one kind and then of the other (the ceiling's only then), so tokens per step compare
request by request. Texts that are learned from beforehand are of other documents than those of the traffic.

With --cold the speculator is of random weights, there is one kind of traffic and no ceiling: how many requests until it makes 1.6
tokens per step on what it learned from them alone.

A promotion lowered tokens per step if its version makes less of the requests that came after it than the version before would have made
of them, which is found out by drafting for them again with both, when all is over: the base answers the same whoever drafts.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.drifting.findings import COLD, Exchanges, Replay, course, promotions, recovery, totals, warmed  # noqa: E402
from benchmarks.drifting.fleet import CANARY, CEILING, COLD_REFRESH, POLICY, REFRESH, REFRESHED, STATIC, fleet  # noqa: E402
from benchmarks.drifting.live import Exchange, Habits, Wanted, driven, history  # noqa: E402
from benchmarks.drifting.offline import Lesson, answered, taught, untrained  # noqa: E402
from benchmarks.drifting.picture import draw  # noqa: E402
from benchmarks.drifting.replayed import Replays  # noqa: E402
from benchmarks.drifting.texts import KINDS, prompts  # noqa: E402
from drafters.mlp import MLPSpeculator  # noqa: E402
from drafters.replay import ReplayBuffer  # noqa: E402
from services.cli.bench_service import serving  # noqa: E402
from services.cli.machine import machine  # noqa: E402


@dataclass(frozen=True, slots=True)
class Plan:
    """kinds: of traffic, one after the other, with so many requests each. lesson: prompts to learn from beforehand, for each kind."""

    model: Path
    cold: bool
    kinds: tuple[str, ...]
    requests: tuple[int, ...]
    habits: Habits
    lesson: int
    window: int
    seed: int

    @property
    def refresh(self) -> dict[str, Any]:
        return COLD_REFRESH if self.cold else REFRESH


def main(
    model: Annotated[Path, typer.Option("--model", help="Folder of a demo base with its speculator.")] = ROOT / "models" / "demo-chat",
    cold: Annotated[bool, typer.Option("--cold", help="Begin with random weights, and stay with the first kind.")] = False,
    before: Annotated[
        str | None, typer.Option("--from", help=f"Kind of the first traffic: {', '.join(KINDS)}. Chat, or code with --cold.")
    ] = None,
    after: Annotated[str, typer.Option("--to", help="Kind of the traffic after the shift.")] = "tables",
    first: Annotated[int | None, typer.Option("--first", min=1, help="Requests before the shift, or all with --cold: 150, 2000.")] = None,
    second: Annotated[int, typer.Option("--second", min=1, help="Requests after the shift.")] = 900,
    users: Annotated[int, typer.Option("--users", min=1, help="Users at once.")] = 8,
    think: Annotated[float, typer.Option("--think", min=0, help="Seconds between an answer and its user's next request.")] = 2.0,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="Of all requests.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Longest answer.")] = 64,
    lesson: Annotated[int, typer.Option("--lesson", min=20, help="Prompts of a kind to learn from beforehand.")] = 320,
    window: Annotated[int, typer.Option("--window", min=8, help="Requests that are averaged.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts, requests and random weights.")] = 1,
    url: Annotated[str, typer.Option("--url", help="Loopback address to start the service at.")] = "http://127.0.0.1:8124",
    out: Annotated[Path, typer.Option("--out", help="JSON; the PNG lies beside it.")] = Path("drift.json"),
) -> None:
    """Train beforehand, serve, drive, and judge."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the service ends with this process
    torch.set_num_threads(1)  # more wait for each other on cores that do something else besides
    kinds, counts = ((before or "code",), (first or 2000,)) if cold else ((before or "chat", after), (first or 150, second))
    plan = Plan(model, cold, kinds, counts, Habits(users, temperature, max_tokens, think), lesson, window, seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        speculators, learned = prepared(plan, Path(folder))
        said(begun, f"prepared: {learned}")
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(json.loads(json.dumps(fleet(model, speculators, users + 2, plan.refresh)))), encoding="utf-8")
        with serving(str(file), url):
            exchanges = asyncio.run(driven(url, wanted(plan, list(speculators)), plan.habits, lambda found: tick(begun, found)))
            changes = history(url)
        found = document(plan, learned, exchanges, changes, Replays(model, plan.habits, changes).answers)
        written(found | {"took_seconds": round(time.monotonic() - begun, 1)}, out, (Path(folder), ROOT))
        said(begun, json.dumps(found["outcome"]))


def written(found: dict[str, Any], out: Path, places: Sequence[Path] = ()) -> None:
    """The JSON and its picture. places: folders that names of files are told without."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2)
    for place in places:
        text = text.replace(f"{place}/", "")
    out.write_text(text + "\n", encoding="utf-8")
    draw(found, out.with_suffix(".png"))


def prepared(plan: Plan, folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Folders of the speculators by the name of the model they serve, and what was learned beforehand."""
    start, learned = untrained(plan.model, plan.seed), dict[str, Any]()
    places = {name: folder / f"speculator-{name}" for name in ((STATIC, REFRESHED) if plan.cold else (STATIC, REFRESHED, CEILING))}
    if not plan.cold:
        known, learned[STATIC] = taught([start], answers(plan, start, plan.kinds[0]))
        ceiling, learned[CEILING] = taught([start, known], answers(plan, known, plan.kinds[1]))
        ceiling.save_pretrained(places[CEILING])
        start = known
    for name in (STATIC, REFRESHED):
        start.save_pretrained(places[name])
    return places, learned


def answers(plan: Plan, speculator: MLPSpeculator, kind: str) -> ReplayBuffer:
    """What there is to learn from beforehand of a kind."""
    lesson = Lesson(prompts(kind, True, plan.lesson, plan.seed), plan.habits.temperature, plan.habits.max_tokens)
    return answered(plan.model, speculator, lesson)


def wanted(plan: Plan, models: Sequence[str]) -> list[Wanted]:
    """All requests of all phases; the ceiling answers only those of the last."""
    out = list[Wanted]()
    for phase, (kind, count) in enumerate(zip(plan.kinds, plan.requests, strict=True)):
        asked = [name for name in models if name != CEILING or phase == len(plan.kinds) - 1]
        out += [Wanted(phase, prompt, plan.seed + len(out) + i, asked) for i, prompt in enumerate(prompts(kind, False, count, plan.seed))]
    return out


def document(plan: Plan, learned: dict[str, Any], exchanges: Exchanges, changes: list[dict[str, Any]], replay: Replay) -> dict[str, Any]:
    """The result as JSON."""
    judged = promotions(exchanges, changes, 2 * plan.window, replay)
    reached = warmed(exchanges, plan.window) if plan.cold else recovery(exchanges, plan.window)
    settings = asdict(plan) | {"model": plan.model.name, "policy": POLICY, "refresh": plan.refresh, "canary": CANARY}
    return {
        "command": ["python", *sys.argv],
        "machine": machine(),
        "settings": settings,
        "learned_beforehand": learned,
        "outcome": reached | totals(exchanges, judged, changes),
        "course": course(exchanges, plan.window),
        "promoted_at": [sum(e.at < change["at"] for e in exchanges) for change in changes if change["action"] == "promote"],
        "history": changes,
    } | ({"target_tokens_per_step": COLD} if plan.cold else {})


def tick(begun: float, exchange: Exchange) -> None:
    if (exchange.place + 1) % 40 == 0:
        said(begun, f"{exchange.place + 1} requests, refreshed serves {exchange.answers[REFRESHED].version}")


def said(begun: float, text: str) -> None:
    print(f"{time.monotonic() - begun:6.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
