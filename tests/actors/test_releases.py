"""The states that versions can be in: what each change does, what does not fit, and that the history alone says what holds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.releases import Action, Base, Change, Placement, RegistryConflict, Releases, ReplicaReport, UnknownVersion
from policies import Arm, Verdict
from tests.actors.bundles import make_bundle

BASE = Base("base", 37, 12, "r1")
PASSED = Verdict(True, 100, 2.0, 2.1, 0.1, 0.05, 0.15, "better")
FAILED = replace(PASSED, passed=False, reason="no better")


class Told:
    """A model with its history, changed as a keeper would."""

    def __init__(self) -> None:
        self.history: list[dict] = []
        self.now = Releases()

    def do(self, plan, *args) -> Told:
        change = getattr(self.now, plan)(*args)
        if change is not None:
            change = replace(change, revision=self.now.revision + 1, id=str(len(self.history)), who="ann", before=self.now.live, at=1.0)
            self.history.append(json.loads(json.dumps(change.to_json(), allow_nan=False)))
            self.now = Releases(self.history)
            self.now.check()
        return self

    def submit(self, version: str, verdict: Verdict = PASSED, problem: str = "") -> Told:
        return self.do("submit", placed(version), {}, verdict, problem, self.now.live)

    def canary_of(self, version: str, share: float = 0.2, salt: str = "s") -> Told:
        return self.do("start_canary", version, share, salt, self.now.live)

    @property
    def states(self) -> dict[str, str]:
        return {version: release.state for version, release in self.now.versions.items()}

    @property
    def canary(self) -> str | None:
        return self.now.canary.placement.version if self.now.canary else None


def placed(version: str) -> Placement:
    return Placement(version, f"file:///{version}", version * 3)


@pytest.fixture
def told() -> Told:
    """v0 is configured, v1 and v2 are candidates."""
    return Told().do("register", BASE, placed("v0"), {}).submit("v1").submit("v2")


def test_the_straight_way(told):
    assert told.states == {"v0": "live", "v1": "candidate", "v2": "candidate"}
    told.canary_of("v1", 0.2, "salt")
    assert told.now.assignment("m").live == placed("v0") and told.now.assignment("m").canary.placement == placed("v1")
    told.do("promote", "v1")
    assert told.states == {"v0": "retired", "v1": "live", "v2": "candidate"} and told.canary is None
    assert (told.history[-1]["from"], told.history[-1]["to"], told.history[-1]["who"]) == ("v0", "v1", "ann")
    assert [c["revision"] for c in told.history] == [1, 2, 3, 4, 5]


def test_a_canary_serves_its_share_and_nobody_else(told):
    told.canary_of("v1", 0.25, "salt")
    assignment = told.now.assignment("m")
    served = [assignment.serving(f"r{i}").version for i in range(4000)]
    assert served.count("v1") / 4000 == pytest.approx(0.25, abs=0.03) and set(served) == {"v0", "v1"}
    assert replace(assignment, canary=None).serving("r1") == placed("v0")
    assert replace(assignment, canary=None, live=None).serving("r1") is None


def test_rolling_back_ends_the_canary_first_and_then_the_live_version(told):
    told.do("promote", "v1").canary_of("v2").do("roll_back")
    assert told.states == {"v0": "retired", "v1": "live", "v2": "rolled_back"}
    told.do("roll_back")
    assert told.states == {"v0": "live", "v1": "rolled_back", "v2": "rolled_back"} and told.now.live == "v0"
    with pytest.raises(RegistryConflict, match="nothing to go back to: at revision 7 v0 is live"):
        told.do("roll_back")


def test_rolling_back_the_live_version_although_a_canary_runs(told):
    told.do("promote", "v1").canary_of("v2").do("roll_back", "v1")
    assert told.states == {"v0": "live", "v1": "rolled_back", "v2": "retired"}
    with pytest.raises(RegistryConflict, match="v2 is neither live nor a canary"):
        told.do("roll_back", "v2")


def test_going_back_skips_what_was_itself_rolled_back(told):
    for version in ("v1", "v2", "v1"):
        told.do("promote", version)
    told.do("roll_back").do("roll_back")
    assert told.now.live == "v0" and told.states["v1"] == told.states["v2"] == "rolled_back"


def test_a_version_that_was_rolled_back_can_be_promoted_by_hand(told):
    told.do("promote", "v1").do("roll_back").do("promote", "v1")
    assert told.now.live == "v1" and told.states["v0"] == "retired"


def test_rejected_versions_are_never_served(told):
    told.submit("v3", FAILED).submit("v4", PASSED, "truncated: x")
    assert told.states["v3"] == told.states["v4"] == "rejected"
    for plan, *args in (("promote",), ("pin",), ("start_canary", 0.1, "s", "v0")):
        with pytest.raises(RegistryConflict, match="v3 was rejected"):
            told.do(plan, "v3", *args)


def test_a_known_version_is_not_taken_in_twice(told):
    assert told.now.submit(placed("v1"), {}, FAILED, "", "v0") is None


def test_promoting_ends_a_canary_that_was_compared_with_the_former_version(told):
    told.canary_of("v1").do("promote", "v2")
    assert told.states == {"v0": "retired", "v1": "retired", "v2": "live"} and told.canary is None


def test_pinning(told):
    told.canary_of("v1").do("pin", "v0")
    assert told.now.pinned and told.states["v1"] == "retired" and told.now.live == "v0"
    with pytest.raises(RegistryConflict, match="pinned"):
        told.canary_of("v2")
    with pytest.raises(RegistryConflict, match="v0 is pinned already"):
        told.do("pin", "v0")
    told.do("pin", "v2")
    assert told.now.pinned and told.now.live == "v2"
    told.do("promote", "v1").do("roll_back").do("unpin").canary_of("v1")
    assert told.now.live == "v2" and told.canary == "v1" and not told.now.pinned
    with pytest.raises(RegistryConflict, match="nothing is pinned"):
        told.do("unpin")


def test_only_candidates_are_withdrawn(told):
    assert told.do("retire", "v1").states["v1"] == "retired"
    with pytest.raises(RegistryConflict, match="v0 is live, only candidates are withdrawn"):
        told.do("retire", "v0")


def test_one_canary_at_a_time_and_not_of_the_live_version(told):
    told.canary_of("v1")
    with pytest.raises(RegistryConflict, match="v1 is the canary"):
        told.canary_of("v2")
    with pytest.raises(RegistryConflict, match="v0 is live already"):
        told.canary_of("v0")
    with pytest.raises(RegistryConflict, match="v0 is live already"):
        told.do("promote", "v0")
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            told.canary_of("v2", share, "s")


def test_unknown_versions_are_named(told):
    for plan, *args in (("promote",), ("pin",), ("retire",), ("start_canary", 0.1, "s", "v0")):
        with pytest.raises(UnknownVersion, match="no version 'v9'; known are v0, v1, v2"):
            told.do(plan, "v9", *args)


def test_a_model_without_a_speculator_gets_its_first_one():
    told = Told().do("register", BASE, None, None).submit("v1")
    assert told.now.live is None and told.now.assignment("m").live is None
    with pytest.raises(RegistryConflict, match="compared with a live version, and there is none"):
        told.canary_of("v1", 0.1, "s")
    with pytest.raises(RegistryConflict, match="no version is neither live"):
        told.do("roll_back")
    assert told.do("promote", "v1").now.live == "v1"
    assert told.do("roll_back").now.live is None and told.states == {"v1": "rolled_back"}


def test_registering_again_changes_nothing(told):
    assert told.now.register(BASE, placed("v0"), {}) is None and told.now.register(BASE, None, None) is None
    told.do("promote", "v1")
    assert told.now.register(BASE, placed("v0"), {}) is None


def test_another_configured_version_replaces_a_configured_one_but_not_a_promoted_or_pinned_one(told):
    told.do("register", BASE, placed("c1"), {})
    assert told.now.live == "c1" and told.states["v0"] == "retired"
    told.do("promote", "v1").do("register", BASE, placed("c2"), {})
    assert told.now.live == "v1" and told.states["c2"] == "retired"
    told.do("roll_back").do("pin", "c1").do("register", BASE, placed("c3"), {})
    assert told.now.live == "c1" and told.now.pinned and told.states["c3"] == "retired"


def test_setting_the_configured_version_back_is_followed(told):
    told.do("register", BASE, placed("c1"), {}).do("register", BASE, placed("v0"), {})
    assert told.now.live == "v0" and told.states["c1"] == "retired" and told.history[-1]["from"] == "c1"
    told.canary_of("v1").do("register", BASE, placed("c1"), {})
    assert told.now.live == "c1" and told.canary is None and told.states["v1"] == told.states["v0"] == "retired"
    assert told.do("roll_back").now.live == "v0"


def test_beside_a_promoted_or_pinned_version_it_is_noted_and_changes_no_state(told):
    told.do("register", BASE, placed("c1"), {}).do("promote", "v1")
    for prepare in (lambda: told, lambda: told.do("pin", "c1")):
        prepare()
        for version in ("v0", "c1"):
            before = told.states, told.now.assignment("m")
            told.do("register", BASE, placed(version), {})
            assert (told.states, told.now.assignment("m").placements) == (before[0], before[1].placements)
            assert (told.history[-1]["action"], told.history[-1]["version"], told.history[-1]["states"]) == ("register", version, {})
            assert told.now.register(BASE, placed(version), {}) is None


def test_a_canary_goes_on_beside_what_is_only_noted(told):
    told.do("register", BASE, placed("c1"), {}).do("promote", "v1").canary_of("v2", 0.3, "salt")
    before = told.now.canary
    assert told.do("register", BASE, placed("v0"), {}).now.canary == before and told.states["v2"] == "canary"


@pytest.mark.parametrize("change", [("roll_back",), ("promote", "v0"), ("promote", "v1"), ("pin", "v2")])
def test_what_an_operator_chose_outlives_restarts_with_the_same_configuration(told, change):
    told.do("register", BASE, placed("c1"), {}).do(*change)
    assert told.now.live != "c1" and told.now.register(BASE, placed("c1"), {}) is None


def test_a_version_that_an_operator_went_back_to_is_noted_when_it_is_configured(told):
    told.do("register", BASE, placed("c1"), {}).do("roll_back").do("register", BASE, placed("v0"), {})
    assert told.now.live == "v0" and told.history[-1]["states"] == {} and told.states["c1"] == "rolled_back"
    told.do("register", BASE, placed("c1"), {})  # asked for, although it was rolled back once
    assert told.now.live == "c1" and told.states["v0"] == "retired"


def test_a_trained_version_that_is_configured_is_one_of_the_configuration(told):
    told.do("register", BASE, placed("v1"), {})
    assert told.now.live == "v1" and told.now.versions["v1"].initial and told.now.versions["v1"].verdict is not None
    assert told.do("register", BASE, placed("v0"), {}).now.live == "v0"


def test_another_base_ends_everything_that_was_for_the_last_one(told):
    told.do("promote", "v1").canary_of("v2", 0.1, "s").do("register", Base("other", 99, 12), placed("w0"), {})
    assert told.now.live == "w0" and told.canary is None
    assert told.states == {"v0": "retired", "v1": "retired", "v2": "retired", "w0": "live"}
    with pytest.raises(RegistryConflict, match="nothing to go back to"):
        told.do("roll_back")


def test_versions_of_another_vocabulary_are_not_promoted(tmp_path):
    manifest = make_bundle(tmp_path, 1).manifest
    told = Told().do("register", BASE, None, None)
    told.do("submit", placed(manifest.version), manifest.model_dump(mode="json"), PASSED, "", None).do(
        "register", Base("o", 99, 12), None, None
    )
    with pytest.raises(RegistryConflict, match=r"wrong vocabulary: .* 37 tokens, the base has 99"):
        told.do("promote", manifest.version)


def test_of_two_changes_to_the_same_revision_the_first_one_counts(told):
    late = replace(told.now.promote("v2"), revision=4, id="late", who="bob", before="v0").to_json()
    told.do("promote", "v1")
    again = Releases([*told.history, late])
    assert again.live == "v1" and "late" not in again.ids and again.versions == told.now.versions


@pytest.mark.parametrize(
    "damaged", [{}, {"revision": 4}, {"revision": "x", "action": "promote"}, {"revision": 4, "action": "explode", "from": None, "to": None}]
)
def test_entries_that_cannot_be_read_change_nothing(told, damaged):
    full = told.history[-1] | damaged if damaged.get("action") else damaged
    assert Releases([*told.history, full]).versions == told.now.versions


def test_entries_of_a_later_release_are_read_as_far_as_they_are_known(told):
    told.history[-1]["mood"] = "sunny"
    assert Releases(told.history).versions == told.now.versions


STEPS = st.lists(
    st.tuples(st.sampled_from(get_args(Action)), st.sampled_from(["v0", "v1", "v2", "v3", "c1"]), st.booleans()), min_size=5, max_size=40
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_whatever_is_done_the_state_is_one_and_is_in_the_history(steps):
    told = Told().do("register", BASE, placed("v0"), {})
    for action, version, flag in steps:
        before, length = told.now, len(told.history)
        try:
            match action:
                case "register":
                    told.do("register", BASE if flag else Base("b", 38, 12), placed(version), {})
                case "submit":
                    told.submit(version, PASSED if flag else FAILED)
                case "canary":
                    told.canary_of(version, 0.2, version)
                case "roll_back":
                    told.do("roll_back", *([version] if flag else []))
                case "unpin":
                    told.do("unpin")
                case _:
                    told.do(action, version)
        except (RegistryConflict, UnknownVersion):
            assert told.now is before and len(told.history) == length
    told.now.check()
    assert all(a["to"] == b["from"] for a, b in zip(told.history, told.history[1:], strict=False))
    assert all(release.state != "rejected" for v, release in told.now.versions.items() if v in (told.now.live, told.canary))


@pytest.mark.parametrize(
    "change",
    [
        {"replica": ""},
        {"replica": "x" * 300},
        {"model": None},
        {"serving": None},
        {"revision": "1"},
        {"tag": "x" * 300},
        {"against": 5},
        {"loaded": None},
        {"errors": {"v1": 5}},
        {"loaded": {1: "x"}},
        {"arms": {str(i): Arm() for i in range(65)}},
    ],
)
def test_reports_that_are_none_are_refused(change):
    with pytest.raises(ValueError):
        replace(ReplicaReport("r", "m"), **change).validated()


def test_counts_that_cannot_be_are_left_out_of_a_report():
    report = ReplicaReport("r", "m", arms={"v1": Arm(-1), "v2": Arm.of(2, 3), "v3": None}).validated()
    assert report.arms == {"v2": Arm.of(2, 3)}


def test_a_change_is_json_and_back():
    change = Change("promote", "v1", "v1", False, {"v1": "live"}, revision=3, id="a", who="ann", why="w", before="v0")
    assert Change.from_json(json.loads(json.dumps(change.to_json()))) == change
