"""A replica's part in the refresh: it follows the registry, changes versions between two steps, counts for a canary, and hands what it
captured to the trainer. Serving waits for none of it, and any other part may be away at any time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray

from actors.artefacts import ArtefactError, Artefacts
from actors.policy import UnknownModel
from actors.releases import Assignment, Base, Placement, ReplicaReport
from configs.settings import ModelSettings
from drafters.bundle import Bundle, BundleError, Origin, adopt_folder, fingerprint, read_bundle
from drafters.checkpoint import CheckpointError
from drafters.traces import Trace
from drafters.versions import Canary
from engine.drafter import Drafter
from policies import Arm, in_canary
from services.host import ModelHost
from services.outbox import Outbox
from services.peers import Peer
from services.refresh_actors import RefreshPlan

log = logging.getLogger(__name__)
REPORT_S = 0.25  # seconds between two reports
RETRY_S = 5.0  # seconds between attempts at what another part did not let happen
PATIENCE = 3  # attempts to reach a bundle before it is reported as one that cannot be loaded
SILENCE_S = 60.0  # seconds in which the same trouble is logged once
REMIND_S = 2.0  # seconds after which an unchanged load is told again


class Tally:
    """Arms of the canary that runs: what each version's requests showed. Counted by the engine's thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.salt, self.arms = "", dict[str, Arm]()

    def begin(self, salt: str) -> None:
        """Count for this canary from now on, from nothing if it is another; "" for none."""
        with self.lock:
            if salt != self.salt:
                self.salt, self.arms = salt, {}

    def ended(self, version: str, drafts: int, kept: int) -> None:
        """A request that one version served from beginning to end."""
        with self.lock:
            if self.salt:
                self.arms[version] = self.arms.get(version, Arm()) + Arm.of(drafts, kept)

    def read(self) -> tuple[str, dict[str, Arm]]:
        with self.lock:
            return self.salt, dict(self.arms)


@dataclass(frozen=True, slots=True)
class Version:
    """A version in memory; checksum: of its bundle, "" while that is not known."""

    drafter: Drafter
    checksum: str


@dataclass(frozen=True, slots=True)
class Configured:
    """The speculator that the model was configured with, and its base, as the registry knows them."""

    base: Base
    bundle: Bundle


@dataclass(slots=True)
class Failures:
    """Attempts at the present assignment: errors by version, attempts by version to reach it, and when to try again."""

    errors: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    again: float = 0.0


