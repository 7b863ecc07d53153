"""The registry actor on a real Ray: submission while replicas are answered, eight editors at once, death in the middle of promotions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.artefacts import Artefacts
from actors.registry import RegistrySettings, start_registry
from actors.releases import Base, RegistryConflict, Releases, ReplicaReport
from drafters.bundle import Bundle
from policies import Arm, CanaryRule, Verdict
from tests.actors.bundles import VOCAB, WIDTH, make_bundle
from tests.conftest import wait_until

pytestmark = pytest.mark.cluster
BETTER = Verdict(True, 150, 2.0, 2.1, 0.1, 0.05, 0.15, "better on held-out requests")
BASE = Base("base", VOCAB, WIDTH, "r1")


@pytest.fixture
def bundles(tmp_path) -> list[tuple[str, Bundle]]:
    made = [make_bundle(tmp_path / "made", seed) for seed in range(3)]
    return [(Artefacts(str(tmp_path / "shared"), tmp_path / "cache").publish(b), b) for b in made]


@pytest.fixture
def registry(cluster, tmp_path, bundles, request):
    """The actor, with one configured version and two candidates."""
    settings = RegistrySettings(automatic=False, rule=CanaryRule(share=0.5, least=10))
    places = f"sqlite:///{tmp_path}/state.db", str(tmp_path / "shared"), str(tmp_path / "actor-cache")
    actor = start_registry(*places, settings, name=f"registry-{request.node.name}")
    ray.get(actor.register.remote("demo", BASE, bundles[0][0], bundles[0][1].manifest))
    for url, bundle in bundles[1:]:
        assert ray.get(actor.submit.remote("demo", url, bundle.manifest, BETTER, "trainer"))["state"] == "candidate"
    yield actor
    ray.kill(actor, no_restart=True)


def patiently(ask: Callable[[], Any]) -> Any:
    """The answer, once the actor is back."""

    def again() -> list[Any]:
        try:
            return [ask()]
        except RayActorError:
            return []

    return wait_until(again, 60)[0]


def test_a_canary_is_decided_from_what_replicas_report(registry, bundles):
    live, canary = (b.manifest.version for _, b in bundles[:2])
    ray.get(registry.start_canary.remote("demo", canary, "trainer", "passed"))
    assignment = ray.get(registry.assignment.remote("demo"))
    assert assignment.canary.placement.version == canary and assignment.live.version == live
    arms = {live: sum((Arm.of(9, 9 + i % 2) for i in range(20)), Arm()), canary: sum((Arm.of(9, i % 2) for i in range(20)), Arm())}
    run = {"salt": assignment.canary.salt, "against": live}
    (answer,) = ray.get(registry.reports.remote([ReplicaReport("r1", "demo", assignment.revision, live, arms=arms, **run)]))
    assert answer.canary is None and answer.live.version == live
    assert [c["action"] for c in ray.get(registry.history.remote("demo"))] == ["register", "submit", "submit", "canary", "roll_back"]


def test_eight_editors_at_once_and_one_wins_each_revision(registry, bundles):
    revision = ray.get(registry.state.remote("demo"))["revision"]
    versions = [b.manifest.version for _, b in bundles[1:]]
    calls = [registry.promote.remote("demo", versions[i % 2], f"editor{i}", "mine", revision) for i in range(8)]
    outcomes = []
    for call in calls:
        try:
            outcomes.append(ray.get(call)["live"])
        except RegistryConflict as error:
            outcomes.append(None)
            assert error.status == 409 and f"at revision {revision + 1}" in str(error)
    assert sum(live is not None for live in outcomes) == 1
    assert len(ray.get(registry.history.remote("demo"))) == revision + 1


def test_killed_in_the_middle_of_promotions_it_comes_back_with_what_was_done(registry, bundles):
    versions = [b.manifest.version for _, b in bundles]
    said: list[int] = []
    for round_ in range(2):
        calls = [registry.promote.remote("demo", versions[(i + 1 + round_) % 3], "loop", "again") for i in range(30)]
        ray.wait(calls, num_returns=5)
        ray.kill(registry, no_restart=False)
        for call in calls:
            try:
                said.append(ray.get(call)["revision"])
            except (RayActorError, RegistryConflict):
                continue
        assignment = patiently(lambda: ray.get(registry.assignment.remote("demo"), timeout=30))
        history = ray.get(registry.history.remote("demo"))
        after = Releases(history)
        after.check()
        assert said and after.assignment("demo") == assignment and set(said) <= {c["revision"] for c in history}
        assert all(a["to"] == b["from"] for a, b in pairwise(history))


def test_wrong_urls_are_refused_before_anything_starts(cluster, tmp_path):
    for state, place in (("kafka://x", str(tmp_path)), (f"sqlite:///{tmp_path}/s.db", "nonsense://x")):
        with pytest.raises(ValueError):
            start_registry(state, place, str(tmp_path), name="registry-none")
