"""A replica's part in the refresh beside a real registry, without Ray: versions change under streams in flight, and what cannot be loaded
changes nothing."""

from __future__ import annotations

import asyncio
import errno
import gc
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle

from actors.artefacts import ArtefactError, Artefacts
from actors.policy import parse_policy
from actors.registry import RegistryKeeper, RegistrySettings
from actors.releases import Base
from actors.store import StoreError, open_state
from configs.settings import CaptureSettings, EngineSettings, ModelRefreshSettings, ModelSettings, Settings, TrainerSettings
from drafters.bundle import Bundle, BundleError, Origin, fingerprint, write_bundle
from drafters.checkpoint import CheckpointError
from drafters.mlp import MLPSpeculator
from drafters.traces import Trace
from drafters.versions import Canary, Line
from drafters.walk import walk
from policies import CanaryRule, Plan, Verdict, in_canary
from services import refresh
from services.host import ModelHost
from services.pilot import Pilot
from services.protocol import Job
from services.refresh import Refresh
from services.refresh_actors import RefreshPlan, refresh_plan, trainer_actor
from tests.services.folders import write_model
from tests.services.test_host import TOKEN_BYTES, answer, last

PASSED = Verdict(True, 150, 2.0, 2.1, 0.1, 0.05, 0.15, "better")
RULE = CanaryRule(share=0.5, least=1000)


