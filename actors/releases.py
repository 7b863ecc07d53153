"""The versions of one line (a model's speculator in one domain of its requests): what states they can be in, how these may change, and what
they are after a history of changes.

    candidate -> canary -> live -> retired        a canary or a live version that failed is rolled_back; what the gate refused is rejected

Pure: no store, no clock. A change is planned against the state that holds, written to the history by the keeper, and applied from there, so
the state is a function of the history and of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from actors.refusals import RegistryConflict as RegistryConflict
from actors.refusals import UnknownVersion as UnknownVersion
from actors.store import Value
from drafters.bundle import BundleError, Manifest, check_base
from policies import Arm, Verdict, in_canary
from policies.canary import check_share

State = Literal["candidate", "canary", "live", "retired", "rejected", "rolled_back"]
Action = Literal["register", "submit", "canary", "promote", "roll_back", "pin", "unpin", "retire"]
NAME = 256  # characters of a name
MOST = 64  # versions that a replica may tell about


@dataclass(frozen=True, slots=True)
class Base:
    """The base that a model's speculators draft for; revision: of its weights, if known."""

    name: str
    vocab_size: int
    emb_dim: int
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """A version, where its bundle is, and the bundle's checksum."""

    version: str
    url: str
    checksum: str


@dataclass(frozen=True, slots=True)
class Parent:
    """What is to be refreshed in a line; pinned: not before the line is unpinned."""

    placement: Placement
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that serves a share of requests by hash; each run has a salt of its own, which names it."""

    placement: Placement
    share: float
    salt: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """What replicas are to serve in a domain, named by its tag; "" is the common line. revision rises with every change of the line.

    live None: what the common line serves, and there what they were configured with. With no canary either a domain follows the common line
    in all, its canary too.
    """

    model: str
    revision: int
    live: Placement | None = None
    canary: Canary | None = None
    tag: str = ""

    @property
    def placements(self) -> tuple[Placement, ...]:
        """All versions that it names."""
        canary = self.canary.placement if self.canary else None
        return tuple(placement for placement in (self.live, canary) if placement is not None)

    def serving(self, request: str) -> Placement | None:
        """The version that drafts for the request with this id."""
        canary = self.canary
        return canary.placement if canary and in_canary(request, canary.salt, canary.share) else self.live


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica runs in one domain, told a few times a second.

    revision: of the assignment that it follows, 0 for none. serving: the version that drafts outside the canary, "" for none. loaded:
    checksums of the versions in memory for it. errors: why versions that it was to load could not be; it goes on without them. salt: of the
    canary that `arms` counts, per version, since this replica began to serve it beside `against`.
    """

    replica: str
    model: str
    revision: int = 0
    serving: str = ""
    loaded: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    salt: str = ""
    against: str = ""
    arms: Mapping[str, Arm] = field(default_factory=dict)
    tag: str = ""

    def validated(self) -> ReplicaReport:
        """Itself without counts that cannot be true. ValueError if it is not a report."""
        names = (self.replica, self.model, self.serving, self.salt, self.against, self.tag)
        named = all(isinstance(n, str) and len(n) <= NAME for n in names)
        if not named or not self.replica or not isinstance(self.revision, int):
            raise ValueError("a report must name its replica, and the revision that it follows")
        if not all(isinstance(m, Mapping) and len(m) <= MOST for m in (self.loaded, self.errors, self.arms)):
            raise ValueError("a report tells about few versions, by name")
        if not all(isinstance(t, str) for m in (self.loaded, self.errors) for pair in m.items() for t in pair):
            raise ValueError("checksums and errors are texts, by version")
        return replace(self, arms={v: arm for v, arm in self.arms.items() if isinstance(arm, Arm) and arm.sane()})


