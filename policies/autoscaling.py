"""How many replicas a model needs: the slow reflex to load, after the depth of drafts, which is the fast one.

Replicas are added by need when drafting is off, or cannot help, and latency misses its target or too many seconds of work are queued; they
are taken away one by one when the others would carry the load with a margin, by what a replica did when it had too much; all are when
nobody asks and there may be none. Numbers that are old, missing or impossible never take a replica away, and one replica alone cannot talk
the others up: each counts as far as the median of all allows, and none asks for more than the requests that were really sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median_low

MOST = 1e12  # no number of a replica is larger
MARGIN = 0.7  # share of a target that the load on the remaining replicas may reach when one is taken away
DRAFTING = 0.2  # mean depth above which speculation counts as on
PAYS = 1.05  # tokens per request and step from which drafts pay
STRAINED = 1.5  # times its target from which the time per token is beyond what depth can mend
STEEPEST = 2  # times as many replicas at most, in one decision
REMEMBERED_S = 3600.0  # seconds after which what a replica can do has to be learned anew
OUTLIER = 8.0  # a replica's backlog counts within this factor of the median
CHOICES = 4  # times the longest text that one request may queue, for it may ask for several


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """The bounds and targets of one model.

    least, most: replicas; tpot, ttft: seconds per output token and to the first one; backlog: seconds of queued work per replica;
    idle: seconds without work after which a model of least 0 sleeps; stale: seconds after which unchanged numbers do not count;
    seats: requests that a replica decodes together; longest: tokens of the longest text.
    """

    least: int = 1
    most: int = 1
    tpot: float = 0.1
    ttft: float = 2.0
    backlog: float = 4.0
    idle: float = 600.0
    stale: float = 10.0
    seats: int = 16
    longest: int = 1 << 17

    def within(self, replicas: int) -> int:
        """That many, within the bounds."""
        return max(self.least, min(self.most, replicas))


@dataclass(frozen=True, slots=True)
class Vitals:
    """What one replica says of itself; 0 where there was nothing to measure.

    beat: seconds by its own clock when it measured; ready: 0 while it loads; running, waiting: requests; backlog: tokens of prompts not yet
    computed and of answers not yet begun; goodput: tokens computed per second of work; rate: per second, idle or not; depth: mean draft
    depth of a request's step; per_step: tokens that such a step emitted; tpot, ttft: seconds per output token and to the first one; idle:
    seconds since it last had work; stalled: seconds since its last step, if it has work.
    """

    beat: float
    ready: float
    running: float
    waiting: float
    backlog: float
    goodput: float
    rate: float
    depth: float
    per_step: float
    tpot: float
    ttft: float
    idle: float
    stalled: float

    @classmethod
    def of(cls, numbers: Mapping[str, object]) -> Vitals | None:
        """What the numbers say; None if one is missing or cannot be true (not finite, negative, no number)."""
        values = [numbers.get(field.name) for field in fields(cls)]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in values):
            return None
        return cls(*(min(float(v), MOST) for v in values if isinstance(v, (int, float))))

    def numbers(self) -> dict[str, float]:
        """Itself as plain numbers."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Observation:
    """A model at one moment.

    target: replicas it is to have; replicas: names of those that run; requests: sent and not answered, as the senders count; queued: of
    these, what no replica has taken; said: the last numbers of each replica, in the form of `Vitals`; now: seconds by the observer's clock.
    """

    target: int
    replicas: tuple[str, ...]
    requests: float
    queued: float
    said: Mapping[str, Mapping[str, object]]
    now: float


