"""The speculator registry: every model's versions, what became of them and why, and what replicas are to serve.

A model has a common line of versions, and one for each domain of its requests, named by their tag; a domain without a live version is
served by that of the common line. `RegistryKeeper` is all of it without Ray: a state store, a place for bundles, a clock. A line's state is
the fold of its history in the store, and every change is one append to that, so whoever dies at any moment leaves either the state before
or the state after. Whoever changes reads the history first and again afterwards, so two that change at once, even in two processes, cannot
both believe that they did.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from actors.artefacts import Artefacts, check_artefacts
from actors.policy import UnknownModel
from actors.releases import Assignment, Base, Change, Parent, Placement, RegistryConflict, Release, Releases, ReplicaReport
from actors.store import StateStore, StoreError, Value, check_state, open_state
from drafters.bundle import BundleError, Manifest
from policies import Arm, CanaryRule, CanaryVerdict, Verdict, judge

NAME = "specfleet-registry"
CONFIGURATION = "configuration"  # who registers what the settings name
ITSELF = "canary"  # who begins and decides one that nobody asked for
MOST = 4096  # replicas remembered
UNSAID = "no reason given"


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
    """One line. run: the salt of the canary that is counted, and the version beside it. arms: what each replica, by name, counted for that;
    totals: the same of all replicas. doubtful: the history may hold more than `releases`. tried: when that was last looked into, or a
    decision last failed."""

    model: str
    tag: str
    releases: Releases = field(default_factory=Releases)
    replicas: dict[str, Replica] = field(default_factory=dict)
    arms: dict[str, dict[str, Arm]] = field(default_factory=dict)
    totals: dict[str, Arm] = field(default_factory=dict)
    run: tuple[str, str] | None = None
    doubtful: bool = False
    tried: float = -math.inf

    @property
    def name(self) -> str:
        """In messages."""
        return f"{self.model!r} in the domain {self.tag!r}" if self.tag else f"{self.model!r}"

    def canary(self, against: str | None, rule: CanaryRule) -> CanaryVerdict | None:
        """How the canary stands against what serves, over all replicas that served both."""
        canary = self.releases.canary
        if canary is None or against is None:
            return None
        self.follow(against)
        return judge(self.totals.get(against, Arm()), self.totals.get(canary.placement.version, Arm()), rule)

    def follow(self, against: str | None) -> None:
        """Count afresh if another canary runs, or beside another version."""
        canary = self.releases.canary
        run = (canary.salt, against) if canary and against else None
        if self.run != run:
            self.run, self.arms, self.totals = run, {}, {}

    def count(self, report: ReplicaReport, against: str | None) -> None:
        """Take in what a replica counted for the canary that runs, in the place of what it had counted before."""
        self.follow(against)
        canary = self.releases.canary
        if canary is None or (report.salt, report.against) != self.run:
            return
        before = self.arms.get(report.replica, {})
        told = {v: arm for v, arm in report.arms.items() if v in (against, canary.placement.version)}
        if all(told.get(v, Arm()).requests >= arm.requests for v, arm in before.items()):
            self.arms[report.replica] = told
            for version, arm in told.items():
                self.totals[version] = self.totals.get(version, Arm()) + arm - before.get(version, Arm())


class RegistryKeeper:
    """Everything the registry actor does. Not thread-safe but for `inspect`: one caller at a time, as in an actor.

    A line is named by its model and its tag; "" is the common line. What changes something takes who and why for the history and, as
    `expected`, the revision of the line that the caller saw. It raises UnknownModel, UnknownVersion, RegistryConflict if the change does
    not fit the state that holds, StoreError if it could not be made durable; then nothing changed, unless the store took the change and
    could not say so, which the history tells as soon as it can be read again.
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
        self._lines: dict[tuple[str, str], Entry] = {}
        self._away = -math.inf
        self._refused_reports = self._undone = 0

    # -- changes ------------------------------------------------------------------------------------------------------------

    def register(
        self, model: str, base: Base, url: str = "", manifest: Manifest | None = None, tags: Sequence[str] = ()
    ) -> tuple[Assignment, ...]:
        """Make a model known, with the speculator it was configured with, if any, and the tags of its domains; the assignments of all its
        lines, the common one first. Doing it again changes nothing, whatever was done in between, or, if the configuration names another
        version than it did last, what the configuration had brought about; a version that was promoted stays. Another base ends what the
        last one had.
        """
        placement = Placement(manifest.version, url, manifest.checksum) if manifest else None
        values = manifest.model_dump(mode="json") if manifest else None
        common = self._register(model, "", lambda now: now.register(base, placement, values))
        return (common, *(self._register(model, tag, lambda now: now.register(base, None, None)) for tag in tags))

    def _register(self, model: str, tag: str, plan: Callable[[Releases], Change | None]) -> Assignment:
        try:
            entry = self._entry(model, tag)
        except UnknownModel:
            entry = Entry(model, tag)
        if plan(entry.releases) is not None:
            self._commit(entry, plan, CONFIGURATION, "as configured")
        self._lines[model, tag] = entry
        return entry.releases.assignment(model, tag)

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
        self,
        model: str,
        url: str,
        manifest: Manifest,
        verdict: Verdict,
        who: str,
        why: str = "",
        problem: str | None = None,
        tag: str = "",
        against: str | None = None,
    ) -> Value:
        """Take in a new version: a candidate if it passed the gate and may be loaded, else rejected. A known version stays what it is; the
        answer's `state` says which. problem: what `inspect` answered, asked now if it is None; ArtefactError as there. against: the version
        that the verdict compares it with, what serves now if it is None."""
        entry = self._entry(model, tag)
        placement = Placement(manifest.version, url, manifest.checksum)
        if manifest.version not in entry.releases.versions:
            wrong = self.inspect(model, url, manifest) if problem is None else problem
            reason = ". ".join(part for part in (wrong, verdict.reason, why) if part)
            values = manifest.model_dump(mode="json")
            self._commit(entry, lambda now: now.submit(placement, values, verdict, wrong, against or self._serving(entry)), who, reason)
        return self._answer(entry, manifest.version)

    def start_canary(
        self, model: str, version: str, who: str, why: str = "", share: float | None = None, expected: int | None = None, tag: str = ""
    ) -> Value:
        """Let a version serve a share of requests (the rule's if None). It is promoted or rolled back by itself. ValueError for a share
        that cannot be."""
        part = self._settings.rule.share if share is None else share
        salt = f"{version}-{secrets.token_hex(4)}"
        entry = self._entry(model, tag)
        return self._change(entry, lambda now: now.start_canary(version, part, salt, self._serving(entry)), who, why, expected, version)

    def promote(self, model: str, version: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        """Make a version the live one everywhere."""
        return self._change(self._entry(model, tag), lambda now: now.promote(version), who, why, expected, version)

    def rollback(
        self, model: str, who: str, why: str = "", version: str | None = None, expected: int | None = None, tag: str = ""
    ) -> Value:
        """End the canary if one runs, else go back to the version that was live before; `version` says which of the two is meant."""
        return self._change(self._entry(model, tag), lambda now: now.roll_back(version), who, why, expected, version)

    def pin(self, model: str, version: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        """Make a version live and have nothing change by itself until `unpin`."""
        return self._change(self._entry(model, tag), lambda now: now.pin(version), who, why, expected, version)

    def unpin(self, model: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        """Let canaries be tried again."""
        return self._change(self._entry(model, tag), lambda now: now.unpin(), who, why, expected)

    def retire(self, model: str, version: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        """Withdraw a candidate."""
        return self._change(self._entry(model, tag), lambda now: now.retire(version), who, why, expected, version)

    # -- what replicas call -------------------------------------------------------------------------------------------------

    def assignment(self, model: str, tag: str = "") -> Assignment:
        """What the model's replicas are to serve. UnknownModel, and StoreError if that cannot be known now."""
        return self._settled(model, tag).releases.assignment(model, tag)

    def reports(self, reports: Sequence[ReplicaReport]) -> list[Assignment]:
        """Take in what a replica runs, a report for each line; the assignments of the lines in which it follows another one. A domain that
        nobody has registered yet is left out: the other lines do not wait for it."""
        answers = (self.report(report) for report in reports if self._registered(report.model, report.tag))
        return [found for found in answers if found is not None]

    def report(self, report: ReplicaReport) -> Assignment | None:
        """Take in what a replica runs and counted, and decide or begin a canary if that can be done. The answer is the assignment if the
        replica follows another one. Nonsense is counted and nothing else. UnknownModel, StoreError as in `assignment`."""
        assignment = self.assignment(report.model, report.tag)
        entry = self._lines[report.model, report.tag]
        try:
            clean = report.validated()
        except (ValueError, TypeError, AttributeError):
            self._refused_reports += 1
            return assignment
        if self._take(entry, clean):
            self._decide(entry, clean)
        now = entry.releases.assignment(entry.model, entry.tag)
        return now if now.revision != clean.revision else None

    # -- what trainers ask --------------------------------------------------------------------------------------------------

    def parents(self, model: str, tags: Iterable[str]) -> dict[str, Parent | None]:
        """What is to be refreshed in each of these lines, and a candidate to be compared with: the version that will serve once all that
        waits or is tried has proved good. So nothing is learned for the second time while a canary runs, and what was learned beside it
        does not end with the version that it replaces. A pin is of one line: a domain without a version of its own is refreshed from what
        is pinned in the common line. None for what the model was configured with."""
        entries = {tag: self._settled(model, tag) for tag in tags}
        placements = {tag: self._parent(entry) for tag, entry in entries.items()}
        return {tag: Parent(found, entries[tag].releases.pinned) if found else None for tag, found in placements.items()}

    # -- what operators read ------------------------------------------------------------------------------------------------

    def state(self, model: str, tag: str = "") -> Value:
        """The versions in order of becoming known, what is live and what serves, the canary and how it stands, and what every replica runs,
        as JSON."""
        entry = self._settled(model, tag)
        now = self._clock()
        return {
            **self._answer(entry),
            "canary": self._canary(entry),
            "versions": [shown(release) for release in entry.releases.versions.values()],
            "replicas": {name: self._replica(entry, r, now) for name, r in sorted(entry.replicas.items())},
            "refused_reports": self._refused_reports,
            "undone_decisions": self._undone,
        }

    def history(self, model: str, count: int | None = None, tag: str = "") -> list[Value]:
        """Every change, oldest first: who, why, at (seconds since the epoch), action, version, from and to (the live version before and
        after), states (by version, those that changed), revision. UnknownModel, StoreError."""
        entry = self._entry(model, tag)
        return self._store.entries(stream(entry.model, entry.tag), count)

    # -- inside -------------------------------------------------------------------------------------------------------------

    def _entry(self, model: str, tag: str = "") -> Entry:
        """A line, from the store if this keeper has not met it. UnknownModel, StoreError."""
        if (model, tag) not in self._lines:
            if 0 <= self._clock() - self._away < self._settings.retry:
                raise StoreError(f"the store was away {self._clock() - self._away:.1f} s ago")
            made = Entry(model, tag)
            try:
                self._sync(made)
            except StoreError:
                self._away = self._clock()
                raise
            if not made.releases.revision:
                known = ", ".join(entry.name for _, entry in sorted(self._lines.items()))
                raise UnknownModel(f"no model {made.name} is registered; known are {known or 'none'}")
            self._lines.setdefault((model, tag), made)  # `inspect` may have met it meanwhile: all must change the same one
        return self._lines[model, tag]

    def _registered(self, model: str, tag: str) -> bool:
        """Whether a domain of a known model is known too. UnknownModel, StoreError."""
        try:
            self._entry(model, tag)
        except UnknownModel:
            if not tag:
                raise
            return False
        return True

    def _settled(self, model: str, tag: str) -> Entry:
        """A line as it is now, as far as the store can be read. UnknownModel, StoreError."""
        entry = self._entry(model, tag)
        self._settle(entry)
        return entry

    def _placement(self, entry: Entry) -> Placement | None:
        """The version that serves a line outside its canary: its live one, or else that of the common line."""
        live = entry.releases.placement
        return live if live or not entry.tag else self._placement(self._entry(entry.model))

    def _serving(self, entry: Entry) -> str | None:
        placement = self._placement(entry)
        return placement.version if placement else None

    def _parent(self, entry: Entry) -> Placement | None:
        """See `parents`. A domain without a version of its own shares that of the common line."""
        now, shared = entry.releases, None
        heir = now.heir(self._serving(entry))
        if entry.tag and heir not in now.versions:
            shared = self._parent(self._entry(entry.model))
            heir = now.heir(shared.version if shared else None)
        return now.versions[heir].placement if heir in now.versions else shared

    def _sync(self, entry: Entry) -> None:
        """Bring the state to the end of the history. StoreError."""
        entry.doubtful = True
        entry.releases = Releases(self._store.entries(stream(entry.model, entry.tag)))
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
        self, entry: Entry, plan: Callable[[Releases], Change], who: str, why: str, expected: int | None, version: str | None = None
    ) -> Value:
        self._commit(entry, plan, who, why, expected)
        return self._answer(entry, version)

    def _commit(self, entry: Entry, plan: Callable[[Releases], Change | None], who: str, why: str, expected: int | None = None) -> None:
        """Plan against the history as it is, append, and see whether the append came first."""
        self._sync(entry)
        now = entry.releases
        if expected is not None and expected != now.revision:
            raise RegistryConflict(f"the speculators of {entry.name} are not at revision {expected} any more: {now.summary()}")
        planned = plan(now)
        if planned is None:
            return
        change = replace(
            planned, revision=now.revision + 1, id=secrets.token_hex(8), at=self._clock(), who=who, why=why or UNSAID, before=now.live
        )
        entry.doubtful = True
        self._store.append(stream(entry.model, entry.tag), change.to_json())
        self._confirm(entry, change)

    def _confirm(self, entry: Entry, change: Change) -> None:
        """The state after a change that the store took. RegistryConflict if another writer's change came before it."""
        try:
            self._sync(entry)
        except StoreError:
            entry.releases.apply(change.to_json())
        if change.id not in entry.releases.ids:
            raise RegistryConflict(f"somebody else changed the speculators of {entry.name} just now: {entry.releases.summary()}")

    def _take(self, entry: Entry, report: ReplicaReport) -> bool:
        """Remember a report; False if there are too many replicas for that."""
        now = self._clock()
        for name in [n for n, r in entry.replicas.items() if r.seen < now - self._settings.gone]:
            del entry.replicas[name]
        if report.replica not in entry.replicas and len(entry.replicas) >= MOST:
            return False
        entry.replicas[report.replica] = Replica(report, now)
        entry.count(report, self._serving(entry))
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
        version = entry.releases.waiting(self._serving(entry)) if self._settings.automatic else None
        if version is not None:
            self.start_canary(entry.model, version, ITSELF, "it passed the gate", None, entry.releases.revision, entry.tag)

    def _end(self, entry: Entry, version: str, report: ReplicaReport) -> None:
        """Promote the canary or roll it back, if either is due."""
        verdict, now = entry.canary(self._serving(entry), self._settings.rule), entry.releases.revision
        problem = self._unloadable(entry, version) if version in report.errors else ""
        if problem:
            self.rollback(entry.model, ITSELF, problem, version, now, entry.tag)
        elif verdict and verdict.outcome == "promote":
            self.promote(entry.model, version, ITSELF, verdict.reason, now, entry.tag)
        elif verdict and verdict.outcome == "roll_back":
            self.rollback(entry.model, ITSELF, verdict.reason, version, now, entry.tag)

    def _unloadable(self, entry: Entry, version: str) -> str:
        """Why no replica can load the version, "" if one can, or may yet."""
        fresh = [r.last for r in entry.replicas.values() if r.seen >= self._clock() - self._settings.stale]
        errors = [report.errors[version] for report in fresh if version in report.errors]
        return f"no replica can load it: {errors[0]}" if errors and len(errors) == len(fresh) else ""

    def _answer(self, entry: Entry, version: str | None = None) -> Value:
        now = entry.releases
        canary = now.canary.placement.version if now.canary else None
        line = {"model": entry.model, "tag": entry.tag, "revision": now.revision}
        answer = line | {"live": now.live, "serving": self._serving(entry), "canary": canary, "pinned": now.pinned}
        return answer | ({"version": version, "state": now.known(version).state} if version else {})

    def _canary(self, entry: Entry) -> Value | None:
        """The canary as JSON: the interval is null while there is none."""
        canary, verdict = entry.releases.canary, entry.canary(self._serving(entry), self._settings.rule)
        if canary is None or verdict is None:
            return None
        stands = {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in asdict(verdict).items()}
        return {"version": canary.placement.version, "share": canary.share, **stands}

    def _replica(self, entry: Entry, replica: Replica, now: float) -> Value:
        """What a replica runs as JSON. agrees: it drafts with the version that serves, bit for bit as far as it says."""
        serving, last = self._placement(entry), replica.last
        agrees = last.serving == (serving.version if serving else "")
        if serving is not None:
            agrees = agrees and last.loaded.get(serving.version, "") in ("", serving.checksum)
        return {
            "serving": last.serving or None,
            "loaded": dict(last.loaded),
            "errors": dict(last.errors),
            "revision": last.revision,
            "agrees": agrees,
            "age": round(now - replica.seen, 3),
        }


def stream(model: str, tag: str) -> str:
    """The stream of a line's history. Names of models and tags have no slash."""
    return f"registry/{model}/{tag}" if tag else f"registry/{model}"


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

    async def register(
        self, model: str, base: Base, url: str = "", manifest: Manifest | None = None, tags: Sequence[str] = ()
    ) -> tuple[Assignment, ...]:
        return self._keeper.register(model, base, url, manifest, tags)

    async def submit(
        self,
        model: str,
        url: str,
        manifest: Manifest,
        verdict: Verdict,
        who: str,
        why: str = "",
        tag: str = "",
        against: str | None = None,
    ) -> Value:
        """Replicas are answered while the bundle is fetched and checked."""
        problem = await asyncio.to_thread(self._keeper.inspect, model, url, manifest)
        return self._keeper.submit(model, url, manifest, verdict, who, why, problem, tag, against)

    async def start_canary(
        self, model: str, version: str, who: str, why: str = "", share: float | None = None, expected: int | None = None, tag: str = ""
    ) -> Value:
        return self._keeper.start_canary(model, version, who, why, share, expected, tag)

    async def promote(self, model: str, version: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        return self._keeper.promote(model, version, who, why, expected, tag)

    async def rollback(
        self, model: str, who: str, why: str = "", version: str | None = None, expected: int | None = None, tag: str = ""
    ) -> Value:
        return self._keeper.rollback(model, who, why, version, expected, tag)

    async def pin(self, model: str, version: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        return self._keeper.pin(model, version, who, why, expected, tag)

    async def unpin(self, model: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        return self._keeper.unpin(model, who, why, expected, tag)

    async def retire(self, model: str, version: str, who: str, why: str = "", expected: int | None = None, tag: str = "") -> Value:
        return self._keeper.retire(model, version, who, why, expected, tag)

    async def assignment(self, model: str, tag: str = "") -> Assignment:
        return self._keeper.assignment(model, tag)

    async def reports(self, reports: Sequence[ReplicaReport]) -> list[Assignment]:
        return self._keeper.reports(reports)

    async def parents(self, model: str, tags: Sequence[str]) -> dict[str, Parent | None]:
        return self._keeper.parents(model, tags)

    async def state(self, model: str, tag: str = "") -> Value:
        return self._keeper.state(model, tag)

    async def history(self, model: str, count: int | None = None, tag: str = "") -> list[Value]:
        return self._keeper.history(model, count, tag)

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