class Local:
    """An actor of this process: a keeper's methods as an actor's handle has them. away: it raises what a dead one does."""

    def __init__(self, keeper: Any) -> None:
        self.keeper, self.away, self.told = keeper, False, []

    def __getattr__(self, name: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            if self.away:
                raise ConnectionError("the actor died")
            self.told.append((name, *arguments))
            return getattr(self.keeper, name)(*arguments)

        return SimpleNamespace(remote=remote)


class Stand:
    """A registry with a place for bundles, one replica, and what it captured."""

    def __init__(self, folder: Path, root: Path, **changes: Any) -> None:
        self.folder, self.root, self.now = folder, root, 0.0
        self.place = Artefacts(str(root / "place"), root / "made")
        settings = RegistrySettings(automatic=False, rule=RULE)
        self.keeper = RegistryKeeper(
            open_state(f"sqlite:///{root}/state.db"), Artefacts(str(root / "place"), root / "checked"), lambda: self.now, settings
        )
        self.registry = Local(self.keeper)
        self.trainer = Local(SimpleNamespace(add=lambda traces, lost: None, load=lambda source, running: None))
        self.settings = model_settings(folder, **changes)
        plan = Plan.of(0, "toy", parse_policy({"kind": "fixed", "depth": 3, "width": 3}))
        self.records: list[Any] = []
        self.host = ModelHost(self.settings, Pilot("r1", plan), self.records.append)
        wanted = RefreshPlan(lambda: self.registry, lambda *_: lambda: self.trainer, str(root / "place"), root / "cache")
        self.refresh = Refresh(self.settings, wanted, self.host, "r1", lambda: self.now)

    async def beat(self, count: int = 1) -> None:
        """What `works` do, at once."""
        for _ in range(count):
            for act in (self.refresh.report, self.refresh.register, self.refresh.change):
                await self.refresh.attempt(act, "it")
            self.now += 0.25

    def version(self, seed: int, tag: str = "", **changes: Any) -> Bundle:
        """Another speculator, published and a candidate of a domain."""
        torch.manual_seed(seed)
        config = MLPSpeculator.from_pretrained(self.folder / "speculator").config
        made = MLPSpeculator(config)
        base = self.refresh.configured.base
        origin = dict(model="toy", base=base.name, base_revision=base.revision, created=float(seed)) | changes
        bundle = write_bundle(self.root / "written", made, Origin(**origin))
        self.place.publish(bundle)
        told = self.keeper.submit("toy", self.url(bundle), bundle.manifest, PASSED, "trainer", tag=tag)
        assert told["state"] == "candidate", self.keeper.state("toy", tag)["versions"][-1]["why"]
        return bundle

    def url(self, bundle: Bundle) -> str:
        return f"{self.root}/place/toy/{bundle.manifest.version}"

    def shown(self, tag: str = "") -> dict[str, Any]:
        return self.keeper.state("toy", tag)["replicas"]["r1"]

    async def text(self, name: str, **fields: Any) -> str:
        _, texts = await answer(self.host, job(name, **fields))
        return texts[0]


def serves(host: ModelHost, request: str, tag: str = "") -> str:
    """The version that drafts for a request."""
    return host.versions.serving(request, tag).version


def job(name: str, **fields: Any) -> Job:
    return Job(id=name, model="toy", prompts=("The quick",), **{"max_tokens": 30, "seed": 3, "ignore_eos": True, **fields})


def model_settings(
    folder: Path, share: float = 1.0, tags: tuple[str, ...] = (), trainer: TrainerSettings | None = None, **changes: Any
) -> ModelSettings:
    sizes = EngineSettings(kv_bytes=4096 * TOKEN_BYTES, max_running=8)
    wanted = ModelRefreshSettings(
        enabled=True, capture=CaptureSettings(share=share, top=4), tags=tags, trainer=trainer or TrainerSettings()
    )
    named = dict(name="toy", base=str(folder), speculator=str(folder / "speculator")) | changes
    return ModelSettings(**named, engine=sizes, threads=1, packed_weights=None, refresh=wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stand(folder, tmp_path) -> AsyncIterator[Stand]:
    made = Stand(folder, tmp_path)
    await made.host.start()
    await made.beat(2)
    yield made
    made.host.stop()
    made.host.runner.engine.check()


@pytest.fixture
async def tagged(folder, tmp_path) -> AsyncIterator[Stand]:
    """The same with two domains."""
    made = Stand(folder, tmp_path, tags=("law", "sql"))
    await made.host.start()
    await made.beat(2)
    yield made
    made.host.stop()
    made.host.runner.engine.check()


async def test_a_trainer_with_a_device_of_its_own_is_told_the_load_once_which_starts_it(folder, tmp_path):
    told: list[tuple[str, int]] = []
    for running in (None, 0):
        made = Stand(folder, tmp_path / str(running), trainer=TrainerSettings(running=running))
        made.trainer = Local(SimpleNamespace(load=lambda source, running: told.append((source, running))))
        await made.host.start()
        await made.beat(2)
        for _ in range(3):
            await made.refresh.tell_load()
            made.now += 10.0
        made.host.stop()
    assert told == [("r1", 0)] * 4


async def test_the_configured_speculator_is_what_the_registry_learns_first(stand):
    configured = fingerprint(stand.folder / "speculator")
    (entry,) = stand.keeper.history("toy")
    assert (entry["action"], entry["to"]) == ("register", configured)
    assert stand.shown()["agrees"] and stand.shown()["serving"] == configured and not stand.shown()["errors"]
    await stand.beat(4)
    assert len(stand.keeper.history("toy")) == 1


async def test_the_revision_of_a_base_is_the_hubs_commit_that_was_loaded(folder, tmp_path, monkeypatch):
    """With a cache as the hub's client lays it out, in which another commit is the latest by the time that the registry is told."""
    old, new = "0" * 39 + "1", "0" * 39 + "2"
    repository = tmp_path / "hub" / "models--org--toy"
    for commit in (new, old):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    stand = Stand(folder, tmp_path, base="org/toy")
    await stand.host.start()
    (repository / "refs" / "main").write_text(new)
    await stand.beat(2)
    assert (stand.refresh.configured.base.name, stand.refresh.configured.base.revision) == ("org/toy", old)
    assert stand.version(1).manifest.base_revision == old
    (configured, candidate) = stand.keeper.state("toy")["versions"]
    assert configured["base_revision"] == candidate["base_revision"] == old and await stand.text("a")
    stand.host.stop()


async def test_the_revision_of_a_base_in_a_folder_is_a_digest_of_its_weights(stand):
    assert stand.refresh.configured.base.revision == fingerprint(stand.folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_texts_are_the_same_while_versions_change_under_streams(stand, temperature):
    wanted = dict(temperature=temperature, max_tokens=120)
    expected = [await stand.text(f"before-{i}", seed=i, **wanted) for i in range(4)]
    bundles = [stand.version(seed) for seed in (1, 2)]
    drafters = [stand.host.load_version(b.folder, b.manifest.version) for b in bundles]
    swaps = 0

    async def flip() -> None:
        nonlocal swaps
        while True:
            beside = Canary(drafters[swaps % 2], lambda request: in_canary(request, "s", 0.5), "s") if swaps % 3 else None
            await stand.host.swap({"": Line(drafters[(swaps + 1) % 2], beside)})
            swaps += 1

    flipping = asyncio.create_task(flip())
    found = await asyncio.gather(*(stand.text(f"during-{i}", seed=i, **wanted) for i in range(4)))
    flipping.cancel()
    assert found == expected and swaps > 20 and stand.host.runner.engine.draft_failures == 0
    assert stand.host.pilot.version in {b.manifest.version for b in bundles}


async def test_a_promotion_and_a_rollback_reach_the_replica(stand):
    before = await stand.text("a")
    bundle = stand.version(1)
    version, old = bundle.manifest.version, stand.host.configured_version
    retired = weakref.ref(stand.host.versions.common.live)
    stand.keeper.promote("toy", version, "operator", "try it")
    await stand.beat(2)
    gc.collect()
    assert retired() is None, "nothing keeps the old one"
    assert stand.host.pilot.version == version and stand.shown()["loaded"] == {version: bundle.manifest.checksum}
    assert stand.shown()["agrees"] and await stand.text("b") == before
    assert stand.records[-1].speculator_version == version
    stand.keeper.rollback("toy", "operator", "no")
    await stand.beat(2)
    assert stand.host.pilot.version == old and stand.shown()["agrees"] and await stand.text("c") == before


async def test_a_canary_serves_its_share_and_is_counted(stand):
    version, live = stand.version(1).manifest.version, stand.host.configured_version
    stand.keeper.start_canary("toy", version, "operator")
    await stand.beat()
    chosen = stand.keeper.assignment("toy")
    answers = [await answer(stand.host, job(f"r{i}", seed=i)) for i in range(12)]
    served = [last(items).speculation.version for items, _ in answers]
    assert served == [chosen.serving(f"r{i}-0").version for i in range(12)] and set(served) == {version, live}
    assert [r.speculator_version for r in stand.records] == served
    await stand.beat()
    _, arms = stand.refresh.tally.read("")
    assert {v: arm.requests for v, arm in arms.items()} == {v: served.count(v) for v in served}
    assert sum(arm.kept for arm in arms.values()) == sum(last(items).usage.accepted for items, _ in answers)
    canary = stand.keeper.state("toy")["canary"]
    assert (canary["candidate_requests"], canary["live_requests"]) == (served.count(version), served.count(live))
    assert set(stand.shown()["loaded"]) == {version, live}
    stand.keeper.promote("toy", version, "operator")
    await stand.beat(2)
    assert stand.refresh.tally.read("") == (refresh.Run(), {}) and set(stand.refresh.checksums) == {version}


async def test_another_replica_of_the_same_name_space_counts_afresh(stand, folder, tmp_path):
    version = stand.version(1).manifest.version
    stand.keeper.start_canary("toy", version, "operator")
    await stand.beat()
    for i in range(6):
        await stand.text(f"r{i}")
    await stand.beat()
    counted = stand.keeper.state("toy")["canary"]
    other = ModelHost(stand.settings, Pilot("r2", stand.host.pilot.plan))
    again = Refresh(stand.settings, stand.refresh.plan, other, "r2", lambda: stand.now)
    await other.start()
    await again.report()
    await again.change()
    assert other.versions.common.canary.drafter.version == version and serves(other, "r1-0") == serves(stand.host, "r1-0")
    await again.report()
    assert stand.keeper.state("toy")["canary"] == counted and set(stand.keeper.state("toy")["replicas"]) == {"r1", "r2"}
    other.stop()


# -- domains ----------------------------------------------------------------------------------------------------------------


async def versions_of(stand: Stand, tags: tuple[str, ...] = ("", "law", "sql", "other")) -> list[str]:
    """The versions that answer requests with these tags, all at once."""
    answers = await asyncio.gather(*(answer(stand.host, job(f"r{i}", tag=tag, seed=i)) for i, tag in enumerate(tags)))
    return [last(items).speculation.version for items, _ in answers]


async def test_a_domain_without_versions_follows_the_common_line(tagged):
    configured = tagged.host.configured_version
    assert await versions_of(tagged) == [configured] * 4 and list(tagged.host.versions.lines) == [""]
    version, checksum = (found := tagged.version(1).manifest).version, found.checksum
    tagged.keeper.start_canary("toy", version, "operator", share=1 - 1e-9)
    await tagged.beat(2)
    assert await versions_of(tagged) == [version] * 4  # its canary too
    tagged.keeper.promote("toy", version, "operator")
    await tagged.beat(2)
    assert await versions_of(tagged) == [version] * 4
    for tag in ("", "law"):
        assert tagged.shown(tag)["agrees"] and tagged.shown(tag)["loaded"] == {version: checksum}


async def test_requests_are_drafted_for_by_their_domains_version_and_texts_stay(tagged):
    before = [await tagged.text(f"before-{i}", tag=tag, seed=i) for i, tag in enumerate(("law", "", "sql"))]
    law, common = tagged.version(1, "law").manifest.version, tagged.version(2).manifest.version
    tagged.keeper.promote("toy", law, "operator", tag="law")
    tagged.keeper.promote("toy", common, "operator")
    await tagged.beat(2)
    assert await versions_of(tagged) == [common, law, common, common]
    assert tagged.host.status().version == common and tagged.host.runner.engine.draft_failures == 0
    after = [await tagged.text(f"after-{i}", tag=tag, seed=i) for i, tag in enumerate(("law", "", "sql"))]
    assert after == before
    assert [(r.tag, r.speculator_version) for r in tagged.records[-3:]] == [("law", law), ("", common), ("sql", common)]
    assert [(t.tag, t.version) for t in tagged.refresh.traces.take()[-3:]] == [("law", law), ("", common), ("sql", common)]
    for tag, version in (("law", law), ("", common), ("sql", common)):
        assert tagged.shown(tag)["serving"] == version and tagged.shown(tag)["agrees"] and set(tagged.shown(tag)["loaded"]) == {version}
    tagged.keeper.rollback("toy", "operator", tag="law")
    await tagged.beat(2)
    assert await versions_of(tagged) == [common] * 4 and len(tagged.host.versions.drafters) == 1


async def test_a_version_that_several_domains_have_is_loaded_once(tagged, monkeypatch):
    loads: list[str] = []
    load = tagged.host.load_version
    monkeypatch.setattr(tagged.host, "load_version", lambda folder, version: loads.append(version) or load(folder, version))
    version = tagged.version(1, "law").manifest.version
    tagged.version(1, "sql")
    tagged.keeper.promote("toy", version, "operator", tag="law")
    tagged.keeper.promote("toy", version, "operator", tag="sql")
    await tagged.beat(2)
    assert loads == [version] and len(tagged.host.versions.drafters) == 2
    assert tagged.host.versions.lines["law"].live is tagged.host.versions.lines["sql"].live
    tagged.keeper.rollback("toy", "operator", tag="law")
    await tagged.beat(2)
    assert loads == [version] and await versions_of(tagged) == [
        configured := tagged.host.configured_version,
        configured,
        version,
        configured,
    ]


async def test_a_canary_of_a_domain_is_counted_beside_what_serves_there(tagged):
    version, live = tagged.version(1, "law").manifest.version, tagged.host.configured_version
    tagged.keeper.start_canary("toy", version, "operator", tag="law")
    await tagged.beat()
    chosen = tagged.keeper.assignment("toy", "law")
    served = [last((await answer(tagged.host, job(f"r{i}", seed=i, tag="law")))[0]).speculation.version for i in range(12)]
    assert served == [version if chosen.serving(f"r{i}-0") else live for i in range(12)] and set(served) == {version, live}
    assert await versions_of(tagged, ("", "sql", "other")) == [live] * 3
    await tagged.beat()
    canary = tagged.keeper.state("toy", "law")["canary"]
    assert (canary["candidate_requests"], canary["live_requests"]) == (served.count(version), served.count(live))
    other = tagged.version(2).manifest.version
    tagged.keeper.promote("toy", other, "operator")  # what it is compared with is another now
    await tagged.beat(2)
    assert tagged.refresh.tally.read("law") == (refresh.Run(chosen.canary.salt, other), {})
    canary = tagged.keeper.state("toy", "law")["canary"]
    assert (canary["candidate_requests"], canary["live_requests"]) == (0, 0)
    assert set(await versions_of(tagged, ("law",) * 12)) == {version, other}


async def test_a_change_in_one_domain_leaves_what_another_counts(tagged):
    tagged.keeper.start_canary("toy", tagged.version(1, "law").manifest.version, "operator", tag="law")
    await tagged.beat()
    await versions_of(tagged, ("law",) * 6)
    counted = tagged.refresh.tally.read("law")
    tagged.keeper.promote("toy", tagged.version(2, "sql").manifest.version, "operator", tag="sql")
    await tagged.beat(2)
    assert tagged.refresh.tally.read("law") == counted and sum(arm.requests for arm in counted[1].values()) == 6


async def test_a_domains_version_that_cannot_be_loaded_leaves_the_domain_as_it_is(tagged):
    bundle, common = tagged.version(1, "law"), tagged.version(2).manifest.version
    truncate(Path(tagged.url(bundle)))
    tagged.keeper.promote("toy", bundle.manifest.version, "operator", tag="law")
    tagged.keeper.promote("toy", common, "operator")
    await tagged.beat(3)
    assert await versions_of(tagged) == [common] * 4
    assert "truncated" in tagged.shown("law")["errors"][bundle.manifest.version] and not tagged.shown("law")["agrees"]
    assert tagged.shown()["agrees"] and not tagged.shown()["errors"]


async def test_a_replica_that_is_started_again_comes_up_with_every_domains_version(tagged):
    law = tagged.version(1, "law").manifest.version
    tagged.keeper.promote("toy", law, "operator", tag="law")
    again = ModelHost(tagged.settings, Pilot("r2", tagged.host.pilot.plan))
    beside = Refresh(tagged.settings, tagged.refresh.plan, again, "r2", lambda: tagged.now)
    await again.start()
    await beside.report()
    await beside.change()
    assert [serves(again, "x", tag) for tag in ("", "law", "sql")] == [again.configured_version, law, again.configured_version]
    again.stop()


def truncate(bundle: Path) -> None:
    file = next(bundle.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-99])


def vanish(bundle: Path) -> None:
    shutil.rmtree(bundle)


@pytest.mark.parametrize(("harm", "reason"), [(truncate, "truncated"), (vanish, "no bundle")])
async def test_a_version_that_cannot_be_loaded_leaves_the_old_one(stand, harm, reason):
    before, bundle = await stand.text("a"), stand.version(1)
    harm(Path(stand.url(bundle)))
    stand.keeper.promote("toy", bundle.manifest.version, "operator")
    await stand.beat(3)
    shown = stand.shown()
    assert reason in shown["errors"][bundle.manifest.version] and not shown["agrees"]
    assert shown["serving"] == stand.host.configured_version and await stand.text("b") == before
    stand.keeper.rollback("toy", "operator", "cannot be loaded")
    await stand.beat(2)
    assert stand.shown()["agrees"] and not stand.shown()["errors"]


@pytest.mark.parametrize("held_up", ["loading", "publishing"])
async def test_a_replica_tells_how_it_stands_whatever_holds_it_up(stand, monkeypatch, held_up):
    go_on = threading.Event()
    where, name = (stand.host, "load_version") if held_up == "loading" else (stand.refresh.artefacts, "publish")
    act = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *wanted: act(*wanted) if go_on.wait(30) else None)
    monkeypatch.setattr(refresh, "REPORT_S", 0.01)
    version = stand.version(1).manifest.version
    stand.keeper.promote("toy", version, "operator")
    stand.refresh.registered, stand.refresh.register_again = held_up == "loading", 0.0
    stand.registry.told.clear()
    works = [asyncio.create_task(work) for work in stand.refresh.works()]
    try:
        async with asyncio.timeout(30):
            while len(stand.registry.told) < 5:
                await asyncio.sleep(0.01)
            assert stand.refresh.following.assignments[""].live.version == version
            assert held_up != "loading" or stand.host.pilot.version != version
            go_on.set()
            while not (stand.shown()["agrees"] and stand.refresh.registered):
                await asyncio.sleep(0.01)
    finally:
        go_on.set()
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)


