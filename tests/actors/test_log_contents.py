"""What a log holds is counted and purged, in both stores alike, and every purge is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from actors.log_contents import Deleted, Purge, Selection, SqliteKeeping, open_keeping
from actors.request_log import RedisLog, RequestLogActor, RequestRecord, Retention, SqliteLog, open_log
from actors.store import StoreError


def record(identity: str, model: str = "a", key: str = "me", created: float = 100.0, size: int = 3, tag: str = "") -> RequestRecord:
    return RequestRecord(identity, model, created, key, tuple(range(size)), (7_654_321,), None, tag=tag)


RECORDS = [
    record("cmpl-1f-0", created=100.0),
    record("cmpl-1f-1", key="you", created=101.0, tag="law"),
    record("cmpl-1-0", "b", created=102.0),
    record("cmpl-12-0", "b", "you", created=103.0, tag="sql"),
]


@pytest.fixture
def log(url):
    with contextlib.closing(open_log(url)) as log:
        log.append(RECORDS)
        yield log


@pytest.fixture
def keeping(url, log):
    with contextlib.closing(open_keeping(url, lambda: 500.0)) as keeping:
        yield keeping


def test_contents_are_counted_by_model(keeping, log):
    found = keeping.contents().to_json()
    assert (found["records"], found["oldest"], found["newest"]) == (4, 100.0, 103.0)
    assert found["bytes"] == sum(len(r.to_json()) for r in RECORDS) and found["store_bytes"] > found["bytes"]
    assert {name: (m["records"], m["oldest"]) for name, m in found["models"].items()} == {"a": (2, 100.0), "b": (2, 102.0)}


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (Selection(), []),
        (Selection(model="a"), ["cmpl-1-0", "cmpl-12-0"]),
        (Selection(key="you"), ["cmpl-1f-0", "cmpl-1-0"]),
        (Selection(model="b", key="you"), ["cmpl-1f-0", "cmpl-1f-1", "cmpl-1-0"]),
        (Selection(before=102.0), ["cmpl-1-0", "cmpl-12-0"]),
        (Selection(request="cmpl-1f"), ["cmpl-1-0", "cmpl-12-0"]),
        (Selection(request="cmpl-1f-1"), ["cmpl-1f-0", "cmpl-1-0", "cmpl-12-0"]),
        (Selection(request="cmpl-1"), ["cmpl-1f-0", "cmpl-1f-1", "cmpl-12-0"]),
        (Selection(request="cmpl"), [r.id for r in RECORDS]),
        (Selection(model="c"), [r.id for r in RECORDS]),
        (Selection(tag="law"), ["cmpl-1f-0", "cmpl-1-0", "cmpl-12-0"]),
        (Selection(model="a", tag="sql"), [r.id for r in RECORDS]),
        (Selection(key="you", tag="sql"), ["cmpl-1f-0", "cmpl-1f-1", "cmpl-1-0"]),
        (Selection(model="a", before=101.0), ["cmpl-1f-1", "cmpl-1-0", "cmpl-12-0"]),
    ],
)
def test_a_purge_takes_what_was_named_and_nothing_else(keeping, log, what, left):
    assert keeping.purge(Purge(what, "root", "asked for")) == Deleted(4 - len(left))
    assert [r.id for r in log.tail(10)] == left and keeping.contents().total.records == len(left)
    (entry,) = keeping.purges()
    assert (entry["at"], entry["who"], entry["why"], entry["records"]) == (500.0, "root", "asked for", 4 - len(left))
    assert Selection(*(entry[name] for name in ("model", "key", "request", "before", "tag"))) == what


def test_the_log_goes_on_after_a_purge(keeping, log):
    cursor = log.read()[-1][0]
    keeping.purge(Purge(Selection(), "root"))
    keeping.purge(Purge(Selection(model="a"), "root"))
    assert keeping.contents().to_json()["oldest"] is None
    log.append([record("later")])
    assert [r.id for _, r in log.read(cursor)] == ["later"] and [p["records"] for p in keeping.purges()] == [4, 0]


def test_a_long_stream_is_purged_in_pages(redis_url):
    log, keeping = open_log(redis_url), open_keeping(redis_url)
    log.append([record(f"r{i}-0", "ab"[i % 2]) for i in range(4500)])
    assert keeping.purge(Purge(Selection(model="a"), "root")) == Deleted(2250)
    assert {r.model for r in log.tail(5000)} == {"b"} and keeping.contents().total.records == 2250


def test_what_is_purged_from_a_file_is_overwritten(tmp_path):
    log, keeping = open_log(f"sqlite:///{tmp_path}/log.db"), open_keeping(f"sqlite:///{tmp_path}/log.db")
    log.append([record(f"r{i}-0", size=300) for i in range(50)])
    assert holds(tmp_path, b"7654321")
    assert keeping.purge(Purge(Selection(), "root")) == Deleted(50)
    assert not holds(tmp_path, b"7654321") and not holds(tmp_path, b"297,298")


def test_what_a_reader_keeps_from_being_overwritten_is_told_of_and_goes_with_the_next_purge(tmp_path):
    log, keeping = open_log(f"sqlite:///{tmp_path}/log.db"), SqliteKeeping(tmp_path / "log.db", patience=0.1)
    log.append([record(f"r{i}-0", size=300) for i in range(50)])
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM requests").fetchone() == (50,)
        assert keeping.purge(Purge(Selection(), "root")) == Deleted(50, readable=True)
        assert log.tail(50) == [] and holds(tmp_path, b"297,298")
        assert keeping.purge(Purge(Selection(model="none"), "root")) == Deleted(0, readable=True)
        reader.execute("ROLLBACK")
        assert keeping.purge(Purge(Selection(model="none"), "root")) == Deleted(0)
        assert not holds(tmp_path, b"7654321") and not holds(tmp_path, b"297,298")


def holds(folder: Path, text: bytes) -> bool:
    return any(text in file.read_bytes() for file in folder.iterdir())


def test_sqlite_keeps_within_its_bytes(tmp_path):
    log = SqliteLog(tmp_path / "log.db", Retention(max_bytes=200_000))
    for start in range(0, 600, 20):
        log.append([record(f"r{i}-0", size=400) for i in range(start, start + 20)])
    kept = [r.id for r in log.tail(1000)]
    assert kept == [f"r{i}-0" for i in range(600 - len(kept), 600)] and 50 < len(kept) < 110
    assert open_keeping(f"sqlite:///{tmp_path}/log.db").contents().store_bytes <= 200_000


def test_redis_keeps_about_within_its_bytes(redis_url):
    log = RedisLog(redis_url, Retention(max_bytes=400_000))
    for start in range(0, 2000, 20):
        log.append([record(f"r{i}-0", size=400) for i in range(start, start + 20)])
    kept = [r.id for r in log.tail(5000)]
    assert kept == [f"r{i}-0" for i in range(2000 - len(kept), 2000)] and 100 < len(kept) < 300
    assert open_keeping(redis_url).contents().store_bytes < 600_000


async def test_the_actor_purges_what_is_not_written_yet_too(url):
    actor = RequestLogActor(url)
    await actor.append(RECORDS)
    assert await actor.purge(Purge(Selection(model="a"), "root", "why")) == Deleted(2)
    assert (await actor.contents())["models"].keys() == {"b"} and (await actor.purges())[0]["records"] == 2
    await actor.close()


async def test_a_store_that_is_away_is_purged_by_nobody(redis_server, redis_url):
    actor = RequestLogActor(redis_url)
    await actor.append(RECORDS)
    await actor.flush()
    redis_server.stop()
    try:
        for asking in (actor.contents(), actor.purges(), actor.purge(Purge(Selection(), "root"))):
            with pytest.raises(StoreError):
                await asyncio.wait_for(asking, 20)
    finally:
        redis_server.start()
    await actor.close()
