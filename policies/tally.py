"""What became of drafted tokens: counted, and learned from by the request whose they were."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from policies.drafts import BINS, FLOORS
from policies.load import DEEP, LEVEL, RequestView
from policies.survival import DepthCounts

EVEN = 0.25  # p(1 - p) of an even chance
FADING = EVEN / 128  # of a shift with every test: after 128 that do not support it, it has faded
MOST_EVIDENCE = EVEN * 64  # so that a request whose text changes is followed

Tested = tuple[int, float, bool]  # a drafted token whose predecessor was kept: depth, confidence, kept


def fared(view: RequestView, nodes: Iterable[Tested], rates: Sequence[float], counts: DepthCounts, shrinkage: float) -> None:
    """Take the tested tokens of a draft into account.

    Its request learns by online logistic regression with a bias only, under a normal prior worth `shrinkage` tests. rates: the keep rates
    that were believed of this request, see `Knowledge.rates`. One function, since it runs for every draft of every step.
    """
    trials, survived, predicted = counts.trials, counts.survived, counts.predicted
    evidence, shift, prior = view.evidence, view.shift, EVEN * shrinkage
    for depth, confidence, kept in nodes:
        bin = bisect_right(FLOORS, confidence)
        expected = rates[(depth - 1) * BINS + bin]
        if depth >= len(trials):
            counts.reach(depth)
        trials[depth][bin] += 1
        survived[depth][bin] += kept
        predicted[bin] += expected
        evidence = min(evidence + expected * (1.0 - expected), MOST_EVIDENCE)
        shift += (kept - expected - shift * FADING) / (evidence + prior)
    view.evidence, view.shift = evidence, shift
    view.level = max(-DEEP, min(DEEP, round(shift / LEVEL)))
