"""The policy actor: reads what replicas measured, keeps each model's policy and publishes plans.

`PolicyKeeper` is all of it without Ray: a state store, a clock, and calls that are answered at once. Policies live in the store as their
own history (the last entry is in force), so a change is one append and none is lost; what was learned is saved now and then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import ray
from pydantic import BaseModel, TypeAdapter, ValidationError

from actors.fleet import MOST, Fleet, load_now, typical
from actors.hindsight import Hindsight
from actors.store import StateStore, StoreError, Unreadable, Value, check_state, open_state
from policies import Forecast, GoodputPolicy, Limits, Plan, Policy, SurvivalCurve, Telemetry

log = logging.getLogger(__name__)
NAME = "specfleet-policy"
KINDS = tuple(str(member.model_fields["kind"].default) for member in get_args(get_args(Policy)[0]))
BLOCK = 1000  # plan versions reserved at a time
FARTHEST = 1 << 40  # the latest plan version that is believed of a replica: there is room for as many after it as are ever published
PART, MANY = 0.1, 1024  # of all steps told of, and steps of each replica, that are worth a new plan
SELDOM = 4  # times the least distance of plans after which any news are
LEISURE = 20  # times as many seconds as the last plan was work pass until the next, at least


class PolicyError(Exception):
    """A policy that was refused whole: the field (dotted path), its value, and what would be accepted."""

    status = 400

    def __init__(self, field: str, value: object, accepted: str) -> None:
        super().__init__(field, value, accepted)
        self.field, self.value, self.accepted = field, value, accepted

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r} is refused: {self.accepted}"


class UnknownModel(Exception):
    """No such model is registered."""

    status = 404


class PolicyConflict(Exception):
    """The policy is no longer at the version that the change was made against."""

    status = 409


@dataclass(frozen=True, slots=True)
class KeeperSettings:
    """stale: seconds without telemetry after which a replica is left out of load and estimates; gone: after which it is forgotten;
    publish: seconds between plans of a model at least, more where making one is much work, and a few times that while there is little
    news; save: seconds between saves of what was learned at least."""

    stale: float = 5.0
    gone: float = 60.0
    publish: float = 0.5
    save: float = 10.0


@dataclass(slots=True)
class Entry:
    """One model: its policy, the version of that (0: never changed), its replicas and the plans in force, by device, of one version.

    steps, news: told of in all, and since the plan; published: when that was; took: seconds of work that it was. unsure: whether the store
    may hold a change that it did not confirm.
    """

    name: str
    policy: Policy
    revision: int
    limits: Limits
    fleet: Fleet = field(default_factory=Fleet)
    past: Hindsight = field(default_factory=Hindsight)
    plans: dict[str, Plan] = field(default_factory=dict)
    survival: dict[str, SurvivalCurve] = field(default_factory=dict)
    steps: int = 0
    news: int = 0
    published: float = 0.0
    took: float = 0.0
    saved: float = 0.0
    unsure: bool = False


def parse_policy(data: object) -> Policy:
    """The policy that a JSON object describes. PolicyError names the first field that is wrong."""
    if not isinstance(data, Mapping):
        raise PolicyError("", data, "a JSON object with a `kind`")
    try:
        made: Policy = TypeAdapter(Policy).validate_json(_as_json(data))
        return made
    except ValidationError as error:
        raise _refused(error) from None


def _as_json(data: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(data)).encode()
    except (TypeError, ValueError) as error:
        raise PolicyError("", dict(data), "a JSON object with a `kind`") from error


def _refused(error: ValidationError) -> PolicyError:
    first = error.errors(include_url=False)[0]
    path = [str(p) for p in first["loc"]]
    if path and path[0] in KINDS:
        path = path[1:]
    accepted = first["msg"]
    if first["type"].startswith("union_tag"):
        path, accepted = ["kind"], f"one of {', '.join(KINDS)}"
    elif first["type"] == "extra_forbidden":
        accepted = "no field of this name"
    return PolicyError(".".join(path), first["input"], accepted)


class PolicyKeeper:
    """Everything the policy actor does. Not thread-safe: one caller at a time, as in an actor.

    clock: seconds that pass, by which all ages go; timer: seconds of work; calendar: seconds since the epoch, for the record only: it may
    be set while the actor runs.
    """

    def __init__(
        self,
        store: StateStore,
        clock: Callable[[], float] = time.monotonic,
        settings: KeeperSettings | None = None,
        timer: Callable[[], float] = time.thread_time,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._clock, self._settings, self._timer = store, clock, settings or KeeperSettings(), timer
        self._calendar = calendar
        self._models: dict[str, Entry] = {}
        self._refused_reports = 0
        self._unsaved = 0
        self._version = self._ceiling = int(self._recall("policy/version").get("ceiling", 0))
        for name in self._recall("policy/models").get("names", []):
            self._recover(name, GoodputPolicy(), Limits())

    def register(self, model: str, default: Value | None = None, limits: Limits | None = None, device: str | None = None) -> Plan:
        """Make a model known, with the policy in force until somebody changes it; the answer is as of `plan`. Registering again changes
        only the defaults.

        PolicyError if the default is not a policy.
        """
        policy = parse_policy(default) if default is not None else GoodputPolicy()
        known = self._models.get(model)
        before = (known.policy, known.limits) if known else None
        if known is None:
            known = self._recover(model, policy, limits or Limits())
            self._store.put("policy/models", {"names": sorted(self._models)})
        else:
            known.limits = limits or known.limits
            known.policy = policy if known.revision == 0 and default is not None else known.policy
        if (known.policy, known.limits) != before:
            self._publish(known)
        return self.plan(model, device)

    def report(self, telemetry: Telemetry) -> Plan | None:
        """Take in what a replica measured; the answer is the plan if the replica's is older. Nonsense is counted and not learned from.

        UnknownModel if the model was never registered.
        """
        entry = self._entry(telemetry.model)
        now = self._clock()
        try:
            clean = telemetry.validated()
        except (ValueError, TypeError, AttributeError):
            self._refused_reports += 1
            return next(reversed(entry.plans.values()), None)
        behind = self._version < clean.plan_version <= FARTHEST
        self._version = clean.plan_version if behind else self._version
        news = len(clean.steps) + MANY * MOST * entry.fleet.unlike(clean)
        fresh = entry.fleet.take(clean, now)
        if fresh:
            entry.past.add(clean, now)
            news += MANY * MOST * entry.fleet.turning(clean.replica)
            entry.steps, entry.news = entry.steps + len(clean.steps), entry.news + news
        if fresh or behind:
            self._refresh(entry, now, at_once=behind)
        plan = self.plan(entry.name, clean.device)
        return plan if plan.version != clean.plan_version else None

    def plan(self, model: str, device: str | None = None) -> Plan:
        """The plan in force for replicas on a device, or on that of most replicas. UnknownModel."""
        entry = self._entry(model)
        if not entry.plans:
            self._publish(entry)
        if device is None:
            device = next(reversed(entry.plans))
        if device not in entry.plans:
            version = next(iter(entry.plans.values())).version
            entry.plans = {device: self._made(entry, version, device, self._clock())} | entry.plans
        return entry.plans[device]

    def policy(self, model: str) -> Value:
        """The policy in force with the version of it. UnknownModel."""
        entry = self._entry(model)
        return {
            "model": model,
            "version": entry.revision,
            "policy": entry.policy.model_dump(mode="json"),
            "plan_version": self.plan(model).version,
        }

    def put_policy(
        self, model: str, policy: Value, who: str, why: str = "", expected_version: int | None = None, dry_run: bool = False
    ) -> Value:
        """Replace the policy, durably, and publish it. With `dry_run` nothing changes, and the answer says what would be decided now, and
        what the policy would have made of the last minutes.

        UnknownModel; PolicyError if any field is wrong; PolicyConflict if `expected_version` is not the version in force; StoreError if it
        could not be made durable. Nothing is applied when any of these is raised.
        """
        return self._change(self._entry(model), parse_policy(policy), who, why, expected_version, dry_run)

    def patch_policy(
        self, model: str, changes: Value, who: str, why: str = "", expected_version: int | None = None, dry_run: bool = False
    ) -> Value:
        """Change some fields of the policy: merged into the one in force (or into the defaults of another `kind`), then as `put_policy`."""
        entry = self._entry(model)
        if not isinstance(changes, Mapping):
            raise PolicyError("", changes, "a JSON object of fields to change")
        same = changes.get("kind", entry.policy.model_dump()["kind"]) == entry.policy.model_dump()["kind"]
        merged = (entry.policy.model_dump(mode="json") if same else {}) | dict(changes)
        return self._change(entry, parse_policy(merged), who, why, expected_version, dry_run)

    def history(self, model: str, count: int | None = None) -> list[Value]:
        """Every change of the policy, oldest first: who, why, at (seconds since the epoch), from, to, version. Those that cannot be read
        are left out.

        UnknownModel, StoreError."""
        return [change for change in self._changes(self._entry(model).name, count) if change]

    def load(self) -> Value:
        """What every model does now, and what speculation is worth, as a JSON object. A model that cannot be told of is left out."""
        now = self._clock()
        found = ((name, self._summed(entry, now)) for name, entry in sorted(self._models.items()))
        models = {name: summary for name, summary in found if summary is not None}
        return {"at": self._calendar(), "models": models, "refused_reports": self._refused_reports, "unsaved": self._unsaved}

    def save(self) -> None:
        """Save what was learned of every model. StoreError."""
        for entry in self._models.values():
            self._store.put(f"policy/learned/{entry.name}", entry.fleet.to_dict())

    def _entry(self, model: str) -> Entry:
        if model not in self._models:
            raise UnknownModel(f"no model {model!r}; known are {', '.join(sorted(self._models)) or 'none'}")
        return self._models[model]

    def _recover(self, model: str, policy: Policy, limits: Limits) -> Entry:
        """The model as the store remembers it."""
        entry = Entry(model, policy, 0, limits, saved=self._clock())
        self._reread(entry)
        entry.fleet = Fleet.from_dict(self._recall(f"policy/learned/{model}"))
        self._models[model] = entry
        return entry

    def _recall(self, key: str) -> Value:
        """A value that is found again if it is lost: replicas know the model and how far plans have come, and everything is learned anew.

        So one that cannot be read counts as none, with a line in the log. StoreError.
        """
        try:
            return self._store.get(key) or {}
        except Unreadable as error:
            log.warning("the policy actor goes on without what cannot be read: %s", error)
            return {}

    def _changes(self, model: str, count: int | None = None) -> list[Value]:
        """The history of the policy, with empty entries where there are some that cannot be read. StoreError."""
        found = self._store.entries(f"policy/{model}", count, {})
        return [change if isinstance(change.get("version"), int) and "to" in change else {} for change in found]

    def _change(self, entry: Entry, policy: Policy, who: str, why: str, expected: int | None, dry_run: bool) -> Value:
        self._settle(entry)
        if expected is not None and expected != entry.revision:
            raise PolicyConflict(f"the policy of {entry.name!r} is at version {entry.revision}, not {expected}")
        if dry_run:
            return self._answer(entry, policy, entry.revision) | {"dry_run": True, **self._rehearsed(entry, policy)}
        if policy == entry.policy and entry.revision:
            return self._answer(entry, policy, entry.revision)
        version = entry.revision + 1
        change = {"model": entry.name, "who": who, "why": why, "at": self._calendar(), "version": version}
        change |= {"from": entry.policy.model_dump(mode="json"), "to": policy.model_dump(mode="json")}
        reserved = self._next_version()
        entry.unsure = True
        self._store.append(f"policy/{entry.name}", change)
        entry.policy, entry.revision, entry.unsure = policy, version, False
        self._publish(entry, reserved)
        return self._answer(entry, policy, version)

    def _settle(self, entry: Entry) -> None:
        """Find out what became of a change that the store did not confirm: it holds if it is there. StoreError."""
        if not entry.unsure:
            return
        before = entry.revision
        self._reread(entry)
        entry.unsure = False
        if entry.revision != before:
            self._publish(entry)

    def _reread(self, entry: Entry) -> None:
        """Take over the latest change that the store holds, if there is one. Those after it that cannot be read have a version each."""
        changes = self._changes(entry.name, 1)
        if changes == [{}]:
            changes = self._changes(entry.name)
        unread = next((i for i, change in enumerate(reversed(changes)) if change), len(changes))
        last = changes[-1 - unread] if unread < len(changes) else {"version": 0}
        if changes:
            entry.revision = last["version"] + unread
        if "to" in last:
            with contextlib.suppress(PolicyError):  # a kind or field of another release: the default stands until somebody changes it
                entry.policy = parse_policy(last["to"])

    def _answer(self, entry: Entry, policy: BaseModel, version: int) -> Value:
        plan = self.plan(entry.name).version
        return {"model": entry.name, "version": version, "policy": policy.model_dump(mode="json"), "plan_version": plan}

    def _refresh(self, entry: Entry, now: float, at_once: bool) -> None:
        """Publish and save if it is time to; `at_once` when a replica follows a later plan than any known here, as after a loss."""
        try:
            if at_once or self._due(entry, now):
                self._publish(entry)
            if now - entry.saved >= self._settings.save:
                entry.saved = now
                self._settle(entry)
                self._store.put(f"policy/learned/{entry.name}", entry.fleet.to_dict())
        except StoreError:
            self._unsaved += 1

    def _due(self, entry: Entry, now: float) -> bool:
        """Whether there is news enough for a plan: soon while little is known, seldom later, as replicas think anew with each."""
        if not entry.plans:
            return True
        age, least = now - entry.published, max(self._settings.publish, LEISURE * entry.took)
        enough = min(PART * entry.steps, MANY * len(entry.fleet.replicas))
        return entry.news > 0 and age >= least and (entry.news >= enough or age >= SELDOM * least)

    def _publish(self, entry: Entry, reserved: int | None = None) -> Plan:
        """New plans of what is known now, under the version reserved for them or else the next; that for most replicas."""
        now, begun, version = self._clock(), self._timer(), reserved or self._next_version()
        entry.fleet.forget(now - self._settings.gone)
        entry.limits = entry.fleet.limits(now - self._settings.stale) or entry.limits
        entry.survival = entry.fleet.curves(max(entry.limits.max_depth, 1), now - self._settings.stale)
        entry.plans = {device: self._made(entry, version, device, now) for device in entry.fleet.devices() or [""]}
        entry.news, entry.published, entry.took = 0, now, self._timer() - begun
        return next(reversed(entry.plans.values()))

    def _made(self, entry: Entry, version: int, device: str, now: float) -> Plan:
        cost, policy = entry.fleet.cost(now - self._settings.stale, device), entry.policy
        return Plan.of(version, entry.name, policy, cost, entry.survival, entry.limits, self._calendar())

    def _next_version(self) -> int:
        """Versions rise over restarts: a block of them is reserved in the store before any of it is used."""
        if self._version >= self._ceiling:
            self._store.put("policy/version", {"ceiling": self._version + BLOCK})
            self._ceiling = self._version + BLOCK
        self._version += 1
        return self._version

    def _summed(self, entry: Entry, now: float) -> Value | None:
        """None, and a line in the log, if it cannot be told: that is no reason to tell nothing of the other models."""
        try:
            return self._summary(entry, now)
        except Exception:
            log.exception("the load of %s cannot be told", entry.name)
            return None

    def _summary(self, entry: Entry, now: float) -> Value:
        live = entry.fleet.live(now - self._settings.stale)
        plan = self.plan(entry.name)
        forecast = plan.forecast(*typical(live))
        return {
            "policy": entry.policy.model_dump(mode="json"),
            "policy_version": entry.revision,
            "plan_version": plan.version,
            **load_now(entry.fleet, live, now),
            "survival": [round(plan.survival.survive(d), 4) for d in range(1, plan.limits.max_depth + 1)],
            "calibration_error": round(plan.survival.error, 4),
            "expected": _expected(forecast),
            "why": why(plan, forecast),
        }

    def _rehearsed(self, entry: Entry, policy: Policy) -> Value:
        """What the policy would decide for the present load, and what it would have made of the last minutes."""
        now = self.plan(entry.name)
        proposed = Plan.of(now.version, entry.name, policy, now.cost, now.knowledge.curves, now.limits, now.published)
        present = proposed.forecast(*typical(entry.fleet.live(self._clock() - self._settings.stale)))
        return {"forecast": _expected(present), "why": why(proposed, present), "replay": entry.past.told(now, proposed)}


def why(plan: Plan, forecast: Forecast) -> str:
    """In words, what a plan decides at that load, and what for."""
    requests, depth = max(len(forecast.decisions), 1), max((d.depth for d in forecast.decisions), default=0)
    load = f"{requests} request{'s' * (requests > 1)}"
    if not isinstance(plan.policy, GoodputPolicy):
        return f"policy {plan.policy.kind} drafts {depth} deep for {load}"
    if forecast.off_seconds is None:
        return f"no step without drafts was measured yet: {depth} deep until then"
    if not depth:
        return f"off: for {load} no draft is expected to yield {plan.policy.margin:.0%} more tokens a second than steps without drafts"
    drafting, rows, tokens = sum(d.depth > 0 for d in forecast.decisions), forecast.rows - requests, forecast.tokens - requests
    gain = "" if forecast.gain is None else f", {forecast.gain:+.0%} tokens a second over off"
    return f"{drafting} of {load} draft up to {depth} deep; {rows:.1f} drafted rows are verified for {tokens:.1f} tokens{gain}"


def _expected(forecast: Forecast) -> Value:
    """A forecast as JSON: depths, tokens and seconds per step, the same at depth 0, and the gain (0.1 is ten per cent)."""
    depths = [d.depth for d in forecast.decisions]
    return {
        "depth_mean": sum(depths) / len(depths) if depths else 0.0,
        "depth_max": max(depths, default=0),
        "tokens_per_step": forecast.tokens,
        "step_seconds": forecast.seconds,
        "off_step_seconds": forecast.off_seconds,
        "gain_over_off": forecast.gain,
    }


class PolicyActor:
    """The Ray actor's body: a thin shell around `PolicyKeeper`. Make it with `start_policy`."""

    def __init__(self, state_url: str, models: Mapping[str, Value | None] | None = None, settings: KeeperSettings | None = None) -> None:
        self._keeper = PolicyKeeper(open_state(state_url), settings=settings)
        for model, default in (models or {}).items():
            self._keeper.register(model, default)

    async def register(self, model: str, default: Value | None = None, limits: Limits | None = None, device: str | None = None) -> Plan:
        return self._keeper.register(model, default, limits, device)

    async def report(self, telemetry: Telemetry) -> Plan | None:
        return self._keeper.report(telemetry)

    async def plan(self, model: str, device: str | None = None) -> Plan:
        return self._keeper.plan(model, device)

    async def policy(self, model: str) -> Value:
        return self._keeper.policy(model)

    async def put_policy(
        self, model: str, policy: Value, who: str, why: str = "", expected_version: int | None = None, dry_run: bool = False
    ) -> Value:
        return self._keeper.put_policy(model, policy, who, why, expected_version, dry_run)

    async def patch_policy(
        self, model: str, changes: Value, who: str, why: str = "", expected_version: int | None = None, dry_run: bool = False
    ) -> Value:
        return self._keeper.patch_policy(model, changes, who, why, expected_version, dry_run)

    async def history(self, model: str, count: int | None = None) -> list[Value]:
        return self._keeper.history(model, count)

    async def load(self) -> Value:
        return self._keeper.load()

    async def save(self) -> None:
        self._keeper.save()


def start_policy(
    state_url: str,
    models: Mapping[str, Value | None] | None = None,
    settings: KeeperSettings | None = None,
    name: str = NAME,
    namespace: str = "specfleet",
) -> Any:
    """The handle of the named policy actor, started if there is none; it is restarted whenever it dies and recovers from its state store.

    models: default policy per model, None for goodput. Calls made while it is away raise `ray.exceptions.RayActorError` and are not
    repeated, so no change is made twice; a replica keeps its plan and reports again. ValueError if the URL names no store.
    """
    check_state(state_url)
    actor = ray.remote(PolicyActor).options(
        name=name, namespace=namespace, get_if_exists=True, lifetime="detached", max_restarts=-1, max_task_retries=0, num_cpus=0.01
    )
    return actor.remote(state_url, dict(models or {}), settings)
