"""The load generator by itself: lengths, prompts, arrivals, and what it makes of another server's answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st

from services.cli.bench_summary import percentiles
from services.cli.load_lengths import Fixed, Lognormal, Uniform, lengths
from services.cli.load_loops import arrivals, closed, opened
from services.cli.load_outcome import Outcome, outcome, shares
from services.cli.load_prompts import BETWEEN, Fit, cut, fitted
from services.cli.load_stream import Exchange, Streams, ask, patience
from services.cli.problem import Problem
from tests.cli.conftest import Result, Shell
from tests.conftest import wait_until

TEXTS = ["def f(x):\n    return x", "class A:\n    pass", "import os"]


def test_lengths_are_parsed() -> None:
    found = [lengths("--x", text) for text in ("64", "1-1", "8-32", "lognormal:200,0.5", "lognormal:9,0")]
    assert found == [Fixed(64), Uniform(1, 1), Uniform(8, 32), Lognormal(200, 0.5), Lognormal(9, 0.0)]
    assert [str(entry) for entry in found] == ["64", "1-1", "8-32", "lognormal:200,0.5", "lognormal:9,0"]


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "9-3", "0-4", "1.5", "9999999", "lognormal:", "lognormal:0,1", "lognormal:5", "lognormal:5,9", "normal:5,1", "file"],
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(Problem) as caught:
        lengths("--max-tokens", text)
    assert str(caught.value).startswith(f"--max-tokens: {text!r} is no length; accepted are N, LOW-HIGH or lognormal:MEDIAN,SIGMA")


def test_lengths_are_drawn_from_their_distribution() -> None:
    random = Random(5)
    assert {Fixed(7).draw(random) for _ in range(9)} == {7}
    assert {Uniform(3, 5).draw(random) for _ in range(99)} == {3, 4, 5}
    drawn = [Lognormal(200, 0.5).draw(random) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(200, rel=0.05) and sum(d > 200 * 2.718**0.5 for d in drawn) / 4000 == pytest.approx(
        0.16, abs=0.02
    )
    assert min(Lognormal(1, 5.0).draw(random) for _ in range(99)) == 1


def test_characters_follow_the_servers_count() -> None:
    fit = fitted((20, 15), (2020, 515))
    assert fit == Fit(4.0, 10.0, True) and fit.characters(110) == 400 and fit.characters(2) == 1
    assert fitted((20, None), (2020, None)) == Fit() == fitted((20, 5), (2020, 5)) and not Fit().measured


@given(characters=st.integers(1, 500), seed=st.integers(0, 99))
def test_prompts_are_cut_to_length_from_the_texts(characters: int, seed: int) -> None:
    ring = BETWEEN.join(TEXTS) + BETWEEN
    prompt = cut(TEXTS, characters, Random(seed))
    assert len(prompt) == characters and not prompt[0].isspace() and prompt in ring * (2 + characters // len(ring))


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    times = arrivals(20.0, "a", seconds=200.0)
    assert times == arrivals(20.0, "a", seconds=200.0) != arrivals(20.0, "b", seconds=200.0)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) == pytest.approx(4000, rel=0.05) and statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)
    assert arrivals(20.0, "a", requests=5) == times[:5] == arrivals(20.0, "a", requests=5, seconds=200.0) and times[-1] < 200


def test_percentiles_are_nearest_rank_and_may_be_weighted() -> None:
    assert percentiles([value / 1000 for value in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([0.003]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0} and percentiles([]) == {}
    assert percentiles([0.001, 0.01], [9.0, 1.0]) == {"p50": 1.0, "p90": 1.0, "p99": 10.0}


def test_tokens_of_chunks() -> None:
    def three(*counts: int | None) -> list[tuple[float, str, int | None]]:
        return [(0.0, text, count) for text, count in zip(("a", "bb", "c"), counts, strict=True)]

    assert shares(three(1, 4, 5), 5) == [1.0, 3.0, 1.0], "as the server counts along"
    assert shares(three(None, None, None), 3) == [1.0] * 3 == shares(three(None, None, None), 4), "the last token may have no text"
    assert shares(three(None, None, None), 8) == [2.0, 4.0, 2.0], "by characters"
    assert shares([], 0) == []


def read(*reads: tuple[float, str], status: int = 200) -> Outcome:
    return outcome(Exchange(0, 1.0, 1.5, 9.0, status, tuple((at, text.encode()) for at, text in reads)))


def test_events_may_be_cut_anywhere() -> None:
    stream = 'data: {"choices":[{"text":"é"}]}\r\n\r\n: remark\n\ndata: {"choices":[{"text":"b","finish_reason":"stop"}]}\n\n'
    found = outcome(Exchange(0, 1.0, 1.5, 9.0, 200, tuple((2.0 + at, bytes([byte])) for at, byte in enumerate(stream.encode()))))
    assert found.text == "éb" and found.tokens == 2 and not found.counted and found.failure is None
    assert found.first == found.chunks[0].at - 1.0 and found.gaps()[0][0] > 0 and (found.total, found.late) == (8.0, 0.5)


def test_what_arrives_at_once_is_one_chunk() -> None:
    word = 'data: {"choices":[{"text":"a"}]}\n\n'
    usage = 'data: {"choices":[],"usage":{"completion_tokens":5}}\n\ndata: [DONE]\n\n'
    found = read((2.0, word), (3.0, word + word), (3.0005, word), (3.5, word), (3.6, usage))
    assert [(chunk.at, chunk.tokens) for chunk in found.chunks] == [(2.0, 1.0), (3.0, 3.0), (3.5, 1.0)]
    assert found.gaps() == [(1.0, 3.0), (0.5, 1.0)] and found.tokens == 5 and found.counted


def test_what_goes_wrong_has_a_name() -> None:
    text = 'data: {"choices":[{"text":"a"}]}\n\n'
    assert read((2.0, text)).failure == "cut"
    assert read((2.0, text), (3.0, 'data: {"error":{"message":"Oh.","status":500}}\n\n')).failure == "stream 500"
    assert read((2.0, '{"error": {"message": "Busy."}}'), status=429).message == "Busy."
    assert read((2.0, '{"detail": "No."}'), status=422).message == "No." and read((2.0, "<html>"), status=502).message == "<html>"
    assert read((2.0, "data: nonsense\n\n")).failure == "unreadable"


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 1.0), ("0.5", 0.5), ("3600", 5.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0), ("-1", 0.0)]
)
def test_patience_with_a_full_server(header: str | None, seconds: float) -> None:
    assert patience(header) == seconds


@dataclass
class Peer:
    """A server that speaks OpenAI's streams and is no Specfleet. refuses: fields it answers 400 to; stall: seconds that all of it stands
    still, from the first request on, as a busy engine does."""

    refuses: tuple[str, ...] = ()
    counts: bool = True
    lists: bool = True
    stall: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    began: float = 0.0
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Response:
            return JSONResponse(
                {"data": [{"id": "other", "object": "model", "owned_by": "them", "max_model_len": 4096}]}, 200 if self.lists else 404
            )

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def answer(request: Request) -> Response:
            body = await request.json()
            self.bodies.append({**body, "path": request.url.path})
            if wrong := [name for name in self.refuses if name in body]:
                return JSONResponse({"error": {"message": f"Unknown field {wrong[0]}."}}, 400)
            self.began = self.began or time.perf_counter()
            await asyncio.sleep(max(0.0, self.began + self.stall - time.perf_counter()))
            return StreamingResponse(self.events(body), media_type="text/event-stream")

        return app

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for index in range(body["max_tokens"]):
            await asyncio.sleep(0.001)
            choice = {"delta": {"content": f" w{index}"}} if "messages" in body else {"text": f" w{index}"}
            yield f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"
        characters = len(body["messages"][0]["content"] if "messages" in body else body["prompt"])
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": 10 + characters // 4}
        if self.counts and "stream_options" in body:
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


@contextmanager
def serving(peer: Peer) -> Iterator[Peer]:
    server = uvicorn.Server(uvicorn.Config(peer.app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    peer.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield peer
    server.should_exit = True
    thread.join(10)


def bench(peer: Peer, *arguments: str) -> Result:
    return Shell(peer.url)("bench", *arguments, "--rounds", "1", "--warm-up", "0", key=None)


def summary(done: Result) -> dict[str, Any]:
    assert done.code == 0, done.err
    (entry,) = json.loads(done.out)["summary"]
    return entry


def test_a_peer_is_found_out_and_gets_plain_bodies() -> None:
    with serving(Peer()) as peer:
        entry = summary(bench(peer, "-c", "4", "--requests", "8", "--max-tokens", "6", "--json"))
    assert (entry["mode"], entry["requests"], entry["output_tokens"], entry["tokens_counted_by"]) == ("server", 8, 6.0, "usage")
    assert entry["tokens_per_step"] is None and entry["against_off"] is None and entry["same_text"] is None
    plain = {"model", "prompt", "max_tokens", "temperature", "seed", "stream", "stream_options", "path"}
    assert all(set(body) == plain and body["path"] == "/v1/completions" for body in peer.bodies)


def test_a_peer_may_be_asked_to_chat_and_go_on_past_the_end() -> None:
    with serving(Peer()) as peer:
        summary(bench(peer, "-c", "1", "--requests", "2", "--endpoint", "chat", "--ignore-eos", "--json"))
    assert all(
        body["path"] == "/v1/chat/completions" and body["ignore_eos"] and body["messages"][0]["role"] == "user" for body in peer.bodies
    )


def test_fields_that_a_peer_refuses_are_left_out_with_a_note() -> None:
    with serving(Peer(refuses=("ignore_eos", "stream_options"))) as peer:
        done = bench(peer, "-c", "1", "--requests", "3", "--ignore-eos", "--max-tokens", "5")
        assert "other does not take ignore_eos, stream_options; they were left out." in done.err
        assert "each event with text counts as one" in done.err and done.code == 0
    assert "seed" in peer.bodies[-1] and "ignore_eos" not in peer.bodies[-1]


def test_prompts_of_a_wanted_length_by_the_peers_own_count() -> None:
    with serving(Peer()) as peer:
        entry = summary(bench(peer, "-c", "1", "--requests", "6", "--prompt-tokens", "300", "--max-tokens", "2", "--json"))
    assert entry["prompt_tokens"] == pytest.approx(300, abs=1)


def test_a_peer_that_does_not_list_its_models() -> None:
    with serving(Peer(lists=False)) as peer:
        done = bench(peer, "-c", "1")
        assert done.code == 1 and "does not list its models; name those to measure" in done.err
        assert bench(peer, "mine", "-c", "1", "--requests", "1").code == 0 and peer.bodies[-1]["model"] == "mine"


def test_an_address_may_end_in_v1() -> None:
    with serving(Peer()) as peer:
        peer.url += "/v1/"
        assert bench(peer, "-c", "1", "--requests", "1").code == 0


def driven(peer: Peer, drive: Callable[[Streams], Any]) -> list[Outcome]:
    async def run() -> list[Exchange]:
        async with Streams(peer.url) as streams:
            return await drive(streams)

    return [outcome(exchange) for exchange in asyncio.run(run())]


def test_a_stall_is_felt_by_all_who_would_have_come_in_it() -> None:
    """The server stands still for half a second; requests that were due meanwhile wait for the rest of it, as users would have."""
    asks = [ask(index, "/v1/completions", {"prompt": "x", "max_tokens": 1}) for index in range(10)]
    times = [0.05 * index for index in range(10)]
    with serving(Peer(stall=0.5)) as peer:
        found = driven(peer, lambda streams: opened(streams, asks, times))
    waits = [entry.first for entry in found]
    assert all(wait is not None and wait == pytest.approx(0.5 - due, abs=0.2) for wait, due in zip(waits, times, strict=True))
    assert sum(wait > 0.2 for wait in waits if wait is not None) >= 4 and [entry.due for entry in found] == times


def test_latency_counts_from_when_a_request_was_due_though_the_client_was_late() -> None:
    async def drive(streams: Streams) -> list[Exchange]:
        work = asyncio.ensure_future(opened(streams, [ask(0, "/v1/completions", {"prompt": "x", "max_tokens": 1})], [0.05]))
        await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251 - the client itself is held up
        return await work

    with serving(Peer()) as peer:
        (found,) = driven(peer, drive)
    assert found.first is not None and found.first > 0.24 and found.late > 0.24 and found.due == 0.05


def test_a_closed_loop_has_as_many_requests_at_once_as_users() -> None:
    asks = [ask(index, "/v1/completions", {"prompt": "x", "max_tokens": 20}) for index in range(9)]
    with serving(Peer()) as peer:
        found = driven(peer, lambda streams: closed(streams, asks, 3))
    edges = sorted([(entry.sent, 1) for entry in found] + [(entry.end, -1) for entry in found])
    running = [sum(step for _, step in edges[: count + 1]) for count in range(len(edges))]
    assert max(running) == 3 and [entry.index for entry in found] == list(range(9)) and all(entry.due <= entry.sent for entry in found)


def test_a_closed_loop_of_some_seconds_waits_for_what_is_in_flight() -> None:
    asks = (ask(index, "/v1/completions", {"prompt": "x", "max_tokens": 40}) for index in range(10**6))
    with serving(Peer()) as peer:
        found = driven(peer, lambda streams: closed(streams, asks, 2, seconds=0.3))
    assert all(entry.failure is None and entry.tokens == 40 for entry in found) and max(entry.sent for entry in found) < 0.3
    assert max(entry.end for entry in found) > 0.3


def test_nobody_there_is_a_failure_and_no_exception() -> None:
    (found,) = driven(Peer(url="http://127.0.0.1:9"), lambda streams: closed(streams, [ask(0, "/v1/completions", {})], 1))
    assert found.failure == "connection" and found.message
