"""The speculator registry: every model's versions, what became of them and why, and what replicas are to serve.

`RegistryKeeper` is all of it without Ray: a state store, a place for bundles, a clock. A model's state is the fold of its history in the
store, and every change is one append to that, so whoever dies at any moment leaves either the state before or the state after. Whoever
changes reads the history first and again afterwards, so two that change at once, even in two processes, cannot both believe that they did.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from actors.artefacts import Artefacts, check_artefacts
from actors.policy import UnknownModel
from actors.releases import Assignment, Base, Change, Placement, RegistryConflict, Release, Releases, ReplicaReport
from actors.store import StateStore, StoreError, Value, check_state, open_state
from drafters.bundle import BundleError, Manifest
from policies import Arm, CanaryRule, CanaryVerdict, Verdict, judge

NAME = "specfleet-registry"
CONFIGURATION = "configuration"  # who registers what the settings name
ITSELF = "canary"  # who begins and decides one that nobody asked for
MOST = 4096  # replicas remembered


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """stale: seconds without a report after which a replica has no say; gone: after which it is forgotten; retry: seconds between attempts
    to reach a store that was away, where nobody asked for one; automatic: candidates become canaries by themselves, the latest first; rule:
    how canaries are judged."""

    stale: float = 5.0
    gone: float = 60.0
    retry: float = 5.0
    automatic: bool = True
    rule: CanaryRule = field(default_factory=CanaryRule)


@dataclass(slots=True)
class Replica:
    """The last report of a replica and when it came."""

    last: ReplicaReport
    seen: float


@dataclass(slots=True)
class Entry:
    """One model. arms: what each replica, by name, counted for the canary with this salt; totals: the same of all replicas. doubtful: the
    history may hold more than `releases`. tried: when that was last looked into, or a decision last failed."""

    name: str
    releases: Releases
    replicas: dict[str, Replica] = field(default_factory=dict)
    arms: dict[str, dict[str, Arm]] = field(default_factory=dict)
    totals: dict[str, Arm] = field(default_factory=dict)
    salt: str = ""
    doubtful: bool = False
    tried: float = -math.inf

    def canary(self, rule: CanaryRule) -> CanaryVerdict | None:
        """How the canary stands, over all replicas that served it."""
        canary, live = self.releases.canary, self.releases.live
        if canary is None or live is None:
            return None
        return judge(self.totals.get(live, Arm()), self.totals.get(canary.placement.version, Arm()), rule)

    def count(self, report: ReplicaReport) -> None:
        """Take in what a replica counted for the canary that runs, in the place of what it had counted before."""
        canary, live = self.releases.canary, self.releases.live
        if self.salt != (canary.salt if canary else ""):
            self.salt, self.arms, self.totals = canary.salt if canary else "", {}, {}
        if canary is None or report.salt != self.salt:
            return
        before = self.arms.get(report.replica, {})
        told = {v: arm for v, arm in report.arms.items() if v in (live, canary.placement.version)}
        if all(told.get(v, Arm()).requests >= arm.requests for v, arm in before.items()):
            self.arms[report.replica] = told
            for version, arm in told.items():
                self.totals[version] = self.totals.get(version, Arm()) + arm - before.get(version, Arm())


class RegistryKeeper:
    """Everything the registry actor does. Not thread-safe but for `inspect`: one caller at a time, as in an actor.

    What changes something takes who and why for the history and, as `expected`, the revision that the caller saw. It raises UnknownModel,
    UnknownVersion, RegistryConflict if the change does not fit the state that holds, StoreError if it could not be made durable; then
    nothing changed, unless the store took the change and could not say so, which the history tells as soon as it can be read again.
    """

    def __init__(
        self,
        store: StateStore,
        artefacts: Artefacts,
        clock: Callable[[], float] = time.time,
        settings: RegistrySettings | None = None,
    ) -> None:
        self._store, self._artefacts, self._clock = store, artefacts, clock
        self._settings = settings or RegistrySettings()
        self._models: dict[str, Entry] = {}
        self._away = -math.inf
        self._refused_reports = self._undone = 0

    # -- changes ------------------------------------------------------------------------------------------------------------

    def register(self, model: str, base: Base, url: str = "", manifest: Manifest | None = None) -> Assignment:
        """Make a model known, with the speculator it was configured with, if any. Doing it again changes nothing, or, if the configuration
        is another, what the configuration had brought about; a version that was promoted stays. Another base ends what the last one had.
        """
        placement = Placement(manifest.version, url, manifest.checksum) if manifest else None
        values = manifest.model_dump(mode="json") if manifest else None
        try:
            entry = self._entry(model)
        except UnknownModel:
            entry = Entry(model, Releases())
        if entry.releases.register(base, placement, values) is not None:
            self._commit(entry, lambda now: now.register(base, placement, values), CONFIGURATION, "as configured")
        self._models[model] = entry
        return entry.releases.assignment(model)

    def inspect(self, model: str, url: str, manifest: Manifest) -> str:
        """Why the bundle at a URL must not be loaded for the model, "" if it may: fetches and checks every byte, so it takes its time.

        UnknownModel; ArtefactError if the URL cannot be reached.
        """
        base = self._entry(model).releases.base
        sizes = (base.vocab_size, base.emb_dim) if base else (None, None)
        try:
            found = self._artefacts.fetch(url, manifest.checksum, *sizes).manifest
        except BundleError as error:
            return str(error)
        if found.model != model:
            return f"wrong model: it drafts for {found.model!r}, not for {model!r}"
        if base is not None and (found.base, found.base_revision) != (base.name, base.revision):
            return f"wrong base: it drafts for {found.base} {found.base_revision}, the model's base is {base.name} {base.revision}"
        return "" if found == manifest else "its manifest is not the one that was submitted"

    def submit(
        self, model: str, url: str, manifest: Manifest, verdict: Verdict, who: str, why: str = "", problem: str | None = None
    ) -> Value:
        """Take in a new version: a candidate if it passed the gate and may be loaded, else rejected. A known version stays what it is; the
        answer's `state` says which. problem: what `inspect` answered, asked now if it is None; ArtefactError as there."""
        entry = self._entry(model)
        placement = Placement(manifest.version, url, manifest.checksum)
        if manifest.version not in entry.releases.versions:
            wrong = self.inspect(model, url, manifest) if problem is None else problem
            reason = ". ".join(part for part in (wrong, verdict.reason, why) if part)
            values = manifest.model_dump(mode="json")
            self._commit(entry, lambda now: now.submit(placement, values, verdict, wrong), who, reason)
        return self._answer(entry, manifest.version)

    def start_canary(
        self, model: str, version: str, who: str, why: str = "", share: float | None = None, expected: int | None = None
    ) -> Value:
        """Let a version serve a share of requests (the rule's if None). It is promoted or rolled back by itself. ValueError for a share
        that cannot be."""
        part = self._settings.rule.share if share is None else share
        salt = f"{version}-{secrets.token_hex(4)}"
        return self._change(model, lambda now: now.start_canary(version, part, salt), who, why, expected, version)

    def promote(self, model: str, version: str, who: str, why: str = "", expected: int | None = None) -> Value:
        """Make a version the live one everywhere."""
        return self._change(model, lambda now: now.promote(version), who, why, expected, version)

    def rollback(self, model: str, who: str, why: str = "", version: str | None = None, expected: int | None = None) -> Value:
        """End the canary if one runs, else go back to the version that was live before; `version` says which of the two is meant."""
        return self._change(model, lambda now: now.roll_back(version), who, why, expected, version)

    def pin(self, model: str, version: str, who: str, why: str = "", expected: int | None = None) -> Value:
        """Make a version live and have nothing change by itself until `unpin`."""
        return self._change(model, lambda now: now.pin(version), who, why, expected, version)

    def unpin(self, model: str, who: str, why: str = "", expected: int | None = None) -> Value:
        """Let canaries be tried again."""
        return self._change(model, lambda now: now.unpin(), who, why, expected)

    def retire(self, model: str, version: str, who: str, why: str = "", expected: int | None = None) -> Value:
        """Withdraw a candidate."""
        return self._change(model, lambda now: now.retire(version), who, why, expected, version)

    # -- what replicas call -------------------------------------------------------------------------------------------------

    def assignment(self, model: str) -> Assignment:
        """What the model's replicas are to serve. UnknownModel, and StoreError if that cannot be known now."""
        entry = self._entry(model)
        self._settle(entry)
        return entry.releases.assignment(model)

    def report(self, report: ReplicaReport) -> Assignment | None:
        """Take in what a replica runs and counted, and decide or begin a canary if that can be done. The answer is the assignment if the
        replica follows another one. Nonsense is counted and nothing else. UnknownModel, StoreError as in `assignment`."""
        assignment = self.assignment(report.model)
        entry = self._models[report.model]
        try:
            clean = report.validated()
        except (ValueError, TypeError, AttributeError):
            self._refused_reports += 1
            return assignment
        if self._take(entry, clean):
            self._decide(entry, clean)
        now = entry.releases.assignment(entry.name)
        return now if now.revision != clean.revision else None

    # -- what operators read ------------------------------------------------------------------------------------------------

    def state(self, model: str) -> Value:
        """The versions in order of becoming known, what is live, the canary and how it stands, and what every replica runs, as JSON."""
        entry = self._entry(model)
        self._settle(entry)
        now = self._clock()
        return {
            **self._answer(entry),
            "canary": self._canary(entry),
            "versions": [shown(release) for release in entry.releases.versions.values()],
            "replicas": {name: self._replica(entry, r, now) for name, r in sorted(entry.replicas.items())},
            "refused_reports": self._refused_reports,
            "undone_decisions": self._undone,
        }

    def history(self, model: str, count: int | None = None) -> list[Value]:
        """Every change, oldest first: who, why, at (seconds since the epoch), action, version, from and to (the live version before and
        after), states (by version, those that changed), revision. UnknownModel, StoreError."""
        return self._store.entries(stream(self._entry(model).name), count)

    # -- inside -------------------------------------------------------------------------------------------------------------

    def _entry(self, model: str) -> Entry:
        """The model, from the store if this keeper has not met it. UnknownModel, StoreError."""
        if model not in self._models:
            if 0 <= self._clock() - self._away < self._settings.retry:
                raise StoreError(f"the store was away {self._clock() - self._away:.1f} s ago")
            made = Entry(model, Releases())
            try:
                self._sync(made)
            except StoreError:
                self._away = self._clock()
                raise
            if not made.releases.revision:
                raise UnknownModel(f"no model {model!r} is registered; known are {', '.join(sorted(self._models)) or 'none'}")
            self._models[model] = made
        return self._models[model]

    def _sync(self, entry: Entry) -> None:
        """Bring the state to the end of the history. StoreError."""
        entry.doubtful = True
        entry.releases = Releases(self._store.entries(stream(entry.name)))
        entry.doubtful = False

    def _settle(self, entry: Entry) -> None:
        """Look again, now and then, for what became of a change that the store may or may not have taken."""
        if entry.doubtful and not 0 <= self._clock() - entry.tried < self._settings.retry:
            try:
                self._sync(entry)
                entry.tried = -math.inf
            except StoreError:
                entry.tried = self._clock()

    def _change(
        self, model: str, plan: Callable[[Releases], Change], who: str, why: str, expected: int | None, version: str | None = None
    ) -> Value:
        entry = self._entry(model)
        self._commit(entry, plan, who, why, expected)
        return self._answer(entry, version)

    def _commit(self, entry: Entry, plan: Callable[[Releases], Change | None], who: str, why: str, expected: int | None = None) -> None:
        """Plan against the history as it is, append, and see whether the append came first."""
        self._sync(entry)
        now = entry.releases
        if expected is not None and expected != now.revision:
            raise RegistryConflict(f"the speculators of {entry.name!r} are not at revision {expected} any more: {now.summary()}")
        planned = plan(now)
        if planned is None:
            return
        change = replace(planned, revision=now.revision + 1, id=secrets.token_hex(8), at=self._clock(), who=who, why=why, before=now.live)
        entry.doubtful = True
        self._store.append(stream(entry.name), change.to_json())
        self._confirm(entry, change)

    def _confirm(self, entry: Entry, change: Change) -> None:
        """The state after a change that the store took. RegistryConflict if another writer's change came before it."""
        try:
            self._sync(entry)
        except StoreError:
            entry.releases.apply(change.to_json())
        if change.id not in entry.releases.ids:
            raise RegistryConflict(f"somebody else changed the speculators of {entry.name!r} just now: {entry.releases.summary()}")

    def _take(self, entry: Entry, report: ReplicaReport) -> bool:
        """Remember a report; False if there are too many replicas for that."""
        now = self._clock()
        for name in [n for n, r in entry.replicas.items() if r.seen < now - self._settings.gone]:
            del entry.replicas[name]
        if report.replica not in entry.replicas and len(entry.replicas) >= MOST:
            return False
        entry.replicas[report.replica] = Replica(report, now)
        entry.count(report)
        return True

    def _decide(self, entry: Entry, report: ReplicaReport) -> None:
        """Promote, roll back or begin a canary if that can be done after this report; what cannot be stored is tried again later."""
        if 0 <= self._clock() - entry.tried < self._settings.retry:
            return
        try:
            if entry.releases.canary is None:
                self._begin(entry)
            else:
                self._end(entry, entry.releases.canary.placement.version, report)
        except (StoreError, RegistryConflict):
            entry.tried = self._clock()
            self._undone += 1

    def _begin(self, entry: Entry) -> None:
        """Try the candidate that waits, if any does."""
        version = entry.releases.waiting() if self._settings.automatic else None
        if version is not None:
            self.start_canary(entry.name, version, ITSELF, "it passed the gate", expected=entry.releases.revision)

    def _end(self, entry: Entry, version: str, report: ReplicaReport) -> None:
        """Promote the canary or roll it back, if either is due."""
        verdict, now = entry.canary(self._settings.rule), entry.releases.revision
        problem = self._unloadable(entry, version) if version in report.errors else ""
        if problem:
            self.rollback(entry.name, ITSELF, problem, version, now)
        elif verdict and verdict.outcome == "promote":
            self.promote(entry.name, version, ITSELF, verdict.reason, now)
        elif verdict and verdict.outcome == "roll_back":
            self.rollback(entry.name, ITSELF, verdict.reason, version, now)

    def _unloadable(self, entry: Entry, version: str) -> str:
        """Why no replica can load the version, "" if one can, or may yet."""
        fresh = [r.last for r in entry.replicas.values() if r.seen >= self._clock() - self._settings.stale]
        errors = [report.errors[version] for report in fresh if version in report.errors]
        return f"no replica can load it: {errors[0]}" if errors and len(errors) == len(fresh) else ""

    def _answer(self, entry: Entry, version: str | None = None) -> Value:
        now = entry.releases
        canary = now.canary.placement.version if now.canary else None
        answer = {"model": entry.name, "revision": now.revision, "live": now.live, "canary": canary, "pinned": now.pinned}
        return answer | ({"version": version, "state": now.known(version).state} if version else {})

    def _canary(self, entry: Entry) -> Value | None:
        """The canary as JSON: the interval is null while there is none."""
        canary, verdict = entry.releases.canary, entry.canary(self._settings.rule)
        if canary is None or verdict is None:
            return None
        stands = {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in asdict(verdict).items()}
        return {"version": canary.placement.version, "share": canary.share, **stands}

    def _replica(self, entry: Entry, replica: Replica, now: float) -> Value:
        """What a replica runs as JSON. agrees: it drafts with the live version, bit for bit as far as it says."""
        live, last = entry.releases.live, replica.last
        checksum = last.loaded.get(live or "", "")
        agrees = last.serving == (live or "") and (not live or checksum in ("", entry.releases.versions[live].placement.checksum))
        return {
            "serving": last.serving or None,
            "loaded": dict(last.loaded),
            "errors": dict(last.errors),
            "revision": last.revision,
            "agrees": agrees,
            "age": round(now - replica.seen, 3),
        }


