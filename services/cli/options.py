"""Options that several commands share, as annotated types."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Mode = Literal["auto", "off", "fixed"]

Url = Annotated[str, typer.Option("--url", help="Address of the running service.")]
Key = Annotated[str | None, typer.Option("--key", help="API key, for a service that has keys.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Why = Annotated[str, typer.Option("--why", help="A note for the history.", show_default=False)]
Revision = Annotated[
    int | None,
    typer.Option("--expected-version", min=0, help="Change this revision only, fail at another.", show_default=False),
]
Domain = Annotated[str | None, typer.Option("--tag", help="The domain of requests with this tag.", show_default="the common one")]
Tag = Annotated[str | None, typer.Option("--tag", help="Tag of the request: its domain.", show_default=False)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Nucleus mass, above 0 and at most 1.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text to stop before; may be given several times.")]
Speculation = Annotated[Mode | None, typer.Option("--speculation", help="auto follows the policy; fixed drafts --depth deep.")]
Depth = Annotated[int | None, typer.Option("--depth", min=0, help="Most tokens to draft in a row.")]
Width = Annotated[int | None, typer.Option("--width", min=1, help="Most branches of a draft.")]
