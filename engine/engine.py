"""One base model, many requests: admit, plan a tree for each, one ragged forward, draw, replay, commit.

Knows tokens, not text; no threads and no clock but the one that times a step. State moves only after the forward succeeded: a step that
raises fails the requests in it, returns their slots, and touches nothing else.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import TypeVar

import torch
from torch import Tensor

from engine.attention import KVStore, Row
from engine.capture import Recorder
from engine.drafter import Draft, Drafter, Kept, Observer
from engine.executor import DeviceLost
from engine.loading import Base
from engine.request import Outcome, Overloaded, Request, Stats, Text, TokenScore
from engine.sampling import UNDRAWN, InvalidRequest, Sampler, draw
from engine.scheduler import Queue, due, share, standing, steadfast, urgency
from engine.slots import Block, Key, SlotPool, SlotTable
from engine.tree import Budget, Tree, replay

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """The engine's load at one step. context: tokens held by running requests. free: slots that drafts may use.

    decoding: requests that draw a token in this step. prompt: rows of its forward, before drafts, beyond one for each of those.
    row_counts: numbers of rows that forwards are rounded up to, see `engine.executor.Executor`.
    """

    running: int
    waiting: int
    context: int
    free: int
    decoding: int = 0
    prompt: int = 0
    row_counts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that could draft in this step."""

    request: Request
    remaining: int
    stats: Stats