def stream(model: str) -> str:
    """The stream of a model's history."""
    return f"registry/{model}"


def shown(release: Release) -> Value:
    """A version as JSON."""
    known = ("parent", "base", "base_revision", "objective", "data", "metrics", "created")
    return {
        "version": release.placement.version,
        "state": release.state,
        "why": release.why,
        "at": release.at,
        "url": release.placement.url,
        "checksum": release.placement.checksum,
        "initial": release.initial,
        "gate": release.verdict,
        **{name: release.manifest.get(name) for name in known},
    }


class RegistryActor:
    """The Ray actor's body: a thin shell around `RegistryKeeper`. Make it with `start_registry`."""

    def __init__(self, state_url: str, artefacts_url: str, cache: str, settings: RegistrySettings | None = None) -> None:
        self._keeper = RegistryKeeper(open_state(state_url), Artefacts(artefacts_url, Path(cache)), time.time, settings)

    async def register(self, model: str, base: Base, url: str = "", manifest: Manifest | None = None) -> Assignment:
        return self._keeper.register(model, base, url, manifest)

    async def submit(self, model: str, url: str, manifest: Manifest, verdict: Verdict, who: str, why: str = "") -> Value:
        """Replicas are answered while the bundle is fetched and checked."""
        problem = await asyncio.to_thread(self._keeper.inspect, model, url, manifest)
        return self._keeper.submit(model, url, manifest, verdict, who, why, problem)

    async def start_canary(
        self, model: str, version: str, who: str, why: str = "", share: float | None = None, expected: int | None = None
    ) -> Value:
        return self._keeper.start_canary(model, version, who, why, share, expected)

    async def promote(self, model: str, version: str, who: str, why: str = "", expected: int | None = None) -> Value:
        return self._keeper.promote(model, version, who, why, expected)

    async def rollback(self, model: str, who: str, why: str = "", version: str | None = None, expected: int | None = None) -> Value:
        return self._keeper.rollback(model, who, why, version, expected)

    async def pin(self, model: str, version: str, who: str, why: str = "", expected: int | None = None) -> Value:
        return self._keeper.pin(model, version, who, why, expected)

    async def unpin(self, model: str, who: str, why: str = "", expected: int | None = None) -> Value:
        return self._keeper.unpin(model, who, why, expected)

    async def retire(self, model: str, version: str, who: str, why: str = "", expected: int | None = None) -> Value:
        return self._keeper.retire(model, version, who, why, expected)

    async def assignment(self, model: str) -> Assignment:
        return self._keeper.assignment(model)

    async def report(self, report: ReplicaReport) -> Assignment | None:
        return self._keeper.report(report)

    async def state(self, model: str) -> Value:
        return self._keeper.state(model)

    async def history(self, model: str, count: int | None = None) -> list[Value]:
        return self._keeper.history(model, count)

    async def close(self) -> None:
        """Nothing is unsaved: every change is in the store before it is made."""


def start_registry(
    state_url: str,
    artefacts_url: str,
    cache: str,
    settings: RegistrySettings | None = None,
    name: str = NAME,
    namespace: str = "specfleet",
) -> Any:
    """The handle of the named registry actor, started if there is none; it is restarted whenever it dies and recovers from its state store.

    cache: a folder for bundles on the machine that it runs on. Calls made while it is away raise `ray.exceptions.RayActorError` and are not
    repeated, so no change is made twice; replicas keep what they serve. ValueError if either URL names nothing.
    """
    check_state(state_url)
    check_artefacts(artefacts_url)
    actor = ray.remote(RegistryActor).options(
        name=name, namespace=namespace, get_if_exists=True, lifetime="detached", max_restarts=-1, max_task_retries=0, num_cpus=0.01
    )
    return actor.remote(state_url, artefacts_url, cache, settings)
