"""A running service over HTTP, with OpenAI's shapes as plain mappings. Every trouble is a Problem in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import httpx

from services.cli.problem import Problem

Json = dict[str, Any]

URL = "http://127.0.0.1:8000"
TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; a long answer may take minutes, a connection may not


class Refused(Problem):
    """The service answered with an error: its message, and `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One connection pool to one service. Raises Problem for a service that is away, Refused for an error answer."""

    def __init__(self, url: str = URL, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=authorization(key), timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str) -> Json:
        return self.send("GET", path)

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Json:
        """The answer's JSON object."""
        with self._explained():
            response = self._http.request(method, path, json=body)
        check(response)
        return decoded(response)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Json]:
        """The server-sent events of a streamed answer, decoded, up to [DONE]. An error within the stream is raised as Refused."""
        with self._explained(), self._http.stream("POST", path, json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
            check(response)
            yield from events(response.iter_lines())

    def models(self) -> list[Json]:
        """The entries of /v1/models."""
        return list(self.get("/v1/models")["data"])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise Problem(f"No service answers at {self.url}. Start one with: specfleet serve") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Problem(f"{self.url}: {error or type(error).__name__}") from None


def query(terms: Mapping[str, Any]) -> str:
    """The terms that are given, behind a question mark; empty if none is."""
    given = {name: value for name, value in terms.items() if value not in (None, "")}
    return f"?{urlencode(given)}" if given else ""


def authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def check(response: httpx.Response) -> None:
    """Raises Refused, in the server's own words, for an error answer."""
    if response.is_error:
        raise Refused(response.status_code, message(response))


def message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}: {response.text[:200]}".strip(": ")


def decoded(response: httpx.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        raise Problem(f"{response.url} did not answer with JSON; is it a Specfleet service?") from None
    return body if isinstance(body, dict) else {"data": body}


def events(lines: Iterator[str]) -> Iterator[Json]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if error := chunk.get("error"):
            raise Refused(int(error.get("status") or 500), str(error.get("message")))
        yield chunk