async def test_a_live_version_that_cannot_be_loaded_ends_the_canary_beside_the_old_one(stand):
    canary, bundle = stand.version(1).manifest.version, stand.version(2)
    stand.keeper.start_canary("toy", canary, "operator")
    await stand.beat(2)
    truncate(Path(stand.url(bundle)))
    stand.keeper.promote("toy", bundle.manifest.version, "operator")
    await stand.beat(2)
    assert stand.host.versions.common == Line(stand.host.versions.common.live) and set(stand.shown()["loaded"]) == {
        stand.host.configured_version
    }


async def test_a_domain_whose_first_version_cannot_be_loaded_goes_on_with_the_common_line(tagged):
    canary, bundle = tagged.version(1, "law").manifest.version, tagged.version(2, "law")
    tagged.keeper.start_canary("toy", canary, "operator", tag="law")
    await tagged.beat(2)
    truncate(Path(tagged.url(bundle)))
    tagged.keeper.promote("toy", bundle.manifest.version, "operator", tag="law")
    await tagged.beat(2)
    tagged.keeper.promote("toy", common := tagged.version(3).manifest.version, "operator")
    await tagged.beat(2)
    assert await versions_of(tagged) == [common] * 4 and len(tagged.host.versions.drafters) == 1


async def test_every_version_that_serves_is_there_after_a_restart_while_the_place_is_away(folder, tmp_path, monkeypatch):
    """However many versions one domain comes to."""
    tags = tuple(f"t{i}" for i in range(4))
    stand = Stand(folder, tmp_path, tags=tags)
    await stand.host.start()
    await stand.beat(2)
    versions = {tag: stand.version(seed, tag).manifest.version for seed, tag in enumerate(tags, 1)}
    for tag, version in versions.items():
        stand.keeper.promote("toy", version, "operator", tag=tag)
    await stand.beat(2)
    for seed in range(20, 33):
        stand.keeper.promote("toy", busy := stand.version(seed, "t3").manifest.version, "operator", tag="t3")
        await stand.beat(2)
    versions["t3"] = busy
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (_ for _ in ()).throw(OSError("no route")))
    again = ModelHost(stand.settings, Pilot("r2", stand.host.pilot.plan))
    beside = Refresh(stand.settings, stand.refresh.plan, again, "r2", lambda: stand.now)
    await again.start()
    await beside.report()
    await beside.change()
    assert {tag: serves(again, "x", tag) for tag in tags} == versions
    cached = [folder for folder in (tmp_path / "cache").rglob("manifest.json") if "fetched" in folder.parts]
    assert len(cached) == 3 * 5
    again.stop()
    stand.host.stop()


