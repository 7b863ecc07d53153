"""The request log: both stores alike, retention, and a writer that never holds anybody up and counts what it loses."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import redis

from actors.log_contents import Purge, Selection, open_keeping
from actors.request_log import LogStats, LogWriter, RedisLog, RequestLogActor, RequestRecord, Retention, SqliteLog, open_log
from actors.store import StoreError, sqlite_path
from tests.actors.stand import Clock, RedisServer
from tests.conftest import wait_until


def record(i: int, model: str = "m", created: float = 0.0) -> RequestRecord:
    sampling = {"temperature": 0.7, "stop": ["\n"], "logit_bias": {"5": -1.0}}
    return RequestRecord(f"r{i}", model, created, "key", (1, 2, i), (3, i), 1 << 62, sampling, "length", "mlp", "v1", 4, 9, 5, 0.25, "sql")


def test_a_log_from_before_there_were_tags_is_read_and_goes_on(url):
    log = open_log(url)
    old = record(1)
    told = json.dumps({name: value for name, value in json.loads(old.to_json()).items() if name != "tag"})
    if isinstance(log, SqliteLog):
        log._db.execute("INSERT INTO requests (id, model, created, record) VALUES (?, ?, ?, ?)", (old.id, old.model, old.created, told))
    else:
        log._redis.xadd("specfleet:requests", {"id": old.id, "model": old.model, "record": told})
    log.append([record(2)])
    assert log.tail(5) == [replace(old, tag=""), record(2)]
    with contextlib.closing(open_keeping(url)) as keeping:
        assert [keeping.purge(Purge(Selection(tag=tag), "root")).records for tag in ("law", "sql")] == [0, 1]
    assert [r.id for r in log.tail(5)] == ["r1"]
    log.close()


class FakeLog:
    """Keeps batches in memory; fails or waits when told to."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.failing = False
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.opened = 0

    def open(self) -> FakeLog:
        self.opened += 1
        return self

    def append(self, batch: Sequence[RequestRecord]) -> None:
        self.entered.set()
        self.gate.wait(10)
        if self.failing:
            raise StoreError("down")
        for r in batch:
            r.to_json()
        self.records.extend(batch)

    def read(self, after: str = "", count: int = 100) -> list[tuple[str, RequestRecord]]:
        return []

    def tail(self, count: int, model: str | None = None) -> list[RequestRecord]:
        return self.records[-count:]

    def close(self) -> None:
        pass


def test_records_come_back_as_they_were(url):
    log = open_log(url)
    log.append([record(1), record(2)])
    log.append([])
    log.append([replace(record(3), seed=None, sampling={})])
    found = log.read()
    assert [r for _, r in found] == [record(1), record(2), replace(record(3), seed=None, sampling={})]
    assert [r.id for _, r in log.read(after=found[0][0], count=1)] == ["r2"]
    assert log.read(after=found[-1][0]) == []
    log.close()


def test_tail_by_model(url):
    log = open_log(url)
    log.append([record(i, "ab"[i % 2]) for i in range(300)])
    assert [r.id for r in log.tail(2)] == ["r298", "r299"]
    assert [r.id for r in log.tail(2, "a")] == ["r296", "r298"]
    assert len(log.tail(1000, "b")) == 150 and log.tail(5, "none") == [] and log.tail(0) == []


def test_sqlite_retention_is_exact_and_a_repeated_append_adds_nothing(tmp_path, clock):
    log = SqliteLog(tmp_path / "log.db", Retention(5, 60.0), clock)
    log.append([record(i, created=clock.now) for i in range(8)])
    log.append([record(7, created=clock.now)])
    assert [r.id for r in log.tail(99)] == ["r3", "r4", "r5", "r6", "r7"]
    clock.now += 61
    log.append([record(9, created=clock.now)])
    assert [r.id for r in log.tail(99)] == ["r9"]