@dataclass(frozen=True, slots=True)
class Heard:
    """What was last heard of a replica. at: when its clock was last seen to move, by the observer's clock."""

    vitals: Vitals
    at: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known between two decisions. heard: of each running replica; capacity: tokens per second that one did when it had too much, 0
    while that is not known; learned: when it was seen."""

    heard: Mapping[str, Heard] = field(default_factory=dict)
    capacity: float = 0.0
    learned: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas, and why."""

    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Strain:
    """The replicas that serve, as one. count: how many; sent: requests that are not answered, as their senders say; requests: that run or
    wait, as the replicas or their senders say, whichever is more; waiting: of those sent, that wait; tokens: queued; rate: tokens per
    second of all; goodput, depth, per_step, tpot, ttft: medians."""

    count: int
    sent: float
    requests: float
    waiting: float
    tokens: float
    rate: float
    goodput: float
    depth: float
    per_step: float
    tpot: float
    ttft: float

    @property
    def drafting(self) -> bool:
        """Whether speculation is on and pays."""
        return self.depth > DRAFTING and self.per_step > PAYS

    @property
    def crowded(self) -> bool:
        """Whether requests share a replica; one that has it for itself cannot be made faster by another replica."""
        return self.sent > self.count

    @property
    def queued(self) -> bool:
        """Whether first tokens still have to wait for others."""
        return self.crowded and self.waiting + self.tokens > 0

    @property
    def seconds(self) -> float:
        """Queued work of each replica."""
        return self.tokens / (self.goodput * self.count) if self.goodput else 0.0

    def late_first(self, rule: ScalingRule) -> bool:
        """Whether first tokens are late and still will be."""
        return self.ttft > rule.ttft and self.queued

    def late_next(self, rule: ScalingRule) -> bool:
        """Whether other tokens are late."""
        return self.tpot > rule.tpot and self.crowded


def listen(heard: Mapping[str, Heard], seen: Observation) -> dict[str, Heard]:
    """What is known of the running replicas after this observation. What cannot be true, or has an unmoved `beat`, is no news."""
    news: dict[str, Heard] = {}
    for name in seen.replicas:
        before, vitals = heard.get(name), Vitals.of(seen.said.get(name, {}))
        if vitals is not None and (before is None or vitals.beat != before.vitals.beat):
            news[name] = Heard(vitals, seen.now)
        elif before is not None:
            news[name] = before
    return news


def decide(rule: ScalingRule, seen: Observation, memory: Memory) -> tuple[ScalingDecision, Memory]:
    """How many replicas the model is to have, and what to remember for the next time."""
    heard = listen(memory.heard, seen)
    known = [heard[name] for name in seen.replicas if name in heard]
    fresh = [h.vitals for h in known if seen.now - h.at <= rule.stale and h.vitals.stalled <= rule.stale]
    strain = strained(rule, seen, [v for v in fresh if v.ready])
    memory = learn(rule, strain, replace(memory, heard=heard), seen.now)
    return judged(rule, seen, fresh, strain, memory), memory


def learn(rule: ScalingRule, strain: Strain, memory: Memory, now: float) -> Memory:
    """What a replica can do shows when it has too much, and whenever it does more."""
    if now - memory.learned > REMEMBERED_S:
        memory = replace(memory, capacity=0.0, learned=now)
    full = strain.count > 0 and (strain.waiting > strain.count or strain.late_first(rule) or strain.late_next(rule))
    if strain.goodput and (full or strain.goodput > memory.capacity > 0):
        return replace(memory, capacity=strain.goodput, learned=now)
    return memory


def judged(rule: ScalingRule, seen: Observation, fresh: Sequence[Vitals], strain: Strain, memory: Memory) -> ScalingDecision:
    """The decision on what the replicas say that are believed."""
    target = rule.within(seen.target)
    if not seen.replicas:
        return resting(rule, seen, target)
    if not fresh:
        return ScalingDecision(target, f"none of {len(seen.replicas)} replicas has sent believable news for {rule.stale:g} s")
    if not strain.count:
        return ScalingDecision(target, "its replicas are loading")
    more = growth(rule, strain, target)
    if more is not None and more.replicas > target:
        return more
    if strain.count < len(seen.replicas):
        return ScalingDecision(target, f"{strain.count} of {len(seen.replicas)} replicas serve and send news, so none is taken away")
    asleep = all(v.idle >= rule.idle for v in fresh)
    return more or shrinkage(rule, strain, memory.capacity, asleep, target) or ScalingDecision(target, content(rule, strain))


def resting(rule: ScalingRule, seen: Observation, target: int) -> ScalingDecision:
    """No replica runs: one is started when somebody asks."""
    if target == 0 and max(real(seen.requests), real(seen.queued)) > 0:
        return ScalingDecision(rule.within(1), "asked for while asleep")
    return ScalingDecision(target, "asleep" if target == 0 else "no replica runs yet")