@pytest.mark.parametrize("trouble", [KeyError("weights"), RuntimeError("out of memory")])
async def test_whatever_keeps_a_version_from_being_loaded_is_its_error(stand, monkeypatch, trouble):
    monkeypatch.setattr(stand.host, "load_version", lambda *_: (_ for _ in ()).throw(trouble))
    version = stand.version(1).manifest.version
    stand.keeper.promote("toy", version, "operator")
    await stand.beat(3)
    assert stand.shown()["errors"] == {version: f"{type(trouble).__name__}: {trouble}"} and await stand.text("a")


def refusing(error: Exception, stand: Stand, loads: list[float]) -> Callable[..., Any]:
    """Loads nothing, and notes when it was to."""

    def load(*wanted: object) -> Any:
        loads.append(stand.now)
        raise error

    return load


async def test_a_version_that_there_was_no_room_for_is_tried_again_until_there_is(stand, monkeypatch):
    loads: list[float] = []
    monkeypatch.setattr(stand.host, "load_version", refusing(OSError(errno.ENOSPC, "no space left"), stand, loads))
    version, began = stand.version(1).manifest.version, stand.now
    stand.keeper.promote("toy", version, "operator")
    for turn in range(3):
        stand.now = began + turn * refresh.AGAIN_S
        await stand.beat(8)
        assert "no space left" in stand.shown()["errors"][version] and not stand.shown()["agrees"]
    assert loads == [began + turn * refresh.AGAIN_S for turn in range(3)]
    monkeypatch.undo()
    stand.now = began + 3 * refresh.AGAIN_S
    await stand.beat(2)
    assert stand.host.pilot.version == version and stand.shown()["agrees"] and not stand.shown()["errors"]


