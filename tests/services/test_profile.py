"""The profile before the first request: every load and depth measured, nothing left behind, nothing learned of drafts."""

from __future__ import annotations

import pytest

from actors.policy import KeeperSettings, PolicyKeeper
from actors.store import open_state
from engine.engine import Engine
from engine.request import Request
from engine.sampling import SamplingParams
from policies import GoodputPolicy, Plan
from services.pilot import Pilot
from services.profile import PASSES, TIMES, depths, profile, sizes, warm_up
from tests.engine.toys import Oracle, run, texts, toy_base


@pytest.fixture(scope="module")
def base():
    return toy_base()


class Guesser(Oracle):
    """Drafts for anybody."""

    def __init__(self) -> None:
        super().__init__({}, 0.0)
        self.texts = Anything()


class Anything:
    def __getitem__(self, name):
        return [0] * 500


def test_loads_and_depths() -> None:
    assert sizes(1) == [1] and sizes(6) == [1, 2, 4, 6] and sizes(8) == [1, 2, 4, 8]
    assert depths(0) == [0] and depths(3) == [0, 1, 2, 3]


def test_a_profile_lets_the_first_plan_choose(base, tmp_path) -> None:
    keeper = PolicyKeeper(open_state(f"sqlite:///{tmp_path}/state.db"), settings=KeeperSettings(publish=0.0), timer=lambda: 0.0)
    pilot, drafter = Pilot("r", keeper.register("m")), Guesser()
    pilot.take(drafter)
    engine = Engine(base, drafter, pilot.budgets, pilot.prune, slots=2048, max_running=4)
    budgets, prune = engine.budgets, engine.prune
    profile(engine, pilot, seconds=60)
    assert (engine.budgets, engine.prune) == (budgets, prune) and not engine.busy and not engine.pool.blocks
    engine.check()
    report = pilot.report().validated()
    assert {(s.requests, s.depth) for s in report.steps} == {(n, d) for n in (1, 2, 4) for d in (0, 1, 2, 4, 8)}
    assert all(s.rehearsed for s in report.steps) and not report.survival and report.tokens == 0
    assert len(report.steps) == PASSES * TIMES * 3 * 5, "steps in which the machine settles are not told"
    plan = keeper.report(report)
    assert plan.knowledge.measured and {cell.key[0] for cell in plan.cost.off_cells if cell.count >= 3} == {1, 2, 4}
    assert not any(plan.cost.off_count(n) for n in (1, 2, 4)), "which is not measured in service"


def test_serving_is_as_without_it(base) -> None:
    requests = [Request(f"q{i}", [5, 6, 7 + i], SamplingParams(max_tokens=20, seed=i)) for i in range(3)]
    plain = texts(run(Engine(base, slots=1024), requests))
    pilot = Pilot("r", Plan.of(0, "m", GoodputPolicy()))
    engine = Engine(base, Guesser(), pilot.budgets, pilot.prune, slots=1024, max_running=4)
    profile(engine, pilot)
    assert texts(run(engine, requests)) == plain


def test_time_is_bounded(base) -> None:
    pilot = Pilot("r", Plan.of(0, "m", GoodputPolicy()))
    profile(Engine(base, Guesser(), pilot.budgets, slots=1024, max_running=512), pilot, seconds=0.0)
    assert not pilot.samples


def test_without_a_drafter_there_is_nothing_to_measure(base) -> None:
    pilot = Pilot("r", Plan.of(0, "m", GoodputPolicy()))
    profile(Engine(base, slots=1024), pilot)
    assert not pilot.samples


def test_warming_up_teaches_nothing(base) -> None:
    """Its prompts are of nobody, and repeat themselves: drafts of theirs would promise what no user's keep."""
    pilot, drafter = Pilot("r", Plan.of(0, "m", GoodputPolicy())), Guesser()
    pilot.take(drafter)
    engine = Engine(base, drafter, pilot.budgets, pilot.prune, slots=1024, max_running=4)
    warm_up(engine)
    report = pilot.report().validated()
    assert not engine.busy and not report.survival and not report.steps
    assert (engine.budgets, engine.prune) == (pilot.budgets, pilot.prune)
