"""`specfleet speculators`, `training` and `log` against the real gateway, the real registry, trainer and log."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from actors.log_contents import Deleted
from services.cli.log import moment_of
from services.cli.problem import Problem
from tests.cli.conftest import CLIENT, Service, Shell


def test_versions_are_listed(shell: Shell, service: Service) -> None:
    done = shell("speculators", "list", "echo")
    assert done.code == 0, done.err
    lines = {version: next(line for line in done.out.splitlines() if version in line) for version in service.loop.v}
    states = ("live", "candidate", "candidate", "rejected")
    assert all(state in lines[version] for version, state in zip(service.loop.v, states, strict=True))
    assert "+0.100 (0.050 to 0.150)" in lines[service.loop.v[1]] and "not better" in lines[service.loop.v[3]]
    assert f"echo: revision 4, {service.loop.v[0]} is live." in done.err
    assert f"echo, domain law: revision 1, no version of its own is live, it is served by {service.loop.v[0]}." in done.err
    assert json.loads(shell("speculators", "list", "echo", "--json").out)["live"] == service.loop.v[0]


def test_versions_are_promoted_pinned_and_rolled_back(shell: Shell, service: Service) -> None:
    live, one, two, _ = service.loop.v
    done = shell("speculators", "promote", "echo", one, "--why", "faster & better", "--expected-version", "4", "--json")
    assert done.code == 0 and json.loads(done.out) | {"live": one, "state": "live", "revision": 5} == json.loads(done.out)
    assert shell("speculators", "pin", "echo", two).code == 0
    assert "pinned" in shell("speculators", "list", "echo").err
    assert shell("speculators", "unpin", "echo").code == 0
    assert shell("speculators", "rollback", "echo", "--version", two).code == 0
    assert service.loop.keeper.state("echo")["live"] == one
    history = json.loads(shell("speculators", "history", "echo", "--json").out)["history"][4:]
    assert [(entry["who"], entry["action"]) for entry in history] == [
        ("operator", action) for action in ("promote", "pin", "unpin", "roll_back")
    ]
    assert (history[0]["from"], history[0]["to"], history[0]["why"]) == (live, one, "faster & better")
    assert "faster & better" in shell("speculators", "history", "echo").out


def test_a_domain_has_versions_of_its_own(shell: Shell, service: Service) -> None:
    loop = service.loop
    version = loop.submit_for("law")
    listed = shell("speculators", "list", "echo", "--tag", "law")
    assert "echo, domain law: versions" in listed.out and loop.v[1] not in listed.out and version in listed.out
    assert "revision 2, no version of its own is live" in listed.err and "echo: revision" not in listed.err
    assert shell("speculators", "promote", "echo", version, "--tag", "law", "--why", "for law").code == 0
    assert f"echo, domain law: revision 3, {version} is live." in shell("speculators", "list", "echo").err
    assert "for law" in shell("speculators", "history", "echo", "--tag", "law").out
    assert "for law" not in shell("speculators", "history", "echo").out and loop.keeper.state("echo")["live"] == loop.v[0]
    assert json.loads(shell("speculators", "rollback", "echo", "--tag", "law", "--json").out)["serving"] == loop.v[0]
    for command in (("list", "echo"), ("promote", "echo", version), ("history", "echo")):
        refused = shell("speculators", *command, "--tag", "tax")
        assert refused.code == 1 and "has no domain 'tax'" in refused.err and "law" in refused.err
    assert "'tax'" in shell("training", "status", "echo", "--tag", "tax").err


def test_a_canary_by_hand(shell: Shell, service: Service) -> None:
    one, two = service.loop.v[1:3]
    assert shell("speculators", "canary", "echo", one, "--share", "0.25").code == 0
    assert f"{one} is the canary of 25% of requests" in shell("speculators", "list", "echo").err
    assert shell("speculators", "retire", "echo", two).code == 0
    assert shell("speculators", "rollback", "echo").code == 0
    assert [v["state"] for v in service.loop.keeper.state("echo")["versions"]] == ["live", "rolled_back", "retired", "rejected"]


def test_refusals_are_one_line(shell: Shell, service: Service) -> None:
    v = service.loop.v
    for arguments, said in (
        (("promote", "echo", v[0]), "is live already"),
        (("promote", "echo", v[3]), "was rejected (not better)"),
        (("promote", "echo", v[1], "--expected-version", "3"), "not at revision 3"),
        (("pin", "echo", "no such?"), "no version 'no such?'"),
        (("canary", "echo", v[1], "--share", "1.5"), "share"),
        (("rollback", "slow"), "is not refreshed"),
        (("list", "gpt"), "does not exist"),
    ):
        done = shell("speculators", *arguments)
        assert done.code == 1 and said in done.err and len(done.err.splitlines()) == 1, (arguments, done)
    service.loop.registry_actor.away = True
    assert "registry is away" in shell("speculators", "list", "echo").err
    assert service.loop.keeper.state("echo")["revision"] == 4


def test_a_model_that_is_not_refreshed_says_so(shell: Shell) -> None:
    done = shell("speculators", "list", "slow")
    assert done.code == 0 and "not refreshed" in done.err


def test_training_of_all_models(shell: Shell, service: Service) -> None:
    done = shell("training", "status")
    echo, slow = (next(line for line in done.out.splitlines() if line.strip().startswith(f"{model} ")) for model in ("echo", "slow"))
    assert "training" in echo and "80" in echo and " of 10 " in echo and "off" in slow and "no round yet" in done.err
    law = next(line for line in done.out.splitlines() if " law " in line)
    assert "waiting" in law and "echo, domain law: no round yet" in done.err
    states = json.loads(shell("training", "status", "echo", "--json").out)
    assert states["echo"]["step"] == 3 and states["echo"]["traces"]["seen"] == 80 and states["echo"]["domains"]["law"]["round"] == 0
    (alone,) = json.loads(shell("training", "status", "echo", "--tag", "law", "--json").out).values()
    assert (alone["tag"], alone["phase"], alone["state"]) == ("law", "waiting", "on") and "domains" not in alone


def test_training_is_paused_and_resumed(shell: Shell, service: Service) -> None:
    assert json.loads(shell("training", "pause", "echo", "--why", "night", "--json").out)["state"] == "paused"
    assert service.loop.trainer.paused and "paused" in shell("training", "status", "echo").out
    assert shell("training", "resume", "echo").code == 0 and not service.loop.trainer.paused
    shown = shell("training", "history", "echo").out
    assert "operator" in shown and "night" in shown
    history = json.loads(shell("training", "history", "echo", "--json").out)["history"]
    assert [(entry["from"]["paused"], entry["to"]["paused"]) for entry in history] == [(False, True), (True, False)]
    refused = shell("training", "pause", "slow")
    assert refused.code == 1 and "is not refreshed" in refused.err


def test_the_log_is_shown_and_purged(shell: Shell, service: Service) -> None:
    asyncio.run(service.loop.logged())
    done = shell("log", "status")
    assert done.code == 0 and "echo" in done.out and "1000 records, 1024 MiB" in done.err and "3 written" in done.err
    assert json.loads(shell("log", "status", "--json").out)["models"]["echo"]["records"] == 2
    declined = shell("log", "purge", "--model", "echo", input="n\n")
    assert declined.code == 1 and "Delete records with model echo for good?" in declined.err
    unanswered = shell("log", "purge", "--all", input="")
    assert unanswered.code == 1 and json.loads(shell("log", "status", "--json").out)["records"] == 3
    assert "1 records were deleted." in shell("log", "purge", "--request", "cmpl-1", input="y\n").out
    answer = json.loads(shell("log", "purge", "--model", "echo", "--before", "7d", "--why", "asked for", "--yes", "--json").out)
    assert answer["purged"] == 1 and answer["before"] == pytest.approx(datetime.now(UTC).timestamp() - 7 * 86400, abs=60)
    assert shell("log", "purge", "--of-key", "other", "--tag", "law", "-y").code == 0
    history = json.loads(shell("log", "history", "--json").out)["history"]
    assert [(entry["who"], entry["records"]) for entry in history] == [("operator", 1)] * 3 and history[1]["why"] == "asked for"
    shown = shell("log", "history").out
    assert "request cmpl-1" in shown and "key other, tag law" in shown


def test_a_purge_says_what_is_still_there(shell: Shell, service: Service) -> None:
    service.loop.trainer_actor.away = True
    service.loop.log_actor.body = SimpleNamespace(purge=lambda purge: Deleted(2, readable=True))
    work = service.loop.artefacts.cache.parent / "slow" / "work"
    work.mkdir(parents=True)
    (work / "traces").write_bytes(b"of a trainer that is no more")
    done = shell("log", "purge", "--all", "--yes")
    assert done.code == 0 and "2 records were deleted." in done.out and "not overwritten" in done.err
    assert "a trainer of slow had left" in done.err and "Traces of echo may still be there" in done.err and "is away" in done.err


@pytest.mark.parametrize("arguments", [(), ("--all", "--model", "echo"), ("--before", "soon"), ("--why", "tidy")])
def test_a_purge_that_says_nothing_or_too_much_is_refused(shell: Shell, service: Service, arguments: tuple[str, ...]) -> None:
    asyncio.run(service.loop.logged())
    done = shell("log", "purge", "--yes", *arguments)
    assert done.code == 1 and len(done.err.splitlines()) == 1
    assert asyncio.run(service.loop.log.contents())["records"] == 3


def test_times_that_are_understood() -> None:
    now = datetime.now(UTC)
    for text, ago in (("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 7 * 86400), ("2w", 14 * 86400)):
        assert abs(now - timedelta(seconds=ago) - moment_of(text)) < timedelta(seconds=10)
    assert moment_of("2026-01-31T18:00+02:00") == datetime(2026, 1, 31, 16, tzinfo=UTC)
    assert moment_of("2026-01-31") == datetime(2026, 1, 31).astimezone(UTC)
    for text in ("", "7", "7y", "d", "-1d", "9999999d", "0001-01-01T00:00+23:59"):
        with pytest.raises(Problem):
            moment_of(text)


def test_all_of_it_needs_the_admin_key(shell: Shell, service: Service) -> None:
    for arguments in (
        ("speculators", "list", "echo"),
        ("training", "pause", "echo"),
        ("log", "status"),
        ("log", "purge", "--all", "--yes"),
    ):
        done = shell(*arguments, key=CLIENT)
        assert done.code == 1 and "does not open /admin" in done.err
