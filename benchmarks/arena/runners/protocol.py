"""How the driver and a runner talk: a line of JSON in, a line of JSON out.

A runner is started with its settings as one JSON argument, loads, says that it is ready, and answers commands until its input ends. What
libraries print goes to standard error. Imports the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a runner is started with.

    model: the folder or file in the peer's own format. setting: how the peer is set up (plain, lookup, draft ...). draft: a small model
    in the same format, for the setting that needs one. requests: how many there will be at once at most. longest: prompt and answer.
    extra: what only this peer needs.
    """

    model: str
    setting: str
    threads: int
    requests: int
    longest: int
    draft: str
    extra: dict[str, Any]


Generate = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
"""Prompts, new tokens of each -> the new tokens of each. All prompts are there at once; greedy; the end of text is not an end."""


def serve(load: Callable[[Settings], tuple[Generate, Mapping[str, str]]]) -> None:
    """Load, then answer. `load` returns what generates and the versions of what does it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    generate, versions = load(Settings(**json.loads(sys.argv[1])))
    say(answers, {"ready": True, "seconds": time.perf_counter() - started, "versions": dict(versions), "pid": os.getpid()})
    for line in sys.stdin:
        say(answers, answer(generate, json.loads(line)))


def answer(generate: Generate, command: Mapping[str, Any]) -> dict[str, Any]:
    """One command's tokens and the seconds from handing in all prompts to having all tokens."""
    try:
        started = time.perf_counter()
        tokens = generate(command["prompts"], command["max_tokens"])
        seconds = time.perf_counter() - started
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seconds": seconds, "tokens": [[int(t) for t in text] for text in tokens]}


def say(answers: Any, what: Mapping[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)
