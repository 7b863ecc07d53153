"""Both state stores keep values and streams, over a reopening, and say clearly when they cannot."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from actors.store import SqliteState, StoreError, Unreadable, open_state, sqlite_path


def test_values(url):
    store = open_state(url)
    assert store.get("a") is None
    store.put("a", {"x": [1, 2.5, None, "ü"]})
    store.put("a", {"x": 2})
    store.put("b", {})
    assert store.get("a") == {"x": 2} and store.get("b") == {}


def test_streams_keep_their_order(url):
    store = open_state(url)
    for i in range(5):
        store.append("s", {"i": i})
    store.append("other", {})
    assert [e["i"] for e in store.entries("s")] == [0, 1, 2, 3, 4]
    assert [e["i"] for e in store.entries("s", 2)] == [3, 4]
    assert store.entries("s", 0) == [] and store.entries("none") == []


def test_everything_outlives_the_store_object(url):
    store = open_state(url)
    store.put("a", {"x": 1})
    store.append("s", {"y": 2})
    store.close()
    again = open_state(url)
    assert again.get("a") == {"x": 1} and again.entries("s") == [{"y": 2}]


def test_a_change_is_on_the_disk_when_it_is_answered(tmp_path):
    """A process that is killed shows nothing of this, only a power failure would: that SQLite was told must do."""
    store = open_state(f"sqlite:///{tmp_path}/store.db")
    assert isinstance(store, SqliteState) and store._run("PRAGMA synchronous") == [(2,)]


def test_appends_from_many_threads_are_all_there(url):
    store = open_state(url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.append("s", {"i": i}), range(100)))
    assert sorted(e["i"] for e in store.entries("s")) == list(range(100))


@pytest.mark.parametrize("url", ["", "mysql://x/y", "sqlite://", "sqlite:///", "sqlite://host/file", "/tmp/x"])
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError):
        open_state(url)


def test_an_unreachable_store_says_so(tmp_path):
    with pytest.raises(StoreError):
        open_state("redis://127.0.0.1:1/0").get("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        open_state(f"sqlite:///{tmp_path}/file/store.db")


def damage(url: str, text: bytes) -> None:
    """What stands there in the value `a`, and in the middle one of three entries of the stream `s`."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            client.set("specfleet:state:a", text)
            client.lset("specfleet:stream:s", 1, text)
        return
    with sqlite3.connect(sqlite_path(url)) as db:
        db.execute("UPDATE state SET value = CAST(? AS TEXT) WHERE key = 'a'", (text,))
        db.execute("UPDATE stream SET entry = CAST(? AS TEXT) WHERE id = 2", (text,))


@pytest.mark.parametrize("text", [b"", b'{"x": ', b"\xff\xfe\x00", b"[1]", b"null", b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}"])
def test_what_cannot_be_read_is_a_trouble_of_the_store(url, text, caplog):
    store = open_state(url)
    store.put("a", {})
    for i in range(3):
        store.append("s", {"i": i})
    damage(url, text)
    with pytest.raises(Unreadable, match="a: "):
        store.get("a")
    with pytest.raises(Unreadable, match="s: "):
        store.entries("s")
    assert store.entries("s", damaged={}) == [{"i": 0}, {}, {"i": 2}] and "s holds an entry" in caplog.text
    store.put("a", {"x": 1})
    assert store.get("a") == {"x": 1}


def test_the_file_can_be_read_with_ordinary_tools(tmp_path):
    open_state(f"sqlite:///{tmp_path}/store.db").put("a", {"x": 1})
    with sqlite3.connect(tmp_path / "store.db") as db:
        assert db.execute("SELECT value FROM state WHERE key = 'a'").fetchone() == ('{"x": 1}',)
