"""What a model's trainer remembers: recent traces, a uniform sample of older ones, and those held out, within a budget of bytes.

Domains (a request's tag) are kept apart. All is decided by hashes of seed and request, so there is no generator to save: who is held out,
who stays, and what a step samples are the same after a crash, in whatever order traces come in again.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from bisect import insort
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import BinaryIO, NamedTuple

from drafters.choices import requests
from drafters.durable import replacing
from drafters.traces import InvalidTrace, Trace

ROOM = 1.2  # more than what is wanted on average: which requests judge is chance
SIZE = struct.Struct("<Q")  # before every record of a saved buffer


@dataclass(frozen=True, slots=True)
class BufferSettings:
    """How much is remembered. Raises ValueError for shares that leave no room.

    budget: bytes of tensors in all domains together, an equal part for each. held_out: share of requests, and of the budget, that no
    training ever sees. recent: share of what is left that the latest traces get; older ones are sampled into the rest. tags: those
    that are domains of their own; traces of all others, and of none, are the domain "".
    """

    budget: int = 256 * 2**20
    held_out: float = 0.2
    recent: float = 0.5
    tags: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget <= 0:
            raise ValueError(f"budget must be positive, got {self.budget}")
        if not (0 < self.held_out < 1 and 0 <= self.recent <= 1):
            raise ValueError(f"held_out must be between 0 and 1, and recent 0 to 1, got {self.held_out} and {self.recent}")


@dataclass(slots=True)
class Counts:
    """What came in and what became of it. seen: traces of a domain; dropped: of them those that are kept no more, whether for want of
    room or because they were to be forgotten; tokens: answer tokens of all that were seen."""

    seen: int = 0
    tokens: int = 0
    dropped: int = 0


class Rooms(NamedTuple):
    """Bytes of each part of a domain."""

    recent: int
    older: int
    held: int


class Recent:
    """The latest traces that fit, oldest first. crowded: some did not since it was made, or since some were forgotten."""

    def __init__(self) -> None:
        self.traces: deque[Trace] = deque()
        self.nbytes = 0
        self.crowded = False

    def add(self, trace: Trace) -> None:
        self.traces.append(trace)
        self.nbytes += trace.nbytes

    def shrink(self, room: int) -> Iterator[Trace]:
        """Give up the oldest until `room` bytes hold the rest."""
        while self.nbytes > room:
            trace = self.traces.popleft()
            self.nbytes -= trace.nbytes
            self.crowded = True
            yield trace

    def forget(self, unwanted: Callable[[Trace], bool]) -> int:
        """Give up those that are unwanted; how many."""
        before = len(self.traces)
        self.traces = deque(trace for trace in self.traces if not unwanted(trace))
        self.nbytes = sum(trace.nbytes for trace in self.traces)
        self.crowded = self.crowded and before == len(self.traces)
        return before - len(self.traces)


class Reservoir:
    """A uniform sample of all traces ever offered, however many those are (as Vitter's algorithm R, 1985, keeps one).

    Each has a random key; those above a threshold stay, and the threshold rises to make room. Whether one stays so depends on its key
    and not on its length, which replacing as many records as fit would let it.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[float, str, Trace]] = []  # ascending by key
        self.threshold = 0.0
        self.nbytes = 0

    def offer(self, key: float, trace: Trace) -> bool:
        """Take a trace in, unless its key is too low."""
        if key <= self.threshold:
            return False
        insort(self.entries, (key, trace.request, trace), key=lambda entry: entry[:2])
        self.nbytes += trace.nbytes
        return True

    def shrink(self, room: int) -> Iterator[Trace]:
        """Give up those with the lowest keys until `room` bytes hold the rest."""
        while self.nbytes > room:
            self.threshold, _, trace = self.entries.pop(0)
            self.nbytes -= trace.nbytes
            yield trace

    def forget(self, unwanted: Callable[[Trace], bool]) -> int:
        """Give up those that are unwanted; how many. The rest is a uniform sample of the others, and after all are gone it begins anew."""
        before = len(self.entries)
        self.entries = [entry for entry in self.entries if not unwanted(entry[2])]
        self.nbytes = sum(trace.nbytes for _, _, trace in self.entries)
        self.threshold = self.threshold if self.entries else 0.0
        return before - len(self.entries)


@dataclass(slots=True)
class Domain:
    """One domain's traces."""

    recent: Recent = field(default_factory=Recent)
    older: Reservoir = field(default_factory=Reservoir)
    held: Recent = field(default_factory=Recent)
    counts: Counts = field(default_factory=Counts)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.recent.nbytes + self.older.nbytes + self.held.nbytes