Budgets = Callable[[Load, Sequence[Candidate]], Sequence[Budget]]
Prune = Callable[[Load, Sequence[Draft]], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """How one request's draft fared: depth verified, tokens accepted, and (depth, confidence, kept) of every drafted node whose parent was
    kept. A draft cut short by a stop tells nothing about what came after it."""

    request: str
    depth: int
    accepted: int
    nodes: tuple[tuple[int, float, bool], ...]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did and cost. seconds: the whole step, by `clock_of` its device; draft_seconds: drafting within it; elapsed: seconds
    that passed, where whoever runs the engine tells them. rows: nodes in the forward."""

    outcomes: tuple[Outcome, ...] = ()
    load: Load = field(default_factory=lambda: Load(0, 0, 0, 0))
    verified: tuple[Verified, ...] = ()
    requests: int = 0
    rows: int = 0
    prefill: int = 0
    context: int = 0
    emitted: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    elapsed: float = 0.0

    @property
    def duration(self) -> float:
        """Seconds that passed."""
        return self.elapsed or self.seconds


@dataclass(slots=True, eq=False)
class Plan:
    """One request in one step: its tree, the slots of its nodes, and where its rows of logits are."""

    text: Text
    tree: Tree
    slots: list[int]
    rows: range = range(0)

    @property
    def complete(self) -> bool:
        """Whether the forced nodes cover all that is known, so that the step can draw new tokens."""
        return self.tree.forced == self.text.known

    @property
    def keep(self) -> range:
        """Nodes whose draw matters: the last forced one and the drafted ones."""
        return range(self.tree.forced - 1, len(self.tree)) if self.complete else range(0)


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why the first waiting request could not be let in: it is tried again when one of these has changed for the better.

    running: requests; available: slots; key: the block that would have spared it some.
    """

    text: Text
    running: int
    available: int
    key: Key | None


def clock_of(device: str) -> Callable[[], float]:
    """Seconds that work costs on a device of that type: those that pass; where the engine computes on the processor itself, those that its
    thread is given, since how long it waits for other work says nothing of its own."""
    return thread_time if device == "cpu" else perf_counter


class Engine:
    """Continuous batching with speculation over one base.

    drafter None: plain decoding. budgets: how far each request that could draft may do so, asked once per step. prune: shown what was
    drafted, may cut nodes off the trees before they are verified, by anything it likes: replay keeps the text the same.
    recorder: keeps the features of requests that ask for it.
    slots: KV capacity in tokens. chunk: prompt tokens computed per step beside decoding. nodes: drafted nodes per request at most.
    """

    def __init__(
        self,
        base: Base,
        drafter: Drafter | None = None,
        budgets: Budgets | None = None,
        prune: Prune | None = None,
        *,
        recorder: Recorder | None = None,
        slots: int = 4096,
        chunk: int = 256,
        nodes: int = 32,
        max_running: int = 32,
        max_waiting: int = 256,
        block: int = 16,
    ) -> None:
        self.base, self.drafter, self.budgets, self.prune, self.recorder = base, drafter, budgets, prune, recorder
        self.clock = clock_of(base.device.type)
        self.observer: Observer | None = None  # of this step
        self.chunk, self.nodes, self.max_running, self.max_waiting = chunk, nodes, max_running, max_waiting
        self.pool = SlotPool(slots, block, headroom=max_running * 8)
        self.store = KVStore(slots)
        self.texts: dict[str, Text] = {}  # all that wait or run, by the id of their request
        self.waiting = Queue()
        self.running: list[Text] = []  # by standing
        self.cancelled: dict[str, None] = {}
        self.blocked: Blocked | None = None
        self.steps = self.arrivals = self.draft_failures = 0

    # -- requests in and out ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest for one that could never run, Overloaded when the queue is full."""
        self.validate(request)
        if len(self.texts) >= self.max_waiting + self.max_running:
            raise Overloaded(f"{len(self.waiting)} requests are waiting, and no more than {self.max_waiting} may")
        sampler = Sampler(request.params, request.prompt, self.base.vocab_size, self.base.device)
        table = SlotTable(len(request.prompt) + request.params.max_tokens + self.nodes)
        text = Text(request, list(request.prompt), table, sampler, self.arrivals, due(self.steps, request.priority))
        self.arrivals += 1
        self.texts[request.id] = text
        self.waiting.push(text)

    def validate(self, request: Request) -> None:
        if request.id in self.texts:
            raise InvalidRequest("id", f"a request {request.id} is being generated already")
        if not request.prompt:
            raise InvalidRequest("prompt", "the prompt has no tokens; at least one is needed")
        wrong = next((t for t in request.prompt if not 0 <= t < self.base.vocab_size), None)
        if wrong is not None:
            raise InvalidRequest("prompt", f"the prompt holds token {wrong}; the vocabulary has tokens 0 to {self.base.vocab_size - 1}")
        longest = min(self.base.context, self.pool.capacity)
        if len(request.prompt) + request.params.max_tokens > longest:
            raise InvalidRequest(
                "max_tokens" if len(request.prompt) < longest else "prompt",
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.params.max_tokens}; together at most {longest}",
            )

    def cancel(self, request_id: str) -> None:
        """End a request at the next step. An unknown or finished id changes nothing."""
        if request_id in self.texts:
            self.cancelled[request_id] = None

    # -- one step -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Advance every request that fits by one forward. Never raises for what a request or a drafter did, but DeviceLost."""
        started = self.clock()
        dropped = list(self.drop_cancelled())
        self.admit()
        plans = self.plan()
        load = self.load(plans)
        if not plans:
            return StepReport(tuple(dropped), load, seconds=self.clock() - started)
        context = sum(len(p.text.table) for p in plans)
        prefill = sum(p.tree.forced for p in plans if not p.complete or p.tree.forced > 1)
        drafting = self.clock()
        self.draft(plans, load)
        draft_seconds = self.clock() - drafting
        rows = sum(len(p.tree) for p in plans)
        try:
            logits, hidden = self.forward(plans)
            picks = self.draw(plans, logits)
            scores = [self.score(p, logits) for p in plans]
        except DeviceLost:
            raise
        except Exception as error:
            log.exception("a step failed; its %d requests fail with it", len(plans))
            return StepReport((*dropped, *self.fail(plans, error)), load, seconds=self.clock() - started)
        self.observer = self.drafter.observer if self.drafter is not None else None
        results = [self.commit(p, picks, hidden, s) for p, s in zip(plans, scores, strict=True)]
        self.record(logits, hidden)
        self.pool.make_room()
        return StepReport(
            outcomes=(*dropped, *(outcome for outcome, _ in results if outcome)),
            load=load,
            verified=tuple(v for _, v in results if v),
            requests=len(plans),
            rows=rows,
            prefill=prefill,
            context=context,
            emitted=sum(len(o.tokens) for o, _ in results if o),
            seconds=self.clock() - started,
            draft_seconds=draft_seconds,
        )

    def load(self, plans: Sequence[Plan]) -> Load:
        context, decoding = sum(len(t.table) for t in self.running), sum(p.complete for p in plans)
        prompt = sum(len(p.tree) for p in plans) - decoding
        counts = self.base.executor.row_counts
        return Load(len(self.running), len(self.waiting), context, len(self.pool.free), decoding, prompt, counts)

    def drop_cancelled(self) -> Iterator[Outcome]:
        cancelled, self.cancelled = self.cancelled, {}
        for text in [self.texts[name] for name in cancelled if name in self.texts]:
            (self.waiting if text in self.waiting else self.running).remove(text)
            yield self.retire(text, (), (), "cancelled")

    # -- admission and memory -----------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Move waiting requests in while they fit, in the queue's order. The first waiting one always fits an idle engine."""
        self.steps += 1
        while (text := self.waiting.first()) is not None and not self.in_vain(text):
            if not self.let_in(text):
                return

    def in_vain(self, text: Text) -> bool:
        """Whether nothing has changed for the better since a request could not be let in."""
        was = self.blocked
        if was is None or was.text is not text or len(self.running) < was.running:
            return False
        return self.pool.available <= was.available and was.key not in self.pool.blocks

    def let_in(self, text: Text) -> bool:
        """Seat the first waiting request if it fits, in the place of running ones of lower classes if it must."""
        blocks = self.pool.match(text.tokens)
        yielding = self.yielding(text, len(text.tokens) - len(blocks) * self.pool.block)
        if yielding is None:
            self.pool.release(blocks)
            self.blocked = Blocked(text, len(self.running), self.pool.available, self.pool.key(blocks, text.tokens))
            return False
        self.waiting.remove(text)
        for other in yielding:
            other.due = max(other.due, text.due + 1)  # it resumes right after the one that took its place
            self.preempt(other)
        self.seat(text, blocks)
        insort(self.running, text, key=standing)
        return True

    def yielding(self, text: Text, need: int) -> list[Text] | None:
        """The running requests that give way so that one more with `need` tokens to compute fits; None if those that may do not suffice.

        Every running request keeps a block in reserve, so that whoever is let in does not have to leave at once.
        """
        count, room, block = len(self.running), self.pool.available, self.pool.block
        while count and (count >= self.max_running or need + count * block > room):
            other = self.running[count - 1]
            if other.request.priority <= text.request.priority or steadfast(other):
                return None
            count -= 1
            room += len(other.table) - block * sum(b.refs > 1 for b in other.blocks)
        return self.running[count:]

    def seat(self, text: Text, blocks: list[Block]) -> None:
        """Give a text cached blocks that continue it."""
        text.blocks += blocks
        for block in blocks:
            text.table.extend(block.slots)
        if text.generated == 0 and text.stats.preemptions == 0:
            text.stats.cached += len(blocks) * self.pool.block

    def preempt(self, text: Text) -> None:
        """Drop a request's slots and keep its tokens; it resumes as a longer forced chain, its published blocks found again."""
        self.running.remove(text)
        self.vacate(text)
        text.sampler.noise.clear()
        text.stats.preemptions += 1
        self.waiting.push(text)

    def vacate(self, text: Text) -> None:
        self.pool.give(text.owned(self.pool.block))
        self.pool.release(text.blocks)
        text.blocks = []
        text.table.cut(0)

    def check(self) -> None:
        """Assert that no slot leaked. Meant for idle moments and tests: costs time in proportion to the pool."""
        self.pool.check([slot for text in self.running for slot in text.owned(self.pool.block)])

    # -- planning -----------------------------------------------------------------------------------------------------------

    def plan(self) -> list[Plan]:
        """A forced chain for every running request that gets tokens in this step, by standing; the last give way when slots run out."""
        plans: list[Plan] = []
        counts = self.counts()
        at = 0
        while at < len(self.running):
            text = self.running[at]
            at += 1
            if count := counts.get(text, 0):
                slots = self.secure(text, count)
                if slots is None:
                    break
                start = len(text.table)
                plans.append(Plan(text, Tree.chain(text.tokens[start : start + count]), slots))
        return plans

    def counts(self) -> dict[Text, int]:
        """How many of its known tokens each running request computes in this step: those that decode one, prompts their share."""
        return share(self.reading(), self.chunk) | {text: 1 for text in self.running if text.known == 1}

    def reading(self) -> list[Text]:
        """The running requests whose prompts are to be computed. Of those that need the same block next the most urgent one computes it,
        and the others wait for it to be published: choices of one prompt compute it once."""
        claimed: set[Key] = set()
        found = []
        for text in sorted((t for t in self.running if t.known > 1), key=urgency):
            self.catch_up(text)
            key = self.pool.key(text.blocks, text.tokens)
            if text.known > 1 and key not in claimed:
                found.append(text)
            if key is not None:
                claimed.add(key)
        return found

    def catch_up(self, text: Text) -> None:
        """Continue a text with blocks published since it was let in, returning what it had computed of the first of them."""
        if self.pool.after(text.blocks, text.tokens) is None:
            return
        self.pool.give(text.owned(self.pool.block))
        text.table.cut(len(text.blocks) * self.pool.block)
        while (block := self.pool.after(text.blocks, text.tokens)) is not None:
            self.pool.acquire(block)
            self.seat(text, [block])

    def secure(self, text: Text, count: int) -> list[int] | None:
        """Slots for `count` nodes, preempting requests of lower standing if it must; None if the request itself had to give way."""
        while (slots := self.pool.take(count)) is None:
            last = self.running[-1]
            self.preempt(last)
            if last is text:
                return None
        return slots

    def draft(self, plans: Sequence[Plan], load: Load) -> None:
        """Let the drafter extend the trees of requests that are up to date, within their budgets and the free slots."""
        able = [p for p in plans if p.complete and p.text.remaining > 1]
        if self.drafter is None or self.budgets is None or not able:
            return
        try:
            budgets = self.budgets(load, [Candidate(p.text.request, p.text.remaining, p.text.stats) for p in able])
            drafts = [self.offer(p, b) for p, b in zip(able, self.fit(able, budgets), strict=True) if b.nodes > 0]
            if drafts:
                self.drafter.draft(drafts)
                self.verify_drafts(drafts)
                if self.prune is not None:
                    self.prune(load, drafts)
        except Exception:
            log.exception("drafting failed; this step decodes plainly")
            self.draft_failures += 1
            for plan in able:
                trim(plan.tree)
        for plan in able:
            slots = self.pool.lend(plan.tree.drafted)
            if slots is None:
                trim(plan.tree)
            plan.slots += slots or []

    def fit(self, plans: Sequence[Plan], budgets: Sequence[Budget]) -> list[Budget]:
        """Clip budgets to what a request may still emit, to what the drafter can do, and to the free slots."""
        assert self.drafter is not None
        free, fitted = len(self.pool.free), []
        for plan, budget in zip(plans, budgets, strict=True):
            depth = min(budget.depth, plan.text.remaining - 1, self.drafter.max_depth)
            width = min(budget.width, self.drafter.max_width)
            nodes = max(0, min(budget.nodes, depth * width, self.nodes, free))
            fitted.append(Budget(depth, width, nodes) if depth > 0 and nodes > 0 else Budget())
            free -= nodes
        return fitted

    def offer(self, plan: Plan, budget: Budget) -> Draft:
        text = plan.text
        request = text.request
        return Draft(request.id, text.tokens, plan.tree, budget, text.sampler, text.hidden, request.prediction, request.tag)

    def verify_drafts(self, drafts: Sequence[Draft]) -> None:
        """A drafter that breaks its budget or leaves the vocabulary is a bug: refuse what it drew."""
        for draft in drafts:
            tree = draft.tree
            assert tree.drafted <= draft.budget.nodes, f"{tree.drafted} nodes drafted, {draft.budget.nodes} allowed"
            assert tree.drafted_depth() <= draft.budget.depth, "drafted deeper than allowed"
            assert all(0 <= t < self.base.vocab_size for t in tree.tokens[tree.forced :]), "drafted outside the vocabulary"

    # -- forward and draw ---------------------------------------------------------------------------------------------------

    def forward(self, plans: Sequence[Plan]) -> tuple[Tensor, Tensor]:
        """One ragged pass over all trees. Returns logits [N, V] and hidden states [N, emb_dim] of the nodes to draw at."""
        rows = [Row(p.text.table.view(), p.slots, p.tree.parents, p.tree.depths) for p in plans]
        keep: list[int] = []
        start = 0
        for plan in plans:
            plan.rows = range(len(keep), len(keep) + len(plan.keep))
            keep += [start + node for node in plan.keep]
            start += len(plan.tree)
        tokens = [token for plan in plans for token in plan.tree.tokens]
        return self.base.forward(self.store, rows, tokens, keep)

    def draw(self, plans: Sequence[Plan], logits: Tensor) -> list[int]:
        """The base's draw after every kept node. [N]"""
        if not len(logits):
            return []
        owner, positions, paths = [], [], []
        for index, plan in enumerate(plans):
            tree, penalised = plan.tree, plan.text.request.params.penalised
            for node in plan.keep:
                owner.append(index)
                positions.append(len(plan.text.table) + tree.depths[node] + 1)
                paths.append([tree.tokens[i] for i in tree.ancestry(node)] if penalised else [])
        return draw(logits, [p.text.sampler for p in plans], owner, positions, paths)

    def score(self, plan: Plan, logits: Tensor) -> Tensor | None:
        """Log-probabilities at a request's rows if it asked for any. [rows, V]"""
        if plan.text.request.params.logprobs is None or not plan.complete:
            return None
        return logits[plan.rows.start : plan.rows.stop].float().log_softmax(-1)

    # -- commit -------------------------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, picks: Sequence[int], hidden: Tensor, logprobs: Tensor | None) -> tuple[Outcome | None, Verified | None]:
        """Keep the nodes the base's draws lead through and return the rest: one edit of the slot list."""
        text, tree, first = plan.text, plan.tree, plan.tree.forced - 1
        if not plan.complete:
            self.keep(text, plan.slots)
            return None, None
        drawn = [UNDRAWN] * first + list(picks[plan.rows.start : plan.rows.stop])
        path = replay(tree, drawn)
        new = [tree.tokens[node] for node in path[tree.forced :]] + [drawn[path[-1]]]
        try:
            emitted, finish = self.accept(text, new)
            path = path[: tree.forced + len(emitted) - 1]
            at = [plan.rows.start + node - first for node in path[first:]]  # rows of logits that drew what was emitted
            scores = token_scores(logprobs, [a - plan.rows.start for a in at], emitted, text.request.params.logprobs)
            states = None if self.observer is None else pick(hidden, at)
            text.sampler.record(emitted, len(text.tokens) + len(emitted))
        except DeviceLost:
            raise
        except Exception as error:
            log.exception("request %s cannot go on", text.request.id)
            return next(self.fail([plan], error)), None
        accepted = min(len(emitted), len(new) - 1)
        self.count(text.stats, tree, accepted)
        kept = set(path)
        text.tokens += emitted
        self.pool.give([slot for node, slot in enumerate(plan.slots) if node not in kept])
        self.keep(text, [plan.slots[node] for node in path])
        text.hidden = hidden[at[-1]]
        if self.observer is not None and states is not None:
            self.tell(self.observer, Kept(text.request.id, emitted, tree.drafted, accepted, states, text.request.tag))
        if self.recorder is not None and text.request.record:
            self.recorder.keep(text.request, emitted, accepted, at)
        fared = tested(tree, path, finish is not None) if tree.drafted else ()
        verified = Verified(text.request.id, tree.drafted_depth(), accepted, fared) if tree.drafted else None
        if finish is None:
            return Outcome(text.request, tuple(emitted), scores), verified
        self.running.remove(text)
        return self.retire(text, emitted, scores, finish), verified

    def accept(self, text: Text, new: Sequence[int]) -> tuple[list[int], str | None]:
        """The new tokens up to the one that ends the text, and how it ended."""
        params, emitted = text.request.params, []
        for token in new:
            if token == UNDRAWN:
                raise ArithmeticError("the base computed logits that are not numbers")
            emitted.append(token)
            if token in params.stop_tokens or (text.request.stop is not None and text.request.stop(token)):
                return emitted, "stop"
            if text.generated + len(emitted) >= params.max_tokens:
                return emitted, "length"
        return emitted, None

    def count(self, stats: Stats, tree: Tree, accepted: int) -> None:
        depth = tree.drafted_depth()
        stats.steps += 1
        stats.drafts += depth > 0
        stats.drafted += tree.drafted
        stats.accepted += accepted
        stats.depth_sum += depth
        stats.depth_max = max(stats.depth_max, depth)

    def keep(self, text: Text, slots: Sequence[int]) -> None:
        """Append computed slots to a text and publish every block that became full."""
        text.table.extend(slots)
        block = self.pool.block
        while (len(text.blocks) + 1) * block <= len(text.table):
            start = len(text.blocks) * block
            mine = [int(s) for s in text.table.view()[start : start + block]]
            parent = text.blocks[-1] if text.blocks else None
            published = self.pool.publish(parent, text.tokens[start : start + block], mine)
            text.table.replace(start, published.slots)
            text.blocks.append(published)

    def retire(self, text: Text, tokens: Sequence[int], scores: tuple[TokenScore, ...], finish: str, error: str | None = None) -> Outcome:
        """Give back everything a request holds."""
        del self.texts[text.request.id]
        self.vacate(text)
        if self.drafter is not None:
            self.tell(self.drafter.forget, text.request.id)
        if self.recorder is not None:
            self.recorder.end(text.request.id, finish in ("stop", "length"))
        return Outcome(text.request, tuple(tokens), scores, finish, error, text.stats)

    def tell(self, told: Callable[[T], None], news: T) -> None:
        """Let the drafter learn from what was kept, or forget a request; what it makes of that is its own affair."""
        try:
            told(news)
        except Exception:
            log.exception("the drafter could not take in what happened")
            self.draft_failures += 1

    def record(self, logits: Tensor, hidden: Tensor) -> None:
        """Let the recorder copy what it keeps of a step; what goes wrong there is no request's affair."""
        if self.recorder is None:
            return
        try:
            self.recorder.take(logits, hidden)
        except Exception:
            log.exception("the features of a step could not be kept")
            self.recorder.fail()

    def fail(self, plans: Sequence[Plan], error: Exception) -> Iterator[Outcome]:
        """End the requests of a step that raised."""
        for plan in plans:
            self.pool.give(plan.slots)
            self.running.remove(plan.text)
            yield self.retire(plan.text, (), (), "error", f"{type(error).__name__}: {error}")


