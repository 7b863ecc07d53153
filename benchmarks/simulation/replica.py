"""One simulated replica: continuous batching with chunked prompts, step by step, on a clock of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.simulation.costs import Costs
from benchmarks.simulation.flyers import Drafts, Flyer, Step, Worth, flat, foreseen
from benchmarks.simulation.traffic import Text
from engine.engine import Load, StepReport, Verified

NOISE = 0.03  # standard deviation of a step's log seconds
STALLS, STALL = 0.002, 5.0  # share of steps that something else delays, and how much longer they take
LOOKED = 16  # steps from one at which the alternatives are worked out to the next
NEW = 4.0  # seconds of the fleet's life whose steps are told apart: nothing is known in the first of them

Sums = dict[int, dict[str, list[float]]]  # by running requests, by arm: tokens, seconds, steps


@dataclass(slots=True)
class Findings:
    """What came of some replicas' traffic.

    done, of every request: load at its arrival, seconds per token after the first, seconds in all, seconds to the first token.
    own: what steps came to; alternatives, prompted, early: what they would have come to: of pure decoding, beside prompts, and of
    either while the fleet was new.
    """

    steps: int = 0
    tokens: int = 0
    busy: float = 0.0
    drafted: int = 0
    done: list[tuple[float, float, float, float]] = field(default_factory=list)
    own: Sums = field(default_factory=dict)
    alternatives: Sums = field(default_factory=dict)
    early: Sums = field(default_factory=dict)
    prompted: Sums = field(default_factory=dict)

    def join(self, other: Findings) -> None:
        """Add another replica's."""
        for name in ("steps", "tokens", "busy", "drafted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.done += other.done
        for name in ("own", "alternatives", "early", "prompted"):
            for band, arms in getattr(other, name).items():
                for arm, (tokens, seconds, steps) in arms.items():
                    note(getattr(self, name), band, arm, tokens, seconds, steps)


def note(sums: Sums, band: int, arm: str, tokens: float, seconds: float, steps: float = 1) -> None:
    found = sums.setdefault(band, {}).setdefault(arm, [0.0, 0.0, 0.0])
    found[0] += tokens
    found[1] += seconds
    found[2] += steps


def band(running: int) -> int:
    """The power of two at or below."""
    return 1 << (running.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Room:
    """Sizes of a replica's engine. chunk: prompt tokens of a step."""

    running: int = 128
    chunk: int = 512


class Replica:
    """A queue, running requests, and a clock that only steps move."""

    def __init__(self, texts: Iterator[Text], costs: Costs, flyer: Flyer, room: Room, seed: Sequence[int], compare: bool = False) -> None:
        self.texts, self.costs, self.flyer, self.room, self.compare = texts, costs, flyer, room, compare
        self.random = np.random.default_rng(list(seed))
        self.next = next(texts, None)
        self.waiting, self.running = deque[Text](), list[Text]()
        self.now, self.context = 0.0, 0
        self.found = Findings()

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def left(self) -> int:
        """Requests that are not answered, of those that have come."""
        return len(self.running) + len(self.waiting)

    @property
    def over(self) -> bool:
        """Whether all that ever came is answered."""
        return self.idle and self.next is None

    def until(self, end: float) -> None:
        """Step until the clock has passed that time, or nothing is left to do before it."""
        while self.now < end:
            self.admit()
            if self.running:
                self.step()
            else:
                self.now = end if self.next is None else min(max(self.now, self.next.arrival), end)

    def admit(self) -> None:
        while self.next is not None and self.next.arrival <= self.now:
            self.waiting.append(self.next)
            self.next = next(self.texts, None)
        while self.waiting and len(self.running) < self.room.running and self.fits(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def fits(self, text: Text) -> bool:
        """Whether the whole request will fit in what the others have left now."""
        return not self.running or self.context + text.prompt + text.answer <= self.costs.slots

    def step(self) -> None:
        """One step of the engine."""
        decoding = [t for t in self.running if not t.unread]
        reading = self.read()
        ready = [t for t in reading if not t.unread]
        free = max(0, self.costs.slots - self.context)
        drawing = len(decoding) + len(ready)
        prompt = len(decoding) + sum(reading.values()) - drawing
        load = Load(len(self.running), len(self.waiting), self.context, free, drawing, prompt)
        step = Step(load, len(decoding) + len(reading), decoding, sum(reading.values()), len(ready))
        drafts = self.flyer.drafts(step) if decoding else Drafts(())
        forward, drafting = self.seconds(step, drafts)
        if self.compare and self.found.steps % LOOKED == 0 and decoding:
            self.look(step, drafts, forward + drafting)
        noise = float(np.exp(NOISE * self.random.standard_normal())) * (STALL if self.random.random() < STALLS else 1.0)
        self.now += (forward + drafting) * noise
        verified, emitted = self.commit(decoding, drafts.nodes, ready)
        rows = step.base + sum(drafts.nodes)
        report = StepReport(
            (), load, tuple(verified), step.requests, rows, step.read, load.context, emitted, (forward + drafting) * noise, drafting * noise
        )
        self.count(step, drafts, emitted, forward + drafting)
        self.flyer.observe(report)

    def read(self) -> dict[Text, int]:
        """Prompts, first come first read: how many tokens of each are in this step."""
        left, found = self.room.chunk, dict[Text, int]()
        for text in self.running:
            if text.unread and left:
                found[text] = min(text.unread, left)
                left -= found[text]
                text.unread -= found[text]
        return found

    def seconds(self, step: Step, drafts: Drafts) -> tuple[float, float]:
        """Expected, of the forward and of drafting."""
        forward = self.costs.forward(step.requests, np.array(step.base + sum(drafts.nodes)), step.load.context)
        return float(forward), float(self.costs.draft(np.array(drafts.drafting), drafts.depth)) if drafts.drafting else 0.0

    def commit(self, decoding: Sequence[Text], nodes: Sequence[int], ready: Sequence[Text]) -> tuple[list[Verified], int]:
        """Emit what was kept and let go of those that are done. The context grows by what was emitted and by prompts read through."""
        verified, emitted, ended = list[Verified](), len(ready), False
        for text in ready:
            text.at, text.first = 1, self.now
            self.context += text.prompt + 1
            ended |= text.at >= text.answer
        for text, drawn in zip(decoding, nodes, strict=True):
            kept = min(text.kept[text.at], drawn)
            got = min(kept + 1, text.remaining)
            if drawn:
                verified.append(tested(text, drawn, kept, got == text.remaining))
            text.at += got
            emitted += got
            self.context += got
            ended |= text.at >= text.answer
        if ended:
            self.retire()
        return verified, emitted

    def retire(self) -> None:
        for text in [t for t in self.running if t.at >= t.answer]:
            self.context -= text.prompt + text.at
            gap = (self.now - text.first) / max(text.answer - 1, 1)
            self.found.done.append((text.load, gap, self.now - text.arrival, text.first - text.arrival))
        self.running = [t for t in self.running if t.at < t.answer]

    def count(self, step: Step, drafts: Drafts, emitted: int, seconds: float) -> None:
        found = self.found
        found.steps, found.tokens, found.busy = found.steps + 1, found.tokens + emitted, found.busy + seconds
        found.drafted += sum(drafts.nodes)
        note(found.own, band(step.load.running), "itself", emitted, seconds)

    def look(self, step: Step, drafts: Drafts, seconds: float) -> None:
        """What this very step would have come to under every fixed depth, and with foresight. All seconds without their noise."""
        kept = sum(min(t.kept[t.at], n) for t, n in zip(step.decoding, drafts.nodes, strict=True))
        worths = {f"fixed{depth}" if depth else "off": flat(self.costs, step, depth) for depth in range(self.costs.depth + 1)}
        worths |= {"itself": Worth(step.plain + kept, seconds), "oracle": foreseen(self.costs, step)[0]}
        for arm, worth in worths.items():
            note(self.sheet(step), band(step.load.running), arm, worth.tokens, worth.seconds)

    def sheet(self, step: Step) -> Sums:
        """Where a step's alternatives are noted."""
        if self.now < NEW:
            return self.found.early
        return self.found.prompted if step.read else self.found.alternatives


def tested(text: Text, drawn: int, kept: int, ended: bool) -> Verified:
    """What the engine says of a draft: the nodes whose predecessor was kept, or the kept ones alone where the text ended."""
    sure = text.sure[text.at]
    last = kept if ended else min(kept + 1, drawn)
    return Verified(text.request.id, drawn, kept, tuple((d, sure[d - 1], d <= kept) for d in range(1, last + 1)))
