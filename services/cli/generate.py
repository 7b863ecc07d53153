"""`specfleet generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from services.cli import options
from services.cli.client import URL, Client, Json
from services.cli.generation import PATHS, Answer, Kind, Options, body, model_kind, streamed, whole
from services.cli.problem import Problem
from services.cli.screen import emit, emit_json, remark


def generate(
    model: Annotated[str, typer.Argument(help="A served model; `specfleet status` lists them.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    speculation: options.Speculation = None,
    depth: options.Depth = None,
    width: options.Width = None,
    tag: options.Tag = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, also with a chat model.")] = False,
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes.", show_default="--stream")] = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Answer one prompt. A chat model gets it as the user's message, any other model continues it."""
    wanted = Options(max_tokens, temperature, top_p, seed, tuple(stop or ()), speculation, depth, width, tag)
    with Client(url, key) as client:
        kind: Kind = "completion" if raw else model_kind(client, model)
        request = body(kind, model, given(prompt), wanted)
        if as_json:
            print_json(client, kind, request, bool(stream))
        else:
            print_text(client, kind, request, stream is not False)


def given(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise Problem("The prompt is empty.")
    return text


def print_json(client: Client, kind: Kind, request: Json, stream: bool) -> None:
    """The server's own JSON: one object, or one chunk a line."""
    if not stream:
        emit_json(client.send("POST", PATHS[kind], request))
        return
    for chunk in client.stream(PATHS[kind], {**request, "stream_options": {"include_usage": True}}):
        emit(json.dumps(chunk, ensure_ascii=False) + "\n")


def print_text(client: Client, kind: Kind, request: Json, stream: bool) -> None:
    answer = streamed(client, kind, request, emit) if stream else shown(whole(client, kind, request))
    emit("\n")
    remark(answer.summary())


def shown(answer: Answer) -> Answer:
    emit(answer.text)
    return answer
