"""What the prefix cache is worth in conversations, and that speculation takes nothing from it:
`python benchmarks/prefix_cache.py --out benchmarks/results/prefix-cache.json`.

Each mode of speculation gets a service of its own with an empty cache, and holds the same conversations one after the other. Every
turn is asked twice: as the conversation goes on, and again with a first message that nobody has sent before, so that not one block of
it is cached. The time to the first token of the one against the other is what the cache saves. Cached tokens are those that
`usage.prompt_tokens_details` counts; reusable are the tokens of the turn before, prompt and answer, which the cache can hold. A mode
that hits fewer cached tokens than `off` at any turn, or says another text, ends the command with exit code 1.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import typer

from services.cli.bench_service import serving_one
from services.cli.bench_target import MODES, Mode
from services.cli.generation import Options, body
from services.cli.load_outcome import Outcome, digest, outcome
from services.cli.load_stream import Streams, ask
from services.cli.machine import machine

PROMPTS = Path(__file__).resolve().parent / "prompts.json"
PATH = "/v1/chat/completions"
DEPTH = 3
WARMING = 4  # requests before, uncounted

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one conversation. Times to the first text in milliseconds; tokens as the service counts them."""

    conversation: int
    turn: int
    prompt_tokens: int
    reusable_tokens: int
    cached_tokens: int
    first_ms: float
    uncached_tokens_hit: int
    uncached_first_ms: float
    answer_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is said: so many conversations of so many turns, with answers of at most so many tokens."""

    model: str
    conversations: int
    turns: int
    max_tokens: int
    seed: int

    def questions(self, texts: Sequence[str], conversation: int) -> list[str]:
        """What the user says, turn by turn."""
        return [texts[(conversation + turn) % len(texts)] for turn in range(self.turns)]

    def options(self, mode: Mode, conversation: int, turn: int) -> Options:
        seed = self.seed + 1000 * conversation + turn
        depth = DEPTH if mode == "fixed" else None
        return Options(max_tokens=self.max_tokens, temperature=0.0, seed=seed, speculation=None if mode == "server" else mode, depth=depth)


def main(
    serve: Annotated[str, typer.Option("--serve", help="Configuration of the service to start.")] = "configs/demo.yaml",
    url: Annotated[str, typer.Option("--url", help="Loopback address to start it at.")] = "http://127.0.0.1:8123",
    model: Annotated[str, typer.Option("--model", help="A chat model of the configuration.")] = "demo-chat",
    conversations: Annotated[int, typer.Option("--conversations", min=1, help="Conversations in each mode.")] = 8,
    turns: Annotated[int, typer.Option("--turns", min=2, help="Turns of each.")] = 12,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Of answers and first messages.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON here; otherwise to standard output.")] = None,
) -> None:
    """Hold the conversations in every mode, each with a fresh service, and compare."""
    plan = Plan(model, conversations, turns, max_tokens, seed)
    found = {mode: held(serve, url, mode, plan) for mode in MODES}
    worse = complaints(found)
    result = {
        "command": ["python", *sys.argv],
        "machine": machine(),
        "settings": asdict(plan) | {"depth": DEPTH},
        "summary": {mode: summary(turns) for mode, turns in found.items()},
        "complaints": worse,
        "turns": {mode: [asdict(turn) for turn in turns] for mode, turns in found.items()},
    }
    written(result, out)
    print(*(f"{mode}: {line(summary(turns))}" for mode, turns in found.items()), *worse, sep="\n", file=sys.stderr)
    raise SystemExit(1 if worse else 0)


def held(config: str, url: str, mode: Mode, plan: Plan) -> list[Turn]:
    """All conversations in one mode, on a service of its own."""
    with serving_one(config, url, plan.model):
        return asyncio.run(conversed(url, mode, plan))


async def conversed(url: str, mode: Mode, plan: Plan) -> list[Turn]:
    texts = list(json.loads(PROMPTS.read_text(encoding="utf-8"))["chat"])
    turns: list[Turn] = []
    async with Streams(url) as streams:
        heads = unique(Random(f"{plan.seed} {mode}"))
        for number in range(WARMING):
            await said(streams, [user(next(heads) + texts[number % len(texts)])], plan, plan.options(mode, 0, 0))
        for conversation in range(plan.conversations):
            turns += await talked(streams, mode, plan, conversation, texts, heads)
    return turns


async def talked(streams: Streams, mode: Mode, plan: Plan, conversation: int, texts: Sequence[str], heads: Iterator[str]) -> list[Turn]:
    """One conversation. Its own first words are the same in every mode; those of the uncached requests are new each time."""
    head = next(unique(Random(f"{plan.seed} conversation {conversation}")))
    questions, messages, turns, reusable = plan.questions(texts, conversation), list[Message](), list[Turn](), 0
    for number, question in enumerate(questions):
        options = plan.options(mode, conversation, number)
        messages.append(user(question if number else head + question))
        answer = await said(streams, messages, plan, options)
        cold = await said(streams, [user(next(heads) + messages[0]["content"][len(head) :]), *messages[1:]], plan, options)
        turns.append(turn(conversation, number, reusable, answer, cold))
        messages.append({"role": "assistant", "content": answer.text})
        reusable = (answer.prompt_tokens or 0) + answer.tokens
    return turns


def turn(conversation: int, number: int, reusable: int, answer: Outcome, cold: Outcome) -> Turn:
    """One turn, asked with the conversation in the cache and without."""
    firsts = [round(1000 * (found.first or found.total), 2) for found in (answer, cold)]
    cached, hit = answer.cached_tokens or 0, cold.cached_tokens or 0
    counts = (answer.prompt_tokens or 0, reusable, cached, firsts[0], hit, firsts[1], answer.tokens)
    return Turn(conversation, number, *counts, digest(answer.text))


def unique(random: Random) -> Iterator[str]:
    """First words that fill more than a block of the cache, all different."""
    while True:
        yield f"[{' '.join(f'{random.randrange(10**6):06d}' for _ in range(4))}] "


def user(text: str) -> Message:
    return {"role": "user", "content": text}


async def said(streams: Streams, messages: Sequence[Message], plan: Plan, options: Options) -> Outcome:
    """The service's answer. SystemExit for a failure."""
    fields = body("chat", plan.model, list(messages), options) | {"stream": True, "stream_options": {"include_usage": True}}
    found = outcome(await streams.send(ask(0, PATH, fields), streams.restart()()))
    if found.failure:
        raise SystemExit(f"{found.failure}: {found.message}")
    return found


