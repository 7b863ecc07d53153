"""The simulator: its costs and traffic are what they say, and the policy code runs in it as in service."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.policy import PolicyKeeper
from benchmarks import simulator
from benchmarks.simulation.costs import DEVICES, SHAPES, Measured, Roofline, along, costs, profiled
from benchmarks.simulation.fleet import Fleet, Job, MemoryState, capacity, curves, simulate
from benchmarks.simulation.flyers import Drafts, Oracle, Piloted, Step, flat, foreseen
from benchmarks.simulation.picture import draw
from benchmarks.simulation.replica import Replica, Room, band
from benchmarks.simulation.traffic import CODE, MIXES, PROSE, Day, Text, arrivals, drawn, made, texts
from engine.engine import Load, StepReport
from policies import Limits
from services.pilot import Pilot

ROOFLINE = Roofline(SHAPES["llama-2-7b"], DEVICES["h200"], "test")
HERE = Path(__file__).resolve()


# -- costs ------------------------------------------------------------------------------------------------------------------


def test_a_roofline_reads_the_weights_once_and_then_pays_for_rows() -> None:
    one, many, most = (float(ROOFLINE.forward(1, np.array(rows), 0)) for rows in (1, 64, 1024))
    assert one == many < most
    assert one == pytest.approx(5.1e-4 + 2 * 6.74e9 / (0.8 * 4.8e12))
    assert most == pytest.approx(5.1e-4 + 2 * 6.74e9 * 1024 / (0.6 * 989e12))
    assert float(ROOFLINE.forward(1, np.array(1), 10_000)) > one and float(ROOFLINE.draft(np.array(0), 3)) == 0.0
    assert float(ROOFLINE.draft(np.array(4), 3)) == pytest.approx(3 * float(ROOFLINE.draft(np.array(4), 1)))


def step(batch: int, prompt: int, depth: int, seconds: float) -> dict[str, Any]:
    rows = batch * (1 + depth)
    return {
        "model": "llama-2-7b",
        "batch": batch,
        "prompt": prompt,
        "depth": depth,
        "candidates": 1,
        "rows": rows,
        "step_ms": 1e3 * seconds,
    }


def gpu(folder: Path, **facts: Any) -> Path:
    """Results as benchmarks/gpu.py writes them: 4 ms, 10 us a row from 32 rows on, 10 ns a token of context."""
    grid = [(b, p, d) for b in (1, 8, 32, 128) for p in (64, 2048) for d in (0, 3)]
    points = [step(b, p, d, 4e-3 + 1e-5 * max(0, b * (1 + d) - 32) + 1e-8 * b * (p - 64)) for b, p, d in grid]
    drafts = [
        {"model": "llama-2-7b", "drafting": True, "batch": b, "depth": d, "candidates": 1, "draft_ms": 0.1 * d}
        for b in (1, 64)
        for d in (1, 2, 3)
    ]
    (folder / "gpu-step.json").write_text(json.dumps({"device": "a GPU", "tiny": False, "results": [*points, *drafts], **facts}))
    return folder


def test_measured_curves_are_used_where_they_are(tmp_path: Path) -> None:
    known = costs("llama-2-7b", "h200", gpu(tmp_path))
    assert isinstance(known, Measured) and known.source == "measured on a GPU (gpu-step.json)" and known.depth == 3
    host = known.host + 8 * known.per_request
    assert float(known.forward(8, np.array(32), 8 * 64)) == pytest.approx(4e-3 + host, rel=0.02)
    assert float(known.forward(8, np.array(512), 0)) == pytest.approx(4e-3 + 480e-5 + host, rel=0.02)
    assert float(known.forward(8, np.array(32), 100_000)) == pytest.approx(5e-3 + host, rel=0.03), "context is paid for"
    assert float(known.draft(np.array(20), 2)) == pytest.approx(2e-4)


@pytest.mark.parametrize("facts", [{"tiny": True}, {"results": []}])
def test_a_roofline_stands_in_and_says_so(tmp_path: Path, facts: dict[str, Any]) -> None:
    assert "roofline of the h200 data sheet" in costs("llama-2-7b", "h200", gpu(tmp_path, **facts)).source
    assert "roofline" in costs("granite-20b-code", "h200", gpu(tmp_path)).source, "only the 7B was measured"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: 'x' is not known; known are llama-2-7b"):
        costs("x", "h200", tmp_path)
    with pytest.raises(ValueError, match="device: 'tpu' is not known; known are a100"):
        costs("llama-2-7b", "tpu", tmp_path)
    with pytest.raises(ValueError, match="model: 'x' was not measured"):
        profiled("x", tmp_path)


def test_the_cpu_curves_are_those_that_were_measured() -> None:
    folder = HERE.parents[2] / "benchmarks" / "results"
    cell = next(c for c in json.loads((folder / "step-profile.json").read_text())["cells"] if c["requests"] == 32 and c["depth"] == 0)
    known = profiled(cell["model"], folder)
    assert float(known.forward(32, np.array(32), 0)) == pytest.approx(cell["step_us"] / 1e6, rel=0.25)
    assert "step-profile.json" in known.source


def test_lines_go_on_at_their_last_slope() -> None:
    assert along((1, 2, 4), (1.0, 1.0, 3.0), np.array([0, 3, 6])).tolist() == [1.0, 2.0, 5.0]


# -- traffic ----------------------------------------------------------------------------------------------------------------


def test_arrivals_follow_the_day() -> None:
    day = Day(100.0, (0.6,))
    times = arrivals(day, 200.0, np.random.default_rng(0))
    night, noon = ((times >= a) & (times < b) for a, b in ((0, 5), (47, 52)))
    assert 8 * night.sum() < noon.sum() and noon.sum() == pytest.approx(1000, rel=0.15)
    assert float(day.load(np.array([61.0]))[0]) > float(day.load(np.array([63.0]))[0]), "a burst"


def test_traffic_is_the_same_for_every_policy_and_differs_by_replica() -> None:
    day = Day.of(20.0, 0)
    mine, again, other = (list(texts("r", MIXES["llama-2-7b"], day, 20.0, 3, (0, 1, n))) for n in (1, 1, 2))
    assert [(t.arrival, t.answer, t.kept, t.sure) for t in mine] == [(t.arrival, t.answer, t.kept, t.sure) for t in again]
    assert [t.arrival for t in mine] != [t.arrival for t in other]
    assert all(len(t.kept) == len(t.sure) == t.answer and all(0 <= k <= 3 for k in t.kept) for t in mine)


def test_code_keeps_more_than_prose_and_confidence_tells_which() -> None:
    random = np.random.default_rng(0)
    kept = {c.name: [k for *_, kept, _ in drawn([c] * 200, 4, random) for k in kept] for c in (CODE, PROSE)}
    assert np.mean(kept["code"]) > 1.5 * np.mean(kept["prose"])
    pairs = [(sure[0], k > 0) for *_, kept, sures in drawn([PROSE] * 200, 4, random) for k, sure in zip(kept, sures, strict=True)]
    high, low = ([kept for sure, kept in pairs if test(sure)] for test in (lambda s: s > 0.8, lambda s: s < 0.3))
    assert np.mean(high) > np.mean(low) + 0.3


# -- steps ------------------------------------------------------------------------------------------------------------------


def text(name: str, kept: list[int], prompt: int = 8, arrival: float = 0.0) -> Text:
    return made(name, arrival, 0.5, CODE, prompt, len(kept), kept, [[0.9] * 3 for _ in kept])


class Deep:
    """Everybody drafts that deep, as far as there is text."""

    def __init__(self, depth: int) -> None:
        self.depth, self.reports = depth, list[StepReport]()

    def drafts(self, step: Step) -> Drafts:
        nodes = [min(self.depth, t.remaining - 1) for t in step.decoding]
        return Drafts(nodes, sum(n > 0 for n in nodes), max(nodes, default=0))

    def observe(self, report: StepReport) -> None:
        self.reports.append(report)


def test_a_request_is_read_then_decoded_by_what_its_drafts_keep() -> None:
    """Of a prompt of 32, 8 are not cached: two chunks of 5 and the first token; then a draft of 3 keeps 2, and one of 2 both."""
    flyer = Deep(3)
    replica = Replica(iter([text("a", [9, 2, 9, 9, 3, 9, 9], prompt=32)]), ROOFLINE, flyer, Room(4, 5), (0,))
    replica.until(10.0)
    assert [(r.prefill, r.rows, r.emitted) for r in flyer.reports] == [(5, 5, 0), (3, 3, 1), (0, 4, 3), (0, 3, 3)]
    draft, last = (r.verified[0] for r in flyer.reports[2:])
    assert [kept for _, _, kept in draft.nodes] == [True, True, False] and (draft.depth, draft.accepted) == (3, 2)
    assert [kept for _, _, kept in last.nodes] == [True, True], "of a text that ended only what was kept is told"
    assert replica.over and replica.context == 0 and replica.found.tokens == 7 and len(replica.found.done) == 1


def test_requests_wait_for_a_place() -> None:
    flyer = Deep(0)
    replica = Replica(iter([text(f"r{i}", [0] * 4) for i in range(5)]), ROOFLINE, flyer, Room(2, 512), (0,))
    replica.until(10.0)
    assert max(r.load.running for r in flyer.reports) == 2 and max(r.load.waiting for r in flyer.reports) == 3
    assert len(replica.found.done) == 5 and replica.found.tokens == 20


def test_a_clock_without_requests_goes_to_the_next_one() -> None:
    replica = Replica(iter([text("late", [0, 0], arrival=3.0)]), ROOFLINE, Deep(0), Room(), (0,))
    replica.until(2.0)
    assert replica.now == 2.0 and replica.found.steps == 0 and not replica.over
    replica.until(5.0)
    assert replica.over and replica.found.done[0][3] < 0.1, "time to the first token counts from its arrival"


def situation(runs: list[int], context: int = 0) -> Step:
    some = [replace_at(text(f"r{i}", [run] * 9)) for i, run in enumerate(runs)]
    return Step(Load(len(runs), 0, context, 1 << 20, len(runs)), len(runs), some, 0, 0)


def replace_at(found: Text) -> Text:
    found.unread, found.at = 0, 1
    return found


def test_the_oracle_drafts_exactly_what_will_be_kept_while_rows_are_free() -> None:
    worth, drafts = foreseen(ROOFLINE, situation([0, 3, 1, 2]))
    assert list(drafts.nodes) == [0, 3, 1, 2] and worth.tokens == 10 and drafts.depth == 3 and drafts.drafting == 3


def test_the_oracle_is_never_worse_than_any_depth_and_off_when_nothing_is_kept() -> None:
    random = np.random.default_rng(1)
    for count in (1, 7, 60, 300):
        now = situation(random.integers(0, 4, count).tolist(), 100 * count)
        assert foreseen(ROOFLINE, now)[0].rate >= max(flat(ROOFLINE, now, depth).rate for depth in range(4)) - 1e-9
    assert list(Oracle(ROOFLINE).drafts(situation([0, 0])).nodes) == [0, 0]


def test_steps_are_told_by_powers_of_two() -> None:
    assert [band(n) for n in (1, 2, 3, 4, 7, 8, 127, 128)] == [1, 2, 2, 4, 4, 8, 64, 128]


# -- fleets -----------------------------------------------------------------------------------------------------------------

JOB = Job("llama-2-7b", "goodput", {"kind": "goodput"}, (0, 1), 3.0, "h200", HERE.parent, panel=(0,), compare=True)


@pytest.fixture(scope="module")
def flown() -> dict[str, dict[str, Any]]:
    """A short day of two replicas under some policies, on one traffic."""
    policies: dict[str, dict[str, Any] | None] = {
        "goodput": {"kind": "goodput"},
        "off": {"kind": "off"},
        "fixed3": {"kind": "fixed", "depth": 3},
        "oracle": None,
    }
    return {arm: simulate(replace(JOB, arm=arm, policy=policy, compare=arm == "goodput")) for arm, policy in policies.items()}


def test_every_policy_answers_the_same_requests_with_the_same_tokens(flown: dict[str, dict[str, Any]]) -> None:
    assert len({(r["requests"], r["tokens"], r["unanswered"]) for r in flown.values()}) == 1
    assert flown["goodput"]["requests"] > 200 and flown["goodput"]["unanswered"] == 0
    assert flown["off"]["drafted_per_token"] == 0 < flown["fixed3"]["drafted_per_token"]
    assert 0 < flown["goodput"]["panel"]["requests"] < flown["goodput"]["requests"]


def test_the_policy_learns_to_draft_and_the_oracle_is_the_fastest(flown: dict[str, dict[str, Any]]) -> None:
    middle = {arm: result["token_ms"]["p50"] for arm, result in flown.items()}
    assert middle["oracle"] < middle["goodput"] < 0.9 * middle["off"]
    for rates in flown["goodput"]["alternatives_while_new"].values():
        assert rates["oracle"]["tokens_per_second"] >= rates["itself"]["tokens_per_second"]
        assert rates["oracle"]["tokens_per_second"] >= max(r["tokens_per_second"] for r in rates.values()) - 0.01


def test_the_pilot_is_asked_as_the_engine_asks_it() -> None:
    """No draft goes beyond the end of a text, and a request with one token left is not asked about."""
    plan = PolicyKeeper(MemoryState()).register("m", {"kind": "fixed", "depth": 3}, Limits(3, 1))
    now = situation([3, 3, 3])
    now.decoding[0].at, now.decoding[1].at = 8, 7
    assert Piloted(Pilot("r", plan)).drafts(now) == Drafts([0, 1, 3], 2, 3)


def test_what_a_replica_notes_in_a_plan_is_its_own() -> None:
    fleet = Fleet(replace(JOB, compare=False))
    fleet.now = 0.25
    for replica in fleet.replicas:
        replica.until(fleet.now)
    fleet.exchange()
    first, second = (pilot.plan for pilot in fleet.pilots)
    assert first == second and first.version > 0 and first.knowledge.memo is not second.knowledge.memo


def test_a_seed_gives_the_same_day_again_however_long_deciding_takes_here(flown: dict[str, dict[str, Any]]) -> None:
    again = simulate(JOB)
    real = ("took_seconds", "keeper_share_of_a_core", "deciding_us_of_a_step")
    assert {k: v for k, v in again.items() if k not in real} == {k: v for k, v in flown["goodput"].items() if k not in real}
    assert again["deciding_us_of_a_step"] > 0


def test_the_load_is_that_which_a_fleet_without_speculation_can_just_carry() -> None:
    known = curves("llama-2-7b", "h200", HERE.parent)
    assert 20 < capacity(known, Room(), "llama-2-7b") < 500
    assert capacity(known, Room(8), "llama-2-7b") < capacity(known, Room(), "llama-2-7b")


def test_jobs_share_traffic_and_days(tmp_path: Path) -> None:
    jobs = simulator.planned("llama-2-7b", "h200", tmp_path, 1000, 10, 2, Room(), 0)
    assert [job.arm for job in jobs] == ["goodput", "off", "fixed1", "fixed2", "fixed3", "threshold", "oracle"]
    assert len({job.day for job in jobs}) == 1 and [len(job.replicas) for job in jobs] == [10, *[2] * 6]
    assert all(job.compare == (job.arm == "goodput") for job in jobs) and jobs[0].policy == {"kind": "goodput"}


def test_a_run_is_summed_up_and_drawn(flown: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    results = json.loads(json.dumps(list(flown.values())))
    results[0]["alternatives"] = results[0]["alternatives_while_new"]
    few, *_ = bands = results[0]["alternatives"]
    for number in bands:
        bands[number]["itself"]["steps"] = simulator.FEW - (number == few)
    found = simulator.summary(results)
    assert few not in found["by_model"]["llama-2-7b"]["by_running"]
    assert found["requests_through_policy_code"] == 3 * flown["off"]["requests"] and found["replicas"] == 2
    (standing,) = found["by_model"].values()
    assert standing["mean_regret_against_oracle"] > standing["mean_regret"] and "roofline" in standing["costs"]
    draw(results, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_beside_a_prompt_a_token_is_worth_what_it_takes_in_pure_decoding() -> None:
    """At 100 tokens a second of pure decoding 10 tokens more are worth 0.1 s more, and for 0.2 s more they cost 0.1 s of 1.2."""
    pure = {"4": {arm: {"tokens_per_second": rate, "seconds": 1.0} for arm, rate in (("off", 50.0), ("fixed1", 100.0), ("itself", 100.0))}}

    def loss(seconds: float) -> float | None:
        own = {"tokens_per_second": 20.0 / seconds, "seconds": seconds}
        return simulator.priced({"8": {"off": {"tokens_per_second": 10.0, "seconds": 1.0}, "itself": own}}, pure)

    assert loss(1.1) == pytest.approx(0.0, abs=1e-3) and loss(1.2) == pytest.approx(0.1 / 1.2, abs=1e-3)
    assert simulator.priced({}, pure) is None


def test_the_script_says_how_it_is_run() -> None:
    assert "python benchmarks/simulator.py --out benchmarks/results/" in str(simulator.__doc__)