class Refresh:
    """Beside one `ModelHost`. replica: this replica's name. clock: monotonic seconds."""

    def __init__(
        self, settings: ModelSettings, plan: RefreshPlan, host: ModelHost, replica: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings, self.plan, self.host, self.replica, self.clock = settings, plan, host, replica, clock
        self.registry = Peer(plan.registry)
        self.trainer: Peer | None = None
        self.artefacts = Artefacts(plan.artefacts, plan.cache / "fetched")
        self.traces: Outbox[Trace] = Outbox(int(settings.refresh.capture.waiting_bytes), lambda trace: trace.nbytes)
        self.tally = Tally()
        self.configured: Configured | None = None
        self.registered = False
        self.register_again = 0.0
        self.assignment: Assignment | None = None
        self.settled = True  # whether the assignment is followed, or cannot be
        self.failures = Failures()
        self.loaded: dict[str, Version] = {}
        self.told = (-1, 0.0)  # the load that the trainer was told last, and when
        self.troubles: dict[str, float] = {}  # what went wrong, and when that was logged
        host.capture = self.traces.put if settings.log else None
        host.counted = self.tally.ended

    # -- what goes on beside serving ----------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Report to the registry and do what it says, again and again."""
        while True:
            await asyncio.sleep(REPORT_S)
            if self.host.versions is not None:
                await self.attempt(self.report, "reporting to the registry")
                await self.attempt(self.register, "registration")
                await self.attempt(self.change, "a change of versions")

    async def deliver(self) -> None:
        """Tell the trainer how busy this replica is, and hand it what was captured, again and again."""
        while True:
            await asyncio.sleep(REPORT_S)
            if self.trainer is not None:
                await self.attempt(self.tell_load, "telling the trainer the load")
                await self.attempt(self.send, "handing over to the trainer")

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
        """Say what runs here; take in another assignment. A registry that does not know the model is told of it at once."""
        assert self.host.versions is not None
        salt, arms = self.tally.read()
        revision = self.assignment.revision if self.assignment else 0
        serving = self.host.versions.version
        checksums = {serving: ""} | {version: found.checksum for version, found in self.loaded.items()}
        told = ReplicaReport(self.replica, self.settings.name, revision, serving, checksums, dict(self.failures.errors), salt, arms)
        try:
            answer: Assignment | None = await self.registry.call("report", told)
        except UnknownModel:
            self.registered = False
            return
        if answer is not None and answer.revision != revision:
            self.assign(answer)

    def assign(self, assignment: Assignment) -> None:
        """Follow another assignment from now on."""
        self.assignment, self.settled, self.failures = assignment, False, Failures()

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
        assignment: Assignment = await self.registry.call("register", self.settings.name, found.base, url, found.bundle.manifest)
        self.registered = True
        if self.settings.log and self.trainer is None:
            self.trainer = Peer(self.plan.trainer(found.base, str(found.bundle.folder), found.bundle.manifest.version))
        if self.assignment is None or assignment.revision != self.assignment.revision:
            self.assign(assignment)

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
        """The model's base; a local folder's revision is a digest of its weights."""
        assert self.host.runner is not None
        loaded, name = self.host.runner.engine.base, self.settings.base
        revision = fingerprint(Path(name)) if Path(name).is_dir() else ""
        return Base(name, loaded.vocab_size, loaded.hidden_size, revision)

    def remember(self, bundle: Bundle) -> None:
        """The checksum of the configured version, if it is what serves."""
        assert self.host.versions is not None
        live, version = self.host.versions.live, bundle.manifest.version
        if live.version == version and version not in self.loaded:
            self.loaded[version] = Version(live, bundle.manifest.checksum)

    # -- versions -----------------------------------------------------------------------------------------------------------

    async def change(self) -> None:
        """Load what the assignment names beside what serves, and exchange them between two steps. What cannot be loaded is left out."""
        assignment = self.assignment
        if assignment is None or self.settled or self.clock() < self.failures.again:
            return
        self.settled = True
        live = await self.obtain(assignment.live)
        canary = assignment.canary
        beside = await self.obtain(canary.placement) if canary and live else None
        if self.assignment is assignment and live is not None:
            await self.exchange(assignment, live, beside)

    async def obtain(self, placement: Placement | None) -> Version | None:
        """A version, loaded if it is not yet; None, with the reason among the errors, if it cannot be."""
        assert self.host.versions is not None
        if placement is None:
            return await self.original()
        version = placement.version
        if version in self.loaded:
            return self.loaded[version]
        if version == self.host.versions.version:
            return Version(self.host.versions.live, placement.checksum)
        try:
            made = Version(await asyncio.to_thread(self.load, placement), placement.checksum)
        except ArtefactError as error:
            self.unreached(version, str(error))
            return None
        except (BundleError, CheckpointError, OSError, RuntimeError, MemoryError) as error:
            self.failures.errors[version] = f"{type(error).__name__}: {error}"
            log.error("%s: version %s cannot be loaded, the old one stays: %s", self.settings.name, version, error)
            return None
        self.failures.errors.pop(version, None)
        return made

    async def original(self) -> Version | None:
        """The configured speculator, where the registry has none."""
        assert self.host.versions is not None
        if self.host.versions.version == self.host.configured_version:
            return Version(self.host.versions.live, "")
        return Version(await asyncio.to_thread(self.host.load_configured), "")

    def unreached(self, version: str, why: str) -> None:
        """Try again later; a place that stays away is an error of the version."""
        failures = self.failures
        failures.attempts[version] = failures.attempts.get(version, 0) + 1
        failures.again, self.settled = self.clock() + RETRY_S, False
        if failures.attempts[version] >= PATIENCE:
            failures.errors[version] = why
        log.warning("%s: version %s cannot be reached, the old one stays: %s", self.settings.name, version, why)

    def load(self, placement: Placement) -> Drafter:
        """Fetch a version, checked to the last byte and shape, and make it ready to draft. Blocks."""
        assert self.host.runner is not None
        base = self.host.runner.engine.base
        bundle = self.artefacts.fetch(placement.url, placement.checksum, base.vocab_size, base.hidden_size)
        return self.host.load_version(bundle.folder, placement.version)

    async def exchange(self, assignment: Assignment, live: Version, canary: Version | None) -> None:
        """Swap between two steps, if that changes anything; what serves no more is let go of."""
        assert self.host.versions is not None
        beside, salt = None, ""
        if canary is not None and assignment.canary is not None:
            salt, share = assignment.canary.salt, assignment.canary.share
            beside = Canary(canary.drafter, lambda request: in_canary(request, salt, share))
        if (live.drafter, canary and canary.drafter, salt) != (self.host.versions.live, self.host.versions.beside, self.tally.salt):
            await self.host.swap(live.drafter, beside, lambda: self.tally.begin(salt))
        self.loaded = {found.drafter.version: found for found in (live, canary) if found is not None}

    # -- towards the trainer ------------------------------------------------------------------------------------------------

    async def tell_load(self) -> None:
        """How many requests run or wait here, when that is news. A trainer with a device of its own need not know."""
        assert self.trainer is not None and self.host.runner is not None
        running, now = len(self.host.runner.engine.texts), self.clock()
        if self.settings.refresh.trainer.running is None or (running == self.told[0] and now < self.told[1] + REMIND_S):
            return
        await self.trainer.call("load", self.replica, running)
        self.told = (running, now)

    async def send(self) -> None:
        """Hand over what was captured, by reference; it is dropped and counted when the trainer is away."""
        assert self.trainer is not None
        batch = self.traces.take()
        if not batch:
            return
        try:
            reference = await asyncio.to_thread(lambda: ray.put([trace.to_bytes() for trace in batch]))
            await self.trainer.call("add", reference)
        except BaseException:
            self.traces.lose(batch)
            raise