def test_redis_retention_is_about_right(redis_url):
    log = RedisLog(redis_url, Retention(500))
    for start in range(0, 3000, 100):
        log.append([record(i) for i in range(start, start + 100)])
    kept = log.tail(10_000)
    assert 500 <= len(kept) <= 700 and kept[-1].id == "r2999"
    aged = RedisLog(redis_url, Retention(500, 60.0), clock=lambda: time.time() + 3600)
    aged.append([])
    assert aged.tail(10_000) == []  # of age exactly


def test_redis_lets_go_of_what_is_too_old_to_the_record(redis_url):
    log = RedisLog(redis_url, Retention(max_age=60.0), lambda: 1000.0)
    for i in range(10):  # a second apart, in one node of the stream
        log._redis.xadd("specfleet:requests", {"id": f"r{i}", "model": "m", "record": record(i).to_json()}, id=f"{(935 + i) * 1000}-0")
    log.append([])
    assert [r.id for r in log.tail(99)] == ["r5", "r6", "r7", "r8", "r9"]
    log.close()


def test_what_is_too_old_goes_from_a_log_to_which_nothing_comes(url):
    kept, clock = Retention(max_age=60.0), Clock(time.time())
    writer = LogWriter(lambda: RedisLog(url, kept, clock) if "redis" in url else SqliteLog(sqlite_path(url), kept, clock), every=0.05)
    writer.offer(*(record(i, created=clock.now) for i in range(3)))
    assert writer.flush(20)
    with contextlib.closing(open_log(url)) as log:
        assert len(log.tail(9)) == 3
        clock.now += 61
        wait_until(lambda: not log.tail(9))
    assert writer.stats() == LogStats(3, 0, 0, 0)
    writer.close()


@pytest.mark.parametrize(("max_age", "every"), [(None, None), (60.0, 600.0), (30 * 86400.0, 0.01 * 30 * 86400.0)])
def test_a_long_age_is_not_looked_at_all_the_time(max_age, every):
    assert Retention(max_age=max_age).every == every


async def test_the_actors_log_grows_no_older_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("actors.request_log.AGING", 0.05)
    actor = RequestLogActor(f"sqlite:///{tmp_path}/log.db", max_age=1.0)
    await actor.append([record(1, created=time.time())])
    assert await actor.flush() and (await actor.stats())["written"] == 1
    with contextlib.closing(open_log(f"sqlite:///{tmp_path}/log.db")) as log:
        wait_until(lambda: not log.tail(9))
    await actor.close()


def test_a_store_that_is_away_when_nothing_comes_is_looked_at_again():
    log = FakeLog()
    log.failing = True
    writer = LogWriter(log.open, backoff=0.01, every=0.02)
    wait_until(lambda: writer.stats().failed >= 2)
    log.failing = False
    writer.offer(record(1))
    assert writer.flush(10)
    writer.close()
    assert log.records == [record(1)] and writer.stats().dropped == 0


