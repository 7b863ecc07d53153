"""The request log: what was asked and answered, as token ids, never text.

Two stores behind one protocol, SQLite for one machine and Redis Streams for many; a writer that never holds up a response and counts what
it loses; a Ray actor that owns one writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import ray
import redis

from actors.log_contents import STREAM, Deleted, Purge, create_tables, held_bytes, open_keeping
from actors.store import StoreError, Value, check_state, connect, sqlite_path

NAME = "specfleet-request-log"
SLOWEST = 10.0  # seconds between tries at most
PATIENCE = 5.0  # seconds that a purge waits for what is to be written before it
AGING = 600.0  # seconds in which nothing came after which retention is looked at all the same, at least


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request.

    created: seconds since the epoch; key: name of the API key; prompt, output: token ids; sampling: its sampling parameters; steps:
    decoding steps; drafted, accepted: draft tokens proposed and kept; seconds: from arrival to the last token; tag: its domain, "" where
    none was given.
    """

    id: str
    model: str
    created: float
    key: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    seed: int | None
    sampling: dict[str, Any] = field(default_factory=dict)
    finish_reason: str = "stop"
    drafter: str = ""
    speculator_version: str = ""
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    tag: str = ""

    def to_json(self) -> str:
        """The record as one JSON object of its fields."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RequestRecord:
        """The record that `to_json` wrote; fields it does not know are left out."""
        known = {f.name for f in fields(cls)}
        data = {name: value for name, value in json.loads(text).items() if name in known}
        return cls(**data | {"prompt": tuple(data["prompt"]), "output": tuple(data["output"])})


@dataclass(frozen=True, slots=True)
class Retention:
    """What a log keeps: at most `max_records`, in `max_bytes` of its store, and none older than `max_age` seconds (None: no bound)."""

    max_records: int = 1_000_000
    max_age: float | None = None
    max_bytes: int | None = None

    @property
    def every(self) -> float | None:
        """Seconds after which a log to which nothing came is to be looked at; None if nothing in it grows too old."""
        return None if self.max_age is None else max(AGING, self.max_age / 100)


class RequestLog(Protocol):
    """A store of records in order of arrival. Methods raise `StoreError` when it cannot be reached; a failed append may be repeated."""

    def append(self, batch: Sequence[RequestRecord]) -> None:
        """Add records, all or none, and let go of what retention does not keep; that alone where there are no records."""
        ...

    def read(self, after: str = "", count: int = 100) -> list[tuple[str, RequestRecord]]:
        """At most `count` records with their cursors, oldest first, from behind the cursor `after` ('' is the beginning)."""
        ...

    def tail(self, count: int, model: str | None = None) -> list[RequestRecord]:
        """The latest `count` records, oldest first, of one model if named."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


def open_log(url: str, retention: Retention | None = None) -> RequestLog:
    """The log at `sqlite:///path` or `redis://host:port/db`. ValueError for any other URL."""
    check_state(url)
    kept = retention or Retention()
    return SqliteLog(sqlite_path(url), kept) if urlsplit(url).scheme == "sqlite" else RedisLog(url, kept)


