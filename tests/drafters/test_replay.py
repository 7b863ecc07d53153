"""The replay buffer: its budget, its sample of older traces, its held-out split, and what of it survives."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafters.replay import BufferSettings, ReplayBuffer, Reservoir, framed
from drafters.traces import InvalidTrace
from tests.drafters.traced import VOCAB, WIDTH, make_trace, many

ONE = make_trace().nbytes


def buffer(traces: int = 100, **changes: object) -> ReplayBuffer:
    """A buffer with room for so many traces of twenty tokens."""
    settings = BufferSettings(budget=traces * ONE, held_out=0.1)
    return ReplayBuffer("toy", VOCAB, WIDTH, replace(settings, **changes))  # type: ignore[arg-type]


def test_requests_are_held_out_whole_and_for_good() -> None:
    one, other = buffer(10_000), buffer(50, recent=0.2)
    for trace in many(600, 3):
        one.add(trace)
        other.add(trace)
    held = {trace.request for trace in one.held_out("")}
    assert 35 <= len(held) <= 85
    assert held == {f"r-{i}-0" for i in range(600) if other.is_held_out(f"r-{i}")}
    assert held.isdisjoint(trace.request for trace in one.training(""))
    assert len(held) + len(one.training("")) == 600
    assert {trace.request for trace in other.held_out("")} <= held
    assert held != {f"r-{i}-0" for i in range(600) if buffer(seed=1).is_held_out(f"r-{i}")}


def test_half_of_the_held_out_requests_judge_what_the_other_half_chose() -> None:
    one = buffer(10_000, held_out=0.5)
    for trace in many(400, 3):
        one.add(trace)
    choosing, judging = ({trace.request for trace in part("")} for part in (one.choosing, one.judging))
    assert choosing.isdisjoint(judging) and choosing | judging == {trace.request for trace in one.held_out("")}
    assert 70 <= len(choosing) <= 130 and 70 <= len(judging) <= 130


def test_answers_that_tell_no_speculators_apart_are_not_measured_on() -> None:
    """Of two tokens the first is not drafted, and the second takes one step whatever is."""
    one = buffer(10_000, held_out=0.5)
    for trace in (*many(100, 2), *(make_trace(f"long-{i}-0", 3) for i in range(100))):
        one.add(trace)
    assert len(one.held_out("")) > 70
    for part in (one.choosing(""), one.judging("")):
        assert len(part) > 10 and {len(trace) for trace in part} == {3}


def test_a_trace_that_is_larger_than_its_part_costs_no_other() -> None:
    for held_out, recent in ((False, 0.5), (False, 0.0), (True, 0.5)):
        one = buffer(30, held_out=0.3, recent=recent)
        for trace in many(60):
            one.add(trace)
        kept, dropped = (one.training(""), one.held_out("")), one.counts("").dropped
        name = next(f"big-{i}" for i in range(100) if one.is_held_out(f"big-{i}") == held_out)
        one.add(make_trace(f"{name}-0", 20 * 30))
        assert (one.training(""), one.held_out("")) == kept and one.counts("").dropped == dropped + 1
        assert one.counts("").seen == 61


def test_choices_of_a_request_are_for_the_same() -> None:
    one = buffer(10_000, held_out=0.5)
    for index in range(200):
        for choice in range(4):
            one.add(make_trace(f"r-{index}-{choice}", 3))
    parts = [Counter(trace.asked for trace in part("")) for part in (one.training, one.choosing, one.judging)]
    assert all(set(part.values()) == {4} for part in parts) and sum(len(part) for part in parts) == 200
    assert all(30 < len(part) < 130 for part in parts)


def test_what_was_split_off_otherwise_is_given_up(tmp_path: Path) -> None:
    """So that nothing is measured on that was trained on, nor the other way round."""
    for before, after in ((0.1, 0.4), (0.4, 0.1)):
        one, back = buffer(100, held_out=before), buffer(100, held_out=after)
        for trace in many(150):
            one.add(trace)
        one.save(tmp_path / "traces")
        back.load(tmp_path / "traces")
        saved = {part: {trace.request for trace in part(one, "")} for part in (ReplayBuffer.training, ReplayBuffer.held_out)}
        for part, requests in saved.items():
            found = {trace.request for trace in part(back, "")}
            assert found and found < requests if (after > before) == (part is ReplayBuffer.training) else found <= requests
            assert all(back.is_held_out(trace.asked) == (part is ReplayBuffer.held_out) for trace in part(back, ""))
        kept = len(back.training("")) + len(back.held_out(""))
        assert back.counts("").seen == 150 and back.counts("").dropped == 150 - kept


def test_the_budget_is_kept_and_losses_are_counted() -> None:
    small = buffer(30)
    for index, trace in enumerate(many(300)):
        small.add(trace)
        assert small.nbytes <= small.settings.budget
        kept = len(small.training("")) + len(small.held_out(""))
        assert small.counts("").dropped == index + 1 - kept
    counts = small.counts("")
    assert (counts.seen, counts.tokens) == (300, 300 * 20)
    assert small.nbytes > 0.8 * small.settings.budget


def test_the_oldest_leave_the_recent_part_first() -> None:
    small = buffer(40)
    traces = [trace for trace in many(300) if not small.is_held_out(trace.asked)]
    for trace in traces:
        small.add(trace)
    recent = [trace.request for trace in small.domains[""].recent.traces]
    assert recent == [trace.request for trace in traces[-len(recent) :]]
    assert len(recent) == 18  # half of nine tenths of forty
    older = {entry[1] for entry in small.domains[""].older.entries}
    assert len(older) == 18 and older.isdisjoint(recent)
    held = buffer(100, held_out=0.3)
    for trace in many(300):
        held.add(trace)
    out = [trace.request for trace in held.held_out("")]
    assert out == [f"r-{i}-0" for i in range(300) if held.is_held_out(f"r-{i}")][-len(out) :]


def test_older_traces_are_a_uniform_sample_whatever_their_length() -> None:
    """Over many seeds, every one of the older traces stays about as often, early or late, short or long."""
    stays: Counter[str] = Counter()
    traces = [make_trace(f"r-{i}-0", 30 if i % 2 else 10) for i in range(60)]
    for seed in range(300):
        small = buffer(20, held_out=0.001, recent=0.0, seed=seed)
        for trace in traces:
            small.add(trace)
        stays.update(entry[1] for entry in small.domains[""].older.entries)
    counts = [stays[trace.request] for trace in traces]
    mean = sum(counts) / len(counts)
    assert mean > 60
    early, late = sum(counts[:30]) / 30, sum(counts[30:]) / 30
    short, long = sum(counts[::2]) / 30, sum(counts[1::2]) / 30
    assert abs(early - late) < 0.1 * mean and abs(short - long) < 0.1 * mean
    assert max(counts) < 1.6 * mean and min(counts) > 0.5 * mean


def test_room_that_a_long_trace_left_is_not_for_those_with_lower_keys() -> None:
    reservoir, short, long = Reservoir(), make_trace("short", 4), make_trace("long", 30)
    reservoir.offer(0.5, long)
    assert [trace.request for trace in reservoir.shrink(long.nbytes - 1)] == ["long"]
    assert not reservoir.offer(0.4, short)
    assert reservoir.offer(0.6, short) and reservoir.nbytes == short.nbytes


def test_domains_are_kept_apart_and_share_the_budget() -> None:
    small = buffer(60, tags=("law", "code"))
    for trace in (*many(200, tag="law"), *many(100, tag="code", first=200)):
        small.add(trace)
    for tag, numbers in (("law", range(200)), ("code", range(200, 300))):
        kept = {trace.request for trace in (*small.training(tag), *small.held_out(tag))}
        assert kept and kept <= {f"r-{i}-0" for i in numbers}
        assert sum(trace.nbytes for trace in (*small.training(tag), *small.held_out(tag))) <= 30 * ONE
        assert {trace.tag for trace in small.sample(tag, 20, 0.5, 0)} == {tag}
    assert small.counts("law").seen == 200 and small.counts("code").seen == 100


def test_tags_that_are_not_named_share_one_domain() -> None:
    small = buffer(100, tags=("law",))
    for index in range(8):
        small.add(make_trace(f"r-{index}-0", tag=("law", "", "anything", f"tag-{index}")[index % 4]))
    assert {tag: domain.counts.seen for tag, domain in small.domains.items()} == {"law": 2, "": 6}


def test_samples_are_a_function_of_seed_step_and_contents() -> None:
    one, same, other = buffer(40), buffer(40), buffer(40, seed=5)
    for trace in many(200):
        one.add(trace)
        same.add(trace)
        other.add(trace)
    names = [trace.request for trace in one.sample("", 16, 0.5, 7)]
    assert names == [trace.request for trace in same.sample("", 16, 0.5, 7)]
    assert names != [trace.request for trace in one.sample("", 16, 0.5, 8)]
    assert names != [trace.request for trace in other.sample("", 16, 0.5, 7)]
    recent = {trace.request for trace in one.domains[""].recent.traces}
    assert all(trace.request in recent for trace in one.sample("", 50, 1.0, 1))
    assert not any(trace.request in recent for trace in one.sample("", 50, 0.0, 1))
    mixed = sum(trace.request in recent for step in range(40) for trace in one.sample("", 50, 0.3, step))
    assert 0.25 < mixed / 2000 < 0.35


def test_tokens_count_alike_in_samples() -> None:
    held = buffer(100)
    held.add(make_trace("long", 40))
    held.add(make_trace("short", 10))
    found = Counter(trace.request for step in range(100) for trace in held.sample("", 20, 0.5, step))
    assert found["long"] / found["short"] == pytest.approx(4, rel=0.25)
    with pytest.raises(ValueError, match="nothing to learn from in domain 'law' of toy"):
        held.sample("law", 1, 0.5, 0)


def test_what_is_not_the_models_is_refused() -> None:
    with pytest.raises(InvalidTrace, match="r-0: model is 'other', expected 'toy'"):
        buffer().add(replace(make_trace(), model="other"))
    with pytest.raises(InvalidTrace, match="the vocabulary has tokens 0 to 9"):
        ReplayBuffer("toy", 10, WIDTH).add(make_trace())
    broken = replace(make_trace(), hidden=make_trace().hidden * torch.inf)
    with pytest.raises(InvalidTrace, match="hidden has NaN or infinite values"):
        buffer().add(broken)
    for changes, message in (
        ({"budget": 0}, "budget must be positive"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"recent": 1.5}, "0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(BufferSettings(), **changes)


def test_a_saved_buffer_goes_on_as_one_that_was_never_saved(tmp_path: Path) -> None:
    one = buffer(40)
    for trace in many(150):
        one.add(trace)
    one.save(tmp_path / "traces")
    back = buffer(40)
    back.load(tmp_path / "traces")
    assert back.nbytes == one.nbytes and back.counts("") == one.counts("")
    for trace in many(100, first=150):
        one.add(trace)
        back.add(trace)
    assert [t.request for t in back.training("")] == [t.request for t in one.training("")]
    assert [t.request for t in back.held_out("")] == [t.request for t in one.held_out("")]
    assert back.counts("") == one.counts("")
    smaller = buffer(10)
    smaller.load(tmp_path / "traces")
    assert 0 < smaller.nbytes <= smaller.settings.budget


def test_what_is_forgotten_is_gone_from_every_part_and_the_rest_stays(tmp_path: Path) -> None:
    one = buffer(60, tags=("law",), held_out=0.3)
    for trace in (*many(150), *many(150, tag="law", first=150)):
        one.add(trace)
    kept = {trace.request: trace for tag in ("", "law") for trace in (*one.training(tag), *one.held_out(tag))}
    assert all(part for domain in one.domains.values() for part in (domain.recent.traces, domain.older.entries, domain.held.traces))
    odd = {request for request in kept if int(request.split("-")[1]) % 2}
    gone = one.forget(lambda trace: trace.request in odd)
    assert sum(gone.values()) == len(odd) and min(gone.values()) > 0
    left = [trace for tag in ("", "law") for trace in (*one.training(tag), *one.held_out(tag))]
    assert {trace.request for trace in left} == kept.keys() - odd and one.nbytes == sum(trace.nbytes for trace in left)
    assert sum(one.counts(tag).dropped for tag in ("", "law")) == 300 - len(left)
    assert one.forget(lambda trace: trace.request in odd) == {"": 0, "law": 0}
    one.save(tmp_path / "traces")
    back = buffer(60, tags=("law",), held_out=0.3)
    back.load(tmp_path / "traces")
    assert [trace.request for tag in ("", "law") for trace in (*back.training(tag), *back.held_out(tag))] == [t.request for t in left]


def test_traces_are_written_one_at_a_time_as_they_were_when_that_began(tmp_path: Path) -> None:
    one, file = buffer(held_out=0.3), tmp_path / "traces"
    for trace in many(8):
        one.add(trace)
    saving = one.saving(file)
    next(saving)
    for trace in many(4, first=8):
        one.add(trace)
    one.forget(lambda trace: trace.request == "r-3-0")
    assert not file.exists() and len(list(saving)) == 8
    back = buffer(held_out=0.3)
    back.load(file)
    assert {trace.request for trace in (*back.training(""), *back.held_out(""))} == {f"r-{i}-0" for i in range(8)}
    before, again = file.read_bytes(), one.saving(file)
    next(again)
    again.close()  # given up half-way
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_sample_of_which_all_was_forgotten_begins_anew() -> None:
    one, new = buffer(40), buffer(40)
    for trace in many(400):
        one.add(trace)
    assert one.domains[""].older.threshold > 0 and one.forget(lambda trace: True)[""] > 0
    assert one.nbytes == 0 and one.training("") == one.held_out("") == ()
    for trace in many(60, first=400):
        one.add(trace)
        new.add(trace)
    assert [trace.request for trace in one.training("")] == [trace.request for trace in new.training("")]


def test_a_torn_file_of_traces_is_refused(tmp_path: Path) -> None:
    one = buffer()
    for trace in many(5):
        one.add(trace)
    one.save(tmp_path / "traces")
    data = (tmp_path / "traces").read_bytes()
    for length in (0, 4, 60, len(data) // 2, len(data) - 1):
        (tmp_path / "traces").write_bytes(data[:length])
        with pytest.raises(ValueError, match="ends in the middle of a record"):
            buffer().load(tmp_path / "traces")
    for table in ([], {"": []}, {"": {"seen": 1}}, {"": {"seen": "1", "tokens": 1, "dropped": 0, "threshold": 0.0, "parts": [0, 0, 0]}}):
        (tmp_path / "traces").write_bytes(framed(json.dumps(table).encode()))
        with pytest.raises(ValueError, match="is no saved buffer"):
            buffer().load(tmp_path / "traces")


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Files of this process may have so many bytes and no more: what a write to a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_file(tmp_path: Path) -> None:
    one = buffer()
    for trace in many(5):
        one.add(trace)
    one.save(tmp_path / "traces")
    before = (tmp_path / "traces").read_bytes()
    for trace in many(20, first=5):
        one.add(trace)
    with full_after(len(before) + 100), pytest.raises(OSError, match=r"cannot write .*traces: .*; what it held before is unchanged"):
        one.save(tmp_path / "traces")
    assert (tmp_path / "traces").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "traces"]


@pytest.mark.parametrize("tags", [(), ("law",), ("law", "code"), ("code", "sql")])
def test_a_saved_buffer_is_read_into_the_domains_that_there_are_now(tmp_path: Path, tags: tuple[str, ...]) -> None:
    one = buffer(200, tags=("law",))
    for trace in (*many(60, tag="law"), *many(60, tag="code", first=60), *many(60, first=120)):
        one.add(trace)
    one.save(tmp_path / "traces")
    back = buffer(10_000, tags=tags)
    back.load(tmp_path / "traces")
    kept = {trace.request: trace.tag for domain in ("", "law") for trace in (*one.training(domain), *one.held_out(domain))}
    for tag in ("", *tags):
        found = {trace.request for trace in (*back.training(tag), *back.held_out(tag))}
        assert found == {request for request, its in kept.items() if back.domain_of(its) == tag}
        assert back.counts(tag).seen - back.counts(tag).dropped == len(found) and back.size(tag) == len(found) * ONE
        assert all(back.is_held_out(trace.asked) for trace in back.held_out(tag))
        assert not any(back.is_held_out(trace.asked) for trace in back.training(tag))
    assert sum(back.counts(tag).seen for tag in back.domains) == 180 and back.nbytes == len(kept) * ONE
