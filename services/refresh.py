"""A replica's part in the refresh: it follows the registry, changes versions between two steps, counts for a canary, and hands what it
captured to the trainer. Serving waits for none of it, and any other part may be away at any time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.artefacts import PER_LINE, ArtefactError, Artefacts
from actors.policy import UnknownModel
from actors.releases import Assignment, Base, Placement, ReplicaReport
from configs.settings import ModelSettings
from drafters.bundle import Bundle, BundleError, Origin, adopt_folder, fingerprint, read_bundle
from drafters.checkpoint import CheckpointError
from drafters.traces import Trace
from drafters.versions import Canary, Line
from engine.drafter import Drafter
from policies import Arm, in_canary
from services.host import ModelHost
from services.outbox import Outbox
from services.peers import Peer
from services.refresh_actors import RefreshPlan

log = logging.getLogger(__name__)
REPORT_S = 0.25  # seconds between two reports
HANDING_OVER_S = 1.0  # seconds between two deliveries to the trainer: each takes the interpreter from the engine for a while
RETRY_S = 5.0  # seconds between attempts at what another part did not let happen
PATIENCE = 3  # attempts to reach a bundle before it is reported as one that cannot be loaded
AGAIN_S = 300.0  # seconds between attempts to load a version that a full disk, a full device or the like kept from being loaded
SILENCE_S = 60.0  # seconds in which the same trouble is logged once
REMIND_S = 2.0  # seconds after which an unchanged load is told again


@dataclass(frozen=True, slots=True)
class Run:
    """A canary that is counted: its salt, and the version beside it."""

    salt: str = ""
    against: str = ""


class Tally:
    """Arms of the canaries that run, by line: what each version's requests showed. Counted by the engine's thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs: dict[str, tuple[Run, dict[str, Arm]]] = {}

    def begin(self, runs: Mapping[str, Run]) -> None:
        """Count for these from now on, from nothing where it is another than before."""
        with self.lock:
            before, self.runs = self.runs, {line: (run, {}) for line, run in runs.items()}
            self.runs |= {line: found for line, found in before.items() if runs.get(line) == found[0]}

    def ended(self, line: str, version: str, drafts: int, kept: int) -> None:
        """A request that one version served from beginning to end."""
        with self.lock:
            if line in self.runs:
                arms = self.runs[line][1]
                arms[version] = arms.get(version, Arm()) + Arm.of(drafts, kept)

    def read(self, line: str) -> tuple[Run, dict[str, Arm]]:
        """What a line's canary showed; nothing without one."""
        with self.lock:
            run, arms = self.runs.get(line, (Run(), {}))
            return run, dict(arms)


@dataclass(frozen=True, slots=True)
class Configured:
    """The speculator that the model was configured with, and its base, as the registry knows them."""

    base: Base
    bundle: Bundle


@dataclass(slots=True)
class Following:
    """Assignments by line, and how far they are followed: errors by version, attempts by version to reach it, when each that could not be
    loaded is tried again, and when any is next: at once, or never once nothing more is to be done."""

    assignments: Mapping[str, Assignment] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    later: dict[str, float] = field(default_factory=dict)
    next: float = -math.inf

    @property
    def wanted(self) -> dict[str, Placement]:
        """Every version that they name, once, and where it is."""
        return {placement.version: placement for found in self.assignments.values() for placement in found.placements}


