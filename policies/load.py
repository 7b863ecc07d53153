"""What a policy sees of the present: the load of a replica, the requests that may draft, the drafter's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from policies.decision import OFF, Decision

Mode = Literal["auto", "off", "fixed"]
MOST_COUNTS = 256  # numbers that a load may hold
LEVEL, DEEP = 0.5, 4  # steps of a request's shift, and how many there are in each direction


@dataclass(frozen=True, slots=True)
class Load:
    """One replica now. running: requests that draw a token in the step; waiting: queued; context: cached tokens they read; free_slots: KV
    slots left; prompt: rows of prompts in the step; row_counts: numbers of rows that a forward without prompts is computed for, rising, to
    which others are rounded up; beyond the last, and where there is none, as many as there are.
    """

    running: int = 0
    waiting: int = 0
    context: int = 0
    free_slots: int = 1 << 30
    prompt: int = 0
    row_counts: tuple[int, ...] = ()

    def sane(self) -> bool:
        """True if every field is a finite, non-negative count of a believable size."""
        counts = (self.running, self.waiting, self.context, self.free_slots, self.prompt, *self.row_counts)
        hashable = isinstance(self.row_counts, tuple)
        return hashable and len(counts) <= MOST_COUNTS and all(isinstance(n, int) and 0 <= n <= 1 << 40 for n in counts)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the drafter can do at most: tokens in a path, candidate paths."""

    max_depth: int = 8
    max_width: int = 8


@dataclass(slots=True)
class RequestView:
    """One request that could draft in this step, and what its own drafts taught.

    max_depth, width: its own upper bounds, None when it states none. remaining: tokens it may still emit. kind: the class of requests that
    it shares keep rates with. priority: 0 interactive, 1 normal, 2 batch. shift: added to the log-odds of the keep rates; evidence: how
    much it rests on, in units of p(1 - p); level: the shift in whole steps of LEVEL, between -DEEP and DEEP.
    """

    request_id: str
    mode: Mode = "auto"
    max_depth: int | None = None
    width: int | None = None
    remaining: int = 1 << 20
    kind: str = ""
    priority: int = 1
    shift: float = 0.0
    evidence: float = 0.0
    level: int = 0


def deepest(request: RequestView, limits: Limits) -> int:
    """The most tokens this request may draft in a path, whatever a policy wishes; fewer than it may still emit."""
    if request.mode == "off" or request.width == 0 or limits.max_width < 1:
        return 0
    own = limits.max_depth if request.max_depth is None else request.max_depth
    return max(0, min(own, limits.max_depth, request.remaining - 1))


def widest(request: RequestView, limits: Limits) -> int:
    """The most candidate paths this request may draft."""
    return limits.max_width if request.width is None else min(request.width, limits.max_width)


def settled(request: RequestView, limits: Limits, width: int) -> Decision:
    """What a request in mode `fixed` gets under any policy but off: its depth, and its own width or else that of the policy."""
    wish = Decision(deepest(request, limits), width if request.width is None else request.width)
    return clip(wish, request, limits)


def clip(wish: Decision, request: RequestView, limits: Limits) -> Decision:
    """The wish within the request's bounds."""
    if wish.depth <= 0:
        return OFF
    depth, width = deepest(request, limits), widest(request, limits)
    if 0 < wish.depth <= depth and 0 < wish.width <= width:
        return wish
    depth, width = min(wish.depth, depth), min(wish.width, width)
    return Decision(depth, width) if depth > 0 and width > 0 else OFF


def running(load: Load, requests: Sequence[RequestView]) -> int:
    """Requests that draw a token in a step, 1 at least."""
    return max(load.running, len(requests), 1)
