"""Durable state of the actors: values by key and append-only streams, in SQLite or Redis, chosen by URL."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import redis

log = logging.getLogger(__name__)
Value = dict[str, Any]
BUSY_S = 10.0  # seconds that one who needs an SQLite file waits for others


class StateStore(Protocol):
    """Values are JSON objects. Every method raises `StoreError` when the store cannot be reached, `Unreadable` for what is none."""

    def get(self, key: str) -> Value | None:
        """The value last put, None if there is none."""
        ...

    def put(self, key: str, value: Value) -> None:
        """Replace the value; durable when this returns."""
        ...

    def append(self, stream: str, entry: Value) -> None:
        """Add to the end of a stream; durable when this returns."""
        ...

    def entries(self, stream: str, count: int | None = None, damaged: Value | None = None) -> list[Value]:
        """The latest `count` entries (all if None), oldest first. damaged: what takes the place of one that cannot be read."""
        ...


class StoreError(Exception):
    """The state store could not be read or written."""


class Unreadable(StoreError):
    """What the state store holds there is no JSON object."""


def read(text: bytes, name: str, damaged: Value | None = None) -> Value:
    """The JSON object of a key or stream; `damaged`, if given, and a line in the log, or else Unreadable, if it is none."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
        problem = f"a JSON object was expected, not {type(found).__name__}"
    except (ValueError, TypeError, RecursionError) as error:
        problem = str(error)
    if damaged is None:
        raise Unreadable(f"{name}: {problem}")
    log.warning("%s holds an entry that cannot be read: %s", name, problem)
    return damaged


def open_state(url: str) -> StateStore:
    """The store at `sqlite:///relative/path`, `sqlite:////absolute/path` or `redis://host:port/db`. ValueError for any other URL."""
    check_state(url)
    return SqliteState(sqlite_path(url)) if urlsplit(url).scheme == "sqlite" else RedisState(url)


def check_state(url: str) -> None:
    """ValueError if the URL names no store."""
    scheme = urlsplit(url).scheme
    if scheme not in ("sqlite", "redis", "rediss"):
        raise ValueError(f"no store for {url!r}: use sqlite:///path or redis://host:port/db")
    if scheme == "sqlite":
        sqlite_path(url)


def sqlite_path(url: str) -> Path:
    """The file of an SQLite URL: three slashes and a relative path, or four and an absolute one. ValueError if it names none."""
    parts = urlsplit(url)
    path = unquote(parts.path)[1:]
    if parts.netloc or not path:
        raise ValueError(f"{url!r} names no file: use sqlite:///relative/path or sqlite:////absolute/path")
    return Path(path)


def connect(path: Path, patience: float = BUSY_S) -> sqlite3.Connection:
    """A connection that several threads may share under a lock, in WAL mode, so that readers never wait for the writer.

    patience: seconds that it waits for other connections.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


class SqliteState:
    """Two tables, `state(key, value)` and `stream(id, name, entry)`, of JSON text."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = connect(path)
            self._db.execute("PRAGMA synchronous=FULL")  # every change is on the disk when it is answered, whatever the power does then
            self._db.text_factory = bytes  # what is damaged may not be text
            self._db.execute("CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute("CREATE TABLE IF NOT EXISTS stream (id INTEGER PRIMARY KEY, name TEXT NOT NULL, entry TEXT NOT NULL)")
            self._db.execute("CREATE INDEX IF NOT EXISTS stream_name ON stream (name, id)")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from error

    def get(self, key: str) -> Value | None:
        rows = self._run("SELECT value FROM state WHERE key = ?", key)
        return read(rows[0][0], key) if rows else None

    def put(self, key: str, value: Value) -> None:
        self._run("INSERT INTO state VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, json.dumps(value))

    def append(self, stream: str, entry: Value) -> None:
        self._run("INSERT INTO stream (name, entry) VALUES (?, ?)", stream, json.dumps(entry))

    def entries(self, stream: str, count: int | None = None, damaged: Value | None = None) -> list[Value]:
        rows = self._run("SELECT entry FROM stream WHERE name = ? ORDER BY id DESC LIMIT ?", stream, -1 if count is None else count)
        return [read(entry, stream, damaged) for (entry,) in reversed(rows)]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _run(self, sql: str, *values: object) -> list[Any]:
        try:
            with self._lock:
                return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error


class RedisState:
    """Strings under `specfleet:state:<key>`, lists under `specfleet:stream:<name>`, of JSON text."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3)

    def get(self, key: str) -> Value | None:
        text = self._call("GET", f"specfleet:state:{key}")
        return None if text is None else read(text, key)

    def put(self, key: str, value: Value) -> None:
        self._call("SET", f"specfleet:state:{key}", json.dumps(value))

    def append(self, stream: str, entry: Value) -> None:
        self._call("RPUSH", f"specfleet:stream:{stream}", json.dumps(entry))

    def entries(self, stream: str, count: int | None = None, damaged: Value | None = None) -> list[Value]:
        if count is not None and count <= 0:
            return []
        texts = self._call("LRANGE", f"specfleet:stream:{stream}", 0 if count is None else -count, -1)
        return [read(text, stream, damaged) for text in texts]

    def close(self) -> None:
        self._redis.close()

    def _call(self, *command: object) -> Any:
        try:
            return self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
        except (redis.RedisError, OSError) as error:
            raise StoreError(str(error)) from error
