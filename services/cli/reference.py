"""The settings tree and the policy kinds as Markdown tables, so that the documentation cannot drift from the code.

`python -m services.cli.reference` writes them into docs/configuration.md and docs/operations.md, below the line that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.settings import Settings
from policies import FixedPolicy, GoodputPolicy, OffPolicy, ThresholdPolicy

Schema = Mapping[str, Any]
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "minLength": "length ≥"}
DOCS = Path(__file__).resolve().parents[2] / "docs"
MARK = "<!-- From here on generated: python -m services.cli.reference -->"


def settings() -> str:
    """One table for each section of the settings, the whole tree first."""
    schema = Settings.model_json_schema()
    sections = {"": schema} | dict(walk("", schema, schema["$defs"]))
    return "\n\n".join(section(f"`{path}`" if path else "The whole file", part) for path, part in sections.items())


def policies() -> str:
    """One table for each kind of policy, and one for what it holds."""
    return "\n\n".join(kind(policy.model_json_schema()) for policy in (GoodputPolicy, ThresholdPolicy, FixedPolicy, OffPolicy))


def kind(schema: Schema) -> str:
    name = schema["properties"]["kind"]["const"]
    below = [section(f"`{name}`: `{path}`", part) for path, part in walk("", schema, schema.get("$defs", {}))]
    return "\n\n".join([section(f"`{name}`", schema), *below])


PAGES = {"configuration.md": settings, "operations.md": policies}


def page(name: str) -> str:
    """A page of the documentation as it must read: what a person wrote, then the tables."""
    written = (DOCS / name).read_text(encoding="utf-8").partition(MARK)[0]
    return f"{written}{MARK}\n\n{PAGES[name]()}\n"


def write() -> None:
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")


def walk(path: str, schema: Schema, known: Schema) -> Iterator[tuple[str, Schema]]:
    """(path, schema) of every section below one."""
    for name, field in schema["properties"].items():
        below, many = target(field)
        if below is not None:
            at = f"{path}{name}{'[]' if many else ''}"
            yield at, known[below]
            yield from walk(f"{at}.", known[below], known)


def target(field: Schema) -> tuple[str | None, bool]:
    """The section that a field holds, and whether it holds a list of them."""
    options = [field, *field.get("anyOf", ()), field.get("items", {})]
    name = next((option["$ref"].rpartition("/")[2] for option in options if "$ref" in option), None)
    return name, "items" in field


def section(title: str, schema: Schema) -> str:
    """A heading, the section's description, and a line for each field."""
    required = schema.get("required", ())
    lines = [row(name, field, name in required) for name, field in schema["properties"].items()]
    described = re.sub(r"\s+", " ", schema["description"])
    return "\n".join([f"### {title}", "", described, "", "| field | value | default | |", "|---|---|---|---|", *lines])


def row(name: str, field: Schema, required: bool) -> str:
    cells = [f"`{name}`", value(field), default(field, required), field.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def value(field: Schema) -> str:
    """What a field accepts, in words."""
    below, many = target(field)
    if below is not None:
        return "list of sections" if many else "section"
    options = [value(option) for option in field.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        return " or ".join(options)
    if choices := [field["const"]] if "const" in field else field.get("enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if "items" in field:
        return f"list of {value(field['items'])}s"
    bounds = [f"{sign} {number(field[bound])}" for bound, sign in BOUNDS.items() if bound in field]
    name = str(field["type"]).replace("object", "mapping")
    return ", ".join([name, *bounds])


def default(field: Schema, required: bool) -> str:
    if required:
        return "required"
    if target(field)[0] is not None or "default" not in field:
        return ""
    return "none" if field["default"] is None else f"`{json.dumps(field['default'])}`"


def number(bound: float) -> str:
    return f"{bound:g}" if bound < 1e6 else f"{int(bound)}"


if __name__ == "__main__":
    write()