class SqliteLog:
    """A table, `requests(seq, id, model, created, record)`: `record` is JSON text, so `sqlite3 FILE` and json_extract read all of it."""

    def __init__(self, path: Path, retention: Retention, clock: Callable[[], float] = time.time) -> None:
        self._lock, self._retention, self._clock = threading.Lock(), retention, clock
        try:
            self._db = connect(path)
            create_tables(self._db)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from error

    def append(self, batch: Sequence[RequestRecord]) -> None:
        rows = [(r.id, r.model, r.created, r.to_json()) for r in batch]
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO requests (id, model, created, record) VALUES (?, ?, ?, ?)", rows)
            db.execute("DELETE FROM requests WHERE seq <= (SELECT MAX(seq) FROM requests) - ?", (self._retention.max_records,))
            if self._retention.max_age is not None:
                db.execute("DELETE FROM requests WHERE created < ?", (self._clock() - self._retention.max_age,))
            if self._retention.max_bytes is not None:
                shrink(db, self._retention.max_bytes, max(len(rows), 1))

    def read(self, after: str = "", count: int = 100) -> list[tuple[str, RequestRecord]]:
        with self._transaction() as db:
            rows = db.execute("SELECT seq, record FROM requests WHERE seq > ? ORDER BY seq LIMIT ?", (int(after or 0), count)).fetchall()
        return [(str(seq), RequestRecord.from_json(record)) for seq, record in rows]

    def tail(self, count: int, model: str | None = None) -> list[RequestRecord]:
        where, values = ("", ()) if model is None else ("WHERE model = ?", (model,))
        with self._transaction() as db:
            rows = db.execute(f"SELECT record FROM requests {where} ORDER BY seq DESC LIMIT ?", (*values, count)).fetchall()
        return [RequestRecord.from_json(record) for (record,) in reversed(rows)]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise StoreError(str(error)) from error


def shrink(db: sqlite3.Connection, max_bytes: int, count: int) -> None:
    """Delete the oldest `count` records, then twice as many and so on, until the rest takes no more than so many bytes."""
    oldest = "DELETE FROM requests WHERE seq IN (SELECT seq FROM requests ORDER BY seq LIMIT ?)"
    while held_bytes(db) > max_bytes and db.execute(oldest, (count,)).rowcount:
        count *= 2


class RedisLog:
    """One stream, `specfleet:requests`; an entry has the fields `id`, `model` and `record` (the record as JSON text).

    Number and bytes are approximate: the stream is trimmed by whole nodes (MAXLEN ~), so it may hold a few records more. Age is exact, and
    counts from when a record was written. A batch whose answer was lost may be written twice; readers can tell by `id`.
    """

    def __init__(self, url: str, retention: Retention, clock: Callable[[], float] = time.time, stream: str = STREAM) -> None:
        self._retention, self._clock, self._stream = retention, clock, stream
        self._redis = redis.Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=3)

    def append(self, batch: Sequence[RequestRecord]) -> None:
        pipe = self._redis.pipeline(transaction=True)
        for r in batch:
            entry: dict[Any, Any] = {"id": r.id, "model": r.model, "record": r.to_json()}
            pipe.xadd(self._stream, entry, maxlen=self._retention.max_records, approximate=True)
        if self._retention.max_age is not None:
            oldest = int((self._clock() - self._retention.max_age) * 1000)
            pipe.xtrim(self._stream, minid=f"{max(oldest, 0)}-0", approximate=False)
        self._call(pipe.execute)
        if self._retention.max_bytes is not None:
            self._call(partial(self._shrink, self._retention.max_bytes))

    def read(self, after: str = "", count: int = 100) -> list[tuple[str, RequestRecord]]:
        start = f"({after}" if after else "-"
        entries = self._call(lambda: self._redis.xrange(self._stream, min=start, count=count))
        return [(cursor, RequestRecord.from_json(entry["record"])) for cursor, entry in entries]

    def tail(self, count: int, model: str | None = None) -> list[RequestRecord]:
        found: list[RequestRecord] = []
        last = "+"
        while len(found) < count:
            page = self._page(last, max(count, 100))
            found.extend(RequestRecord.from_json(e["record"]) for _, e in page if model is None or e["model"] == model)
            if not page:
                break
            last = f"({page[-1][0]}"
        return found[:count][::-1]

    def close(self) -> None:
        self._redis.close()

    def _shrink(self, max_bytes: int) -> None:
        """Keep as many of the latest entries as so many bytes hold, going by what an entry takes on average."""
        held = self._redis.memory_usage(self._stream) or 0
        if held > max_bytes:
            self._redis.xtrim(self._stream, maxlen=int(self._redis.xlen(self._stream) * max_bytes / held), approximate=True)

    def _page(self, last: str, count: int) -> list[tuple[str, dict[str, str]]]:
        page: list[tuple[str, dict[str, str]]] = self._call(lambda: self._redis.xrevrange(self._stream, max=last, count=count))
        return page

    def _call(self, command: Callable[[], Any]) -> Any:
        try:
            return command()
        except (redis.RedisError, OSError) as error:
            raise StoreError(str(error)) from error


