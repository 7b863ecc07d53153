"""Decoding requests through the engine under a policy, without a cluster: the replica's pilot and the actor's estimates in one process."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from drafters.tree_draft import MLPDrafter
from engine.attention import KVStore
from engine.request import Request
from engine.sampling import SamplingParams

REPORT_EVERY = 0.2  # seconds


@dataclass(slots=True)
class Flown:
    """What a run of requests came to."""

    tokens: int
    seconds: float
    steps: int
    drafted: int
    accepted: int
    texts: dict[str, list[int]]
    draft_seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Flight:
    """One engine under one policy, which keeps what it learned from run to run. policy: off, fixed or goodput.

    store: of at least as many slots as the engine's, shared by flights one after the other, so that graphs captured over it stay.
    """

    def __init__(
        self,
        base: Any,
        drafter: MLPDrafter | None,
        policy: str,
        depth: int = 3,
        width: int = 1,
        store: KVStore | None = None,
        **engine: Any,
    ) -> None:
        provide_pydantic()
        from actors.fleet import Fleet
        from policies import FixedPolicy, GoodputPolicy, Limits, OffPolicy, Plan
        from services.pilot import Pilot

        kinds: dict[str, Any] = {
            "off": OffPolicy, "fixed": lambda: FixedPolicy(depth=depth, width=width), "goodput": lambda: GoodputPolicy(max_width=width)
        }  # fmt: skip
        self.policy, self.fleet, self.limits = kinds[policy](), Fleet(), Limits(drafter.max_depth, drafter.max_width) if drafter else None
        self.make: Any = Plan.of
        self.version = 0
        self.pilot = Pilot("here", self.plan())
        self.engine = self.pilot.engine(base, drafter, **engine)
        if store is not None:
            assert store.slots >= self.engine.store.slots
            self.engine.store = store

    def plan(self) -> Any:
        self.version += 1
        depth = max(self.limits.max_depth, 1) if self.limits else 1
        return self.make(self.version, "it", self.policy, self.fleet.cost(0.0), self.fleet.curves(depth, 0.0), self.limits)

    def learn(self) -> None:
        """What the policy actor does a few times a second."""
        self.fleet.take(self.pilot.report().validated(), 1.0)
        self.pilot.adopt(self.plan())

    def run(self, requests: Sequence[Request]) -> Flown:
        """All requests at once, until the last one ends. Time begins when all prompts are read: with the first step of pure decoding."""
        for request in requests:
            self.engine.submit(request)
        texts: dict[str, list[int]] = {r.id: [] for r in requests}
        told = started = time.perf_counter()
        tokens = steps = drafted = accepted = 0
        drafting = 0.0
        while self.engine.busy:
            report = self.engine.step()
            self.pilot.observe(report)
            for outcome in report.outcomes:
                if outcome.error:
                    raise RuntimeError(outcome.error)
                texts[outcome.request.id] += outcome.tokens
            if report.prefill:
                tokens, steps, drafted, accepted, drafting, started = 0, 0, 0, 0, 0.0, time.perf_counter()
            else:
                tokens, steps, drafting = tokens + report.emitted, steps + 1, drafting + report.draft_seconds
                drafted, accepted = drafted + sum(v.depth for v in report.verified), accepted + sum(v.accepted for v in report.verified)
            if time.perf_counter() - told > REPORT_EVERY:
                self.learn()
                told = time.perf_counter()
        return Flown(tokens, max(time.perf_counter() - started, 1e-9), steps, drafted, accepted, texts, drafting)


def requests_of(prompts: Sequence[Sequence[int]], tokens: int, temperature: float = 0.0, tag: str = "") -> list[Request]:
    """One request for each prompt, with its own seed."""
    return [
        Request(f"{tag}{i}", list(p), SamplingParams(temperature=temperature, seed=i, max_tokens=tokens)) for i, p in enumerate(prompts)
    ]


def random_prompts(vocab: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab - 1, (count, length), generator=generator).tolist()


def provide_pydantic() -> None:
    """Where pydantic is not installed: as much of it as the policies need, with defaults and without validation."""
    try:
        import_module("pydantic")
        return
    except ImportError:
        print("pydantic is not installed: policies are made of their defaults, unvalidated", flush=True)
    stand_in: Any = types.ModuleType("pydantic")
    stand_in.__spec__ = ModuleSpec("pydantic", None)

    class BaseModel:
        def __init__(self, **values: Any) -> None:
            for kind in reversed(type(self).__mro__):
                for name in getattr(kind, "__annotations__", {}):
                    if hasattr(kind, name) and name != "model_config":
                        default = getattr(kind, name)
                        setattr(self, name, default() if callable(default) else default)
            for name, value in values.items():
                setattr(self, name, value)

    def field(default: Any = None, default_factory: Any = None, **_: Any) -> Any:
        return default if default_factory is None else default_factory

    def field_validator(*_: Any, **__: Any) -> Any:
        return lambda function: function

    stand_in.BaseModel, stand_in.Field, stand_in.ConfigDict = BaseModel, field, dict
    stand_in.field_validator = stand_in.model_validator = field_validator
    sys.modules["pydantic"] = stand_in
