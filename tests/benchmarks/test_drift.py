"""What is said of a course of exchanges, on hand-made ones, and the configuration that the service reads."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks import drift
from benchmarks.drifting import texts
from benchmarks.drifting.findings import Replay, course, first, per_step, promotions, recovery, totals, warmed
from benchmarks.drifting.fleet import CEILING, REFRESH, REFRESHED, STATIC, fleet
from benchmarks.drifting.live import Answer, Exchange, Habits, Wanted, answer, driven
from benchmarks.drifting.offline import untrained
from benchmarks.drifting.picture import draw
from benchmarks.drifting.replayed import Replays
from benchmarks.drifting.texts import Kind, prompts
from configs.settings import load_settings
from drafters.mlp import MLPSpeculator

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "old", "new"


def made(rate: float, version: str = OLD, text: str = "t") -> Answer:
    """An answer of 121 tokens at a rate, the prompt's step beside."""
    return Answer(steps=1 + round(120 / rate), tokens=121, version=version, text=text)


def exchange(place: int, phase: int, rates: dict[str, float], version: str = OLD) -> Exchange:
    answers = {name: made(rate, version if name == REFRESHED else OLD) for name, rate in rates.items()}
    return Exchange(Wanted(phase, f"p{place}", place, tuple(rates)), place, float(place), answers)


def shifted(recovers_at: int = 60) -> list[Exchange]:
    """60 requests of one kind, then 120 of the other, of which the refreshed speculator serves all but the first ones well."""
    before = [exchange(i, 0, {STATIC: 2.0, REFRESHED: 2.0}) for i in range(60)]
    weak, strong = {STATIC: 1.5, REFRESHED: 1.5, CEILING: 2.5}, {STATIC: 1.5, REFRESHED: 2.4, CEILING: 2.5}
    after = [exchange(60 + i, 1, strong if i >= recovers_at else weak, NEW if i >= recovers_at else OLD) for i in range(120)]
    return before + after


def change(at: float, action: str = "promote") -> dict[str, Any]:
    return {"action": action, "at": at, "from": OLD, "to": NEW, "version": NEW}


def test_tokens_per_step_leave_out_the_step_that_reads_the_prompt() -> None:
    assert per_step([Answer(steps=11, tokens=21), Answer(steps=31, tokens=41)]) == pytest.approx(1.5)
    assert per_step([]) == 0.0


def test_windows_never_mix_two_kinds_of_traffic() -> None:
    parts = course(shifted(), 40)
    assert [(part["requests"], part["phase"]) for part in parts] == [([0, 40], 0), ([60, 100], 1), ([100, 140], 1), ([140, 180], 1)]
    assert parts[0]["tokens_per_step"] == {STATIC: 2.0, REFRESHED: 2.0}
    assert parts[-1]["tokens_per_step"] == {STATIC: 1.5, REFRESHED: 2.4, CEILING: 2.5}


def test_recovery_is_the_share_of_what_there_was_to_gain() -> None:
    found = recovery(shifted(), 20)
    assert found["recovered"] == pytest.approx(0.9) and found["late_requests"] == 40
    assert 60 < found["reached"] <= 80  # so many requests after the shift, the window's own counted
    never = recovery(shifted(120), 20)
    assert never["recovered"] == 0.0 and never["reached"] is None


def test_a_cold_start_counts_the_requests_to_its_target() -> None:
    slow = [exchange(i, 0, {STATIC: 1.0, REFRESHED: 1.0}) for i in range(30)]
    fast = [exchange(30 + i, 0, {STATIC: 1.0, REFRESHED: 2.0}) for i in range(30)]
    assert warmed(slow + fast, 10) == {"first": 1.0, "last": 2.0, "reached": 38}
    assert warmed(slow, 10)["reached"] is None
    assert first(slow, 40, lambda part: True) is None


def replayed(rates: dict[str, float]) -> Replay:
    """Versions that make so many tokens per step, a little more of every other request."""
    return lambda version, wanted: [made(rates[version] + 0.1 * (one.seed % 2)) for one in wanted]