@dataclass(frozen=True, slots=True)
class LogStats:
    """written: records in the store; dropped: records lost to a full queue or at closing; failed: writes that failed; queued: waiting."""

    written: int
    dropped: int
    failed: int
    queued: int


class LogWriter:
    """A bounded queue and one thread that writes it to a log in batches.

    The log is opened by the thread and opened again after a failure, with back-off; meanwhile the queue fills and the oldest records go. A
    record that no store can take is dropped alone.
    """

    def __init__(
        self,
        opener: Callable[[], RequestLog],
        capacity: int = 10_000,
        batch: int = 256,
        backoff: float = 0.2,
        every: float | None = None,
    ) -> None:
        """every: seconds without a record after which an empty batch is written, for the log's retention; None for never."""
        self._open, self._capacity, self._batch, self._backoff, self._every = opener, capacity, batch, backoff, every
        self._queue: deque[RequestRecord] = deque()
        self._flying: list[RequestRecord] = []
        self._change = threading.Condition()
        self._closing = False
        self._written = self._dropped = self._failed = 0
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def offer(self, *records: RequestRecord) -> None:
        """Take records to write; never waits for the store and never raises. When the queue is full the oldest records are dropped."""
        with self._change:
            if self._closing:
                self._dropped += len(records)
                return
            self._queue += records
            self._trim()
            self._change.notify_all()

    def stats(self) -> LogStats:
        """Counts since this writer was made."""
        with self._change:
            return LogStats(self._written, self._dropped, self._failed, len(self._queue) + len(self._flying))

    def flush(self, timeout: float) -> bool:
        """Wait until all that was offered is written or dropped; False if that took longer than `timeout` seconds."""
        with self._change:
            target = self._written + self._dropped + len(self._queue) + len(self._flying)
            return self._change.wait_for(lambda: self._written + self._dropped >= target, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Write what is queued, one last try if the store fails, then stop; what is left is counted as dropped."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout)

    def _work(self) -> None:
        log: RequestLog | None = None
        delay, size = self._backoff, self._batch
        while self._take(size):
            try:
                log = log or self._open()
                log.append(self._flying)
                self._settle(written=True)
                delay, size = self._backoff, min(2 * size, self._batch)
            except StoreError:
                _discard(log)
                log = None
                self._postpone(delay)
                delay = min(2 * delay, SLOWEST)
            except Exception:  # a record that cannot be written, in a batch of others
                size = self._refuse()
        _discard(log)

    def _refuse(self) -> int:
        """A record cannot be written: drop it if it stands alone, else put the batch back. Returns the size of the next batch."""
        if len(self._flying) == 1:
            self._settle(written=False)
            return 1
        self._postpone(0)
        return 1

    def _take(self, size: int) -> bool:
        """Take the next records from the queue, waiting for some, and none where none come for long; False when closing and done."""
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closing, self._every)
            self._flying = [self._queue.popleft() for _ in range(min(size, len(self._queue)))]
            return bool(self._flying) or not self._closing

    def _settle(self, written: bool) -> None:
        with self._change:
            self._written += len(self._flying) if written else 0
            self._dropped += 0 if written else len(self._flying)
            self._failed += 0 if written else 1
            self._flying = []
            self._change.notify_all()

    def _postpone(self, delay: float) -> None:
        """Count the failure, put the records back and wait; when closing, give up on all of them."""
        with self._change:
            self._failed += 1
            self._queue.extendleft(reversed(self._flying))
            self._flying = []
            self._trim()
            if self._closing and delay:
                self._dropped += len(self._queue)
                self._queue.clear()
            self._change.notify_all()
            self._change.wait_for(lambda: self._closing, delay)

    def _trim(self) -> None:
        while len(self._queue) > self._capacity:
            self._queue.popleft()
            self._dropped += 1


