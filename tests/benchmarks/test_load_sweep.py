"""The load sweep's statistics on hand-made rates, and its plumbing without a service."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import load_step, load_sweep
from benchmarks.sweep.arms import arms, fleet
from benchmarks.sweep.following import Change, Course, Phase, Turn, changed, followed, judged, judgement
from benchmarks.sweep.following_picture import draw as draw_step
from benchmarks.sweep.picture import draw
from benchmarks.sweep.regret import TARGET, behind, regret
from benchmarks.sweep.rounds import LEARNING, WARMING, WORKLOADS, Bench, Habits, Point, busy, entry, rates
from configs.settings import load_settings
from services.cli.bench_target import Served
from services.cli.load_loops import Load
from services.cli.load_outcome import Chunk, Outcome
from services.cli.load_stream import Streams
from services.cli.measurement import Cell

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
FIXED = ["off", "fixed1", "fixed2"]


def test_regret_is_what_was_lost_and_never_counts_luck_twice() -> None:
    """Ten arms that are all alike: the luckiest of them seems to beat the policy, the cross-fitted number does not."""
    naive, crossed = [], []
    for seed in range(60):
        noise = np.random.default_rng(seed).lognormal(0.0, 0.05, (11, 6))
        made = {f"arm{i}": list(100 * row) for i, row in enumerate(noise)}
        found = regret(made, "arm10", [f"arm{i}" for i in range(10)])
        naive.append(found.naive)
        crossed.append(found.regret)
    assert np.mean(naive) > 0.02 and abs(np.mean(crossed)) < 0.01


def test_regret_of_plain_rates() -> None:
    made = {"off": [50.0] * 4, "fixed1": [100.0] * 4, "fixed2": [80.0] * 4, "goodput": [95.0] * 4}
    found = regret(made, "goodput", FIXED)
    assert found.best == "fixed1" and found.regret == pytest.approx(0.05) == found.naive
    assert found.low == pytest.approx(0.05) == found.high and found.verdict == "missed"
    ahead = regret(made | {"goodput": [101.0] * 4}, "goodput", FIXED)
    assert ahead.regret == pytest.approx(-0.01) and ahead.verdict == "met"
    with pytest.raises(ValueError, match="rounds: 1 is too few"):
        regret({name: rows[:1] for name, rows in made.items()}, "goodput", FIXED)


def test_the_verdict_knows_its_noise() -> None:
    made = {"off": [100.0, 100.0, 100.0, 100.0], "goodput": [90.0, 112.0, 88.0, 104.0]}
    found = regret(made, "goodput", ["off"])
    assert found.low < TARGET < found.high and found.verdict.endswith("within noise")


def test_an_arm_that_sat_out_is_never_the_best() -> None:
    made = {"off": [100.0] * 4, "fixed1": [300.0] * 3, "goodput": [100.0] * 4}
    assert regret(made, "goodput", ["off", "fixed1"]).best == "off"


def test_only_arms_that_are_surely_behind_sit_out() -> None:
    steady = {"off": [50.0, 51.0, 49.0], "fixed1": [100.0, 101.0, 99.0], "fixed2": [95.0, 94.0, 96.0]}
    assert behind(steady, FIXED, 0.1) == ["off"]
    assert behind({name: rows[:2] for name, rows in steady.items()}, FIXED, 0.1) == []
    noisy = steady | {"fixed2": [40.0, 160.0, 60.0]}
    assert behind(noisy, FIXED, 0.1) == ["off"]


def cell(arm: str, number: int, ends: list[float], users: int = 2, text: str = "x") -> Cell:
    """A round of requests that end at those times, with a token in every tenth of a second from their beginning on."""
    found = [
        Outcome(
            i,
            0.0,
            0.0,
            end,
            tuple(Chunk(at / 10, 1.0) for at in range(1, int(end * 10) + 1)),
            text,
            int(end * 10),
            steps=5,
            step_tokens=10.0,
        )
        for i, end in enumerate(ends)
    ]
    return Cell(arm, Load(users=users), "server", number, max(ends), 0.1, tuple(found))


def test_counted_is_the_time_when_all_users_are_busy() -> None:
    """Two users, three requests: the first user falls idle with the second end, at 2 s, when 10 + 20 + 20 tokens had come."""
    assert busy(cell("off", 1, [1.0, 2.0, 4.0])) == pytest.approx((10 + 20 + 20) / 2.0)
    assert busy(cell("off", 1, [1.0, 2.0, 4.0], users=1)) == pytest.approx(70 / 4.0)
    failed = replace(
        cell("off", 1, [1.0, 2.0, 4.0], users=1), outcomes=(*cell("off", 1, [1.0]).outcomes, Outcome(1, 0, 0, 2.0, failure="429"))
    )
    assert busy(failed) == pytest.approx(10 / 2.0)


POINT = Point("demo-code", WORKLOADS[0], 2)


def measured(depths: Sequence[int] = (1,)) -> dict[str, object]:
    """A point of two rounds in which all are alike fast."""
    compared = arms(depths)
    cells = [cell(arm.name, number, [2.0 if arm.name == "off" else 1.0] * 3) for number in (1, 2) for arm in compared]
    return entry(POINT, compared, cells)


def test_a_point_says_what_each_policy_did() -> None:
    found = json.loads(json.dumps(measured()))
    assert list(found["arms"]) == ["off", "fixed1", "threshold", "goodput"] and list(found["regret"]) == ["threshold", "goodput"]
    assert found["regret"]["goodput"]["verdict"] == "met" and found["other_texts"] == 0
    assert found["arms"]["off"]["tokens_per_second"] == [30.0, 30.0] and found["arms"]["off"]["tokens_per_step"] == 2.0
    assert found["arms"]["off"]["token_gap_ms"]["p50"] == 100.0 and found["against_off"]["off"] == 1.0


def test_another_text_is_counted() -> None:
    compared = arms([1])
    cells = [cell(arm.name, n, [1.0, 2.0], text="y" if arm.name == "goodput" and n == 1 else "x") for n in (1, 2) for arm in compared]
    assert entry(POINT, compared, cells)["other_texts"] == 2


def test_every_arm_is_served_and_learns_for_itself(tmp_path: Path) -> None:
    compared = arms([1, 3])
    made = fleet(DEMO, "demo-code", compared, 64)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(made))
    settings = load_settings(file, {})
    assert [model.name for model in settings.models] == [f"demo-code-{n}" for n in ("off", "fixed1", "fixed3", "threshold", "goodput")]
    assert [model.policy["kind"] for model in settings.models] == ["off", "fixed", "fixed", "threshold", "goodput"]
    assert settings.model("demo-code-goodput").policy == {"kind": "goodput"}, "nobody tunes it"
    assert all(model.engine.max_running == 64 and model.replicas.max == 1 for model in settings.models)
    usual = load_settings(DEMO, {}).model("demo-code")
    assert all(
        (model.base, model.drafter, model.engine.chunk) == (usual.base, usual.drafter, usual.engine.chunk) for model in settings.models
    )


class Rehearsed(Bench):
    """A bench whose arms take as long as they are told to."""

    def __init__(self, speeds: dict[str, float], clock: Callable[[], None]) -> None:
        super().__init__(Streams("http://nowhere"), Served("x", "completion"), ["a"], arms([1, 2]), Habits(rounds=6))
        object.__setattr__(self, "speeds", speeds)
        object.__setattr__(self, "passes", [])

    async def passed(self, point, arm, number):  # type: ignore[no-untyped-def]
        self.passes.append((arm.name, number))  # type: ignore[attr-defined]
        return cell(arm.name, number, [self.speeds[arm.name]] * 3)  # type: ignore[attr-defined]


async def test_rounds_hold_every_arm_once_and_then_only_those_that_may_be_best() -> None:
    bench = Rehearsed({"off": 9.0, "fixed1": 1.0, "fixed2": 8.0, "threshold": 9.0, "goodput": 1.0}, lambda: None)
    object.__setattr__(bench, "speeds", {name: 1 / rate for name, rate in bench.speeds.items()} | {"fixed1": 9.0, "goodput": 9.0})  # type: ignore[attr-defined]
    rounds = [cells async for cells in bench.rounds(POINT)]
    assert len(rounds) == 6 and all(len({c.model for c in cells}) == len(cells) for cells in rounds)
    assert {c.model for c in rounds[2]} == {"off", "fixed1", "fixed2", "threshold", "goodput"}
    assert {c.model for c in rounds[3]} >= {"off", "threshold", "goodput"}
    assert len({tuple(c.model for c in cells) for cells in rounds[:3]}) > 1, "the order changes"


def test_requests_are_the_same_for_all_and_new_in_every_round() -> None:
    habits = Habits()
    shapes = [habits.shape(POINT, number) for number in (1, 2, WARMING)]
    assert len({shape.seed for shape in shapes}) == 3 and {shape.requests for shape in shapes} == {24}
    assert all(shape.options("server", 3, 50).speculation is None for shape in shapes), "the service's policy decides"
    assert habits.counted(POINT) == 8 and habits.counted(replace(POINT, users=64)) == 4 and LEARNING > 2
    assert replace(POINT, users=64).requests == 192


def test_a_sheet_keeps_what_it_had(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    out.touch()
    sheet = load_sweep.Sheet(out, tmp_path / "sweep.png", {"seed": 1})
    sheet.add({**measured(), "took_seconds": 1.0})
    later = load_sweep.Sheet(out, tmp_path / "sweep.png", {"seed": 2})
    later.add({**measured((2, 3)), "users": 4, "took_seconds": 1.0})
    later.add({**measured(), "took_seconds": 2.0})
    kept = json.loads(out.read_text())
    assert [(c["users"], c["settings"]["seed"]) for c in kept["cells"]] == [(4, 2), (2, 2)]
    assert kept["summary"]["points"] == 2 and kept["summary"]["verdicts"] == {"met": 2}
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_workloads_are_refused_by_name() -> None:
    with pytest.raises(Exception, match="there is no workload 'x'; there are predictable, high-entropy"):
        load_sweep.chosen_workload("x")


def test_one_point_can_be_drawn(tmp_path: Path) -> None:
    draw([json.loads(json.dumps(measured()))], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


# -- the load step ----------------------------------------------------------------------------------------------------------


def steps(start: float, end: float, depth: float, requests: int = 1) -> list[Turn]:
    return [Turn(at, requests, depth, 2 * requests) for at in np.arange(start, end, 0.01)]


PHASES = [Phase(1, 0.0, 4.0), Phase(32, 4.0, 8.0), Phase(1, 8.0, 12.0)]


def changes(turns: list[Turn]) -> list[Change]:
    course = Course.of(turns, 12.0)
    return [changed(course, before, after) for before, after in pairwise(PHASES)]


def test_depth_has_followed_when_it_is_there_and_stays() -> None:
    turns = [*steps(0, 4.5, 4.0), *steps(4.5, 8, 1.0, 32), *steps(8, 9.5, 1.0), *steps(9.5, 12, 4.0)]
    down, up = changes(turns)
    assert (down.direction, up.direction) == ("down", "up")
    assert down.seconds == pytest.approx(0.5, abs=0.21) and up.seconds == pytest.approx(1.5, abs=0.21)
    assert down.depth_before == 4.0 and down.depth_after == 1.0 and up.depth_after == 4.0


def test_a_visit_is_no_arrival() -> None:
    """Depth is right for half a second, wrong again, and right for good from 1.8 s on."""
    turns = [*steps(0, 4, 4.0), *steps(4, 4.5, 1.0), *steps(4.5, 5.8, 3.0), *steps(5.8, 12, 1.0)]
    assert changes(turns)[0].seconds == pytest.approx(1.8, abs=0.21)


def test_probes_do_not_undo_an_arrival() -> None:
    turns = [replace(turn, depth=0.0) if i % 100 == 50 else turn for i, turn in enumerate([*steps(0, 4, 2.0), *steps(4, 12, 5.0)])]
    assert changes(turns)[0].seconds == pytest.approx(0.2, abs=0.21)


def test_depth_that_does_not_have_to_move_has_followed_at_once() -> None:
    assert [change.seconds for change in changes(steps(0, 12, 4.0))] == [0.0, 0.0]


def test_depth_that_is_never_there_for_long_never_followed() -> None:
    swinging = [replace(turn, depth=turn.at % 1 * 8) for turn in steps(0, 8, 0.0)]
    assert followed(Course.of(swinging, 8.0), PHASES[1], 3.0, 5.0) is None
    assert followed(Course.of(swinging, 8.0), PHASES[1], 0.0, 8.0) == pytest.approx(0.0, abs=0.03)
    never = judgement([Change("up", 4.0, 1, 1.0, 4.0, (3.5, 4.5), None)], "up")
    assert never["never"] == 1 and not never["met"] and never["most_seconds"] is None


def test_a_phase_without_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step ended in the later part of the phase of 32 users"):
        changes(steps(0, 4, 4.0))


def test_a_run_is_judged_and_drawn(tmp_path: Path) -> None:
    turns = [*steps(0, 4.3, 4.0), *steps(4.3, 8, 1.0, 32), *steps(8, 12, 4.0)]
    result = json.loads(json.dumps(judged(turns, PHASES))) | {"settings": {"model": "m", "users": 32}}
    assert result["summary"]["down"]["met"] and result["summary"]["up"]["met"] and result["summary"]["down"]["target_seconds"] == 1.0
    assert len(result["course"]["at"]) == len(result["course"]["depth"])
    draw_step(result, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", [load_sweep, load_step])
def test_scripts_say_how_they_are_run(script: object) -> None:
    name = Path(str(script.__file__)).name  # type: ignore[attr-defined]
    assert f"python benchmarks/{name} --out benchmarks/results/" in str(script.__doc__)


def test_rates_are_by_arm_and_round() -> None:
    cells = [cell("off", 2, [1.0, 1.0]), cell("off", 1, [1.0, 2.0]), cell("goodput", 1, [1.0, 1.0])]
    assert rates(cells, whole=True) == {"off": [15.0, 20.0], "goodput": [20.0]}
