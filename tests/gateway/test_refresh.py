"""The operator's side of the refresh loop over HTTP, with the real registry, trainer and log behind the real desks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.folder_lock import FolderLock
from actors.log_contents import Deleted
from actors.registry import NAME as REGISTRY_NAME
from actors.registry import RegistryKeeper
from actors.releases import ReplicaReport
from actors.trainer import NAME as TRAINER_NAME
from actors.trainer import Worker
from policies import Arm
from services.gateway import ray_refresh
from services.gateway.metrics_refresh import LATEST, RefreshStates, VersionCounts
from services.gateway.refresh import Release
from services.protocol import SpeculationReport
from tests.actors.test_trainer import TRAINER, fed, keeper, worked
from tests.gateway.loop import Loop
from tests.gateway.test_access import ROOT, TEXT, USER, bearer

READS = ["speculators/echo", "speculators/echo/history", "training/echo", "training/echo/history", "log", "log/history"]
CHANGES = [
    *(("POST", f"speculators/echo/v/{action}") for action in ("promote", "pin", "canary", "retire")),
    *(("POST", f"speculators/echo/{action}") for action in ("rollback", "unpin")),
    ("PATCH", "training/echo"),
    ("DELETE", "log?all=true"),
]


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    return Loop(tmp_path)


@pytest.fixture
def served(loop: Loop, make: Callable[..., Any]) -> Any:
    return make(loop.desks, keys=[USER, ROOT])


@pytest.fixture
async def root(served: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with served.client(headers=bearer("root-key-1")) as http:
        yield http


def reported(loop: Loop, **more: Any) -> ReplicaReport:
    """What a replica says that follows the registry."""
    now = loop.keeper.assignment("echo")
    assert now.live is not None
    placements = [now.live, *([now.canary.placement] if now.canary else [])]
    loaded = {placement.version: placement.checksum for placement in placements}
    run = {"salt": now.canary.salt, "against": now.live.version} if now.canary else {}
    return ReplicaReport("r1", "echo", now.revision, now.live.version, loaded, **run, **more)


async def test_all_of_it_needs_an_admin_key(served: Any, loop: Loop) -> None:
    async with served.client() as http:
        for method, path in [*(("GET", path) for path in READS), *CHANGES]:
            for key, status in (("user-key-1", 403), ("wrong", 401)):
                answer = await http.request(method, f"/admin/{path}", headers=bearer(key), json={"paused": True})
                assert answer.status_code == status, answer.text
    assert len(loop.keeper.history("echo")) == 4 and not loop.trainer.paused


async def test_versions_and_what_replicas_run(root: httpx.AsyncClient, loop: Loop) -> None:
    loop.keeper.report(reported(loop, errors={loop.v[3]: "a byte differs"}))
    state = (await root.get("/admin/speculators/echo")).json()
    assert (state["state"], state["live"], state["revision"]) == ("on", loop.v[0], 4)
    assert [v["state"] for v in state["versions"]] == ["live", "candidate", "candidate", "rejected"]
    assert state["versions"][1]["gate"]["difference"] == 0.1
    assert state["replicas"]["r1"]["agrees"] and state["replicas"]["r1"]["errors"] == {loop.v[3]: "a byte differs"}


async def test_promote_pin_roll_back_and_their_history(root: httpx.AsyncClient, loop: Loop) -> None:
    _, one, two, _ = loop.v
    for path, params, live in (
        (f"{one}/promote", {"why": "faster", "expected_version": 4}, one),
        (f"{two}/pin", {}, two),
        ("unpin", {}, two),
        ("rollback", {"why": "worse", "version": two}, one),
    ):
        answer = await root.post(f"/admin/speculators/echo/{path}", params=params)
        assert answer.status_code == 200 and answer.json()["live"] == live, answer.text
    history = (await root.get("/admin/speculators/echo/history")).json()["history"][4:]
    assert [(c["action"], c["who"], c["why"]) for c in history] == [
        ("promote", "root", "faster"),
        ("pin", "root", "no reason given"),
        ("unpin", "root", "no reason given"),
        ("roll_back", "root", "worse"),
    ]
    assert history[0]["from"] == loop.v[0] and history[0]["to"] == one and history[0]["at"] == loop.clock.now


async def test_a_canary_of_a_share_and_a_candidate_withdrawn(root: httpx.AsyncClient, loop: Loop) -> None:
    answer = await root.post(f"/admin/speculators/echo/{loop.v[1]}/canary", params={"share": 0.3})
    assert answer.json()["canary"] == loop.v[1] and answer.json()["state"] == "canary"
    assert (await root.get("/admin/speculators/echo")).json()["canary"]["share"] == 0.3
    assert (await root.post(f"/admin/speculators/echo/{loop.v[2]}/retire")).json()["state"] == "retired"
    assert (await root.post("/admin/speculators/echo/rollback")).json()["live"] == loop.v[0]
    assert (await root.get("/admin/speculators/echo")).json()["canary"] is None


@pytest.mark.parametrize(
    ("path", "status", "code", "param"),
    [
        ("echo/{0}/promote", 409, "version_conflict", "expected_version"),
        ("echo/{3}/promote", 409, "version_conflict", "expected_version"),
        ("echo/{1}/promote?expected_version=3", 409, "version_conflict", "expected_version"),
        ("echo/nothing/pin", 404, "version_not_found", "version"),
        ("echo/rollback?version=nothing", 409, "version_conflict", "expected_version"),
        ("echo/unpin", 409, "version_conflict", "expected_version"),
        ("echo/{1}/canary?share=1", 400, "invalid_value", "share"),
        ("echo/{1}/canary?share=nan", 400, "invalid_value", "share"),
        ("echo/{1}/promote?share=0.5", 400, "invalid_value", "share"),
        ("echo/{1}/promote?expected_version=-1", 400, "invalid_value", "expected_version"),
        ("gpt/{1}/promote", 404, "model_not_found", "model"),
        ("gpt/rollback", 404, "model_not_found", "model"),
        ("echo/{1}/explode", 404, "not_found", None),
    ],
)
async def test_what_is_refused(root: httpx.AsyncClient, loop: Loop, path: str, status: int, code: str, param: str | None) -> None:
    answer = await root.post(f"/admin/speculators/{path.format(*loop.v)}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    assert len(loop.keeper.history("echo")) == 4


async def test_a_domain_is_changed_by_its_tag(root: httpx.AsyncClient, loop: Loop) -> None:
    version = loop.submit_for("law")
    whole = (await root.get("/admin/speculators/echo")).json()
    assert (whole["tag"], whole["serving"], len(whole["versions"])) == ("", loop.v[0], 4)
    law = whole["domains"]["law"]
    assert (law["state"], law["live"], law["serving"], [v["version"] for v in law["versions"]]) == ("on", None, loop.v[0], [version])
    assert (await root.get("/admin/speculators/echo", params={"tag": "law"})).json() == law
    for path, params, live in (
        (f"{version}/canary", {"share": 0.3}, None),
        ("rollback", {}, None),
        (f"{version}/promote", {"expected_version": 4}, version),
        (f"{version}/pin", {}, version),
        ("unpin", {}, version),
        ("rollback", {"why": "back to all"}, None),
    ):
        answer = await root.post(f"/admin/speculators/echo/{path}", params={"tag": "law", **params})
        assert answer.status_code == 200 and (answer.json()["live"], answer.json()["tag"]) == (live, "law"), answer.text
    answer = (await root.get("/admin/speculators/echo/history", params={"tag": "law"})).json()
    assert answer["tag"] == "law" and [c["action"] for c in answer["history"]][2:] == [
        "canary", "roll_back", "promote", "pin", "unpin", "roll_back",
    ]  # fmt: skip
    assert (await root.get("/admin/speculators/echo")).json()["revision"] == 4 == whole["revision"]
    assert (await root.post(f"/admin/speculators/echo/{version}/promote")).json()["error"]["code"] == "version_not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "speculators/echo?tag=tax"),
        ("GET", "speculators/echo/history?tag=tax"),
        ("POST", "speculators/echo/unpin?tag=tax"),
        ("GET", "training/echo?tag=tax"),
    ],
)
async def test_a_domain_that_is_not_configured(root: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await root.request(method, f"/admin/{path}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "domain_not_found", "tag")
    assert error["message"] == "The model echo has no domain 'tax'; its domains (refresh.tags) are law."
    assert (await root.request(method, f"/admin/{path.replace('=tax', '=')}")).status_code == 400


async def test_a_domain_that_the_registry_does_not_know_yet(root: httpx.AsyncClient, loop: Loop) -> None:
    old = loop.store.inner.entries
    loop.store.inner.entries = lambda stream, *more: [] if stream.endswith("/law") else old(stream, *more)
    loop.registry_actor.body = RegistryKeeper(loop.store, loop.artefacts, loop.clock)
    state = (await root.get("/admin/speculators/echo")).json()
    assert state["live"] == loop.v[0] and state["domains"] == {"law": {"state": "away"}}
    assert (await root.get("/admin/speculators/echo?tag=law")).status_code == 503
    assert 'specfleet_speculator_revision{model="echo",tag=""} 4.0' in (await root.get("/metrics")).text


async def test_training_of_a_domain(root: httpx.AsyncClient, loop: Loop) -> None:
    whole = (await root.get("/admin/training/echo")).json()
    assert (whole["phase"], whole["domains"]["law"]["phase"]) == ("training", "waiting")
    law = (await root.get("/admin/training/echo?tag=law")).json()
    assert (law["tag"], law["phase"], law["state"], law["buffer_bytes"]) == ("law", "waiting", "on", 2**28) and "domains" not in law
    assert (await root.patch("/admin/training/echo?tag=law", json={"paused": True})).json()["error"]["param"] == "tag"


async def test_of_two_promotions_at_once_one_is_made(root: httpx.AsyncClient, loop: Loop) -> None:
    asked = [root.post(f"/admin/speculators/echo/{v}/promote", params={"expected_version": 4}) for v in loop.v[1:3]]
    assert sorted(answer.status_code for answer in await asyncio.gather(*asked)) == [200, 409]


async def test_a_model_that_is_not_refreshed(root: httpx.AsyncClient) -> None:
    speculators, training = [(await root.get(f"/admin/{room}/slow")).json() for room in ("speculators", "training")]
    assert speculators["state"] == training["state"] == "off" and speculators["versions"] == []
    assert (await root.get("/admin/speculators/slow/history")).json() == {"model": "slow", "tag": "", "history": []}
    for answer in (
        await root.post("/admin/speculators/slow/v1/promote"),
        await root.post("/admin/speculators/slow/rollback"),
        await root.patch("/admin/training/slow", json={"paused": True}),
    ):
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "refresh_off", answer.text


@pytest.mark.parametrize("trouble", ["away", "absent"])
async def test_who_is_away_is_asked_again_later(root: httpx.AsyncClient, loop: Loop, trouble: str) -> None:
    for actor in (loop.registry_actor, loop.trainer_actor, loop.log_actor):
        setattr(actor, trouble, True)
    codes = {"speculators": "registry_away", "training": "trainer_away", "log": "log_away"}
    asked = [("GET", path) for path in READS if path != "training/echo/history"]
    for method, path in [*asked, *CHANGES]:
        answer = await root.request(method, f"/admin/{path}", json={"paused": True} if method == "PATCH" else None)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1", answer.text
        assert answer.json()["error"]["code"] == codes[path.partition("/")[0].partition("?")[0]]
    metrics = (await root.get("/metrics")).text
    assert 'specfleet_training_phase{model="echo",phase="away",tag=""} 1.0' in metrics


async def test_a_store_that_is_away_changes_nothing(root: httpx.AsyncClient, loop: Loop) -> None:
    loop.store.broken = True
    for answer in (
        await root.post(f"/admin/speculators/echo/{loop.v[1]}/promote"),
        await root.patch("/admin/training/echo", json={"paused": True}),
        await root.get("/admin/training/echo/history"),
    ):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "store_away"
    assert not loop.trainer.paused and (await root.get("/admin/speculators/echo")).json()["live"] == loop.v[0]


async def test_what_an_actor_fails_at_is_not_told(root: httpx.AsyncClient, loop: Loop) -> None:
    loop.trainer_actor.body = None
    answer = await root.get("/admin/training/echo")
    assert answer.status_code == 500 and "NoneType" not in answer.text and "trainer of echo" in answer.text


async def test_training_is_paused_and_resumed_and_that_is_recorded(root: httpx.AsyncClient, loop: Loop) -> None:
    assert (await root.get("/admin/training/echo")).json()["state"] == "on"
    for paused in (True, True, False):
        state = (await root.patch("/admin/training/echo", params={"why": "night"}, json={"paused": paused})).json()
        assert state["paused"] is paused is loop.trainer.paused and state["state"] == ("paused" if paused else "on")
    history = (await root.get("/admin/training/echo/history")).json()["history"]
    assert history == [
        {"at": 77.0, "who": "root", "why": "night", "from": {"paused": old}, "to": {"paused": not old}} for old in (False, True)
    ]


@pytest.mark.parametrize(
    ("body", "param"), [(b"{}", "paused"), (b'{"paused": 1}', "paused"), (b'{"paused": true, "x": 1}', "x"), (b"[]", None), (b"{", None)]
)
async def test_bad_wishes_for_training(root: httpx.AsyncClient, loop: Loop, body: bytes, param: str | None) -> None:
    answer = await root.patch("/admin/training/echo", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param and not loop.trainer.paused
    assert (await root.patch("/admin/training/gpt", json={"paused": True})).status_code == 404


async def test_the_log_is_counted_and_purged(root: httpx.AsyncClient, loop: Loop) -> None:
    await loop.logged()
    state = (await root.get("/admin/log")).json()
    assert (state["records"], state["oldest"], state["newest"]) == (3, 100.0, 300.0)
    assert state["models"]["echo"]["records"] == 2 and state["writer"]["written"] == 3 and state["retention"]["max_records"] == 1000
    answer = await root.delete("/admin/log", params={"model": "echo", "before": "1970-01-01T00:02:30Z", "why": "asked for"})
    said = {"purged": 1, "readable": False, "model": "echo", "key": None, "request": None, "before": 150.0, "tag": None}
    assert answer.json() == said | {"traces": {"echo": 80}, "cleared": [], "untold": {}}  # the trainer's are of the first 80 seconds
    assert (await root.delete("/admin/log", params={"request": "cmpl-3"})).json()["purged"] == 1
    assert (await root.delete("/admin/log", params={"key": "nobody"})).json()["purged"] == 0
    assert (await root.delete("/admin/log", params={"all": "true"})).json()["purged"] == 1
    assert (await root.get("/admin/log")).json()["records"] == 0
    history = (await root.get("/admin/log/history")).json()["history"]
    assert [(p["who"], p["records"]) for p in history] == [("root", 1), ("root", 1), ("root", 0), ("root", 1)]
    assert history[0]["why"] == "asked for" and history[0]["before"] == 150.0 and history[1]["request"] == "cmpl-3"


@pytest.mark.parametrize(
    ("query", "gone"),
    [
        ("all=true", 80),
        ("model=echo", 80),
        ("model=slow", 0),  # another model's trainer is not asked
        ("request=r-7", 1),
        ("tag=law", 0),
        ("before=1970-01-01T00:00:30Z", 30),
        ("key=client", 80),  # traces carry no key
        ("key=client&before=1970-01-01T00:00:30Z", 30),
        ("key=client&request=r-7", 1),
    ],
)
async def test_a_purge_reaches_the_trainer(root: httpx.AsyncClient, loop: Loop, query: str, gone: int) -> None:
    await loop.logged()
    answer = (await root.delete(f"/admin/log?{query}")).json()
    assert answer["traces"] == ({} if "slow" in query else {"echo": gone}) and answer["cleared"] == [] and answer["untold"] == {}
    traces = loop.trainer.keeper.status()["traces"]
    assert traces["training"] + traces["held_out"] == 80 - gone


@pytest.mark.parametrize("trouble", ["away", "absent", "full"])
async def test_a_purge_says_which_trainers_could_not_be_told(root: httpx.AsyncClient, loop: Loop, tmp_path: Path, trouble: str) -> None:
    await loop.logged()
    if trouble == "full":
        (tmp_path / "full").write_text("a file where the work folder would be")
        loop.trainer.keeper.work = tmp_path / "full"
    else:
        setattr(loop.trainer_actor, trouble, True)
    answer = (await root.delete("/admin/log", params={"model": "echo"})).json()
    assert (answer["purged"], answer["traces"], answer["untold"].keys()) == (2, {}, {"echo"})
    assert ("away" in answer["untold"]["echo"]) == (trouble != "full")
    assert (await root.get("/admin/log")).json()["records"] == 1


def left(folder: Path) -> Path:
    """The work folder of a trainer of the model `slow` that was killed."""
    trainer = fed(keeper(folder / "slow"))
    trainer.save()
    (trainer.work / "traces.partial").write_bytes(b"a part of them")
    (trainer.work / "paused").write_text("false")
    return trainer.work


@pytest.mark.parametrize("query", ["all=true", "model=slow", "key=client", "model=slow&key=client"])
async def test_a_purge_deletes_what_a_trainer_left_of_a_model_that_is_not_trained(
    root: httpx.AsyncClient, tmp_path: Path, query: str
) -> None:
    work = left(tmp_path)
    assert (work / "traces").stat().st_size > 1000
    answer = (await root.delete(f"/admin/log?{query}")).json()
    assert answer["cleared"] == ["slow"] and answer["untold"] == {} and "slow" not in answer["traces"]
    assert {file.name for file in work.iterdir()} - {"bundles", "cache"} == {"paused", "lock"}
    assert (await root.delete(f"/admin/log?{query}")).json()["cleared"] == []


async def test_what_a_trainer_of_another_cluster_works_on_is_left_to_it(root: httpx.AsyncClient, tmp_path: Path) -> None:
    alone, before = FolderLock(work := left(tmp_path)), work.joinpath("traces").read_bytes()
    alone.enter()
    answer = (await root.delete("/admin/log?all=true")).json()
    assert answer["cleared"] == [] and "Another trainer than this cluster's" in answer["untold"]["slow"]
    assert (work / "traces").read_bytes() == before
    alone.leave()
    assert (await root.delete("/admin/log?all=true")).json()["cleared"] == ["slow"]


@pytest.mark.parametrize("query", ["request=r-7", "before=1970-01-01T00:00:30Z", "tag=law&model=slow"])
async def test_only_a_trainer_tells_traces_apart(root: httpx.AsyncClient, tmp_path: Path, query: str) -> None:
    before = (work := left(tmp_path)).joinpath("traces").read_bytes()
    answer = (await root.delete(f"/admin/log?{query}")).json()
    assert answer["cleared"] == [] and answer["untold"].keys() == {"slow"} and str(work) in answer["untold"]["slow"]
    assert (work / "traces").read_bytes() == before


async def test_what_a_trainer_left_and_cannot_be_deleted_is_named(root: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "work").write_text("not a folder")
    answer = (await root.delete("/admin/log?all=true")).json()
    assert answer["cleared"] == [] and "cannot be deleted: " in answer["untold"]["slow"]


async def test_a_trainer_that_goes_on_although_its_model_is_not_trained_any_more_forgets(root: httpx.AsyncClient, loop: Loop) -> None:
    loop.untrained_actor.absent, loop.untrained_actor.body = False, loop.trainer_actor.body
    answer = (await root.delete("/admin/log?model=slow")).json()
    assert (answer["traces"], answer["cleared"], answer["untold"]) == ({"slow": 80}, [], {})
    assert (await root.get("/admin/training/slow")).json()["state"] == "off"


async def test_a_purge_says_that_records_are_not_overwritten_yet(root: httpx.AsyncClient, loop: Loop) -> None:
    loop.log_actor.body = SimpleNamespace(purge=lambda purge: Deleted(2, readable=True))
    answer = (await root.delete("/admin/log?model=echo")).json()
    assert (answer["purged"], answer["readable"], answer["traces"]) == (2, True, {"echo": 80})


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", None),
        ("why=tidy", None),
        ("all=true&model=echo", None),
        ("before=yesterday", "before"),
        ("before=2026-01-01T00:00:00", "before"),
        ("model=", "model"),
        ("modle=echo", "modle"),
    ],
)
async def test_a_purge_must_say_what_it_means(root: httpx.AsyncClient, loop: Loop, query: str, param: str | None) -> None:
    await loop.logged()
    answer = await root.delete(f"/admin/log?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert (await root.get("/admin/log")).json()["records"] == 3


async def test_a_key_that_is_not_logged(make: Callable[..., Any]) -> None:
    gateway = make(keys=[USER | {"store": False}, ROOT])
    async with gateway.client() as http:
        for key in ("user-key-1", "root-key-1"):
            for body in (TEXT, TEXT | {"store": True}, TEXT | {"store": False}):
                assert (await http.post("/v1/completions", json=body, headers=bearer(key))).status_code == 200
    assert [job.store for job in gateway.fleet.jobs] == [False, False, False, True, True, False]


def found(text: str) -> dict[tuple[str, ...], float]:
    """(metric, label values in order of their names) -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_candidates_that_the_trainer_turned_down_are_counted(tmp_path: Path) -> None:
    refuses = fed(keeper(tmp_path, replace(TRAINER, rule=replace(TRAINER.rule, margin=3.0))))
    assert worked(refuses) is not None
    states = RefreshStates()
    training = Worker(refuses, lambda _: None, dict).status()
    states.states = {"echo": ({"state": "off"}, {"state": "on", **training, "buffer_bytes": 1})}
    samples = {(s.name, s.labels.get("verdict")): s.value for metric in states.collect() for s in metric.samples}
    assert samples["specfleet_training_candidates_total", "rejected"] == 1
    assert samples["specfleet_training_candidates_total", "passed"] == 0
    assert samples["specfleet_training_gate_passed", None] == 0