def complaints(found: Mapping[Mode, Sequence[Turn]]) -> list[str]:
    """Every turn at which a mode hits fewer cached tokens than without speculation, or says something else."""
    return [
        f"{mode}, conversation {ours.conversation}, turn {ours.turn}: {ours.cached_tokens} cached tokens against {base.cached_tokens}"
        + (", and another text" if ours.text != base.text else "")
        for mode, turns in found.items()
        for ours, base in zip(turns, found["off"], strict=True)
        if ours.cached_tokens < base.cached_tokens or ours.text != base.text
    ]


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Hit rates over all turns; times, medians over the turns after the first, for it has nothing cached."""
    later = [turn for turn in turns if turn.turn]
    cached, prompts, reusable = (
        sum(getattr(turn, name) for turn in turns) for name in ("cached_tokens", "prompt_tokens", "reusable_tokens")
    )
    return {
        "prompt_tokens": prompts,
        "cached_tokens": cached,
        "reusable_tokens": reusable,
        "hit_rate": round(cached / prompts, 4),
        "hit_rate_of_reusable": round(cached / reusable, 4),
        "uncached_tokens_hit": sum(turn.uncached_tokens_hit for turn in turns),
        "first_ms": middle([turn.first_ms for turn in later]),
        "uncached_first_ms": middle([turn.uncached_first_ms for turn in later]),
        "saved_ms": middle([turn.uncached_first_ms - turn.first_ms for turn in later]),
        "by_turn": [by_turn([turn for turn in turns if turn.turn == number]) for number in sorted({turn.turn for turn in turns})],
    }


def by_turn(turns: Sequence[Turn]) -> dict[str, Any]:
    names = ("prompt_tokens", "cached_tokens", "first_ms", "uncached_first_ms")
    return {"turn": turns[0].turn} | {name: middle([getattr(turn, name) for turn in turns]) for name in names}


def middle(values: Sequence[float]) -> float:
    return round(median(values), 2)


def line(found: Mapping[str, Any]) -> str:
    rates = f"{found['hit_rate']:.1%} of prompt tokens cached, {found['hit_rate_of_reusable']:.1%} of the reusable"
    return f"{rates}; first token after {found['first_ms']} ms, uncached {found['uncached_first_ms']} ms"


def written(result: Mapping[str, Any], out: Path | None) -> None:
    text = json.dumps(result, indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