@dataclass(frozen=True, slots=True)
class Release:
    """A version as the registry knows it. manifest: its bundle's; verdict: the gate's; against: the version that it was judged against;
    initial: it came from the configuration; why, at: of its last change of state."""

    placement: Placement
    manifest: Value
    state: State
    verdict: Value | None = None
    against: str | None = None
    initial: bool = False
    why: str = ""
    at: float = 0.0

    @classmethod
    def from_json(cls, data: Value) -> Release:
        return cls(**data | {"placement": Placement(**data["placement"])})


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the history, whole: the states that it brought about, and what holds afterwards.

    version: what it is about. states: versions whose state is another now. before, live: the live version before and after. release,
    base: what became known.
    """

    action: Action
    version: str | None
    live: str | None
    pinned: bool
    states: Mapping[str, State] = field(default_factory=dict)
    canary: str | None = None
    share: float = 0.0
    salt: str = ""
    release: Release | None = None
    base: Base | None = None
    revision: int = 0
    id: str = ""
    at: float = 0.0
    who: str = ""
    why: str = ""
    before: str | None = None

    def to_json(self) -> Value:
        """As the history keeps it: with `from` and `to` for the live version."""
        data = asdict(self) | {"states": dict(self.states), "from": self.before, "to": self.live}
        return {name: value for name, value in data.items() if name not in ("before", "live")}

    @classmethod
    def from_json(cls, data: Value) -> Change:
        """The change that `to_json` wrote; fields it does not know are left out. ValueError if it is not one."""
        try:
            known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            release, base = known.pop("release", None), known.pop("base", None)
            made = cls(**known, before=data["from"], live=data["to"])
            made = replace(made, release=release and Release.from_json(release), base=base and Base(**base))
            right = made.action in get_args(Action) and all(s in get_args(State) for s in made.states.values())
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a change: {error}") from None
        if not right or not isinstance(made.revision, int):
            raise ValueError("not a change of this release")
        return made


class Releases:
    """All versions of a line as they are after its history. What plans a change raises RegistryConflict or UnknownVersion.

    against, where a plan asks for it: the version that serves, which is the live one, or in a line that has none that of the common line;
    of a submission the one that it was judged against.
    """

    def __init__(self, changes: Iterable[Value] = ()) -> None:
        self.versions: dict[str, Release] = {}
        self.lineage: list[str | None] = [None]  # live versions that may be gone back to, the present one last
        self.canary: Canary | None = None
        self.configured: str | None = None  # the version that the configuration named last
        self.pinned, self.revision = False, 0
        self.base: Base | None = None
        self.ids: set[str] = set()
        for change in changes:
            self.apply(change)

    # -- the fold -----------------------------------------------------------------------------------------------------------

    def apply(self, data: Value) -> None:
        """Take in the next entry of the history. One that another of the same revision came before has lost and changes nothing; so does
        one that cannot be read."""
        try:
            change = Change.from_json(data)
        except ValueError:
            return
        if change.revision <= self.revision:
            return
        self.revision, self.pinned = change.revision, change.pinned
        self.ids.add(change.id)
        self.base = change.base or self.base
        if change.action == "register":
            self.configured = change.version
        if change.release is not None:
            self.versions[change.release.placement.version] = change.release
        for version, state in change.states.items():
            if version in self.versions:
                self.versions[version] = replace(self.versions[version], state=state, why=change.why, at=change.at)
        self.follow(change)
        known = self.versions.get(change.canary or "")
        self.canary = Canary(known.placement, change.share, change.salt) if known else None

    def follow(self, change: Change) -> None:
        """The live version from now on, and those before it."""
        if change.base is not None:
            self.lineage = [change.live]
        elif change.action == "roll_back" and change.live != self.live:
            earlier = self.lineage[:-1]
            while len(earlier) > 1 and earlier[-1] != change.live:
                earlier.pop()
            self.lineage = earlier or [change.live]
        elif change.live != self.live:
            self.lineage.append(change.live)

    # -- what holds ---------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> str | None:
        return self.lineage[-1]

    @property
    def placement(self) -> Placement | None:
        """Of the live version."""
        return self.versions[self.live].placement if self.live else None

    def known(self, version: str) -> Release:
        if version not in self.versions:
            raise UnknownVersion(f"no version {version!r}; known are {', '.join(self.versions) or 'none'}")
        return self.versions[version]

    def assignment(self, model: str, tag: str = "") -> Assignment:
        return Assignment(model, self.revision, self.placement, self.canary, tag)

    def waiting(self, against: str | None) -> str | None:
        """The latest candidate that passed the gate against what serves now, if one may be tried; a judgement against another is stale."""
        if self.pinned or self.canary is not None or against is None:
            return None
        fit = (v for v, r in reversed(self.versions.items()) if r.state == "candidate" and r.against == against)
        return next(fit, None)

    def heir(self, against: str | None) -> str | None:
        """What takes the place of a version if all proves good that was judged against it, and against that in turn: the canary, or else
        the latest candidate. Itself if there is none, or nothing is to change by itself."""
        tried = {} if self.pinned else {v: r for v, r in self.versions.items() if r.state in ("candidate", "canary")}
        ordered = sorted(tried, key=lambda version: tried[version].state == "canary")
        after = {tried[version].against: version for version in ordered}
        while against in after:
            against = after.pop(against)
        return against

    def summary(self) -> str:
        """The present state in words, for whoever came too late."""
        canary = f", {self.canary.placement.version} is the canary" if self.canary else ""
        pinned = ", pinned" if self.pinned else ""
        return f"at revision {self.revision} {self.live or 'no version'} is live{pinned}{canary}"

    def check(self) -> None:
        """That the state is one: at most one live version, the lineage's last, and at most one canary. AssertionError."""
        by_state = {state: [v for v, r in self.versions.items() if r.state == state] for state in get_args(State)}
        assert by_state["live"] == ([self.live] if self.live else [])
        assert by_state["canary"] == ([self.canary.placement.version] if self.canary else [])

    # -- plans --------------------------------------------------------------------------------------------------------------

    def register(self, base: Base, placement: Placement | None, manifest: Value | None) -> Change | None:
        """The base, and the version that the configuration names. None if it names what it named last, whatever was done since. Another one
        becomes live in the place of one that the configuration brought; beside one that was promoted or pinned it is only noted."""
        release = Release(placement, manifest or {}, "live", initial=True) if placement else None
        if self.base != base:
            return self.begin(base, release)
        if release is None or release.placement.version == self.configured:
            return None
        version = release.placement.version
        known = self.versions.get(version)
        if self.live == version or self.pinned or (self.live and not self.versions[self.live].initial):
            noted = self.plan("register", version)
            return noted if known else replace(noted, states={version: "retired"}, release=replace(release, state="retired"))
        named = replace(known, placement=release.placement, initial=True) if known else release
        return Change("register", version, version, self.pinned, self.out("live", "canary") | {version: "live"}, release=named)

    def begin(self, base: Base, release: Release | None) -> Change:
        """Another base ends all that was for the last one."""
        version = release.placement.version if release else None
        states = self.out("candidate", "canary", "live") | ({version: "live"} if version else {})
        return Change("register", version, version, False, states, release=release, base=base)

    def submit(self, placement: Placement, manifest: Value, verdict: Verdict, problem: str, against: str | None) -> Change | None:
        """A new version: a candidate if it may be loaded and passed the gate, else rejected. None if the version is known."""
        if placement.version in self.versions:
            return None
        state: State = "candidate" if verdict.passed and not problem else "rejected"
        release = Release(placement, manifest, state, asdict(verdict), against)
        return replace(self.plan("submit", placement.version), states={placement.version: state}, release=release)

    def start_canary(self, version: str, share: float, salt: str, against: str | None) -> Change:
        """A candidate, or a version from before, serves a share of requests beside what serves now. ValueError for a share that cannot
        be."""
        check_share(share)
        release = self.usable(version)
        if release.state in ("live", "canary"):
            raise RegistryConflict(f"{version} is {release.state} already: {self.summary()}")
        if self.pinned:
            raise RegistryConflict(f"nothing is tried while a version is pinned: {self.summary()}")
        if self.canary is not None:
            raise RegistryConflict(f"one canary at a time: {self.summary()}")
        if against is None:
            raise RegistryConflict(f"a canary is compared with a live version, and there is none: {self.summary()}")
        return Change("canary", version, self.live, self.pinned, {version: "canary"}, version, share, salt)

    def promote(self, version: str) -> Change:
        """A version becomes the live one. A canary of another version ends, since what it was compared with is gone."""
        if self.usable(version).state == "live":
            raise RegistryConflict(f"{version} is live already: {self.summary()}")
        return Change("promote", version, version, self.pinned, self.out("live", "canary") | {version: "live"})

    def roll_back(self, version: str | None = None) -> Change:
        """The canary if there is one, else the live version, gives way to what was live before; `version` says which of them is meant."""
        canary = self.canary.placement.version if self.canary else None
        failed = version or canary or self.live
        if failed is None or failed not in (canary, self.live):
            raise RegistryConflict(f"{failed or 'no version'} is neither live nor a canary: {self.summary()}")
        if failed == canary:
            return Change("roll_back", failed, self.live, self.pinned, {failed: "rolled_back"})
        previous = self.previous()
        states = self.out("canary") | {failed: "rolled_back"} | ({previous: "live"} if previous else {})
        return Change("roll_back", failed, previous, self.pinned, states)

    def pin(self, version: str) -> Change:
        """A version becomes live and stays: until it is unpinned, nothing changes by itself."""
        live = self.usable(version).state == "live"
        if live and self.pinned:
            raise RegistryConflict(f"{version} is pinned already: {self.summary()}")
        states = self.out("canary") if live else self.out("live", "canary") | {version: "live"}
        return Change("pin", version, version, True, states)

    def unpin(self) -> Change:
        if not self.pinned:
            raise RegistryConflict(f"nothing is pinned: {self.summary()}")
        return replace(self.plan("unpin", self.live), pinned=False)

    def retire(self, version: str) -> Change:
        """Withdraw a candidate."""
        if self.known(version).state != "candidate":
            raise RegistryConflict(f"{version} is {self.known(version).state}, only candidates are withdrawn: {self.summary()}")
        return replace(self.plan("retire", version), states={version: "retired"})

    def plan(self, action: Action, version: str | None) -> Change:
        """A change that leaves everything as it is."""
        canary = self.canary
        kept: dict[str, Any] = {"canary": canary.placement.version, "share": canary.share, "salt": canary.salt} if canary else {}
        return Change(action, version, self.live, self.pinned, **kept)

    def usable(self, version: str) -> Release:
        """A version that was not rejected and fits the base."""
        release = self.known(version)
        if release.state == "rejected":
            raise RegistryConflict(f"{version} was rejected ({release.why}): {self.summary()}")
        if problem := misfit(release.manifest, self.base):
            raise RegistryConflict(f"{problem}: {self.summary()}")
        return release

    def previous(self) -> str | None:
        """The version that was live before and was not itself rolled back."""
        for version in reversed(self.lineage[:-1]):
            if version is None or self.versions[version].state not in ("live", "rolled_back"):
                return version
        raise RegistryConflict(f"there is nothing to go back to: {self.summary()}")

    def out(self, *states: State) -> dict[str, State]:
        """All versions that are in one of these states, retired."""
        return {version: "retired" for version, release in self.versions.items() if release.state in states}


def misfit(manifest: Value, base: Base | None) -> str:
    """Why a version cannot draft for the base; "" if it can, or nobody knows."""
    try:
        found = Manifest.model_validate(manifest)
        if base is not None:
            check_base(found, base.vocab_size, base.emb_dim)
    except BundleError as error:
        return str(error)
    except ValueError:
        return ""
    return ""