async def test_metrics(root: httpx.AsyncClient, loop: Loop) -> None:
    live, one, _, rejected = loop.v
    loop.keeper.start_canary("echo", one, "trainer", "it passed the gate", 0.25)
    arms = {live: Arm.of(10, 5), one: Arm.of(10, 7)}
    loop.keeper.report(reported(loop, errors={rejected: "a byte differs"}, arms=arms))
    for tag in ("", "law", "anything"):
        await root.post("/v1/completions", json=TEXT | ({"metadata": {"tag": tag}} if tag else {}))
    loop.trainer.offer([b"one", b"another", b"a third"])
    told = found((await root.get("/metrics")).text)
    info = {labels[2:]: value for labels, value in told.items() if labels[0] == "specfleet_speculator_info"}
    assert info == {("r1", "live", "", live): 1, ("r1", "canary", "", one): 1, ("r1", "failed", "", rejected): 1}
    for name, labels, value in (
        ("speculator_agrees", ("echo", "r1", ""), 1),
        ("speculator_versions", ("echo", "candidate", ""), 1),
        ("speculator_versions", ("echo", "rolled_back", ""), 0),
        ("speculator_versions", ("echo", "candidate", "law"), 0),
        ("speculator_revision", ("echo", ""), 5),
        ("speculator_revision", ("echo", "law"), 1),
        ("speculator_pinned", ("echo", ""), 0),
        ("speculator_canary_share", ("echo", ""), 0.25),
        ("speculator_candidates", ("echo", "", "passed"), 2),
        ("speculator_candidates", ("echo", "", "rejected"), 1),
        ("speculator_gate_difference", ("echo", "", rejected), -0.1),
        ("training_phase", ("echo", "training", ""), 1),
        ("training_phase", ("echo", "waiting", ""), 0),
        ("training_phase", ("echo", "waiting", "law"), 1),
        ("training_phase", ("slow", "off", ""), 1),
        ("training_traces_total", ("echo", "seen", ""), 80),
        ("training_traces_total", ("echo", "invalid", ""), 0),
        ("training_traces_total", ("echo", "unsent", ""), 0),
        ("training_traces_total", ("echo", "seen", "law"), 0),
        ("training_rounds_total", ("echo", ""), 1),
        ("training_candidates_total", ("echo", "", "rejected"), 0),
        ("training_step", ("echo", ""), 3),
        ("training_buffer_limit_bytes", ("echo",), 2**28),
        ("training_yields_total", ("echo",), 0),
        ("training_slowest_yield_seconds", ("echo",), 0),
        ("training_inbox_traces", ("echo",), 3),
        ("version_steps_total", ("echo", "", "v1"), 4),
        ("version_tokens_total", ("echo", "", "v1"), 6),
        ("version_steps_total", ("echo", "law", "v1"), 2),
    ):
        assert told[(f"specfleet_{name}", *labels)] == pytest.approx(value), name
    status = loop.trainer.status()
    assert told["specfleet_training_buffer_bytes", "echo", ""] == status["traces"]["bytes"] > 0
    assert told["specfleet_training_loss", "0", "echo", ""] == pytest.approx(status["losses"][0])
    assert told["specfleet_speculator_canary_difference", "echo", ""] == pytest.approx(0.2)


