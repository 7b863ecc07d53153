"""What the request log holds: counted, purged, and the history of purges. Beside `actors.request_log`, which writes and reads it.

A purge is recorded in the log itself, in the table `purges` of an SQLite file or the stream `specfleet:purges` of a Redis server.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis

from actors.store import BUSY_S, StoreError, Value, check_state, connect, sqlite_path
from drafters.choices import request_of

STREAM = "specfleet:requests"
PURGES = "specfleet:purges"
PAGE = 200  # entries of a Redis stream looked at together
PAUSE_S = 0.05  # seconds between two attempts to empty what is written ahead of an SQLite file


@dataclass(frozen=True, slots=True)
class Selection:
    """Records that fit all of the given fields; with none given, every record.

    model, key, tag: their names. request: the id that its answer had, for all choices. before: seconds since the epoch that `created` is
    below.
    """

    model: str | None = None
    key: str | None = None
    request: str | None = None
    before: float | None = None
    tag: str | None = None

    @property
    def everything(self) -> bool:
        return all(value is None for value in asdict(self).values())

    def fits(self, record: Value) -> bool:
        """Whether a record, as JSON, is one of them."""
        named = self.model in (None, record["model"]) and self.key in (None, record["key"]) and self.tag in (None, record.get("tag"))
        requested = self.request in (None, record["id"], request_of(record["id"]))
        return named and requested and (self.before is None or record["created"] < self.before)


@dataclass(frozen=True, slots=True)
class Purge:
    """A wanted purge. who: name of the key."""

    what: Selection
    who: str
    why: str = ""

    def entry(self, at: float, records: int) -> Value:
        """As the history keeps it."""
        return {"at": at, "who": self.who, "why": self.why, **asdict(self.what), "records": records}


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a purge deleted. records: how many. readable: whether these, or those of an earlier purge, can still be read in the store's file
    with other tools than its own, since somebody who reads it kept them from being overwritten; the next purge tries again."""

    records: int
    readable: bool = False


@dataclass(slots=True)
class Count:
    """records; bytes: of their JSON text; oldest, newest: seconds since the epoch."""

    records: int = 0
    bytes: int = 0
    oldest: float | None = None
    newest: float | None = None

    def add(self, records: int, size: int, oldest: float, newest: float) -> None:
        self.records, self.bytes = self.records + records, self.bytes + size
        self.oldest = oldest if self.oldest is None else min(self.oldest, oldest)
        self.newest = newest if self.newest is None else max(self.newest, newest)


@dataclass(slots=True)
class Contents:
    """All records, and those of each model. store_bytes: what the store takes for them."""

    total: Count = field(default_factory=Count)
    models: dict[str, Count] = field(default_factory=dict)
    store_bytes: int = 0

    def add(self, model: str, *count: Any) -> None:
        self.total.add(*count)
        self.models.setdefault(model, Count()).add(*count)

    def to_json(self) -> Value:
        models = {model: asdict(count) for model, count in sorted(self.models.items())}
        return asdict(self.total) | {"store_bytes": self.store_bytes, "models": models}


class LogKeeping(Protocol):
    """What is done with a log's contents. Methods raise `StoreError` when it cannot be reached."""

    def contents(self) -> Contents:
        """What it holds; looks at every record."""
        ...

    def purge(self, purge: Purge) -> Deleted:
        """Delete the records that are meant, and record that."""
        ...

    def purges(self) -> list[Value]:
        """Every purge, oldest first: at, who, why, model, key, request, before, tag, records."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


def open_keeping(url: str, clock: Callable[[], float] = time.time) -> LogKeeping:
    """The contents of the log at a URL as `open_log` takes. ValueError for any other URL."""
    check_state(url)
    return SqliteKeeping(sqlite_path(url), clock) if urlsplit(url).scheme == "sqlite" else RedisKeeping(url, clock)


class SqliteKeeping:
    """A log in an SQLite file. What is purged is overwritten, in the file and in what was written ahead of it, once nobody reads that any
    more; patience: seconds that a purge waits for it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, patience: float = BUSY_S) -> None:
        self._clock, self._patience = clock, patience
        try:
            self._db = connect(path, patience)
            self._db.execute("PRAGMA secure_delete=ON")
            create_tables(self._db)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from error

    def contents(self) -> Contents:
        found = Contents()
        sums = "SELECT model, COUNT(*), SUM(LENGTH(CAST(record AS BLOB))), MIN(created), MAX(created) FROM requests GROUP BY model"
        with told():
            for row in self._db.execute(sums).fetchall():
                found.add(*row)
            found.store_bytes = held_bytes(self._db)
        return found

    def purge(self, purge: Purge) -> Deleted:
        where, values = condition(purge.what)
        with told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                count = self._db.execute(f"DELETE FROM requests WHERE {where}", values).rowcount
                entry = json.dumps(purge.entry(self._clock(), count))
                self._db.execute("INSERT INTO purges (entry) VALUES (?)", (entry,))
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            return Deleted(count, readable=not self._emptied())

    def purges(self) -> list[Value]:
        with told():
            return [json.loads(entry) for (entry,) in self._db.execute("SELECT entry FROM purges ORDER BY id").fetchall()]

    def close(self) -> None:
        self._db.close()

    def _emptied(self) -> bool:
        """Whether all that was written ahead is in the file and nowhere else now. SQLite waits for readers itself, and not for somebody who
        does the same at this moment."""
        until = time.monotonic() + self._patience
        while self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() >= until:
                return False
            time.sleep(PAUSE_S)
        return True


