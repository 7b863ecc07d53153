"""The refresh loop of a whole service: traffic is captured, a speculator trained on it, tried and promoted, for a domain of its own first;
then everything that can go wrong does. Clients ask all the time, and get the same texts all the time."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import redis
import torch
from ray import serve

from actors.artefacts import Artefacts
from actors.registry import NAME as REGISTRY
from actors.trainer import NAME as TRAINER
from drafters.bundle import Bundle, Origin, write_bundle
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from policies import Verdict
from tests.conftest import wait_until
from tests.e2e.refreshed import Service, crowd, refreshed, unharmed

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PASSED = Verdict(True, 100, 2.0, 2.1, 0.1, 0.05, 0.15, "let through by hand")
OUTAGE = 12.0  # seconds


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    with refreshed(tmp_path_factory.mktemp("refresh")) as found:
        yield found


def made(service: Service, seed: int, **changes: Any) -> tuple[str, Bundle]:
    """A bundle of random weights for the served base, or for one that differs, and where it was published."""
    folder = Path(service.settings.models[0].speculator)
    config, known = MLPSpeculator.from_pretrained(folder).config, service.state()["versions"][0]
    torch.manual_seed(seed)
    shape = {name: getattr(config, name) for name in ("emb_dim", "inner_dim", "vocab_size", "n_predict", "n_candidates")}
    weights = MLPSpeculator(MLPSpeculatorConfig(**(shape | changes), top_k_tokens_per_head=config.top_k_tokens_per_head))
    origin = Origin(model="tiny", base=known["base"], base_revision=known["base_revision"], created=float(seed))
    place = Path(service.settings.refresh.artefacts)
    bundle = write_bundle(place.parent / "made", weights, origin)
    return Artefacts(str(place), place.parent / "unused").publish(bundle), bundle


def submit(service: Service, url: str, bundle: Bundle) -> tuple[str, str]:
    """The version, and the state that it gets although the gate let it through."""
    answer = service.registry("submit", url, bundle.manifest, PASSED, "trainer")
    return bundle.manifest.version, answer["state"]


def truncate(url: str) -> None:
    file = Path(url.removeprefix("file://")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-99])


def both(service: Service, tag: str = "") -> list[dict[str, Any]]:
    """What the two replicas report of a line."""
    found = service.replicas(tag)
    assert len(found) == 2
    return list(found.values())


def other_than(service: Service, live: str) -> str:
    """Another version that replicas can load: the configured one, or the first that was trained."""
    return next(v["version"] for v in service.state()["versions"] if v["version"] != live and v["state"] != "rejected")


def test_a_domains_traffic_becomes_a_speculator_of_its_own(service: Service) -> None:
    first, law = service.serving(), {"metadata": {"tag": "law"}}
    assert service.serving(**law) == first
    promoted = service.learn(**law)["version"]
    service.until(lambda: service.registry("parents", ("law",))["law"].placement.version == service.state("law")["live"], **law)
    own = service.state("law")["live"]
    wait_until(lambda: service.serving(**law) == own, 20)
    assert own != first == service.serving() == service.serving(metadata={"tag": "other"})
    assert service.texts() == service.texts(**law) == service.expected
    submit, canary, promote = [c for c in service.history("law") if c["version"] == promoted][:3]
    assert [(c["action"], c["who"]) for c in (submit, canary, promote)] == [
        ("submit", "trainer"),
        ("canary", "canary"),
        ("promote", "canary"),
    ]
    assert (promote["from"], promote["to"], submit["release"]["against"]) == (None, promoted, first)
    assert [c["action"] for c in service.history()] == ["register"] and service.state()["live"] == first
    wait_until(lambda: all(replica["agrees"] and set(replica["loaded"]) == {own} for replica in both(service, "law")), 20)
    assert f'specfleet_version_steps_total{{model="tiny",tag="law",version="{own}"}}' in service.client.get("/metrics").text
    service.training(paused=False)


def test_traffic_becomes_a_better_speculator(service: Service) -> None:
    first = service.ask("x", 1)["speculation"]["version"]
    with unharmed(service):
        promoted = service.learn()["version"]
    changes = [c for c in service.history() if c["version"] in (first, promoted)][:4]
    assert [c["action"] for c in changes] == ["register", "submit", "canary", "promote"]
    assert [c["who"] for c in changes] == ["configuration", "trainer", "canary", "canary"]
    assert "held-out requests the candidate drafts" in changes[1]["why"] and "kept tokens per draft" in changes[3]["why"]
    assert (changes[3]["from"], changes[3]["to"]) == (first, promoted) and first != promoted
    version = service.version(promoted)
    assert version["parent"] == first and version["data"]["requests"] > 0
    live = service.settled()
    kept = {live: service.version(live)["checksum"]}
    assert all(replica["loaded"] == kept and not replica["errors"] for replica in both(service))


def test_a_poisoned_candidate_is_tried_and_rolled_back(service: Service) -> None:
    """Random weights in the right shapes, as if the gate had failed: nothing is wrong with the bundle but what it drafts."""
    live = service.settled()
    with unharmed(service):
        version, state = submit(service, *made(service, 1))
        assert state == "candidate"
        service.until(lambda: service.version(version)["state"] == "rolled_back")
    assert service.state()["live"] == live
    last = service.history()[-1]
    assert (last["action"], last["who"], last["version"]) == ("roll_back", "canary", version) and "worse than the live" in last["why"]


def test_a_truncated_bundle_is_rejected(service: Service) -> None:
    live = service.settled()
    with unharmed(service):
        url, bundle = made(service, 2)
        truncate(url)
        version, state = submit(service, url, bundle)
    assert state == "rejected" and service.state()["live"] == live
    assert "truncated or changed: model.safetensors has" in service.history()[-1]["why"]
    refused = service.change(version, "promote", why="all the same")
    assert refused.status_code == 409 and "was rejected" in refused.json()["error"]["message"]


def test_a_bundle_that_is_truncated_after_it_was_taken_in_is_rolled_back(service: Service) -> None:
    live = service.settled()
    with unharmed(service):
        assert service.change(live, "pin", why="nothing is to be tried yet").status_code == 200
        url, bundle = made(service, 3)
        version, state = submit(service, url, bundle)
        assert state == "candidate"
        truncate(url)
        assert service.operator.post("/admin/speculators/tiny/unpin", params={"why": "go on"}).status_code == 200
        wait_until(lambda: service.version(version)["state"] == "rolled_back", 30, 0.1)
    last = service.history()[-1]
    assert (last["who"], service.state()["live"]) == ("canary", live)
    assert "no replica can load it: BundleError" in last["why"] and "truncated" in last["why"]


def test_a_wrong_vocabulary_is_rejected(service: Service) -> None:
    live = service.settled()
    with unharmed(service):
        version, state = submit(service, *made(service, 4, vocab_size=99))
        refused = service.change(version, "canary", why="all the same")
    assert state == "rejected" and service.state()["live"] == live
    assert "wrong vocabulary" in service.history()[-1]["why"] and refused.status_code == 409


def test_of_two_promotions_at_once_one_is_made(service: Service) -> None:
    live = service.settled()
    other = other_than(service, live)
    with unharmed(service):
        seen = service.state()["revision"]
        with ThreadPoolExecutor(2) as two:
            answers = list(two.map(lambda who: service.change(other, "promote", why=who, expected_version=seen), ("ann", "bob")))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        late = next(answer for answer in answers if answer.status_code == 409).json()["error"]
        assert late["code"] == "version_conflict" and f"at revision {seen + 1} {other} is live" in late["message"]
        assert [c["action"] for c in service.history()[seen:]] == ["promote"]
        assert service.change(live, "promote", why="back again").status_code == 200


def test_a_registry_killed_in_the_middle_of_a_promotion_did_it_or_did_not(service: Service) -> None:
    """It is killed while it waits for the store to take the change."""
    live = service.settled()
    other = other_than(service, live)
    seen, store = service.state()["revision"], redis.Redis.from_url(service.redis.url)
    with unharmed(service), ThreadPoolExecutor(1) as aside:
        pid = service.pid(REGISTRY)
        store.client_pause(60_000, all=False)
        answer = aside.submit(service.change, other, "promote", why="in vain")
        wait_until(lambda: "rpush" in [client["cmd"] for client in store.client_list()], 20)
        os.kill(pid, signal.SIGKILL)
        store.client_unpause()
        refused = answer.result()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "registry_away"
        made = service.history()[seen:]
        assert [c["why"] for c in made] in ([], ["in vain"]) and service.state()["live"] == (other if made else live)
        wanted = other if service.state()["live"] == live else live
        assert service.change(wanted, "promote", why="now it goes").json()["live"] == wanted
        service.change(live, "promote", why="back again")


def test_redis_is_gone_for_a_while(service: Service) -> None:
    """State and log are away while a canary runs: nothing changes, nobody waits, no record is lost, and the canary is decided afterwards.

    Nothing depends on how long that lasts but the pauses between attempts to reach it, of 5 s in the registry and up to 10 s in the log's
    writer: it lasts for longer than the registry's.
    """
    live = service.settled()
    other = other_than(service, live)
    with unharmed(service):
        assert service.change(other, "canary", why="once more").status_code == 200
        wait_until(lambda: all(set(r["loaded"]) == {live, other} for r in service.replicas().values()), 20)
        service.redis.stop()
        try:
            over = time.monotonic() + OUTAGE
            refused = service.change(other, "promote", why="in vain")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "store_away"
            names = {service.ask("while it is away", 0, n=8)["id"]}
            while time.monotonic() < over or (found := service.state())["canary"]["outcome"] == "continue":
                names.add(service.ask("while it is away", len(names), n=8)["id"])
            assert (found["live"], found["canary"]["version"]) == (live, other)
        finally:
            service.redis.start()
        service.until(lambda: service.state()["canary"] is None)
    last = service.history()[-1]
    assert (last["who"], last["version"]) == ("canary", other) and last["action"] in ("promote", "roll_back")
    log = redis.Redis.from_url(service.redis.url)
    wait_until(lambda: names <= {entry[b"id"].decode().rpartition("-")[0] for _, entry in log.xrange("specfleet:requests")}, 30, 0.2)
    counts = service.operator.get("/admin/load").json()["request_log"]
    assert (counts["dropped"], counts["lost"]) == (0, 0) and counts["failed"] > 0


def trains(status: dict[str, Any]) -> bool:
    """Whether a round of any domain is under way."""
    return any(domain["phase"] != "waiting" for domain in (status, *status["domains"].values()))


def test_a_full_disk_holds_up_checkpoints_and_nothing_else(service: Service) -> None:
    """The trainer's files may grow to a thousand bytes, and then again as they like."""
    work, pid = Path(service.settings.refresh.work) / "tiny", service.pid(f"{TRAINER}-tiny")
    with unharmed(service):
        service.training(paused=False)
        service.until(lambda: (work / "checkpoint.pt").is_file() and trains(service.trainer()))
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, limits[1]))
        before = {name: (work / name).read_bytes() for name in ("traces", "checkpoint.pt")}
        service.until(lambda: "cannot write" in service.trainer()["problem"])
        assert {name: (work / name).read_bytes() for name in before} == before and not list(work.glob("*.partial"))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        service.until(lambda: (work / "traces").read_bytes() != before["traces"] and not service.trainer()["problem"])


