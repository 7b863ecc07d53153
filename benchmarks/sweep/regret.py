"""How far a policy is behind the best fixed one, without mistaking luck for merit.

Rates are tokens per second by arm and round; all arms of a round ran one after the other on the same requests. Whoever is measured as
the best of many arms was also the luckiest, so the best one is chosen on one half of the rounds and compared on the other half, over all
ways to halve them, as in cross-fitting (Chernozhukov et al. 2018, doi:10.1111/ectj.12097). The naive number stands beside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

Rates = Mapping[str, Sequence[float]]
DRAWS = 4000
INTERVAL = (2.5, 97.5)  # percentiles
TARGET = 0.03


@dataclass(frozen=True, slots=True)
class Regret:
    """What a policy loses against the best fixed arm, as a fraction of the best's tokens per second; negative where it gains.

    best: the arm chosen in most halves; regret: cross-fitted; naive: against the arm of the highest mean over all rounds; low, high: 95 %
    bootstrap interval over rounds of the regret against `best`.
    """

    best: str
    regret: float
    naive: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Against the target: met, missed, or within the noise of being either."""
        if self.high <= TARGET:
            return "met"
        return "missed" if self.low > TARGET else "met within noise" if self.regret <= TARGET else "missed within noise"

    def record(self) -> dict[str, Any]:
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()} | {"verdict": self.verdict}


def regret(rates: Rates, policy: str, fixed: Sequence[str], seed: int = 0) -> Regret:
    """The regret of one arm against the best of the fixed ones that ran in every round. ValueError with fewer than two rounds."""
    own = np.log(np.asarray(rates[policy], dtype=float))
    if len(own) < 2:
        raise ValueError(f"rounds: {len(own)} is too few to choose the best arm on some and compare on others; at least 2 are needed")
    others = {name: np.log(np.asarray(rates[name], dtype=float)) for name in fixed if len(rates[name]) == len(own)}
    chosen, gaps = crossed(own, others)
    best = chosen.most_common(1)[0][0]
    luckiest = max(others, key=lambda name: float(others[name].mean()))
    low, high = interval(own - others[best], seed)
    return Regret(best, loss(float(np.mean(gaps))), loss(float((own - others[luckiest]).mean())), loss(high), loss(low))


def crossed(own: np.ndarray, others: Mapping[str, np.ndarray]) -> tuple[Counter[str], list[float]]:
    """How often each arm was the best of a half, and the gaps in log rate to it on the other half, over all halvings."""
    rounds = range(len(own))
    chosen, gaps = Counter[str](), []
    for half in combinations(rounds, len(own) // 2):
        for choosing in (list(half), [i for i in rounds if i not in half]):
            judging = [i for i in rounds if i not in choosing]
            means = {name: float(logs[choosing].mean()) for name, logs in others.items()}
            best = max(means, key=means.__getitem__)
            chosen[best] += 1
            gaps.append(float((own[judging] - others[best][judging]).mean()))
    return chosen, gaps


def interval(gaps: np.ndarray, seed: int) -> tuple[float, float]:
    """The percentiles of the mean gap over rounds drawn with replacement."""
    drawn = np.random.default_rng(seed).integers(0, len(gaps), (DRAWS, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(axis=1), INTERVAL)
    return float(low), float(high)


def loss(gap: float) -> float:
    """A gap in log rate as a lost fraction."""
    return float(1 - np.exp(gap))


def behind(rates: Rates, fixed: Sequence[str], slack: float) -> list[str]:
    """The fixed arms that lie more than `slack` below the one of the highest mean so far, by more than twice the gap's standard error.

    Only arms that ran in every round are looked at; at least three rounds are needed to say so of any.
    """
    rounds = max(len(rates[name]) for name in fixed)
    logs = {name: np.log(np.asarray(rates[name], dtype=float)) for name in fixed if len(rates[name]) == rounds}
    best = max(logs, key=lambda name: float(logs[name].mean()))
    return [name for name, own in logs.items() if rounds >= 3 and surely(own - logs[best], slack)]


def surely(gaps: np.ndarray, slack: float) -> bool:
    """Whether the mean of log gaps is a loss of more than `slack`, noise allowed for."""
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return loss(float(gaps.mean()) + 2 * error) > slack
