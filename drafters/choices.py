"""How the choices of a request are named: `cmpl-5f3a-0` and `cmpl-5f3a-1` are of `cmpl-5f3a`. What is independent is the request."""

from __future__ import annotations

from collections.abc import Iterable


def choice_of(request: str, index: int) -> str:
    """The name of a request's choice."""
    return f"{request}-{index}"


def request_of(choice: str) -> str:
    """The id of the request that a choice belongs to."""
    return choice.rstrip("0123456789").removesuffix("-")


def requests(choices: Iterable[str]) -> int:
    """How many requests choices are of."""
    return len({request_of(choice) for choice in choices})