@pytest.mark.parametrize(("rate", "lowered"), [(2.4, False), (1.2, True)])
def test_a_promotion_is_judged_on_the_requests_after_it_by_both_versions(rate: float, lowered: bool) -> None:
    requests = [exchange(i, 0, {STATIC: 1.0, REFRESHED: 1.0}) for i in range(80)]
    (found,) = promotions(requests, [change(39.5), change(10.0, "canary")], 30, replayed({OLD: 1.5, NEW: rate}))
    assert (found.version, found.request, found.requests) == (NEW, 40, 30)
    assert found.before == pytest.approx(1.55, abs=0.02) and found.after == pytest.approx(rate + 0.05, abs=0.02)
    assert found.lowered is lowered and (found.high < 0) is lowered and found.low <= found.high


def test_requests_of_another_phase_say_nothing_of_a_promotion() -> None:
    requests = [exchange(i, i // 40, {STATIC: 1.0, REFRESHED: 1.0}) for i in range(80)]
    rates = replayed({OLD: 1.5, NEW: 2.0})
    assert promotions(requests, [change(34.5), change(79.5), change(74.5)], 30, rates) == []  # too few, none and too few again
    (found,) = promotions(requests, [change(27.5)], 30, rates)
    assert found.requests == 12


def test_a_version_is_replayed_as_the_service_would_have_served_it(tmp_path: Path) -> None:
    """Whatever drafts, the texts are the same; and a version that learned something takes fewer steps than random weights."""
    model, habits = ROOT / "models" / "demo-code", Habits(1, 0.7, 24)
    untrained(model, 1).save_pretrained(tmp_path / "random")
    folders = {OLD: model / "speculator", NEW: tmp_path / "random"}
    told = [{"release": {"placement": {"version": name, "url": f"file://{folder}"}}} for name, folder in folders.items()]
    replays = Replays(model, habits, [*told, {"release": None}, change(1.0)])
    wanted = [Wanted(0, f"import {name}\n", seed, (STATIC,)) for seed, name in enumerate(("os", "re", "json", "ast"))]
    trained, random = (replays.answers(version, wanted) for version in (OLD, NEW))
    assert [one.tokens for one in trained] == [one.tokens for one in random] and trained == replays.answers(OLD, wanted)
    assert per_step(trained) > per_step(random) >= 1.0 and all(one.accepted == one.tokens - one.steps for one in trained)


def test_failures_and_other_texts_are_counted() -> None:
    good = [exchange(i, 0, {STATIC: 1.0, REFRESHED: 1.5}) for i in range(3)]
    bad = replace(good[0], answers={STATIC: made(1.0), REFRESHED: Answer(failure="ReadTimeout: ")})
    other = replace(good[0], answers={STATIC: made(1.0), REFRESHED: made(1.5, text="u")})
    found = totals([*good, bad, other], [], [change(1.0), change(2.0, "submit")])
    assert (found["requests"], found["failed"], found["failures"], found["other_texts"]) == (5, 1, ["ReadTimeout: "], 1)
    assert found["changes"] == {"promote": 1, "submit": 1} and found["promotions_that_lowered"] == 0


def test_every_user_puts_each_request_to_all_its_models_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport that answers as the service does, and fails for one prompt."""
    seen: list[tuple[str, int]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        body = yaml.safe_load(request.content)
        seen.append((body["model"], body["seed"]))
        report = {"steps": 3, "accepted": 2, "version": OLD}
        done = {"speculation": report, "usage": {"completion_tokens": 5}, "choices": [{"text": body["prompt"]}]}
        return httpx.Response(503 if body["prompt"] == "bad" else 200, json=done)

    client = httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **options: client(transport=httpx.MockTransport(handle), **options))
    wanted = [Wanted(0, "bad" if i == 4 else f"p{i}", i, (STATIC, REFRESHED)) for i in range(9)]
    told: list[Exchange] = []
    found = asyncio.run(driven("http://test", wanted, Habits(3, 0.5, 8), told.append))
    assert sorted(seen) == sorted((model, i) for i in range(9) for model in (STATIC, REFRESHED))
    assert found == told and [one.place for one in found] == [*range(9)]
    failures = [a.failure for one in found for a in one.answers.values() if a.failure]
    assert len(failures) == 2 and all("503" in failure for failure in failures)


def test_an_answer_is_read_from_the_body_of_a_completion() -> None:
    report = {"steps": 3, "accepted": 2, "version": "v", "drafted": 9}
    body = {"speculation": report, "usage": {"completion_tokens": 5}, "choices": [{"text": "x"}]}
    assert answer(body) == Answer(steps=3, tokens=5, accepted=2, version="v", text="x")


def test_the_fleet_is_one_base_of_which_one_model_is_refreshed(tmp_path: Path) -> None:
    (tmp_path / "spec").mkdir()
    names = dict.fromkeys((STATIC, REFRESHED, CEILING), tmp_path / "spec")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fleet(ROOT / "models" / "demo-code", names, 10, REFRESH)))
    settings = load_settings(tmp_path / "config.yaml", {})
    assert [model.refresh.enabled for model in settings.models] == [False, True, False]
    assert len({model.base for model in settings.models}) == 1 and {model.policy["kind"] for model in settings.models} == {"fixed"}
    assert settings.refresh.work.startswith(str(tmp_path))


def test_what_is_learned_beforehand_is_of_other_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = [letter * 1000 for letter in "abcd"]
    monkeypatch.setitem(texts.KINDS, "letters", Kind(lambda: letters))
    learned, live = (prompts("letters", beforehand, 20, 1) for beforehand in (True, False))
    assert {text[0] for text in learned} == {"a", "c"} and {text[0] for text in live} == {"b", "d"}
    assert {len(prompt) for prompt in live} == {texts.LENGTH} and live == prompts("letters", False, 20, 1)
    with pytest.raises(ValueError, match="no kind 'verse'; there are code, prose, reference, tables, chat"):
        prompts("verse", True, 1, 1)


def test_documents_that_are_prompts_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts.KINDS, "talks", Kind(lambda: [f"talk {index}" for index in range(10)], whole=True))
    assert sorted(prompts("talks", False, 3, 1)) == ["talk 1", "talk 3", "talk 7"]
    with pytest.raises(ValueError, match="6 prompts are wanted, and there are 5 documents"):
        prompts("talks", True, 6, 1)


@pytest.mark.parametrize("kind", ["code", "prose", "reference", "tables"])
def test_there_is_text_of_every_kind(kind: str) -> None:
    assert any(prompt.strip() for prompt in prompts(kind, False, 3, 1))


def test_random_weights_have_the_shapes_that_the_base_needs(tmp_path: Path) -> None:
    model = ROOT / "models" / "demo-code"
    speculator, same, other = (untrained(model, seed) for seed in (1, 1, 2))
    assert speculator.config == MLPSpeculator.from_pretrained(model / "speculator").config
    one, again, third = (next(s.parameters()) for s in (speculator, same, other))
    assert bool((one == again).all()) and not bool((one == third).all())
    speculator.save_pretrained(tmp_path)
    assert MLPSpeculator.from_pretrained(tmp_path).config == speculator.config


def test_only_the_last_phase_is_put_to_the_ceiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = drift.Plan(ROOT / "models" / "demo-code", False, ("code", "prose"), (5, 7), Habits(2, 0.7, 16), 20, 8, 1)
    asked = drift.wanted(plan, (STATIC, REFRESHED, CEILING))
    assert [len(one.models) for one in asked] == [2] * 5 + [3] * 7
    assert [one.seed for one in asked] == [*range(1, 13)]


def test_a_picture_of_a_run_and_what_is_written_of_it(tmp_path: Path) -> None:
    plan = drift.Plan(ROOT / "models" / "demo-code", False, ("code", "prose"), (60, 120), Habits(2, 0.7, 16), 20, 20, 1)
    found = drift.document(plan, {}, shifted(), [change(119.5)], replayed({OLD: 1.5, NEW: 2.0}))
    assert found["promoted_at"] == [120] and found["outcome"]["promotions_judged"] == 1 and found["outcome"]["recovered"] > 0.8
    draw(found, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_it_takes() -> None:
    app = drift.typer.Typer()
    app.command()(drift.main)
    shown = CliRunner().invoke(app, ["--cold", "--window", "1"])
    assert shown.exit_code == 2 and "--window" in shown.output
