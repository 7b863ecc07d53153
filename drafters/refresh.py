"""The trainer's core: a copy of the serving speculator is fine-tuned on logged answers, and becomes a candidate if it is worth more.

Rounds of small units of work (a part of a training step, or a stretch of a held-out request replayed), so that whoever runs them can stop
between any two. A round measures the serving speculator on held-out requests, trains a copy and measures it now and then, and ends with the
best one of these as a candidate, or with a reason why there is none; then it waits for fresh traffic, longer each time there was nothing to
gain. What a unit does is a function of the traces, the settings and the round alone: a run resumed from a checkpoint goes on bit for bit.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from drafters.bundle import DataWindow
from drafters.checkpoint import shapes, torch_dtype
from drafters.choices import requests
from drafters.durable import replace_durably
from drafters.mlp import MLPSpeculator
from drafters.objectives import OBJECTIVES, ObjectiveName
from drafters.places import Places, Positions, gather, place_losses, windows
from drafters.replay import ReplayBuffer
from drafters.traces import Trace
from drafters.walk import HeldOut, Replay, Walk

log = logging.getLogger(__name__)

Phase = Literal["waiting", "measuring", "training", "candidate"]
LONGEST_WAIT = 6  # fruitless rounds double the wait this often at most
UNBEGUN = "no round yet"
CHANGED = 0.1  # tokens per step by which serving must be off its former pace for the traffic to count as another
SMOOTH = 0.1  # share of the latest loss in the smoothed one
PART = 128  # places of a training step that are gone through at once: tens of milliseconds of a core for small models


class Refused(ValueError):
    """A round that must not become a candidate, and why."""


@dataclass(frozen=True, slots=True)
class RefreshSettings:
    """How one speculator is refreshed. Raises ValueError for what cannot be.

    objective, positions: what heads are trained on, see `drafters.objectives` and `drafters.places`; the defaults are the best of
    `benchmarks/objectives.py`. rate: the learning rate after
    `warmup` steps, falling to a tenth of it by a cosine. requests, window: a step trains on up to `window` places of so many requests.
    recent: share of them among the latest traces. steps: of a round at most; every `interval` of them the copy is measured, and after
    `patience` measurements in which it got no better the round ends: a copy that is well trained already first loses at the full rate, and
    gains as that falls. least_gain: tokens per step that a candidate must gain on held-out requests.
    margin: by which share the loss may rise above what it was before it counts as diverged. least_tokens: fresh answer tokens that a round
    waits for, and least_held the held-out requests it needs; the latest `most_held` answers to them are measured on.
    """

    objective: ObjectiveName = "forward_kl"
    positions: Positions = "rejected"
    rate: float = 1e-3
    warmup: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    bfloat16: bool = False
    requests: int = 16
    window: int = 64
    recent: float = 0.5
    steps: int = 200
    interval: int = 40
    patience: int = 2
    least_gain: float = 0.02
    margin: float = 0.5
    least_tokens: int = 8192
    least_held: int = 8
    most_held: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("objective", get_args(ObjectiveName)), ("positions", get_args(Positions))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("rate", "clip", "requests", "window", "steps", "interval", "patience", "least_held", "most_held"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected more than 0")
        for name in ("warmup", "weight_decay", "least_gain", "margin", "least_tokens"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected at least 0")
        if self.most_held < self.least_held:
            raise ValueError(f"most_held is {self.most_held}, expected at least least_held, which is {self.least_held}")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent is {self.recent!r}, expected 0 to 1")

    def rate_at(self, step: int) -> float:
        """The learning rate at a step (0-based): linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        turn = math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.55 + 0.45 * math.cos(turn))


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A speculator that gained on held-out requests, as it would be saved. parent: the version it began from.

    before, after: what parent and candidate are worth on the same held-out requests. losses: of every head, before and at the end.
    """

    speculator: MLPSpeculator
    parent: str
    tag: str
    objective: str
    steps: int
    data: DataWindow
    before: HeldOut
    after: HeldOut
    first_losses: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by name, as manifests keep them."""
        held = {f"held_out_per_step_{name}": found.per_step for name, found in (("before", self.before), ("after", self.after))}
        heads = {f"loss_head_{head}": loss for head, loss in enumerate(self.losses)}
        return {**held, "held_out_requests": float(self.after.requests), "steps": float(self.steps), **heads}


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a refresher is. waiting_for: fresh answer tokens before the next round may begin. outcome: how the last round ended."""

    phase: Phase = "waiting"
    round: int = 0
    step: int = 0
    losses: tuple[float, ...] = ()
    before: HeldOut | None = None
    best: HeldOut | None = None
    waiting_for: int = 0
    refused: int = 0
    outcome: str = UNBEGUN


@dataclass(slots=True)
class Measurement:
    """One speculator being replayed on requests, one after the other, in stretches."""

    speculator: MLPSpeculator
    traces: Sequence[Trace]
    walks: list[Walk] = field(default_factory=list)
    replay: Replay | None = None

    @property
    def whole(self) -> bool:
        return len(self.walks) == len(self.traces)

    def advance(self) -> HeldOut | None:
        """Replay one stretch more; the result after the last."""
        replay = self.replay or Replay(self.speculator, self.traces[len(self.walks)])
        self.replay = replay if (found := replay.advance()) is None else None
        self.walks += [found] if found else []
        return HeldOut.of(self.walks) if self.whole else None


@dataclass(slots=True)
class Step:
    """One step of the optimizer under way: its places are gone through in parts whose gradients add up. losses: [heads], of the parts
    so far. done: places gone through."""

    places: Places
    totals: Tensor  # [heads]
    losses: Tensor
    done: int = 0

    @property
    def whole(self) -> bool:
        return self.done >= len(self.places)


@dataclass(slots=True)
class Round:
    """One attempt at a better speculator."""

    speculator: MLPSpeculator  # in training
    optimizer: torch.optim.Optimizer
    held: tuple[Trace, ...]
    measurement: Measurement | None
    under_way: Step | None = None  # lost in a crash: it is a function of what a checkpoint and the buffer hold
    step: int = 0
    first: tuple[float, ...] = ()  # losses of the first step, before it
    losses: tuple[float, ...] = ()  # smoothed
    before: HeldOut | None = None
    best: HeldOut | None = None
    weights: dict[str, Tensor] | None = None  # of the best
    peak: float = 0.0  # tokens per step of the best copy of this round, which at first may be worth less than what serves
    stale: int = 0  # measurements since it was reached
    done: bool = False  # a candidate that waits to be taken


class Refresher:
    """Refreshes the speculator of one domain of one model. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        live: MLPSpeculator,
        version: str,
        buffer: ReplayBuffer,
        settings: RefreshSettings | None = None,
        tag: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """live, version: the serving speculator, from now on in float32; refreshers may share it. A copy of it trains, on its device."""
        self.buffer, self.settings, self.tag, self.clock = buffer, settings or RefreshSettings(), tag, clock
        self.live, self.version = frozen(live), version
        self.round: Round | None = None
        self.candidate: Candidate | None = None
        self.further: dict[str, Tensor] | None = None  # weights that the next round trains; None: those that serve
        self.rounds = self.fruitless = self.refused = 0
        self.used = 0  # answer tokens seen when the last round began
        self.former = 1.0  # the pace of serving then
        self.outcome = UNBEGUN

    # -- what is asked of it ------------------------------------------------------------------------------------------------

    def advance(self, seconds: float = math.inf, units: int | None = None) -> Standing:
        """Work for about so long, or so many units, whichever is less; return early when there is nothing to do.

        At least one unit is done, and the last one is finished, so that a slice lasts `seconds` and at most a unit more.
        """
        until, left = self.clock() + seconds, units if units is not None else -1
        while left and self.ready():
            self.unit()
            left -= 1
            if self.clock() >= until:
                break
        return self.standing

    @property
    def standing(self) -> Standing:
        r = self.round
        shown = (r.step, r.losses, r.before, r.best) if r else (0, (), None, None)
        return Standing(self.phase, self.rounds, *shown, self.missing(), self.refused, self.outcome)

    @property
    def phase(self) -> Phase:
        if self.candidate is not None:
            return "candidate"
        if self.round is None:
            return "waiting"
        return "training" if self.round.measurement is None else "measuring"

    def take(self) -> Candidate | None:
        """The candidate of the last round, once. Until it is taken no other round begins, and checkpoints hold it."""
        candidate, self.candidate = self.candidate, None
        if candidate is not None:
            self.round = None
        return candidate

    def reject(self, reason: str, further: MLPSpeculator | None = None) -> None:
        """The candidate that was taken is not wanted: the next round waits for twice as much traffic. further: what that trains, instead of
        the serving speculator; a candidate that is better, and not surely so, may come to it in more than one round."""
        self.outcome, self.fruitless = reason, self.fruitless + 1
        self.further = None if further is None else tensors(further)

    def serve(self, live: MLPSpeculator, version: str) -> None:
        """Another version serves now: a round that began from an older one is dropped. Waiting begins anew."""
        self.live, self.version = frozen(live), version
        self.round, self.candidate, self.further, self.fruitless = None, None, None, 0

    def drop(self, reason: str) -> None:
        """Give up the round that is under way, or its candidate, if there is one; the next one waits for as much traffic as any."""
        self.further = None
        if self.round is not None or self.candidate is not None:
            self.round, self.candidate, self.outcome = None, None, reason

    def reread(self) -> None:
        """Begin the step that is under way anew: the buffer has given up traces, and this one may be of them."""
        if self.round is not None:
            self.round.under_way = None

    # -- rounds -------------------------------------------------------------------------------------------------------------

    def able(self) -> bool:
        """Whether there is work: a round under way, or all that one needs to begin."""
        if self.candidate is not None:
            return False
        return self.round is not None or (self.missing() == 0 and self.enough())

    def ready(self) -> bool:
        """Whether there is work; begins a round when it may."""
        if self.able() and self.round is None:
            self.rounds, self.used, self.former = self.rounds + 1, self.buffer.counts(self.tag).tokens, self.pace()
            self.round = self.begin()
        return self.able()

    def missing(self) -> int:
        """Answer tokens that must still come before the next round."""
        usual = self.settings.least_tokens
        if self.round or (self.fresh >= usual and self.fruitless and self.changed()):
            return 0
        return max(0, (usual << min(self.fruitless, LONGEST_WAIT)) - self.fresh)

    @property
    def fresh(self) -> int:
        """Answer tokens that came since the last round began."""
        return self.buffer.counts(self.tag).tokens - self.used

    def changed(self) -> bool:
        """Whether serving is off the pace that it had when the last round began: then that there was nothing to gain says little."""
        return abs(self.pace() - self.former) > CHANGED

    def pace(self) -> float:
        """Tokens per step that serving made of the latest answers, of `least_tokens` tokens together."""
        tokens = kept = 0
        for trace in self.buffer.latest(self.tag):
            tokens, kept = tokens + len(trace), kept + int(trace.accepted.sum())
            if tokens >= self.settings.least_tokens:
                break
        return tokens / max(1, tokens - kept) if tokens else 1.0

    def enough(self) -> bool:
        """Whether there are held-out requests to measure on, and any to train on."""
        held = requests(trace.request for trace in self.buffer.choosing(self.tag))
        return held >= self.settings.least_held and any(len(trace) > 1 for trace in self.buffer.training(self.tag))

    def begin(self) -> Round:
        """A round that first measures the serving speculator. It trains what the last came to, if that was better and yet not enough."""
        device = next(self.live.parameters()).device
        start = self.live if self.further is None else restored(self.live, self.further).to(device)
        trained = copy.deepcopy(start).float().requires_grad_(True).train()
        held = self.buffer.choosing(self.tag)[-self.settings.most_held :]
        return Round(trained, self.optimizer_for(trained), held, Measurement(self.live, held))

    def optimizer_for(self, speculator: MLPSpeculator) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.AdamW(speculator.parameters(), lr=s.rate, betas=(0.9, 0.95), weight_decay=s.weight_decay)

    def unit(self) -> None:
        """A part of a step, or a stretch of a held-out request."""
        r = self.round
        assert r is not None, "there is a round when there is work"
        try:
            if r.measurement is None:
                self.step(r)
            elif (found := r.measurement.advance()) is not None:
                self.measured(r, found)
        except Refused as error:
            self.refused, self.further = self.refused + 1, None
            self.give_up(f"refused: {error}")

    def step(self, r: Round) -> None:
        """Go through a part of a step; after the last one move the weights, and begin the next measurement when it is due."""
        under_way = r.under_way or self.begin_step(r)
        losses = self.losses(r, under_way)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        under_way.losses += losses.detach()
        under_way.done += PART
        r.under_way = None if under_way.whole else under_way
        if under_way.whole:
            descend(r, under_way.losses, self.settings)
            self.note(r, tuple(under_way.losses.tolist()))
            if r.step % self.settings.interval == 0 or r.step >= self.settings.steps:
                r.measurement = Measurement(as_saved(r.speculator), r.held)

    def begin_step(self, r: Round) -> Step:
        places = self.places(r)
        totals = places.totals
        r.optimizer.zero_grad(set_to_none=True)
        return Step(places, totals, torch.zeros_like(totals))

    def places(self, r: Round) -> Places:
        """What a step trains on: a function of seed, round, step and the buffer."""
        s, number = self.settings, self.rounds * 1_000_003 + r.step
        config = r.speculator.config
        chosen = windows(self.buffer.sample(self.tag, s.requests, s.recent, number), s.window, Random(f"{s.seed} {self.tag} {number}"))
        return gather(chosen, config.n_predict, config.vocab_size, s.positions, next(r.speculator.parameters()).device)

    def losses(self, r: Round, under_way: Step) -> Tensor:
        """Every head's loss, as far as the next part makes it up. [heads]"""
        places = under_way.places.part(under_way.done, PART)
        with torch.autocast(places.hidden.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            return place_losses(r.speculator, places, OBJECTIVES[self.settings.objective], under_way.totals)

    def note(self, r: Round, losses: tuple[float, ...]) -> None:
        """Count a step and smooth its losses. Raises Refused when they rise."""
        r.step += 1
        r.first = r.first or losses
        r.losses = tuple(SMOOTH * new + (1 - SMOOTH) * old for new, old in zip(losses, r.losses or losses, strict=True))
        bound = sum(r.first) * (1 + self.settings.margin)
        if r.step > self.settings.warmup and sum(r.losses) > bound:
            raise Refused(f"diverged at step {r.step}: the loss is {sum(r.losses):.3g}, at most {bound:.3g} is accepted")

    def measured(self, r: Round, found: HeldOut) -> None:
        """Take in what the serving speculator or the copy is worth, and go on, or end the round."""
        assert r.measurement is not None, "what was measured is there"
        subject, r.measurement = r.measurement.speculator, None
        if r.before is None:
            r.before = found
            r.measurement = Measurement(as_saved(r.speculator), r.held) if r.step else None
            return
        r.peak, r.stale = (found.per_step, 0) if found.per_step > r.peak else (r.peak, r.stale + 1)
        if found.per_step > (r.best or r.before).per_step:
            r.best, r.weights = found, tensors(subject)
        if r.step >= self.settings.steps or r.stale >= self.settings.patience:
            self.finish(r)

    def finish(self, r: Round) -> None:
        """End a round with a candidate if its best copy gained enough."""
        assert r.before is not None, "the serving speculator is measured first"
        gain = r.best.per_step - r.before.per_step if r.best else 0.0
        if r.best is None or r.weights is None or gain < self.settings.least_gain:
            self.further = r.weights
            self.give_up(f"nothing to gain: {gain:.3f} tokens per step on held-out requests, {self.settings.least_gain} are wanted")
            return
        data = window_of(self.buffer.training(self.tag))
        parts = (self.version, self.tag, self.settings.objective, r.step, data, r.before, r.best, r.first, r.losses)
        self.candidate, r.done, self.further, self.fruitless = Candidate(restored(self.live, r.weights), *parts), True, None, 0
        r.speculator, r.optimizer = self.live, self.optimizer_for(self.live)  # a candidate may wait, and its copy has trained enough
        self.outcome = f"candidate: {r.before.per_step:.3f} to {r.best.per_step:.3f} tokens per step on held-out requests"

    def give_up(self, outcome: str) -> None:
        """End a round without a candidate; the next one waits for twice as much traffic."""
        log.info("%s %r: round %d: %s", self.buffer.model, self.tag, self.rounds, outcome)
        self.round, self.outcome, self.fruitless = None, outcome, self.fruitless + 1

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    def checkpoint(self, file: Path) -> None:
        """Write all that going on needs but the traces, in place of the last checkpoint. Raises OSError, leaving the last one as it was."""
        state = {name: getattr(self, name) for name in KEPT} | {"belongs": self.belongs(), "round": round_state(self.round)}
        replace_durably(file, lambda opened: torch.save(state, opened))

    def resume(self, file: Path) -> bool:
        """Go on from a checkpoint; False if there is none, it cannot be read, or is of another parent version, domain, settings or format.

        Held-out requests that the buffer has no more are measured on no more, and what was measured is measured again.
        """
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if state["belongs"] != self.belongs():
                return False
            kept = {name: state[name] for name in KEPT}
            self.round = self.resumed(state["round"]) if state["round"] else None
        except FileNotFoundError:
            return False
        except Exception as error:  # a damaged file can be anything
            log.error("%s cannot be read (%s: %s); training begins anew", file, type(error).__name__, error)
            return False
        for name in KEPT:
            setattr(self, name, kept[name])
        self.used = min(self.used, self.buffer.counts(self.tag).tokens)  # less is seen where traces were lost
        return True

    def belongs(self) -> dict[str, Any]:
        """What a checkpoint must have been written with to be gone on from."""
        names = {"version": self.version, "tag": self.tag, "model": self.buffer.model}
        return {**names, "config": self.live.config.to_json(), "settings": asdict(self.settings)}

    def resumed(self, state: dict[str, Any]) -> Round | None:
        """The round of a checkpoint; None when too few held-out requests are left to measure it."""
        r = self.begin()
        r.speculator.load_state_dict(state["speculator"])
        r.optimizer.load_state_dict(state["optimizer"])
        r.step, r.first, r.losses = state["step"], state["first"], state["losses"]
        r.held = tuple(trace for trace in self.buffer.choosing(self.tag) if trace.request in state["held"])
        if len(r.held) < self.settings.least_held:
            return None
        if len(r.held) < len(state["held"]):
            r.measurement = Measurement(self.live, r.held)
            return r
        r.before, r.best = (HeldOut(**found) if found else None for found in (state["before"], state["best"]))
        r.weights, r.peak, r.stale = state["weights"], state["peak"], state["stale"]
        subject = self.live if r.before is None else as_saved(r.speculator)
        r.measurement = Measurement(subject, r.held) if state["measuring"] else None
        if state["done"]:
            self.finish(r)
        return r


KEPT = ("rounds", "further", "fruitless", "refused", "used", "former", "outcome")


def round_state(r: Round | None) -> dict[str, Any] | None:
    """A round as plain values and tensors."""
    if r is None:
        return None
    found = {name: asdict(held) if held else None for name, held in (("before", r.before), ("best", r.best))}
    state = {name: getattr(r, name) for name in ("step", "first", "losses", "peak", "stale", "weights", "done")}
    held = [trace.request for trace in r.held]
    own = {"speculator": r.speculator.state_dict(), "optimizer": r.optimizer.state_dict()}
    return {**found, **state, **own, "held": held, "measuring": r.measurement is not None}


def descend(r: Round, losses: Tensor, settings: RefreshSettings) -> None:
    """One step down the gradients. Raises Refused, before any weight moves, where they or the losses that they are of are not numbers."""
    for group in r.optimizer.param_groups:
        group["lr"] = settings.rate_at(r.step)
    norm = torch.nn.utils.clip_grad_norm_(r.speculator.parameters(), settings.clip)
    if not bool(losses.isfinite().all()) or not bool(norm.isfinite()):
        raise Refused(f"step {r.step + 1}: losses {losses.tolist()} and a gradient of norm {float(norm):.3g} are not all finite")
    r.optimizer.step()


def frozen(speculator: MLPSpeculator) -> MLPSpeculator:
    """The speculator itself, in float32 and such that nobody trains it."""
    return speculator.float().requires_grad_(False).eval()


def as_saved(speculator: MLPSpeculator) -> MLPSpeculator:
    """A copy whose weights are rounded as a checkpoint keeps them."""
    return frozen(copy.deepcopy(speculator).to(torch_dtype(speculator.config.torch_dtype)))


def tensors(speculator: MLPSpeculator) -> dict[str, Tensor]:
    """Every weight under its first name, on the CPU."""
    state = speculator.state_dict()
    return {name: state[name].detach().cpu().clone() for name in shapes(speculator.config)}


def restored(like: MLPSpeculator, weights: dict[str, Tensor]) -> MLPSpeculator:
    """A speculator with these weights, on the CPU."""
    speculator = copy.deepcopy(like).cpu()
    speculator.load_state_dict(weights, strict=False)  # a tied speculator's other names share them
    return speculator


def window_of(traces: Sequence[Trace]) -> DataWindow:
    """What was learned from."""
    times, tokens = [trace.at for trace in traces], sum(len(trace) for trace in traces)
    asked = requests(trace.request for trace in traces)
    return DataWindow(first=min(times, default=None), last=max(times, default=None), requests=asked, tokens=tokens)
