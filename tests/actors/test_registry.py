"""The registry keeper without Ray: submissions, canaries decided by themselves, conflicts, stores that go away, writers that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest

from actors.artefacts import ArtefactError, Artefacts
from actors.policy import UnknownModel
from actors.registry import RegistryKeeper, RegistrySettings
from actors.releases import Assignment, Base, RegistryConflict, Releases, ReplicaReport, UnknownVersion
from actors.store import StoreError, open_state
from policies import Arm, CanaryRule, GateRule, Verdict, in_canary
from policies.gate import Replayed, gate
from tests.actors.bundles import VOCAB, WIDTH, make_bundle
from tests.actors.stand import Clock, Flaky, MemoryState
from tests.conftest import wait_until

BASE = Base("base", VOCAB, WIDTH, "r1")
BETTER = Verdict(True, 150, 2.0, 2.1, 0.1, 0.05, 0.15, "better on held-out requests")
SETTINGS = RegistrySettings(automatic=False, rule=CanaryRule(share=0.2, least=20, most=500))


class World:
    """A keeper with its store and its bundles: v[0] is configured, v[1] and v[2] are candidates."""

    def __init__(self, folder: Path, store, clock: Clock) -> None:
        self.folder, self.store, self.clock = folder, store, clock
        self.artefacts = Artefacts(str(folder / "shared"), folder / "cache")
        self.bundles = [make_bundle(folder / "made", seed) for seed in range(4)]
        self.v = [b.manifest.version for b in self.bundles]
        self.urls = [self.artefacts.publish(b) for b in self.bundles]
        self.keeper = self.again()
        self.keeper.register("demo", BASE, self.urls[0], self.bundles[0].manifest)
        for i in (1, 2):
            assert self.submit(i)["state"] == "candidate"

    def again(self) -> RegistryKeeper:
        """Another keeper of the same store, as after a restart."""
        return RegistryKeeper(self.store, self.artefacts, self.clock, SETTINGS)

    def submit(self, i: int, verdict: Verdict = BETTER) -> dict:
        return self.keeper.submit("demo", self.urls[i], self.bundles[i].manifest, verdict, "trainer")

    @property
    def states(self) -> dict[str, str]:
        return {v["version"]: v["state"] for v in self.keeper.state("demo")["versions"]}

    def consistent(self) -> bool:
        """The keeper, one that starts now, and the history tell the same story."""
        history = self.again().history("demo")
        Releases(history).check()
        told = all(a["to"] == b["from"] and a["revision"] + 1 == b["revision"] for a, b in pairwise(history))
        said = all(change["who"] and change["why"] and change["at"] for change in history)
        return told and said and self.again().assignment("demo") == self.keeper.assignment("demo")


@pytest.fixture
def world(tmp_path, url, clock) -> World:
    return World(tmp_path, open_state(url), clock)


@pytest.fixture
def flaky(tmp_path, clock) -> World:
    return World(tmp_path, Flaky(MemoryState()), clock)


def report(assignment: Assignment, name: str = "r1", requests: int = 0, live: int = 50, canary: int = 50, **more) -> ReplicaReport:
    """What a replica that follows the assignment says after so many requests of ten drafts, of which that many tokens were kept."""
    arms, loaded, run = {}, {}, {}
    if assignment.live:
        loaded[assignment.live.version] = assignment.live.checksum
    if assignment.canary:
        run = {"salt": assignment.canary.salt, "against": assignment.live.version}
        loaded[assignment.canary.placement.version] = assignment.canary.placement.checksum
        arms = {assignment.live.version: arm(requests, live), assignment.canary.placement.version: arm(requests, canary)}
    fields = {"revision": assignment.revision, "serving": assignment.live.version if assignment.live else "", "loaded": loaded}
    return ReplicaReport(name, assignment.model, **(fields | run | {"arms": arms} | more))


def arm(requests: int, kept: int) -> Arm:
    return sum((Arm.of(10, max(0, kept // 10 + i % 3 - 1)) for i in range(requests)), Arm())


# -- the straight way -------------------------------------------------------------------------------------------------------


def test_what_replicas_are_told(world):
    assignment = world.keeper.assignment("demo")
    assert assignment.live.version == world.v[0] and assignment.live.url == world.urls[0] and assignment.canary is None
    assert assignment.live.checksum == world.bundles[0].manifest.checksum and assignment.revision == 3
    found = world.artefacts.fetch(assignment.live.url, assignment.live.checksum)
    assert found.manifest == world.bundles[0].manifest


def test_a_better_canary_is_promoted_by_itself_and_the_history_says_why(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed the gate")
    assignment = world.keeper.assignment("demo")
    assert assignment.canary.placement.version == world.v[1] and assignment.canary.share == 0.2
    assert world.keeper.report(report(assignment, requests=10, canary=80)) is None
    answer = world.keeper.report(report(assignment, requests=200, canary=80))
    assert answer.live.version == world.v[1] and answer.canary is None
    last = world.keeper.history("demo")[-1]
    assert (last["who"], last["action"], last["from"], last["to"]) == ("canary", "promote", world.v[0], world.v[1])
    assert "better than the live version" in last["why"] and "200 requests" in last["why"]
    assert world.states == dict(zip(world.v[:3], ("retired", "live", "candidate"), strict=True)) and world.consistent()


def test_a_worse_canary_is_rolled_back_by_itself(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed the gate")
    answer = world.keeper.report(report(world.keeper.assignment("demo"), requests=30, live=200, canary=10))
    assert answer.live.version == world.v[0] and answer.canary is None
    assert world.states[world.v[1]] == "rolled_back" and "worse than the live version" in world.keeper.history("demo")[-1]["why"]
    assert world.consistent()


def test_counts_of_all_replicas_make_one_decision_and_repeated_reports_count_once(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed")
    assignment = world.keeper.assignment("demo")
    for _ in range(50):
        world.keeper.report(report(assignment, "r1", requests=12, live=200, canary=10))
    assert world.keeper.state("demo")["canary"]["candidate_requests"] == 12
    world.keeper.report(report(assignment, "r2", requests=12, live=200, canary=10))
    assert world.keeper.assignment("demo").canary is None and "24 requests" in world.keeper.history("demo")[-1]["why"]


def test_counts_of_another_canary_or_made_up_ones_do_not_count(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed")
    assignment = world.keeper.assignment("demo")
    world.keeper.report(report(assignment, requests=400, live=200, canary=10, salt="another"))
    world.keeper.report(report(assignment, "r2", arms={world.v[0]: Arm(9999, 1), world.v[1]: Arm(-5)}))
    world.keeper.report(report(assignment, "", requests=400))
    world.keeper.report(report(assignment, "r3", errors=None))
    state = world.keeper.state("demo")
    assert state["canary"]["candidate_requests"] == 0 and state["refused_reports"] == 2
    json.dumps(state, allow_nan=False)


def test_the_state_shows_every_version_and_every_replica(world):
    world.keeper.start_canary("demo", world.v[1], "ann", "try", share=0.5)
    assignment = world.keeper.assignment("demo")
    world.keeper.report(report(assignment, "good", requests=3))
    world.keeper.report(report(assignment, "odd", loaded={world.v[0]: "0" * 64}))
    world.keeper.report(report(assignment, "old", serving=world.v[2], errors={world.v[0]: "no space left on device"}))
    world.clock.now += 2
    state = world.keeper.state("demo")
    assert (state["live"], state["canary"]["version"], state["canary"]["share"]) == (world.v[0], world.v[1], 0.5)
    assert {name: r["agrees"] for name, r in state["replicas"].items()} == {"good": True, "odd": False, "old": False}
    assert state["replicas"]["old"]["errors"] == {world.v[0]: "no space left on device"} and state["replicas"]["good"]["age"] == 2
    first = state["versions"][0]
    assert (first["version"], first["url"], first["base"], first["initial"]) == (world.v[0], world.urls[0], "base", True)
    json.dumps(state, allow_nan=False)


def test_replicas_long_gone_are_forgotten_but_not_what_they_counted(world):
    world.keeper.start_canary("demo", world.v[1], "ann", "try")
    world.keeper.report(report(world.keeper.assignment("demo"), "r1", requests=15))
    world.clock.now += 100
    world.keeper.report(report(world.keeper.assignment("demo"), "r2", requests=2))
    state = world.keeper.state("demo")
    assert list(state["replicas"]) == ["r2"] and state["canary"]["candidate_requests"] == 17


def test_unknown_models_and_versions(world):
    for call in (world.keeper.assignment, world.keeper.state, world.keeper.history):
        with pytest.raises(UnknownModel, match="'other'"):
            call("other")
    with pytest.raises(UnknownVersion, match="'v9'"):
        world.keeper.promote("demo", "v9", "ann", "")
    assert world.consistent()


def test_training_goes_on_from_what_is_tried_and_back_when_that_fails(world):
    keeper, v = world.keeper, world.v
    parent = lambda: keeper.parents("demo", ("",))[""].placement.version  # noqa: E731
    keeper.start_canary("demo", v[1], "canary", "passed the gate")
    assert parent() == v[1]  # though v[2] came later
    keeper.submit("demo", world.urls[3], world.bundles[3].manifest, BETTER, "trainer", against=v[1])
    assert parent() == v[3]
    keeper.promote("demo", v[1], "canary", "better")
    assert parent() == v[3] == world.again().parents("demo", ("",))[""].placement.version
    keeper.pin("demo", v[1], "ann", "calm")
    assert parent() == v[1] and keeper.parents("demo", ("",))[""].pinned
    keeper.unpin("demo", "ann", "go on")
    keeper.start_canary("demo", v[3], "canary", "passed the gate")
    keeper.rollback("demo", "canary", "worse")
    assert parent() == v[1] and world.consistent()


def test_operators_pin_unpin_promote_roll_back_and_withdraw(world):
    keeper, v = world.keeper, world.v
    assert keeper.pin("demo", v[1], "ann", "calm")["pinned"]
    with pytest.raises(RegistryConflict, match="pinned"):
        keeper.start_canary("demo", v[2], "trainer", "passed")
    assert not keeper.unpin("demo", "ann", "go on")["pinned"]
    assert keeper.rollback("demo", "bob", "slow")["live"] == v[0]
    assert keeper.promote("demo", v[2], "bob", "try")["state"] == "live"
    keeper.submit("demo", world.urls[3], world.bundles[3].manifest, BETTER, "trainer", "late")
    assert keeper.retire("demo", v[3], "bob", "too late")["state"] == "retired"
    assert [c["who"] for c in keeper.history("demo")[3:]] == ["ann", "ann", "bob", "bob", "trainer", "bob"] and world.consistent()


def test_candidates_are_tried_by_themselves_one_after_the_other(world):
    world.keeper = RegistryKeeper(world.store, world.artefacts, world.clock, replace(SETTINGS, automatic=True))
    world.keeper.pin("demo", world.v[0], "ann", "not yet")
    assert world.keeper.report(report(world.keeper.assignment("demo"))) is None
    world.keeper.unpin("demo", "ann", "go on")
    second = world.keeper.report(report(world.keeper.assignment("demo")))
    assert second.canary.placement.version == world.v[2]
    assert world.keeper.report(report(second, requests=30, live=200, canary=10)).canary is None
    first = world.keeper.report(report(world.keeper.assignment("demo")))
    assert first.canary.placement.version == world.v[1]
    assert world.keeper.report(report(first, requests=300, live=20, canary=90)).live.version == world.v[1]
    told = [(c["who"], c["action"]) for c in world.keeper.history("demo")[-4:]]
    assert told == [("canary", "canary"), ("canary", "roll_back"), ("canary", "canary"), ("canary", "promote")] and world.consistent()


def test_a_candidate_judged_against_a_version_that_is_not_live_any_more_is_not_tried_by_itself(world):
    world.keeper = RegistryKeeper(world.store, world.artefacts, world.clock, replace(SETTINGS, automatic=True))
    world.keeper.promote("demo", world.v[1], "ann", "by hand")
    assert world.keeper.report(report(world.keeper.assignment("demo"))) is None
    assert world.states[world.v[2]] == "candidate"
    late = make_bundle(world.folder / "made", 4)  # its judgement was under way when another version went live
    url = world.artefacts.publish(late)
    world.keeper.submit("demo", url, late.manifest, BETTER, "trainer", against=world.v[0])
    assert world.keeper.report(report(world.keeper.assignment("demo"))) is None
    world.submit(3)
    assert world.keeper.report(report(world.keeper.assignment("demo"))).canary.placement.version == world.v[3]


# -- what must not be served ------------------------------------------------------------------------------------------------


def test_a_poisoned_candidate_does_not_pass_the_gate(world):
    """Random weights of the right shapes: nothing to see in the bundle, everything in what it drafts."""
    verdict = gate([Replayed(40 + i % 7, 20, 40) for i in range(150)], GateRule())
    answer = world.submit(3, verdict)
    assert answer["state"] == "rejected"
    with pytest.raises(RegistryConflict, match=r"was rejected .*the candidate drafts -1"):
        world.keeper.promote("demo", world.v[3], "ann", "")
    assert world.states[world.v[3]] == "rejected" and world.consistent()


def test_a_truncated_bundle_is_rejected_with_the_reason_in_the_history(world):
    fs, path = fsspec.core.url_to_fs(world.urls[3])
    fs.pipe_file(f"{path}/model.safetensors", fs.cat_file(f"{path}/model.safetensors")[:99])
    assert world.submit(3)["state"] == "rejected"
    why = world.keeper.history("demo")[-1]["why"]
    assert "model.safetensors has 99 bytes of SHA-256" in why and "instead of" in why and "Traceback" not in why
    assert world.keeper.assignment("demo").live.version == world.v[0] and world.consistent()


def test_wrong_vocabulary_model_and_base_are_rejected(world, tmp_path):
    for change, said in (({"vocab_size": 99}, "wrong vocabulary: .* 99 tokens, the base has 37"), ({"model": "other"}, "wrong model")):
        bundle = make_bundle(tmp_path / "odd", 9, **change)
        answer = world.keeper.submit("demo", world.artefacts.publish(bundle), bundle.manifest, BETTER, "trainer")
        assert answer["state"] == "rejected"
        with pytest.raises(RegistryConflict, match=said):
            world.keeper.start_canary("demo", bundle.manifest.version, "ann", "")
    world.keeper.register("demo", Base("base", VOCAB, WIDTH, "r2"), world.urls[0], world.bundles[0].manifest)
    assert "wrong base: it drafts for base r1, the model's base is base r2" in world.keeper.inspect(
        "demo", world.urls[3], world.bundles[3].manifest
    )


def test_a_configured_version_that_is_set_back_is_live_again_and_restarts_change_nothing(world):
    def started(i: int) -> None:
        world.keeper = world.again()
        world.keeper.register("demo", BASE, world.urls[i], world.bundles[i].manifest)

    for i in (3, 3, 0, 0):
        started(i)
        assert world.keeper.assignment("demo").live.version == world.v[i] and world.consistent()
    assert [c["version"] for c in world.keeper.history("demo") if c["action"] == "register"] == [world.v[i] for i in (0, 3, 0)]
    world.keeper.promote("demo", world.v[1], "ann", "better")
    before = world.keeper.assignment("demo")
    started(0)
    assert world.keeper.assignment("demo") == before
    started(3)
    assert world.keeper.assignment("demo").placements == before.placements and world.consistent()
    assert world.keeper.history("demo")[-1]["version"] == world.v[3]


def test_a_manifest_that_is_not_the_bundles_own_is_rejected(world):
    told = world.bundles[3].manifest.model_copy(update={"metrics": {"tokens_per_step": 99.0}})
    answer = world.keeper.submit("demo", world.urls[3], told, BETTER, "trainer")
    assert answer["state"] == "rejected" and "not the one that was submitted" in world.keeper.history("demo")[-1]["why"]


def test_bundles_that_cannot_be_reached_are_neither_taken_nor_rejected(world):
    with pytest.raises(ArtefactError):
        world.keeper.submit("demo", "ftp://127.0.0.1:1/x", world.bundles[3].manifest, BETTER, "trainer")
    assert world.v[3] not in world.states


def test_a_submission_that_is_repeated_is_made_once(world):
    assert [world.submit(3)["state"], world.submit(3)["state"]] == ["candidate", "candidate"]
    assert len(world.keeper.history("demo")) == 4


def test_a_canary_that_no_replica_can_load_is_rolled_back_and_one_that_some_can_goes_on(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed")
    assignment = world.keeper.assignment("demo")
    world.keeper.report(report(assignment, "good"))
    world.keeper.report(report(assignment, "bad", errors={world.v[1]: "no space left"}))
    assert world.keeper.assignment("demo").canary and world.keeper.state("demo")["replicas"]["bad"]["errors"]
    world.clock.now += 10
    answer = world.keeper.report(report(assignment, "bad", errors={world.v[1]: "no space left"}))
    assert answer.canary is None and answer.live == assignment.live
    assert world.keeper.history("demo")[-1]["why"] == "no replica can load it: no space left" and world.consistent()


# -- domains ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tagged(world) -> World:
    """v[1] is a candidate of the common line and v[3] one of the domain `law`."""
    world.keeper.register("demo", BASE, world.urls[0], world.bundles[0].manifest, ("law", "sql"))
    assert world.keeper.submit("demo", world.urls[3], world.bundles[3].manifest, BETTER, "trainer", tag="law")["state"] == "candidate"
    return world


def of(assignment: Assignment, beside: str, name: str = "r1", **more) -> ReplicaReport:
    """What a replica says of a domain that has a canary beside a version of the common line."""
    canary = assignment.canary.placement
    arms = {beside: arm(more.pop("requests", 30), more.pop("live", 50)), canary.version: arm(30, more.pop("canary", 50))}
    run = {"salt": assignment.canary.salt, "against": beside}
    fields = {"revision": assignment.revision, "serving": beside, "loaded": {canary.version: canary.checksum}, "arms": arms, "tag": "law"}
    return ReplicaReport(name, "demo", **(fields | run | more))


def parents(keeper: RegistryKeeper) -> dict[str, str]:
    return {tag: found.placement.version for tag, found in keeper.parents("demo", ("", "law", "sql")).items()}


def test_a_domain_begins_with_what_the_common_line_serves(tagged):
    keeper, v = tagged.keeper, tagged.v
    assert [
        (a.tag, a.live and a.live.version) for a in keeper.register("demo", BASE, tagged.urls[0], tagged.bundles[0].manifest, ("law",))
    ] == [
        ("", v[0]),
        ("law", None),
    ]
    assert parents(keeper) == {"": v[2], "law": v[3], "sql": v[2]}  # as if the latest candidates were live
    state = keeper.state("demo", "law")
    assert (state["tag"], state["live"], state["serving"]) == ("law", None, v[0])
    assert [entry["version"] for entry in state["versions"]] == [v[3]] and v[3] not in tagged.states
    keeper.promote("demo", v[1], "ann", "better")
    assert parents(keeper) == dict.fromkeys(("", "law", "sql"), v[1]) and keeper.state("demo", "sql")["serving"] == v[1]
    assert [c["action"] for c in keeper.history("demo", tag="law")] == ["register", "submit"] and tagged.consistent()


def test_a_version_of_a_domain_is_promoted_and_rolled_back_there_alone(tagged):
    keeper, v = tagged.keeper, tagged.v
    before = keeper.assignment("demo"), keeper.assignment("demo", "sql")
    assert keeper.promote("demo", v[3], "ann", "for law", 2, "law")["live"] == v[3]
    assert parents(keeper) == {"": v[2], "law": v[3], "sql": v[2]}
    assert (keeper.assignment("demo"), keeper.assignment("demo", "sql")) == before
    with pytest.raises(UnknownVersion, match=f"no version '{v[3]}'"):
        keeper.promote("demo", v[3], "ann", "for all")
    with pytest.raises(RegistryConflict, match="the speculators of 'demo' in the domain 'law' are not at revision 2"):
        keeper.pin("demo", v[3], "bob", "too late", 2, "law")
    assert keeper.pin("demo", v[3], "bob", "stay", tag="law")["pinned"] and not keeper.state("demo")["pinned"]
    assert {tag: parent.pinned for tag, parent in keeper.parents("demo", ("", "law", "sql")).items()} == {
        "": False,
        "law": True,
        "sql": False,
    }
    keeper.unpin("demo", "bob", "go on", tag="law")
    keeper.pin("demo", v[0], "bob", "stay")
    told = keeper.parents("demo", ("", "law", "sql"))  # a pin is of one line
    assert {tag for tag, parent in told.items() if parent.pinned} == {""}
    assert told["sql"].placement.version == v[0]
    keeper.unpin("demo", "bob", "go on")
    back = keeper.rollback("demo", "bob", "slow", tag="law")
    assert (back["tag"], back["live"], back["serving"]) == ("law", None, v[0])
    assert keeper.assignment("demo", "law").live is None and tagged.again().assignment("demo", "law") == keeper.assignment("demo", "law")
    with pytest.raises(UnknownModel, match="'demo' in the domain 'tax'"):
        keeper.promote("demo", v[3], "ann", "", tag="tax")


def test_lines_do_not_wait_for_a_domain_that_nobody_has_registered_yet(tagged):
    before = tagged.keeper.assignment("demo")
    tagged.keeper.promote("demo", tagged.v[1], "ann", "better")
    told = tagged.keeper.reports([report(before), report(before, tag="tax"), report(before, tag="law")])
    assert [(found.tag, found.revision) for found in told] == [("", before.revision + 1), ("law", 2)]
    with pytest.raises(UnknownModel, match="'other'"):
        tagged.keeper.reports([replace(report(before), model="other")])


def test_a_change_made_while_a_bundle_is_inspected_is_not_lost(world, monkeypatch):
    """After a restart, when the inspection, on its thread, is the first to read the history, and the change comes in between."""
    keeper = world.again()
    sync, first = keeper._sync, iter([True])

    def interrupted(entry) -> None:
        sync(entry)
        if next(first, False):
            keeper.promote("demo", world.v[1], "ann", "meanwhile")

    monkeypatch.setattr(keeper, "_sync", interrupted)
    assert keeper.inspect("demo", world.urls[3], world.bundles[3].manifest) == ""
    assert keeper.assignment("demo").live.version == world.v[1]


def test_a_canary_of_a_domain_is_compared_with_what_serves_there(tagged):
    keeper, v = tagged.keeper, tagged.v
    keeper.start_canary("demo", v[3], "trainer", "passed", tag="law")
    assignment = keeper.assignment("demo", "law")
    assert keeper.assignment("demo").canary is None and keeper.report(of(assignment, v[0], requests=10)) is None
    standing = keeper.state("demo", "law")["canary"]
    assert (standing["live_requests"], standing["candidate_requests"]) == (10, 30)
    assert keeper.state("demo", "law")["replicas"]["r1"]["serving"] == v[0] and not keeper.state("demo")["replicas"]
    (answer,) = keeper.reports([report(keeper.assignment("demo")), of(assignment, v[0], canary=200)])
    assert (answer.tag, answer.live.version, answer.canary) == ("law", v[3], None)
    last = keeper.history("demo", tag="law")[-1]
    assert (last["who"], last["action"], last["from"], last["to"]) == ("canary", "promote", None, v[3])
    assert tagged.states[v[0]] == "live" and tagged.consistent()


def test_a_canary_is_counted_afresh_when_the_common_line_changes_beside_it(tagged):
    keeper, v = tagged.keeper, tagged.v
    keeper.start_canary("demo", v[3], "trainer", "passed", tag="law")
    assignment = keeper.assignment("demo", "law")
    keeper.report(of(assignment, v[0], requests=15))
    keeper.promote("demo", v[1], "ann", "better")
    assert keeper.state("demo", "law")["canary"]["candidate_requests"] == 0
    keeper.report(of(assignment, v[0], requests=15))  # of a replica that does not know it yet
    assert keeper.state("demo", "law")["canary"]["candidate_requests"] == 0
    assert not keeper.state("demo", "law")["replicas"]["r1"]["agrees"]
    keeper.report(of(assignment, v[1], requests=5, loaded={v[1]: tagged.bundles[1].manifest.checksum}))
    state = keeper.state("demo", "law")
    assert (state["canary"]["candidate_requests"], state["canary"]["live_requests"]) == (30, 5) and state["replicas"]["r1"]["agrees"]


def test_candidates_of_a_domain_are_tried_while_what_they_were_judged_against_serves(tagged):
    tagged.keeper = keeper = RegistryKeeper(tagged.store, tagged.artefacts, tagged.clock, replace(SETTINGS, automatic=True))
    told = ReplicaReport("r1", "demo", keeper.assignment("demo", "law").revision, tagged.v[0], tag="law")
    keeper.promote("demo", tagged.v[1], "ann", "better")
    assert keeper.report(told) is None
    keeper.rollback("demo", "ann", "worse")
    assert keeper.report(told).canary.placement.version == tagged.v[3]
    assert keeper.history("demo", tag="law")[-1]["why"] == "it passed the gate"


def test_another_base_ends_what_a_domain_had(tagged):
    tagged.keeper.promote("demo", tagged.v[3], "ann", "for law", tag="law")
    other = Base("base", VOCAB, WIDTH, "r2")
    assignments = tagged.keeper.register("demo", other, tagged.urls[0], tagged.bundles[0].manifest, ("law",))
    assert [a.live and a.live.version for a in assignments] == [tagged.v[0], None]
    assert tagged.keeper.state("demo", "law")["versions"][0]["state"] == "retired"


def test_without_its_store_a_domain_is_answered_as_the_common_line_is(tmp_path, clock):
    world = World(tmp_path, Flaky(MemoryState()), clock)
    before = world.keeper.register("demo", BASE, world.urls[0], world.bundles[0].manifest, ("law",))
    world.store.broken = True
    assert world.keeper.register("demo", BASE, world.urls[0], world.bundles[0].manifest, ("law",)) == before
    assert world.keeper.reports([ReplicaReport("r1", "demo", a.revision, world.v[0], tag=a.tag) for a in before]) == []
    assert world.keeper.reports([ReplicaReport("r2", "demo", tag=tag) for tag in ("", "law")]) == list(before)


# -- two at once ------------------------------------------------------------------------------------------------------------


def test_of_two_promotions_at_once_the_second_hears_what_holds(world):
    seen = world.keeper.state("demo")["revision"]
    world.keeper.promote("demo", world.v[1], "ann", "mine", expected=seen)
    with pytest.raises(RegistryConflict, match=f"not at revision 3 any more: at revision 4 {world.v[1]} is live"):
        world.keeper.promote("demo", world.v[2], "bob", "no, mine", expected=seen)
    assert world.keeper.assignment("demo").live.version == world.v[1] and world.consistent()


def test_two_keepers_of_one_store_never_both_win(world, url):
    """Two registries at once, as when a network parts: of those that change the same revision one is told that it came too late."""
    wins: list[str] = []
    unexpected: list[Exception] = []

    def push(keeper: RegistryKeeper, name: str) -> None:
        for _ in range(25):
            seen = keeper.assignment("demo")
            other = world.v[2] if seen.live.version == world.v[1] else world.v[1]
            try:
                keeper.promote("demo", other, name, "mine", expected=seen.revision)
                wins.append(name)
            except RegistryConflict:
                continue
            except Exception as error:
                unexpected.append(error)

    keepers = [RegistryKeeper(open_state(url), world.artefacts, world.clock, SETTINGS) for _ in range(2)]
    threads = [threading.Thread(target=push, args=pair) for pair in zip(keepers, ("ann", "bob"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final, began = Releases(world.again().history("demo")), 3
    final.check()
    assert not unexpected and len(wins) == final.revision - began >= 25


# -- deaths and absences ----------------------------------------------------------------------------------------------------


def test_without_its_store_nothing_changes_and_everybody_is_answered(flaky):
    before = flaky.keeper.assignment("demo")
    flaky.store.broken = True
    for change in (
        lambda: flaky.keeper.promote("demo", flaky.v[1], "ann", "now"),
        lambda: flaky.keeper.rollback("demo", "ann", "now"),
        lambda: flaky.keeper.pin("demo", flaky.v[1], "ann", "now"),
        lambda: flaky.submit(3),
    ):
        with pytest.raises(StoreError):
            change()
    assert flaky.keeper.assignment("demo") == before and flaky.keeper.report(report(before)) is None
    assert flaky.keeper.register("demo", BASE, flaky.urls[0], flaky.bundles[0].manifest) == (before,)
    flaky.store.broken = False
    flaky.keeper.promote("demo", flaky.v[1], "ann", "now")
    assert flaky.keeper.assignment("demo").live.version == flaky.v[1] and flaky.consistent()


def test_a_canary_is_decided_once_the_store_is_back(flaky):
    flaky.keeper.start_canary("demo", flaky.v[1], "trainer", "passed")
    assignment = flaky.keeper.assignment("demo")
    flaky.store.broken = True
    for _ in range(20):
        flaky.clock.now += 0.25
        assert flaky.keeper.report(report(assignment, requests=100, live=200, canary=10)) is None
    assert flaky.keeper.state("demo")["undone_decisions"] == 1
    flaky.store.broken = False
    flaky.clock.now += 6
    assert flaky.keeper.report(report(assignment, requests=100, live=200, canary=10)).canary is None
    assert flaky.states[flaky.v[1]] == "rolled_back" and flaky.consistent()


class Forgetful(MemoryState):
    """A store that takes an entry and then cannot say so."""

    lost = False

    def append(self, stream, entry) -> None:
        super().append(stream, entry)
        if self.lost:
            raise StoreError("the connection broke")


def test_a_change_that_was_stored_without_an_answer_is_found_in_the_history(tmp_path, clock):
    world = World(tmp_path, Forgetful(), clock)
    world.store.lost = True
    with pytest.raises(StoreError):
        world.keeper.promote("demo", world.v[1], "ann", "now")
    assert world.keeper.assignment("demo").live.version == world.v[1] == world.again().assignment("demo").live.version
    world.store.lost = False
    with pytest.raises(RegistryConflict, match="is live already"):
        world.keeper.promote("demo", world.v[1], "ann", "again")
    assert world.consistent()


def test_a_keeper_that_starts_without_its_store_asks_it_now_and_then(flaky):
    again = flaky.again()
    flaky.store.broken = True
    asked = 0
    for _ in range(40):
        flaky.clock.now += 0.25
        with pytest.raises(StoreError) as error:
            again.assignment("demo")
        asked += "down" in str(error.value)
    assert asked == 2
    flaky.store.broken = False
    flaky.clock.now += 5
    assert again.assignment("demo") == flaky.keeper.assignment("demo")


def test_a_restart_in_the_middle_of_a_canary_goes_on_with_it(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed")
    assignment = world.keeper.assignment("demo")
    world.keeper.report(report(assignment, requests=15, live=200, canary=10))
    again = world.again()
    assert again.assignment("demo") == assignment
    assert again.report(report(assignment, requests=30, live=200, canary=10)).canary is None
    assert again.history("demo")[-1]["action"] == "roll_back"


def test_a_replica_that_is_restarted_while_a_canary_runs_goes_on_with_the_same_requests(world):
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed")
    old = world.keeper.assignment("demo")
    world.keeper.report(report(old, "r1", requests=12))
    new = world.keeper.report(ReplicaReport("r1-again", "demo"))
    assert new == old and [in_canary(f"x{i}", new.canary.salt, 0.2) for i in range(99)] == [
        in_canary(f"x{i}", old.canary.salt, 0.2) for i in range(99)
    ]
    world.keeper.report(report(new, "r1-again", requests=3))
    assert world.keeper.state("demo")["canary"]["candidate_requests"] == 15


def test_redis_is_gone_and_comes_back(redis_server, redis_url, tmp_path, clock):
    world = World(tmp_path, open_state(redis_url), clock)
    world.keeper.start_canary("demo", world.v[1], "trainer", "passed")
    assignment = world.keeper.assignment("demo")
    redis_server.stop()
    try:
        with pytest.raises(StoreError):
            world.keeper.promote("demo", world.v[2], "ann", "now")
        for _ in range(120):
            clock.now += 0.25
            assert world.keeper.report(report(assignment, requests=100, live=200, canary=10)) is None
        assert world.keeper.assignment("demo") == assignment
    finally:
        redis_server.start()
    clock.now += 6
    assert world.keeper.report(report(assignment, requests=100, live=200, canary=10)).canary is None
    assert [c["action"] for c in world.keeper.history("demo")][-2:] == ["canary", "roll_back"] and world.consistent()


KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from actors.artefacts import Artefacts
from actors.registry import RegistryKeeper
from actors.store import open_state
keeper = RegistryKeeper(open_state(sys.argv[2]), Artefacts(sys.argv[3], Path(sys.argv[4])))
one, two = sys.argv[5:]
while True:
    other = two if keeper.assignment("demo").live.version == one else one
    print(keeper.promote("demo", other, "loop", "again")["revision"], flush=True)
"""


@pytest.mark.slow
def test_a_registry_killed_in_the_middle_of_promotions_leaves_one_state(world, url, tmp_path):
    """Whatever it had said was done is in the history, at most one change more, and one version is live."""
    places = [str(Path(__file__).parents[2]), url, str(tmp_path / "shared"), str(tmp_path / "cache")]
    for _ in range(3):
        said: list[int] = []
        loop = subprocess.Popen(
            [sys.executable, "-c", KILLED, *places, *world.v[1:3]],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        reader = threading.Thread(target=lambda out=loop.stdout, said=said: said.extend(int(line) for line in out if line.strip()))
        reader.start()
        wait_until(lambda said=said: len(said) > 20, 60)
        loop.send_signal(signal.SIGKILL)
        loop.wait()
        reader.join()
        after = Releases(world.again().history("demo"))
        after.check()
        assert after.revision - said[-1] in (0, 1) and after.live in world.v[1:3]
    world.keeper = world.again()
    other = world.v[1] if world.keeper.assignment("demo").live.version == world.v[2] else world.v[2]
    world.keeper.promote("demo", other, "ann", "on we go")
    assert world.consistent()