class ReplayBuffer:
    """Traces of one model, checked as they come in."""

    def __init__(self, model: str, vocab_size: int, emb_dim: int, settings: BufferSettings | None = None) -> None:
        """vocab_size, emb_dim: the base's, which every trace must fit."""
        self.model, self.vocab_size, self.emb_dim = model, vocab_size, emb_dim
        self.settings = settings or BufferSettings()
        self.domains: dict[str, Domain] = {}

    def add(self, trace: Trace) -> None:
        """Remember a trace, dropping older ones for it. Raises InvalidTrace for another model's, or one that cannot be learned from."""
        if trace.model != self.model:
            raise InvalidTrace(f"{trace.request}: model is {trace.model!r}, expected {self.model!r}")
        trace.check(self.vocab_size, self.emb_dim)
        domain, held_out = self.count(trace.tag, 1, len(trace)), self.is_held_out(trace.asked)
        rooms = self.rooms()
        if trace.nbytes > (rooms.held if held_out else rooms.recent or rooms.older):  # for which all others would have to go, and it too
            domain.counts.dropped += 1
            return
        (domain.held if held_out else domain.recent).add(trace)
        for other in self.domains.values():
            self.trim(other)

    def domain_of(self, tag: str) -> str:
        """The domain that traces with a tag are kept in."""
        return tag if tag in self.settings.tags else ""

    def domain(self, tag: str) -> Domain:
        """What is kept of them, made when it is first needed."""
        return self.domains.setdefault(self.domain_of(tag), Domain())

    def trim(self, domain: Domain) -> None:
        """Bring a domain down to its share of the budget. What is no longer recent may stay in the sample of older ones."""
        rooms = self.rooms()
        domain.counts.dropped += sum(1 for _ in domain.held.shrink(rooms.held))
        for trace in domain.recent.shrink(rooms.recent):
            domain.counts.dropped += not domain.older.offer(self.key(trace), trace)
        domain.counts.dropped += sum(1 for _ in domain.older.shrink(rooms.older))

    def rooms(self) -> Rooms:
        """Of each domain's parts, as many as there are now."""
        share = self.settings.budget // len(self.domains)
        held = int(share * self.settings.held_out)
        recent = int((share - held) * self.settings.recent)
        return Rooms(recent, share - held - recent, held)

    def forget(self, unwanted: Callable[[Trace], bool]) -> dict[str, int]:
        """Give up all traces that are unwanted, whatever they are kept for; how many of each domain. What `save` wrote before still has
        them."""
        gone: dict[str, int] = {}
        for tag, domain in self.domains.items():
            gone[tag] = sum(part.forget(unwanted) for part in (domain.recent, domain.older, domain.held))
            domain.counts.dropped += gone[tag]
        return gone

    def is_held_out(self, request: str) -> bool:
        """Whether a request is kept from training: whole requests, with all their choices, by their id alone."""
        return chance(f"held out {self.settings.seed}", request) < self.settings.held_out

    def held_out(self, tag: str) -> tuple[Trace, ...]:
        """A domain's traces that training never sees, oldest first."""
        return tuple(self.domains[tag].held.traces) if tag in self.domains else ()

    def choosing(self, tag: str) -> tuple[Trace, ...]:
        """The half of the held-out traces by which a trainer chooses among its own copies, as far as they tell speculators apart."""
        return tuple(trace for trace in self.held_out(tag) if tells(trace) and not self.is_judged(trace.asked))

    def judging(self, tag: str) -> tuple[Trace, ...]:
        """Those of the other half, on which what was chosen is compared: nothing that led to it was measured here."""
        return tuple(trace for trace in self.held_out(tag) if tells(trace) and self.is_judged(trace.asked))

    def crowded(self, tag: str) -> bool:
        """Whether held-out traces of a domain had to go for want of room."""
        return self.domains.get(tag, Domain()).held.crowded

    def budget_for(self, tag: str, judging: int) -> int:
        """About the budget, in bytes, that leaves a domain room for so many requests to judge by, with as many tokens as those that it has
        now; 0 if it has none."""
        held = self.domains.get(tag, Domain()).held
        size = held.nbytes / max(1, requests(trace.request for trace in held.traces))
        return math.ceil(ROOM * 2 * judging * size / self.settings.held_out * len(self.domains))

    def is_judged(self, request: str) -> bool:
        return chance(f"judged {self.settings.seed}", request) < 0.5

    def training(self, tag: str) -> tuple[Trace, ...]:
        """All of a domain's traces to learn from, the older ones first."""
        domain = self.domains.get(tag, Domain())
        return (*(trace for _, _, trace in domain.older.entries), *domain.recent.traces)

    def latest(self, tag: str) -> Iterator[Trace]:
        """A domain's recent traces to learn from, the latest first."""
        return reversed(self.domains.get(tag, Domain()).recent.traces)

    def sample(self, tag: str, count: int, recent: float, step: int) -> list[Trace]:
        """`count` traces to learn from in a step, with replacement, longer ones more often. A function of seed, tag, step and contents.

        recent: share of them from the recent part; whichever part is empty leaves all to the other. Raises ValueError if both are.
        """
        domain = self.domains.get(tag, Domain())
        parts = (list(domain.recent.traces), [trace for _, _, trace in domain.older.entries])
        if not any(parts):
            raise ValueError(f"there is nothing to learn from in domain {tag!r} of {self.model}")
        random = Random(f"{self.settings.seed} {tag} {step}")
        latest = sum(random.random() < recent for _ in range(count)) if all(parts) else count * bool(parts[0])
        return [trace for part, n in zip(parts, (latest, count - latest), strict=True) if n for trace in chosen(part, n, random)]

    def counts(self, tag: str) -> Counts:
        return self.domains.get(tag, Domain()).counts

    def size(self, tag: str) -> int:
        """Bytes of a domain's tensors."""
        return self.domains.get(tag, Domain()).nbytes

    def save(self, file: Path) -> None:
        """Write everything in place of what the file held. Raises OSError, leaving the file as it was."""
        for _ in self.saving(file):
            pass

    def saving(self, file: Path) -> Generator[None, None, None]:
        """`save`, one trace at a time; what comes in meanwhile is not written. The file is as it was until the last one, or if that never
        comes."""
        with replacing(file) as opened:
            for record in self.records():
                opened.write(framed(record))
                yield

    def records(self) -> Iterator[bytes]:
        """A table of contents, then every trace, as they are now."""
        held = {tag: parts(domain) for tag, domain in self.domains.items()}
        table = {
            tag: asdict(domain.counts) | {"threshold": domain.older.threshold, "parts": [len(part) for part in held[tag]]}
            for tag, domain in self.domains.items()
        }
        yield json.dumps(table).encode()
        yield from (trace.to_bytes() for found in held.values() for part in found for trace in part)

    def load(self, file: Path) -> None:
        """Remember what `save` wrote, in place of what is remembered. Raises OSError, or ValueError for a file that is not whole."""
        self.domains = {}
        with file.open("rb") as opened:
            try:
                self.read(opened)
            except (KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:  # a damaged file can say anything
                raise ValueError(f"{file} is no saved buffer: {type(error).__name__} {error}") from None
        for domain in self.domains.values():
            self.trim(domain)

    def read(self, opened: BinaryIO) -> None:
        """The records of a file."""
        for tag, row in json.loads(take(opened)).items():
            domain = self.count(tag, row["seen"], row["tokens"], row["dropped"])
            recent, older, held = ([Trace.from_bytes(take(opened)) for _ in range(count)] for count in row["parts"])
            self.fill(tag, recent, older, held)
            domain.older.threshold = max(domain.older.threshold, row["threshold"])

    def fill(self, saved: str, recent: Sequence[Trace], older: Sequence[Trace], held: Sequence[Trace]) -> None:
        """Take in the traces of a saved domain, each where it belongs now: which tags are domains may have changed since. What would be
        held out now and was not, or the other way round, is given up: what was trained on must not judge."""
        for trace in (*recent, *older, *held):
            trace.check(self.vocab_size, self.emb_dim)
            self.count(saved, -1, -len(trace))
            self.count(trace.tag, 1, len(trace))
        for trace in recent:
            if self.fits(trace, held_out=False):
                self.domain(trace.tag).recent.add(trace)
        for trace in held:
            if self.fits(trace, held_out=True):
                self.domain(trace.tag).held.add(trace)
        for trace in older:
            if self.fits(trace, held_out=False):
                self.count(trace.tag, dropped=not self.domain(trace.tag).older.offer(self.key(trace), trace))

    def fits(self, trace: Trace, held_out: bool) -> bool:
        """Whether a saved trace is still for what it was for; one that is not counts as dropped."""
        fits = self.is_held_out(trace.asked) == held_out
        self.count(trace.tag, dropped=not fits)
        return fits

    def count(self, tag: str, seen: int = 0, tokens: int = 0, dropped: int = 0) -> Domain:
        """Add to the counts of a tag's domain."""
        counts = (domain := self.domain(tag)).counts
        counts.seen, counts.tokens, counts.dropped = counts.seen + seen, counts.tokens + tokens, counts.dropped + dropped
        return domain

    def key(self, trace: Trace) -> float:
        """By which a trace stays in the sample of older ones."""
        return chance(f"older {self.settings.seed}", trace.request)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(domain.nbytes for domain in self.domains.values())


def tells(trace: Trace) -> bool:
    """Whether speculators can differ on an answer: one of two tokens, the first of which is not drafted, takes each of them one step."""
    return len(trace) > 2


def parts(domain: Domain) -> tuple[list[Trace], list[Trace], list[Trace]]:
    """A domain's traces: the recent, the older, those held out."""
    return list(domain.recent.traces), [trace for _, _, trace in domain.older.entries], list(domain.held.traces)


def framed(record: bytes) -> bytes:
    """A record as it lies in a file: its size before it."""
    return SIZE.pack(len(record)) + record


def take(file: BinaryIO) -> bytes:
    """The next record. Raises ValueError where the file ends before it."""
    size = file.read(SIZE.size)
    record = file.read(SIZE.unpack(size)[0]) if len(size) == SIZE.size else b""
    if len(size) < SIZE.size or len(record) < SIZE.unpack(size)[0]:
        raise ValueError(f"{file.name} ends in the middle of a record")
    return record


def chosen(traces: Sequence[Trace], count: int, random: Random) -> list[Trace]:
    """Traces drawn with replacement, each as often as it is long."""
    return random.choices(traces, [len(trace) for trace in traces], k=count)


def chance(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on the purpose and the name alone."""
    digest = hashlib.blake2b(f"{purpose} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