def create_tables(db: sqlite3.Connection) -> None:
    """The tables of a log, where they are not there yet."""
    db.execute(
        "CREATE TABLE IF NOT EXISTS requests (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
        " model TEXT NOT NULL, created REAL NOT NULL, record TEXT NOT NULL)"
    )
    db.execute("CREATE INDEX IF NOT EXISTS requests_created ON requests (created)")
    db.execute("CREATE INDEX IF NOT EXISTS requests_model ON requests (model, seq)")
    db.execute("CREATE TABLE IF NOT EXISTS purges (id INTEGER PRIMARY KEY, entry TEXT NOT NULL)")


def held_bytes(db: sqlite3.Connection) -> int:
    """Bytes of an SQLite file that hold something; what was deleted is not among them, though the file stays as long as it is."""
    pages, free, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size"))
    return int((pages - free) * size)


def condition(what: Selection) -> tuple[str, list[object]]:
    """A selection as SQL and its values."""
    parts: dict[str, object] = {
        "model = ?": what.model,
        "json_extract(record, '$.key') = ?": what.key,
        "? IN (id, rtrim(rtrim(id, '0123456789'), '-'))": what.request,
        "created < ?": what.before,
        "json_extract(record, '$.tag') = ?": what.tag,
    }
    given = {sql: value for sql, value in parts.items() if value is not None}
    return " AND ".join(given) or "TRUE", list(given.values())


class RedisKeeping:
    """A log in Redis. Entries are marked as deleted at once; their memory is free when all entries of their node are."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time, stream: str = STREAM) -> None:
        self._clock, self._stream = clock, stream
        self._redis = redis.Redis.from_url(url, decode_responses=True, socket_timeout=30, socket_connect_timeout=3)

    def contents(self) -> Contents:
        found = Contents()
        with told():
            for _, entry in self._entries():
                created = json.loads(entry["record"])["created"]
                found.add(entry["model"], 1, len(entry["record"].encode()), created, created)
            found.store_bytes = self._redis.memory_usage(self._stream) or 0
        return found

    def purge(self, purge: Purge) -> Deleted:
        with told():
            count = self._redis.xtrim(self._stream, maxlen=0, approximate=False) if purge.what.everything else self._delete(purge.what)
            self._redis.xadd(PURGES, {"entry": json.dumps(purge.entry(self._clock(), count))})
        return Deleted(int(count))

    def purges(self) -> list[Value]:
        with told():
            return [json.loads(entry["entry"]) for _, entry in self._range(PURGES)]

    def close(self) -> None:
        self._redis.close()

    def _delete(self, what: Selection) -> int:
        meant = (cursor for cursor, entry in self._entries() if what.fits(json.loads(entry["record"])))
        return sum(int(self._redis.xdel(self._stream, *page)) for page in pages(meant))

    def _entries(self) -> Iterator[tuple[str, dict[str, str]]]:
        """All entries with their ids, oldest first."""
        start = "-"
        while page := self._range(self._stream, start, PAGE):
            yield from page
            start = f"({page[-1][0]}"

    def _range(self, stream: str, start: str = "-", count: int | None = None) -> list[tuple[str, dict[str, str]]]:
        found: Any = self._redis.xrange(stream, min=start, count=count)
        return list(found)


def pages(cursors: Iterable[str]) -> Iterator[list[str]]:
    """The same in lists of at most PAGE."""
    held: list[str] = []
    for cursor in cursors:
        held.append(cursor)
        if len(held) == PAGE:
            yield held
            held = []
    if held:
        yield held


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Troubles of a store as StoreError."""
    try:
        yield
    except (sqlite3.Error, redis.RedisError, OSError) as error:
        raise StoreError(str(error)) from error
