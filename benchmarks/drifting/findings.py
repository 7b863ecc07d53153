"""What a course of exchanges shows: tokens per step over requests, how much was recovered and when, and what each promotion did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.drifting.fleet import CEILING, REFRESHED, STATIC
from benchmarks.drifting.live import Answer, Exchange, Wanted

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles
LEAST = 8  # requests after a promotion, below which nothing is said of it
RECOVERED, COLD = 0.8, 1.6  # targets: share of the gain, tokens per step

Exchanges = Sequence[Exchange]
Replay = Callable[[str, Sequence[Wanted]], Sequence[Answer]]  # what a version makes of requests


@dataclass(frozen=True, slots=True)
class Promotion:
    """A version that went live. request: how many had been answered. before, after: what the version before and this one make of the
    `requests` that came next, in tokens per step. low, high: 95 % bootstrap interval of the difference, over those requests.
    """

    version: str
    request: int
    requests: int
    before: float
    after: float
    low: float
    high: float

    @property
    def lowered(self) -> bool:
        return self.after < self.before


def per_step(answers: Sequence[Answer]) -> float:
    """Tokens per step. As in the paper, the step that reads the prompt and its one token are not counted."""
    return sum(a.tokens - 1 for a in answers) / max(1, sum(a.steps - 1 for a in answers))


def of(exchanges: Exchanges, model: str) -> list[Answer]:
    """The answers of a model that did not fail."""
    found = (exchange.answers.get(model) for exchange in exchanges)
    return [answer for answer in found if answer is not None and not answer.failure]


def course(exchanges: Exchanges, window: int) -> list[dict[str, Any]]:
    """Tokens per step of every model in windows of requests, none across two phases; requests: at its beginning and end."""
    phases = sorted({exchange.wanted.phase for exchange in exchanges})
    out = list[dict[str, Any]]()
    for phase in phases:
        own = [exchange for exchange in exchanges if exchange.wanted.phase == phase]
        parts = [own[start : start + window] for start in range(0, len(own), window)]
        out += [windowed(part) for part in parts if len(part) > window // 2]
    return out


def windowed(part: Exchanges) -> dict[str, Any]:
    models = {STATIC, REFRESHED, CEILING} & part[-1].answers.keys()
    rates = {model: round(per_step(of(part, model)), 3) for model in sorted(models) if of(part, model)}
    return {"requests": [part[0].place, part[-1].place + 1], "phase": part[0].wanted.phase, "tokens_per_step": rates}


def recovery(exchanges: Exchanges, window: int, phase: int = 1) -> dict[str, Any]:
    """How far from the static speculator to the ceiling the refreshed one came after the shift.

    Recovered is the gain over static as a share of the ceiling's gain over it on the same requests: over the last third of the phase, and
    first in `reached`: requests after the shift at which it was RECOVERED or more over the latest `window` requests; None if never.
    """
    own = [exchange for exchange in exchanges if exchange.wanted.phase == phase]
    late = own[-(len(own) // 3) :]
    reached = first(own, window, lambda part: recovered(part) >= RECOVERED)
    rates = {model: round(per_step(of(late, model)), 3) for model in (STATIC, REFRESHED, CEILING)}
    share = recovered(late)
    whole = rates[REFRESHED] / rates[CEILING]
    return {"late": rates, "late_requests": len(late), "recovered": round(share, 3), "of_the_ceiling": round(whole, 3), "reached": reached}


def recovered(part: Exchanges) -> float:
    """Share of the ceiling's gain over static; 0 where there is nothing to gain."""
    static, refreshed, ceiling = (per_step(of(part, model)) for model in (STATIC, REFRESHED, CEILING))
    return (refreshed - static) / (ceiling - static) if ceiling > static else 0.0


def warmed(exchanges: Exchanges, window: int) -> dict[str, Any]:
    """From a cold start: requests until the latest `window` made COLD tokens per step, and what the last ones made."""
    reached = first(exchanges, window, lambda part: per_step(of(part, REFRESHED)) >= COLD)
    begun, late = (round(per_step(of(part, REFRESHED)), 3) for part in (exchanges[:window], exchanges[-window:]))
    return {"first": begun, "last": late, "reached": reached}


def first(exchanges: Exchanges, window: int, holds: Callable[[Exchanges], bool]) -> int | None:
    """Requests after which something holds of the latest `window` of them."""
    ends = range(window, len(exchanges) + 1)
    return next((end for end in ends if holds(exchanges[end - window : end])), None)


def promotions(exchanges: Exchanges, history: Sequence[Mapping[str, Any]], window: int, replay: Replay) -> list[Promotion]:
    """Every promotion that enough requests of the same phase came after."""
    made = [change for change in history if change["action"] == "promote"]
    return [found for change in made if (found := promoted(exchanges, change, window, replay)) is not None]


def promoted(exchanges: Exchanges, change: Mapping[str, Any], window: int, replay: Replay) -> Promotion | None:
    """One promotion: the next requests, at most `window`, drafted for by the version before and by this one."""
    at = sum(exchange.at < change["at"] for exchange in exchanges)
    later = [exchange.wanted for exchange in exchanges[at : at + window]]
    wanted = [one for one in later if one.phase == later[0].phase]
    if len(wanted) < LEAST:
        return None
    before, after = (replay(change[side], wanted) for side in ("from", "to"))
    low, high = interval(before, after)
    rates = (per_step(before), per_step(after), low, high)
    return Promotion(change["to"], at, len(wanted), *(round(rate, 3) for rate in rates))


def interval(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[float, float]:
    """Of what the second gains over the first, over requests drawn with replacement."""
    draws = np.random.default_rng(0).integers(0, len(before), (DRAWS, len(before)))
    gains = [per_step([after[i] for i in drawn]) - per_step([before[i] for i in drawn]) for drawn in draws]
    low, high = np.percentile(gains, INTERVAL)
    return float(low), float(high)


def totals(exchanges: Exchanges, found: Sequence[Promotion], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Failures, texts that differ between models, and promotions with those that lowered tokens per step."""
    failures = [answer.failure for exchange in exchanges for answer in exchange.answers.values() if answer.failure]
    actions = [change["action"] for change in history]
    return {
        "requests": len(exchanges),
        "failed": len(failures),
        "failures": sorted(set(failures))[:5],
        "other_texts": sum(len({answer.text for answer in exchange.answers.values() if not answer.failure}) > 1 for exchange in exchanges),
        "changes": {action: actions.count(action) for action in dict.fromkeys(actions)},
        "promotions": [asdict(promotion) | {"lowered": promotion.lowered} for promotion in found],
        "promotions_judged": len(found),
        "promotions_that_lowered": sum(promotion.lowered for promotion in found),
        "promotions_that_surely_lowered": sum(promotion.high < 0 for promotion in found),
    }