def test_a_trainer_killed_while_it_writes_goes_on_from_what_it_had_written(service: Service) -> None:
    work, name = Path(service.settings.refresh.work) / "tiny", f"{TRAINER}-tiny"
    with unharmed(service):
        pid = service.pid(name)
        service.until(lambda: caught_writing(pid, work))
        before = (work / "traces").read_bytes()
        os.kill(pid, signal.SIGKILL)
        status = service.trainer()
        assert status["traces"]["training"] > 0 and not status["problem"]
        wait_until(lambda: service.trainer()["version"] == service.registry("parents", ("",))[""].placement.version, 30)
        service.until(lambda: service.trainer()["traces"]["seen"] > status["traces"]["seen"])
        service.until(lambda: (work / "traces").read_bytes() != before)
        service.training(paused=True)


def caught_writing(pid: int, work: Path) -> bool:
    """Whether the process was stopped with a file half written; else it goes on."""
    try:
        wait_until(lambda: list(work.glob("*.partial")), 3, 0.0)
    except pytest.fail.Exception:
        return False
    os.kill(pid, signal.SIGSTOP)
    if list(work.glob("*.partial")):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def test_registry_and_replica_die_while_a_canary_runs(service: Service) -> None:
    """A canary of few requests, so that it is not decided meanwhile: it goes on with the same ones, and what was counted stays counted. Of
    the requests only those fail that the killed replica had, and the other one serves on before there is a new one."""
    live = service.settled()
    old = other_than(service, live)
    assert service.change(old, "canary", why="once more", share=0.001).status_code == 200
    wait_until(lambda: all(set(replica["loaded"]) == {old, live} for replica in both(service)), 20)
    salt = service.registry("assignment").canary.salt
    with crowd(service) as undisturbed:
        ray.kill(service.actor(REGISTRY), no_restart=False)
        assert service.registry("assignment").canary.salt == salt
        wait_until(lambda: service.state()["canary"]["live_requests"] > 2, 20)
    assert undisturbed.others == []

    known, counted = set(service.replicas()), service.state()["canary"]["live_requests"]
    pid = serve.get_deployment_handle("tiny", service.settings.ray.application).pid.remote().result()
    with crowd(service) as interrupted:
        os.kill(pid, signal.SIGKILL)
        right = interrupted.right
        wait_until(lambda: interrupted.right > right + 8 or not set(service.replicas()) <= known, 30)
        assert len(interrupted.others) <= 2 and interrupted.right > right
        (name,) = wait_until(lambda: [n for n, r in service.replicas().items() if n not in known and set(r["loaded"]) == {old, live}], 60)
        assert service.registry("assignment").canary.salt == salt
        wait_until(lambda: service.state()["canary"]["live_requests"] > counted, 20)
    assert len(interrupted.others) <= 2 and all("503 Service Unavailable" in answer for answer in interrupted.others), interrupted.others

    with unharmed(service):
        rolled_back = service.operator.post("/admin/speculators/tiny/rollback", params={"why": "seen enough"})
        assert (rolled_back.json()["live"], rolled_back.json()["canary"]) == (live, None)
    assert [(c["action"], c["why"]) for c in service.history()[-2:]] == [("canary", "once more"), ("roll_back", "seen enough")]
    assert name in service.replicas()
