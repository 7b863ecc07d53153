"""Numbers of `specfleet bench` from exchanges made by hand, whose chunks come at unequal gaps."""

from __future__ import annotations

import json

from services.cli.bench_summary import summaries
from services.cli.load_loops import Load
from services.cli.load_outcome import outcome
from services.cli.load_stream import Exchange
from services.cli.measurement import Cell


def exchange(index: int, due: float, end: float, *chunks: tuple[float, int]) -> Exchange:
    """An answer whose server counts along. chunks: when each came, and the tokens until then."""
    last = len(chunks) - 1
    events = [
        {"choices": [{"text": "x", "finish_reason": "stop" if i == last else None}], "usage": {"completion_tokens": tokens}}
        for i, (_, tokens) in enumerate(chunks)
    ]
    reads = tuple((at, f"data: {json.dumps(event)}\n\n".encode()) for (at, _), event in zip(chunks, events, strict=True))
    return Exchange(index, due, due + 0.01, end, 200, reads)


AUTO = (
    exchange(0, 0.0, 3.5, (1.0, 1), (1.2, 2), (2.2, 6), (2.3, 7)),  # gaps 0.2, 1.0 for four tokens, 0.1; 7 tokens in 3.5 s
    exchange(1, 1.0, 3.0, (1.5, 1), (1.9, 3)),  # 0.4 for two tokens; 3 tokens in 2 s
    exchange(2, 0.0, 0.8, (0.5, 1), (0.8, 2)),  # 0.3; 2 tokens in 0.8 s
)
OFF = (exchange(0, 0.0, 5.0, (1.0, 1), (2.0, 4)), exchange(1, 0.0, 6.0, (3.0, 1), (4.0, 3)))  # 0.8 and 0.5 tokens per second


def cell(mode: str, number: int, seconds: float, *exchanges: Exchange) -> Cell:
    return Cell("m", Load(users=3), mode, number, seconds, 0.1, tuple(map(outcome, exchanges)))


def test_gaps_between_tokens_count_once_for_each_token() -> None:
    (found,) = summaries([cell("auto", 1, 4.0, *AUTO)])
    # of the nine tokens after the first ones: one at 0.1, three at 0.2, four at 0.25, one at 0.3
    assert found.token_gap_ms == {"p50": 250.0, "p90": 300.0, "p99": 300.0}
    assert found.chunk_gap_ms == {"p50": 300.0, "p90": 1000.0, "p99": 1000.0}
    assert found.first_ms == {"p50": 500.0, "p90": 1000.0, "p99": 1000.0}
    assert found.total_ms == {"p50": 2000.0, "p90": 3500.0, "p99": 3500.0}
    assert found.tokens_counted_by == "usage"


def test_percentiles_are_over_the_requests_of_all_rounds() -> None:
    (found,) = summaries([cell("auto", 1, 4.0, *AUTO[:2]), cell("auto", 2, 4.0, *AUTO[2:])])
    assert found.token_gap_ms == {"p50": 250.0, "p90": 300.0, "p99": 300.0} and found.requests == 3


def test_speed_per_user_is_the_median_of_answers_from_when_they_were_due() -> None:
    off, auto = summaries([cell("off", 1, 10.0, *OFF), cell("auto", 1, 4.0, *AUTO)])
    assert auto.tokens_per_second_per_user == 2.0  # of 2.0, 1.5 and 2.5
    assert off.tokens_per_second_per_user == 0.65 and auto.per_user_against_off == round(2.0 / 0.65, 3)
    assert (auto.tokens_per_second, off.tokens_per_second) == (3.0, 0.7) and auto.against_off == round(3.0 / 0.7, 3)
    assert auto.requests_per_second == 0.75


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [cell("off", 1, 10.0, *OFF), cell("auto", 1, 4.0, *AUTO), cell("off", 2, 5.0, *OFF[:1]), cell("auto", 2, 8.0, *AUTO)]
    _, auto = summaries(rounds)
    # over off: 3.0 over 0.7 and 1.5 over 0.8; for a user 2.0 over 0.65 and 2.0 over 0.8
    assert auto.against_off == round((3.0 / 0.7 + 1.5 / 0.8) / 2, 3) and auto.against_off_least == 1.875
    assert auto.per_user_against_off == round((2.0 / 0.65 + 2.0 / 0.8) / 2, 3)