def test_the_documented_fields_are_there(tmp_path, redis_url):
    open_log(redis_url).append([record(1)])
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        [(_, entry)] = client.xrange("specfleet:requests")
    assert (entry["id"], entry["model"], json.loads(entry["record"])["prompt"]) == ("r1", "m", [1, 2, 1])
    open_log(f"sqlite:///{tmp_path}/log.db").append([record(1)])
    with sqlite3.connect(tmp_path / "log.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("SELECT id, json_extract(record, '$.output[1]') FROM requests").fetchall() == [("r1", 1)]


@pytest.mark.parametrize("bad", ["", "kafka://x", "sqlite://", "log.db"])
def test_other_urls_are_refused(bad):
    with pytest.raises(ValueError):
        open_log(bad)


def test_a_record_of_a_newer_version_can_be_read():
    text = json.dumps(json.loads(record(1).to_json()) | {"later": 1})
    assert RequestRecord.from_json(text) == record(1)


def test_the_writer_writes_everything_in_order(url):
    writer = LogWriter(lambda: open_log(url), batch=7)
    for i in range(100):
        writer.offer(record(i))
    assert writer.flush(20)
    assert writer.stats() == LogStats(100, 0, 0, 0)
    writer.close()
    assert [r.id for _, r in open_log(url).read(count=200)] == [f"r{i}" for i in range(100)]


def test_a_slow_store_holds_nobody_up_and_the_oldest_records_go():
    log = FakeLog()
    log.gate.clear()
    writer = LogWriter(log.open, capacity=10, batch=1)
    writer.offer(record(0))
    assert log.entered.wait(10)
    start = time.monotonic()
    for i in range(1, 1001):
        writer.offer(record(i))
    assert time.monotonic() - start < 1.0
    assert writer.stats() == LogStats(0, 990, 0, 11)
    log.gate.set()
    assert writer.flush(10)
    writer.close()
    assert [r.id for r in log.records] == ["r0", *(f"r{i}" for i in range(991, 1001))]
    assert writer.stats() == LogStats(11, 990, 0, 0)


def test_a_failing_store_is_tried_again_and_nothing_is_lost():
    log = FakeLog()
    log.failing = True
    writer = LogWriter(log.open, backoff=0.01)
    writer.offer(record(1))
    wait_until(lambda: writer.stats().failed >= 2)
    log.failing = False
    assert writer.flush(10)
    writer.close()
    assert [r.id for r in log.records] == ["r1"] and log.opened >= 3 and writer.stats().dropped == 0


def test_closing_while_the_store_is_down_counts_what_is_lost():
    log = FakeLog()
    log.failing = True
    writer = LogWriter(log.open, backoff=30.0)
    for i in range(5):
        writer.offer(record(i))
    wait_until(lambda: writer.stats().failed)
    writer.close(10)
    writer.offer(record(9))
    stats = writer.stats()
    assert (stats.written, stats.dropped, stats.queued) == (0, 6, 0)


def test_a_record_that_cannot_be_written_is_dropped_alone():
    log = FakeLog()
    log.gate.clear()
    writer = LogWriter(log.open, backoff=0.01)
    for i in range(10):
        writer.offer(replace(record(i), sampling={"x": object()}) if i == 4 else record(i))
    log.gate.set()
    assert writer.flush(10)
    writer.close()
    assert [r.id for r in log.records] == [f"r{i}" for i in range(10) if i != 4]
    assert (writer.stats().written, writer.stats().dropped) == (9, 1)


def test_every_offer_is_accounted_for_under_threads():
    log = FakeLog()
    writer = LogWriter(log.open, capacity=50, batch=3)
    threads = [threading.Thread(target=lambda: [writer.offer(record(i)) for i in range(500)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert writer.flush(10)
    writer.close()
    stats = writer.stats()
    assert stats.written + stats.dropped == 2000 and stats.written == len(log.records)


def test_writing_goes_on_after_redis_was_away(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    writer = LogWriter(lambda: open_log(server.url), backoff=0.05)
    writer.offer(record(1))
    assert writer.flush(10)
    server.stop()
    writer.offer(record(2))
    wait_until(lambda: writer.stats().failed)
    server.start()
    try:
        assert writer.flush(20)
        writer.close()
        assert [r.id for r in open_log(server.url).tail(9)] == ["r1", "r2"]
        assert writer.stats().dropped == 0
    finally:
        server.stop()


async def test_losses_of_every_source_are_counted_once(tmp_path):
    actor = RequestLogActor(f"sqlite:///{tmp_path}/log.db")
    for source, lost in (("a", 2), ("a", 2), ("b", 1), ("a", 5)):
        await actor.append([], lost, source)
    await actor.append([record(1)])
    await actor.close()
    assert await actor.stats() == {"written": 1, "dropped": 0, "failed": 0, "queued": 0, "lost": 6}