def _discard(log: RequestLog | None) -> None:
    if log is not None:
        with contextlib.suppress(Exception):
            log.close()


class RequestLogActor:
    """The Ray actor's body: owns the writer of one log. Make it with `start_request_log`."""

    def __init__(
        self,
        url: str,
        max_records: int = 1_000_000,
        max_age: float | None = None,
        max_bytes: int | None = None,
        capacity: int = 10_000,
    ) -> None:
        def opener() -> RequestLog:
            return open_log(url, kept)

        check_state(url)
        kept = Retention(max_records, max_age, max_bytes)
        self._url, self._opener, self._writer = url, opener, LogWriter(opener, capacity, every=kept.every)
        self._lost: dict[str, int] = {}

    async def append(self, records: Iterable[RequestRecord], lost: int = 0, source: str = "") -> None:
        """Queue finished records; callers need not wait for the answer, and batches sent at the same time may change places.

        lost: records that the source, a name of its own, has lost so far for want of room; a count that is told twice counts once.
        """
        self._lost[source] = max(lost, self._lost.get(source, 0))
        self._writer.offer(*records)

    async def stats(self) -> dict[str, int]:
        """Counts of the writer: written, dropped, failed, queued; and lost: records that never came here, as their sources tell."""
        return asdict(self._writer.stats()) | {"lost": sum(self._lost.values())}

    async def tail(self, n: int, model: str | None = None) -> list[RequestRecord]:
        """The latest n records in the store, oldest first."""
        return await asyncio.to_thread(self._tail, n, model)

    async def flush(self, timeout: float = 5.0) -> bool:
        """Wait until what was appended is written or dropped; False if that took longer."""
        return await asyncio.to_thread(self._writer.flush, timeout)

    async def contents(self) -> Value:
        """What the store holds: `Contents` as JSON. StoreError."""
        return await asyncio.to_thread(self._contents)

    async def purge(self, purge: Purge) -> Deleted:
        """Delete records, with those that came before this call and are not written yet. StoreError."""
        return await asyncio.to_thread(self._purge, purge)

    async def purges(self) -> list[Value]:
        """Every purge, oldest first. StoreError."""
        return await asyncio.to_thread(self._purges)

    async def close(self) -> None:
        """Write what is queued and stop."""
        await asyncio.to_thread(self._writer.close)

    def _tail(self, n: int, model: str | None) -> list[RequestRecord]:
        with contextlib.closing(self._opener()) as log:
            return log.tail(n, model)

    def _contents(self) -> Value:
        with contextlib.closing(open_keeping(self._url)) as keeping:
            return keeping.contents().to_json()

    def _purge(self, purge: Purge) -> Deleted:
        if not self._writer.flush(PATIENCE):
            raise StoreError(f"records could not be written within {PATIENCE:g} s, so they could not be purged either")
        with contextlib.closing(open_keeping(self._url)) as keeping:
            return keeping.purge(purge)

    def _purges(self) -> list[Value]:
        with contextlib.closing(open_keeping(self._url)) as keeping:
            return keeping.purges()


def start_request_log(url: str, name: str = NAME, namespace: str = "specfleet", **settings: Any) -> Any:
    """The handle of the named request log actor, started if there is none; it is restarted whenever it dies.

    settings: `max_records`, `max_age` (seconds), `max_bytes`, `capacity` (records queued). ValueError if the URL names no store.
    """
    check_state(url)
    actor = ray.remote(RequestLogActor).options(
        name=name, namespace=namespace, get_if_exists=True, lifetime="detached", max_restarts=-1, max_task_retries=0, num_cpus=0.01
    )
    return actor.remote(url, **settings)