class Refresh:
    """Beside one `ModelHost`. replica: this replica's name. clock: monotonic seconds."""

    def __init__(
        self, settings: ModelSettings, plan: RefreshPlan, host: ModelHost, replica: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings, self.plan, self.host, self.replica, self.clock = settings, plan, host, replica, clock
        self.registry = Peer(plan.registry)
        self.trainer: Peer | None = None
        self.lines = ("", *settings.refresh.tags)
        self.artefacts = Artefacts(plan.artefacts, plan.cache / "fetched" / settings.name, PER_LINE * len(self.lines))
        self.traces: Outbox[Trace] = Outbox(int(settings.refresh.capture.waiting_bytes), lambda trace: trace.nbytes)
        self.tally = Tally()
        self.configured: Configured | None = None
        self.registered = False
        self.register_again = 0.0
        self.following = Following()
        self.checksums: dict[str, str] = {}  # of the versions in memory, "" where that is not known
        self.lost = 0  # captured requests that were dropped, as far as the trainer was told
        self.told = (-1, 0.0)  # the load that the trainer was told last, and when
        self.troubles: dict[str, float] = {}  # what went wrong, and when that was logged
        host.capture = self.traces.put if settings.log else None
        host.counted = self.tally.ended

    # -- what goes on beside serving ----------------------------------------------------------------------------------------

    def works(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """All that it does, again and again. None waits for another: a replica that is silent while it loads would pass for one that is
        gone."""
        return (
            self.again(self.report, "reporting to the registry"),
            self.again(self.register, "registration"),
            self.again(self.change, "a change of versions"),
            self.again(self.tell_load, "telling the trainer the load"),
            self.again(self.send, "handing over to the trainer", HANDING_OVER_S),
        )

    async def again(self, act: Callable[[], Awaitable[None]], what: str, every: float = REPORT_S) -> None:
        """Do it now and then, once the model is loaded."""
        while True:
            await asyncio.sleep(every)
            if self.host.versions is not None:
                await self.attempt(act, what)

    async def attempt(self, act: Callable[[], Awaitable[None]], what: str) -> None:
        """Do it; what goes wrong is logged, the same again only after a while, and tried again at the next turn."""
        try:
            await act()
        except Exception as error:
            trouble, now = f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip(), self.clock()
            if self.troubles.get(trouble, -SILENCE_S) + SILENCE_S <= now:
                self.troubles = {t: at for t, at in self.troubles.items() if at + SILENCE_S > now} | {trouble: now}
                log.warning("%s: %s is held up (%s); serving goes on", self.settings.name, what, trouble)

    # -- towards the registry -----------------------------------------------------------------------------------------------

    async def report(self) -> None:
        """Say what runs here; take in other assignments. A registry that does not know the model is told of it at once."""
        try:
            self.assign(await self.registry.call("reports", [self.about(line) for line in self.lines]))
        except UnknownModel:
            self.registered = False

    def about(self, line: str) -> ReplicaReport:
        """What is said of one line."""
        assert self.host.versions is not None
        drafting, following = self.host.versions.drafting(line), self.following
        assignment = following.assignments.get(line)
        run, arms = self.tally.read(line)
        named = {placement.version for placement in assignment.placements} if assignment else set()
        return ReplicaReport(
            replica=self.replica,
            model=self.settings.name,
            revision=assignment.revision if assignment else 0,
            serving=drafting.live.version,
            loaded={drafter.version: self.checksums.get(drafter.version, "") for drafter in drafting.drafters},
            errors={version: error for version, error in following.errors.items() if version in named},
            salt=run.salt,
            against=run.against,
            arms=arms,
            tag=line,
        )

    def assign(self, assignments: Iterable[Assignment]) -> None:
        """Follow these from now on, where they are others."""
        known = self.following.assignments
        news = {found.tag: found for found in assignments if found != known.get(found.tag)}
        if news:
            self.following = Following({**known, **news})

    async def register(self) -> None:
        """Make the model and its configured speculator known; then the trainer can be found."""
        if self.registered or self.clock() < self.register_again:
            return
        self.register_again = self.clock() + RETRY_S
        if self.configured is None:
            self.configured = await asyncio.to_thread(self.adopt)
        found = self.configured
        url = await asyncio.to_thread(self.artefacts.publish, found.bundle)
        self.remember(found.bundle)
        known = self.settings.name, found.base, url, found.bundle.manifest, self.settings.refresh.tags
        assignments: Sequence[Assignment] = await self.registry.call("register", *known)
        self.registered = True
        if self.settings.log and self.trainer is None:
            self.trainer = Peer(self.plan.trainer(found.base, str(found.bundle.folder), found.bundle.manifest.version))
        self.assign(assignments)

    def adopt(self) -> Configured:
        """The configured speculator as a bundle of this machine. Blocks. Raises OSError, BundleError."""
        folder = self.host.speculator
        assert folder is not None
        base = self.base()
        root = self.plan.cache / "configured" / self.settings.name
        try:
            return Configured(base, read_bundle(root / fingerprint(folder), base.vocab_size, base.emb_dim))
        except BundleError:
            origin = Origin(model=self.settings.name, base=base.name, base_revision=base.revision, created=time.time())
            return Configured(base, adopt_folder(root, folder, origin))

    def base(self) -> Base:
        """The model's base; its revision is the hub's commit that was loaded, or a digest of the weights of a local folder."""
        assert self.host.runner is not None
        loaded, name = self.host.runner.engine.base, self.settings.base
        revision = fingerprint(Path(name)) if Path(name).is_dir() else loaded.revision
        return Base(name, loaded.vocab_size, loaded.hidden_size, revision)

    def remember(self, bundle: Bundle) -> None:
        """The checksum of the configured version."""
        self.checksums[bundle.manifest.version] = bundle.manifest.checksum

    # -- versions -----------------------------------------------------------------------------------------------------------

    async def change(self) -> None:
        """Load what the assignments name beside what serves, and exchange it all between two steps. What cannot be loaded is left out."""
        following = self.following
        if not following.assignments or self.clock() < following.next:
            return
        await asyncio.to_thread(self.artefacts.keep, [placement.checksum for placement in following.wanted.values()])
        common = following.assignments.get("")
        own: dict[str, Placement | None] = {self.host.configured_version: None} if common and not common.live else {}
        found = {version: await self.obtain(version, place, following) for version, place in (own | following.wanted).items()}
        following.next = min(following.later.values(), default=math.inf)
        await self.exchange(following.assignments, {version: drafter for version, drafter in found.items() if drafter is not None})

    async def obtain(self, version: str, placement: Placement | None, following: Following) -> Drafter | None:
        """A version, loaded if it is not yet; None, with the reason among the errors, if it cannot be. One that is wrong itself is not
        tried again, and any other not before its time."""
        assert self.host.versions is not None
        if self.clock() < following.later.get(version, -math.inf):
            return None
        checksum = placement.checksum if placement else self.checksums.get(version, "")
        drafter = next((found for found in self.host.versions.drafters if found.version == version), None)
        try:
            drafter = drafter or await asyncio.to_thread(self.load, placement)
        except ArtefactError as error:
            self.unreached(version, str(error), following)
            return None
        except Exception as error:  # whatever files and devices say to it
            following.errors[version] = f"{type(error).__name__}: {error}"
            following.later[version] = math.inf if isinstance(error, (BundleError, CheckpointError)) else self.clock() + AGAIN_S
            log.error("%s: version %s cannot be loaded, the old one stays: %s", self.settings.name, version, error)
            return None
        following.errors.pop(version, None)
        following.later.pop(version, None)
        self.checksums[version] = checksum
        return drafter

    def unreached(self, version: str, why: str, following: Following) -> None:
        """Try again later; a place that stays away is an error of the version."""
        following.attempts[version] = following.attempts.get(version, 0) + 1
        following.later[version] = self.clock() + RETRY_S
        if following.attempts[version] >= PATIENCE:
            following.errors[version] = why
        log.warning("%s: version %s cannot be reached, the old one stays: %s", self.settings.name, version, why)

    def load(self, placement: Placement | None) -> Drafter:
        """Fetch a version, checked to the last byte and shape, and make it ready to draft; None is the configured one. Blocks."""
        assert self.host.runner is not None
        if placement is None:
            return self.host.load_configured()
        base = self.host.runner.engine.base
        bundle = self.artefacts.fetch(placement.url, placement.checksum, base.vocab_size, base.hidden_size)
        return self.host.load_version(bundle.folder, placement.version)

    async def exchange(self, assignments: Mapping[str, Assignment], found: Mapping[str, Drafter]) -> None:
        """Swap between two steps, if that changes anything; what drafts no more is let go of."""
        assert self.host.versions is not None
        versions = self.host.versions
        configured = found.get(self.host.configured_version, versions.common.live)
        lines = assigned(self.lines, assignments, found, versions.lines, configured)
        runs = {tag: Run(line.canary.run, line.live.version) for tag, line in lines.items() if line.canary}
        if lines != versions.lines:
            await self.host.swap(lines, lambda: self.tally.begin(runs))
        self.checksums = {drafter.version: self.checksums.get(drafter.version, "") for drafter in versions.drafters}

    # -- towards the trainer ------------------------------------------------------------------------------------------------

    async def tell_load(self) -> None:
        """How many requests run or wait here, when that is news. A trainer with a device of its own is told once, which starts it."""
        if self.trainer is None:
            return
        assert self.host.runner is not None
        running, now = len(self.host.runner.engine.texts), self.clock()
        (before, at), apart = self.told, self.settings.refresh.trainer.running is None
        if before >= 0 and (apart or (running == before and now < at + REMIND_S)):
            return
        await self.trainer.call("load", self.replica, running)
        self.told = (running, now)

    @property
    def dropped(self) -> int:
        """Captured requests that never reached the trainer: for want of room here, or because it was away."""
        assert self.host.runner is not None
        recorder = self.host.runner.engine.recorder
        return self.traces.lost + (recorder.dropped if recorder else 0)

    async def send(self) -> None:
        """Hand over what was captured, by reference; it is dropped and counted when the trainer is away."""
        batch = self.traces.take() if self.trainer is not None else []
        if self.trainer is None or not batch:
            return
        lost = self.dropped
        try:
            reference = await asyncio.to_thread(lambda: ray.put([trace.to_bytes() for trace in batch]))
            await self.trainer.call("add", reference, lost - self.lost)
            self.lost = lost
        except BaseException:
            self.traces.lose(batch)
            raise


def assigned(
    tags: Iterable[str], assignments: Mapping[str, Assignment], found: Mapping[str, Drafter], now: Mapping[str, Line], configured: Drafter
) -> dict[str, Line]:
    """What is to draft, by tag of the domain. found: versions that could be loaded. now: what drafts at present. configured: what drafts in
    the common line where that has no live version."""
    own = {tag: line for tag, line in now.items() if not tag or line.live is not now[""].live}  # lines with a live version of their own
    common = line_of(assignments.get(""), found, own[""], configured) or own[""]
    others = {tag: line_of(assignments.get(tag), found, own.get(tag), common.live) for tag in tags if tag}
    return {"": common} | {tag: line for tag, line in others.items() if line is not None}


def line_of(assignment: Assignment | None, found: Mapping[str, Drafter], now: Line | None, common: Drafter) -> Line | None:
    """What an assignment comes to; None where a domain follows the common line. A live version that could not be loaded leaves the one that
    there is, without a canary: what that would be compared with is not there. common: what drafts where there is no live version."""
    if assignment is None:
        return now
    if assignment.live and assignment.live.version not in found:
        return Line(now.live) if now else None
    live, canary = found[assignment.live.version] if assignment.live else common, beside(assignment, found)
    return Line(live, canary) if assignment.live or canary or not assignment.tag else None


def beside(assignment: Assignment, found: Mapping[str, Drafter]) -> Canary | None:
    """The canary of an assignment, if there is one and it could be loaded."""
    canary = assignment.canary
    if canary is None or canary.placement.version not in found:
        return None
    return Canary(found[canary.placement.version], partial(in_canary, salt=canary.salt, share=canary.share), canary.salt)