@pytest.mark.parametrize("verdict", [BundleError("truncated"), CheckpointError("no such head")])
async def test_a_version_that_is_wrong_itself_is_not_tried_again(stand, monkeypatch, verdict):
    loads: list[float] = []
    monkeypatch.setattr(stand.host, "load_version", refusing(verdict, stand, loads))
    version = stand.version(1).manifest.version
    stand.keeper.promote("toy", version, "operator")
    for _ in range(3):
        await stand.beat(2)
        stand.now += refresh.AGAIN_S
    assert len(loads) == 1 and str(verdict) in stand.shown()["errors"][version]


async def test_a_version_that_is_tried_again_soon_leaves_another_its_time(tagged, monkeypatch):
    loads: list[float] = []
    law, common = tagged.version(1, "law").manifest.version, tagged.version(2).manifest.version
    monkeypatch.setattr(tagged.host, "load_version", refusing(MemoryError("device"), tagged, loads))
    fetch = tagged.refresh.artefacts.fetch

    def cut_off(url: str, *wanted: Any) -> Bundle:
        if law in url:
            raise ArtefactError("no route")
        return fetch(url, *wanted)

    monkeypatch.setattr(tagged.refresh.artefacts, "fetch", cut_off)
    tagged.keeper.promote("toy", law, "operator", tag="law")
    tagged.keeper.promote("toy", common, "operator")
    for _ in range(refresh.PATIENCE):
        await tagged.beat(2)
        tagged.now += refresh.RETRY_S
    assert len(loads) == 1 and "no route" in tagged.shown("law")["errors"][law] and "device" in tagged.shown()["errors"][common]
    monkeypatch.undo()
    await tagged.beat(2)
    assert serves(tagged.host, "x", "law") == law and serves(tagged.host, "x") == tagged.host.configured_version
    tagged.now += refresh.AGAIN_S
    await tagged.beat(2)
    assert serves(tagged.host, "x") == common and tagged.shown()["agrees"] and tagged.shown("law")["agrees"]


