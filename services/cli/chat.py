"""`specfleet chat`: a conversation in the terminal, with what speculation did after each answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import typer

from services.cli import options
from services.cli.client import URL, Client
from services.cli.generation import Kind, Options, body, model_kind, streamed
from services.cli.problem import Problem
from services.cli.screen import console, emit, remark

HELP = "/model NAME changes the model, /reset forgets the conversation, /quit ends."


@dataclass(slots=True)
class Conversation:
    """What has been said to one model. A model that only completes sees each prompt alone."""

    client: Client
    model: str
    kind: Kind
    options: Options
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Send a turn and show the answer as it comes. A refused turn is taken back."""
        turn = {"role": "user", "content": text}
        prompt = [*self.messages, turn] if self.kind == "chat" else text
        answer = streamed(self.client, self.kind, body(self.kind, self.model, prompt, self.options), emit)
        self.messages += [turn, {"role": "assistant", "content": answer.text}]
        emit("\n")
        remark(answer.summary())

    def switch(self, model: str) -> None:
        self.model, self.kind = model, model_kind(self.client, model)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]


def chat(
    model: Annotated[str | None, typer.Argument(help="A served model; default: the first chat model.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    speculation: options.Speculation = None,
    depth: options.Depth = None,
    width: options.Width = None,
    tag: options.Tag = None,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Talk to a served model. /model NAME changes it, /reset forgets, /quit ends."""
    wanted = Options(max_tokens, temperature, top_p, seed, (), speculation, depth, width, tag)
    with Client(url, key) as client:
        name = model or first_model(client)
        conversation = Conversation(client, name, model_kind(client, name), wanted)
        if system:
            conversation.messages.append({"role": "system", "content": system})
        converse(conversation)


def first_model(client: Client) -> str:
    entries = sorted(client.models(), key=lambda entry: entry.get("kind") != "chat")
    if not entries:
        raise Problem("The service has no model.")
    return str(entries[0]["id"])


def converse(conversation: Conversation) -> None:
    """Read turns until /quit or the end of input."""
    remark(f"{conversation.model}: {HELP}")
    while (line := read()) is not None and line != "/quit":
        try:
            follow(conversation, line)
        except Problem as problem:
            remark(str(problem))
        except KeyboardInterrupt:
            emit("\n")
            remark("stopped")


def read() -> str | None:
    """The next line, or None at the end of input."""
    try:
        return console().input("[bold]› [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def follow(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    if not line.startswith("/"):
        if line:
            conversation.say(line)
    elif command == "/reset":
        conversation.reset()
    elif command == "/model" and argument.strip():
        conversation.switch(argument.strip())
    elif command == "/seed" and argument.strip().isdigit():
        conversation.options = replace(conversation.options, seed=int(argument))
    else:
        remark(HELP)