def test_only_the_latest_versions_are_told_of() -> None:
    counts = VersionCounts()
    for i in range(100):
        counts.add("echo", "", SpeculationReport("mlp", f"v{i}", steps=1, drafted=0, accepted=0, tokens=2, depth_sum=0, depth_max=0))
        counts.add("echo", "", SpeculationReport("mlp", "v0", steps=1, drafted=0, accepted=0, tokens=2, depth_sum=0, depth_max=0))
    samples = {s.labels["version"]: s.value for metric in counts.collect() for s in metric.samples if s.name.endswith("steps_total")}
    assert samples == {"v0": 101} | {f"v{i}": 1 for i in range(100 - LATEST + 1, 100)}


def test_the_actors_are_asked_by_the_methods_that_they_have(loop: Loop) -> None:
    for action in ("promote", "pin", "unpin", "rollback", "canary", "retire"):
        method, arguments = ray_refresh.call(Release("echo", action, "me", "why", "v", 0.5, 7, "law"))  # type: ignore[arg-type]
        assert callable(getattr(loop.keeper, method)) and arguments[0] == "echo" and arguments[-2:] == (7, "law")
    assert (ray_refresh.REGISTRY, ray_refresh.TRAINER) == (REGISTRY_NAME, TRAINER_NAME)