async def test_a_canary_that_cannot_be_loaded_is_rolled_back_with_the_reason(stand):
    bundle = stand.version(1)
    truncate(Path(stand.url(bundle)))
    stand.keeper.start_canary("toy", bundle.manifest.version, "operator")
    await stand.beat(3)
    last_change = stand.keeper.history("toy")[-1]
    assert last_change["action"] == "roll_back" and "truncated" in last_change["why"] and stand.keeper.assignment("toy").canary is None
    assert serves(stand.host, "x") == stand.host.configured_version and stand.shown()["agrees"]


@pytest.mark.parametrize("changes", [dict(vocab_size=99), dict(emb_dim=32)], ids=["vocabulary", "width"])
async def test_a_version_for_another_base_is_refused(stand, changes, tmp_path):
    config = MLPSpeculator.from_pretrained(stand.folder / "speculator").config
    shape = {name: getattr(config, name) for name in ("emb_dim", "inner_dim", "vocab_size", "n_predict", "n_candidates")}
    made = MLPSpeculator(type(config)(**(shape | changes), top_k_tokens_per_head=config.top_k_tokens_per_head))
    bundle = write_bundle(tmp_path / "odd", made, Origin(model="toy", base="x", created=0))
    stand.place.publish(bundle)
    chosen = stand.keeper.assignment("toy")
    placement = type(chosen.live)(bundle.manifest.version, stand.url(bundle), bundle.manifest.checksum)
    stand.refresh.assign([type(chosen)("toy", chosen.revision, placement)])
    await stand.refresh.change()
    assert "wrong" in stand.refresh.following.errors[bundle.manifest.version]
    assert stand.host.pilot.version == stand.host.configured_version and await stand.text("a")