def strained(rule: ScalingRule, seen: Observation, serving: Sequence[Vitals]) -> Strain:
    """The replicas that serve as one, none of them believed alone."""
    count, sent = len(serving), max(real(seen.requests), real(seen.queued))
    goodput = middle([v.goodput for v in serving])
    tokens = sum(agreed([v.backlog for v in serving], goodput * rule.backlog))
    tokens = min(tokens, sent * rule.longest * CHOICES)
    waiting = min(sum(agreed([v.waiting for v in serving], rule.seats)) + real(seen.queued), sent)
    running = sum(min(v.running, rule.seats) for v in serving)
    return Strain(
        count=count,
        sent=sent,
        requests=max(running + waiting, sent),
        waiting=waiting,
        tokens=tokens,
        rate=sum(agreed([v.rate for v in serving], goodput)),
        goodput=goodput,
        depth=middle([v.depth for v in serving]),
        per_step=middle([v.per_step for v in serving]),
        tpot=middle([v.tpot for v in serving]),
        ttft=middle([v.ttft for v in serving]),
    )


def growth(rule: ScalingRule, strain: Strain, target: int) -> ScalingDecision | None:
    """As many more replicas as missed targets and queued work ask for, at most twice as many, and not more than there may be; None where
    they ask for none."""
    if left_to_depth(rule, strain):
        return None
    late_first, late_next = strain.late_first(rule), strain.late_next(rule)
    needs = [
        (strain.seconds / rule.backlog * strain.crowded, f"{strain.seconds:.1f} s of work are queued, target {rule.backlog:g} s"),
        (strain.ttft / rule.ttft * late_first, f"{strain.ttft:.2f} s to the first token, target {rule.ttft:g} s"),
        (strain.tpot / rule.tpot * late_next, f"{strain.tpot:.3f} s per token, target {rule.tpot:g} s"),
    ]
    worst, reason = max(needs)
    if worst <= 1:
        return None
    wanted = math.ceil(strain.count * min(worst, STEEPEST))
    how = "drafting is off" if not strain.drafting else f"depth {strain.depth:.1f} cannot help"
    return ScalingDecision(max(target, rule.within(wanted)), f"{reason}; {how}")


def left_to_depth(rule: ScalingRule, strain: Strain) -> bool:
    """Whether drafts still pay, and first tokens are not late nor others by more than depth can mend."""
    late_next = strain.late_next(rule) and strain.tpot > STRAINED * rule.tpot
    return strain.drafting and not strain.late_first(rule) and not late_next


def content(rule: ScalingRule, strain: Strain) -> str:
    """Why the replicas that there are stay as many."""
    if not left_to_depth(rule, strain):
        return "latency and queued work are within their targets"
    held = "is left to it" if strain.late_next(rule) else "holds"
    return f"drafting to depth {strain.depth:.1f} still pays, and latency {held}"


def shrinkage(rule: ScalingRule, strain: Strain, capacity: float, asleep: bool, target: int) -> ScalingDecision | None:
    """One replica less if the others would do, none if nobody has asked for long (`asleep`); None if all are needed."""
    idle = strain.requests < 0.5 and strain.waiting + strain.tokens == 0
    if target == 1 and rule.least == 0:
        return ScalingDecision(0, f"nobody asked for {rule.idle:g} s") if idle and asleep else None
    left = target - 1
    if left < max(rule.least, 1):
        return None
    share = strain.count / left
    roomy = strain.requests <= MARGIN * rule.seats * left and strain.seconds * share <= MARGIN * rule.backlog
    prompt = not strain.queued or strain.ttft * share <= MARGIN * rule.ttft
    quick = prompt and (strain.requests <= left or strain.tpot * share <= MARGIN * rule.tpot)
    strong = capacity == 0 or strain.rate <= MARGIN * capacity * left
    return ScalingDecision(left, "idle" if idle else f"{left} would carry the load") if roomy and quick and strong else None


def agreed(values: Sequence[float], floor: float) -> list[float]:
    """The values, from three on each within a factor of their median; what is above that counts as the floor if the floor is more."""
    if len(values) < 3:
        return list(values)
    centre = median_low(values)
    low, high = centre / OUTLIER, max(centre * OUTLIER, floor)
    return [max(low, min(high, v)) for v in values]


def middle(values: Sequence[float]) -> float:
    """The lower median of what was measured; 0 if nothing was."""
    measured = [v for v in values if v > 0]
    return median_low(measured) if measured else 0.0


def real(count: float) -> float:
    """A count; 0 for what cannot be one."""
    return min(count, MOST) if math.isfinite(count) and count > 0 else 0.0
