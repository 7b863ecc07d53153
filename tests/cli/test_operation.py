"""`specfleet status` and `policy` against the real gateway and the real policy keeper."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import CLIENT, Service, Shell


def test_status_shows_models_and_load(shell: Shell) -> None:
    done = shell("status")
    assert done.code == 0
    echo, code = (next(line for line in done.out.splitlines() if line.strip().startswith(f"{model} ")) for model in ("echo", "code"))
    assert "ready" in echo and "goodput" in echo and "3.00" in echo and "5.00" in echo
    assert "completion" not in code and "ngram" in code
    assert "loading" in done.out and "failed" in done.out
    assert "slow: it is loading" in done.err and "broken: it is failed" in done.err


def test_status_without_the_admin_key(shell: Shell) -> None:
    done = shell("status", key=CLIENT)
    assert done.code == 0 and "echo" in done.out and "admin key" in done.err


def test_status_as_json(shell: Shell) -> None:
    answer = json.loads(shell("status", "--json").out)
    assert {entry["id"]: entry["state"] for entry in answer["models"]}["slow"] == "loading"
    assert answer["load"]["echo"]["running"] == 2


def test_policy_set_get_history(shell: Shell, service: Service) -> None:
    assert shell("policy", "set", "echo", "kind=fixed", "depth=2").code == 0
    assert shell("policy", "set", "echo", "depth=4").code == 0
    got = json.loads(shell("policy", "get", "echo", "--json").out)
    assert got["version"] == 2 and got["policy"]["kind"] == "fixed" and got["policy"]["depth"] == 4
    shown = shell("policy", "get", "echo").out
    assert "policy.kind" in shown and "fixed" in shown
    history = json.loads(shell("policy", "history", "echo", "--json").out)["history"]
    assert [change["who"] for change in history] == ["operator", "operator"] and history[1]["from"]["depth"] == 2
    shown = shell("policy", "history", "echo").out
    assert "operator" in shown and "kind: goodput → fixed" in shown and "depth: 2 → 4" in shown


def test_policy_set_takes_json_and_replaces(shell: Shell, service: Service) -> None:
    shell("policy", "set", "echo", '{"kind": "goodput", "max_depth": 3, "margin": 0.2}')
    shell("policy", "set", "echo", '{"kind": "goodput", "max_depth": 5}', "--replace")
    policy = service.keeper.policy("echo")["policy"]
    assert (policy["max_depth"], policy["margin"]) == (5, 0.01)


def test_policy_dry_run_changes_nothing(shell: Shell, service: Service) -> None:
    done = shell("policy", "set", "echo", "kind=off", "--dry-run")
    assert done.code == 0 and "Nothing was changed." in done.err and "off" in done.out
    assert service.keeper.policy("echo")["version"] == 0


def test_policy_set_says_why_and_for_which_version(shell: Shell, service: Service) -> None:
    assert shell("policy", "set", "echo", "kind=fixed", "--why", "quiet & late", "--expected-version", "0").code == 0
    stale = shell("policy", "set", "echo", "depth=5", "--expected-version", "0")
    assert stale.code == 1 and "at version 1, not 0" in stale.err and "Traceback" not in stale.err
    (change,) = service.keeper.history("echo")
    assert change["why"] == "quiet & late" and service.keeper.policy("echo")["version"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("set", "echo", "depth"), "'depth' is not NAME=VALUE."),
        (("set", "echo", "{oops"), "not a JSON object"),
        (("set", "echo", "kind=magic"), "one of off, fixed, threshold, goodput"),
        (("set", "echo", "kind=fixed", "depth=-1"), "depth"),
        (("get", "nothing"), "does not exist"),
    ],
)
def test_policy_errors(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    done = shell("policy", *arguments)
    assert done.code == 1 and said in done.err and "Traceback" not in done.err


def test_policy_needs_the_admin_key(shell: Shell) -> None:
    assert shell("policy", "get", "echo", key=CLIENT).code == 1