async def test_a_place_that_is_away_is_asked_again_before_it_is_an_error(stand, monkeypatch):
    bundle = stand.version(1)
    version = bundle.manifest.version
    stand.keeper.promote("toy", version, "operator")
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (_ for _ in ()).throw(OSError("no route")))
    await stand.beat()
    assert not stand.refresh.following.errors and stand.host.pilot.version != version
    for _ in range(2):
        stand.now += refresh.RETRY_S
        await stand.beat()
    await stand.beat()
    assert "no route" in stand.shown()["errors"][version]
    monkeypatch.undo()
    stand.now += refresh.RETRY_S
    await stand.beat(2)
    assert stand.host.pilot.version == version and stand.shown()["agrees"] and not stand.shown()["errors"]


async def test_nothing_happens_while_the_registry_or_its_store_is_away(stand, monkeypatch):
    before = await stand.text("a")
    stand.registry.away = True
    await stand.beat(3)
    assert await stand.text("b") == before
    stand.registry.away = False
    version = stand.version(1).manifest.version
    stand.keeper.promote("toy", version, "operator")
    monkeypatch.setattr(stand.keeper._store, "entries", lambda *_: (_ for _ in ()).throw(StoreError("away")))
    await stand.beat(2)
    assert stand.host.pilot.version == version and await stand.text("c") == before


async def test_a_place_that_never_was_holds_up_registration_and_nothing_else(folder, tmp_path, caplog):
    (tmp_path / "place").write_text("not a folder")
    stand = Stand(folder, tmp_path)
    await stand.host.start()
    for _ in range(3):
        stand.now += refresh.RETRY_S
        await stand.beat(2)
    assert await stand.text("a") and not stand.refresh.registered and stand.refresh.trainer is None
    assert len([r for r in caplog.records if "held up" in r.message and "cannot be reached" in r.message]) == 1
    (tmp_path / "place").unlink()
    stand.now += refresh.RETRY_S
    await stand.beat(2)
    assert stand.shown()["agrees"] and stand.refresh.trainer is not None
    stand.host.stop()


async def test_a_replica_with_a_new_domain_follows_while_the_place_is_away(stand, monkeypatch):
    version = stand.version(1).manifest.version
    stand.keeper.promote("toy", version, "operator")
    await stand.beat(2)  # and has it in its machine's cache
    again = ModelHost(model_settings(stand.folder, tags=("law",)), Pilot("r2", stand.host.pilot.plan))
    beside = Refresh(again.settings, stand.refresh.plan, again, "r2", lambda: stand.now)
    await again.start()
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (_ for _ in ()).throw(OSError("no route")))
    for act in (beside.report, beside.register, beside.change):
        await beside.attempt(act, "it")
    assert not beside.registered and again.pilot.version == version
    monkeypatch.undo()
    stand.now += refresh.RETRY_S
    await beside.register()
    assert beside.registered and stand.keeper.assignment("toy", "law").revision == 1
    again.stop()