def pick(states: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of states [N, emb_dim], ascending; those that lie together without a copy."""
    whole = rows[-1] - rows[0] == len(rows) - 1
    return states[rows[0] : rows[-1] + 1] if whole else states[list(rows)]


def trim(tree: Tree) -> None:
    """Cut a tree back to its forced nodes."""
    del tree.tokens[tree.forced :], tree.parents[tree.forced :], tree.depths[tree.forced :], tree.confidence[:]


def tested(tree: Tree, path: Sequence[int], ended: bool) -> tuple[tuple[int, float, bool], ...]:
    """(depth, confidence, kept) of the drafted nodes whose parent is on the kept path; when the text ended there, of those kept only."""
    root, kept = tree.forced - 1, set(path)
    nodes = path[tree.forced :] if ended else [n for n in range(tree.forced, len(tree)) if tree.parents[n] in kept]
    return tuple((tree.depths[n] - root, tree.confidence[n - tree.forced], n in kept) for n in nodes)


def token_scores(logprobs: Tensor | None, rows: Sequence[int], tokens: Sequence[int], top: int | None) -> tuple[TokenScore, ...]:
    """The scores of emitted tokens; rows[i] of logprobs [n, V] drew tokens[i]."""
    if logprobs is None or top is None:
        return ()
    at = logprobs[list(rows)]  # [emitted, V]
    chosen = at.gather(1, torch.tensor(list(tokens), device=at.device)[:, None])[:, 0].tolist()
    if top == 0:
        return tuple(TokenScore(value) for value in chosen)
    best = at.topk(min(top, at.shape[1]), -1)
    alternatives = [tuple(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return tuple(TokenScore(value, top_tokens) for value, top_tokens in zip(chosen, alternatives, strict=True))
