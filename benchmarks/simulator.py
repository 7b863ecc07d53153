"""The default policy at scale, without the machines: `python benchmarks/simulator.py --out benchmarks/results/simulator.json`.

Simulates replicas of large models step by step around the service's own code: the pilot of every replica, the policy keeper that all of
a model's replicas report to, its estimates and its plans run as they do in service, on telemetry made here with noise and stalls in it.
What is simulated is the machine and the traffic: seconds of steps (measured by benchmarks/gpu.py where its results are there, else a
roofline; the output says which), requests that come as a day squeezed into seconds, with bursts, and how many tokens of each draft would be
kept, drawn in advance. Every request of every replica goes through the policy code; nothing is extrapolated.

Two questions are answered. Step by step: what every 16th step of the default policy would have come to under each fixed depth, and for an
oracle that knows every acceptance in advance, in the very same state; the first seconds, in which nothing is known yet, stand apart. And
from the outside: the same traffic of a part of the replicas (--panel) under every policy, as time per token. The oracle is no policy that
could be: it knows what luck will bring.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.simulation.costs import DEVICES, SHAPES  # noqa: E402
from benchmarks.simulation.fleet import PEAK, REPORT_S, Job, curves, rate, simulate  # noqa: E402
from benchmarks.simulation.picture import draw  # noqa: E402
from benchmarks.simulation.replica import NOISE, STALL, STALLS, Room  # noqa: E402
from benchmarks.simulation.traffic import CACHED, Day, mix  # noqa: E402
from benchmarks.sweep.arms import arms  # noqa: E402
from services.cli.bench import make_room  # noqa: E402
from services.cli.machine import machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FEW = 30  # steps looked at, below which a load says nothing
CPU = "cpu"

Result = dict[str, Any]


def main(
    models: Annotated[str, typer.Option("--models", help="Of the list, or demo models as measured on a CPU.")] = ",".join(SHAPES),
    device: Annotated[str, typer.Option("--device", help=f"Of the roofline: {', '.join(DEVICES)}.")] = "h200",
    requests: Annotated[int, typer.Option("--requests", min=100, help="Under the default policy, over all models, about.")] = 1_020_000,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Of each model.")] = 100,
    panel: Annotated[int, typer.Option("--panel", min=1, help="Of them, whose traffic all other policies get too.")] = 8,
    running: Annotated[int, typer.Option("--running", min=1, help="Most requests of a replica at once.")] = 128,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of everything.")] = 0,
    curves_in: Annotated[Path, typer.Option("--curves", help="Folder of measured curves.")] = RESULTS,
    out: Annotated[Path, typer.Option("--out", help="JSON.")] = Path("simulator.json"),
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG.", show_default="beside the JSON")] = None,
) -> None:
    """Simulate every model under every policy, and keep each result as soon as it is there."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes end with this one
    make_room(out)
    names, room = models.split(","), Room(running)
    wanted = [
        job
        for name in names
        for job in planned(name, device, curves_in, requests // len(names), replicas, min(panel, replicas), room, seed)
    ]
    settings = {"device": device, "replicas": replicas, "panel": panel, "seed": seed, "room": asdict(room), **assumptions(names)}
    found: list[Result] = []
    for result in finished(sorted(wanted, key=lambda job: -len(job.replicas)), jobs):
        found.append(result)
        order = {(job.model, job.arm): at for at, job in enumerate(wanted)}
        found.sort(key=lambda r: order[r["model"], r["arm"]])
        whole = {"command": ["python", *sys.argv], "machine": machine(), "settings": settings, "summary": summary(found), "results": found}
        out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(line(result), file=sys.stderr, flush=True)
    draw([r | {"alternatives": enough(r["alternatives"])} for r in found], plot or out.with_suffix(".png"))
    print(json.dumps(summary(found), indent=1), file=sys.stderr)


def planned(model: str, device: str, results: Path, requests: int, replicas: int, panel: int, room: Room, seed: int) -> list[Job]:
    """The default policy on all replicas of a model, and the others on a part of them."""
    where = device if model in SHAPES else CPU
    known = curves(model, where, results)
    day = requests / (replicas * rate(known, room, model) * Day.of(1.0, seed).mean)
    some = tuple(range(panel))
    policies: dict[str, dict[str, Any] | None] = {arm.name: dict(arm.policy) for arm in arms(range(1, known.depth + 1))}
    whole = Job(model, "goodput", policies.pop("goodput"), tuple(range(replicas)), day, where, results, seed, room, some, compare=True)
    return [
        whole,
        *(Job(model, arm, policy, some, day, where, results, seed, room) for arm, policy in (policies | {"oracle": None}).items()),
    ]


def finished(wanted: Sequence[Job], jobs: int) -> Iterator[Result]:
    """Results as they come."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(simulate, wanted)


def assumptions(models: Sequence[str]) -> dict[str, Any]:
    """What was not measured."""
    classes = {model: [asdict(c) | {"share": share} for c, share in mix(model).items()] for model in models}
    noise = {"of_step_seconds": NOISE, "stalls": STALLS, "stall": STALL}
    return {"traffic": classes, "cached_of_prompts": CACHED, "peak_of_capacity": PEAK, "report_seconds": REPORT_S, "noise": noise}


def summary(found: Sequence[Result]) -> dict[str, Any]:
    """How many requests went through the policy code, and where the default policy stands, by model."""
    through = [r for r in found if r["arm"] != "oracle"]
    return {
        "requests_through_policy_code": sum(r["requests"] for r in through),
        "of_them_under_goodput": sum(r["requests"] for r in through if r["arm"] == "goodput"),
        "steps_decided": sum(r["steps"] for r in through),
        "replicas": sum(r["replicas"] for r in found if r["arm"] == "goodput"),
        "by_model": {r["model"]: standing(r) for r in found if r["arm"] == "goodput"},
    }


def standing(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of each number of running requests: the loss against the best fixed depth, and against the oracle, step by step."""
    known = enough(result["alternatives"])
    return {
        "costs": result["costs"],
        "mean_regret": mean_regret(known),
        "mean_loss_beside_prompts": priced(result["alternatives_beside_prompts"], known),
        "mean_regret_while_new": mean_regret(result["alternatives_while_new"]),
        "mean_regret_against_oracle": mean_regret(known, "regret_against_oracle"),
        "keeper_share_of_a_core": result["keeper_share_of_a_core"],
        "deciding_us_of_a_step": result["deciding_us_of_a_step"],
        "by_running": {band: compared(rates) for band, rates in known.items()},
    }


def enough(alternatives: Mapping[str, Any]) -> dict[str, Any]:
    """Without the loads of too few steps."""
    return {band: rates for band, rates in alternatives.items() if rates["itself"]["steps"] >= FEW}


def mean_regret(alternatives: Mapping[str, Any], name: str = "regret") -> float | None:
    """Over all loads, weighted by the time that was spent at each; None where there was none."""
    seconds = {band: rates["itself"]["seconds"] for band, rates in alternatives.items()}
    losses = sum(compared(rates)[name] * seconds[band] for band, rates in alternatives.items())
    return round(losses / sum(seconds.values()), 4) if seconds else None


def priced(prompted: Mapping[str, Any], known: Mapping[str, Any]) -> float | None:
    """The seconds lost against the best fixed depth in steps that read prompts too, as a part of them; None where there were none.

    A prompt makes such a step slow whatever is drafted in it, so tokens per second of the step itself would reward drafting too much.
    What counts is the long run (Dinkelbach 1967): a token is worth the seconds that it takes in pure decoding at about that load.
    """
    worth = {int(band): max(found["tokens_per_second"] for found in fixed(rates).values()) for band, rates in known.items()}
    lost = total = 0.0
    for band, rates in prompted.items() if worth else ():
        rate = worth[max((b for b in worth if b <= int(band)), default=min(worth))]
        own, *others = (found["seconds"] * (1 - found["tokens_per_second"] / rate) for found in (rates["itself"], *fixed(rates).values()))
        lost, total = lost + own - min(others), total + rates["itself"]["seconds"]
    return round(lost / total, 4) if total else None


def fixed(rates: Mapping[str, Any]) -> dict[str, Any]:
    """Of a step's alternatives those of no drafting and of one depth."""
    return {arm: found for arm, found in rates.items() if arm not in ("itself", "oracle")}


def compared(rates: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The default policy among the fixed depths and the oracle, in the same states."""
    speed = {arm: found["tokens_per_second"] for arm, found in rates.items()}
    best = max(fixed(rates), key=lambda arm: speed[arm])
    return {
        "steps": rates["itself"]["steps"],
        "best": best,
        "regret": round(1 - speed["itself"] / speed[best], 4),
        "regret_against_oracle": round(1 - speed["itself"] / speed["oracle"], 4),
        "over_off": round(speed["itself"] / speed["off"], 3),
    }


def line(result: Mapping[str, Any]) -> str:
    counts = f"{result['requests']} requests, {result['steps']} steps"
    return f"{result['model']} {result['arm']}: {counts}, {result['token_ms']} ms a token, {result['took_seconds']} s"


if __name__ == "__main__":
    typer.run(main)