async def test_what_is_captured_is_what_a_trainer_replays(stand):
    await stand.text("a", temperature=0.7, max_tokens=25)
    await stand.text("b", temperature=0.0, repetition_penalty=1.2, max_tokens=25)
    first, second = stand.refresh.traces.take()
    runner = stand.host.runner.engine.base
    for trace, record in zip((first, second), stand.records, strict=True):
        trace.check(runner.vocab_size, runner.hidden_size)
        assert tuple(trace.answer.tolist()) == record.output and trace.params.seed == record.seed
        assert trace.position == len(record.prompt) and trace.version == stand.host.configured_version
        again = Trace.from_bytes(trace.to_bytes())
        assert again.tokens.tolist() == trace.tokens.tolist() and again.hidden.dtype == torch.bfloat16
        walked = walk(MLPSpeculator.from_pretrained(stand.folder / "speculator"), again)
        assert 1 <= walked.steps <= walked.tokens == len(again) - 1
    assert first.prompt_length == 0 and second.prompt_length == len(stand.records[1].prompt)


async def test_nothing_is_captured_of_requests_that_are_not_to_be_stored(stand):
    await stand.text("no", store=False)
    await stand.text("yes")
    assert [t.request for t in stand.refresh.traces.take()] == ["yes-0"]


async def test_a_model_without_a_log_captures_nothing(folder, tmp_path):
    stand = Stand(folder, tmp_path, log=False)
    await stand.host.start()
    await stand.beat(2)
    await stand.text("a")
    assert stand.host.runner.engine.recorder is None and stand.refresh.trainer is None and not len(stand.refresh.traces)
    stand.host.stop()


async def test_a_share_is_captured(folder, tmp_path):
    stand = Stand(folder, tmp_path, share=0.4)
    await stand.host.start()
    names = [f"r{i}" for i in range(20)]
    await asyncio.gather(*(stand.text(name, max_tokens=3) for name in names))
    kept = {t.request for t in stand.refresh.traces.take()}
    assert kept == {f"{n}-0" for n in names if in_canary(f"{n}-0", "capture", 0.4)} and 0 < len(kept) < 20
    stand.host.stop()


async def test_a_trainer_that_is_away_loses_traces_and_nothing_waits(stand, monkeypatch):
    monkeypatch.setattr("ray.put", lambda value: value)
    await stand.text("a")
    stand.trainer.away = True
    await stand.refresh.attempt(stand.refresh.send, "the trainer")
    assert stand.refresh.traces.lost == 1 and not len(stand.refresh.traces)
    stand.trainer.away = False
    await stand.text("b")
    await stand.refresh.send()
    await stand.refresh.tell_load()
    await stand.refresh.tell_load()
    (added, load) = stand.trainer.told
    assert Trace.from_bytes(added[1][0]).request == "b-0" and load == ("load", "r1", 0)
    assert added[2] == 1, "it is told how many were lost"
    await stand.text("c")
    await stand.refresh.send()
    assert stand.trainer.told[-1][2] == 0


def test_ray_reserves_for_a_trainer_what_is_configured(folder, monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr("services.refresh_actors.start_trainer", lambda *arguments, **options: asked.update(options))
    for trainer, memory in (({}, {}), ({"memory": "2GiB"}, {"memory": 2 * 2**30})):
        asked.clear()
        kept = ModelRefreshSettings(enabled=True, trainer=TrainerSettings(num_cpus=0.5, **trainer))
        model = model_settings(folder).model_copy(update={"refresh": kept})
        trainer_actor(Settings(models=[model]).refresh, "specfleet", model, None, Base("b", 8, 4), "folder", "v1").start()
        assert asked == {"num_cpus": 0.5, "num_gpus": 0.0} | memory


def test_a_replica_is_not_told_the_keys_of_the_service(folder):
    keys = [{"name": "one", "key": "a-secret-of-one"}]
    made = Settings(models=[model_settings(folder)], keys=keys)
    assert b"a-secret-of-one" not in cloudpickle.dumps(refresh_plan(made, made.models[0]))
    assert refresh_plan(made, made.models[0].model_copy(update={"refresh": ModelRefreshSettings()})) is None
