"""The scaling law on hand-made telemetry: need, ease, sleep, and numbers that are old, missing, impossible or lies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.autoscaling import Heard, Memory, Observation, ScalingDecision, ScalingRule, Vitals, decide, listen
from policies.sharing import Claim, shared

RULE = ScalingRule(least=1, most=8, tpot=0.05, ttft=1.0, backlog=2.0, idle=60.0, stale=10.0, seats=16)
IDLE = dict(
    beat=1.0, ready=1, running=0, waiting=0, backlog=0, goodput=0, rate=0, depth=0, per_step=0, tpot=0, ttft=0, idle=100.0, stalled=0
)
CALM = IDLE | dict(running=8, goodput=1000.0, rate=600.0, depth=3.0, per_step=2.0, tpot=0.02, ttft=0.2, idle=0)
BUSY = CALM | dict(running=16, depth=0.0, per_step=1.0, tpot=0.04)
LATE = BUSY | dict(tpot=0.08)
FLOODED = BUSY | dict(waiting=20, backlog=5000)
SLOW_START = FLOODED | dict(ttft=1.6)


def fleet(*said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"r{i}": numbers for i, numbers in enumerate(said)}


def seen(*said: dict[str, Any], target: int | None = None, requests: float | None = None, **fields: Any) -> Observation:
    """Replicas that say this, and as many requests as they say."""
    claimed = sum(float(numbers["running"] + numbers["waiting"]) for numbers in said if {"running", "waiting"} <= set(numbers))
    names = tuple(f"r{i}" for i in range(len(said)))
    made = Observation(len(said) if target is None else target, names, claimed if requests is None else requests, 0.0, fleet(*said), 100.0)
    return replace(made, **fields)


def decided(observation: Observation, rule: ScalingRule = RULE) -> ScalingDecision:
    return decide(rule, observation, Memory())[0]


# -- up ---------------------------------------------------------------------------------------------------------------------


def test_while_drafting_pays_and_latency_holds_nothing_is_added_however_much_is_queued() -> None:
    queued = FLOODED | dict(depth=2.0, per_step=1.8)
    assert decided(seen(queued)) == ScalingDecision(1, "drafting to depth 2.0 still pays, and latency holds")


@pytest.mark.parametrize("off", [dict(depth=0.0), dict(depth=0.1, per_step=2.0), dict(depth=3.0, per_step=1.01)])
def test_when_drafting_is_off_or_yields_nothing_latency_asks_for_replicas(off: dict[str, float]) -> None:
    decision = decided(seen(LATE | off))
    assert decision.replicas == 2 and "0.080 s per token" in decision.reason


def test_a_slow_token_is_left_to_depth_while_that_pays_unless_it_is_far_too_slow() -> None:
    drafting = dict(depth=2.0, per_step=1.8)
    assert decided(seen(LATE | drafting | dict(tpot=0.06))).replicas == 1
    assert decided(seen(LATE | drafting | dict(tpot=0.09))).replicas == 2


def test_depth_cannot_help_those_who_wait_for_their_first_token() -> None:
    decision = decided(seen(SLOW_START | dict(depth=2.0, per_step=1.8)))
    assert decision.replicas == 2 and "depth 2.0 cannot help" in decision.reason


def test_queued_work_asks_for_as_many_as_would_do_it_in_time() -> None:
    assert decided(seen(FLOODED, FLOODED, FLOODED, FLOODED)).replicas == 8  # 5 s each, target 2
    assert decided(seen(*[FLOODED | dict(backlog=2500)] * 4)).replicas == 5  # 2.5 s each
    assert decided(seen(*[FLOODED | dict(backlog=1900)] * 4)).replicas == 4
    assert decided(seen(*[FLOODED | dict(backlog=10**6)] * 2)).replicas == 4  # no more than twice as many at once
    assert decided(seen(*[FLOODED] * 6)).replicas == RULE.most


def test_replicas_on_their_way_are_not_asked_for_again() -> None:
    loading = IDLE | dict(ready=0)
    assert decided(seen(FLOODED, loading)).replicas == 2
    assert decided(seen(FLOODED, target=2)).replicas == 2


def test_a_request_that_has_a_replica_for_itself_cannot_be_helped() -> None:
    alone = LATE | dict(running=1, tpot=5.0, ttft=9.0)
    assert decided(seen(alone)).replicas == 1
    assert decided(seen(alone, alone)).replicas == 2


def test_a_first_token_that_was_late_once_is_history_when_nothing_is_queued() -> None:
    assert decided(seen(BUSY | dict(ttft=9.0))).replicas == 1


# -- down -------------------------------------------------------------------------------------------------------------------


def test_one_goes_when_the_others_carry_the_load_with_a_margin() -> None:
    light = CALM | dict(running=4, tpot=0.02)
    assert decided(seen(light, light, light)) == ScalingDecision(2, "2 would carry the load")
    assert decided(seen(light | dict(running=10), light | dict(running=10))).replicas == 2  # 20 requests, 16 seats
    assert decided(seen(light | dict(tpot=0.03), light | dict(tpot=0.03))).replicas == 2  # might be 0.06 s per token on one
    assert decided(seen(*[light | dict(backlog=800, waiting=1)] * 2)).replicas == 2
    assert decided(seen(*[IDLE] * 8)).replicas == 7


def test_up_and_down_do_not_meet() -> None:
    """What is just enough for n is not too much for n: no load asks for a replica and gives it back at once."""
    for requests in range(1, 120):
        for count in range(1, 8):
            each = requests / count
            now = CALM | dict(running=min(each, 16), waiting=max(0, each - 16), tpot=0.005 * min(each, 16), depth=0, per_step=1)
            now |= dict(backlog=max(0, each - 16) * 200)
            grown = decided(seen(*[now] * count))
            if grown.replicas > count:
                each = requests / grown.replicas
                then = now | dict(running=min(each, 16), waiting=max(0, each - 16), tpot=0.005 * min(each, 16))
                then |= dict(backlog=max(0, each - 16) * 200)
                assert decided(seen(*[then] * grown.replicas)).replicas >= grown.replicas


def test_none_goes_while_a_target_is_missed_though_there_may_be_no_more() -> None:
    slow = CALM | dict(running=2, waiting=1, backlog=100, goodput=5000.0, rate=2250.0, depth=0.0, per_step=1.0, ttft=1.6)
    assert decided(seen(*[slow] * 4), replace(RULE, most=4)) == ScalingDecision(4, "1.60 s to the first token, target 1 s; drafting is off")


def test_first_tokens_too_are_to_come_in_time_with_a_margin() -> None:
    some = CALM | dict(running=2, waiting=1, backlog=100, rate=100.0, depth=0.0, per_step=1.0)
    assert decided(seen(*[some | dict(ttft=0.6)] * 4)).replicas == 4  # might be 0.8 s on three
    assert decided(seen(*[some | dict(ttft=0.5)] * 4)).replicas == 3
    assert decided(seen(*[some | dict(ttft=0.6, waiting=0, backlog=0)] * 4)).replicas == 3  # they do not wait for one another


def test_what_a_replica_did_when_it_had_too_much_is_remembered_for_an_hour() -> None:
    _, memory = decide(RULE, seen(FLOODED), Memory())
    assert memory.capacity == 1000.0
    light = CALM | dict(beat=2.0, running=4, goodput=600.0, tpot=0.015, rate=500.0)
    two = seen(light, light)
    assert decide(RULE, two, memory)[0].replicas == 2 and decide(RULE, two, Memory())[0].replicas == 1
    assert decide(RULE, seen(light | dict(rate=300.0), light | dict(rate=300.0)), memory)[0].replicas == 1
    assert decide(RULE, replace(two, now=3800.0), memory)[0].replicas == 1
    _, faster = decide(RULE, seen(light | dict(goodput=2000.0)), memory)
    assert faster.capacity == 2000.0 and decide(RULE, two, faster)[0].replicas == 1


def test_none_goes_below_the_least() -> None:
    assert decided(seen(IDLE, IDLE), replace(RULE, least=2)).replicas == 2
    assert decided(seen(IDLE), RULE).replicas == 1


# -- sleep ------------------------------------------------------------------------------------------------------------------

SLEEPY = replace(RULE, least=0)


def test_the_last_one_goes_when_nobody_asked_for_long() -> None:
    assert decided(seen(IDLE), SLEEPY) == ScalingDecision(0, "nobody asked for 60 s")
    assert decided(seen(IDLE | dict(idle=59.0)), SLEEPY).replicas == 1
    assert decided(seen(IDLE, IDLE), SLEEPY).replicas == 1  # one after the other
    assert decided(seen(CALM), SLEEPY).replicas == 1


@pytest.mark.parametrize("asked", [dict(queued=1.0), dict(requests=1.0)])
def test_the_last_one_stays_when_those_who_send_know_of_a_request(asked: dict[str, float]) -> None:
    assert decided(seen(IDLE, **asked), SLEEPY).replicas == 1


def test_one_that_loads_or_is_silent_is_not_idle() -> None:
    assert decided(seen(IDLE | dict(ready=0)), SLEEPY).replicas == 1
    assert decided(seen({}), SLEEPY).replicas == 1


def test_it_wakes_when_somebody_asks() -> None:
    asleep = Observation(0, (), 0.0, 0.0, {}, 5.0)
    assert decided(asleep, SLEEPY) == ScalingDecision(0, "asleep")
    assert decided(replace(asleep, requests=1.0), SLEEPY).replicas == 1
    assert decided(replace(asleep, queued=3.0), SLEEPY).replicas == 1
    assert decided(replace(asleep, target=2), SLEEPY).replicas == 2  # on their way


# -- numbers that cannot be relied on ---------------------------------------------------------------------------------------


def test_numbers_that_stand_still_grow_stale() -> None:
    observation = seen(IDLE, IDLE)
    moved = replace(observation, now=111.0, said=fleet(IDLE | dict(beat=2.0), IDLE | dict(beat=0.5)))  # clocks may start anew
    memory, counts = Memory(), []
    for now in (observation, replace(observation, now=109.0), replace(observation, now=111.0), moved):
        decision, memory = decide(RULE, now, memory)
        counts.append(decision.replicas)
    assert counts == [1, 1, 2, 1]


def test_one_silent_replica_keeps_all_but_does_not_keep_others_from_growing() -> None:
    assert decided(seen(IDLE, IDLE, {})).replicas == 3
    assert decided(seen(FLOODED, FLOODED, {})).replicas == 4


def test_a_replica_that_is_stuck_in_a_step_is_not_believed() -> None:
    assert decided(seen(IDLE, IDLE | dict(stalled=30.0))).replicas == 2


@pytest.mark.parametrize("field", sorted(IDLE))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, None, "7", [1]])
def test_what_cannot_be_true_is_as_good_as_silence(field: str, value: Any) -> None:
    said = {**IDLE, field: value}
    assert Vitals.of(said) is None
    assert decided(seen(IDLE, IDLE, IDLE, requests=0.0, said=fleet(IDLE, IDLE, said))).replicas == 3


def test_a_number_that_is_missing_is_as_good_as_silence() -> None:
    for field in IDLE:
        assert Vitals.of({k: v for k, v in IDLE.items() if k != field}) is None


def test_vitals_survive_as_plain_numbers() -> None:
    vitals = Vitals.of(SLOW_START)
    assert vitals is not None and Vitals.of(vitals.numbers()) == vitals


@pytest.mark.parametrize("lie", [dict(backlog=1e12), dict(waiting=1e12), dict(ttft=1e9), dict(tpot=1e9), dict(goodput=1e-9)])
def test_one_that_cries_wolf_is_outvoted(lie: dict[str, float]) -> None:
    calm = BUSY | dict(running=14)
    assert decided(seen(calm, calm, calm | lie, requests=42)).replicas == 3


@pytest.mark.parametrize("others", [0, 1, 2, 7])
@pytest.mark.parametrize("lie", [dict(waiting=50, ttft=100.0), dict(running=16, tpot=9.0), dict(waiting=1e12, ttft=1e9, backlog=1e12)])
def test_one_that_cries_wolf_while_nobody_asks_is_not_believed(lie: dict[str, float], others: int) -> None:
    assert decided(seen(BUSY | lie, *[IDLE] * others, requests=0.0)).replicas <= others + 1


@pytest.mark.parametrize("lie", [IDLE, FLOODED | dict(backlog=0, waiting=0), FLOODED | dict(goodput=1e12), FLOODED | dict(ttft=0)])
def test_one_that_says_all_is_well_is_outvoted(lie: dict[str, float]) -> None:
    assert decided(seen(FLOODED, FLOODED, FLOODED, lie | dict(beat=7.0), requests=140)).replicas > 4


def test_a_lone_replica_is_believed_as_far_as_requests_were_sent() -> None:
    wolf = BUSY | dict(backlog=1e12)
    assert decided(seen(wolf, requests=0.0)).replicas == 1
    assert decided(seen(wolf, requests=16.0)).replicas == 2  # and never more than twice as many at once
    lazy = IDLE | dict(beat=3.0)
    assert decided(seen(lazy, lazy, requests=40.0)).replicas == 2  # they say idle, those who send know better


def test_absurd_counts_of_requests_are_no_requests() -> None:
    for requests in (math.nan, math.inf, -5.0):
        assert decided(seen(IDLE, requests=requests), SLEEPY).replicas == 0
        assert decided(Observation(0, (), requests, requests, {}, 0.0), SLEEPY).replicas == 0


numbers = st.one_of(st.floats(), st.integers(-(10**15), 10**15), st.none(), st.sampled_from([0.0, 1.0]))
reports = st.dictionaries(st.sampled_from(sorted(IDLE)), numbers) | st.fixed_dictionaries({name: st.floats(0, 1e13) for name in IDLE})


@given(st.lists(reports, max_size=5), st.integers(-3, 30), st.floats(), st.floats(), st.integers(0, 2), st.integers(2, 9))
def test_whatever_is_said_the_answer_is_within_bounds_and_reason(
    said: list[dict[str, Any]], target: int, requests: float, queued: float, least: int, most: int
) -> None:
    rule = replace(RULE, least=least, most=most)
    observation = Observation(target, tuple(f"r{i}" for i in range(len(said))), requests, queued, fleet(*said), 50.0)
    decision = decided(observation, rule)
    start = rule.within(target)
    assert least <= decision.replicas <= most and isinstance(decision.replicas, int) and decision.reason
    assert decision.replicas >= start - 1 and decision.replicas <= max(start, 2 * len(said), 1)
    if any(Vitals.of(numbers) is None for numbers in said):
        assert decision.replicas >= start
    assert decided(observation, rule) == decision


def test_of_replicas_that_left_nothing_is_kept() -> None:
    heard = {"gone": Heard(Vitals.of(IDLE), 1.0)}  # type: ignore[arg-type]
    assert set(listen(heard, seen(IDLE))) == {"r0"}


# -- shared GPUs ------------------------------------------------------------------------------------------------------------


def claim(model: str, wanted: int, held: int = 0, least: int = 0, gpus: float = 1.0, weight: float = 1.0) -> Claim:
    return Claim(model, wanted, held, least, gpus, weight)


def test_everybody_gets_what_they_want_while_it_lasts() -> None:
    assert shared([claim("a", 2), claim("b", 3), claim("c", 0)], 8) == {"a": 2, "b": 3, "c": 0}


def test_scarce_gpus_go_by_need_and_weight() -> None:
    assert shared([claim("a", 6), claim("b", 2)], 4) == {"a": 3, "b": 1}
    assert shared([claim("a", 4), claim("b", 4, weight=3.0)], 4) == {"a": 1, "b": 3}
    assert shared([claim("a", 9), claim("b", 1, least=1)], 4) == {"a": 3, "b": 1}
    assert shared([claim("a", 1, gpus=4.0), claim("b", 3)], 4) == {"a": 0, "b": 3}  # too large for what is left
    assert shared([claim("a", 2), claim("b", 2)], 3) == shared([claim("b", 2), claim("a", 2)], 3) == {"a": 2, "b": 1}


def test_a_replica_is_not_taken_for_a_little_more_need() -> None:
    held = [claim("a", 4, held=2), claim("b", 5, held=2)]
    assert shared(held, 4) == {"a": 2, "b": 2}
    assert shared([claim("a", 4, held=2), claim("b", 16, held=2)], 4)["a"] == 1


def test_who_grows_waits_until_the_others_have_let_go() -> None:
    assert shared([claim("a", 1, held=4), claim("b", 3, held=0)], 4) == {"a": 1, "b": 0}
    assert shared([claim("a", 1, held=1), claim("b", 3, held=0)], 4) == {"a": 1, "b": 3}


def test_a_model_that_was_woken_over_the_number_is_paid_for_by_the_largest_holder() -> None:
    assert shared([claim("a", 4, held=4), claim("b", 1, held=1)], 4) == {"a": 3, "b": 1}


def test_nobody_starves_beside_a_much_larger_need() -> None:
    assert shared([claim("a", 100, weight=50.0), claim("b", 1), claim("c", 1)], 4) == {"a": 2, "b": 1, "c": 1}
    assert shared([claim("a", 3, held=1), claim("b", 3, held=1), claim("c", 3)], 2) == {"a": 1, "b": 1, "c": 0}


claims = st.lists(
    st.builds(
        Claim,
        st.text("abcdefgh", min_size=1, max_size=3),
        st.integers(0, 9),
        st.integers(0, 6),
        st.integers(0, 2),
        st.sampled_from([0.25, 0.5, 1.0, 2.0]),
        st.floats(0.01, 1000),
    ),
    max_size=5,
    unique_by=lambda c: c.model,
)


@given(claims, st.floats(0, 16))
def test_shares_never_add_up_to_more_than_there_is(made: list[Claim], gpus: float) -> None:
    for _ in range(30):
        held = sum(c.held * c.gpus for c in made)
        granted = shared(made, gpus)
        assert sum(granted[c.model] * c.gpus for c in made) <= max(gpus, held) + 1e-6
        assert all(0 <= granted[c.model] <= max(c.wanted, c.least, 0) for c in made)
        assert shared(list(reversed(made)), gpus) == granted
        settled = [replace(c, held=granted[c.model]) for c in made]
        if settled == made:
            break
        made = settled
    else:
        pytest.fail("they never settle")
    assert sum(c.held * c.gpus for c in made) <= gpus + 1e-6
