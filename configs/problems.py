"""What is wrong with a configuration, in words: the file, the field, the value, and what is accepted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

SECRET = {"key"}
VALUELESS = {"missing", "extra_forbidden"}


class ConfigError(ValueError):
    """A configuration that cannot be used. `file` and `problems`, one line each."""

    def __init__(self, file: str, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))
        self.file = file
        self.problems = tuple(problems)


def explain(error: ValidationError, tree: type[BaseModel]) -> list[str]:
    """One line for each problem: field path, value, message and what is accepted."""
    return [line(detail, tree) for detail in error.errors()]


def line(detail: ErrorDetails, tree: type[BaseModel]) -> str:
    parts = [part for part in (field(detail["loc"]), value(detail), message(detail), accepted(detail, tree)) if part]
    return ": ".join(parts)


def field(location: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def value(detail: ErrorDetails) -> str:
    given = detail["input"]
    hidden = detail["type"] in VALUELESS or isinstance(given, dict | BaseModel) or SECRET & set(detail["loc"])
    return "" if hidden else repr(given)[:80]


def message(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ")


def accepted(detail: ErrorDetails, tree: type[BaseModel]) -> str:
    """The names of the section for an unknown field, the description of the field otherwise."""
    location = [part for part in detail["loc"] if isinstance(part, str)]
    section = tree
    for part in location[:-1]:
        section = next(sections(section.model_fields[part].annotation), section) if part in section.model_fields else section
    if detail["type"] == "extra_forbidden":
        return f"accepted here are {', '.join(section.model_fields)}"
    known = section.model_fields.get(location[-1]) if location else None
    return (known.description or "") if known else ""


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)
